"""The files of a model folder that decide what is loaded, found as transformers finds them.

A folder's weights are its `model.safetensors`, else the shards that
`model.safetensors.index.json` lists, else the same of `pytorch_model.bin`; a config may name
another file (`transformers_weights`). `interv.engine.load` shows transformers these files alone.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from interv.errors import ModelError
from interv.models.cache import file_hash
from interv.models.families import BY_MODEL_TYPE

_INDEX = ".index.json"
_NAMES = ("model.safetensors", "pytorch_model.bin")

# Ends of class names by the kind of model; a bare `...Model` is the same network without a head.
_KINDS = {
    "AutoModelForCausalLM": ("ForCausalLM", "LMHeadModel", "LMHead"),
    "AutoModelForMaskedLM": ("ForMaskedLM", "ForPreTraining"),
    "AutoModelForImageTextToText": ("ForConditionalGeneration",),
}
_WORDS = {
    "AutoModelForCausalLM": "a causal language model",
    "AutoModelForMaskedLM": "a masked language model",
    "AutoModelForImageTextToText": "a model of images and text",
}


@dataclass(frozen=True)
class Weights:
    """The files that hold a model's weights.

    Attributes:
        files: the shards, or the one file.
        index: which shard has which weight; None where there is one file.
    """

    files: tuple[Path, ...]
    index: Path | None = None

    @property
    def every(self) -> tuple[Path, ...]:
        """All files, the index first."""
        return (*((self.index,) if self.index else ()), *self.files)

    def hashes(self) -> list[tuple[str, str]]:
        """Name and SHA-256 of each file."""
        return [(path.name, file_hash(path)) for path in self.every]


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON file that holds an object.

    Raises:
        ModelError: the file holds anything else.
    """
    try:
        found = json.loads(path.read_text("utf-8"))
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{path}: is not JSON: {error}") from None
    if not isinstance(found, dict):
        raise ModelError(f"{path}: is not an object")
    return found


def find_weights(folder: Path, config: Mapping[str, Any]) -> Weights | None:
    """Return the weights that transformers reads in a folder; None where there are none.

    Raises:
        ModelError: an index names a file that is not there, or one outside the folder.
    """
    named = config.get("transformers_weights")
    if named is not None and Path(str(named)).name != named:
        raise ModelError(f"{folder}: its config's transformers_weights, {named!r}, is no file name")
    names = (str(named),) if named is not None else _NAMES
    for name in names:
        if (folder / name).is_file() and not name.endswith(_INDEX):
            return Weights((folder / name,))
        index = folder / (name if name.endswith(_INDEX) else name + _INDEX)
        if index.is_file():
            return Weights(_shards(index), index)
    return None


def no_weights(folder: Path) -> str:
    """Say why a folder has no weights, with the files that look like some."""
    like = sorted(p.name for kind in ("*.safetensors", "*.bin") for p in folder.glob(kind))
    like = [name for name in like if not name.startswith("adapter_")]
    found = f" (it has {', '.join(like[:3])}, which transformers does not read)" if like else ""
    return f"weights: {folder} has neither model.safetensors nor pytorch_model.bin{found}"


def _shards(index: Path) -> tuple[Path, ...]:
    table = read_json(index).get("weight_map")
    names = sorted({str(n) for n in table.values()}) if isinstance(table, dict) else []
    if not names:
        raise ModelError(f"{index}: has no weight_map")
    for name in names:
        if Path(name).name != name or not (index.parent / name).is_file():
            raise ModelError(f"{index}: names {name!r}, which is not in {index.parent}")
    return tuple(index.parent / name for name in names)


def tensor_shapes(weights: Weights) -> dict[str, tuple[int, ...]] | None:
    """Return the shape of each tensor, from the headers of safetensors; None for pickles.

    Raises:
        ModelError: a file is damaged.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    for path in weights.files:
        if path.suffix != ".safetensors":
            return None
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if not 0 < length <= path.stat().st_size:
                raise ModelError(f"{path}: is not a safetensors file; is it whole?")
            try:
                header = json.loads(file.read(length))
                shapes |= {n: tuple(t["shape"]) for n, t in header.items() if n != "__metadata__"}
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise ModelError(f"{path}: is not a safetensors file: {error}") from None
    return shapes


def count_parameters(shapes: Mapping[str, tuple[int, ...]] | None) -> int | None:
    """Return the number of parameters; None where the shapes are not known."""
    return sum(prod(shape) for shape in shapes.values()) or None if shapes else None


def check_kind(config: Mapping[str, Any], source: str) -> None:
    """Check that a config describes a model of the kind that its type is loaded as.

    A config without `architectures` describes that kind. A classifier is none: its own head would
    be left out and another one taken.

    Raises:
        ModelError: `architectures` names a model of another kind, or it has an encoder and a
            decoder.
    """
    kind = str(config.get("model_type"))
    if config.get("is_encoder_decoder"):
        raise ModelError(
            f"{source}: '{kind}' has an encoder and a decoder; expected a causal or a masked "
            "language model (interv.executor runs any module from Python)"
        )
    named = config.get("architectures")
    if not isinstance(named, list) or not named:
        return
    family = BY_MODEL_TYPE.get(kind)
    auto = family.auto if family else "AutoModelForCausalLM"
    ends = _KINDS[auto]
    if isinstance(config.get("text_config"), dict):
        ends += _KINDS["AutoModelForImageTextToText"]
    bare = re.fullmatch(r"(?!.*(For[A-Z]|Heads?Model)).*Model", str(named[0]))
    if not bare and not str(named[0]).endswith(ends):
        raise ModelError(
            f"{source}: architectures is {named[0]}, which is not {_WORDS[auto]}; models of type "
            f"'{kind}' are run as one ({' or '.join('...' + end for end in ends)}), without the "
            "head that this one has"
        )


def check_head(shapes: Mapping[str, tuple[int, ...]], kind: str, source: str) -> None:
    """Check that a masked language model's weights have a head, which is never tied as a whole.

    Raises:
        ModelError: they are those of the network alone.
    """
    family = BY_MODEL_TYPE.get(kind)
    if family is None or family.auto != "AutoModelForMaskedLM":
        return
    head = family.layerless["logits"].path.split(".")[0]
    if not any(name.startswith(f"{head}.") for name in shapes):
        raise ModelError(
            f"{source}: its weights have no '{head}', the head of a masked language model; "
            "expected a checkpoint of one, not of its network alone"
        )
