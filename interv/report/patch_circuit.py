"""A circuit's curve and scores, its members, and how it is told."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd

from interv.plan import PatchPlan
from interv.report.circuits import areas, faithfulness, incompleteness, log_weighted, minimality
from interv.report.statistics import INTERVAL, uncertainty
from interv.runner.circuit import (
    CHOSEN,
    EMPTY,
    RANKINGS,
    Ranks,
    knocked_out,
    n_chosen,
    n_top,
    nodes_in,
    rank,
    set_name,
    top_name,
)
from interv.runner.journal import Journal
from interv.runner.patch_steps import Batches, circuit_values, edge_scores, ends, halves
from interv.runner.values import baseline_values, wanted_pairs


@dataclass(frozen=True)
class CircuitReport:
    """What is written of a circuit.

    Attributes:
        curve: for both rankings, faithfulness over the share of units that are asked for, with
            intervals over pairs; `edges` are those left once dead ends are pruned.
        scores: single numbers, by name.
        findings: the scores that are told first, and what they were measured on.
        nodes: each with what it sends, in the circuit or not, and its minimality where asked for.
        circuit: nodes and edges of the chosen circuit, for JSON and for the drawing.
    """

    curve: pd.DataFrame
    scores: dict[str, float]
    findings: dict[str, Any]
    nodes: pd.DataFrame
    circuit: dict[str, Any]


@dataclass(frozen=True)
class _Values:
    """Values of circuits on the evaluated pairs, in the order of their batches."""

    plan: PatchPlan
    journal: Journal
    scored: Batches
    evaluated: Batches

    def of(self, name: str) -> np.ndarray:
        """`[pair, draw]`."""
        return circuit_values(self.plan, self.journal, self.scored, self.evaluated, name)

    def mean(self, name: str) -> float:
        return float(self.of(name).mean())

    @cached_property
    def ends(self) -> tuple[float, float]:
        """Of the empty circuit and the model."""
        return ends(self.plan, self.journal, self.scored, self.evaluated)

    @cached_property
    def gains(self) -> np.ndarray:
        """Of each pair, what the model's value is above that of the empty circuit."""
        clean = baseline_values(self.plan, self.journal, self.plan.metrics[0], "clean")
        full = np.array([clean[i] for batch in self.evaluated for i in batch])
        gains: np.ndarray = full - self.of(EMPTY).mean(1)
        return gains


def circuit_report(plan: PatchPlan, journal: Journal) -> CircuitReport:
    """Make it from the journal.

    Faithfulness, CPR (edges ranked by what they help) and CMD (by magnitude) are MIB's (Mueller
    et al. 2025, arXiv 2504.13151), completeness and minimality those of Wang et al. 2022.
    """
    scored, evaluated = halves(plan, wanted_pairs(plan, journal))
    ranks = rank(plan, journal, edge_scores(plan, journal, scored))
    values = _Values(plan, journal, scored, evaluated)
    curve = _curve(ranks, values)
    kept = ranks.kept(n_chosen(plan, ranks))
    nodes_there = nodes_in(plan, ranks)
    (empty, full), chosen = values.ends, values.mean(CHOSEN)
    fractions = list(plan.spec.circuit.fractions)
    by_ranking = [curve[curve["ranking"] == by] for by in RANKINGS]
    signed, magnitude = (part["mean"].tolist() for part in by_ranking)
    scores: dict[str, float] = {
        "CPR": areas(fractions, signed).cpr,
        "CMD": areas(fractions, magnitude).cmd,
        "largest_faithfulness": max(signed),
        "sizes_above_1": sum(f > 1 + _ROUNDING for f in signed),
        "edges": len(ranks.scores),
        "edges_in_circuit": int(kept.sum()),
        "nodes_in_circuit": len(nodes_there),
        "clean": full,
        "empty": empty,
        "circuit": chosen,
        "faithfulness": faithfulness(chosen, empty, full),
        "unfaithfulness": abs(full - chosen),
    }
    if "accuracy" in curve and sum(fraction > 0 for fraction in fractions) > 1:
        scores["acc-AUC"] = log_weighted(fractions, by_ranking[0]["accuracy"].tolist())
    apart, minimal = _knocked_out(ranks, values)
    if apart:
        scores |= {
            "incompleteness_mean": float(np.mean(list(apart.values()))),
            "incompleteness_max": max(apart.values()),
            "minimality_min": min(minimal.values()),
        }
    told = ("CPR", "CMD", "acc-AUC", "faithfulness", "largest_faithfulness")
    findings: dict[str, Any] = {name: scores[name] for name in told if name in scores}
    counts = ("sizes_above_1", "edges_in_circuit", "nodes_in_circuit")
    findings |= {name: int(scores[name]) for name in counts}
    findings["evaluated_on"] = _evaluated_on(plan, scored, evaluated)
    circuit = {
        **_members(ranks, kept),
        "without": [{"nodes": k, "incompleteness": v} for k, v in apart.items()],
    }
    return CircuitReport(curve, scores, findings, _nodes(ranks, kept, minimal), circuit)


_ROUNDING = 1e-6  # of faithfulness: the whole model's is 1 up to this


def _evaluated_on(plan: PatchPlan, scored: Batches, evaluated: Batches) -> str:
    """Which pairs the numbers of a circuit are about, in words."""
    n_scored, n = (sum(len(batch) for batch in side) for side in (scored, evaluated))
    if plan.spec.circuit.held_out:
        return f"{n} held-out pairs ({n_scored} others gave the scores)"
    return f"the {n} pairs that gave the scores (held_out: 0)"


def _curve(ranks: Ranks, values: _Values) -> pd.DataFrame:
    """A row for each size under each ranking."""
    plan, (empty, full) = values.plan, values.ends
    rows, shares = [], []
    for by in RANKINGS:
        for fraction in plan.spec.circuit.fractions:
            drawn = values.of(top_name(by, fraction))
            each = drawn.mean(1)
            f = faithfulness(float(each.mean()), empty, full)
            # A ratio of means: as sure as the pairs' numerators follow their divisors.
            lowest = values.of(EMPTY).mean(1)
            shares.append(f + (each - lowest - f * values.gains) / (full - empty))
            n_units = n_top(ranks, fraction)
            rows.append(
                {
                    "ranking": by,
                    "fraction": fraction,
                    "units": n_units,
                    "edges": int(ranks.kept(n_units, by).sum()),
                    "value": float(each.mean()),
                    "accuracy": float((drawn > 0).mean()),
                    "mean": f,
                }
            )
    curve = pd.DataFrame(rows)
    if not plan.metrics[0].needs_wrong:
        # Above 0 is right only where the answer is compared with wrong ones.
        curve = curve.drop(columns="accuracy")
    statistics = plan.spec.statistics
    spread = uncertainty(shares, plan.spec.seed, statistics.level, statistics.resamples)
    for name in ("n", *INTERVAL):
        curve[name] = spread[name].to_numpy()
    return curve


def _knocked_out(ranks: Ranks, values: _Values) -> tuple[dict[str, float], dict[str, float]]:
    """Incompleteness of each set K of nodes, and each node's minimality; empty if not asked for."""
    plan, senders = values.plan, ranks.graph.senders
    sets = knocked_out(plan, ranks)
    if not sets:
        return {}, {}
    without = {nodes: values.mean(set_name("circuit", nodes)) for nodes in sets}
    apart = {
        " ".join(str(senders[node]) for node in sorted(nodes)): incompleteness(
            without[nodes], values.mean(set_name("model", nodes))
        )
        for nodes in sets
    }
    minimal = {
        str(senders[node]): max(
            minimality(
                values.mean(set_name("circuit", nodes | {node})),
                values.mean(set_name("circuit", nodes - {node})),
            )
            for nodes in (frozenset[int](), *sets)
        )
        for node in nodes_in(plan, ranks)
    }
    return apart, minimal


def _nodes(ranks: Ranks, kept: np.ndarray, minimal: dict[str, float]) -> pd.DataFrame:
    senders = ranks.graph.senders
    sums = np.bincount(ranks.senders, weights=ranks.scores, minlength=len(senders))
    inside = np.bincount(ranks.senders[kept], minlength=len(senders))
    return pd.DataFrame(
        [
            {
                "node": str(sender),
                "kind": sender.kind,
                "layer": None if sender.kind == "input" else sender.layer,
                "head": sender.head if sender.kind == "head" else None,
                "attribution": sums[i],
                "edges_in_circuit": int(inside[i]),
                "minimality": minimal.get(str(sender), np.nan),
            }
            for i, sender in enumerate(senders)
        ]
    ).astype({"layer": "Int64", "head": "Int64"})


def _members(ranks: Ranks, kept: np.ndarray) -> dict[str, Any]:
    """The circuit as JSON has it: a head's queries, keys and values end in the head."""
    graph = ranks.graph
    edges = [
        {
            "source": str(graph.senders[s]),
            "target": str(graph.receivers[r]),
            "score": float(score),
        }
        for s, r, score in zip(
            ranks.senders[kept], ranks.receivers[kept], ranks.scores[kept], strict=True
        )
    ]
    edges.sort(key=lambda edge: -abs(float(str(edge["score"]))))
    names = {node_of(str(edge[end])) for edge in edges for end in ("source", "target")}
    nodes = [
        {"name": str(s), "kind": s.kind, "layer": s.layer} for s in graph.senders if str(s) in names
    ]
    if "logits" in names:
        nodes.append({"name": "logits", "kind": "logits", "layer": graph.n_layers})
    return {"nodes": nodes, "edges": edges}


def node_of(name: str) -> str:
    """The node that a receiver belongs to: `a3.h5` of `a3.h5.q`."""
    node, _, kind = name.rpartition(".")
    return node if kind in ("q", "k", "v") else name
