"""Packs: cells that share one forward. A pure function of the plan and the `run` settings."""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass

from interv.plan.cells import Cell, Plan


@dataclass(frozen=True)
class Pack:
    """Cells of one prompt, computed in one forward and journalled whole."""

    prompt: int
    cells: tuple[Cell, ...]


def make_packs(plan: Plan, elsewhere: Container[str] = ()) -> list[Pack]:
    """Cells in the plan's order, cut where `run.max_tokens` is reached or the prompt changes.

    Args:
        plan: what to compute.
        elsewhere: ids of cells that an earlier run of another grid computed.
    """
    by_prompt: dict[int, list[Cell]] = {}
    for cell in plan.cells:
        if cell.id not in elsewhere:
            by_prompt.setdefault(cell.prompt, []).append(cell)
    packs: list[Pack] = []
    for prompt, cells in by_prompt.items():
        size = max(1, plan.spec.run.max_tokens // (plan.draws * plan.tokens(prompt)))
        packs += [Pack(prompt, tuple(cells[i : i + size])) for i in range(0, len(cells), size)]
    return packs
