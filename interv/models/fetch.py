"""Downloading a hub model's files: only when a run needs them, and only data files."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from interv.errors import ModelError
from interv.models.adapter import CONFIG, base_of
from interv.models.checkpoint import read_json
from interv.spec.schema import ModelSection

_TEXT = (".json", ".txt", ".jinja", ".model")
# In the order in which transformers and peft look for them.
_SHARD = r"-\d+-of-\d+"
_MODEL = (
    r"model\.safetensors",
    rf"model{_SHARD}\.safetensors",
    r"pytorch_model\.bin",
    rf"pytorch_model{_SHARD}\.bin",
)
_ADAPTER = (r"adapter_model\.safetensors", r"adapter_model\.bin")


def fetch(section: ModelSection, *, weights: bool = True) -> None:
    """Bring config, tokenizer and, unless told not to, weights of a hub model into its cache.

    An adapter's base comes with it. Of the weights only those that transformers reads are taken.

    Raises:
        ModelError: the hub or the model cannot be reached.
    """
    if section.name is not None:
        folder = _fetch(section.name, section.revision, weights=weights)
    else:
        assert section.path is not None
        folder = Path(section.path)
    adapter = folder / CONFIG
    if adapter.is_file() and not (folder / "config.json").is_file():
        base, revision = base_of(read_json(adapter), folder)
        if isinstance(base, str):
            _fetch(base, revision, weights=weights)


def _fetch(name: str, revision: str | None, *, weights: bool) -> Path:
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    # The bases of the hub's own error are OSError and that of whichever HTTP client it uses.
    failures: Any = (*HfHubHTTPError.__bases__, HFValidationError)
    try:
        names = [n for n in HfApi().list_repo_files(name, revision=revision) if "/" not in n]
        wanted = [n for n in names if n.endswith(_TEXT)]
        for kinds in (_MODEL if weights else (), _ADAPTER):
            found = [[n for n in names if re.fullmatch(kind, n)] for kind in kinds]
            wanted += next((some for some in found if some), [])
        return Path(snapshot_download(name, revision=revision, allow_patterns=wanted))
    except failures as error:
        first = str(error).strip().splitlines() or [type(error).__name__]
        raise ModelError(
            f"model '{name}' is not on this machine and cannot be fetched: {first[0]}\n"
            f"Where there is a connection, `hf download {name}` fetches it and its folder can be "
            "copied here and named as model: ./FOLDER. The model smollm2-135m needs no connection"
        ) from error
