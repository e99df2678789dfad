"""A prior that is learned, saved and shared.

sample, sample_noise               from this prior, some layers held if asked (sampling.py)
fit(data)                          step after step over batches of images (loop.py, step.py)
loss(images)                       its loss, for training loops of one's own (score.py, recovery.py)
save_pretrained, push_to_hub       to a folder, and to the Hugging Face Hub
from_pretrained                    and back
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from ..backbone.transform import BackboneAdapter
from ..backbone.validation import takes_tensors
from ..chains.execution import ExecutionConfig
from ..chains.streams import draw_key
from ..density.sampling import SamplingRequest, make_request, sample_levels
from ..energies.coupling import Labels
from ..processes import agree
from ..saving.card import Card
from ..saving.config import Metric
from ..saving.folder import CONFIG, WEIGHTS, load, save
from ..saving.hub import fetch, upload
from .config import ObjectiveName, TrainingConfig
from .loop import Checkpoints, Data, train
from .memory import MemoryEstimate, estimate_memory
from .record import Callback, TrainingRecord
from .trainable import TrainablePrior


class LearnedPrior(TrainablePrior):
    """A prior with `sample`, `fit`, `loss`, and a place on disk and on the Hub: what all that have energies share."""

    def sample_noise(
        self, n: int, *, fixed: Mapping[int, Tensor] | None = None, generator: torch.Generator | None = None
    ) -> Tensor:
        """Draw u_0 from the prior, through all noise levels (Alg. 2).

        Args:
            n: number of samples N.
            fixed: layer index -> noise u_i (N, *latent_shapes[i]) or (1, ...) to hold; at level t the layer is held at
                its own diffusion.
            generator: source of the noise; None takes torch's default generator.

        Returns:
            Noise (N, D).

        Raises:
            TypeError, ValueError: a wrong type, count, layer index or shape.
            ChainDiverged: a chain left the finite numbers.
        """
        request = make_request(self, n, fixed=fixed)
        return self._draw(draw_key(generator), range(n), request)

    def sample(
        self,
        n: int,
        *,
        fixed: Mapping[int, Tensor] | None = None,
        chunk_size: int | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Draw images from the prior.

        Args:
            n: number of images N.
            fixed: as in `sample_noise`.
            chunk_size: images computed at a time; the result does not depend on it, up to rounding. None bounds the
                memory by the latents' size.
            generator: source of the noise; None takes torch's default generator.

        Returns:
            Images (N, C, H, W) in [0, 1].

        Raises:
            TypeError, ValueError: as in `sample_noise`.
            ChainDiverged: a chain left the finite numbers, or the backbone's images are not finite.
        """
        return self._draw_images(n, make_request(self, n, fixed=fixed), chunk_size, generator)

    def _draw(self, key: int, samples: range, request: SamplingRequest = SamplingRequest()) -> Tensor:  # noqa: B008
        """Noise (N, D) of the given samples of a call; baselines may draw in ways of their own."""
        return self.draw_levels(key, samples, request)[0]

    def draw_levels(self, key: int, samples: range, request: SamplingRequest) -> list[Tensor]:
        """States of all levels on the way to samples.

        Args:
            key: the key of all noise of the call (`hvae_ebm_prior.chains.streams.draw_key`).
            samples: numbers of the samples in the call.
            request: what to sample (`hvae_ebm_prior.density.sampling.make_request`).

        Returns:
            u_0..u_T, each (N, D).

        Raises:
            ChainDiverged: a chain left the finite numbers.
        """
        return sample_levels(self, request, key, samples)

    def _draw_images(
        self, n: int, request: SamplingRequest, chunk_size: int | None, generator: torch.Generator | None
    ) -> Tensor:
        """Images (n, C, H, W) of a checked request."""
        key = agree(draw_key(generator))

        def draw(chunk: slice) -> Tensor:
            return self._draw(key, range(n)[chunk], request.rows(chunk))

        return self._decode_in_chunks(n, draw, chunk_size)

    def loss(
        self, images: Tensor, *, labels: Tensor | Labels | None = None, generator: torch.Generator | None = None
    ) -> Tensor:
        """Loss of every image: of score matching for energies with context, of recovery likelihood at a random level
        (Alg. 1, Eq. 11-12) for others.

        Args:
            images: (N, C, H, W) in [0, 1].
            labels: of a coupled prior, as in `fit`; adds the weighted cross-entropy.
            generator: source of the posterior draw, the levels and the chains' noise; None takes torch's global ones.

        Returns:
            (N,), whose gradient is the learning gradient; with `ExecutionConfig.graph` that of images that weigh alike.
            In score matching the squared error of the velocity, less that of an untrained prior; else F(T(u_t^-), t) -
            F(T(u_t), t) in nats, whose value is no measure of quality, as it is near 0 where data and chain agree.

        Raises:
            TypeError, ValueError: images of a wrong type, shape or range, or wrong labels.
            ChainDiverged: a chain left the finite numbers.
        """
        u, posterior = self.encode_with_posterior(images, generator=generator)
        return self.batch_loss(u, labels, generator, posterior=posterior).total

    def estimate(self, batch_size: int) -> MemoryEstimate:
        """Memory that `fit` takes, measured on one image and on two.

        Args:
            batch_size: images at a time: those of a step, or `TrainingConfig.micro_batch`.

        Returns:
            The estimate, in bytes.

        Raises:
            TypeError, ValueError: no positive integer.
        """
        return estimate_memory(self, batch_size)

    def fit(
        self,
        data: Data,
        *,
        labels: Tensor | Labels | None = None,
        iterations: int | None = None,
        batch_size: int | None = None,
        learning_rate: float | None = None,
        objective: ObjectiveName | None = None,
        training: TrainingConfig | None = None,
        callback: Callback | Sequence[Callback] | None = None,
        progress: bool | None = None,
        checkpoint_dir: str | Path | None = None,
        checkpoint_every: int = 100,
        resume: bool = False,
        generator: torch.Generator | None = None,
    ) -> list[TrainingRecord]:
        """Learn the energies from images; the prior holds their moving average at every moment, also after Ctrl-C.

        Args:
            data: images (N, C, H, W) in [0, 1], a dataset, a posterior cache, or a loader of batches; of tuples the
                first entry is taken as images and the second as labels.
            labels: of the images of a tensor, by label set (or of the only one): (N,) indices, -1 or NaN for none.
            iterations: optimiser steps; None as in `training`, and without that as `TrainingConfig.for_images` has it.
            batch_size: images per step; None as in `training`; not to be given with a loader, which has its own.
            learning_rate: largest learning rate; None as in `training`.
            objective: what is minimised; None as in `training`.
            training: all other settings; None takes the defaults.
            callback: called as callback(prior, record) after every step; or several; see `hvae_ebm_prior.callbacks`.
            progress: show a progress bar; None shows one on a terminal only.
            checkpoint_dir: a folder for checkpoints, each the whole state of the run; None for none.
            checkpoint_every: steps between checkpoints; one more is made at the last step.
            resume: go on from the newest checkpoint there, if any, as if never interrupted (guide, "Long runs").
            generator: source of all randomness of training; None takes torch's global generators. From these come the
                first weights too, when the prior is made, as those of any module: call `torch.manual_seed` before.

        Returns:
            One record per step.

        Raises:
            TypeError, ValueError, OSError: bad data or settings, or checkpoints that are broken, of another run, or
                there though not to be resumed.
            TrainingDiverged: training blew up again and again; the prior is at its last good state.
        """
        if batch_size is not None and not isinstance(data, Tensor | Dataset):
            raise ValueError(f"batch_size: a {type(data).__name__} has batches of its own; set the size there")
        if labels is not None and not isinstance(data, Tensor):
            raise ValueError(
                f"labels: they go with a tensor of images; a {type(data).__name__} gives (images, labels) itself"
            )
        settings = {
            "iterations": iterations,
            "batch_size": batch_size,
            "learning_rate": learning_rate,
            "objective": objective,
        }
        changes: dict[str, Any] = {name: value for name, value in settings.items() if value is not None}
        return train(
            self,
            data,
            replace(training or TrainingConfig.for_images(count_images(data)), **changes),
            labels=labels,
            callbacks=list_callbacks(callback),
            checkpoints=Checkpoints(checkpoint_dir, checkpoint_every, resume),
            progress=progress,
            generator=generator,
        )

    def save_pretrained(
        self,
        save_directory: str | Path,
        *,
        metrics: Sequence[Metric] = (),
        card: Card | None = None,
        samples: int = 0,
        seed: int = 0,
    ) -> None:
        """Write `config.json`, `model.safetensors` and the model card, `README.md`, to a folder.

        Args:
            save_directory: the folder, made if need be; a prior that lies there is replaced, each file whole or not at
                all.
            metrics: figures of quality, for the card.
            card: title, data sets, licence and the like, for the card.
            samples: how many samples of the Gaussian prior and of this one the card shows, as `samples.png`; 0 for
                none, as there always are of a model of plain tensors. Needs matplotlib.
            seed: of the samples.

        Raises:
            TypeError: a class, or networks, that cannot be described in `config.json`.
            FileExistsError: files of these names are there that are none of a prior's, as those of a model.
            OSError: the folder cannot be written.
        """
        shown = 0 if takes_tensors(self.backbone) else samples
        save(self, save_directory, trained=self.trained, metrics=metrics, card=card, samples=shown, seed=seed)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        commit_message: str = "Upload prior",
        token: str | bool | None = None,
        create_pr: bool = False,
        revision: str | None = None,
        subfolder: str = "",
        metrics: Sequence[Metric] = (),
        card: Card | None = None,
        samples: int = 24,
        seed: int = 0,
    ) -> str:
        """Save the prior and upload it, in one commit, to a repository of the Hub, which is made where there is none.

        Args:
            repo_id: the repository, as owner/name or name.
            private: whether a repository that is made is private; None for your account's default.
            commit_message: the commit's first line.
            token: a token that may write; None takes the one that `hf auth login` kept.
            create_pr: open a pull request instead of committing.
            revision: branch to commit to; None for the main one.
            subfolder: folder within the repository.
            metrics: as of `save_pretrained`.
            card: as of `save_pretrained`.
            samples: as of `save_pretrained`; drawing them takes time.
            seed: as of `save_pretrained`.

        Returns:
            Address of the commit, or of the pull request.

        Raises:
            TypeError: as of `save_pretrained`.
            OSError: the Hub's own errors (`huggingface_hub.errors`): no permission, no connection.
        """
        with TemporaryDirectory() as folder:
            save(
                self,
                folder,
                trained=self.trained,
                metrics=metrics,
                card=card,
                samples=0 if takes_tensors(self.backbone) else samples,
                seed=seed,
                repo_id=repo_id,
            )
            return upload(
                folder,
                repo_id,
                private=private,
                commit_message=commit_message,
                token=token,
                create_pr=create_pr,
                revision=revision,
                subfolder=subfolder,
            )

    @classmethod
    def from_pretrained(
        cls,
        repo_or_dir: str | Path,
        *,
        backbone: BackboneAdapter | nn.Module,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
        subfolder: str = "",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        strict: bool = True,
        energy: Sequence[nn.Module] | None = None,
        execution: ExecutionConfig | None = None,
    ) -> Self:
        """Load a saved prior onto the backbone that it was learned for. Nothing in its files is executed.

        Args:
            repo_or_dir: a folder that `save_pretrained` wrote, or a repository of the Hub.
            backbone: the model, or its adapter, as of the constructor.
            revision: branch, tag or commit of the repository; None for the main branch.
            token: for private repositories; None takes the one that `hf auth login` kept.
            cache_dir: where downloads are kept; None for the Hub's usual place.
            local_files_only: take what was downloaded before; no connection is opened.
            subfolder: folder within the repository or folder.
            device: where to put the prior; None for the backbone's device.
            dtype: of its networks; None for that of the file.
            strict: raise where the backbone is another one than the prior was learned for; False warns where shapes
                agree.
            energy: your own networks, one per layer, where the prior was saved with such.
            execution: how chains are computed; None for the defaults.

        Returns:
            The prior, of the class that was saved, in eval mode.

        Raises:
            InvalidPrior: the files are damaged, or hold no prior of this class.
            BackboneMismatch: the backbone is another one.
            TypeError: `backbone` or `energy` does not fit.
            OSError: there is no such folder or repository, or the Hub's own errors.
        """
        folder = fetch(
            repo_or_dir,
            files=[CONFIG, WEIGHTS],
            revision=revision,
            token=token,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
            subfolder=subfolder,
        )
        prior, trained = load(
            cls, folder, backbone, device=device, dtype=dtype, strict=strict, energy=energy, execution=execution
        )
        prior.trained = trained
        return prior


def count_images(data: Data) -> int | None:
    """How many images there are; None for batches of unknown number."""
    return len(data) if isinstance(data, Tensor | Dataset) and hasattr(data, "__len__") else None


def list_callbacks(callback: Callback | Sequence[Callback] | None) -> list[Callback]:
    """A callback, a sequence of them or None as a list; TypeError for what cannot be called."""
    if callback is None:
        return []
    callbacks = list(callback) if isinstance(callback, Sequence) else [callback]
    for each in callbacks:
        if not callable(each):
            raise TypeError(
                f"callback: expected a function of (prior, record), or a sequence of such, got {type(each).__name__}"
            )
    return callbacks
