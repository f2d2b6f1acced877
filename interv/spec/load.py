"""From a file and `key=value` arguments to a validated spec that knows where it was written."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Generic, TypeVar, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError

from interv.errors import Mark, Problem, SpecError, nearest
from interv.plugins import Plugin, load_plugins
from interv.spec import kinds, schema
from interv.spec.conditions import read_only, unread
from interv.spec.overrides import COMMAND_LINE, lay_over
from interv.spec.yaml import Document, Path_, parse, read_file

_PATH_KEYS: tuple[Path_, ...] = (
    ("model", "path"),
    ("model", "tokenizer"),
    ("data", "file"),
    ("intervention", "trained"),
    ("intervention", "dictionary", "path"),
)


S_co = TypeVar("S_co", bound=kinds.Spec, covariant=True)


@dataclass(frozen=True)
class LoadedSpec(Generic[S_co]):
    """A valid spec, the file it came from, and the place of everything in it."""

    spec: S_co
    path: Path
    document: Document
    plugin: Plugin | None = None

    def problem(
        self, at: Path_, message: str, expected: str | None = None, near: str | None = None
    ) -> Problem:
        """A problem at a path of the spec (as validated; the place is as written)."""
        return Problem(message, self.document.mark(_written(self.document, at)), expected, near)

    def resolved(self) -> dict[str, Any]:
        """The spec with every default that is read filled in, plain data in the sections' order."""
        kept: dict[str, Any] = read_only(self.spec, self.spec, self.spec.model_dump(mode="json"))
        return kept

    def resolved_yaml(self) -> str:
        """`resolved` as YAML that `load_spec` reads back to the same spec."""
        return yaml.dump(self.resolved(), Dumper=_Dumper, sort_keys=False, allow_unicode=True)


class _Dumper(yaml.SafeDumper):
    """Quotes what YAML 1.2 would read as something else than a string."""


def _represent_str(dumper: yaml.SafeDumper, text: str) -> yaml.Node:
    node = dumper.represent_scalar("tag:yaml.org,2002:str", text)
    try:
        plain = parse(text, "") if text.strip() == text and "\n" not in text else None
        same = plain is not None and plain.data == text
    except SpecError:
        same = False
    return node if same else dumper.represent_scalar(node.tag, text, style='"')


_Dumper.add_representer(str, _represent_str)


def load_spec(
    given: Path | Mapping[str, Any],
    overrides: Sequence[str] = (),
    kind: str | None = None,
    plugin: Path | Sequence[Path] | None = None,
) -> LoadedSpec[Any]:
    """Read, extend, override and validate one spec.

    Args:
        given: the YAML file, or what would stand in one.
        overrides: `key.key=value` arguments; the value is read as YAML. A key into a list
            of mappings, such as `grid.layers`, sets it in each of them.
        kind: the kind of spec that the command runs; any when None.
        plugin: a file, or files, of the user's own metrics and functions, named on the command
            line.

    Raises:
        UsageError: a file that cannot be read, or an override that is not `key=value`.
        SpecError: everything that is wrong in the spec, at once.
    """
    if isinstance(given, Mapping):
        path = Path("spec.yaml")
        document = parse(yaml.dump(dict(given), Dumper=_Dumper, sort_keys=False), str(path))
    else:
        path = given
        document = _extended(path, ())
    if not isinstance(document.data, dict):
        what = "is empty" if document.data is None else "is not a mapping"
        mark = document.mark(()) or Mark(str(path), 1, 1)
        raise SpecError([Problem(what, mark, "a spec: kind, name, model, data, ...")])
    for override in overrides:
        lay_over(document, override)
    data: dict[str, Any] = document.data
    data.setdefault("name", path.stem)
    cls = _kind(document, path, kind)
    _resolve_paths(document)
    try:
        spec = cls.model_validate(data)
    except ValidationError as error:
        problems = [_problem(e, document, cls) for e in error.errors()]
        raise SpecError(_distinct(problems)) from None
    loaded = LoadedSpec(spec, path, document)
    if problems := [_unread(loaded, at, words) for at, words in unread(spec)]:
        raise SpecError(_distinct(problems))
    if not plugin:
        return loaded
    files = [plugin] if isinstance(plugin, Path) else plugin
    return replace(loaded, plugin=load_plugins(files))


def _unread(loaded: LoadedSpec[Any], at: Path_, words: str) -> Problem:
    written = _written(loaded.document, at)
    dotted = ".".join(map(str, written))
    mark = loaded.document.mark(written, key=True)
    return Problem(f"{dotted}: nothing that is asked for reads it", mark, f"it only with {words}")


def _kind(document: Document, path: Path, wanted: str | None) -> type[kinds.Spec]:
    assert isinstance(document.data, dict)
    kind = document.data.get("kind")
    known = " | ".join(kinds.KINDS)
    if kind is None:
        mark = Mark(str(path), 1, 1)
        raise SpecError([Problem("'kind' is missing", mark, f"kind: {known}")])
    if not isinstance(kind, str) or kind not in kinds.KINDS:
        problem = Problem(
            f"unknown kind {kind!r}",
            document.mark(("kind",)),
            known,
            nearest(kind, list(kinds.KINDS)),
        )
        raise SpecError([problem])
    if wanted is not None and kind != wanted:
        problem = Problem(
            f"this is a spec of kind '{kind}'",
            document.mark(("kind",)),
            f"kind: {wanted}; for this file type `interv {kind} {path}`",
        )
        raise SpecError([problem])
    return kinds.KINDS[kind]


def _extended(path: Path, chain: tuple[Path, ...]) -> Document:
    """The file's document, laid over the one that its `extends` names."""
    document = read_file(path)
    if not isinstance(document.data, dict) or "extends" not in document.data:
        return document
    parent = document.data.pop("extends")
    mark = document.mark(("extends",))
    if not isinstance(parent, str):
        raise SpecError([Problem("'extends' is not a file name", mark, "extends: other.yaml")])
    here = path.resolve()
    parent_path = Path(os.path.relpath((path.parent / parent).resolve()))
    if parent_path.resolve() in (*chain, here):
        loop = " -> ".join(p.name for p in (*chain, here, parent_path))
        raise SpecError([Problem(f"'extends' runs in a circle: {loop}", mark)])
    if not parent_path.is_file():
        raise SpecError([Problem(f"'extends' names {parent_path}, which is not a file", mark)])
    base = _extended(parent_path, (*chain, here))
    if not isinstance(base.data, dict):
        raise SpecError([Problem(f"{parent_path} is not a mapping", mark)])
    return _merged(base, document)


def _merged(base: Document, over: Document) -> Document:
    """Mappings of one type are merged key by key; anything else is replaced."""
    values, keys = dict(base.values), dict(base.keys)

    def forget(path: Path_) -> None:
        for marks in (values, keys):
            for known in [p for p in marks if p[: len(path)] == path]:
                del marks[known]

    def adopt(path: Path_) -> None:
        values.update({p: m for p, m in over.values.items() if p[: len(path)] == path})
        keys.update({p: m for p, m in over.keys.items() if p[: len(path)] == path})

    def merge(low: Mapping[str, Any], high: Mapping[str, Any], path: Path_) -> dict[str, Any]:
        out = dict(low)
        for key, value in high.items():
            below = (*path, key)
            old = out.get(key)
            if isinstance(value, dict) and isinstance(old, dict) and _same_type(old, value):
                out[key] = merge(old, value, below)
            else:
                forget(below)
                adopt(below)
                out[key] = value
        return out

    assert isinstance(base.data, dict)
    assert isinstance(over.data, dict)
    data = merge(base.data, over.data, ())
    values[()] = over.values[()]
    return Document(data, over.text, values, keys)


def _same_type(low: Mapping[str, Any], high: Mapping[str, Any]) -> bool:
    """Whether two mappings may be merged: one of another `type` has other keys."""
    return "type" not in high or low.get("type") == high["type"]


def _resolve_paths(document: Document) -> None:
    """Make file names absolute: each is relative to the file in which it was written."""
    data = document.data
    assert isinstance(data, dict)
    model = data.get("model")
    if isinstance(model, str):
        data["model"] = schema.bare_model(model)
        for key in data["model"]:
            document.values["model", key] = document.values[("model",)]
    _refuse_folder_name(document)
    for at in _path_keys(data):
        *outer, key = at
        holder: Any = data
        for part in outer:
            holder = _inside(holder, part)
        if isinstance(holder, dict) and isinstance(holder.get(key), str):
            mark = document.mark(at)
            here = _folder_of(mark)
            try:
                path = (here / Path(holder[key]).expanduser()).resolve()
                path.exists()
            except (OSError, ValueError, RuntimeError) as error:
                dotted = ".".join(map(str, at))
                message = f"{dotted}: {holder[key][:60]!r} is no path: {error}"
                raise SpecError([Problem(message, mark)]) from None
            holder[key] = str(path)


def _folder_of(mark: Mark | None) -> Path:
    """The folder of the file in which something was written; the current one for an argument."""
    return Path(mark.source).parent if mark and mark.source != COMMAND_LINE else Path()


def _refuse_folder_name(document: Document) -> None:
    """A model's name that is a folder beside the file in which it is written."""
    name = _inside(_inside(document.data, "model"), "name")
    mark = document.mark(("model", "name"))
    if isinstance(name, str) and (hint := schema.named_as_folder(name, _folder_of(mark))):
        raise SpecError([Problem(f"model: {hint}", mark)])


def _inside(holder: Any, part: str | int) -> Any:
    """What a mapping or a list holds there; None where it is another thing."""
    if isinstance(part, str):
        return holder.get(part) if isinstance(holder, dict) else None
    return holder[part] if isinstance(holder, list) else None


def _path_keys(data: Mapping[str, Any]) -> list[Path_]:
    """Where in a spec file names may stand."""
    claims = data.get("reference")
    n_claims = len(claims) if isinstance(claims, list) else 0
    return [*_PATH_KEYS, *(("reference", i, "cells") for i in range(n_claims))]


def _written(document: Document, location: Sequence[str | int]) -> Path_:
    """The path in the data as written: pydantic's has union tags and one-entry lists too."""
    path: Path_ = ()
    value: Any = document.data
    for part in location:
        inside = isinstance(value, dict) and part in value
        if inside or (isinstance(value, list) and isinstance(part, int) and part < len(value)):
            value = value[part]
            path = (*path, part)
    return path


def _problem(error: Any, document: Document, cls: type[BaseModel]) -> Problem:
    location: tuple[str | int, ...] = error["loc"]
    kind, context, given = error["type"], error.get("ctx", {}), error["input"]
    path = _written(document, location)
    mark = document.mark(path)
    dotted = ".".join(str(p) for p in path) or "the spec"
    if kind == "extra_forbidden":
        key = str(location[-1])
        known = _fields(cls, location[:-1])
        expected = f"one of: {', '.join(known)}"
        where = document.mark(path, key=True)
        return Problem(f"unknown key '{key}'", where, expected, nearest(key, known))
    if kind == "missing":
        mark = document.mark(path, key=True) if path else Mark(mark.source if mark else "", 1, 1)
        return Problem(f"'{location[-1]}' is missing in {dotted}", mark)
    if kind == "interv":
        return Problem(f"{dotted}: {context['message']}", mark, context["expected"])
    if kind in ("literal_error", "union_tag_invalid"):
        expected = context.get("expected") or context.get("expected_tags", "")
        choices = expected.replace("'", "").replace(" or ", ", ").split(", ")
        given = context.get("tag", given)
        return Problem(
            f"{dotted}: {given!r} is not known here",
            mark,
            f"one of: {', '.join(choices)}",
            nearest(given, choices),
        )
    if kind == "union_tag_not_found":
        return Problem(f"'type' is missing in {dotted}", mark, "type: noise | prompt")
    message = error["msg"]
    for prefix in ("Input should be ", "String should "):
        if message.startswith(prefix):
            shown = (
                given
                if isinstance(given, str | int | float | bool | None)
                else type(given).__name__
            )
            return Problem(f"{dotted}: got {shown!r}", mark, message.removeprefix(prefix))
    return Problem(f"{dotted}: {message}", mark)


def _fields(cls: type[BaseModel], location: Sequence[str | int]) -> list[str]:
    """Names of the fields that a section at `location` may have."""
    here: list[Any] = [cls]
    for part in location:
        below: list[Any] = []
        for model in _models(here):
            tag = model.model_fields.get("type")
            if tag is not None and part in get_args(tag.annotation):
                below.append(model)
            elif part in model.model_fields:
                below.append(model.model_fields[str(part)].annotation)
        here = below or here
    return list(dict.fromkeys(name for model in _models(here) for name in model.model_fields))


def _models(annotations: Sequence[Any]) -> list[type[BaseModel]]:
    found: list[type[BaseModel]] = []
    for annotation in annotations:
        if get_origin(annotation) is not None:
            found += _models(get_args(annotation))
        elif isinstance(annotation, type) and issubclass(annotation, BaseModel):
            found.append(annotation)
    return found


def _distinct(problems: Sequence[Problem]) -> list[Problem]:
    """One problem a place: the branches of a union all complain about the same value."""
    by_place: dict[tuple[Mark | None, str], Problem] = {}
    for problem in problems:
        # An override of a list's every entry is wrong in one place, not in each entry.
        where = (problem.mark, re.sub(r"\.\d+\b", "", problem.message))
        first = by_place.get(where)
        if first and first.expected and problem.expected and first.expected != problem.expected:
            merged = f"{first.expected}, or {problem.expected}"
            problem = Problem(first.message, first.mark, merged, first.near or problem.near)
        elif first:
            problem = first
        by_place[where] = problem
    return sorted(by_place.values(), key=lambda p: p.mark.line if p.mark else 0)
