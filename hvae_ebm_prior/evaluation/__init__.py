"""Is it any good? Of an adapter, a model and a prior: checks, diagnosis, metrics, likelihood, outliers, comparisons,
pictures.

May import from all rooms but cli, and from the prior itself.
"""

from .comparison import compare
from .diagnosis import describe_layers
from .metrics import frechet_distance
from .protocol import EvaluationRow, evaluate, in_chunks
from .table import table

__all__ = ["EvaluationRow", "compare", "describe_layers", "evaluate", "frechet_distance", "in_chunks", "table"]
