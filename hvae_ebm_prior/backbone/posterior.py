"""Posterior draws with the Gaussians that they are from, of a top-down model.

    q(z|x) = prod_i N(z_i; m_i(z_<i, x), s_i(z_<i, x)^2)
    u_i = (z_i - mean_i) / std_i  ~  N((m_i - mean_i) / std_i, (s_i / std_i)^2)

given the image x and the draws above, with mean_i and std_i of the prior.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple, Protocol, TypeGuard, runtime_checkable

from torch import Tensor

from .transform import BackboneAdapter, NoiseTransform

# Standard deviations by which statistics of posterior draws may be off those of their Gaussians.
DEVIATIONS = 6


@runtime_checkable
class PosteriorAdapter(BackboneAdapter, Protocol):
    """An adapter that also says which Gaussians its posterior draws are from, as score matching then learns faster.

    For top-down models: a layer's Gaussian depends on the image and on the latents drawn above it alone.
    """

    def infer_with_posterior(self, images: Tensor) -> Iterable[tuple[Tensor, Tensor, Tensor]] | None:
        """As `infer`, and with every draw mean and std of its q(z_i | z_<i, x); all three (N, *shape).

        None, before anything is drawn, where that is no Gaussian of independent dimensions, as after flows.
        """


class Posterior(NamedTuple):
    """The Gaussians that posterior noise was drawn from, u_i ~ N(mean_i, std_i^2) given the image and the draws above;
    both (N, D).
    """

    mean: Tensor
    std: Tensor


def gives_posterior(adapter: BackboneAdapter) -> TypeGuard[PosteriorAdapter]:
    """Whether an adapter says which Gaussians its draws are from: with a method of its own, or of the class that its
    `infer` is of too; where a subclass has another `infer`, what it inherits need not fit that.
    """
    if not isinstance(adapter, PosteriorAdapter):
        return False
    owners = [getattr(owner, "__dict__", {}) for owner in (adapter, *type(adapter).__mro__)]
    with_posterior, without = (
        [i for i, names in enumerate(owners) if name in names] for name in ("infer_with_posterior", "infer")
    )
    return bool(with_posterior) and with_posterior[0] <= min(without, default=len(owners))


def posterior_to_noise(
    transform: NoiseTransform, drawn: Sequence[tuple[Tensor, Tensor, Tensor]]
) -> tuple[Tensor, Posterior]:
    """Noise u (N, D) of posterior draws, and the Gaussians that it was drawn from.

    Args:
        transform: the backbone.
        drawn: every layer's latent, with mean and std of its posterior, as of `infer_with_posterior`.

    Returns:
        Noise and Gaussians.

    Raises:
        TypeError, ValueError: a part has a wrong shape, a std is not positive, or the latents are no draws from these
            Gaussians.
    """
    name = f"{type(transform.adapter).__name__}.infer_with_posterior"
    if not all(isinstance(layer, tuple | list) and len(layer) == 3 for layer in drawn):
        raise TypeError(f"{name}: expected (z, mean, std) of every layer, or None in the place of all")
    z, means, stds = ([layer[k] for layer in drawn] for k in range(3))
    transform.check_layers(means, f"means of {name}")
    transform.check_layers(stds, f"stds of {name}")
    gaussians = transform.checked_gaussians(z)
    u = transform.join([(z_i - mean) / std for z_i, (mean, std) in zip(z, gaussians, strict=True)])
    own_mean = transform.join([(own - mean) / std for own, (mean, std) in zip(means, gaussians, strict=True)])
    own_std = transform.join([own / std for own, (_, std) in zip(stds, gaussians, strict=True)])
    off = deviations((u - own_mean) / own_std)
    if not (bool((own_std > 0).all()) and off <= DEVIATIONS):
        raise ValueError(
            f"{name}: expected every z as drawn from its mean and its positive std, got others, {off:.3g} standard "
            "deviations off; return None where the posterior is no Gaussian of independent dimensions"
        )
    return u, Posterior(own_mean, own_std)


def deviations(residual: Tensor) -> float:
    """How many standard deviations mean or mean square of residuals are off those of standard normal numbers."""
    n = residual.numel()
    # Of n such numbers the mean is N(0, 1/n), and that of the squares nearly N(1, 2/n), but for the error of half
    # precision.
    of_mean = abs(residual.mean().item()) / (1 / n) ** 0.5
    of_square = abs(residual.square().mean().item() - 1) / ((2 / n) ** 0.5 + 0.01)
    return max(of_mean, of_square)
