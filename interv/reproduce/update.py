"""Writing what was found over what a reference says, in the files where it stands.

Only numbers are replaced, at their places, so that comments and layout stay. A range, an order
and a comparison are an author's judgement, and are never rewritten.
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from interv.errors import Mark, UsageError
from interv.plan.claims import read_cells
from interv.report.claims import Verdict
from interv.runner.folder import write_atomically
from interv.spec import load_spec
from interv.spec.claims import Claim
from interv.spec.yaml import Path_

_NUMBER = re.compile(r"[-+]?[0-9.]+(?:[eE][-+]?[0-9]+)?")


@dataclass(frozen=True)
class Change:
    """A number of a reference, and what was found.

    Attributes:
        line, column: of the number in its file, counted from 1; of a CSV's cell the line only.
    """

    claim: str
    file: Path
    line: int
    column: int | None
    before: float
    after: float

    @property
    def words(self) -> str:
        return f"{self.before:.6g} → {self.after:.6g}"


def changes(path: Path, verdicts: Sequence[Verdict]) -> list[Change]:
    """The numbers of a spec's reference that are not what was found.

    Args:
        path: the spec, as it was run.
        verdicts: of its claims, in order.

    Raises:
        UsageError: the spec's claims are no longer those of the verdicts.
    """
    loaded = load_spec(path)
    claims: Sequence[Claim] = loaded.spec.reference
    if [claim.claim for claim in claims] != [verdict.claim for verdict in verdicts]:
        raise UsageError(f"{path}: changed since it was run")
    found: list[Change] = []
    for i, (claim, verdict) in enumerate(zip(claims, verdicts, strict=True)):
        if claim.value is not None and verdict.found is not None:
            place = _place(loaded.document.values, ("reference", i, "value"))
            found.append(Change(claim.claim, *place, claim.value, verdict.found))
        if claim.cells is not None and verdict.cells is not None:
            found += _cells(loaded.document.values, i, claim, verdict)
    return [change for change in found if change.before != change.after]


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
        found.append(Change(claim.claim, *place, cell.value, number))
    return found


def write_changes(found: Sequence[Change]) -> list[Path]:
    """Write the numbers into their files; the files that were changed."""
    files = list(dict.fromkeys(change.file for change in found))
    for file in files:
        own = [change for change in found if change.file == file]
        text = file.read_text("utf-8")
        in_csv = own[0].column is None
        write_atomically(file, _in_csv(text, own) if in_csv else _in_yaml(text, own))
    return files


def _in_yaml(text: str, found: Sequence[Change]) -> str:
    lines = text.splitlines(keepends=True)
    for change in sorted(found, key=lambda c: (c.line, c.column or 0), reverse=True):
        assert change.column is not None
        line = lines[change.line - 1]
        at = change.column - 1
        number = _NUMBER.match(line, at)
        if number is None:
            raise UsageError(f"{change.file}:{change.line}:{change.column}: no number stands there")
        lines[change.line - 1] = line[:at] + f"{change.after:.6g}" + line[number.end() :]
    return "".join(lines)


def _in_csv(text: str, found: Sequence[Change]) -> str:
    by_line = {change.line: change.after for change in found}
    reader = csv.reader(io.StringIO(text, newline=""))
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    header = next(reader)
    writer.writerow(header)
    at, line = header.index("value"), reader.line_num
    for row in reader:
        if line + 1 in by_line:
            row[at] = f"{by_line[line + 1]:.9g}"
        writer.writerow(row)
        line = reader.line_num
    return out.getvalue()
