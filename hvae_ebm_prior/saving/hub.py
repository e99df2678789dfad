"""Saved priors on the Hugging Face Hub: downloaded to a folder, and uploaded from one. No other files are touched."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import HfHubHTTPError

from .card import LIBRARY
from .folder import FILES, load_config

# Those of the library that the client is built on, which differs between its versions; and the client's own, of a file
# that did not arrive.
TRANSPORT_ERRORS: tuple[type[Exception], ...] = (
    RuntimeError,
    *(each for each in HfHubHTTPError.__mro__ if each.__name__ == "HTTPError"),
)


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
        if (
            isinstance(repo_or_dir, Path)
            or str(repo_or_dir).startswith((".", "/", "~"))
            or str(repo_or_dir).count("/") > 1
        ):
            raise FileNotFoundError(
                f"{repo_or_dir}: there is no such folder, and no repository of the Hub has such a name"
            )
        names = [f"{subfolder}/{name}" if subfolder else name for name in FILES]
        with reachable():
            folder = Path(
                snapshot_download(
                    str(repo_or_dir), allow_patterns=names, local_dir=local_dir, library_name=LIBRARY, **options
                )
            )
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
    """Upload a saved prior in one commit; see `LearnedPrior.push_to_hub`. Only the files of a saved prior go up,
    whatever else the folder holds.
    """
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
    """What the client raises where the Hub cannot be reached, or a large file does not arrive, as ConnectionError; the
    Hub's own answers stay.
    """
    try:
        yield
    except HfHubHTTPError:
        raise
    except TRANSPORT_ERRORS as error:
        why = error.__cause__ or error
        raise ConnectionError(
            f"the Hub could not be reached, or a transfer broke off; nothing was committed, so try again ({why})"
        ) from error
