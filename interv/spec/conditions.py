"""Options that are read only beside others: declared at each field, checked by one walk.

A field says with `Field(..., json_schema_extra=goes_with(...))` what reads it. An option that is
written where nothing reads it is an error, so that nobody takes it for one that had an effect.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from fnmatch import fnmatchcase
from typing import Any

from pydantic import BaseModel
from pydantic.config import JsonDict
from pydantic.fields import FieldInfo

KEY = "goes_with"
Way = Mapping[str, list[str] | bool]
Path = tuple[str | int, ...]


def goes_with(*ways: Way) -> JsonDict:
    """Declare what a field goes with: any one of `ways`, each with all of its conditions.

    Args:
        ways: from the name of another field of the section, or a dotted path from the top of the
            spec, to the values that it must have (patterns as a shell's; of a list one entry), or
            to whether it is given at all.
    """
    return {KEY: [dict(way) for way in ways]}  # type: ignore[arg-type]


def unread(spec: BaseModel) -> Iterator[tuple[Path, str]]:
    """Yield the path of each option that is written and that nothing reads, and what does."""
    yield from _unread_below(spec, spec, ())


def _unread_below(root: BaseModel, value: Any, path: Path) -> Iterator[tuple[Path, str]]:
    if isinstance(value, BaseModel):
        for name, field in type(value).model_fields.items():
            if name not in value.model_fields_set:
                continue
            if is_read(root, value, field):
                yield from _unread_below(root, getattr(value, name), (*path, name))
            else:
                yield (*path, name), in_words(field)
    elif isinstance(value, list | dict):
        entries = value.items() if isinstance(value, dict) else enumerate(value)
        for key, entry in entries:
            yield from _unread_below(root, entry, (*path, key))


def read_only(root: BaseModel, value: Any, dumped: Any) -> Any:
    """What `model_dump` gives of a part of a spec, without the options that nothing reads."""
    if isinstance(value, BaseModel) and isinstance(dumped, dict):
        return {
            name: read_only(root, getattr(value, name), dumped[name])
            for name, field in type(value).model_fields.items()
            if is_read(root, value, field)
        }
    if isinstance(value, list) and isinstance(dumped, list):
        return [read_only(root, one, other) for one, other in zip(value, dumped, strict=True)]
    if isinstance(value, dict) and isinstance(dumped, dict):
        return {key: read_only(root, value[key], dumped[key]) for key in value}
    return dumped


def ways_of(field: FieldInfo) -> list[Way]:
    """What a field says that it goes with; empty: it is read always."""
    extra = field.json_schema_extra
    return list(extra[KEY]) if isinstance(extra, dict) and KEY in extra else []  # type: ignore[arg-type]


def is_read(root: BaseModel, section: BaseModel, field: FieldInfo) -> bool:
    """Whether anything that the spec asks for reads a field of a section."""
    ways = ways_of(field)
    return not ways or any(
        all(_holds(root, section, key, wanted) for key, wanted in way.items()) for way in ways
    )


def in_words(field: FieldInfo) -> str:
    """What a field goes with, for messages and editors."""
    return "; or ".join(
        ", ".join(_condition(key, wanted) for key, wanted in way.items()) for way in ways_of(field)
    )


def _condition(key: str, wanted: list[str] | bool) -> str:
    if isinstance(wanted, bool):
        return key if wanted else f"no {key}"
    return f"{key}: {' or '.join(wanted)}"


def _holds(root: BaseModel, section: BaseModel, key: str, wanted: list[str] | bool) -> bool:
    head, *rest = key.split(".")
    value: Any = getattr(section if head in type(section).model_fields else root, head, None)
    for part in rest:
        value = getattr(value, part, None)
    if isinstance(wanted, bool):
        absent = value is None or value is False or value in ("", [], {})
        return absent != wanted
    values = value if isinstance(value, list) else [value]
    return any(
        isinstance(one, str) and fnmatchcase(one, pattern) for one in values for pattern in wanted
    )
