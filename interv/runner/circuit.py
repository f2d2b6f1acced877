"""Which edges are in a circuit: the top ones, those chosen, and those left after a knock-out."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Final, Literal

import numpy as np
import torch

from interv.engine import EdgeGraph
from interv.plan import PatchPlan
from interv.runner.journal import Journal
from interv.runner.recognised import anatomy_of_run

Kept = Callable[[], np.ndarray]
"""Whether each edge is kept, in the order of the graph's edges."""

Ranking = Literal["signed", "magnitude"]
RANKINGS: Final[tuple[Ranking, ...]] = ("signed", "magnitude")
"""By how much an edge helps the metric, and by the size of its score: MIB's CPR and CMD."""


@dataclass(frozen=True)
class Ranks:
    """Edges with their scores, and the orders in which they enter a circuit.

    Attributes:
        graph: of the model.
        scores: of each edge: what carrying something else over it does to the metric.
        senders, receivers: of each edge.
        members: for each unit that enters whole (an edge, or a node with all that it sends to
            nodes that are in) the unit's number, by edge.
        unit_scores: of each unit.
        higher: whether a higher value of the metric is the better one.
    """

    graph: EdgeGraph
    scores: np.ndarray
    senders: np.ndarray
    receivers: np.ndarray
    members: np.ndarray
    unit_scores: np.ndarray
    higher: bool

    def order(self, by: Ranking) -> np.ndarray:
        """Units in the order in which they enter; of equal ones the earlier first."""
        helps = -self.unit_scores if self.higher else self.unit_scores
        wanted = helps if by == "signed" else np.abs(self.unit_scores)
        return np.argsort(-wanted, kind="stable")

    def kept(self, n_units: int, by: Ranking = "magnitude") -> np.ndarray:
        """Edges of the first so many units that lie on a way from the input to the logits."""
        return self.pruned(np.isin(self.members, self.order(by)[:n_units]))

    def pruned(self, kept: np.ndarray) -> np.ndarray:
        """Without edges that end in, or begin at, a node that the circuit does not connect."""
        exists = self.graph.exists
        keep = torch.zeros_like(exists)
        keep[exists] = torch.from_numpy(kept)
        found: np.ndarray = self.graph.pruned(keep)[exists].numpy()
        return found


def graph_of(plan: PatchPlan, journal: Journal) -> EdgeGraph:
    """Return the graph of the run's model."""
    return EdgeGraph(anatomy_of_run(plan, journal))


def rank(plan: PatchPlan, journal: Journal, scores: np.ndarray) -> Ranks:
    """Order a graph's edges, or its nodes by the sum of what they send (their own attribution)."""
    graph = graph_of(plan, journal)
    senders, receivers = graph.exists.numpy().nonzero()
    higher = plan.metrics[0].of != "cross_entropy"
    members, units = np.arange(len(scores)), scores
    if plan.spec.circuit.level == "nodes":
        members = senders
        units = np.bincount(senders, weights=scores, minlength=len(graph.senders))
    return Ranks(graph, scores, senders, receivers, members, units, higher)


def n_top(ranks: Ranks, share: float) -> int:
    """How many units a share of all of them is, rounded down as in MIB's code."""
    return int(share * len(ranks.unit_scores))


def n_chosen(plan: PatchPlan, ranks: Ranks) -> int:
    """How many units the spec's `choose` takes, before what is not connected is pruned."""
    choose = plan.spec.circuit.choose
    if choose.top is not None:
        return min(int(choose.top), len(ranks.unit_scores))
    if choose.share is not None:
        return n_top(ranks, float(choose.share))
    return int((np.abs(ranks.unit_scores) >= choose.threshold).sum())


def circuits(plan: PatchPlan, ranks: Ranks) -> Iterator[tuple[str, Kept]]:
    """Every circuit whose value is asked for, with its name."""
    for by in RANKINGS:
        for share in plan.spec.circuit.fractions:
            yield top_name(by, share), partial(ranks.kept, n_top(ranks, share), by)
    yield CHOSEN, partial(ranks.kept, n_chosen(plan, ranks))
    yield from _knockouts(plan, ranks)


EMPTY, CHOSEN = "empty", "chosen"


def top_name(by: Ranking, share: float) -> str:
    """The name of a circuit of the top units."""
    return f"top {share:g} by {by}"


def nodes_in(plan: PatchPlan, ranks: Ranks) -> list[int]:
    """Senders of the chosen circuit, the input left aside: it is no part of the model's own."""
    kept = ranks.kept(n_chosen(plan, ranks))
    return [int(node) for node in np.unique(ranks.senders[kept]) if node != 0]


def knocked_out(plan: PatchPlan, ranks: Ranks) -> list[frozenset[int]]:
    """Random sets K of the circuit's nodes, each node in it with probability ½, none empty.

    As the random sets of Wang et al. 2022, section 4.
    """
    nodes = nodes_in(plan, ranks)
    draw = np.random.default_rng(plan.spec.seed)
    found: list[frozenset[int]] = []
    while nodes and len(found) < plan.spec.circuit.knockouts:
        some = frozenset(node for node in nodes if draw.random() < 0.5)
        if some:
            found.append(some)
    return found


def _knockouts(plan: PatchPlan, ranks: Ranks) -> Iterator[tuple[str, Kept]]:
    """C \\ K and M \\ K for completeness; each K with and without each node for minimality."""
    sets = knocked_out(plan, ranks)
    if not sets:
        return
    circuit = ranks.kept(n_chosen(plan, ranks))
    whole = np.ones_like(circuit)

    def without(edges: np.ndarray, nodes: frozenset[int]) -> Kept:
        return lambda: edges & ~np.isin(ranks.senders, list(nodes))

    seen: set[frozenset[int]] = set()
    for nodes in sets:
        yield set_name("model", nodes), without(whole, nodes)
        seen.add(nodes)
    for node in nodes_in(plan, ranks):
        for nodes in (frozenset[int](), *sets):
            seen |= {nodes | {node}, nodes - {node}}
    for nodes in sorted(seen - {frozenset()}, key=sorted):
        yield set_name("circuit", nodes), without(circuit, nodes)


def set_name(of: Literal["circuit", "model"], nodes: frozenset[int]) -> str:
    """The name of a circuit, or of the model, without some nodes; of none the circuit's own."""
    if not nodes:
        return CHOSEN
    return f"{of} without {' '.join(map(str, sorted(nodes)))}"
