"""Saved priors: to a folder and back, and to the Hugging Face Hub and back.

A saved prior is three files, and a picture where there is one. Files from elsewhere are data: `config.json` is read against types and bounds, the
weights against the shapes that follow from it, and only these names are ever downloaded.
"""

import contextlib
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import HfHubHTTPError
from torch import Tensor, nn

from .backbone import BackboneAdapter
from .baselines import GaussianPrior
from .card import LIBRARY, Card, write_card
from .execution import ExecutionConfig
from .files import write_atomically, write_json
from .fingerprint import BackboneMismatch, check_backbone, fingerprint
from .pictures import save_grid
from .prior import DiffusionEBMPrior
from .prior_config import Measured, PriorConfig, build, describe, read_config
from .report import installed
from .typed_json import InvalidPrior, read_json_file, to_json
from .weights_file import read_weights, write_weights

CONFIG, WEIGHTS, CARD, SAMPLES = "config.json", "model.safetensors", "README.md", "samples.png"
FILES = (CONFIG, WEIGHTS, CARD, SAMPLES)
# Those of the library that the client is built on, which differs between its versions; and the client's own, of a file that did not arrive.
TRANSPORT_ERRORS: tuple[type[Exception], ...] = (RuntimeError, *(each for each in HfHubHTTPError.__mro__ if each.__name__ == "HTTPError"))
P = TypeVar("P", bound=DiffusionEBMPrior)


def save(
    prior: DiffusionEBMPrior,
    folder: str | Path,
    *,
    metrics: Sequence[Measured] = (),
    card: Card | None = None,
    samples: int = 0,
    seed: int = 0,
    repo_id: str | None = None,
) -> None:
    """Write a prior to a folder; see `Shareable.save_pretrained`. `repo_id` is where the card says that it is loaded from."""
    folder = Path(folder)
    config = describe(prior, fingerprint(prior), installed(LIBRARY) or "unknown", prior.trained, metrics)
    folder.mkdir(parents=True, exist_ok=True)
    if samples:
        save_samples(folder / SAMPLES, prior, samples, seed)
    text = write_card(config, card or Card(), repo_id=repo_id or folder.name, samples=SAMPLES if samples else None)
    write_weights(folder / WEIGHTS, prior.state_dict(), {"format": "pt"})
    write_json(folder / CONFIG, to_json(config))
    write_atomically(folder / CARD, lambda scratch: scratch.write_text(text, encoding="utf-8"))


def save_samples(path: Path, prior: DiffusionEBMPrior, count: int, seed: int, columns: int = 8) -> None:
    """A picture of `count` samples of the backbone's Gaussian prior and as many of `prior`."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(count, prior.dim, generator=generator).to(prior.device, prior.dtype)
    with torch.no_grad():
        gaussian = prior.decode(noise)
    both = {"Gaussian prior": gaussian, "this prior": prior.sample(count, generator=generator)}
    rows = [(name, row) for name, images in both.items() for row in images.split(columns)]
    write_atomically(path, lambda scratch: save_grid(scratch, [row for _, row in rows], [name for name, _ in rows]))


def load(
    kind: type[P],
    folder: Path,
    backbone: BackboneAdapter | nn.Module,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    strict: bool = True,
    energy: Sequence[nn.Module] | None = None,
    execution: ExecutionConfig | None = None,
) -> P:
    """A prior from a folder; see `Shareable.from_pretrained`."""
    config = load_config(folder)
    probe = GaussianPrior(backbone)
    try:
        # Before anything is made of what the file says, as the backbone's shapes bound how much that can be.
        if different := check_backbone(config.backbone, fingerprint(probe)):
            if strict:
                raise BackboneMismatch(f"{different}. Load it onto the model that it was learned for, or pass strict=False if you know better")
            warnings.warn(different, UserWarning, stacklevel=3)
        where = probe.device if device is None else torch.device(device)
        prior = build(config, backbone, execution or ExecutionConfig(), energy)
    finally:
        probe.release()
    if not isinstance(prior, kind):
        prior.release()
        raise InvalidPrior(f"expected a {kind.__name__}, got a {config.kind}; load it with {config.kind}.from_pretrained")
    try:
        prior.load_state_dict(read_tensors(folder, prior), assign=True)
    except BaseException:
        prior.release()
        raise
    prior.trained = config.training
    return prior.to(where, dtype).eval().requires_grad_(True)


def read_tensors(folder: Path, prior: DiffusionEBMPrior) -> dict[str, Tensor]:
    """The weights of a saved prior, all in one dtype; InvalidPrior where they are not those of `prior`."""
    tensors = read_weights(folder / WEIGHTS, {name: tuple(tensor.shape) for name, tensor in prior.state_dict().items()})
    if len(kinds := {tensor.dtype for tensor in tensors.values()}) > 1:
        raise InvalidPrior(f"{WEIGHTS}: expected tensors of one dtype, got {', '.join(sorted(map(str, kinds)))}")
    return tensors


def load_config(folder: Path) -> PriorConfig:
    """What the `config.json` in a folder says; InvalidPrior or OSError where there is none that can be read."""
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder}: expected a saved prior, with the files {CONFIG} and {WEIGHTS}; there is no {name}")
    return read_config(read_json_file(folder / CONFIG))


def fetch(repo_or_dir: str | Path, *, subfolder: str = "", local_dir: str | Path | None = None, **options: Any) -> Path:
    """The folder of a saved prior, downloaded if it is none on this machine.

    Args:
        repo_or_dir: a folder, or a repository of the Hub, as owner/name.
        subfolder: folder within it.
        local_dir: where to put the files; None for the Hub's cache.
        **options: revision, token, cache_dir and local_files_only, as of `huggingface_hub.snapshot_download`.

    Returns:
        The folder.

    Raises:
        OSError: there is no such folder or repository, or the Hub's own errors.
        ValueError: no name of a repository.
    """
    folder = Path(repo_or_dir)
    if not folder.is_dir():
        if isinstance(repo_or_dir, Path) or str(repo_or_dir).startswith((".", "/", "~")) or str(repo_or_dir).count("/") > 1:
            raise FileNotFoundError(f"{repo_or_dir}: there is no such folder, and no repository of the Hub has such a name")
        names = [f"{subfolder}/{name}" if subfolder else name for name in FILES]
        with reachable():
            folder = Path(snapshot_download(str(repo_or_dir), allow_patterns=names, local_dir=local_dir, library_name=LIBRARY, **options))
    return folder / subfolder


def upload(
    folder: str | Path,
    repo_id: str,
    *,
    private: bool | None = None,
    commit_message: str = "Upload prior",
    token: str | bool | None = None,
    create_pr: bool = False,
    revision: str | None = None,
    subfolder: str = "",
) -> str:
    """Upload a saved prior in one commit; see `Shareable.push_to_hub`. Only the files of a saved prior go up, whatever else the folder holds."""
    load_config(Path(folder))
    api = HfApi(library_name=LIBRARY, token=token)
    with reachable():
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if revision is not None and not create_pr:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        commit = api.upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            path_in_repo=subfolder or None,
            allow_patterns=list(FILES),
            commit_message=commit_message,
            create_pr=create_pr,
            revision=revision,
        )
    return str(commit.pr_url or commit.commit_url)


@contextlib.contextmanager
def reachable() -> Iterator[None]:
    """What the client raises where the Hub cannot be reached, or a large file does not arrive, as ConnectionError; the Hub's own answers stay."""
    try:
        yield
    except HfHubHTTPError:
        raise
    except TRANSPORT_ERRORS as error:
        why = error.__cause__ or error
        raise ConnectionError(f"the Hub could not be reached, or a transfer broke off; nothing was committed, so try again ({why})") from error
