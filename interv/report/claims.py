"""Comparing a run's tables with what its spec's `reference` claims."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import pandas as pd

from interv.errors import IntervError
from interv.plan.claims import ClaimedPlace, Rows, Wanted, conditions, places_of
from interv.spec.claims import Claim

Word = Literal["holds", "missed", "noted", "outside"]
"""`noted`: missed, and the claim says that this is to be noted only; `outside`: its place was
taken out of the grid on the command line."""
_CELL_COLUMNS = ["reference", "tolerance", "found", "difference", "holds"]


@dataclass(frozen=True)
class Verdict:
    """What was found for one claim.

    Attributes:
        found: the number that is compared: of cells the largest difference, of `exceeds` the
            margin; None where there is none.
        told: what was found, in words.
        wanted: what the claim asks for, in words.
        cells: of a claim of cells: their places, `reference`, `found`, `difference`, `holds`.
    """

    claim: str
    table: str
    found: float | None
    told: str
    wanted: str
    word: Word
    source: str
    because: str
    cells: pd.DataFrame | None = field(default=None, compare=False, repr=False)

    @property
    def holds(self) -> bool:
        return self.word == "holds"

    @property
    def fails_run(self) -> bool:
        return self.word == "missed"

    def as_dict(self) -> dict[str, Any]:
        """The verdict as plain data, without its cells."""
        return {
            "claim": self.claim,
            "table": self.table,
            "found": self.found if self.found is not None and math.isfinite(self.found) else None,
            "told": self.told,
            "wanted": self.wanted,
            "verdict": self.word,
            "holds": self.holds,
            "fails_run": self.fails_run,
            "source": self.source,
            "because": self.because,
        }


@dataclass(frozen=True)
class _Finding:
    """What one form of claim makes of a table; `found` None: a place is not there."""

    holds: bool
    found: float | None
    told: str
    cells: pd.DataFrame | None = None


Places = Sequence[ClaimedPlace]
_ABSENT = _Finding(False, None, "not there")


def check_claims(
    claims: Sequence[Claim],
    tables: Mapping[str, pd.DataFrame],
    metrics: Sequence[str],
    *,
    outside: bool = False,
) -> list[Verdict]:
    """Check each claim.

    Args:
        claims: of the spec's `reference`.
        tables: those that claims are about, by name.
        metrics: the spec's; a claim that names none is about the first.
        outside: whether a claim may lie outside the grid without being missed, because the
            command line replaced the grid.

    Raises:
        IntervError: a claim about a table or a column that this run does not have, or about one
            place where several match.
        SpecError: a file of cells that cannot be read.
    """
    rows_of: dict[str, _Table] = {}
    verdicts = []
    for claim in claims:
        if claim.table not in tables:
            raise IntervError(f"reference '{claim.claim}': this run has no {claim.table}")
        if claim.table not in rows_of:
            rows_of[claim.table] = _Table(tables[claim.table], claim.table)
        table = rows_of[claim.table]
        wanted = conditions(claim, metrics, table.columns)
        places = places_of(claim, wanted)
        found = _FORMS[claim.form](claim, table, wanted, places, outside)
        word: Word = "holds" if found.holds else "missed"
        if not found.holds:
            if found.found is None and outside:
                word = "outside"
            elif claim.on_miss == "note":
                word = "noted"
        verdicts.append(
            Verdict(
                claim.claim,
                claim.table,
                found.found,
                found.told,
                wanted_words(claim, len(places)),
                word,
                str(claim.source),
                claim.because or "",
                found.cells,
            )
        )
    return verdicts


class _Table:
    """A table as rows that are found by their places."""

    def __init__(self, table: pd.DataFrame, name: str) -> None:
        self.columns = list(table.columns)
        self.name = name
        plain = table.astype(object).where(table.notna(), "")
        self._rows = Rows(plain.to_dict("records"))  # type: ignore[arg-type]

    def at(self, claim: Claim, place: ClaimedPlace) -> list[Mapping[str, Any]]:
        """The rows of a place; at most one where the claim is about single ones."""
        if missing := [column for column in place.wanted if column not in self.columns]:
            raise IntervError(
                f"reference '{claim.claim}': no column '{missing[0]}' among "
                f"{', '.join(self.columns)}"
            )
        found = self._rows.find(place.wanted)
        if place.single and len(found) > 1:
            raise IntervError(
                f"reference '{claim.claim}': {len(found)} rows of {self.name}.csv match"
            )
        return [self._rows.rows[i] for i in found]

    def others(self, wanted: Wanted) -> list[Mapping[str, Any]]:
        """All rows that match."""
        return [self._rows.rows[i] for i in self._rows.find(wanted)]


def _number(claim: Claim, row: Mapping[str, Any]) -> float:
    """What a claim is about in a row; tables without values have means."""
    columns = {"value": ("value", "mean"), "effect": ("mean", "effect")}.get(claim.of, (claim.of,))
    column = next((name for name in columns if name in row), None)
    if column is None:
        raise IntervError(
            f"reference '{claim.claim}': of: {claim.of}, but {claim.table}.csv has only "
            f"{', '.join(row)}"
        )
    value = row[column]
    return math.nan if value == "" else float(value)


def _reduced(claim: Claim, rows: Sequence[Mapping[str, Any]]) -> tuple[float, Mapping[str, Any]]:
    """The claim's number of some rows, and the row that it stands in (the first, of a mean)."""
    values = [_number(claim, row) for row in rows]
    if any(math.isnan(value) for value in values):
        return math.nan, rows[0]
    if claim.reduce == "mean":
        return sum(values) / len(values), rows[0]
    pick = min if claim.reduce == "min" else max
    best = values.index(pick(values))
    return values[best], rows[best]


def _one_number(
    claim: Claim, table: _Table, _wanted: Wanted, places: Places, _outside: bool
) -> _Finding:
    [place] = places
    rows = table.at(claim, place)
    if not rows:
        return _ABSENT
    found, row = _reduced(claim, rows)
    if claim.reduce == "layer_of_max" and not math.isnan(found):
        if not isinstance(row.get("layer"), int):
            raise IntervError(f"reference '{claim.claim}': its largest value is in no layer")
        found = float(row["layer"])
    low, high = claim.bounds
    return _Finding(math.isfinite(found) and low <= found <= high, found, f"{found:.4g}")


def _exceeds(
    claim: Claim, table: _Table, _wanted: Wanted, places: Places, _outside: bool
) -> _Finding:
    """One place above another: by its interval, or by a margin."""
    here, there = (table.at(claim, place) for place in places)
    if not here or not there:
        return _ABSENT
    (upper, high_row), (lower, low_row) = _reduced(claim, here), _reduced(claim, there)
    if claim.by is not None:
        margin = upper - lower
        return _Finding(margin >= claim.by, margin, f"{upper:.4g} over {lower:.4g}")
    ends = high_row.get("ci_low", ""), low_row.get("ci_high", "")
    if "" in ends:
        row = high_row if ends[0] == "" else low_row
        why = row.get("no_interval") or "it is of no mean"
        raise IntervError(
            f"reference '{claim.claim}': {table.name}.csv has no interval there ({why}); say `by` "
            "how much it exceeds"
        )
    if claim.of == "value" and {"value", "mean"} <= high_row.keys():
        # Intervals are of the mean effect: as wide around the value itself.
        ends = (
            float(ends[0]) + upper - float(high_row["mean"]),
            float(ends[1]) + lower - float(low_row["mean"]),
        )
    margin = float(ends[0]) - float(ends[1])
    told = f"{upper:.4g} (from {float(ends[0]):.4g}) over {lower:.4g} (to {float(ends[1]):.4g})"
    return _Finding(margin > 0, margin, told)


def _ordered(
    claim: Claim, table: _Table, wanted: Wanted, places: Places, _outside: bool
) -> _Finding:
    """The named places are the largest of all that match `where`, in this order."""
    named = [table.at(claim, place) for place in places]
    if not all(named):
        return _ABSENT

    def size(row: Mapping[str, Any]) -> float:
        value = _number(claim, row)
        return abs(value) if claim.magnitude else value

    sizes = [size(rows[0]) for rows in named]
    mine = [rows[0] for rows in named]
    rest = [row for row in table.others(wanted) if not any(row is one for one in mine)]
    after = [*sizes[1:], max((size(row) for row in rest), default=-math.inf)]
    slack = claim.tolerance or 0.0
    apart = [one - other for one, other in zip(sizes, after, strict=True)]
    # A place without a number is not known to be larger or smaller than another.
    unknown = any(math.isnan(size(row)) for row in [*mine, *rest])
    worst = math.nan if unknown else min(apart)
    keys = list(dict.fromkeys(column for place in claim.order or () for column in place))
    largest = sorted([*mine, *rest], key=size, reverse=True)[: len(mine)]
    told = ", ".join(
        ".".join(str(row[key]) for key in keys) + f" {_number(claim, row):.3g}" for row in largest
    )
    return _Finding(worst >= -slack, worst, told)


def _cells(claim: Claim, table: _Table, _wanted: Wanted, places: Places, outside: bool) -> _Finding:
    """Many places at once, each within its tolerance."""
    lines, absent = [], 0
    for place in places:
        cell, rows = place.cell, table.at(claim, place)
        assert cell is not None
        if not rows:
            absent += 1
            if outside:
                continue
        found = _number(claim, rows[0]) if rows else math.nan
        difference = found - cell.value
        holds = abs(difference) <= cell.tolerance
        # What a position holds says more than its number.
        token = {"token": rows[0]["token"]} if rows and rows[0].get("token") else {}
        lines.append({**place.wanted, **token, "reference": cell.value, "tolerance": cell.tolerance,
                      "found": found, "difference": difference, "holds": holds})  # fmt: skip
    if not lines:
        return _ABSENT
    frame = pd.DataFrame(lines)
    n, right = len(frame), int(frame["holds"].sum())
    known = frame["difference"].abs().dropna()
    worst = float(known.max()) if len(known) else math.nan
    told = f"{right:,} of {n:,} within, the farthest {worst:.2g} off"
    if absent and not outside:
        told += f"; {absent:,} not there"
    return _Finding(right >= math.ceil(claim.share * n - 1e-9), worst, told, frame)


_FORMS = {
    "value": _one_number,
    "between": _one_number,
    "exceeds": _exceeds,
    "order": _ordered,
    "cells": _cells,
}


def wanted_words(claim: Claim, n_places: int) -> str:
    """What a claim about so many places asks for, in a few words."""
    if claim.between is not None:
        return f"{claim.between[0]:g} to {claim.between[1]:g}"
    if claim.value is not None:
        return f"{claim.value:g} ± {claim.tolerance:g}"
    if claim.order is not None:
        return ", ".join(".".join(str(v) for v in place.values()) for place in claim.order)
    if claim.exceeds is not None:
        where = " ".join(f"{k} {v}" for k, v in claim.exceeds.items())
        return f"above {where}" + (f" by {claim.by:g}" if claim.by else ", intervals apart")
    apart = f"± {claim.tolerance:g}" if claim.tolerance is not None else "± each its own"
    part = "" if claim.share == 1 else f"{claim.share:.0%} of "
    return f"{part}{n_places:,} cells {apart}"


def verdicts_table(verdicts: Sequence[Verdict]) -> pd.DataFrame:
    """A row for each claim: reference.csv."""
    columns = ["claim", "table", "found", "told", "wanted", "verdict", "source", "because"]
    rows = [{k: v for k, v in verdict.as_dict().items() if k in columns} for verdict in verdicts]
    return pd.DataFrame(rows, columns=columns)


def cells_table(verdicts: Sequence[Verdict]) -> pd.DataFrame:
    """A row for each cell of the claims that have some: reference_cells.csv."""
    frames = [
        verdict.cells.assign(claim=verdict.claim)
        for verdict in verdicts
        if verdict.cells is not None
    ]
    if not frames:
        return pd.DataFrame(columns=["claim", *_CELL_COLUMNS])
    table = pd.concat(frames, ignore_index=True)
    places = [c for c in table.columns if c not in ("claim", *_CELL_COLUMNS)]
    return table[["claim", *places, *_CELL_COLUMNS]]
