"""Downloading a hub model's files: only when a run needs them, and only data files."""

from __future__ import annotations

from typing import Any

from interv.errors import ModelError
from interv.spec.schema import ModelSection

_TEXT = (".json", ".txt", ".jinja", ".model")


def fetch(section: ModelSection, *, weights: bool = True) -> None:
    """Bring config, tokenizer and, unless told not to, weights of a hub model into its cache.

    Pickled weights are taken only where there are no safetensors.

    Raises:
        ModelError: the hub or the model cannot be reached.
    """
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    # The bases of the hub's own error are OSError and that of whichever HTTP client it uses.
    failures: Any = (*HfHubHTTPError.__bases__, HFValidationError)
    assert section.name is not None
    name, revision = section.name, section.revision
    try:
        names = [n for n in HfApi().list_repo_files(name, revision=revision) if "/" not in n]
        wanted = [n for n in names if n.endswith(_TEXT)]
        if weights:
            tensors = [n for n in names if n.endswith(".safetensors")]
            wanted += tensors or [n for n in names if n.endswith(".bin")]
        snapshot_download(name, revision=revision, allow_patterns=wanted)
    except failures as error:
        first = str(error).strip().splitlines() or [type(error).__name__]
        raise ModelError(
            f"model '{name}' is not on this machine and cannot be fetched: {first[0]}\n"
            f"Where there is a connection, `hf download {name}` fetches it and its folder can be "
            "copied here and named as model: ./FOLDER. The model smollm2-135m needs no connection"
        ) from error
