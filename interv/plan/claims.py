"""A spec's `reference` against its own grid: a claim about no place is a mistake, not a miss."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from typing import Any

from interv.errors import Problem, nearest
from interv.plan.cells import Plan
from interv.spec import LoadedSpec
from interv.spec.load import COMMAND_LINE
from interv.spec.schema import Claim


def matches(value: object, wanted: str | int | None) -> bool:
    """Whether a column's value is the wanted one; for a number also an inclusive `8-11`."""
    if isinstance(wanted, str) and isinstance(value, int):
        low, _, high = wanted.partition("-")
        return low.isdecimal() and int(low) <= value <= int(high or low)
    return bool(value == ("" if wanted is None else wanted))


def conditions(
    claim: Claim, metrics: Sequence[str], columns: Collection[str]
) -> dict[str, str | int | None]:
    """What the columns of a claim's rows must be.

    The metric, unless named, is the spec's first; nothing is severed, and no path ends
    anywhere, whatever is exchanged counts, unless it is said.
    """
    unsaid = {"metric": metrics[0], "severed": None, "receiver": None, "exchanged": "any"}
    return {**{k: v for k, v in unsaid.items() if k in columns}, **claim.where}


def grid_replaced(loaded: LoadedSpec[Any]) -> bool:
    """Whether the command line changed the grid, so that claims may lie outside it."""
    return any(
        path[:1] in (("grid",), ("paths",)) and mark.source == COMMAND_LINE
        for path, mark in loaded.document.values.items()
    )


def check_claims(plan: Plan) -> Iterator[Problem]:
    """Problems of claims whose `where` names an unknown column, no place, or too many.

    Where the grid was replaced on the command line, a claim may lie outside it.
    """
    spec, loaded = plan.spec, plan.loaded
    lines = {tuple(line.items()): line for line in plan.labels_of(spec.metric)}
    places = list(lines.values())
    for i, claim in enumerate(spec.reference):
        if claim.table != "summary" or not places:
            continue
        at = ("reference", i, "where")
        columns = list(places[0])
        unknown = [column for column in claim.where if column not in columns]
        for column in unknown:
            message = f"claim '{claim.claim}': no column '{column}'"
            near = nearest(column, columns)
            yield loaded.problem((*at, column), message, ", ".join(columns), near)
        if unknown:
            continue
        wanted = conditions(claim, spec.metric, columns)
        found = sum(
            all(matches(place[column], value) for column, value in wanted.items())
            for place in places
        )
        if found == 0 and not grid_replaced(loaded):
            message = f"claim '{claim.claim}' is about no place of the grid"
            yield loaded.problem(at, message, "a place that the grid has")
        elif found > 1 and claim.reduce == "only":
            message = f"claim '{claim.claim}' is about {found} places"
            yield loaded.problem(at, message, "one, or a `reduce`")
