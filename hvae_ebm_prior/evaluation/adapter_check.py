"""Does an adapter keep its promises? What to run on your own, once, before you train a prior on it:

    from hvae_ebm_prior.testing import check_adapter
    check_adapter(MyAdapter(model), images)

raises with a list of the promises it breaks, or prints what its layers do. All of this is about the adapter alone: that
its densities are the model's own shows only against samples that the model itself has drawn (`own_samples`).
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from ..backbone.lock import backbone_modules, check_frozen, lock, watch_modules
from ..backbone.transform import BackboneAdapter, NoiseTransform
from ..backbone.validation import check_decoded, check_images
from ..chains.autograd import usable
from ..chains.streams import draw_seeds, seeded
from .diagnosis import LayerReport, describe_layers, layer_table
from .own_samples import check_samples, compare_samples
from .random_draws import Draws, random_state

# What adapters raise that were written for something else than they are given.
MISTAKES = (ValueError, TypeError, RuntimeError, LookupError, AttributeError)


def check_adapter(
    adapter: BackboneAdapter,
    images: Tensor,
    *,
    samples: Tensor | None = None,
    tolerance: float | None = None,
    generator: torch.Generator | None = None,
) -> list[LayerReport]:
    """Check an adapter on real images, and print what its layers do.

    Args:
        adapter: the adapter, around a trained model.
        images: at least 8 images (N, C, H, W) in [0, 1], in the form the prior will be given; some hundreds make the
            table useful.
        samples: at least 64 samples (M, C, H, W) in [0, 1] that the model's own code has drawn, at temperature 1, as
            the adapter decodes: means of p(x | z) where it gives means. They alone show a wrong mean or std of a layer;
            some hundreds see more.
        tolerance: largest error of T(T^-1(z)) and between batch sizes, relative to the largest entry; None for one in a
            thousand, or eight times the rounding error of the model's type where that is more.
        generator: source of all randomness; None takes torch's default generator.

    Returns:
        One report per layer, top to bottom; printed as a table too.

    Raises:
        TypeError: it is no adapter, or the images are no floating-point tensor.
        ValueError: it breaks one or more promises; the message lists them.
    """
    faults = list(find_faults(adapter, images, samples=samples, tolerance=tolerance, generator=generator))
    if faults:
        raise ValueError(fault_list(adapter, faults))
    reports = describe_layers(adapter, images, generator=generator)
    print(layer_table(reports))
    return reports


def fault_list(adapter: BackboneAdapter, faults: Sequence[str]) -> str:
    """What `find_faults` found, as text."""
    promises = "1 promise" if len(faults) == 1 else f"{len(faults)} promises"
    return "\n- ".join([f"{type(adapter).__name__} breaks {promises}:", *faults])


def find_faults(
    adapter: BackboneAdapter,
    images: Tensor,
    *,
    samples: Tensor | None = None,
    tolerance: float | None = None,
    generator: torch.Generator | None = None,
) -> Iterator[str]:
    """Every promise that `adapter` breaks, in words; arguments and errors as of `check_adapter`."""
    check_images(images, adapter)
    if len(images) < 8:
        raise ValueError(f"images: expected at least 8, got {len(images)}")
    if samples is not None:
        check_samples(samples, adapter)
    release = lock(adapter)
    try:
        with torch.inference_mode(False):
            # A new transform reads the shapes with a batch of 2 and checks every mean and std; it raises what is too
            # wrong to go on.
            transform = NoiseTransform(adapter)
            yield from faults_of(transform, usable(images[:32]), samples, tolerance, generator)
    finally:
        release()


def faults_of(
    transform: NoiseTransform,
    images: Tensor,
    samples: Tensor | None,
    tolerance: float | None,
    generator: torch.Generator | None,
) -> Iterator[str]:
    """What the checks find; a check whose result would follow from what another one found is left out."""
    seed, seed_u, other_seed = draw_seeds(3, generator)
    probe = Probe(
        transform=transform,
        images=images,
        samples=samples,
        u=seeded_noise(transform, 8, seed_u),
        infer=partial(seeded_infer, transform, seed),
        infer_anew=partial(seeded_infer, transform, other_seed),
        seed=seed_u,
        tolerance=max(1e-3, 8 * rounding(transform)) if tolerance is None else tolerance,
    )
    passed: set[Callable[[Probe], Iterator[str]]] = set()
    for check, needed in CHECKS.items():
        if not passed.issuperset(needed):
            continue
        found: list[str] = []
        try:
            found += check(probe)
        except MISTAKES as error:
            found.append(str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}")
        yield from found
        if not found:
            passed.add(check)


def rounding(transform: NoiseTransform) -> float:
    """Rounding error of the coarsest type of the model's weights and latents."""
    weights = [p.dtype for module in backbone_modules(transform.adapter) for p in module.parameters()]
    return max(torch.finfo(dtype).eps for dtype in (transform.dtype, *weights) if dtype.is_floating_point)


def seeded_noise(transform: NoiseTransform, n: int, seed: int) -> Tensor:
    """Standard normal noise (n, D), the same at every call."""
    with seeded(seed, transform.device):
        return torch.randn(n, transform.dim, device=transform.device, dtype=transform.dtype)


@torch.no_grad()
def seeded_infer(transform: NoiseTransform, seed: int, images: Tensor) -> list[Tensor]:
    """The same posterior draws of the same images at every call."""
    with seeded(seed, transform.device):
        z = transform.infer(images)
    transform.check_layers(z, f"infer with a batch of {len(images)}")
    if not all(bool(torch.isfinite(part).all()) for part in z):
        raise ValueError("infer: its latents are not finite; check the weights, and that the images suit the model")
    return list(z)


@dataclass(frozen=True)
class Probe:
    """What the checks put an adapter to the test with.

    Attributes:
        transform: the adapter's layers.
        images: up to 32 of the given images.
        samples: the model's own samples, if any.
        u: standard normal noise (8, D).
        infer: the adapter's posterior, with the same draws at every call.
        infer_anew: the same with other draws.
        seed: of further noise.
        tolerance: largest relative error.
    """

    transform: NoiseTransform
    images: Tensor
    samples: Tensor | None
    u: Tensor
    infer: Callable[[Tensor], list[Tensor]]
    infer_anew: Callable[[Tensor], list[Tensor]]
    seed: int
    tolerance: float


@torch.no_grad()
def shapes(probe: Probe) -> Iterator[str]:
    """Latents and images have their shapes at every batch size, and images their range."""
    transform, images = probe.transform, probe.images
    for n in (1, 2, 5):
        noise = probe.u.new_zeros(n, transform.dim)
        # This checks every mean and std.
        transform.log_abs_det(noise)
        probe.infer(images[:n])
        check_decoded(transform.decode(noise), n, transform.adapter)
    decoded = transform.decode(probe.u)
    check_decoded(decoded, len(probe.u), transform.adapter)
    if not bool(torch.isfinite(decoded).all()):
        yield "decode: the images are not finite"


@torch.no_grad()
def frozen(probe: Probe) -> Iterator[str]:
    """All modules that run are in eval mode without gradients, as all were found."""
    with watch_modules() as ran:
        probe.transform.decode(probe.u[:2])
        probe.infer(probe.images[:2])
    check_frozen(ran)
    yield from ()


@torch.no_grad()
def drawing(probe: Probe) -> Iterator[str]:
    """Given u and the image no random number is drawn, and given the image those of the posterior alone."""
    with seeded(probe.seed, probe.transform.device):
        before = random_state(probe.transform.device)
        first = probe.transform.decode(probe.u[:2])
        draws = random_state(probe.transform.device) != before
        again = probe.transform.decode(probe.u[:2])
        with Draws(probe.transform.device) as walk:
            probe.transform.decode(probe.u[:2])
    with Draws(probe.transform.device) as posterior:
        probe.infer(probe.images[:2])
    dropped = [name for name in walk.names + posterior.names if "dropout" in name]
    if dropped:
        yield f"dropout is on: {dropped[0]} drops also in eval mode, unless it is called with training=self.training"
    elif draws:
        yield (
            "top_down or decode: draws from the global generator although all noise is given, by "
            f"{', '.join(walk.names[:3]) or 'code that is not PyTorch'}; see torch.random.fork_rng"
        )
    elif not (first - again).abs().max() <= probe.tolerance * first.abs().max():
        yield "top_down and decode: the same noise gave two different images"


@torch.no_grad()
def posterior_noise(probe: Probe) -> Iterator[str]:
    """Posterior draws are the same for a seed, and others for another one."""
    images = probe.images
    first, again, other = probe.infer(images), probe.infer(images), probe.infer_anew(images)
    if any((a - b).abs().max() > probe.tolerance * a.abs().max() for a, b in zip(first, again, strict=True)):
        yield "infer: the same seed gave two draws; let all its noise come from torch's global generators"
        return
    still = [(a == b).flatten(1).all(0) for a, b in zip(first, other, strict=True)]
    parts = [
        f"layer {i}" if bool(part.all()) else f"{int(part.sum())} of {part.numel()} dimensions of layer {i}"
        for i, part in enumerate(still)
        if bool(part.any())
    ]
    if parts:
        where = "all layers" if all(bool(part.all()) for part in still) else ", ".join(parts)
        yield (
            f"infer: two seeds gave equal latents in {where}: it must draw z ~ q(z|x), mean + std * noise; does it "
            "return means, or quantise in eval mode, or is its noise zero or of a seed of its own?"
        )


@torch.no_grad()
def inversion(probe: Probe) -> Iterator[str]:
    """T and its inverse undo each other, on prior and on posterior noise."""
    transform = probe.transform
    posterior = transform.to_noise(probe.infer(probe.images))
    for what, noise in (("standard normal noise", probe.u), ("posterior noise", posterior)):
        error = ((transform.to_noise(transform.to_latents(noise)) - noise).abs().max() / noise.abs().max()).item()
        if not error <= probe.tolerance:
            yield (
                f"top_down: the inverse of T is off by {error:.1g} of the largest entry on {what}: does it take its "
                "layers in another order than the model, do means or stds depend on more than the latents above them, "
                "or is a latent changed in place, by .data or NumPy?"
            )
            return


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
    """An image is determined by the sample's own noise alone."""
    u = probe.u
    first = probe.transform.decode(u)
    among_others = probe.transform.decode(torch.cat((u[:1], 3 * u[1:])))
    if not (among_others[:1] - first[:1]).abs().max() <= probe.tolerance * first.abs().max():
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
                f"autograd also reaches other tensors, {len(others)} of them: "
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


@torch.no_grad()
def own_samples(probe: Probe) -> Iterator[str]:
    """Samples of the layers are those that the model itself draws."""
    if probe.samples is not None:
        yield from compare_samples(probe.transform, probe.samples, probe.seed)


# Every check, and those that it makes no sense without.
CHECKS: Mapping[Callable[[Probe], Iterator[str]], tuple[Callable[[Probe], Iterator[str]], ...]] = {
    shapes: (),
    frozen: (shapes,),
    drawing: (frozen,),
    posterior_noise: (drawing,),
    inversion: (drawing,),
    layer_order: (inversion,),
    reconstruction: (inversion,),
    independence: (drawing,),
    gradients: (drawing,),
    own_samples: (independence,),
}


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
