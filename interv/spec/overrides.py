"""`key=value` arguments of the command line, laid over a spec."""

from __future__ import annotations

from typing import Any

from interv.errors import Mark, SpecError, UsageError
from interv.spec import schema
from interv.spec.yaml import Document, Path_, parse

COMMAND_LINE = "command line"


def lay_over(document: Document, argument: str) -> None:
    """Set what one argument names; a key into a list of mappings sets it in each of them.

    Raises:
        UsageError: it is not `key=value`, its value is not YAML, or there is no such place.
    """
    key, equals, text = argument.partition("=")
    if not equals or not key.strip():
        raise UsageError(f"argument {argument!r}: expected key=value, such as model.dtype=float64")
    try:
        value = parse(text, COMMAND_LINE)
    except SpecError as error:
        reasons = "; ".join(p.message for p in error.problems)
        raise UsageError(f"argument {argument!r}: the value is not YAML: {reasons}") from None
    mark = Mark(COMMAND_LINE, 1, len(key) + 2, argument)
    key_mark = Mark(COMMAND_LINE, 1, 1, argument)
    parts: list[str | int] = [int(p) if p.isdecimal() else p for p in key.strip().split(".")]

    def put(container: Any, done: Path_, rest: list[str | int]) -> None:
        head: Any = rest[0]
        tail = rest[1:]
        if isinstance(container, list) and not isinstance(head, int):
            for i, entry in enumerate(container):
                put(entry, (*done, i), rest)
            return
        if isinstance(container, list) and not 0 <= head < len(container):
            raise UsageError(f"argument {argument!r}: the list has {len(container)} entries")
        if not isinstance(container, dict | list):
            place = ".".join(str(p) for p in done)
            raise UsageError(f"argument {argument!r}: '{place}' is a plain value, not a mapping")
        if isinstance(container, dict):
            head = str(head)
        here = (*done, head)
        if tail:
            child = container.get(head) if isinstance(container, dict) else container[head]
            if here == ("model",) and isinstance(child, str):
                child = schema.bare_model(child)
                container[head] = child
            elif here == ("intervention",) and isinstance(child, str):
                child = {"type": child}
                container[head] = child
            elif child is None:
                child = {}
                container[head] = child
                document.values[here] = document.keys[here] = key_mark
            put(child, here, tail)
            return
        container[head] = value.data
        for marks in (document.values, document.keys):
            for known in [p for p in marks if p[: len(here)] == here]:
                del marks[known]
        document.values[here], document.keys[here] = mark, key_mark

    put(document.data, (), parts)
