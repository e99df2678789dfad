"""How well a score separates outliers from the data: areas under curves, and the false positives at a fixed recall."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..saving.extras import missing


@dataclass(frozen=True)
class Detection:
    """How well a score separates outliers from the data.

    Attributes:
        auroc: area under the ROC curve, the probability that an outlier scores higher.
        auprc: area under the precision-recall curve, as average precision; outliers are positive.
        fpr80: share of the data above the score that 80 % of the outliers reach.
    """

    auroc: float
    auprc: float
    fpr80: float


def detection(scores: Tensor, outliers: Tensor) -> list[Detection]:
    """Figures of every cut.

    Args:
        scores: of the data (N, L).
        outliers: of the outliers (M, L).

    Returns:
        One entry per cut k.

    Raises:
        ImportError: scikit-learn is not installed.
        ValueError: the two differ in L, one is empty, or they are not finite.
    """
    try:
        from sklearn.metrics import average_precision_score, roc_auc_score, roc_curve  # type: ignore[import-untyped]
    except ImportError as error:
        raise missing("detection needs scikit-learn", "ood") from error
    matrices = scores.ndim == outliers.ndim == 2 and scores.shape[1] == outliers.shape[1]
    if not matrices or not len(scores) or not len(outliers):
        raise ValueError(f"scores: expected (N, L) and (M, L), got {tuple(scores.shape)} and {tuple(outliers.shape)}")
    truth = (torch.arange(len(scores) + len(outliers), device="cpu") >= len(scores)).numpy()
    figures = []
    for column in torch.cat((scores, outliers)).cpu().double().unbind(1):
        values = column.numpy()
        false_positive_rate, true_positive_rate, _ = roc_curve(truth, values)
        reached = (true_positive_rate >= 0.8).argmax()
        figures.append(
            Detection(
                auroc=float(roc_auc_score(truth, values)),
                auprc=float(average_precision_score(truth, values)),
                fpr80=float(false_positive_rate[reached]),
            )
        )
    return figures
