"""All that comes of a patch: tables, files, findings and figures."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
from matplotlib import rc_context
from matplotlib.figure import Figure

from interv.plan import PatchPlan
from interv.report import patch_figures as figures
from interv.report.figures import STYLE, files_of
from interv.report.patch_circuit import CircuitReport, circuit_report, node_of
from interv.report.patch_tables import (
    attribution_table,
    decomposed,
    decomposition_table,
    described,
    paths_against_direct,
    prompts_table,
    results_table,
    summary_table,
    verification,
)
from interv.report.tables import to_csv
from interv.runner.folder import json_text
from interv.runner.journal import Journal
from interv.runner.patch_steps import patterns_id
from interv.runner.values import wanted_pairs


@dataclass(frozen=True)
class PatchReport:
    """What is written of a patch.

    Attributes:
        tables: by name, each a CSV file.
        files: other files' texts, by name.
        findings: single numbers, by part of the spec.
        asked: what the record has besides.
    """

    tables: dict[str, pd.DataFrame]
    files: dict[str, str] = field(default_factory=dict)
    findings: dict[str, Any] = field(default_factory=dict)
    asked: dict[str, Any] = field(default_factory=dict)
    circuit: CircuitReport | None = None


def grid_tables(plan: PatchPlan, journal: Journal) -> dict[str, pd.DataFrame]:
    """Return what the grid alone gives."""
    results = results_table(plan, journal)
    summary = summary_table(plan, results)
    return {"results": results, "summary": summary, "prompts": prompts_table(plan, journal)}


def patch_report(plan: PatchPlan, journal: Journal) -> PatchReport:
    """Every table, made from the journal."""
    tables = grid_tables(plan, journal)
    summary = tables["summary"]
    findings: dict[str, Any] = {}
    files: dict[str, str] = {}
    scores: dict[str, float] = {}
    if plan.spec.attribution:
        tables["attribution"] = attribution_table(plan, journal, summary)
        found = verification(tables["attribution"])
        findings["attribution_against_patching"] = found
        scores |= {f"attribution_{k}": v for k, v in found.items() if isinstance(v, float)}
    if plan.spec.decompose:
        tables["decomposition"] = decomposition_table(plan, journal)
        agreement = paths_against_direct(plan, summary, tables["decomposition"])
        if agreement:
            findings["paths_against_direct_logit_attribution"] = agreement
            scores |= {
                f"paths_against_direct_{k}": v for k, v in agreement.items() if isinstance(v, float)
            }
    circuit = None
    if plan.spec.circuit:
        circuit = circuit_report(plan, journal)
        tables |= {"curve": circuit.curve, "nodes": circuit.nodes}
        files["circuit.json"] = json_text(circuit.circuit, 1) + "\n"
        scores |= circuit.scores
        findings["circuit"] = circuit.findings
    if scores:
        rows = [{"name": name, "value": float(value)} for name, value in scores.items()]
        tables["scores"] = pd.DataFrame(rows)
    plugin = plan.loaded.plugin
    asked = {
        "pairs_left_out": len(plan.left_out),
        **({"groups": plan.groups} if plan.groups else {}),
        "plugin": plugin.as_dict() if plugin else None,
    }
    return PatchReport(tables, files, findings, asked, circuit)


def draw_patch(
    plan: PatchPlan, journal: Journal, report: PatchReport
) -> Iterator[tuple[str, bytes | str]]:
    """Every figure, and the CSV behind it, as (file name, content)."""
    with rc_context(STYLE):
        for stem, figure, frame in _figures(plan, journal, report):
            yield from files_of(plan.spec.figures, stem, figure)
            yield f"{stem}.csv", to_csv(frame)


Drawn = tuple[str, Figure, pd.DataFrame]


def _figures(plan: PatchPlan, journal: Journal, report: PatchReport) -> Iterator[Drawn]:
    for metric, summary in report.tables["summary"].groupby("metric", sort=False):
        suffix = f"_{metric!s}".replace(":", "_") if len(plan.metrics) > 1 else ""
        bar = _bar(plan, str(metric))
        for receiver in map(str, summary["receiver"].unique()):
            end = f"_to_{receiver}".replace(".", "_") if receiver else ""
            frame = summary[summary["receiver"] == receiver]
            yield from _maps(plan, frame, f"{end}{suffix}", bar, receiver)
        yield from _bars(plan, summary, f"{suffix}", bar)
    if "attribution" in report.tables:
        yield from _attribution(plan, report)
    if "decomposition" in report.tables:
        yield from _decomposition(plan, report.tables["decomposition"])
    if report.circuit is not None:
        yield from _circuit(plan, report.circuit)
    if plan.spec.figures.patterns:
        yield _patterns(plan, journal)


def _bar(plan: PatchPlan, metric: str) -> str:
    return f"effect on {metric.replace('_', ' ')} (value − {plan.relative_to})"


def _maps(
    plan: PatchPlan, frame: pd.DataFrame, suffix: str, bar: str, receiver: str
) -> Iterator[Drawn]:
    """Layer × position of what has no heads; layer × head, a facet for each place, of heads."""
    model = plan.files.label
    frame = frame[frame["layer"].notna() & frame["neuron"].isna()]
    end = f" → {receiver}" if receiver else ""
    for (component, window), rows in frame.groupby(["component", "window"], sort=False):
        wide = f"_window{window}" if int(str(window)) > 1 else ""
        name = f"{component}{wide}{suffix}"
        title = f"{str(component).replace('_', ' ')}{end}"
        if rows["head"].notna().all():
            facets = [
                (f"{title} {_where(plan, str(role), pos)}".strip(), some[["layer", "head", "mean"]])
                for (role, pos), some in rows.groupby(["role", "pos"], sort=False, dropna=False)
            ][:_MOST_FACETS]
            yield f"heads_{name}", figures.layer_by_head(facets, model, bar), rows
            continue
        places = list(dict.fromkeys(zip(rows["role"], rows["pos"].astype(object), strict=True)))
        if rows["layer"].nunique() < 2:
            continue
        labels = [_where(plan, str(role), pos) for role, pos in places]
        number = {_same(place): i for i, place in enumerate(places)}
        at = [
            number[_same(place)]
            for place in zip(rows["role"], rows["pos"].astype(object), strict=True)
        ]
        table = rows[["layer", "mean"]].assign(row=at)
        figure = figures.layer_by_position(table, labels, model, title, bar)
        yield f"layers_{name}", figure, rows
        if len(places) <= _MOST_LINES and rows["ci_low"].notna().any():
            lines = rows[["mean", "ci_low", "ci_high"]].assign(
                series=[labels[i] or "whole" for i in at], x=rows["layer"].astype(int)
            )
            yield f"lines_{name}", figures.lines(lines, f"layer of {model}", bar), lines


_MOST_FACETS = 12
_MOST_LINES = 8


def _same(place: tuple[Any, Any]) -> tuple[Any, Any]:
    role, pos = place
    return role, None if pd.isna(pos) else int(pos)


def _where(plan: PatchPlan, role: str, pos: Any) -> str:
    """A row's label: its span, or its token where all prompts have the same one there."""
    if role:
        return "" if role == "whole" else f"{role}"
    pairs = list(plan.pairs.values())
    names = {
        name
        for pair in pairs
        for name, positions in pair.spans.items()
        if int(pos) in positions and name != "END"
    }
    everywhere = [n for n in names if all(int(pos) in p.spans.get(n, ()) for p in pairs)]
    tokens = {pair.tokens[int(pos)] for pair in pairs if int(pos) < len(pair.tokens)}
    if len(tokens) == 1:
        token = next(iter(tokens)).strip()
        return f"{int(pos)} {token}" + (f" ({', '.join(sorted(everywhere))})" if everywhere else "")
    return f"{int(pos)} {', '.join(sorted(everywhere))}".strip()


def _bars(plan: PatchPlan, summary: pd.DataFrame, suffix: str, bar: str) -> Iterator[Drawn]:
    """The largest effects of heads, neurons and sets, with their intervals."""
    single = summary[summary["head"].notna() | summary["neuron"].notna() | summary["layer"].isna()]
    if single.empty:
        return
    top = plan.spec.figures.top
    chosen = single.reindex(single["mean"].abs().sort_values(ascending=False).index)[:top]
    labels = [described(row) for _, row in chosen.iterrows()]
    frame = chosen[["mean", "ci_low", "ci_high"]].assign(label=labels).reset_index(drop=True)
    yield f"top{suffix}", figures.bars(frame, bar, top), frame


def _attribution(plan: PatchPlan, report: PatchReport) -> Iterator[Drawn]:
    table = report.tables["attribution"]
    metric = plan.metrics[0].of.replace("_", " ")
    renamed = table.rename(columns={"attribution": "mean"})
    yield from (
        (f"attribution_{stem}", figure, frame)
        for stem, figure, frame in _maps(
            plan, renamed, "", f"attribution: {metric} ({plan.spec.attribution.method})", ""
        )
    )
    both = table.dropna(subset=["exact"])
    if len(both) > 1:
        labels = [described(row) for _, row in both.iterrows()]
        frame = both[["attribution", "exact"]].assign(label=labels)
        correlation = report.findings["attribution_against_patching"]["rank_correlation"]
        yield "attribution_against_patching", figures.scatter(frame, correlation), frame


def _decomposition(plan: PatchPlan, table: pd.DataFrame) -> Iterator[Drawn]:
    model = plan.files.label
    heads = table[table["component"] == "head"]
    if len(heads):
        facets = [("direct logit attribution of heads", heads[["layer", "head", "mean"]])]
        bar = f"share of the {decomposed(plan)}"
        yield "direct_heads", figures.layer_by_head(facets, model, bar), heads
        parts = table[table["component"] != "lens"]
        labels = [_part(row) for _, row in parts.iterrows()]
        frame = parts[["mean", "ci_low", "ci_high"]].assign(label=labels)
        yield "direct_top", figures.bars(frame, bar, plan.spec.figures.top), frame
    lens = table[table["component"] == "lens"]
    if len(lens):
        frame = lens.assign(series="logit lens", x=lens["layer"].astype(int))
        frame = frame[["series", "x", "mean", "ci_low", "ci_high"]]
        figure = figures.lines(frame, f"blocks of {model} that have run", decomposed(plan))
        yield "logit_lens", figure, frame


def _part(row: pd.Series[Any]) -> str:
    """`9.6` for a head, else what it is and its layer."""
    if row["component"] == "head":
        return f"{row['layer']}.{row['head']}"
    layer = "" if pd.isna(row["layer"]) else row["layer"]
    return f"{row['component'].replace('_', ' ')} {layer}".strip()


def _circuit(plan: PatchPlan, report: CircuitReport) -> Iterator[Drawn]:
    units = f"share of {plan.spec.circuit.level}"
    curve = figures.curve(report.curve, report.scores, units)
    yield "faithfulness", curve, report.curve
    edges = _drawn_edges(report)
    if edges:
        names = {edge[end] for edge in edges for end in ("source", "target")}
        nodes = [node for node in report.circuit["nodes"] if node["name"] in names]
        yield "circuit", figures.circuit(nodes, edges, plan.files.label), pd.DataFrame(edges)


def _drawn_edges(report: CircuitReport) -> list[dict[str, Any]]:
    """Edges between nodes: those to a head's queries, keys and values are one."""
    sums: dict[tuple[str, str], float] = {}
    for edge in report.circuit["edges"]:
        ends = edge["source"], node_of(edge["target"])
        sums[ends] = sums.get(ends, 0.0) + edge["score"]
    ranked = sorted(sums.items(), key=lambda item: -abs(item[1]))[:_MOST_EDGES]
    return [{"source": s, "target": t, "score": score} for (s, t), score in ranked]


_MOST_EDGES = 200


def _patterns(plan: PatchPlan, journal: Journal) -> Drawn:
    first = wanted_pairs(plan, journal)[0]
    chosen = plan.spec.figures.patterns
    record = journal[patterns_id(plan, first)]
    tokens = plan.pairs[first].tokens
    arrays = [np.array(pattern) for pattern in record["patterns"]]
    panels = [
        (f"head {layer}.{head}", array) for (layer, head), array in zip(chosen, arrays, strict=True)
    ]
    rows = [
        (f"{layer}.{head}", q, tokens[q], k, tokens[k], float(array[q, k]))
        for (layer, head), array in zip(chosen, arrays, strict=True)
        for q in range(len(tokens))
        for k in range(q + 1)
    ]
    columns = ["head", "query", "query_token", "key", "key_token", "weight"]
    return "patterns", figures.pattern(panels, tokens), pd.DataFrame(rows, columns=columns)
