"""All that comes of train-das: tables, findings and figures."""

from __future__ import annotations

import functools
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import asdict
from math import sqrt
from typing import Any

import numpy as np
import pandas as pd
from matplotlib import rc_context
from matplotlib.figure import Figure

from interv.plan import TrainPlan
from interv.plan.train import METRICS, PLACE_COLUMNS, TASK, exchanged_names, vectors_of
from interv.report import das_figures as figures
from interv.report.figures import STYLE, files_of
from interv.report.patch import PatchReport
from interv.report.tables import as_json, to_csv
from interv.runner.journal import Journal
from interv.runner.train import from_bits, shuffled_id
from interv.spec.train import TEMPERED

_Z = 1.959963984540054  # 95 % of a normal distribution
_NAMES = {
    "iia": "trained",
    "iia_full": "whole vector",
    "iia_random": "random directions",
    "iia_shuffled": "shuffled labels",
    TASK: "the task itself",
}
_MOST_BARS = 20


def train_report(plan: TrainPlan, journal: Journal) -> PatchReport:
    """Every table, made from the journal."""
    results = results_table(plan, journal)
    summary = summary_table(results)
    record = journal[plan.baselines[0]]
    tables = {
        "results": results,
        "summary": summary,
        "prompts": prompts_table(plan, journal),
        "curve": curve_table(plan, journal),
    }
    pairs = used_pairs(plan, journal)
    findings = {
        "task_accuracy": record["accuracy"],
        "pairs": {split: counts[0] for split, counts in record["counts"].items()},
        "distinct_pairs": {split: len(set(keys)) for split, keys in pairs.items()},
        "test_pairs_seen_in_training": len(set(pairs["test"]) & set(pairs["train"])),
        "fewer_pairs": plan.shortages,
    }
    plugin = plan.loaded.plugin
    asked = {
        "variables": list(plan.spec.variables),
        "causal_model": plan.causal.name,
        "plugin": plugin.as_dict() if plugin else None,
    }
    return PatchReport(tables, {}, findings, asked)


def results_table(plan: TrainPlan, journal: Journal) -> pd.DataFrame:
    """A row for each fit, metric, and part of the mixture."""
    exchanged = _exchanged(plan, journal)
    rows: list[dict[str, Any]] = []
    for fit in plan.fits:
        marks: dict[str, str] = {}
        for key in (fit.id, shuffled_id(fit)):
            if key in journal:
                record = journal[key]
                marks |= {m: record[m] for m in (*METRICS, TASK) if m in record}
        for metric, text in marks.items():
            for name in exchanged_names(plan.spec):
                counted = [
                    mark == "1"
                    for mark, parts in zip(text, exchanged, strict=True)
                    if mark != "-" and name in ("any", parts)
                ]
                if not counted:
                    continue
                low, high = wilson(sum(counted), len(counted))
                rows.append(
                    {
                        **asdict(fit.place),
                        "seed": fit.seed,
                        "exchanged": name,
                        "metric": metric,
                        "value": sum(counted) / len(counted),
                        "ci_low": low,
                        "ci_high": high,
                        "n": len(counted),
                    }
                )
    columns = [*PLACE_COLUMNS, "seed", "exchanged", "metric", "value", "ci_low", "ci_high", "n"]
    table = pd.DataFrame(rows, columns=columns)
    return table.astype(dict.fromkeys(("layer", "pos", "rank"), "Int64"))


def summary_table(results: pd.DataFrame) -> pd.DataFrame:
    """Means over seeds: `sd` is over seeds, the interval over pairs (Wilson's)."""
    rows = []
    keys = [*PLACE_COLUMNS, "exchanged", "metric"]
    for values, some in results.groupby(keys, sort=False, dropna=False):
        mean, n = float(some["value"].mean()), int(some["n"].iloc[0])
        low, high = wilson(mean * n, n)
        rows.append(
            {
                **dict(zip(keys, values, strict=True)),
                "mean": mean,
                "ci_low": low,
                "ci_high": high,
                "sd": float(some["value"].std(ddof=1)) if len(some) > 1 else np.nan,
                "best": float(some["value"].max()),
                "seeds": len(some),
                "n": n,
            }
        )
    columns = [*keys, "mean", "ci_low", "ci_high", "sd", "best", "seeds", "n"]
    table = pd.DataFrame(rows, columns=columns)
    return table.astype(dict.fromkeys(("layer", "pos", "rank"), "Int64"))


def wilson(right: float, n: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a share (1927)."""
    p, z2 = right / n, _Z * _Z
    centre = (p + z2 / (2 * n)) / (1 + z2 / n)
    half = _Z / (1 + z2 / n) * sqrt(p * (1 - p) / n + z2 / (4 * n * n))
    return max(0.0, centre - half), min(1.0, centre + half)


def _exchanged(plan: TrainPlan, journal: Journal) -> list[str]:
    """What is exchanged in each test pair that is used."""
    names = plan.spec.variables
    used = from_bits(journal[plan.baselines[0]]["used"]["test"]).tolist()
    if plan.causal.is_vector:
        rows = vectors_of(plan, "test").exchanged.tolist()
        parts = ["+".join(n for n, on in zip(names, row, strict=True) if on) for row in rows]
    else:
        parts = ["+".join(e.exchanged) for e in plan.exchanges if e.split == "test"]
    return [part for part, on in zip(parts, used, strict=True) if on]


def prompts_table(plan: TrainPlan, journal: Journal) -> pd.DataFrame:
    """Every pair of prompts, and whether it is used; of vectors how many there are."""
    record = journal[plan.baselines[0]]
    if plan.causal.is_vector:
        rows = [
            {"split": split, "pairs": total, "pairs_used": kept, "used": True}
            for split, (kept, total) in record["counts"].items()
        ]
        return pd.DataFrame(rows)
    used = [on for split in record["used"] for on in from_bits(record["used"][split]).tolist()]
    names, tokenizer = plan.spec.variables, plan.files.tokenizer
    assert tokenizer is not None
    decode = functools.cache(tokenizer.decode)
    marks = [as_json([decode(i) for i in e.base.ids], e.base.spans) for e in plan.exchanges]
    return pd.DataFrame(
        [
            {
                "prompt_id": e.index,
                "split": e.split,
                "base": e.base.text,
                **{
                    f"source_{n}": s.text if n in e.exchanged else ""
                    for n, s in zip(names, e.sources, strict=True)
                },
                "exchanged": "+".join(e.exchanged),
                "answer": e.base.answer,
                "label": e.label,
                "used": on,
                "tokens": tokens,
                "spans": spans,
            }
            for e, on, (tokens, spans) in zip(plan.exchanges, used, marks, strict=True)
        ]
    )


def used_pairs(plan: TrainPlan, journal: Journal) -> dict[str, list[Hashable]]:
    """What tells the pairs that are used apart, by split."""
    record = journal[plan.baselines[0]]
    return {
        split: [key for key, on in zip(keys, from_bits(record["used"][split]), strict=True) if on]
        for split, keys in plan.pairs.items()
    }


def curve_table(plan: TrainPlan, journal: Journal) -> pd.DataFrame:
    """The learning curves: loss, and at the end of each epoch the validation IIA."""
    rows = [
        {**asdict(fit.place), "fit": fit.id, "seed": fit.seed, **point}
        for fit in plan.fits
        if fit.id in journal
        for point in journal[fit.id]["curve"]
    ]
    more = ["fit", "seed", "step", "epoch", "loss", "iia", "temperature", "lr"]
    return pd.DataFrame(rows, columns=[*PLACE_COLUMNS, *more])


Drawn = tuple[str, Figure, pd.DataFrame]


def draw_train(plan: TrainPlan, report: PatchReport) -> Iterator[tuple[str, bytes | str]]:
    """Every figure, and the CSV behind it, as (file name, content)."""
    with rc_context(STYLE):
        for stem, figure, frame in _figures(plan, report.tables):
            yield from files_of(plan.spec.figures, stem, figure)
            yield f"{stem}.csv", to_csv(frame)


def _figures(plan: TrainPlan, tables: Mapping[str, pd.DataFrame]) -> Iterator[Drawn]:
    summary = tables["summary"]
    whole = summary[summary["exchanged"] == "any"]
    single = whole[whole["layer"].notna() & (whole["set"] == "")]
    keys = ["component", "type", "rank"]
    for values, rows in single.groupby(keys, sort=False, dropna=False):
        component, kind, rank = list(values)
        if rows.groupby(["layer", "pos", "role"], dropna=False).ngroups < 2:
            continue
        parts = [
            str(component),
            str(kind),
            *([f"rank{rank}"] if rows["rank"].notna().all() else []),
        ]
        stem = "iia_" + "_".join(parts).replace(".", "_")
        yield stem, *_map(plan, rows)
    if len(summary.groupby([*PLACE_COLUMNS, "exchanged"], dropna=False)) <= _MOST_BARS:
        frame = _bars(summary, tables["results"])
        yield "iia", figures.iia_bars(frame, None), frame.drop(columns="seeds")
    curve = tables["curve"]
    if len(curve):
        frame = curve.assign(fit=labelled(_rows(curve)), iia=curve["iia"].astype(float))
        if not set(curve["type"]) & set(TEMPERED):
            frame = frame.drop(columns="temperature")
        yield "learning_curves", figures.learning_curves(frame), frame
    ranked = single[single["rank"].notna() | (single["metric"] == "iia_full")]
    if ranked["rank"].nunique() > 1 and ranked["type"].nunique() == 1:
        places = [where(row).partition(" rank")[0] for _, row in ranked.iterrows()]
        frame = ranked[["metric", "rank", "mean", "ci_low", "ci_high"]].assign(place=places)
        yield "rank", figures.rank_curve(frame), frame


def _map(plan: TrainPlan, rows: pd.DataFrame) -> tuple[Figure, pd.DataFrame]:
    places = list(dict.fromkeys(zip(rows["role"], rows["pos"].astype(object), strict=True)))
    numbers = {_same(place): i for i, place in enumerate(places)}
    labels = [role or ("" if pd.isna(pos) else str(pos)) for role, pos in places]
    at = [
        numbers[_same(place)]
        for place in zip(rows["role"], rows["pos"].astype(object), strict=True)
    ]
    table = rows.assign(row=at)
    facets = [
        (_NAMES[metric], table.loc[table["metric"] == metric, ["layer", "row", "mean"]])
        for metric in METRICS
        if (table["metric"] == metric).any()
    ]
    facets = [(name, frame.astype({"layer": int})) for name, frame in facets]
    return figures.iia_maps(facets, labels, plan.files.label), rows


def _same(place: tuple[Any, Any]) -> tuple[Any, Any]:
    role, pos = place
    return role, None if pd.isna(pos) else int(pos)


def _bars(summary: pd.DataFrame, results: pd.DataFrame) -> pd.DataFrame:
    keys = [*PLACE_COLUMNS, "exchanged", "metric"]
    seeds = {
        _hashable(values): some["value"].tolist()
        for values, some in results.groupby(keys, sort=False, dropna=False)
    }
    several = summary["exchanged"].nunique() > 1
    frame = summary[summary["metric"].isin(METRICS)]
    return pd.DataFrame(
        {
            "label": [
                label + (f", {exchanged}" if several else "")
                for label, exchanged in zip(labelled(_rows(frame)), frame["exchanged"], strict=True)
            ],
            "metric": frame["metric"],
            "mean": frame["mean"],
            "ci_low": frame["ci_low"],
            "ci_high": frame["ci_high"],
            "seeds": [seeds[_hashable([row[k] for k in keys])] for _, row in frame.iterrows()],
        }
    )


def _rows(frame: pd.DataFrame) -> list[pd.Series[Any]]:
    return [row for _, row in frame.iterrows()]


def _hashable(values: Sequence[Any]) -> tuple[Any, ...]:
    return tuple(None if pd.isna(value) else value for value in values)


def where(row: pd.Series[Any]) -> str:
    """A fit's place and rank in a few words."""
    role = row["role"] or ("" if pd.isna(row["pos"]) else str(row["pos"]))
    layer = "" if pd.isna(row["layer"]) else f"layer {row['layer']}"
    rank = "" if pd.isna(row["rank"]) else f"rank {row['rank']}"
    name = row["set"] or str(row["component"]).replace("_", " ")
    found = " ".join(part for part in (name, layer, role, rank) if part)
    return found or "all sites"


def labelled(rows: Sequence[pd.Series[Any]]) -> list[str]:
    """`where` of each row, with the type if they are of several."""
    several = len({row["type"] for row in rows}) > 1
    return [where(row) + (f", {row['type'].replace('_', ' ')}" if several else "") for row in rows]
