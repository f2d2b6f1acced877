"""Adapters in peft's format: found beside a model's weights or alone, and part of its identity.

They are merged into the weights in `interv.engine.pretrained`; one that cannot be merged, or whose
head is that of another task, is refused here.
"""

from __future__ import annotations

import importlib.metadata
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from interv.errors import ModelError
from interv.models.cache import file_hash, text_hash
from interv.models.checkpoint import read_json

CONFIG = "adapter_config.json"
INSTALL = "pip install 'interv[adapters]'"

_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
# A change of the weights alone, which can be added to them.
_MERGED = ("LORA", "ADALORA", "LOHA", "LOKR", "IA3")
_TASKS = (None, "CAUSAL_LM", "FEATURE_EXTRACTION")


@dataclass(frozen=True)
class Adapter:
    """An adapter's files.

    Attributes:
        folder: where they are.
        weights: its weights.
        config: its adapter_config.json.
        version: of the peft that merges it.
    """

    folder: Path
    weights: Path
    config: Mapping[str, Any]
    version: str

    @property
    def identity(self) -> str:
        """Hash of all that decides what it adds to the weights."""
        files = [file_hash(self.folder / CONFIG), self.weights.name, file_hash(self.weights)]
        return text_hash(json.dumps([*files, self.version]))

    @property
    def base(self) -> tuple[Path | str, str | None]:
        """The model that it was made for, by its folder or its hub name, and the revision.

        Raises:
            ModelError: its config names none.
        """
        return base_of(self.config, self.folder)


def base_of(config: Mapping[str, Any], folder: Path) -> tuple[Path | str, str | None]:
    """The model that an adapter's config names: a folder beside the adapter's, or a hub name.

    Raises:
        ModelError: it names none.
    """
    name, revision = config.get("base_model_name_or_path"), config.get("revision")
    if not isinstance(name, str) or not name:
        raise ModelError(f"{folder / CONFIG}: base_model_name_or_path is missing")
    for place in (folder / name, folder.parent / name):
        if place.resolve() != folder.resolve() and (place / "config.json").is_file():
            return place, None
    return name, revision if isinstance(revision, str) else None


def read_adapter(folder: Path) -> Adapter | None:
    """Return the adapter in a folder; None where there is none.

    Raises:
        ModelError: it cannot be merged, its weights are missing, or peft is not installed.
    """
    weights = next((folder / name for name in _WEIGHTS if (folder / name).is_file()), None)
    if not (folder / CONFIG).is_file():
        if weights is not None:
            raise ModelError(f"{weights}: an adapter's weights without their {CONFIG}")
        return None
    config = read_json(folder / CONFIG)
    if weights is None:
        raise ModelError(f"{folder / CONFIG}: an adapter without its weights, {_WEIGHTS[0]}")
    kind, task = config.get("peft_type"), config.get("task_type")
    if kind not in _MERGED:
        raise ModelError(
            f"{folder / CONFIG}: adapters of type {kind} are not merged into a model's weights; "
            f"expected one of {', '.join(_MERGED)}"
        )
    if task not in _TASKS:
        raise ModelError(
            f"{folder / CONFIG}: the adapter's task_type is {task}; expected CAUSAL_LM or none"
        )
    try:
        version = importlib.metadata.version("peft")
    except importlib.metadata.PackageNotFoundError:
        raise ModelError(
            f"{folder / CONFIG}: the folder holds an adapter, and peft, which applies it, is not "
            f"installed; `{INSTALL}` installs it, or move {CONFIG} and {weights.name} away to run "
            "the model without it"
        ) from None
    return Adapter(folder, weights, config, version)
