"""Does an adapter keep its promises? What to run on your own, once, before you train a prior on it:

    from hvae_ebm_prior.testing import check_adapter
    check_adapter(MyAdapter(model), images)

raises with a list of the promises it breaks, or prints what its layers do.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from ..backbone.lock import lock
from ..backbone.transform import BackboneAdapter, NoiseTransform
from ..backbone.validation import check_images, takes_tensors
from ..chains.streams import draw_seeds, seeded
from .diagnosis import LayerReport, describe_layers, layer_table


def check_adapter(
    adapter: BackboneAdapter,
    images: Tensor,
    *,
    tolerance: float | None = None,
    generator: torch.Generator | None = None,
) -> list[LayerReport]:
    """Check an adapter on real images, and print what its layers do.

    Args:
        adapter: the adapter, around a trained model.
        images: at least 8 images (N, C, H, W) in [0, 1], in the form the prior will be given; some hundreds make the
            table useful.
        tolerance: largest error of T(T^-1(z)) and between batch sizes, relative to the largest entry; None for one in a
            thousand, or eight times the rounding error of the latents' type where that is more.
        generator: source of all randomness; None takes torch's default generator.

    Returns:
        One report per layer, top to bottom; printed as a table too.

    Raises:
        TypeError: it is no adapter, or the images are no floating-point tensor.
        ValueError: it breaks one or more promises; the message lists them.
    """
    check_images(images, adapter)
    if len(images) < 8:
        raise ValueError(f"images: expected at least 8, got {len(images)}")
    faults = list(find_faults(adapter, images, tolerance=tolerance, generator=generator))
    if faults:
        raise ValueError(f"{type(adapter).__name__} breaks {len(faults)} promise(s):\n- " + "\n- ".join(faults))
    reports = describe_layers(adapter, images, generator=generator)
    print(layer_table(reports))
    return reports


def find_faults(
    adapter: BackboneAdapter,
    images: Tensor,
    *,
    tolerance: float | None = None,
    generator: torch.Generator | None = None,
) -> Iterator[str]:
    """Every promise that `adapter` breaks, in words; arguments as in `check_adapter`."""
    release = lock(adapter)
    try:
        # A new transform reads the shapes with a batch of 2 and checks every mean and std; it raises what is too wrong
        # to go on.
        transform = NoiseTransform(adapter)
        seed, seed_u = draw_seeds(2, generator)
        probe = Probe(
            transform=transform,
            images=images[:32].to(transform.device, transform.dtype),
            u=seeded_noise(transform, 8, seed_u),
            infer=partial(seeded_infer, adapter, seed),
            seed=seed_u,
            tolerance=max(1e-3, 8 * torch.finfo(transform.dtype).eps) if tolerance is None else tolerance,
        )
        for check in CHECKS:
            try:
                yield from check(probe)
            except (ValueError, TypeError, RuntimeError, IndexError) as error:
                yield f"{type(error).__name__}: {error}"
    finally:
        release()


def seeded_noise(transform: NoiseTransform, n: int, seed: int) -> Tensor:
    """Standard normal noise (n, D), the same at every call."""
    with seeded(seed, transform.device):
        return torch.randn(n, transform.dim, device=transform.device, dtype=transform.dtype)


@torch.no_grad()
def seeded_infer(adapter: BackboneAdapter, seed: int, images: Tensor) -> list[Tensor]:
    """The same posterior draws of the same images at every call."""
    with seeded(seed, images.device):
        return list(adapter.infer(images))


@dataclass(frozen=True)
class Probe:
    """What the checks put an adapter to the test with.

    Attributes:
        transform: the adapter's layers.
        images: up to 32 of the given images, on the adapter's device.
        u: standard normal noise (8, D).
        infer: the adapter's posterior, with the same draws at every call.
        seed: of further noise.
        tolerance: largest relative error.
    """

    transform: NoiseTransform
    images: Tensor
    u: Tensor
    infer: Callable[[Tensor], list[Tensor]]
    seed: int
    tolerance: float


@torch.no_grad()
def shapes(probe: Probe) -> Iterator[str]:
    """Latents and images have their shapes at every batch size, and images their range."""
    transform, images = probe.transform, probe.images
    for n in (1, 2, 5):
        # This checks every mean and std.
        transform.log_abs_det(images.new_zeros(n, transform.dim))
        transform.check_layers(probe.infer(images[:n]), f"infer with {n} image(s)")
        decoded = transform.decode(images.new_zeros(n, transform.dim))
        if decoded.shape != images[:n].shape:
            yield f"decode: expected images {tuple(images[:n].shape)} as they were given, got {tuple(decoded.shape)}"
            return
    decoded = transform.decode(images.new_ones(4, transform.dim))
    if takes_tensors(transform.adapter):
        if not bool(decoded.isfinite().all()):
            yield "decode: expected finite values, got NaN or infinite ones"
    elif decoded.min() < 0 or decoded.max() > 1 or bool(decoded.isnan().any()):
        yield f"decode: expected images in [0, 1], got {decoded.min():.3g} to {decoded.max():.3g}"


@torch.no_grad()
def inversion(probe: Probe) -> Iterator[str]:
    """T and its inverse undo each other, on prior and on posterior noise."""
    transform = probe.transform
    posterior = transform.to_noise(probe.infer(probe.images))
    for what, noise in (("standard normal noise", probe.u), ("posterior noise", posterior)):
        error = ((transform.to_noise(transform.to_latents(noise)) - noise).abs().max() / noise.abs().max()).item()
        if not error <= probe.tolerance:
            yield (
                f"top_down: the inverse of T is off by {error:.1g} of the largest entry on {what}: "
                "does it draw random numbers?"
            )


@torch.no_grad()
def layer_order(probe: Probe) -> Iterator[str]:
    """Posterior draws are more likely in the order they are given than in the opposite one."""
    z = probe.infer(probe.images)
    # The opposite order fits only where the shapes are the same from either end.
    if [part.shape for part in z] != [part.shape for part in reversed(z)] or len(z) == 1:
        return

    def log_density(latents: list[Tensor]) -> Tensor:
        u = probe.transform.to_noise(latents)
        return -u.square().sum(1) / 2 - probe.transform.log_abs_det(u)

    gain = log_density(z[::-1]) - log_density(z)
    if gain.mean() > 3 * gain.std() / len(gain) ** 0.5:
        yield (
            f"infer: its latents are likelier, by {gain.mean():.1f} nats, if they are taken from bottom to top: "
            "reverse the list"
        )


@torch.no_grad()
def reconstruction(probe: Probe) -> Iterator[str]:
    """Posterior draws, decoded, are closer to their images than samples of the prior are."""
    transform, images = probe.transform, probe.images

    def squared_error(u: Tensor) -> Tensor:
        return (transform.decode(u) - images).square().flatten(1).mean(1)

    posterior = squared_error(transform.to_noise(probe.infer(images)))
    prior = squared_error(seeded_noise(transform, len(images), probe.seed))
    gain = prior - posterior
    if not gain.mean() > 2 * gain.std() / len(gain) ** 0.5:
        yield (
            "infer and decode: reconstructions are no closer to their images "
            f"(mean squared error {posterior.mean():.3g}) than samples of the prior are ({prior.mean():.3g}): "
            "is the model trained, and are images normalised as in its training?"
        )


@torch.no_grad()
def independence(probe: Probe) -> Iterator[str]:
    """Given u the image is determined, by the sample's own noise alone, and no random number is drawn."""
    decode, u = probe.transform.decode, probe.u
    state = torch.get_rng_state()
    first = decode(u)
    if not torch.equal(torch.get_rng_state(), state):
        yield (
            "top_down or decode: draws from the global generator although all noise is given; see torch.random.fork_rng"
        )
    limit = probe.tolerance * first.abs().max()
    if not (decode(u) - first).abs().max() <= limit:
        yield "top_down and decode: the same noise gave two different images"
        return
    among_others = decode(torch.cat((u[:1], 3 * u[1:])))
    if not (among_others[:1] - first[:1]).abs().max() <= limit:
        yield (
            "top_down and decode: an image depends on the others in its batch: "
            "is there batch norm outside the adapter's attributes?"
        )


def gradients(probe: Probe) -> Iterator[str]:
    """Autograd goes from the image to the noise of every layer, and to no parameter."""
    with torch.enable_grad():
        # A large model's graph of more would not fit.
        u = probe.u[:2].clone().requires_grad_()
        images = probe.transform.decode(u)
        if not images.requires_grad:
            yield (
                "decode: autograd does not reach u: "
                "is there a detach, a no_grad or a conversion to NumPy in top_down or decode?"
            )
            return
        others = [leaf for leaf in leaves(images) if leaf is not u]
        if others:
            yield (
                f"autograd also reaches {len(others)} other tensor(s): "
                "keep the model as an attribute of the adapter, so that it is frozen"
            )
        # Random weights, as a plain sum may not depend on u.
        weights = torch.linspace(-1, 1, images.numel(), device=u.device, dtype=images.dtype).sin().reshape(images.shape)
        gradient = torch.autograd.grad((images * weights).sum(), u)[0]
    for i, part in enumerate(probe.transform.split(gradient)):
        if not bool(torch.isfinite(part).all()):
            yield f"layer {i}: the image's gradient in u is not finite"
        elif not bool((part != 0).any()):
            yield f"layer {i}: the image does not depend on its noise"


CHECKS: tuple[Callable[[Probe], Iterator[str]], ...] = (
    shapes,
    inversion,
    layer_order,
    reconstruction,
    independence,
    gradients,
)


def leaves(tensor: Tensor) -> list[Tensor]:
    """Every tensor with requires_grad at which the graph of `tensor` ends."""
    found = []
    visited = set()
    pending = [tensor.grad_fn]
    while pending:
        node = pending.pop()
        if node is None or node in visited:
            continue
        visited.add(node)
        if hasattr(node, "variable"):
            found.append(node.variable)
        pending += [following for following, _ in node.next_functions]
    return found
