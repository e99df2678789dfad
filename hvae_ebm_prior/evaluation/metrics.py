"""Distances between two sets of images, from features (N, K) of any fixed extractor.

    Fréchet distance    FD = |m_1 - m_2|^2 + tr(S_1 + S_2 - 2 (S_1 S_2)^{1/2})
                        Heusel et al., 2017; FID with Inception's pool features
    kernel distance     KID = MMD^2 with the kernel (x.y / K + 1)^3, unbiased
                        Binkowski et al., 2018; mean over subsets
    precision, recall   shares inside the union of the other set's 3-nearest balls
                        Kynkäänniemi et al., 2019
    Inception score     IS = exp E KL(p(y | x) || p(y)), of class logits
                        Salimans et al., 2016; mean over splits

All but FD are computed by torch-fidelity with its own settings, so that they are what it prints for the same features.
"""

from typing import Any

import torch
from torch import Tensor

from ..saving.extras import missing
from .torchvision_stand_in import import_torch_fidelity

# Mean (K,) and covariance (K, K), float64.
Moments = tuple[Tensor, Tensor]
# torch-fidelity's own: size of KID's subsets at most, and the seed that picks them and shuffles before IS splits.
SUBSET_SIZE = 1000
SEED = 2020
# Splits of IS; fewer images would leave empty ones.
SPLITS = 10


def moments(features: Tensor) -> Moments:
    """Mean and covariance of features.

    Args:
        features: (N, K).

    Returns:
        Mean (K,) and covariance (K, K), float64, on the CPU.

    Raises:
        ValueError: no matrix, fewer than two rows, or not finite.
    """
    if features.ndim != 2 or len(features) < 2 or not bool(torch.isfinite(features).all()):
        raise ValueError(f"features: expected a finite matrix (N, K) with N >= 2, got {tuple(features.shape)}")
    x = features.detach().to("cpu", torch.float64)
    return x.mean(0), torch.cov(x.T).reshape(x.shape[1], x.shape[1])


def frechet_distance(features: Tensor | Moments, reference: Tensor | Moments) -> float:
    """Fréchet distance between Gaussians fitted to two sets of features.

    Args:
        features: (N, K), or their moments.
        reference: (M, K), or their moments.

    Returns:
        The distance, in squared units of the features; at least 0.

    Raises:
        ValueError: a set is no matrix, has fewer than two rows or is not finite, or the two differ in K.
    """
    mean_1, cov_1 = moments(features) if isinstance(features, Tensor) else features
    mean_2, cov_2 = moments(reference) if isinstance(reference, Tensor) else reference
    if mean_1.shape != mean_2.shape:
        raise ValueError(
            f"features: expected as many as the reference has, {len(mean_2)}, got {len(mean_1)}; "
            "both must come from one extractor"
        )
    # tr (S_1 S_2)^{1/2} by the symmetric S_1^{1/2} S_2 S_1^{1/2}, which has the same eigenvalues, all real.
    values, vectors = torch.linalg.eigh(cov_1)
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    cross = torch.linalg.eigvalsh(root @ cov_2 @ root).clamp(min=0).sqrt().sum()
    distance = (mean_1 - mean_2).square().sum() + cov_1.trace() + cov_2.trace() - 2 * cross
    return max(distance.item(), 0.0)


def kernel_distance(features: Tensor, reference: Tensor) -> dict[str, float]:
    """KID of two sets of features.

    Args:
        features: (N, K) float32, on the CPU.
        reference: (M, K), likewise.

    Returns:
        "kid" and "kid_std": mean and std over 100 subsets of 1,000 of each set, or of as many as the smaller one has.
        It is unbiased: equal distributions give 0 on average, and so also values below.

    Raises:
        ImportError: torch-fidelity cannot be imported.
    """
    size = min(SUBSET_SIZE, len(features), len(reference))
    found = fidelity("metric_kid").kid_features_to_metric(
        features, reference, kid_subset_size=size, rng_seed=SEED, verbose=False
    )
    return {"kid": found["kernel_inception_distance_mean"], "kid_std": found["kernel_inception_distance_std"]}


def precision_recall(features: Tensor, reference: Tensor) -> dict[str, float]:
    """Precision and recall of two sets of features.

    Args:
        features: (N, K) float32 of generated images, on the CPU; N >= 4.
        reference: (M, K) of real ones, likewise.

    Returns:
        "precision": the share of `features` no farther from some reference than that one's 3rd nearest neighbour;
        "recall": the reverse.

    Raises:
        ImportError: torch-fidelity cannot be imported.
    """
    # In parts, so that no N x M matrix is held.
    settings = {"save_cpu_ram": True, "prc_batch_size": 1000, "verbose": False}
    found = fidelity("metric_prc").prc_features_to_metric(features, reference, **settings)
    return {"precision": found["precision"], "recall": found["recall"]}


def inception_score(logits: Tensor) -> dict[str, float]:
    """IS of class logits.

    Args:
        logits: (N, classes), on the CPU; N >= 10.

    Returns:
        "inception_score" and "inception_score_std": mean and std over 10 splits of the images, shuffled.

    Raises:
        ImportError: torch-fidelity cannot be imported.
    """
    found = fidelity("metric_isc").isc_features_to_metric(logits, splits=SPLITS, shuffle=True, rng_seed=SEED)
    return {"inception_score": found["inception_score_mean"], "inception_score_std": found["inception_score_std"]}


def fidelity(module: str) -> Any:
    """A module of torch-fidelity."""
    try:
        return import_torch_fidelity(module)
    except ImportError as error:
        # Without its own dependencies: pip would bring torchvision with them, and with it another PyTorch.
        needed = f"torch-fidelity (pip install --no-deps torch-fidelity), Pillow and tqdm ({error})"
        raise missing(
            f"Inception features, KID, precision, recall and the Inception score need {needed}", "evaluate"
        ) from error
