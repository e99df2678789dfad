"""Is it any good? Checks of adapters, diagnosis of models; metrics, likelihoods, outlier scores, comparisons of priors.

May import from all rooms but cli, and from the prior itself.
"""

from .comparison import compare
from .diagnosis import describe_layers
from .metrics import frechet_distance
from .protocol import EvaluationRow, evaluate, in_chunks
from .table import table

__all__ = ["EvaluationRow", "compare", "describe_layers", "evaluate", "frechet_distance", "in_chunks", "table"]
