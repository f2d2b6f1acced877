"""A spec's `reference` against its own grid: a claim about no place is a mistake, not a miss."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from interv.errors import Problem, nearest
from interv.plan.cells import Label
from interv.spec import LoadedSpec
from interv.spec.load import COMMAND_LINE
from interv.spec.schema import Claim, TraceSpec
from interv.task import Prompt

COLUMNS = ("component", "layer", "window", "severed", "pos", "token", "role", "metric")


def matches(value: object, wanted: str | int | None) -> bool:
    """Whether a column's value is the wanted one; for a number also an inclusive `8-11`."""
    if isinstance(wanted, str) and isinstance(value, int):
        low, _, high = wanted.partition("-")
        return low.isdecimal() and int(low) <= value <= int(high or low)
    return bool(value == ("" if wanted is None else wanted))


def conditions(claim: Claim, metrics: Sequence[str]) -> dict[str, str | int | None]:
    """What the columns of a claim's rows must be.

    The metric, unless named, is the spec's first; nothing is severed unless it is said.
    """
    return {"metric": metrics[0], "severed": None, **claim.where}


def grid_replaced(loaded: LoadedSpec[TraceSpec]) -> bool:
    """Whether the command line changed the grid, so that claims may lie outside it."""
    return any(
        path[:1] == ("grid",) and mark.source == COMMAND_LINE
        for path, mark in loaded.document.values.items()
    )


def check_claims(
    loaded: LoadedSpec[TraceSpec], prompts: Sequence[Prompt], labels: Sequence[Label]
) -> Iterator[Problem]:
    """Problems of claims whose `where` names an unknown column, no place, or too many.

    Where the grid was replaced on the command line, a claim may lie outside it.
    """
    spec = loaded.spec
    by_index = {p.index: p for p in prompts}
    places = list(
        dict.fromkeys(
            _place(label, by_index[label.prompt], len(prompts), metric)
            for label in labels
            for metric in spec.metric
        )
    )
    for i, claim in enumerate(spec.reference):
        at = ("reference", i, "where")
        for column in claim.where:
            if column not in COLUMNS:
                message = f"claim '{claim.claim}': no column '{column}'"
                near = nearest(column, COLUMNS)
                yield loaded.problem((*at, column), message, ", ".join(COLUMNS), near)
        if any(column not in COLUMNS for column in claim.where) or not places:
            continue
        wanted = conditions(claim, spec.metric)
        found = sum(_holds(wanted, place) for place in places)
        if found == 0 and not grid_replaced(loaded):
            message = f"claim '{claim.claim}' is about no place of the grid"
            yield loaded.problem(at, message, "a place that the grid has")
        elif found > 1 and claim.reduce == "only":
            message = f"claim '{claim.claim}' is about {found} places"
            yield loaded.problem(at, message, "one, or a `reduce`")


def _place(label: Label, prompt: Prompt, n_prompts: int, metric: str) -> tuple[object, ...]:
    """The row of summary.csv that a label goes into; see `report.tables.summary_table`."""
    cell = label.cell
    single = n_prompts == 1
    pos = cell.position if single or not label.role else ""
    token = prompt.tokens[cell.position] if single else ""
    severed = cell.sever or ""
    return (cell.component, label.layer, label.window, severed, pos, token, label.role, metric)


def _holds(wanted: Mapping[str, str | int | None], place: tuple[object, ...]) -> bool:
    columns = dict(zip(COLUMNS, place, strict=True))
    return all(matches(columns[column], value) for column, value in wanted.items())
