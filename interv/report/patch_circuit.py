"""A circuit's curve and scores, its members, and how it is told."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from interv.engine import EdgeGraph
from interv.plan import PatchPlan
from interv.report.circuits import areas, faithfulness, incompleteness, minimality
from interv.report.statistics import INTERVAL, uncertainty
from interv.runner.circuit import Ranks, n_chosen, nodes_in, rank
from interv.runner.journal import Journal
from interv.runner.patch_steps import batches, circuit_id, edge_scores
from interv.runner.values import baseline_values, wanted_pairs


@dataclass(frozen=True)
class CircuitReport:
    """What is written of a circuit.

    Attributes:
        curve: faithfulness over the share of units that are kept, with intervals over pairs.
        scores: single numbers, by name.
        nodes: each with what it sends, in the circuit or not, and its minimality where asked for.
        circuit: nodes and edges of the chosen circuit, for JSON and for the drawing.
        graph: of the model.
    """

    curve: pd.DataFrame
    scores: dict[str, float]
    nodes: pd.DataFrame
    circuit: dict[str, Any]
    graph: EdgeGraph


def circuit_report(plan: PatchPlan, journal: Journal) -> CircuitReport:
    """Make it from the journal.

    Faithfulness and the areas under and off its curve (CPR and CMD) are MIB's (Mueller et al.
    2025, arXiv 2504.13151), completeness and minimality those of Wang et al. 2022.
    """
    wanted = wanted_pairs(plan, journal)
    found = list(batches(plan, wanted))
    ranks = rank(plan, edge_scores(plan, journal, found))

    def values(name: str) -> np.ndarray:
        """Of each pair, in the order of the batches."""
        return np.array(
            [v for batch in found for v in journal[circuit_id(plan, batch, name)]["values"]]
        )

    clean, corrupted = (
        baseline_values(plan, journal, plan.metrics[0], run) for run in ("clean", "corrupted")
    )
    full = float(np.mean(list(clean.values())))
    empty = float(np.mean(list(corrupted.values())))
    order = [i for batch in found for i in batch]
    lowest, highest = (np.array([of[i] for i in order]) for of in (corrupted, clean))
    fractions = list(plan.spec.circuit.fractions)
    rows, shares = [], []
    for fraction in fractions:
        each = values(f"top {fraction:g}")
        f = faithfulness(float(each.mean()), empty, full)
        # A ratio of means: as sure as the pairs' numerators follow their divisors.
        shares.append(f + (each - lowest - f * (highest - lowest)) / (full - empty))
        rows.append(
            {
                "fraction": fraction,
                "kept": round(fraction * len(ranks.unit_scores)),
                "value": float(each.mean()),
                "mean": f,
            }
        )
    statistics = plan.spec.statistics
    spread = uncertainty(shares, plan.spec.seed, statistics.level, statistics.resamples)
    curve = pd.DataFrame(rows)
    for name in ("n", *INTERVAL):
        curve[name] = spread[name].to_numpy()
    cpr, cmd = areas(fractions, curve["mean"].tolist())
    kept = ranks.kept(n_chosen(plan, ranks))
    chosen = float(values("chosen").mean())
    scores: dict[str, float] = {
        "CPR": cpr,
        "CMD": cmd,
        "edges": len(ranks.scores),
        "edges_in_circuit": int(kept.sum()),
        "nodes_in_circuit": len(nodes_in(plan, ranks)),
        "clean": full,
        "corrupted": empty,
        "circuit": chosen,
        "faithfulness": faithfulness(chosen, empty, full),
        "unfaithfulness": abs(full - chosen),
    }
    minimal: dict[str, float] = {}
    if plan.spec.circuit.knockouts and nodes_in(plan, ranks):
        apart = [
            incompleteness(
                float(values(f"circuit without subset {i}").mean()),
                float(values(f"model without subset {i}").mean()),
            )
            for i in range(plan.spec.circuit.knockouts)
        ]
        scores["incompleteness_mean"] = float(np.mean(apart))
        scores["incompleteness_max"] = float(np.max(apart))
        for node in nodes_in(plan, ranks):
            name = str(ranks.graph.senders[node])
            without = float(values(f"circuit without {name}").mean())
            minimal[name] = minimality(without, chosen)
        scores["minimality_min"] = min(minimal.values())
    nodes = _nodes(ranks, kept, minimal)
    return CircuitReport(curve, scores, nodes, _members(ranks, kept), ranks.graph)


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
    names = {str(edge["source"]) for edge in edges}
    names |= {name for edge in edges for name in nodes_of(str(edge["target"]), graph)}
    nodes = [
        {"name": str(s), "kind": s.kind, "layer": s.layer} for s in graph.senders if str(s) in names
    ]
    if "logits" in names:
        nodes.append({"name": "logits", "kind": "logits", "layer": graph.n_layers})
    return {"nodes": nodes, "edges": edges}


def nodes_of(receiver: str, graph: EdgeGraph) -> list[str]:
    """The nodes that a receiver belongs to: `a3.h5` of `a3.h5.q`.

    Keys and values are counted by key heads: each belongs to all the heads that look at it.
    """
    name, _, kind = receiver.rpartition(".")
    if kind not in ("q", "k", "v"):
        return [receiver]
    layer, _, head = name.rpartition(".h")
    group = 1 if kind == "q" else graph.n_heads // graph.n_kv_heads
    return [f"{layer}.h{int(head) * group + i}" for i in range(group)]
