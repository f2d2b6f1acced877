"""Comparing a summary with what a spec's `reference` claims."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import pandas as pd

from interv.errors import IntervError, nearest
from interv.spec.schema import Claim


@dataclass(frozen=True)
class Verdict:
    """What was found for one claim, and whether it holds."""

    claim: str
    found: float
    wanted: str
    holds: bool
    fails_run: bool
    source: str

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def check_claims(claims: list[Claim], summary: pd.DataFrame) -> list[Verdict]:
    """Check each claim.

    Raises:
        IntervError: a claim names a column or a place that the summary does not have.
    """
    return [_check(claim, summary) for claim in claims]


def _match(column: pd.Series[Any], wanted: str | int | None) -> pd.Series[bool]:
    """Rows with this value; `8-11` is a range where the column holds numbers."""
    if isinstance(wanted, str) and pd.api.types.is_numeric_dtype(column):
        low, _, high = wanted.partition("-")
        return column.between(int(low), int(high or low))
    return column == ("" if wanted is None else wanted)


def _check(claim: Claim, summary: pd.DataFrame) -> Verdict:
    rows = summary
    for column, wanted in claim.where.items():
        if column not in summary.columns:
            near = nearest(column, list(summary.columns))
            hint = f"; did you mean '{near}'?" if near else ""
            raise IntervError(f"reference '{claim.claim}': no column '{column}'{hint}")
        rows = rows[_match(rows[column], wanted)]
    if rows.empty or (claim.reduce == "only" and len(rows) != 1):
        raise IntervError(
            f"reference '{claim.claim}': {len(rows)} rows of summary.csv match {claim.where}"
            + ("; expected one, or a `reduce`" if len(rows) else "")
        )
    values = rows["mean" if claim.of == "effect" else claim.of]
    if claim.reduce == "layer_of_max":
        found = float(rows["layer"].to_numpy()[values.to_numpy().argmax()])
    else:
        reduce = {"only": "max"}.get(claim.reduce, claim.reduce)
        found = float(values.agg(reduce))
    if claim.between is not None:
        low, high = claim.between
        wanted_text = f"{low:g} to {high:g}"
    else:
        assert claim.value is not None and claim.tolerance is not None
        low, high = claim.value - claim.tolerance, claim.value + claim.tolerance
        wanted_text = f"{claim.value:g} ± {claim.tolerance:g}"
    holds = math.isfinite(found) and low <= found <= high
    return Verdict(
        claim.claim, found, wanted_text, holds, not holds and claim.on_miss == "fail", claim.source
    )
