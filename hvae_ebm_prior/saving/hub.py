"""Saved priors on the Hugging Face Hub: downloaded to a folder, and uploaded from one. No other files are touched.

Sizes are asked for before anything is downloaded, and settings are read before the weights are.
"""

import contextlib
import importlib
import shutil
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, HfApi, constants, get_hf_file_metadata, hf_hub_url, snapshot_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
)

from .card import LIBRARY
from .digest import digest_file
from .files import write_atomically
from .folder import (
    CARD,
    CONFIG,
    FILES,
    PREVIOUS,
    SAMPLES,
    WEIGHTS,
    check_free,
    in_order,
    keep_previous,
    load_config,
    read_settings,
)
from .typed_json import LARGEST_FILE, InvalidPrior

# What says that the Hub has no repository of a name, or cannot be asked.
NOT_FOUND = (RepositoryNotFoundError, LocalEntryNotFoundError, ConnectionError)
# Base class of the errors of each HTTP library that a version of huggingface_hub is built on.
HTTP_ERRORS = {"httpx2": "HTTPError", "httpx": "HTTPError", "requests": "RequestException"}


# Most bytes that a file may have, far above what any prior needs.
LARGEST = {CONFIG: LARGEST_FILE, CARD: LARGEST_FILE, SAMPLES: 2**26, WEIGHTS: 2**33}


def fetch(repo_or_dir: str | Path, *, subfolder: str = "", files: Sequence[str] = FILES, **options: Any) -> Path:
    """The folder of a saved prior; a repository is downloaded to the Hub's cache.

    Args:
        repo_or_dir: a folder, or a repository of the Hub, as owner/name.
        subfolder: folder within it.
        files: which of its files to download; `CONFIG` among them, which comes first.
        **options: revision, token, cache_dir and local_files_only, as of `huggingface_hub.snapshot_download`.

    Returns:
        The folder.

    Raises:
        OSError: there is no such folder or repository, or the Hub's own errors.
        InvalidPrior: a file is larger than those of any prior, or `config.json` is none of a prior's.
        ValueError: no name of a repository.
    """
    name = str(repo_or_dir)
    if Path(repo_or_dir).expanduser().is_dir():
        return Path(repo_or_dir).expanduser() / subfolder
    if isinstance(repo_or_dir, Path) or name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise FileNotFoundError(f"{name}: there is no such folder, and no repository of the Hub has such a name")
    check_sizes(name, files, subfolder=subfolder, **options)
    try:
        folder = download(name, [CONFIG], subfolder, options)
    except NOT_FOUND as error:
        error.add_note(f"{name} was looked for on the Hub, as there is no folder of this name")
        raise
    if len(files) == 1 or not (folder / CONFIG).is_file():
        return folder
    read_settings(folder)
    return download(name, files, subfolder, options)


def download(name: str, files: Sequence[str], subfolder: str, options: dict[str, Any]) -> Path:
    """The folder in the Hub's cache with files of a repository, where it has them."""
    patterns = [f"{subfolder}/{file}" if subfolder else file for file in files]
    with connection_errors():
        return Path(snapshot_download(name, allow_patterns=patterns, library_name=LIBRARY, **options)) / subfolder


def check_sizes(name: str, files: Sequence[str], **options: Any) -> None:
    """Raise InvalidPrior where a file of a repository is larger than `LARGEST`; options as of `file_sizes`."""
    for file, size in file_sizes(name, files, **options).items():
        if size > LARGEST[file]:
            raise InvalidPrior(f"{name}: {file}: expected at most {LARGEST[file]} bytes, got {size}; it was left there")


def file_sizes(
    name: str,
    files: Sequence[str],
    *,
    subfolder: str = "",
    revision: str | None = None,
    token: str | bool | None = None,
    local_files_only: bool = False,
    cache_dir: str | Path | None = None,
) -> dict[str, int]:
    """Bytes of those files of a repository that it has, by the Hub's metadata; fewer where the Hub cannot be asked, as
    downloading says what is wrong then. Options as of `fetch`.
    """
    sizes: dict[str, int] = {}
    if local_files_only or constants.HF_HUB_OFFLINE:
        return sizes
    with contextlib.suppress(OSError, ValueError, *transport_errors()):
        for file in files:
            url = hf_hub_url(name, file, subfolder=subfolder, revision=revision)
            with contextlib.suppress(EntryNotFoundError):
                sizes[file] = get_hf_file_metadata(url, token=token, library_name=LIBRARY).size or 0
    return sizes


def pull(repo_id: str, folder: str | Path, *, subfolder: str = "", **options: Any) -> Path:
    """Download a saved prior into a folder, over a prior that lies there, but over no other files.

    Args:
        repo_id: the repository.
        folder: where to put it.
        subfolder: folder within both.
        **options: revision and token, as of `fetch`.

    Returns:
        The folder of the prior.

    Raises:
        FileExistsError: files of these names are there that are none of a prior's.
        InvalidPrior: the repository holds no saved prior, or a damaged one.
        OSError: as of `fetch`, or the folder cannot be written.
    """
    target = Path(folder).expanduser() / subfolder
    check_free(target)
    source = fetch(repo_id, subfolder=subfolder, **options)
    check_weights(source)
    target.mkdir(parents=True, exist_ok=True)
    keep_previous(target)
    for name in (*in_order(target), CARD, SAMPLES):
        if (source / name).is_file():
            write_atomically(target / name, partial(shutil.copyfile, source / name))
    (target / PREVIOUS).unlink(missing_ok=True)
    return target


def check_weights(folder: Path) -> None:
    """Raise InvalidPrior or OSError unless a folder holds settings and the weights that they were written with."""
    digest = load_config(folder).weights
    if digest and digest_file(folder / WEIGHTS) != digest:
        raise InvalidPrior(f"{folder}: {WEIGHTS}: not the weights that {CONFIG} was written with; save the prior again")


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
    """Upload a saved prior in one commit; of other files in the folder none, and nothing that links lead to.

    Args:
        folder: where the prior lies.
        repo_id: the repository; it is made where there is none.
        private: as of `LearnedPrior.push_to_hub`.
        commit_message: as of `LearnedPrior.push_to_hub`.
        token: as of `LearnedPrior.push_to_hub`.
        create_pr: as of `LearnedPrior.push_to_hub`.
        revision: as of `LearnedPrior.push_to_hub`.
        subfolder: as of `LearnedPrior.push_to_hub`.

    Returns:
        Address of the commit, or of the pull request.

    Raises:
        InvalidPrior: the folder holds no saved prior, or a damaged one.
        ValueError: a file is a symbolic link.
        OSError: the folder cannot be read, or the Hub's own errors.
    """
    folder = Path(folder).expanduser()
    paths = {name: folder / name for name in FILES}
    for path in paths.values():
        if path.is_symlink():
            raise ValueError(f"{path}: a link to {path.readlink()}; put the file itself there to upload it")
    check_weights(folder)
    place = f"{subfolder}/" if subfolder else ""
    api = HfApi(library_name=LIBRARY, token=token)
    with connection_errors():
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if revision is not None and not create_pr:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        commit = api.create_commit(
            repo_id,
            [CommitOperationAdd(f"{place}{name}", path) for name, path in paths.items() if path.is_file()],
            commit_message=commit_message,
            create_pr=create_pr,
            revision=revision,
        )
    return str(commit.pr_url or commit.commit_url)


@contextlib.contextmanager
def connection_errors() -> Iterator[None]:
    """A context in which the client's errors are ConnectionErrors where the Hub cannot be reached or a transfer breaks
    off; errors that the Hub answered with stay as they are.
    """
    try:
        yield
    except HfHubHTTPError:
        raise
    except transport_errors() as error:
        why = error.__cause__ or error
        raise ConnectionError(
            f"the Hub could not be reached, or a transfer broke off; nothing was committed, so try again ({why})"
        ) from error


def transport_errors() -> tuple[type[Exception], ...]:
    """Base classes of errors of a connection: those of the HTTP libraries that are installed, and RuntimeError, which
    huggingface_hub raises for a file that did not arrive.
    """
    classes: list[type[Exception]] = [RuntimeError]
    for library, name in HTTP_ERRORS.items():
        with contextlib.suppress(ImportError):
            classes.append(getattr(importlib.import_module(library), name))
    return tuple(classes)
