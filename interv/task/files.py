"""Records from JSON, JSONL and CSV files, each with its place in the file."""

from __future__ import annotations

import csv
import io
import json
import re
from pathlib import Path
from typing import Any

from interv.errors import Mark, Problem, SpecError, nearest
from interv.spec import LoadedSpec, Spec

Record = tuple[dict[str, Any], Mark]
_LINE_END = re.compile(r"\r\n|\r|\n")


def read_records(path: Path) -> list[Record]:
    """Every record of a file; the suffix decides how it is read.

    Raises:
        SpecError: the file is not there, is not what its suffix says, or has no records.
    """
    start = Mark(str(path), 1, 1)
    readers = {".json": _json, ".jsonl": _jsonl, ".csv": _csv}
    reader = readers.get(path.suffix.lower())
    if reader is None:
        raise SpecError(
            [Problem(f"unknown kind of data file '{path.suffix}'", start, ".json, .jsonl or .csv")]
        )
    try:
        text = path.read_text("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise SpecError([Problem(f"cannot be read: {reason}", start)]) from None
    try:
        records = reader(text, str(path))
    except (ValueError, RecursionError, csv.Error) as error:
        raise SpecError([Problem(f"cannot be read: {error}", start)]) from None
    if not records:
        raise SpecError([Problem("has no records", start, "at least one fact")])
    return records


def missing_file(loaded: LoadedSpec[Spec], name: str) -> Problem | None:
    """The problem of a data file that is not there, with the name of one like it."""
    path = Path(name)
    if path.is_file():
        return None
    siblings = sorted(p.name for p in path.parent.iterdir()) if path.parent.is_dir() else []
    near = nearest(path.name, siblings)
    return loaded.problem(("data", "file"), f"{path} is not a file", None, near)


def _record(value: Any, mark: Mark) -> Record:
    if not isinstance(value, dict):
        raise SpecError([Problem(f"a {type(value).__name__} is not a record", mark, "an object")])
    return value, mark


def _json(text: str, source: str) -> list[Record]:
    # Entry by entry, so that each keeps its line.
    decoder = json.JSONDecoder()
    records: list[Record] = []

    def place(index: int) -> Mark:
        before = text.count("\n", 0, index)
        return Mark(source, before + 1, index - text.rfind("\n", 0, index))

    def skip(index: int) -> int:
        while index < len(text) and text[index].isspace():
            index += 1
        return index

    at = skip(0)
    if text[at : at + 1] != "[":
        raise SpecError([Problem("is not a list", place(at), "a JSON list of objects")])
    at = skip(at + 1)
    while text[at : at + 1] != "]":
        try:
            value, end = decoder.raw_decode(text, at)
        except json.JSONDecodeError as error:
            raise SpecError([Problem(f"is not JSON: {error.msg}", place(error.pos))]) from None
        records.append(_record(value, place(at)))
        at = skip(end)
        if text[at : at + 1] == ",":
            at = skip(at + 1)
        elif text[at : at + 1] != "]":
            raise SpecError([Problem("is not JSON", place(at), "',' or ']'")])
    return records


def _jsonl(text: str, source: str) -> list[Record]:
    records: list[Record] = []
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            try:
                value = json.loads(line)
            except json.JSONDecodeError as error:
                mark = Mark(source, number, error.colno, line)
                raise SpecError([Problem(f"is not JSON: {error.msg}", mark)]) from None
            records.append(_record(value, Mark(source, number, 1)))
    return records


def _csv(text: str, source: str) -> list[Record]:
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    names = list(reader.fieldnames or ())
    if repeated := [name for name in names if names.count(name) > 1]:
        raise SpecError([Problem(f"column '{repeated[0]}' is there twice", Mark(source, 1, 1))])
    records: list[Record] = []
    for row in reader:
        # Lines that are empty are passed over; a cell may have several.
        cells = (cell for cell in row.values() if isinstance(cell, str))
        lines = sum(len(_LINE_END.findall(cell)) for cell in cells)
        mark = Mark(source, reader.line_num - lines, 1)
        if None in row or None in row.values():
            raise SpecError([Problem("the number of cells is not that of the header", mark)])
        records.append((dict(row), mark))
    return records
