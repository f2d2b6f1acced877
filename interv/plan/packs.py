"""Packs: cells that share one forward. A pure function of the plan and the `run` settings."""

from __future__ import annotations

from collections.abc import Container, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from interv.plan.cells import Cell, Plan

ExecutorName = Literal["reference", "suffix"]

# What reading a block's weights costs, in tokens through that block: below about this many
# tokens a forward on a CPU takes the same time.
_BLOCK_OVERHEAD = 48


@dataclass(frozen=True)
class Pack:
    """Cells of one prompt, computed in one forward and journalled whole.

    `block_tokens` is what that forward computes: (row, layer, token) triples.
    """

    prompt: int
    cells: tuple[Cell, ...]
    block_tokens: int


def make_packs(plan: Plan, executor: ExecutorName, elsewhere: Container[str] = ()) -> list[Pack]:
    """Pack the cells of each prompt, as suits the executor.

    Args:
        plan: what to compute.
        executor: the reference runs every row in full; the suffix executor runs rows from
            their first layer on, at positions from the pack's first one on.
        elsewhere: ids of cells that an earlier run of another grid computed.
    """
    by_prompt: dict[int, list[Cell]] = {}
    for cell in plan.cells:
        if cell.id not in elsewhere:
            by_prompt.setdefault(cell.prompt, []).append(cell)
    pack = _full if executor == "reference" else _suffix
    return [p for prompt, cells in by_prompt.items() for p in pack(plan, prompt, cells)]


def _full(plan: Plan, prompt: int, cells: Sequence[Cell]) -> Iterator[Pack]:
    assert plan.facts is not None
    row = plan.draws * plan.tokens(prompt)
    for some in _cut(cells, row, plan.spec.run.max_tokens):
        yield Pack(prompt, some, plan.facts.n_layers * len(some) * row)


def _suffix(plan: Plan, prompt: int, cells: Sequence[Cell]) -> Iterator[Pack]:
    # Rows that change nothing cost nothing.
    idle = tuple(cell for cell in cells if plan.is_no_op(cell))
    if idle:
        yield Pack(prompt, idle, 0)
    groups: dict[int, list[Cell]] = {}
    for cell in cells:
        if not plan.is_no_op(cell):
            groups.setdefault(cell.position, []).append(cell)
    positions = sorted(groups)
    for first, end in _segments(plan, prompt, [groups[p] for p in positions], positions):
        together = [cell for p in positions[first:end] for cell in groups[p]]
        together.sort(key=first_layer)
        width = plan.draws * (plan.tokens(prompt) - positions[first])
        for some in _cut(together, width, plan.spec.run.max_tokens):
            yield Pack(prompt, some, width * _depth(plan, some))


def first_layer(cell: Cell) -> int:
    """The first block that a cell's rows run through: a block's output enters the next one."""
    return cell.layers[0] + (cell.component == "block_output")


def _depth(plan: Plan, cells: Sequence[Cell]) -> int:
    """Blocks that one row of each cell runs through, summed."""
    assert plan.facts is not None
    return sum(plan.facts.n_layers - first_layer(cell) for cell in cells)


def _segments(
    plan: Plan, prompt: int, groups: Sequence[Sequence[Cell]], positions: Sequence[int]
) -> list[tuple[int, int]]:
    """Which neighbouring positions to pack together, at the least cost.

    A row computes positions from its pack's first one on: packs of few positions waste no
    tokens, packs of many read the weights less often. By dynamic programming over the cuts.
    """
    assert plan.facts is not None
    n_layers, budget = plan.facts.n_layers, plan.spec.run.max_tokens
    depths = [_depth(plan, group) for group in groups]
    best: list[float] = [0.0]
    cuts: list[int] = [0]
    for end in range(1, len(groups) + 1):
        options = []
        for first in range(end):
            width = plan.draws * (plan.tokens(prompt) - positions[first])
            rows = sum(len(group) for group in groups[first:end])
            walks = -(-rows * width // budget)
            cost = width * sum(depths[first:end]) + walks * _BLOCK_OVERHEAD * n_layers
            options.append((best[first] + cost, first))
        cost_here, first = min(options)
        best.append(cost_here)
        cuts.append(first)
    segments = []
    end = len(groups)
    while end:
        segments.append((cuts[end], end))
        end = cuts[end]
    return segments[::-1]


def _cut(cells: Sequence[Cell], width: int, budget: int) -> Iterator[tuple[Cell, ...]]:
    """Runs of cells, each `width` tokens, within the budget; at least one cell."""
    size = max(1, budget // width)
    for i in range(0, len(cells), size):
        yield tuple(cells[i : i + size])
