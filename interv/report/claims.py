"""Comparing a summary with what a spec's `reference` claims."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import pandas as pd

from interv.errors import IntervError
from interv.plan.claims import conditions, matches
from interv.spec.schema import Claim


@dataclass(frozen=True)
class Verdict:
    """What was found for one claim (None: its place is not in this grid), and whether it holds."""

    claim: str
    found: float | None
    wanted: str
    holds: bool
    fails_run: bool
    source: str

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def check_claims(
    claims: list[Claim], summary: pd.DataFrame, metrics: list[str], *, outside: bool = False
) -> list[Verdict]:
    """Check each claim.

    Args:
        claims: of the spec's `reference`.
        summary: the summary table.
        metrics: the spec's; a claim that names none is about the first.
        outside: whether a claim may lie outside the grid without being missed, because the
            command line replaced the grid.
    """
    return [_check(c, summary, conditions(c, metrics), outside) for c in claims]


def _check(
    claim: Claim, summary: pd.DataFrame, wanted: Mapping[str, str | int | None], outside: bool
) -> Verdict:
    rows = summary
    for column, value in wanted.items():
        held = ["" if pd.isna(found) else found for found in rows[column].tolist()]
        rows = rows[[matches(found, value) for found in held]]
    wanted_text = _wanted(claim)
    missed = claim.on_miss == "fail"
    if rows.empty:
        return Verdict(claim.claim, None, wanted_text, False, missed and not outside, claim.source)
    if claim.reduce == "only" and len(rows) > 1:
        raise IntervError(f"reference '{claim.claim}': {len(rows)} rows of summary.csv match")
    values = rows["mean" if claim.of == "effect" else claim.of]
    if claim.reduce == "layer_of_max":
        found = float(rows["layer"].to_numpy()[values.to_numpy().argmax()])
    else:
        reduce = {"only": "max"}.get(claim.reduce, claim.reduce)
        found = float(values.agg(reduce))
    low, high = _bounds(claim)
    holds = math.isfinite(found) and low <= found <= high
    return Verdict(claim.claim, found, wanted_text, holds, missed and not holds, claim.source)


def _bounds(claim: Claim) -> tuple[float, float]:
    if claim.between is not None:
        return claim.between[0], claim.between[1]
    assert claim.value is not None and claim.tolerance is not None
    return claim.value - claim.tolerance, claim.value + claim.tolerance


def _wanted(claim: Claim) -> str:
    if claim.between is not None:
        return f"{claim.between[0]:g} to {claim.between[1]:g}"
    return f"{claim.value:g} ± {claim.tolerance:g}"
