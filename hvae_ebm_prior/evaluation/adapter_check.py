"""Does an adapter keep its promises? What to run on your own, once, before you train a prior on it.

from .adapter_check import check_adapter
check_adapter(MyAdapter(model), images)
"""

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from ..backbone.lock import lock
from ..backbone.transform import BackboneAdapter, NoiseTransform
from ..backbone.validation import check_images
from ..chains.streams import draw_seeds, seeded
from .diagnosis import LayerReport, describe_layers, table


def check_adapter(
    adapter: BackboneAdapter, images: Tensor, *, tolerance: float = 1e-3, generator: torch.Generator | None = None
) -> list[LayerReport]:
    """Check an adapter on real images, and print what its layers do.

    Args:
        adapter: the adapter, around a trained model.
        images: at least 8 images (N, C, H, W) in [0, 1], in the form the prior will be given; some hundreds make the
            table useful.
        tolerance: largest error of T(T^-1(z)) and between batch sizes, relative to the largest entry.
        generator: source of all randomness; None takes torch's default generator.

    Returns:
        One report per layer, top to bottom; printed as a table too.

    Raises:
        TypeError: the adapter is none, or the images are no floating-point tensor.
        ValueError: it breaks one or more promises; the message lists them.
    """
    check_images(images)
    if len(images) < 8:
        raise ValueError(f"images: expected at least 8, got {len(images)}")
    faults = list(find_faults(adapter, images, tolerance=tolerance, generator=generator))
    if faults:
        raise ValueError(f"{type(adapter).__name__} breaks {len(faults)} promise(s):\n- " + "\n- ".join(faults))
    reports = describe_layers(adapter, images, generator=generator)
    print(table(reports))
    return reports


def find_faults(
    adapter: BackboneAdapter, images: Tensor, *, tolerance: float = 1e-3, generator: torch.Generator | None = None
) -> Iterator[str]:
    """Every promise that `adapter` breaks, in words; arguments as in `check_adapter`."""
    release = lock(adapter)
    try:
        # A new transform reads the shapes with a batch of 2 and checks every mean and std; it raises what is too wrong
        # to go on.
        transform = NoiseTransform(adapter)
        images = images[:32].to(transform.device, transform.dtype)
        seed, seed_u = draw_seeds(2, generator)
        with seeded(seed_u, transform.device):
            u = torch.randn(8, transform.dim, device=transform.device, dtype=transform.dtype)
        infer = partial(seeded_infer, adapter, seed)
        checks: list[Callable[[], Iterator[str]]] = [
            lambda: shapes(transform, images, infer),
            lambda: inversion(transform, u, images, infer, tolerance),
            lambda: layer_order(transform, images, infer),
            lambda: reconstruction(transform, images, infer, seed_u),
            lambda: independence(transform, u, tolerance),
            lambda: gradients(transform, u),
        ]
        for check in checks:
            try:
                yield from check()
            except (ValueError, TypeError, RuntimeError, IndexError) as error:
                yield f"{type(error).__name__}: {error}"
    finally:
        release()


@torch.no_grad()
def seeded_infer(adapter: BackboneAdapter, seed: int, images: Tensor) -> list[Tensor]:
    """The same posterior draws of the same images at every call."""
    with seeded(seed, images.device):
        return list(adapter.infer(images))


Infer = Callable[[Tensor], list[Tensor]]


@torch.no_grad()
def shapes(transform: NoiseTransform, images: Tensor, infer: Infer) -> Iterator[str]:
    """Latents and images have their shapes at every batch size, and images their range."""
    for n in (1, 2, 5):
        transform.log_abs_det(images.new_zeros(n, transform.dim))  # checks every mean and std
        transform.check_layers(infer(images[:n]), f"infer with {n} image(s)")
        decoded = transform.decode(images.new_zeros(n, transform.dim))
        if decoded.shape != images[:n].shape:
            yield f"decode: expected images {tuple(images[:n].shape)} as they were given, got {tuple(decoded.shape)}"
            return
    decoded = transform.decode(images.new_ones(4, transform.dim))
    if decoded.min() < 0 or decoded.max() > 1 or bool(decoded.isnan().any()):
        yield f"decode: expected images in [0, 1], got {decoded.min():.3g} to {decoded.max():.3g}"


@torch.no_grad()
def inversion(transform: NoiseTransform, u: Tensor, images: Tensor, infer: Infer, tolerance: float) -> Iterator[str]:
    """T and its inverse undo each other, on prior and on posterior noise."""
    for what, noise in (("standard normal noise", u), ("posterior noise", transform.to_noise(infer(images)))):
        error = ((transform.to_noise(transform.to_latents(noise)) - noise).abs().max() / noise.abs().max()).item()
        if not error <= tolerance:
            yield f"top_down: the inverse of T is off by {error:.1g} of the largest entry on {what}: does it draw random numbers?"


@torch.no_grad()
def layer_order(transform: NoiseTransform, images: Tensor, infer: Infer) -> Iterator[str]:
    """Posterior draws are more likely in the order they are given than in the opposite one."""
    z = infer(images)
    if [part.shape for part in z] != [part.shape for part in reversed(z)] or len(z) == 1:
        return

    def log_density(latents: list[Tensor]) -> Tensor:
        u = transform.to_noise(latents)
        return -u.square().sum(1) / 2 - transform.log_abs_det(u)

    gain = log_density(z[::-1]) - log_density(z)
    if gain.mean() > 3 * gain.std() / len(gain) ** 0.5:
        yield f"infer: its latents are likelier, by {gain.mean():.1f} nats, if they are taken from bottom to top: reverse the list"


@torch.no_grad()
def reconstruction(transform: NoiseTransform, images: Tensor, infer: Infer, seed: int) -> Iterator[str]:
    """Posterior draws, decoded, are closer to their images than samples of the prior are."""
    with seeded(seed, images.device):
        noise = torch.randn(len(images), transform.dim, device=images.device, dtype=images.dtype)
    posterior, prior = (
        (transform.decode(u) - images).square().flatten(1).mean(1) for u in (transform.to_noise(infer(images)), noise)
    )
    gain = prior - posterior
    if not gain.mean() > 2 * gain.std() / len(gain) ** 0.5:
        yield (
            f"infer and decode: reconstructions are no closer to their images (mean squared error {posterior.mean():.3g}) than samples of the prior "
            f"are ({prior.mean():.3g}): is the model trained, and are images normalised as in its training?"
        )


@torch.no_grad()
def independence(transform: NoiseTransform, u: Tensor, tolerance: float) -> Iterator[str]:
    """Given u the image is determined, by the sample's own noise alone, and no random number is drawn."""
    state = torch.get_rng_state()
    first = transform.decode(u)
    if not torch.equal(torch.get_rng_state(), state):
        yield "top_down or decode: draws from the global generator although all noise is given; see torch.random.fork_rng"
    scale = first.abs().max()
    if not (transform.decode(u) - first).abs().max() <= tolerance * scale:
        yield "top_down and decode: the same noise gave two different images"
    elif not (transform.decode(torch.cat((u[:1], 3 * u[1:])))[:1] - first[:1]).abs().max() <= tolerance * scale:
        yield "top_down and decode: an image depends on the others in its batch: is there batch norm outside the adapter's attributes?"


def gradients(transform: NoiseTransform, u: Tensor) -> Iterator[str]:
    """Autograd goes from the image to the noise of every layer, and to no parameter."""
    with torch.enable_grad():
        u = u[:2].clone().requires_grad_()  # a large model's graph of more would not fit
        images = transform.decode(u)
        if not images.requires_grad:
            yield "decode: autograd does not reach u: is there a detach, a no_grad or a conversion to NumPy in top_down or decode?"
            return
        others = [leaf for leaf in leaves(images) if leaf is not u]
        if others:
            yield f"autograd also reaches {len(others)} other tensor(s): keep the model as an attribute of the adapter, so that it is frozen"
        # Random weights, as a plain sum may not depend on u.
        weights = torch.linspace(-1, 1, images.numel(), device=u.device, dtype=images.dtype).sin().reshape(images.shape)
        gradient = torch.autograd.grad((images * weights).sum(), u)[0]
    for i, part in enumerate(transform.split(gradient)):
        if not bool(torch.isfinite(part).all()):
            yield f"layer {i}: the image's gradient in u is not finite"
        elif not bool((part != 0).any()):
            yield f"layer {i}: the image does not depend on its noise"


def leaves(tensor: Tensor) -> list[Tensor]:
    """Every tensor with requires_grad at which the graph of `tensor` ends."""
    found, seen, pending = [], set(), [tensor.grad_fn]
    while pending:
        node = pending.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            found.append(node.variable)
        pending += [following for following, _ in node.next_functions]
    return found
