"""Comparing a summary with what a spec's `reference` claims."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import pandas as pd

from interv.plan.claims import matches
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


def check_claims(claims: list[Claim], summary: pd.DataFrame) -> list[Verdict]:
    """Check each claim; that its place is in the spec's grid was checked with the plan."""
    return [_check(claim, summary) for claim in claims]


def _check(claim: Claim, summary: pd.DataFrame) -> Verdict:
    rows = summary
    for column, wanted in claim.where.items():
        rows = rows[[matches(value, wanted) for value in rows[column].tolist()]]
    wanted_text = _wanted(claim)
    if rows.empty:
        return Verdict(claim.claim, None, wanted_text, False, False, claim.source)
    values = rows["mean" if claim.of == "effect" else claim.of]
    if claim.reduce == "layer_of_max":
        found = float(rows["layer"].to_numpy()[values.to_numpy().argmax()])
    else:
        reduce = {"only": "max"}.get(claim.reduce, claim.reduce)
        found = float(values.agg(reduce))
    low, high = _bounds(claim)
    holds = math.isfinite(found) and low <= found <= high
    fails = not holds and claim.on_miss == "fail"
    return Verdict(claim.claim, found, wanted_text, holds, fails, claim.source)


def _bounds(claim: Claim) -> tuple[float, float]:
    if claim.between is not None:
        return claim.between[0], claim.between[1]
    assert claim.value is not None and claim.tolerance is not None
    return claim.value - claim.tolerance, claim.value + claim.tolerance


def _wanted(claim: Claim) -> str:
    if claim.between is not None:
        return f"{claim.between[0]:g} to {claim.between[1]:g}"
    return f"{claim.value:g} ± {claim.tolerance:g}"
