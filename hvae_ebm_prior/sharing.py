"""What lets a prior be saved, shared and loaded: methods of `DiffusionEBMPrior`; the work is done in `hvae_ebm_prior.hub`."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Self

import torch
from torch import nn

from .backbone import BackboneAdapter

if TYPE_CHECKING:
    from .card import Card
    from .execution import ExecutionConfig
    from .prior_config import Measured


@dataclass(frozen=True)
class TrainingSummary:
    """How a prior was trained, for the record.

    Attributes:
        iterations: optimiser steps taken.
        seconds: time they took.
        settings: the `TrainingConfig`, by name.
    """

    iterations: int
    seconds: float
    settings: Mapping[str, int | float | str | tuple[float, ...]] = field(default_factory=dict)


class Shareable:
    """A prior that can be saved to a folder or a repository of the Hugging Face Hub, and loaded from there.

    Attributes:
        trained: what `fit` did last, or what the file said of it; None before.
    """

    trained: TrainingSummary | None = None

    def save_pretrained(
        self, save_directory: str | Path, *, metrics: "Sequence[Measured]" = (), card: "Card | None" = None, samples: int = 0, seed: int = 0
    ) -> None:
        """Write `config.json`, `model.safetensors` and the model card, `README.md`, to a folder; each file whole or not at all.

        Args:
            save_directory: the folder; it is made where there is none, and files of these names are replaced.
            metrics: figures of quality, for the card.
            card: what only you know, for the card.
            samples: how many samples of the Gaussian prior and of this one the card shows, `samples.png`; 0 for none. Needs matplotlib.
            seed: of the samples.

        Raises:
            TypeError: a class, or networks, that cannot be described in `config.json`.
            OSError: the folder cannot be written.
        """
        from .hub import save

        save(self, save_directory, metrics=metrics, card=card, samples=samples, seed=seed)  # type: ignore[arg-type]

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
        metrics: "Sequence[Measured]" = (),
        card: "Card | None" = None,
        samples: int = 24,
        seed: int = 0,
    ) -> str:
        """Save the prior and upload it, in one commit, to a repository of the Hub, which is made where there is none.

        Args:
            repo_id: the repository, as owner/name or name.
            private: whether a repository that is made is private; None for what your account does by default.
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
        from .hub import save, upload

        with TemporaryDirectory() as folder:
            save(self, folder, metrics=metrics, card=card, samples=samples, seed=seed, repo_id=repo_id)  # type: ignore[arg-type]
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
        execution: "ExecutionConfig | None" = None,
    ) -> Self:
        """A saved prior over the backbone that it was learned for. Nothing in its files is executed.

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
            strict: raise where the backbone is another one than the prior was learned for; False warns, if its shapes agree.
            energy: your own networks, one per layer, of a prior that was saved with such.
            execution: how chains are computed; None for the defaults.

        Returns:
            The prior, of the class that was saved, in eval mode.

        Raises:
            InvalidPrior: the files are damaged, or hold no prior of this class.
            BackboneMismatch: the backbone is another one.
            TypeError: `backbone` or `energy` does not fit.
            OSError: there is no such folder or repository, or the Hub's own errors.
        """
        from .hub import fetch, load

        folder = fetch(repo_or_dir, revision=revision, token=token, cache_dir=cache_dir, local_files_only=local_files_only, subfolder=subfolder)
        return load(cls, folder, backbone, device=device, dtype=dtype, strict=strict, energy=energy, execution=execution)  # type: ignore[type-var]
