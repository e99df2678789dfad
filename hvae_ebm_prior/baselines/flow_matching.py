"""Flow matching over the noise of all layers at once (Lipman et al., "Flow Matching for Generative Modeling", ICLR
2023): what many would take instead of energies.

    u_t = (1 - t) u + t eps,      loss = E |v(u_t, t) - (eps - u)|^2,      du_t / dt = v(u_t, t) from t = 1 to 0

One network gives the velocities of all layers (`latent_unet`), which weighs dimensions by their activity: those which
images do not determine stay Gaussian, and are no noise to the others.

Path, preconditioning and solver are azula's. An output of zero, as before training, is exact for N(0, I).
"""

import time
from collections.abc import Callable, Iterable
from copy import deepcopy
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from ..backbone.transform import BackboneAdapter
from ..backbone.validation import check_count, check_images
from ..chains.autograd import with_autograd
from ..chains.streams import draw_key, open_streams
from ..density.latent_prior import LatentPrior
from ..energies.build import usual_defaults
from ..processes import progress_bar
from ..training.activity import estimate_layers, measure
from ..training.batches import Batches
from ..training.config import TrainingConfig
from ..training.optimizer import learning_rate, make_optimizer, update_average
from ..training.record import StopTraining, TrainingRecord
from .latent_unet import LatentUNet

# What `fit` takes without settings.
FLOW_TRAINING = TrainingConfig(noise_draws=4, clip_norm=1000.0)


class FlowMatchingPrior(LatentPrior):
    """A flow over the noise of all layers, learned by flow matching; before `fit`, the Gaussian prior. Needs azula.

    Args:
        backbone: as of `LatentPrior`.
        width: as of `LatentUNet`.
        vector_width: as of `LatentUNet`.
        blocks: as of `LatentUNet`.
        steps: of the Adams-Bashforth method of second order, an evaluation of the network each.

    Raises:
        TypeError, ValueError: as of `LatentPrior`, or a number that is not positive.
    """

    gradients_per_step = 1

    def __init__(
        self,
        backbone: BackboneAdapter | nn.Module,
        *,
        width: int = 64,
        vector_width: int = 256,
        blocks: int = 2,
        steps: int = 32,
    ) -> None:
        sizes = {"width": width, "vector_width": vector_width, "blocks": blocks, "steps": steps}
        width, vector_width, blocks, steps = (check_count(size, name) for name, size in sizes.items())
        super().__init__(backbone)
        with usual_defaults(self.transform.device):
            network = LatentUNet(self.latent_shapes, width, vector_width, blocks)
        self.network = network.to(self.transform.device).eval()
        self.steps = steps

    @with_autograd
    @torch.enable_grad()
    def fit(
        self,
        data: Tensor | Dataset[Any] | Iterable[Any],
        *,
        training: TrainingConfig = FLOW_TRAINING,
        callback: Callable[[Any, TrainingRecord], object] | None = None,
        progress: bool | None = None,
        generator: torch.Generator | None = None,
    ) -> list[TrainingRecord]:
        """Learn the flow; the prior holds the weights' moving average at every moment.

        Args:
            data: images (N, C, H, W) in [0, 1], a dataset of them, a posterior cache, or a loader of batches.
            training: number and size of batches, draws of noise and level for every image (`noise_draws`), images on
                which a fresh prior measures activity, and all of Adam, its learning rate, clipping and averaging; other
                settings are of energies.
            callback: called as callback(prior, record) after every step; the loss is that of
                `flow_matching_loss`.
            progress: show a progress bar; None shows one on a terminal only.
            generator: source of all randomness; None takes torch's global generators.

        Returns:
            One record per step.

        Raises:
            TypeError, ValueError: data of the wrong type, empty or out of range, or a posterior cache of one draw of
                each image, which does not tell activity.
            ImportError: azula is not installed.
        """
        trainee = deepcopy(self.network).train()
        optimizer = make_optimizer(trainee, training)
        denoiser = make_denoiser(trainee)
        batches = Batches(data, training.batch_size, generator, check=partial(check_images, adapter=self.backbone))
        if training.activity_images and bool((self.network.activity == 1).all()):
            layers, _, pairs = measure(self, batches, training.activity_images, generator, progress=progress)
            activity = self.join([part[None] for part in estimate_layers(layers, pairs)])[0]
            for network in (self.network, trainee):
                network.activity.copy_(activity)
        history: list[TrainingRecord] = []
        began = time.monotonic()
        with progress_bar(training.iterations, "flow", shown=progress, leave=True) as bar:
            for step in range(training.iterations):
                images, _, epoch = next(batches)
                u = batches.noise(self, images, epoch, generator).repeat_interleave(training.noise_draws, 0)
                loss = flow_matching_loss(denoiser, u, generator).mean()
                optimizer.zero_grad()
                loss.backward()
                norm = nn.utils.clip_grad_norm_(trainee.parameters(), training.clip_norm)
                rate = learning_rate(training, step, epoch)
                for group in optimizer.param_groups:
                    group["lr"] = rate
                optimizer.step()
                update_average(self.network, trainee, training.ema_decay, step)
                seconds = time.monotonic() - began
                history.append(TrainingRecord(step + 1, loss.item(), (), norm.item(), rate, seconds))
                bar.update()
                try:
                    if callback is not None:
                        callback(self, history[-1])
                except StopTraining:
                    break
        return history

    @torch.no_grad()
    def _draw(self, key: int, samples: range) -> Tensor:
        noise = open_streams(key, samples, self.device, self.dtype).normal(self.dim)
        solver = import_azula().sample.vABSampler(
            make_denoiser(self.network), steps=self.steps, silent=True, dtype=self.dtype, device=self.device
        )
        return solver(noise)


def make_denoiser(network: nn.Module) -> Any:
    """E[u | u_t] by a network, preconditioned as by Karras et al. (2022), on the straight path from data to noise."""
    azula = import_azula()
    return azula.denoise.KarrasDenoiser(network, azula.noise.RectifiedSchedule())


def import_azula() -> Any:
    """azula, with the modules that are used of it."""
    try:
        import azula.denoise  # type: ignore[import-untyped]
        import azula.noise  # type: ignore[import-untyped]
        import azula.sample  # type: ignore[import-untyped]
    except ImportError as error:
        raise ImportError(
            f"flow matching needs azula and tqdm: pip install --no-deps azula tqdm ({error}); see docs/install.md"
        ) from error
    return azula


def flow_matching_loss(denoiser: Any, u: Tensor, generator: torch.Generator | None) -> Tensor:
    """|v(u_t, t) - (eps - u)|^2 (N,), less that of an untrained prior, at levels t uniform in [0, 1].

    Args:
        denoiser: see `make_denoiser`.
        u: posterior noise (N, D).
        generator: source of the levels and of eps.

    Returns:
        The loss of every sample, summed over dimensions, which is below 0 where something was learned.
    """
    source = torch.Generator(u.device).manual_seed(draw_key(generator))
    t = torch.rand(len(u), device=u.device, dtype=u.dtype, generator=source)
    noise = torch.randn(u.shape, device=u.device, dtype=u.dtype, generator=source)
    alpha, sigma = (scale[:, None] for scale in denoiser.schedule(t))
    u_t = alpha * u + sigma * noise
    # With eps = (u_t - alpha u) / sigma, an error of the velocity is one of u times this.
    factor = (alpha + sigma) / sigma
    untrained = alpha / (alpha**2 + sigma**2) * u_t
    errors = (factor * (mean - u) for mean in (denoiser(u_t, t).mean, untrained))
    learned, unlearned = (error.square().sum(1) for error in errors)
    return learned - unlearned
