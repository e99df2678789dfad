"""Saved priors on the Hugging Face Hub: downloaded to a folder, and uploaded from one. No other files are touched."""

import contextlib
import importlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import HfHubHTTPError

from .card import LIBRARY
from .folder import FILES, load_config

# Base class of the errors of each HTTP library that a version of huggingface_hub is built on.
HTTP_ERRORS = {"httpx2": "HTTPError", "httpx": "HTTPError", "requests": "RequestException"}


def fetch(repo_or_dir: str | Path, *, subfolder: str = "", local_dir: str | Path | None = None, **options: Any) -> Path:
    """The folder of a saved prior; a repository is downloaded.

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
    name = str(repo_or_dir)
    if Path(repo_or_dir).expanduser().is_dir():
        return Path(repo_or_dir).expanduser() / subfolder
    if isinstance(repo_or_dir, Path) or name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise FileNotFoundError(f"{name}: there is no such folder, and no repository of the Hub has such a name")
    patterns = [f"{subfolder}/{file}" if subfolder else file for file in FILES]
    with connection_errors():
        folder = snapshot_download(name, allow_patterns=patterns, local_dir=local_dir, library_name=LIBRARY, **options)
    return Path(folder) / subfolder


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
    """Upload a saved prior in one commit; of other files in the folder none.

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
        OSError: the folder cannot be read, or the Hub's own errors.
    """
    load_config(Path(folder).expanduser())
    api = HfApi(library_name=LIBRARY, token=token)
    with connection_errors():
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
