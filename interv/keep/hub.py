"""Sharing trained interventions through the Hugging Face hub, by its own client.

Nothing that is pulled is unpickled here.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NoReturn

from interv.errors import ModelError, UsageError
from interv.keep.card import CARD
from interv.keep.format import JSON, TENSORS, read
from interv.storage import write_atomically, writing

PYVENE_CONFIG = "config.json"
PYVENE_TENSORS = "intkey_*.bin"
_PATTERNS = (JSON, TENSORS, CARD, PYVENE_CONFIG, PYVENE_TENSORS)


def push(folder: Path, repo_id: str, *, private: bool = False, token: str | None = None) -> str:
    """Send a saved intervention to the hub, in one commit; the repository is made if need be.

    Other files of the folder stay where they are.

    Args:
        folder: what `write` or `write_pyvene` wrote, perhaps with a model card.
        repo_id: `user/name`.
        private: whether others may not see it; one that is public already is refused.
        token: the hub's; the one that the machine is logged in with without.

    Returns:
        The repository's address.

    Raises:
        UsageError: the folder holds no intervention, or the name cannot be one.
        ModelError: the hub cannot be reached, or refuses.
    """
    from huggingface_hub import CommitOperationAdd, HfApi

    if "/" not in repo_id:
        raise UsageError(f"'{repo_id}' names no repository; expected user/name")
    files = _files(folder)
    _expect_whole(folder, files)
    additions = [CommitOperationAdd(file.name, file) for file in files]
    try:
        api = HfApi(token=token, library_name="interv")
        url = api.create_repo(repo_id, private=private or None, exist_ok=True)
        if private and not api.model_info(repo_id).private:
            raise ModelError(f"'{repo_id}' is there already, and public: nothing was pushed")
        # One commit: `upload_folder` may make several, and between them the JSON would speak of
        # other tensors than there are.
        api.create_commit(repo_id, additions, commit_message="A trained intervention (interv)")
    except _failures() as error:
        _explain(error, f"'{repo_id}' cannot be pushed to", repo_id, writes=True)
    return str(url)


def pull(repo_id: str, folder: Path, revision: str | None = None, token: str | None = None) -> str:
    """Bring an intervention from the hub into a folder; only files that are its own.

    Args:
        repo_id: `user/name`.
        folder: where to; files of the same names are replaced.
        revision: a branch, a tag or a commit; the main branch's last commit without.
        token: as for `push`.

    Returns:
        The commit.

    Raises:
        UsageError: the name cannot be one, or what was pulled is damaged.
        ModelError: the hub cannot be reached, has no such repository, or that holds no
            intervention.
        StorageError: the folder cannot be written.
    """
    from huggingface_hub import snapshot_download

    try:
        snapshot = snapshot_download(
            repo_id,
            revision=revision,
            allow_patterns=list(_PATTERNS),
            ignore_patterns=["*/*"],
            token=token,
            library_name="interv",
        )
    except _failures() as error:
        where = repo_id if revision is None else f"{repo_id}@{revision}"
        _explain(error, f"'{where}' cannot be pulled", repo_id, writes=False)
    files = _files(Path(snapshot))
    try:
        _expect_whole(Path(snapshot), files)
    except UsageError as error:
        raise ModelError(f"'{repo_id}' holds no intervention that can be read: {error}") from error
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        # The JSON last, as it is written.
        for file in sorted(files, key=lambda file: file.name == JSON):
            write_atomically(folder / file.name, file.read_bytes())
    return Path(snapshot).name


def _files(folder: Path) -> list[Path]:
    found = {file for pattern in _PATTERNS for file in folder.glob(pattern) if file.is_file()}
    return sorted(found)


def _expect_whole(folder: Path, files: list[Path]) -> None:
    """That there is an intervention; if it is ours, that it can be read.

    pyvene's are pickles: they are left unread, for `read_pyvene` to see to.
    """
    names = {file.name for file in files}
    if JSON in names:
        read(folder)
    elif PYVENE_CONFIG not in names or not any(name.endswith(".bin") for name in names):
        raise UsageError(
            f"{folder}: no intervention; expected {JSON} and {TENSORS}, or pyvene's "
            f"{PYVENE_CONFIG} and {PYVENE_TENSORS}"
        )


def _failures() -> Any:
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    # The bases of the hub's own error are OSError and that of whichever HTTP client it uses.
    return (*HfHubHTTPError.__bases__, HFValidationError, ValueError)


def _explain(error: Exception, what: str, repo_id: str, *, writes: bool) -> NoReturn:
    """One message for what the client raised."""
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, RevisionNotFoundError

    first = (str(error).strip().splitlines() or [type(error).__name__])[0]
    if isinstance(error, HFValidationError):
        raise UsageError(f"'{repo_id}' names no repository: {first}; expected user/name") from error
    status = error.response.status_code if isinstance(error, HfHubHTTPError) else None
    right = "write to" if writes else "read"
    if isinstance(error, RevisionNotFoundError):
        reason = "there is no such branch, tag or commit"
    elif status in (401, 403, 404):
        # To those who may not see a repository the hub says that there is none.
        missing = "" if writes else "there is no such repository, or "
        reason = (
            f"{missing}the hub does not let you {right} it ({status}). Log in with `hf auth login` "
            "or set HF_TOKEN, with a token that may"
        )
    elif status is None and not isinstance(error, ValueError):
        reason = f"the hub cannot be reached: {first}"
    else:
        reason = first
    raise ModelError(f"{what}: {reason}") from error
