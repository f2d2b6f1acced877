"""Writing what was found over what a reference says, in the files where it stands.

Only numbers are replaced, at their places, so that comments and layout stay. A range, an order
and a comparison are an author's judgement, and are never rewritten.
"""

from __future__ import annotations

import codecs
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from interv.errors import Mark, UsageError
from interv.plan.claims import read_cells
from interv.report.claims import Verdict
from interv.spec import load_spec
from interv.spec.claims import Claim
from interv.spec.yaml import Path_
from interv.storage import write_atomically

_WORD = re.compile(r"[^\s,\]}#]+")
_LINE_END = re.compile(r"\r\n|\r|\n")
_CSV_CELL = re.compile(r'("(?:[^"]|"")*"|[^",\r\n]*)(,|\r\n|\r|\n|$)')


@dataclass(frozen=True)
class Change:
    """A number of a reference, and what was found.

    Attributes:
        line, column: of the number in its file, counted from 1; of a CSV's cell the line only.
        after: with as many digits as its tolerance asks for.
    """

    claim: str
    file: Path
    line: int
    column: int | None
    before: float
    after: float

    @property
    def words(self) -> str:
        return f"{_digits(self.before)} → {_digits(self.after)}"


def changes(
    path: Path, verdicts: Sequence[Verdict], plugin: Sequence[Path] | None = None
) -> list[Change]:
    """The numbers of a spec's reference that are not what was found.

    Args:
        path: the spec, as it was run.
        verdicts: of its claims, in order.
        plugin: as `reproduce` has it.

    Raises:
        UsageError: the spec's claims are no longer those of the verdicts.
    """
    loaded = load_spec(path, plugin=plugin)
    claims: Sequence[Claim] = loaded.spec.reference
    if [claim.claim for claim in claims] != [verdict.claim for verdict in verdicts]:
        raise UsageError(f"{path}: changed since it was run")
    found: list[Change] = []
    for i, (claim, verdict) in enumerate(zip(claims, verdicts, strict=True)):
        if claim.value is not None and verdict.found is not None:
            if verdict.found != verdict.found:
                raise UsageError(f"claim '{claim.claim}': has no value in this run")
            place = _place(loaded.document.values, ("reference", i, "value"))
            after = _rounded(verdict.found, claim.tolerance or 0.0)
            found.append(Change(claim.claim, *place, claim.value, after))
        if claim.cells is not None and verdict.cells is not None:
            found += _cells(loaded.document.values, i, claim, verdict)
    return list(dict.fromkeys(change for change in found if change.before != change.after))


def _rounded(number: float, tolerance: float) -> float:
    """To six digits, or to more where these would use up some of the tolerance."""
    for digits in (6, 9, 12):
        short = float(f"{number:.{digits}g}")
        if abs(short - number) <= tolerance / 100:
            return short
    return number


def _digits(number: float) -> str:
    """A number as short as it can be written without becoming another."""
    short = f"{number:.12g}"
    return short if float(short) == number else repr(number)


def _place(values: Mapping[Path_, Mark], at: Path_) -> tuple[Path, int, int]:
    mark = values[at]
    return Path(mark.source), mark.line, mark.column


def _cells(values: Mapping[Path_, Mark], i: int, claim: Claim, verdict: Verdict) -> list[Change]:
    assert verdict.cells is not None
    cells = read_cells(claim)
    after = verdict.cells["found"].tolist()
    if len(after) != len(cells):
        raise UsageError(f"claim '{claim.claim}': some of its cells are not in this run's grid")
    found = []
    for j, (cell, number) in enumerate(zip(cells, after, strict=True)):
        if number != number:
            raise UsageError(f"claim '{claim.claim}': cell {j + 1} has no value in this run")
        if cell.mark is not None:
            place: tuple[Path, int, int | None] = (Path(cell.mark.source), cell.mark.line, None)
        else:
            place = _place(values, ("reference", i, "cells", j, "value"))
        found.append(Change(claim.claim, *place, cell.value, _rounded(number, cell.tolerance)))
    return found


def write_changes(found: Sequence[Change]) -> list[Path]:
    """Write the numbers into their files, all or none; the files that were changed.

    Raises:
        UsageError: a number cannot be replaced where it stands, or a file is read-only.
    """
    texts: dict[Path, bytes] = {}
    for file in dict.fromkeys(change.file for change in found):
        own = {(c.line, c.column): c for c in found if c.file == file}
        for change in found:
            if change.file == file and own[change.line, change.column].after != change.after:
                raise UsageError(
                    f"{file}:{change.line}: this number stands for several claims, and other "
                    "values were found for them; write it for each"
                )
        if not os.access(file, os.W_OK):
            raise UsageError(f"{file}: is read-only; nothing was written")
        raw = file.read_bytes()
        mark = codecs.BOM_UTF8 if raw.startswith(codecs.BOM_UTF8) else b""
        text = raw.removeprefix(mark).decode()
        in_csv = next(iter(own.values())).column is None
        texts[file] = mark + (_in_csv if in_csv else _in_yaml)(text, list(own.values())).encode()
    for file, content in texts.items():
        # What a link points to, not the link.
        write_atomically(file.resolve(), content)
    return list(texts)


def _in_yaml(text: str, found: Sequence[Change]) -> str:
    lines = text.splitlines(keepends=True)
    for change in sorted(found, key=lambda c: (c.line, c.column or 0), reverse=True):
        assert change.column is not None
        line = lines[change.line - 1]
        at = change.column - 1
        word = _WORD.match(line, at)
        if word is None or not _is(word[0], change.before):
            written = word[0] if word else ""
            raise UsageError(
                f"{change.file}:{change.line}:{change.column}: '{written}' is not a plain number "
                "(an anchor?); write it as one, and nothing else there"
            )
        lines[change.line - 1] = line[:at] + _digits(change.after) + line[word.end() :]
    return "".join(lines)


def _is(text: str, number: float) -> bool:
    try:
        return float(text) == number
    except ValueError:
        return False


def _in_csv(text: str, found: Sequence[Change]) -> str:
    by_line = {change.line: change for change in found}
    out: list[str] = []
    at, line, value = 0, 1, -1
    while at < len(text):
        first, row, end = line, [], ","
        while end == ",":
            cell = _CSV_CELL.match(text, at)
            if cell is None:
                raise UsageError(f"{found[0].file}:{line}: a quote stands within a cell")
            end = cell[2]
            row.append([cell[1], end])
            at = cell.end()
            line += len(_LINE_END.findall(cell[0]))
        if value < 0:
            value = [name.strip('"') for name, _ in row].index("value")
        elif first in by_line:
            quote = '"' if row[value][0].startswith('"') else ""
            row[value][0] = quote + _digits(by_line[first].after) + quote
        out += ["".join(written) for written in row]
    return "".join(out)
