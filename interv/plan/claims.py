"""A spec's `reference` against its own grid: a claim about no place is a mistake, not a miss."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from typing import Any

from interv.errors import Mark, Problem, SpecError, nearest
from interv.plan.cells import Plan
from interv.spec import LoadedSpec
from interv.spec.claims import Claim, is_number
from interv.spec.overrides import COMMAND_LINE
from interv.task.files import read_records

Wanted = Mapping[str, str | int | None]
"""Columns of a table and what they must be."""
_NOT_PLACES = ("value", "tolerance")


@dataclass(frozen=True)
class ReferenceCell:
    """A published value of one place, and how close ours must come.

    Attributes:
        mark: where it is written, if that is a file of its own.
    """

    where: Wanted
    value: float
    tolerance: float
    mark: Mark | None = None


@dataclass(frozen=True)
class ClaimedPlace:
    """A place that a claim is about.

    Attributes:
        at: where in the claim it is named.
        single: whether it is one row of the table, and not several that are reduced.
        cell: what should stand there, of a claim of cells.
    """

    at: tuple[str | int, ...]
    wanted: Wanted
    single: bool
    cell: ReferenceCell | None = None

    @property
    def mark(self) -> Mark | None:
        """Where it is written, if that is a file of its own."""
        return self.cell.mark if self.cell else None


class Rows:
    """A table's rows as mappings, found by what columns must be; what is not there is ""."""

    def __init__(self, rows: Sequence[Mapping[str, object]]) -> None:
        self.rows = rows
        self._by: dict[tuple[str, ...], dict[tuple[object, ...], list[int]]] = {}

    def find(self, wanted: Wanted) -> list[int]:
        """Numbers of the rows that match.

        Raises:
            KeyError: a column that the table does not have.
        """
        columns = tuple(wanted)
        if columns not in self._by:
            index: dict[tuple[object, ...], list[int]] = {}
            for i, row in enumerate(self.rows):
                index.setdefault(tuple(row[c] for c in columns), []).append(i)
            self._by[columns] = index
        index = self._by[columns]
        if any(isinstance(value, str) and value[:1].isdecimal() for value in wanted.values()):
            # Maybe a range of numbers: no look-up finds it.
            hits = [
                some for values, some in index.items()
                if all(matches(v, w) for v, w in zip(values, wanted.values(), strict=True))
            ]  # fmt: skip
            return sorted(i for some in hits for i in some)
        return index.get(tuple("" if w is None else w for w in wanted.values()), [])


def matches(value: object, wanted: str | int | None) -> bool:
    """Whether a column's value is the wanted one; for a number also an inclusive `8-11`."""
    if isinstance(wanted, str) and isinstance(value, int):
        low, _, high = wanted.partition("-")
        return low.isdecimal() and int(low) <= value <= int(high or low)
    return bool(value == ("" if wanted is None else wanted))


def conditions(claim: Claim, metrics: Sequence[str], columns: Collection[str]) -> Wanted:
    """What the columns of a claim's rows must be.

    The metric, unless named, is the spec's first; nothing is severed, and no path ends
    anywhere, whatever is exchanged counts, unless it is said.
    """
    unsaid = {"metric": metrics[0], "severed": None, "receiver": None, "exchanged": "any"}
    return {**{k: v for k, v in unsaid.items() if k in columns}, **claim.where}


def read_cells(claim: Claim) -> list[ReferenceCell]:
    """The places and values of a claim of the form `cells`.

    Raises:
        SpecError: its file cannot be read, or a row of it has no value.
    """
    assert claim.cells is not None
    if isinstance(claim.cells, list):
        rows: list[tuple[dict[str, Any], Mark | None]] = [(row, None) for row in claim.cells]
    else:
        rows = [
            ({name: _plain(name, text) for name, text in record.items()}, mark)
            for record, mark in read_records(Path(claim.cells))
        ]
    found, problems = [], []
    for row, mark in rows:
        value, tolerance = row.get("value"), row.get("tolerance")
        tolerance = claim.tolerance if tolerance is None else tolerance
        if not (is_number(value) and is_number(tolerance, 0)):
            what = "no `value` that is a number, or no tolerance here or in the claim"
            columns = ", ".join(repr(name) for name in row)
            expected = f"columns of the table, value, tolerance; this has {columns}"
            problems.append(Problem(what, mark, expected))
            continue
        assert value is not None and tolerance is not None
        place = {name: wanted for name, wanted in row.items() if name not in _NOT_PLACES}
        found.append(ReferenceCell(place, float(value), float(tolerance), mark))
    if problems:
        raise SpecError(problems)
    return found


def _plain(name: str, text: Any) -> Any:
    """A CSV's text as what a spec would say: a number, a word, nothing."""
    if not isinstance(text, str):
        return text
    if name in _NOT_PLACES:
        try:
            number = float(text) if text else None
            return number if number is None or isfinite(number) else text
        except ValueError:
            return text
    if text.isascii() and text.removeprefix("-").isdecimal():
        return int(text)
    return text or None


def grid_replaced(loaded: LoadedSpec[Any]) -> bool:
    """Whether the command line changed the grid, so that claims may lie outside it."""
    return any(
        path[:1] in (("grid",), ("paths",)) and mark.source == COMMAND_LINE
        for path, mark in loaded.document.values.items()
    )


def places_of(claim: Claim, wanted: Wanted) -> list[ClaimedPlace]:
    """Every place that a claim is about.

    Args:
        claim: any.
        wanted: what `conditions` makes of its `where`.

    Raises:
        SpecError: its file of cells cannot be read.
    """
    single = claim.reduce == "only"
    if claim.cells is not None:
        in_spec = isinstance(claim.cells, list)
        return [
            ClaimedPlace(
                ("cells", i) if in_spec else ("cells",), {**wanted, **cell.where}, True, cell
            )
            for i, cell in enumerate(read_cells(claim))
        ]
    if claim.order is not None:
        return [
            ClaimedPlace(("order", i), {**wanted, **place}, True)
            for i, place in enumerate(claim.order)
        ]
    found = [ClaimedPlace(("where",), wanted, single)]
    if claim.exceeds is not None:
        found.append(ClaimedPlace(("exceeds",), {**wanted, **claim.exceeds}, single))
    return found


def check_claims(plan: Plan) -> Iterator[Problem]:
    """Problems of claims whose places have an unknown column, are none, or too many.

    Where the grid was replaced on the command line, a claim may lie outside it.
    """
    lines = {tuple(line.items()): line for line in plan.labels_of(plan.spec.metric)}
    rows = Rows(list(lines.values()))
    for i, claim in enumerate(plan.spec.reference):
        if isinstance(claim.cells, str) and not Path(claim.cells).is_file():
            message = f"claim '{claim.claim}': {claim.cells} is not a file"
            yield plan.loaded.problem(("reference", i, "cells"), message, "a CSV file")
            continue
        columns = list(rows.rows[0]) if rows.rows else []
        try:
            places = places_of(claim, conditions(claim, plan.spec.metric, columns))
        except SpecError as error:
            yield from error.problems
            continue
        if why := _no_table(plan, claim):
            at = ("reference", i, "table")
            yield plan.loaded.problem(at, f"claim '{claim.claim}': {why[0]}", why[1])
        elif twice := _twice(places, rows if claim.table == "summary" else None):
            message = f"claim '{claim.claim}': a place is there twice"
            here = plan.loaded.problem(("reference", i, *twice.at), message, "each place once")
            yield Problem(message, twice.mark, here.expected) if twice.mark else here
        elif claim.table == "summary" and columns:
            yield from _misplaced(plan.loaded, i, claim, places, rows)


def _tables(plan: Plan) -> str:
    """The tables that claims may be about, and that a run of the plan will have."""
    asked = {
        name: bool(getattr(plan.spec, name, None))
        for name in ("attribution", "circuit", "decompose", "grid", "paths")
    }
    places = asked["grid"] or asked["paths"]
    has = {
        "summary": places,
        "results": places,
        "decomposition": asked["decompose"],
        "scores": asked["attribution"]
        or asked["circuit"]
        or (asked["decompose"] and asked["paths"]),
        "curve": asked["circuit"],  # that of `train-das`, and nodes, have neither value nor mean
    }
    return ", ".join(name for name, there in has.items() if there)


def _no_table(plan: Plan, claim: Claim) -> tuple[str, str] | None:
    """Why a run of the plan will have nothing that the claim is about, and what it will have."""
    if claim.table not in _tables(plan).split(", "):
        return f"this run will have no {claim.table} with values", _tables(plan)
    if plan.spec.kind == "train-das" and claim.of in ("clean", "corrupted"):
        return f"of: {claim.of}, which accuracies do not have", "value"
    return None


def _twice(places: Sequence[ClaimedPlace], rows: Rows | None) -> ClaimedPlace | None:
    """A place that a claim names again: it would count twice, or be larger than itself."""
    seen: set[object] = set()
    for place in places:
        which: object = frozenset(place.wanted.items())
        if rows is not None and rows.rows and not (place.wanted.keys() - rows.rows[0].keys()):
            found = rows.find(place.wanted)
            which = tuple(found) if found else which
        if which in seen:
            return place
        seen.add(which)
    return None


def _there(place: ClaimedPlace, rows: Rows) -> str:
    """What the grid has in the first column that has nothing of what a place wants."""
    for column, wanted in place.wanted.items():
        if not rows.find({column: wanted}):
            there = list(dict.fromkeys(str(row[column]) for row in rows.rows))
            named = ", ".join(one or "(nothing)" for one in there[:_MOST_NAMED])
            more = f" and {len(there) - _MOST_NAMED} more" if len(there) > _MOST_NAMED else ""
            return f"; its {column}: {named}{more}"
    return ""


_MOST_NAMED = 12  # of a column's values
_MOST_PROBLEMS = 3  # of one claim


def _misplaced(
    loaded: LoadedSpec[Any], i: int, claim: Claim, places: Sequence[ClaimedPlace], rows: Rows
) -> Iterator[Problem]:
    columns, replaced = list(rows.rows[0]), grid_replaced(loaded)
    found: list[Problem] = []

    def tell(place: ClaimedPlace, message: str, expected: str, word: str | None = None) -> None:
        at = ("reference", i, *place.at, *((word,) if word else ()))
        near = nearest(word, columns) if word else None
        message = f"claim '{claim.claim}'{message}"
        problem = loaded.problem(at, message, expected, near)
        found.append(Problem(message, place.mark, expected, near) if place.mark else problem)

    for place in places:
        unknown = [column for column in place.wanted if column not in columns]
        for column in unknown:
            tell(place, f": no column '{column}'", ", ".join(columns), column)
        if unknown:
            continue
        n = len(rows.find(place.wanted))
        if n == 0 and not replaced:
            told = ", ".join(f"{k}={v}" for k, v in place.wanted.items() if v is not None)
            expected = f"a place that the grid has{_there(place, rows)}"
            tell(place, f" is about no place of the grid ({told})", expected)
        elif n > 1 and place.single:
            more = "one" if claim.form in ("cells", "order") else "one, or a `reduce`"
            tell(place, f" is about {n} places", more)
    yield from found[:_MOST_PROBLEMS]
    if len(found) > _MOST_PROBLEMS:
        left = len(found) - _MOST_PROBLEMS
        message = f"claim '{claim.claim}': {left} more of its places are wrong in such ways"
        yield loaded.problem(("reference", i), message)
