"""What there is to do for a patch spec, in order, given what is done."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from interv.errors import IntervError
from interv.plan import Cell, ExecutorName, PatchPlan
from interv.plan.cells import digest
from interv.plan.circuit import split
from interv.plan.grid import Place
from interv.runner.circuit import EMPTY, Kept, circuits, graph_of, rank
from interv.runner.journal import Journal
from interv.runner.patch import Patcher
from interv.runner.sweep import Kind, Step, pack_steps
from interv.runner.values import baseline_values, scale, wanted_pairs

_SMALLEST = 1e-9  # of the model's value: what faithfulness may be divided by
_BATCH_PAIRS = 16
_BATCH_TOKENS = 1024  # whose activations are kept for a way back


def patch_steps(
    plan: PatchPlan, journal: Journal, executor: ExecutorName, tokens: int
) -> Iterator[Step]:
    """Baselines; then screens by gradient, patches, direct effects, circuits, patterns."""
    done = 0
    for batch in batches(plan, list(plan.pairs)):
        done += len(batch)
        ids = tuple(plan.baselines[index] for index in batch)
        yield Step("clean and corrupted prompts", ids, "baseline", batch, done, len(plan.pairs))
    wanted = wanted_pairs(plan, journal)
    for metric in plan.metrics:
        scale(plan, journal, metric)
    if plan.spec.attribution:
        yield from _in_batches(plan, wanted, "attribution")
    cells = _patched_cells(plan, journal)
    yield from pack_steps(
        plan, journal, executor, tokens, wanted, cells, lambda i: f"patches of prompt {i}"
    )
    if plan.spec.decompose:
        yield from _in_batches(plan, wanted, "decompose")
    if plan.spec.circuit:
        yield from _circuit_steps(plan, journal, wanted)
    if plan.spec.figures.patterns:
        first = wanted[0]
        yield Step("attention patterns", (patterns_id(plan, first),), "patterns", first)


def _patched_cells(plan: PatchPlan, journal: Journal) -> list[Cell]:
    """The cells that are patched exactly: all of them, or under attribution the top ones."""
    if not plan.spec.attribution:
        return list(plan.cells)
    paths = [label.cell for label in plan.labels if label.cell.freeze is not None]
    return [*plan.cells_of(verified_places(plan, journal)), *paths]


def is_patched(plan: PatchPlan, journal: Journal) -> bool:
    """Whether the grid is done, whatever is left to do of the other parts."""
    if any(key not in journal for key in plan.baselines.values()):
        return False
    wanted = wanted_pairs(plan, journal)
    parts = ["attribution"] if plan.spec.attribution else []
    if any(part_id(plan, index, part) not in journal for part in parts for index in wanted):
        return False
    left = (cell for cell in _patched_cells(plan, journal) if cell.id not in journal)
    return not any(cell.prompt in wanted for cell in left)


def part_id(plan: PatchPlan, index: int, part: str) -> str:
    """The id of what a part of the spec finds out about one pair."""
    section = getattr(plan.spec, part)
    asked: dict[str, Any] = section.model_dump(exclude={"verify"})
    if part == "attribution":
        asked["metric"] = plan.metrics[0].of
        asked["cells"] = [cell.id for cell in plan.nodes_of(index)]
    return digest(plan.baselines[index], f"{part}|{json.dumps(asked, sort_keys=True)}")


def patterns_id(plan: PatchPlan, index: int) -> str:
    """The id of the attention of chosen heads in one prompt."""
    return digest(plan.baselines[index], f"patterns|{plan.spec.figures.patterns}")


def attributed(plan: PatchPlan, journal: Journal) -> dict[str, float]:
    """Attributions by cell id, of the pairs for which they are known."""
    found: dict[str, float] = {}
    for index in wanted_pairs(plan, journal):
        key = part_id(plan, index, "attribution")
        if key in journal:
            cells = plan.nodes_of(index)
            values = journal[key]["attribution"]
            found |= {cell.id: v for cell, v in zip(cells, values, strict=True)}
    return found


def verified_places(plan: PatchPlan, journal: Journal) -> list[Place]:
    """The places whose mean attribution is largest, as many as are to be patched exactly."""
    values = attributed(plan, journal)
    by_place: dict[Place, list[float]] = {}
    for label in plan.labels:
        if label.cell.id in values:
            by_place.setdefault(label.place, []).append(values[label.cell.id])
    ranked = sorted(by_place, key=lambda place: -abs(float(np.mean(by_place[place]))))
    verify = plan.spec.attribution.verify
    return ranked if verify == "all" else ranked[:verify]


def _in_batches(plan: PatchPlan, wanted: Sequence[int], part: str) -> Iterator[Step]:
    done = 0
    for batch in batches(plan, wanted):
        done += len(batch)
        ids = tuple(part_id(plan, index, part) for index in batch)
        yield Step(part, ids, part, batch, done, len(wanted))


def batches(plan: PatchPlan, wanted: Sequence[int]) -> Iterator[tuple[int, ...]]:
    """Pairs that share forwards: of one length, read at one place."""
    alike: dict[tuple[int, int], list[int]] = {}
    for index in wanted:
        pair = plan.pairs[index]
        alike.setdefault((len(pair.ids), pair.read), []).append(index)
    for (length, _), some in alike.items():
        size = max(1, min(_BATCH_PAIRS, _BATCH_TOKENS // length))
        for i in range(0, len(some), size):
            yield tuple(some[i : i + size])


def _circuit_steps(plan: PatchPlan, journal: Journal, wanted: Sequence[int]) -> Iterator[Step]:
    scored, evaluated = halves(plan, wanted)
    graph = graph_of(plan, journal)

    def of(name: str, kept: Kept, i: int, n: int) -> Iterator[Step]:
        for batch in evaluated:
            # The payload computes the edges only where they are still wanted.
            key = circuit_id(plan, scored, batch, name)
            yield Step(f"circuit: {name}", (key,), "circuit", (batch, kept), i, n)

    yield from of(EMPTY, lambda: np.zeros(int(graph.exists.sum()), dtype=bool), 1, 1)
    if any(circuit_id(plan, scored, batch, EMPTY) not in journal for batch in evaluated):
        return
    # Faithfulness divides by what the whole model gains: known to be something before the rest.
    ends(plan, journal, scored, evaluated)
    for i, batch in enumerate(scored, start=1):
        yield Step("edge attribution", (edges_id(plan, batch),), "edges", batch, i, len(scored))
    if any(edges_id(plan, batch) not in journal for batch in scored):
        return
    ways = list(circuits(plan, rank(plan, journal, edge_scores(plan, journal, scored))))
    for i, (name, kept) in enumerate(ways, start=1):
        yield from of(name, kept, i, len(ways))


Batches = Sequence[Sequence[int]]


def halves(plan: PatchPlan, wanted: Sequence[int]) -> tuple[Batches, Batches]:
    """Batches of the pairs that edges are scored on, and that circuits are evaluated on.

    Raises:
        IntervError: none of the wanted pairs is on one side.
    """
    sides = split(list(plan.pairs.values()), plan.spec.circuit.held_out, plan.spec.seed)
    found = [list(batches(plan, [i for i in wanted if i in side])) for side in sides]
    if not all(found):
        raise IntervError(
            f"circuit.held_out: of the {len(wanted)} pairs that data.keep leaves none is "
            f"{'evaluated' if found[0] else 'scored'}; give more pairs"
        )
    return found[0], found[1]


def edges_id(plan: PatchPlan, batch: Sequence[int]) -> str:
    """The id of the mean edge scores of a batch."""
    spec = plan.spec.circuit
    how = [spec.method, spec.steps, spec.quadrature] if spec.method != "eap" else [spec.method]
    asked = [*how, plan.metrics[0].of]
    return digest("|".join(plan.baselines[i] for i in batch), f"edges|{json.dumps(asked)}")


def circuit_id(plan: PatchPlan, scored: Batches, batch: Sequence[int], name: str) -> str:
    """The id of a batch's values in one of the circuits, which all scores decide."""
    asked = json.dumps(plan.spec.circuit.model_dump(exclude={"fractions"}), sort_keys=True)
    whose = "|".join(edges_id(plan, some) for some in (*scored, batch))
    return digest(whose, f"circuit|{name}|{asked}|{plan.spec.seed}")


def edge_scores(plan: PatchPlan, journal: Journal, scored: Batches) -> np.ndarray:
    """The mean score of every edge over the scored pairs, in the graph's order."""
    records = [journal[edges_id(plan, batch)] for batch in scored]
    weights = np.array([record["n"] for record in records], dtype=float)
    scores = np.stack([np.asarray(record["scores"]) for record in records])
    mean: np.ndarray = weights @ scores / weights.sum()
    return mean


def circuit_values(
    plan: PatchPlan, journal: Journal, scored: Batches, evaluated: Batches, name: str
) -> np.ndarray:
    """The metric of the evaluated pairs in one of the circuits, `[pair, draw]`."""
    found = [
        values
        for batch in evaluated
        for values in journal[circuit_id(plan, scored, batch, name)]["values"]
    ]
    return np.array(found)


def ends(
    plan: PatchPlan, journal: Journal, scored: Batches, evaluated: Batches
) -> tuple[float, float]:
    """The mean metric of the empty circuit, and of the model, over the evaluated pairs.

    Raises:
        IntervError: they are the same: of the difference between them nothing is a share.
    """
    clean = baseline_values(plan, journal, plan.metrics[0], "clean")
    full = float(np.mean([clean[i] for batch in evaluated for i in batch]))
    empty = float(circuit_values(plan, journal, scored, evaluated, EMPTY).mean())
    if not abs(full - empty) > _SMALLEST * abs(full):
        raise IntervError(
            f"faithfulness is not defined: it divides by {full - empty:.3g} (the whole model "
            f"{full:.6g}, the empty circuit {empty:.6g}, means of {plan.metrics[0].of}). Choose "
            "pairs whose answers differ, or another intervention"
        )
    return empty, full


PATCH = Kind(patch_steps, Patcher)
