"""The rows of an evaluation as text."""

from collections.abc import Sequence

from .protocol import EvaluationRow

TITLES = {
    "kid": "KID",
    "kid_std": "+-",
    "precision": "precision",
    "recall": "recall",
    "inception_score": "IS",
    "inception_score_std": "+-",
}


def table(rows: Sequence[EvaluationRow], title: str) -> str:
    """The rows as text; `title` names the distance."""
    names = list(rows[0].metrics)
    lines = [f"{'':28}{title:>10}{'closure':>10}{''.join(f'{TITLES[name]:>10}' for name in names)}{'seconds':>10}"]
    for row in rows:
        others = "".join(f"{row.metrics[name]:10.4f}" for name in names)
        lines.append(f"{row.name:28}{row.distance:10.3f}{row.closure:10.3f}{others}{row.seconds:10.1f}")
    return "\n".join(lines)
