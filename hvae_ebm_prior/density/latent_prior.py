"""A frozen backbone seen from its noise space: what every prior over u shares.

A prior draws noise u ~ p(u); images follow by the backbone, x = decode(T(u)). Data come as noise by `encode`, u =
T⁻¹(z) with z ~ q(z|x).
"""

import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from ..backbone.lock import backbone_modules, check_autograd, check_frozen, lock, watch_modules
from ..backbone.posterior import Posterior, gives_posterior, posterior_to_noise
from ..backbone.registry import find_adapter
from ..backbone.transform import BackboneAdapter, NoiseTransform, as_layers
from ..backbone.validation import check_count, check_decoded, check_images, check_noise
from ..chains.langevin import ChainDiverged
from ..chains.streams import draw_key, drawing_by, open_streams
from ..processes import agree, collect, join_rows, progress_bar, share
from .posterior import refine_posterior

# Latent dimensions that one chunk of samples may hold, so that a chain's memory stays bounded; a GPU needs more at a
# time to be busy.
CHUNK_DIMENSIONS = 2**18
CHUNK_DIMENSIONS_GPU = 2**21


def release_all(locks: list[Callable[[], None]]) -> None:
    """Let go of a backbone that was locked several times."""
    for release in locks:
        release()


class LatentPrior(nn.Module, ABC):
    """A prior over the noise of a frozen hierarchical VAE; its parameters and state dict are its own alone, never the
    backbone's.

    Args:
        backbone: the trained model's adapter, or a model of a family that `find_adapter` recognises; its modules are
            put in eval mode without gradients until `release` is called or the prior is garbage collected.

    Raises:
        TypeError: `backbone` is no adapter and none fits it.
        ValueError: the backbone breaks its contract.
    """

    def __init__(self, backbone: BackboneAdapter | nn.Module) -> None:
        super().__init__()
        adapter = find_adapter(backbone)
        check_autograd(adapter)
        locks = [lock(adapter)]
        self._release = weakref.finalize(self, release_all, locks)
        self._release.atexit = False
        try:
            # An adapter may have no model; one whose model is out of sight would leave it in train mode.
            with watch_modules(not backbone_modules(adapter)) as ran:
                self._transform = NoiseTransform(adapter)
            # Some models make parameters when they are first run.
            locks.append(lock(adapter))
            check_frozen(ran)
        except BaseException:
            self.release()
            raise
        self.eval()

    @property
    def transform(self) -> NoiseTransform:
        """The map T from noise u to latents z of the backbone."""
        if not torch.compiler.is_compiling() and not self._release.alive:
            raise RuntimeError("this prior has released its backbone; make a new one and load the state dict into it")
        return self._transform

    @property
    def backbone(self) -> BackboneAdapter:
        """The adapter this prior was made with."""
        return self.transform.adapter

    def __reduce__(self) -> str:
        raise TypeError("a prior cannot be pickled, as it does not own its backbone; save prior.state_dict()")

    def release(self) -> None:
        """Let the backbone go, its training flags and requires_grad as they were; the prior is of no use afterwards."""
        self._release()

    @property
    def latent_shapes(self) -> tuple[tuple[int, ...], ...]:
        """Shapes of the latents without batch, top to bottom."""
        return self._transform.latent_shapes

    @property
    def dim(self) -> int:
        """Total number of latent dimensions D."""
        return self._transform.dim

    @property
    def device(self) -> torch.device:
        """Device of the prior's parameters, where noise is drawn; the backbone's own where it has none."""
        return next((parameter.device for parameter in self.parameters()), self._transform.device)

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the prior's parameters, in which u is kept; the backbone's own where it has none."""
        return next((parameter.dtype for parameter in self.parameters()), self._transform.dtype)

    @property
    def samples_per_chunk(self) -> int:
        """How many samples are computed at a time if no chunk size is given."""
        dimensions = CHUNK_DIMENSIONS if self.device.type == "cpu" else CHUNK_DIMENSIONS_GPU
        return max(1, dimensions // self.dim)

    def to_latents(self, u: Tensor) -> tuple[Tensor, ...]:
        """T: latents z, one tensor (N, *latent_shapes[i]) per layer, of noise `u` (N, D)."""
        check_noise(u, self.dim, self.device)
        return self.transform.to_latents(u)

    def to_noise(self, z: Sequence[Tensor]) -> Tensor:
        """T⁻¹: noise (N, D) of the latents `z`, one tensor (N, *latent_shapes[i]) per layer."""
        u = self.transform.to_noise(z)
        check_noise(u, self.dim)
        return u

    def log_abs_det(self, u: Tensor) -> Tensor:
        """log|det dT/du| in nats, (N,), at noise `u` (N, D)."""
        check_noise(u, self.dim, self.device)
        return self.transform.log_abs_det(u)

    def split(self, u: Tensor) -> tuple[Tensor, ...]:
        """Per-layer views (N, *latent_shapes[i]) of noise `u` (N, D)."""
        check_noise(u, self.dim, finite=False)
        return self.transform.split(u)

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        """Pack per-layer tensors (N, *latent_shapes[i]) into one (N, D); the inverse of `split`."""
        return self.transform.join(parts)

    @torch.no_grad()
    def encode(self, images: Tensor, *, mcmc_steps: int = 0, generator: torch.Generator | None = None) -> Tensor:
        """A posterior draw z ~ q(z|x) as noise u = T⁻¹(z).

        Args:
            images: (N, C, H, W) in [0, 1], of any floating-point type and on any device; they go to the backbone in
                its own.
            mcmc_steps: Langevin steps with a Metropolis test from there, on the backbone's own p(z | x), each a
                gradient of the backbone; the first half of them looks for the steps' size
                (`hvae_ebm_prior.density.posterior`).
            generator: source of the posterior noise; None takes torch's global generators. The backbone draws from
                these, so threads that encode wait for one another.

        Returns:
            Noise (N, D).

        Raises:
            TypeError, ValueError: images or the backbone's latents have a wrong type, shape or range, or are not
                finite; or steps are asked for of an adapter without densities
                (`hvae_ebm_prior.backbone.elbo.DensityAdapter`).
        """
        check_images(images, self.backbone)
        if mcmc_steps:
            mcmc_steps = check_count(mcmc_steps, "mcmc_steps")
        images = self.transform.take(images)
        with drawing_by(generator, images.device):
            z = self.transform.infer(images)
        u = self.transform.to_noise(z).to(self.dtype)
        if not bool(torch.isfinite(u).all()):
            raise ValueError("the backbone's posterior draws are not finite; check its weights and that images suit it")
        if mcmc_steps:
            streams = open_streams(draw_key(generator), range(len(u)), u.device, u.dtype)
            u = refine_posterior(self.transform, u, images, steps=mcmc_steps, streams=streams)
        return u

    @torch.no_grad()
    def encode_with_posterior(
        self, images: Tensor, *, generator: torch.Generator | None = None
    ) -> tuple[Tensor, Posterior | None]:
        """As `encode`, and the Gaussians that the noise was drawn from, where the adapter knows them.

        Args:
            images: as of `encode`.
            generator: as of `encode`.

        Returns:
            Noise (N, D), and its Gaussians (`hvae_ebm_prior.backbone.posterior`) or None.

        Raises:
            TypeError, ValueError: as of `encode`, or the draws are not those of the Gaussians.
        """
        drawn = None
        adapter = self.backbone
        if gives_posterior(adapter):
            check_images(images, adapter)
            images = self.transform.take(images)
            with drawing_by(generator, images.device):
                drawn = as_layers(adapter.infer_with_posterior(images))
        if drawn is None:
            return self.encode(images, generator=generator), None
        u, posterior = posterior_to_noise(self.transform, drawn)
        return u.to(self.dtype), Posterior(*(part.to(self.dtype) for part in posterior))

    def decode(self, u: Tensor) -> Tensor:
        """The backbone's images of noise, differentiable in it.

        Args:
            u: noise (N, D).

        Returns:
            Images (N, C, H, W) in [0, 1].

        Raises:
            TypeError, ValueError: noise of a wrong type or shape, or a backbone that decodes to something else than
                images in [0, 1].
            ChainDiverged: the images are not finite.
        """
        check_noise(u, self.dim, self.device, finite=False)
        images = self.transform.decode(u)
        check_decoded(images, len(u), self.backbone)
        # Some models make pixels of what is not finite.
        if not all(bool(torch.isfinite(each.detach()).all()) for each in (u, images)):
            raise ChainDiverged(
                "the noise or the backbone's images are not finite; check the noise, and the backbone's precision and "
                "statistics"
            )
        return images

    @abstractmethod
    def _draw(self, key: int, samples: range) -> Tensor:
        """Noise (N, D) of the given samples of a call; a sample's noise does not depend on which others are drawn."""

    def sample_noise(self, n: int, *, generator: torch.Generator | None = None) -> Tensor:
        """Draw noise from the prior.

        Args:
            n: number of samples N.
            generator: source of the noise; None takes torch's default generator.

        Returns:
            Noise (N, D).

        Raises:
            TypeError, ValueError: a wrong count.
            ChainDiverged: a chain left the finite numbers.
        """
        n = check_count(n)
        return self._draw(draw_key(generator), range(n))

    def sample(self, n: int, *, chunk_size: int | None = None, generator: torch.Generator | None = None) -> Tensor:
        """Draw images from the prior.

        Args:
            n: number of images N.
            chunk_size: images computed at a time; the result does not depend on it, up to rounding. None bounds the
                memory by the latents' size.
            generator: source of the noise; None takes torch's default generator.

        Returns:
            Images (N, C, H, W) in [0, 1].

        Raises:
            TypeError, ValueError: a wrong count.
            ChainDiverged: a chain left the finite numbers, or the backbone's images are not finite.
        """
        n = check_count(n)
        key = agree(draw_key(generator))
        return self._decode_in_chunks(n, lambda chunk: self._draw(key, range(n)[chunk]), chunk_size)

    def _decode_in_chunks(self, n: int, draw: Callable[[slice], Tensor], chunk_size: int | None) -> Tensor:
        """Images (n, C, H, W) of the noise that `draw` returns for chunks of samples; processes share the work."""
        size = self.samples_per_chunk if chunk_size is None else chunk_size
        size = check_count(size, "chunk_size")
        mine = share(n)
        images: list[Tensor] = []

        def decode_all() -> None:
            chunks = [slice(first, min(first + size, mine.stop)) for first in mine[::size]]
            with progress_bar(len(mine), "samples") as bar:
                for chunk in chunks:
                    images.append(self.decode(draw(chunk)).detach())
                    bar.update(chunk.stop - chunk.start)

        collect(decode_all)
        return join_rows(torch.cat(images) if images else None)  # type: ignore[return-value]  # n is positive
