"""A backbone is a coroutine of Gaussian layers; everything the prior needs of it is derived here.

An adapter's `top_down` yields each layer's Gaussian (mean_i, std_i), top to bottom, and is sent the latent z_i drawn
for it. Driving that one generator gives the uni-scale reparameterisation T: u -> z (Eq. 15) and its inverse,

    z_i = mean_i(z_<i) + std_i(z_<i) u_i,     u_i = (z_i - mean_i) / std_i,     log|det dT/du| = sum_i sum log std_i,

under which the backbone's prior is u ~ N(0, I). u is one flat tensor (N, D), all layers top to bottom, z one of each.
"""

import math
from collections.abc import Callable, Generator, Iterable, Sequence
from functools import cached_property
from typing import Any, NamedTuple, Protocol, runtime_checkable

import einops
import torch
from torch import Tensor

from .validation import lacking_methods, takes_tensors

# Draws layer i's latent from its index, mean and std.
DrawLatent = Callable[[int, Tensor, Tensor], Tensor]


class LayerState(NamedTuple):
    """One latent layer at a state of the backbone; all (N, *shape).

    Attributes:
        u: its noise.
        z: its latent, mean + std u.
        mean: of its Gaussian given the latents above.
        std: of its Gaussian given the latents above.
    """

    u: Tensor
    z: Tensor
    mean: Tensor
    std: Tensor

    def to(self, dtype: torch.dtype) -> "LayerState":
        """The same in another dtype."""
        return LayerState(*(part.to(dtype) for part in self))


@runtime_checkable
class BackboneAdapter(Protocol):
    """What a hierarchical VAE must offer; a plain object, not a module. See the module's text.

    Its data are images (N, C, H, W) in [0, 1]. One with an attribute `data_kind = "tensors"` takes and gives plain
    floating-point tensors (N, ...) of any range in their place: tables, sound, point clouds, maps.
    """

    def top_down(self, batch_size: int) -> Generator[tuple[Tensor, Tensor], Tensor, Any]:
        """Yield (mean, std), each (batch_size, *shape), of every latent; receive z; return features for `decode`."""

    def infer(self, images: Tensor) -> Iterable[Tensor]:
        """One posterior draw z ~ q(z|x) per layer, top to bottom, for images (N, C, H, W) in [0, 1].

        It draws from torch's global generators; a list, a tuple or a generator of the draws will do.
        """

    def decode(self, features: Any) -> Tensor:
        """Images (N, C, H, W) in [0, 1] from the features that `top_down` returned."""


class NoiseTransform:
    """T: u -> z of one backbone, with its inverse and log-determinant.

    Args:
        adapter: the backbone.

    Attributes:
        latent_shapes: shapes of the latents without batch, top to bottom.
        device: device of the latents, read when the transform is made.
        dtype: dtype of the latents, likewise.

    Raises:
        TypeError: `adapter` lacks a method, or does not yield pairs of floating-point tensors.
        ValueError: a layer's mean and std are of wrong shape, not finite or not positive, or there is no layer.
    """

    def __init__(self, adapter: BackboneAdapter) -> None:
        if lacking := lacking_methods(adapter):
            raise TypeError(lacking)
        self.adapter = adapter
        shapes: list[torch.Size] = []

        def record(i: int, mean: Tensor, std: Tensor) -> Tensor:
            if mean.ndim < 2 or len(mean) != 2:
                raise ValueError(
                    f"layer {i}: the backbone was asked for a batch of 2, expected mean of shape (2, ...), "
                    f"got {tuple(mean.shape)}"
                )
            check_gaussian(i, mean, std)
            shapes.append(mean.shape[1:])
            self.device = mean.device
            self.dtype = mean.dtype
            return mean.clone()

        with torch.no_grad():
            drive(adapter, 2, record)
        if not shapes:
            raise ValueError(
                f"{type(adapter).__name__}.top_down ended without yielding a layer; it must yield (mean, std) once per "
                "latent"
            )
        self.latent_shapes = tuple(tuple(shape) for shape in shapes)

    @property
    def dim(self) -> int:
        """Total number of latent dimensions D."""
        return sum(math.prod(shape) for shape in self.latent_shapes)

    @cached_property
    def image_shape(self) -> tuple[int, ...]:
        """Shape of the images without batch, as the backbone decodes them and so takes them."""
        devices = [self.device] if self.device.type in ("cuda", "xpu") else []
        # Some backbones draw the image from p(x | z).
        with torch.no_grad(), torch.random.fork_rng(devices, device_type=self.device.type if devices else "cuda"):
            image = self.decode(torch.zeros(1, self.dim, device=self.device, dtype=self.dtype))
        return tuple(image.shape[1:]) if isinstance(image, Tensor) else ()

    def take(self, images: Tensor) -> Tensor:
        """Images as they go to the backbone: on its device and in its latents' type.

        Args:
            images: (N, C, H, W), of any floating-point type and on any device.

        Returns:
            The same (N, C, H, W).

        Raises:
            ValueError: they have another size or other channels than the backbone's own images.
        """
        # What is decoded to something else than images is refused where images leave.
        tensors = takes_tensors(self.adapter)
        if (tensors or images.ndim == 1 + len(self.image_shape)) and images.shape[1:] != self.image_shape:
            if tensors:
                raise ValueError(
                    f"data: this model takes tensors {('N', *self.image_shape)}, as it decodes to, "
                    f"got {tuple(images.shape)}"
                )
            advice = "it takes what it decodes to: resize, crop or convert them as for its training (or does the "
            advice += "adapter's top_down take its layers in another order than the model, and so decode wrongly?)"
            if images[:1].permute(0, 3, 1, 2).shape[1:] == self.image_shape:
                advice = "channels come first: images.permute(0, 3, 1, 2)"
            raise ValueError(
                f"images: this model takes images {self.image_shape}, got {tuple(images.shape[1:])}; {advice}"
            )
        return images.to(self.device, self.dtype)

    def infer(self, images: Tensor) -> Sequence[Tensor]:
        """One posterior draw per layer, top to bottom, of images as `take` takes them."""
        return as_layers(self.adapter.infer(self.take(images)))

    def split(self, u: Tensor) -> tuple[Tensor, ...]:
        """Per-layer views (N, *latent_shapes[i]) of `u` (N, D)."""
        return tuple(einops.unpack(u, list(self.latent_shapes), "n *"))

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        """Pack per-layer tensors (N, *latent_shapes[i]) into one (N, D); the inverse of `split`."""
        self.check_layers(parts, "layers to join")
        return einops.pack(parts, "n *")[0]

    def to_latents(self, u: Tensor, layers: int | None = None) -> tuple[Tensor, ...]:
        """T: latents z, one tensor per layer, of noise `u` (N, D). The walk stops after the last latent.

        Args:
            u: noise (N, D), or that of the first `layers` layers alone.
            layers: how many layers from the top; None for all.

        Returns:
            Latents (N, *latent_shapes[i]), top to bottom.
        """
        return tuple(state.z for state in self.states(u, layers))

    def states(self, u: Tensor, layers: int | None = None) -> tuple[LayerState, ...]:
        """The state of every layer at noise `u`; arguments as of `to_latents`."""
        return self._draw_states(u, layers)[0]

    def to_noise(self, z: Sequence[Tensor]) -> Tensor:
        """T⁻¹: noise u (N, D) of the latents `z`, in one teacher-forced pass.

        Args:
            z: one tensor (N, *latent_shapes[i]) per layer.

        Returns:
            u, shape (N, D).

        Raises:
            ValueError: a latent has the wrong shape, or a std is not positive.
        """
        return self.join([(z_i - mean) / std for z_i, (mean, std) in zip(z, self.checked_gaussians(z), strict=True)])

    def checked_gaussians(self, z: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
        """`gaussians` of latents of all layers; ValueError where a shape or a std is wrong."""
        self.check_layers(z, "latents")
        gaussians = self.gaussians(z)
        for i, (mean, std) in enumerate(gaussians):
            check_gaussian(i, mean, std)
        return gaussians

    def gaussians(self, z: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
        """Mean and std of every layer given the latents above it, in one teacher-forced pass.

        Args:
            z: latents (N, *latent_shapes[i]) of all layers, or of the first ones.

        Returns:
            A pair of tensors (N, *latent_shapes[i]) for each of them.
        """
        gaussians: list[tuple[Tensor, Tensor]] = []

        def draw(i: int, mean: Tensor, std: Tensor) -> Tensor:
            gaussians.append((mean, std))
            return z[i]

        self._walk(z[0], draw, len(z))
        return gaussians

    def log_abs_det(self, u: Tensor) -> Tensor:
        """log|det dT/du| in nats, shape (N,), at `u` (N, D)."""
        parts = self.split(u)
        total = u.new_zeros(len(u))

        def draw(i: int, mean: Tensor, std: Tensor) -> Tensor:
            nonlocal total
            check_gaussian(i, mean, std)
            total = total + std.log().flatten(1).sum(1)
            return mean + std * parts[i]

        self._walk(u, draw)
        return total

    def decode(self, u: Tensor) -> Tensor:
        """The backbone's images (N, C, H, W) for noise `u` (N, D)."""
        return self.adapter.decode(self.states_and_features(u)[1])

    def states_and_features(self, u: Tensor) -> tuple[tuple[LayerState, ...], Any]:
        """The layers' states, and the features for `adapter.decode`, by one walk to the backbone's end."""
        return self._draw_states(u, to_end=True)

    def _draw_states(
        self, u: Tensor, layers: int | None = None, *, to_end: bool = False
    ) -> tuple[tuple[LayerState, ...], Any]:
        parts = einops.unpack(u, list(self.latent_shapes[:layers]), "n *")
        states: list[LayerState] = []

        def draw(i: int, mean: Tensor, std: Tensor) -> Tensor:
            states.append(LayerState(parts[i], mean + std * parts[i], mean, std))
            return states[-1].z

        features = self._walk(u, draw, layers, to_end=to_end)
        return tuple(states), features

    def check_layers(self, parts: Sequence[Tensor], what: str) -> None:
        """Raise TypeError or ValueError unless `parts` is one tensor (N, *latent_shapes[i]) per layer, with one N."""
        if not isinstance(parts, list | tuple) or not all(isinstance(part, Tensor) for part in parts):
            raise TypeError(f"{what}: expected a list or tuple of one tensor per layer, got {kind_of(parts)}")
        shapes = [tuple(part.shape) for part in parts]
        if len(shapes) != len(self.latent_shapes) or any(
            shape != (shapes[0][:1] + expected) for shape, expected in zip(shapes, self.latent_shapes, strict=False)
        ):
            raise ValueError(
                f"{what}: expected {[('N', *shape) for shape in self.latent_shapes]} from top to bottom, got {shapes}"
            )

    def _walk(self, like: Tensor, draw: DrawLatent, layers: int | None = None, *, to_end: bool = False) -> Any:
        """Drive the backbone through its first `layers` latents, for the samples and device of `like`.

        Returns its features if it goes on `to_end`.
        """
        name = f"{type(self.adapter).__name__}.top_down"
        layers = len(self.latent_shapes) if layers is None else layers

        def checked(i: int, mean: Tensor, std: Tensor) -> Tensor:
            if i == len(self.latent_shapes) or tuple(mean.shape) != (len(like), *self.latent_shapes[i]):
                shapes = [("N", *shape) for shape in self.latent_shapes]
                raise ValueError(
                    f"{name}: expected the shapes {shapes} of its first call, got {tuple(mean.shape)} as layer {i}"
                )
            if mean.device != like.device:
                raise ValueError(
                    f"the backbone is on {mean.device}, the prior's noise or latents on {like.device}; move one of "
                    "them with .to()"
                )
            return draw(i, mean, std).to(mean.dtype)

        drawn, features = drive(self.adapter, len(like), checked, stop_after=None if to_end else layers)
        if drawn < layers:
            raise ValueError(
                f"{name}: expected {layers} layers as at its first call, got {drawn}; it must yield the same number "
                "every time"
            )
        return features


def drive(
    adapter: BackboneAdapter, batch_size: int, draw: DrawLatent, stop_after: int | None = None
) -> tuple[int, Any]:
    """Run an adapter's coroutine with `draw` for each layer's latent.

    Args:
        adapter: the backbone.
        batch_size: number of samples N.
        draw: called with a layer's index, mean and std; returns its latent.
        stop_after: close the coroutine after that many latents; None runs it to its end.

    Returns:
        The number of latents drawn, and what the coroutine returned (None where it was closed).

    Raises:
        TypeError: `top_down` is no generator function, or yields something else than two floating-point tensors.
        ValueError: a layer's mean and std differ in shape, or `top_down` changes them or the latent in place.
    """
    name = f"{type(adapter).__name__}.top_down"
    coroutine = adapter.top_down(batch_size)
    if not isinstance(coroutine, Generator):
        raise TypeError(
            f"{name} must be a generator function that yields (mean, std), got one that returns "
            f"{type(coroutine).__name__}"
        )
    drawn = 0
    handed: list[tuple[tuple[Tensor, ...], list[int]]] = []
    try:
        gaussian = next(coroutine)
        while True:
            if not (isinstance(gaussian, tuple) and len(gaussian) == 2 and all(is_floating(part) for part in gaussian)):
                raise TypeError(
                    f"{name}, layer {drawn}: expected a tuple (mean, std) of two floating-point tensors, "
                    f"got {kind_of(gaussian)}"
                )
            mean, std = gaussian
            if mean.shape != std.shape:
                raise ValueError(
                    f"{name}, layer {drawn}: mean and std must have one shape, got {tuple(mean.shape)} and "
                    f"{tuple(std.shape)}"
                )
            z = draw(drawn, mean, std)
            drawn += 1
            if drawn == stop_after:
                check_unchanged(name, handed)
                return drawn, None
            handed.append(((z, mean, std), versions(z, mean, std)))
            gaussian = coroutine.send(z)
    except StopIteration as stop:
        check_unchanged(name, handed)
        return drawn, stop.value
    finally:
        coroutine.close()


def versions(*tensors: Tensor) -> list[int]:
    """How often tensors were changed in place, where PyTorch counts it."""
    if torch.compiler.is_compiling():
        return []
    return [-1 if tensor.is_inference() else tensor._version for tensor in tensors]


def check_unchanged(name: str, handed: Sequence[tuple[tuple[Tensor, ...], list[int]]]) -> None:
    """Raise ValueError where what was sent to or yielded by `name`, layer by layer, was changed in place since."""
    for i, (tensors, before) in enumerate(handed):
        if (after := versions(*tensors)) != before:
            what = "latent that it was sent" if before[0] != after[0] else "mean or std that it had yielded"
            raise ValueError(
                f"{name}, layer {i}: it changes the {what} in place; write z = z * 2, not z.mul_(2) or z *= 2, and "
                "switch inplace=True off"
            )


def as_layers(drawn: Any) -> Any:
    """What `infer` gives as a list where it is a tuple, generator or the like; anything else as it came."""
    return list(drawn) if isinstance(drawn, Iterable) and not isinstance(drawn, Tensor) else drawn


def is_floating(value: object) -> bool:
    """Whether `value` is a floating-point tensor."""
    return isinstance(value, Tensor) and value.is_floating_point()


def kind_of(value: Any) -> str:
    """The type of a value, for an error; of a tensor with its dtype, of a list or tuple with its entries."""
    if isinstance(value, Tensor):
        return f"one tensor of {value.dtype}"
    if isinstance(value, tuple | list):
        return f"{type(value).__name__} of ({', '.join(kind_of(part) for part in value)})"
    return type(value).__name__


def check_gaussian(i: int, mean: Tensor, std: Tensor) -> None:
    """Raise ValueError unless layer i's mean is finite and its std positive and finite."""
    if not bool(torch.isfinite(mean).all()):
        raise ValueError(f"layer {i}: the backbone's mean is not finite; check its weights and that it is in eval mode")
    if not bool((torch.isfinite(std) & (std > 0)).all()):
        raise ValueError(
            f"layer {i}: the backbone's std must be positive and finite, got values from {std.min().item():.3g} to "
            f"{std.max().item():.3g}; yield the standard deviation, not its logarithm or that of a variance: (0.5 * "
            "log_variance).exp()"
        )
