"""Trained interventions in a folder: `intervention.json` and `intervention.safetensors`.

The JSON says what the tensors are: modules by kind and shape, interventions by type and fields,
and the parts that hold them. What was one object is written once and is one object again: linked
parts and parts of one basis stay so. Nothing is ever unpickled.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, get_type_hints

import torch
from torch import Tensor, nn

from interv.engine.adapters import Adapter
from interv.engine.dictionaries import JumpReluDictionary, ReluDictionary
from interv.engine.interventions import Intervention
from interv.engine.masks import Boundary, Mask
from interv.engine.registry import BY_NAME
from interv.engine.rotations import Rotation
from interv.engine.runs import Site
from interv.errors import EngineError, UsageError, nearest
from interv.storage import write_atomically, writing
from interv.version import __version__

JSON = "intervention.json"
TENSORS = "intervention.safetensors"
FORMAT = "interv.intervention"
_DEEPEST = 20  # interventions in interventions
VERSION = 1


@dataclass(frozen=True)
class Part:
    """One site of a trained intervention.

    Attributes:
        site: where it acts; its positions are None, for those come from `unit`.
        unit: the position as the spec names it: a span's name, an index (negative ones from the
            end); None: all positions.
        variable: the variable of the causal model whose source it takes.
        intervention: parts that are linked, or share one basis, hold the same modules.

    Raises:
        EngineError: the site names positions.
    """

    site: Site
    unit: str | int | None
    variable: str
    intervention: Intervention

    def __post_init__(self) -> None:
        if self.site.positions is not None:
            raise EngineError(
                f"{self.site.component}: positions {self.site.positions}; those of a part are "
                "its unit's"
            )


@dataclass(frozen=True)
class Trained:
    """What was trained together.

    Attributes:
        parts: in the order in which they act.
        about: JSON of any form: the model's label and identity, spec, seed, results, versions.
    """

    parts: tuple[Part, ...]
    about: Mapping[str, Any]


def write(folder: Path, trained: Trained) -> None:
    """Write a trained intervention; each file appears whole or stays as it was.

    Raises:
        UsageError: a type that cannot be written (a function of the user's own), numbers that
            are not finite, or an `about` that is not JSON.
        StorageError: the folder cannot be written.
    """
    from safetensors.torch import save

    writer = _Writer()
    parts = [_part_entry(part, writer) for part in trained.parts]
    tensors = save(writer.tensors)
    document = {
        "format": FORMAT,
        "version": VERSION,
        "written_by": f"interv {__version__}",
        "parts": parts,
        "interventions": writer.interventions,
        "modules": writer.modules,
        "tensors": {"file": TENSORS, "sha256": hashlib.sha256(tensors).hexdigest()},
        "about": trained.about,
    }
    try:
        text = json.dumps(document, indent=1, allow_nan=False, ensure_ascii=False)
    except (TypeError, ValueError) as error:
        raise UsageError(f"{folder}: what is said about the intervention: {error}") from error
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        # The JSON last: where it is new, so is what it speaks of.
        for name, data in ((TENSORS, tensors), (JSON, (text + "\n").encode())):
            write_atomically(folder / name, data)


def read(folder: Path) -> Trained:
    """What `write` wrote, its numbers to the last bit; parameters can be trained further.

    Raises:
        UsageError: a file is missing or damaged, of another version, or says what cannot be.
    """
    path = folder / JSON
    document = _Entry(path, "the file", _json(path))
    found = document.get("format", str)
    if found != FORMAT:
        document.wrong(f"the format is '{found}'", f"'{FORMAT}'")
    version = document.get("version", int)
    if version != VERSION:
        document.wrong(f"format version {version}", f"version {VERSION}; another interv wrote it")
    reader = _Reader(document, _tensors(folder, document.entry("tensors")))
    parts = tuple(
        _part(_Entry(path, f"part {i}", entry), reader)
        for i, entry in enumerate(document.get("parts", list))
    )
    reader.expect_all_used()
    return Trained(parts, document.get("about", dict))


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UsageError(
            f"{path}: there is no such file; expected a folder that `interv save` wrote"
        ) from None
    except OSError as error:
        raise UsageError(f"{path}: cannot be read: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{path}: not JSON: {error}") from error


def _tensors(folder: Path, entry: _Entry) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load

    name = entry.get("file", str)
    if Path(name).name != name:
        entry.wrong(f"the file '{name}' is not in the folder", f"'{TENSORS}'")
    path = folder / name
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UsageError(f"{path}: cannot be read: {error.strerror or error}") from error
    if hashlib.sha256(data).hexdigest() != entry.get("sha256", str):
        raise UsageError(
            f"{path}: not the file that {JSON} was written with (its SHA-256 is another); save "
            "or pull the intervention again"
        )
    try:
        return {name: tensor.clone() for name, tensor in load(data).items()}
    except (SafetensorError, ValueError, KeyError) as error:
        raise UsageError(f"{path}: not a safetensors file: {error}") from error


@dataclass(frozen=True)
class _Entry:
    """An object of the JSON that knows its place, for errors."""

    path: Path
    what: str
    value: Any

    def __post_init__(self) -> None:
        if not isinstance(self.value, dict):
            self.wrong(f"is {_shown(self.value)}", "an object")

    def wrong(self, message: str, expected: str) -> NoReturn:
        raise UsageError(f"{self.path}: {self.what}: {message}; expected {expected}")

    def get(self, key: str, kind: type[Any]) -> Any:
        """The value of a key, of a kind; bool is no int."""
        if key not in self.value:
            self.wrong(f"'{key}' is missing", _named(kind))
        found = self.value[key]
        if not _is(found, kind):
            self.wrong(f"'{key}' is {_shown(found)}", _named(kind))
        return found

    def entry(self, key: str) -> _Entry:
        return _Entry(self.path, f"{self.what}, {key}", self.get(key, dict))

    def only(self, keys: Sequence[str]) -> None:
        """That there are no other keys: what is not understood must not be left out silently."""
        for key in self.value:
            if key not in keys:
                near = nearest(key, list(keys))
                hint = f" (did you mean '{near}'?)" if near else ""
                self.wrong(f"'{key}' is not known{hint}", ", ".join(keys))


def _is(value: object, kind: type[Any]) -> bool:
    if kind is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    return isinstance(value, kind) and (kind is bool or not isinstance(value, bool))


def _named(kind: type[Any]) -> str:
    names = {"str": "a text", "int": "a whole number", "float": "a number"}
    names |= {"bool": "true or false", "list": "a list", "dict": "an object"}
    return names[kind.__name__]


def _shown(value: object) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) < 60 else text[:57] + "..."


# Parts


def _part_entry(part: Part, writer: _Writer) -> dict[str, Any]:
    site = part.site
    return {
        "component": site.component,
        "layer": site.layer,
        "heads": None if site.heads is None else list(site.heads),
        "dims": None if site.dims is None else list(site.dims),
        "unit": part.unit,
        "variable": part.variable,
        "intervention": writer.intervention(part.intervention),
    }


def _part(entry: _Entry, reader: _Reader) -> Part:
    entry.only(["component", "layer", "heads", "dims", "unit", "variable", "intervention"])
    unit = entry.value.get("unit", "")
    if "unit" not in entry.value or not (unit is None or _is(unit, str) or _is(unit, int)):
        entry.wrong(f"'unit' is {_shown(unit)}", "a span's name, a position or null")
    intervention = reader.intervention(entry.get("intervention", str), entry)
    try:
        site = Site(
            entry.get("component", str),
            entry.get("layer", int),
            None,
            _indices(entry, "heads"),
            _indices(entry, "dims"),
        )
        return Part(site, unit, entry.get("variable", str), intervention)
    except EngineError as error:
        entry.wrong(str(error), "a site")


def _indices(entry: _Entry, key: str) -> tuple[int, ...] | None:
    found = entry.value.get(key, "")
    if found is None:
        return None
    if not isinstance(found, list) or not all(_is(i, int) for i in found):
        entry.wrong(f"'{key}' is {_shown(found)}", "a list of whole numbers or null")
    return tuple(found)


# Modules: the kind and what its constructor needs, beside the tensors


@dataclass(frozen=True)
class _Kind:
    """How a class of modules is written.

    Attributes:
        of: the class.
        shapes: of its tensors, in words: what a word is, is written as a number.
        make: a module, from the numbers and its tensors.
        others: numbers that are not in the tensors' shapes; attributes of the module.
    """

    of: type[nn.Module]
    shapes: Mapping[str, tuple[str, ...]]
    make: Callable[[Mapping[str, Any], Mapping[str, Tensor]], nn.Module]
    others: tuple[str, ...] = ()

    @property
    def words(self) -> list[str]:
        """Names of the numbers."""
        seen = dict.fromkeys(word for shape in self.shapes.values() for word in shape)
        return [*seen, *self.others]

    def numbers(self, module: nn.Module) -> dict[str, int | float]:
        """The numbers of a module."""
        found: dict[str, int | float] = {}
        for key, words in self.shapes.items():
            found |= dict(zip(words, getattr(module, key).shape, strict=True))
        return found | {name: getattr(module, name) for name in self.others}


_DICTIONARY = {
    "encoder": ("width", "n_latents"),
    "encoder_bias": ("n_latents",),
    "decoder": ("n_latents", "width"),
    "decoder_bias": ("width",),
}
_KINDS: Mapping[str, _Kind] = {
    "rotation": _Kind(
        Rotation,
        {"free": ("width", "rank")},
        # A trained free parameter is not orthonormal, as the constructor wants it.
        lambda _, _tensors: Rotation(torch.eye(1)),
    ),
    "boundary": _Kind(
        Boundary,
        {"boundary": (), "temperature": ()},
        lambda numbers, tensors: Boundary(numbers["width"], temperature=tensors["temperature"]),
        ("width",),
    ),
    "mask": _Kind(
        Mask,
        {"mask": ("gates",), "temperature": ()},
        lambda numbers, tensors: Mask(
            numbers["width"], temperature=tensors["temperature"], each=numbers["each"]
        ),
        ("width", "each"),
    ),
    "relu_dictionary": _Kind(
        ReluDictionary, _DICTIONARY, lambda _, tensors: ReluDictionary(**tensors)
    ),
    "jump_relu_dictionary": _Kind(
        JumpReluDictionary,
        {**_DICTIONARY, "threshold": ("n_latents",)},
        lambda _, tensors: JumpReluDictionary(**tensors),
    ),
    "adapter": _Kind(
        Adapter,
        {"down": ("width", "rank"), "up": ("rank", "width")},
        lambda numbers, tensors: Adapter(**tensors, alpha=numbers["alpha"]),
        ("alpha",),
    ),
}


# Interventions: their fields, read off the classes themselves


@functools.cache
def _fields(kind: type[Intervention]) -> dict[str, Any]:
    """An intervention's fields and their types, in the order of its constructor."""
    hints = get_type_hints(kind)
    return {
        field.name: hints[field.name]
        for field in dataclasses.fields(kind)  # type: ignore[arg-type]
        if field.init
    }


class _Writer:
    """Gives each object one name, however many hold it."""

    def __init__(self) -> None:
        self.tensors: dict[str, Tensor] = {}
        self.modules: dict[str, dict[str, Any]] = {}
        self.interventions: dict[str, dict[str, Any]] = {}
        # The objects too: an id is an object's only as long as it is there.
        self._names: dict[int, tuple[str, object]] = {}

    def _named(self, value: object, name: Callable[[], str]) -> tuple[str, bool]:
        """The object's name, and whether it was just given."""
        if id(value) in self._names:
            return self._names[id(value)][0], False
        self._names[id(value)] = name(), value
        return self._names[id(value)][0], True

    def intervention(self, value: Intervention) -> str:
        name, new = self._named(value, lambda: f"intervention_{len(self.interventions)}")
        if new:
            entry: dict[str, Any] = {"type": value.name}
            self.interventions[name] = entry
            if BY_NAME.get(value.name) is not type(value):
                raise UsageError(f"interventions of type '{value.name}' cannot be saved")
            for field in _fields(type(value)):
                what = f"{name}.{field}"
                entry[field] = self._field(value.name, what, getattr(value, field))
        return name

    def _field(self, kind: str, what: str, value: object) -> Any:
        if isinstance(value, Intervention):
            return self.intervention(value)
        if isinstance(value, nn.Module):
            return self._module(value)
        if isinstance(value, Tensor):
            return self._tensor(what, value)
        if isinstance(value, tuple):
            return [int(i) for i in value]
        if isinstance(value, float) and not math.isfinite(value):
            return str(value)  # a clamp's bound; JSON has no word for it
        if value is None or isinstance(value, bool | int | float):
            return value
        raise UsageError(
            f"an intervention of type '{kind}' cannot be saved: it holds "
            f"{type(value).__name__}, which has no place in a file"
        )

    def _module(self, module: nn.Module) -> str:
        found = [key for key, kind in _KINDS.items() if type(module) is kind.of]
        if not found:
            raise UsageError(f"a module of class {type(module).__name__} cannot be saved")
        name, new = self._named(module, lambda: f"{found[0]}_{len(self.modules)}")
        if new:
            state = {**dict(module.named_parameters()), **dict(module.named_buffers())}
            tensors = {key: self._tensor(f"{name}.{key}", value) for key, value in state.items()}
            numbers = _KINDS[found[0]].numbers(module)
            self.modules[name] = {"kind": found[0], **numbers, "tensors": tensors}
        return name

    def _tensor(self, what: str, value: Tensor) -> str:
        _expect_numbers(what, value)
        name, new = self._named(value, lambda: what)
        if new:
            self.tensors[name] = value.detach().cpu().contiguous().clone()
        return name


def _expect_numbers(what: str, value: Tensor) -> None:
    # An infinite threshold is a latent that never fires.
    fine = ~value.isnan() if what.endswith(".threshold") else value.isfinite()
    if not bool(fine.all()):
        raise UsageError(f"{what}: some of the numbers are not finite")


class _Reader:
    """Makes each object once, whoever names it."""

    def __init__(self, document: _Entry, tensors: dict[str, Tensor]) -> None:
        document.only(
            [
                *("format", "version", "written_by", "parts", "interventions", "modules"),
                *("tensors", "about"),
            ]
        )
        self._tensors = tensors
        self._parameters: dict[str, nn.Parameter] = {}
        self._entries = {
            "modules": document.entry("modules"),
            "interventions": document.entry("interventions"),
        }
        self._modules: dict[str, nn.Module] = {}
        self._interventions: dict[str, Intervention] = {}
        self._open: list[str] = []
        self._used: set[str] = set()

    def expect_all_used(self) -> None:
        """That the tensors are those that were spoken of."""
        rest = sorted(set(self._tensors) - self._used)
        if rest:
            self._entries["modules"].wrong(
                f"nothing uses the tensor '{rest[0]}'", "each tensor to have its place"
            )

    def _entry(self, group: str, name: str, asked: _Entry) -> _Entry:
        entries = self._entries[group]
        if name not in entries.value:
            asked.wrong(f"'{name}' is not among the {group}", f"one of {sorted(entries.value)}")
        return _Entry(asked.path, name, entries.value[name])

    def intervention(self, name: str, asked: _Entry) -> Intervention:
        if name in self._interventions:
            return self._interventions[name]
        entry = self._entry("interventions", name, asked)
        if name in self._open or len(self._open) > _DEEPEST:
            entry.wrong("it holds itself", "an intervention")
        kind = BY_NAME.get(entry.get("type", str))
        if kind is None:
            entry.wrong(f"the type '{entry.value['type']}' is not known", f"one of {list(BY_NAME)}")
        fields = _fields(kind)
        entry.only(["type", *fields])
        self._open.append(name)
        try:
            made = kind(**{key: self._field(entry, key, hint) for key, hint in fields.items()})
        except EngineError as error:
            entry.wrong(str(error), f"what makes a '{kind.name}'")
        self._open.pop()
        self._interventions[name] = made
        return made

    def _field(self, entry: _Entry, key: str, hint: Any) -> Any:
        if hint in (bool, int):
            return entry.get(key, hint)
        if hint is float:
            if entry.value.get(key) in ("inf", "-inf"):
                return float(entry.value[key])
            return float(entry.get(key, float))
        if hint == tuple[int, ...] | None:
            return _indices(entry, key)
        if hint is Tensor:
            return self._tensor(entry, entry.get(key, str))
        if isinstance(hint, type) and issubclass(hint, Intervention):
            return self.intervention(entry.get(key, str), entry)
        if isinstance(hint, type) and issubclass(hint, nn.Module):
            module = self._module(entry.get(key, str), entry)
            if not isinstance(module, hint):
                entry.wrong(f"'{key}' is a {type(module).__name__}", f"a {hint.__name__}")
            return module
        return entry.wrong(f"'{key}' cannot be read", "an intervention without functions")

    def _module(self, name: str, asked: _Entry) -> nn.Module:
        if name in self._modules:
            return self._modules[name]
        entry = self._entry("modules", name, asked)
        kind = _KINDS.get(entry.get("kind", str))
        if kind is None:
            entry.wrong(f"the kind '{entry.value['kind']}' is not known", f"one of {list(_KINDS)}")
        entry.only(["kind", "tensors", *kind.words])
        numbers = {word: _number(entry, word) for word in kind.words}
        if kind.of is Rotation and numbers["rank"] > numbers["width"]:
            entry.wrong(f"the rank is {numbers['rank']}", f"at most {numbers['width']}, the width")
        found = entry.entry("tensors")
        found.only(list(kind.shapes))
        shapes = {key: tuple(numbers[w] for w in words) for key, words in kind.shapes.items()}
        values = {key: self._tensor(found, found.get(key, str)) for key in shapes}
        for key, shape in shapes.items():
            if values[key].shape != shape or not values[key].is_floating_point():
                found.wrong(
                    f"'{key}' is {values[key].dtype} of the shape {tuple(values[key].shape)}",
                    f"numbers of the shape {shape}",
                )
        try:
            module = kind.make(numbers, values)
        except EngineError as error:
            entry.wrong(str(error), f"what makes a '{entry.value['kind']}'")
        for key, value in values.items():
            # Those that it was made from may have been copied, to wider numbers.
            if key in dict(module.named_parameters()):
                where = found.value[key]
                value = self._parameters.setdefault(where, nn.Parameter(value))
            setattr(module, key, value)
        self._modules[name] = module
        return module

    def _tensor(self, entry: _Entry, name: str) -> Tensor:
        if name not in self._tensors:
            entry.wrong(f"the tensor '{name}' is not in {TENSORS}", "each tensor to be there")
        self._used.add(name)
        try:
            _expect_numbers(name, self._tensors[name])
        except UsageError as error:
            entry.wrong(str(error), "finite numbers")
        return self._tensors[name]


def _number(entry: _Entry, key: str) -> int | float:
    found: int | float = entry.get(key, float if key == "alpha" else int)
    if key != "alpha" and found < 1:
        entry.wrong(f"'{key}' is {found}", "1 or more")
    return found
