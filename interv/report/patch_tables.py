"""Tables of a patch: results (a row for each place, pair and metric), their summary, and more."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import numpy as np
import pandas as pd

from interv.plan import PatchPlan
from interv.plan.grid import Place
from interv.plan.patch import PLACE_COLUMNS
from interv.report.statistics import (
    INTERVAL,
    correlation,
    holm,
    rank_correlation,
    sem,
    sign_flip_tests,
    uncertainty,
)
from interv.report.tables import as_json, with_certain
from interv.runner.journal import Journal
from interv.runner.patch_steps import attributed, part_id
from interv.runner.values import baseline_values, plain_values, scale, wanted_pairs
from interv.spec.metrics import MetricName

_WHOLE = ("layer", "window", "head", "neuron", "pos")


def results_table(plan: PatchPlan, journal: Journal) -> pd.DataFrame:
    """One row for each place and metric of each pair that was patched.

    `value` is the mean over draws, `effect` its difference from the base run's, and `sem` the
    standard error over draws.
    """
    wanted = set(wanted_pairs(plan, journal))
    rows: list[dict[str, Any]] = []
    for metric in plan.metrics:
        shift, divisor = scale(plan, journal, metric)
        clean = baseline_values(plan, journal, metric, "clean")
        corrupted = baseline_values(plan, journal, metric, "corrupted")
        base = corrupted if plan.relative_to == "corrupted" else clean
        for label in plan.labels:
            index = label.prompt
            if index not in wanted or label.cell.id not in journal:
                continue
            pair = plan.pairs[index]
            values = plain_values(journal[label.cell.id], metric.of, pair, metric.top)
            values = (values - shift) / divisor
            own = (base[index] - shift) / divisor
            rows.append(
                {
                    "prompt_id": index,
                    **asdict(label.place),
                    "token": _token(plan, label.place, index),
                    "metric": metric.name,
                    "value": values.mean(),
                    "clean": (clean[index] - shift) / divisor,
                    "corrupted": (corrupted[index] - shift) / divisor,
                    "effect": values.mean() - own,
                    "relative_to": plan.relative_to,
                    "sem": sem(values),
                    "draws": len(values),
                }
            )
    columns = ["prompt_id", *PLACE_COLUMNS, "token", "metric", "value", "clean", "corrupted"]
    table = pd.DataFrame(rows, columns=[*columns, "effect", "relative_to", "sem", "draws"])
    return table.astype(dict.fromkeys(_WHOLE, "Int64"))


def _token(plan: PatchPlan, place: Place, index: int) -> str:
    return plan.pairs[index].tokens[place.pos] if place.pos is not None else ""


def summary_table(plan: PatchPlan, results: pd.DataFrame) -> pd.DataFrame:
    """One row for each place and metric: means over pairs, and of the effect its uncertainty.

    `mean`, `sem` and the interval are of the effect, which is the value less that of the run
    named in `relative_to`; with `statistics.test` also `p`, of sign flips over pairs, and
    `p_holm`, corrected for all places of the metric.
    """
    statistics = plan.spec.statistics
    place = [*PLACE_COLUMNS, "metric"]
    columns = ["value", "clean", "corrupted"]
    if results.empty:
        extra = ["mean", "relative_to", "over", "n", "sem", *INTERVAL]
        return pd.DataFrame(columns=[*place, *columns, *extra])
    grouped = results.groupby(place, sort=False, dropna=False)
    table = grouped[columns].mean()
    effects = [group.to_numpy(dtype=float) for _, group in grouped["effect"]]
    table = table.assign(mean=[e.mean() for e in effects], relative_to=plan.relative_to)
    table = table.reset_index()
    known = {metric.name: metric for metric in plan.metrics}
    spread = [_linearised(known[str(key[-1])], rows) for key, rows in grouped]
    found = uncertainty(spread, plan.spec.seed, statistics.level, statistics.resamples)
    table = table.assign(over="prompts", n=found["n"].to_numpy())
    for name in ("sem", *INTERVAL):
        table[name] = found[name].to_numpy()
    table = _with_certain(plan, table)
    if statistics.test:
        table["p"] = sign_flip_tests(effects, plan.spec.seed, statistics.permutations)
        table["p_holm"] = np.nan
        for _, rows in table.groupby("metric", sort=False):
            table.loc[rows.index, "p_holm"] = holm(rows["p"].to_numpy(dtype=float))
    return table


def _with_certain(plan: PatchPlan, table: pd.DataFrame) -> pd.DataFrame:
    """Give places at which no patch changes anything the interval that is known: of width zero.

    A patch before the first token that differs puts back what is there already.
    """
    changes = {label.place for label in plan.labels if plan.width(label.cell)}
    idle = {tuple(asdict(place).values()) for place in plan.places if place not in changes}
    keys = [place_key(row) for _, row in table[list(PLACE_COLUMNS)].iterrows()]
    return with_certain(table, [key in idle for key in keys])


def _linearised(metric: MetricName, rows: pd.DataFrame) -> np.ndarray:
    """Each pair's part in the mean effect and in its spread.

    A normalised effect is a ratio of means, r = x̄ / d̄, which is as sure as the x − r d of the
    pairs are near each other (the delta method): what moves both is no uncertainty.
    """
    effect = rows["effect"].to_numpy(dtype=float)
    if not metric.normalised:
        return effect
    clean, corrupted, value = (
        rows[name].to_numpy(dtype=float) for name in ("clean", "corrupted", "value")
    )
    # What the pair itself adds to the divisor, whose mean is 1.
    own = clean - corrupted if metric.normalised == "recovery" else 1 + value - effect
    linearised: np.ndarray = effect - effect.mean() * (own - own.mean())
    return linearised


def prompts_table(plan: PatchPlan, journal: Journal) -> pd.DataFrame:
    """One row for each pair: what it is, whether it was patched, and if not why."""
    wanted = set(wanted_pairs(plan, journal))
    reasons = {
        "correct": "the model's top answer is {top!r}",
        "preferred": "the model prefers a wrong answer",
        "all": "",
    }
    rows: list[dict[str, Any]] = []
    values = {
        (metric.of, run): baseline_values(plan, journal, metric, run)
        for metric in plan.metrics
        for run in ("clean", "corrupted")
    }
    for index, pair in plan.pairs.items():
        record = journal[plan.baselines[index]]
        top = plan.files.tokenizer.decode(record["top"]) if plan.files.tokenizer else ""
        patched = index in wanted
        reason = "" if patched else reasons[plan.spec.data.keep].format(top=top)
        tokens, spans = as_json(pair.tokens, pair.spans)
        others, _ = as_json(pair.corrupted_tokens, {})
        rows.append(
            {
                "prompt_id": index,
                "prompt": pair.text,
                "corrupted_prompt": pair.corrupted_text,
                "answer": " | ".join(pair.answers),
                "wrong": " | ".join(pair.wrong),
                "top": top,
                "correct": record["correct"],
                "preferred": record["preferred"],
                **{f"{run}_{of}": found.get(index, np.nan) for (of, run), found in values.items()},
                "group": pair.group,
                "stand_ins": len(plan.drawn[index]) if plan.drawn else None,
                "patched": patched,
                "left_out_because": reason,
                "tokens": tokens,
                "corrupted_tokens": others,
                "spans": spans,
            }
        )
    rows += [
        {
            "prompt_id": gone.index,
            "prompt": gone.text,
            "patched": False,
            "left_out_because": gone.reason,
            **dict.fromkeys(("tokens", "corrupted_tokens", "spans"), ""),
        }
        for gone in plan.left_out
    ]
    table = pd.DataFrame(rows).sort_values("prompt_id", kind="stable").reset_index(drop=True)
    return table.astype({"stand_ins": "Int64"})


def attribution_table(plan: PatchPlan, journal: Journal, summary: pd.DataFrame) -> pd.DataFrame:
    """One row for each place: its attribution, and beside it what exact patching gave.

    In the units of the first metric's plain values; `exact` is empty where nothing was patched.
    """
    values = attributed(plan, journal)
    by_place: dict[Place, list[float]] = {}
    for label in plan.labels:
        if label.cell.id in values:
            by_place.setdefault(label.place, []).append(values[label.cell.id])
    metric = plan.metrics[0]
    _, divisor = scale(plan, journal, metric)
    statistics = plan.spec.statistics
    found = uncertainty(
        [np.array(v) for v in by_place.values()],
        plan.spec.seed,
        statistics.level,
        statistics.resamples,
    )
    table = pd.DataFrame([asdict(place) for place in by_place], columns=list(PLACE_COLUMNS))
    table = table.assign(attribution=[float(np.mean(v)) for v in by_place.values()])
    for name in ("n", *INTERVAL):
        table[name] = found[name].to_numpy()
    of_metric = summary[summary["metric"] == metric.name]
    keys = [place_key(row) for _, row in of_metric[list(PLACE_COLUMNS)].iterrows()]
    exact = dict(zip(keys, of_metric["mean"] * divisor, strict=True))
    table = table.astype(dict.fromkeys(_WHOLE, "Int64"))
    table["exact"] = [
        exact.get(place_key(row), np.nan) for _, row in table[list(PLACE_COLUMNS)].iterrows()
    ]
    return table.assign(error=table["attribution"] - table["exact"])


def place_key(row: pd.Series[Any]) -> tuple[object, ...]:
    """A place's columns, comparable: nothing is None."""
    return tuple(None if pd.isna(value) else value for value in row)


def verification(table: pd.DataFrame) -> dict[str, Any]:
    """How near attribution comes to exact patching, at the places where both are known."""
    both = table.dropna(subset=["exact"])
    if len(both) < 2:
        return {"places": len(both)}
    worst = both.iloc[int(both["error"].abs().to_numpy().argmax())]
    return {
        "places": len(both),
        **_correlations(both["attribution"].to_numpy(), both["exact"].to_numpy()),
        "worst_error": float(worst["error"]),
        "worst_place": described(worst),
    }


def _correlations(a: np.ndarray, b: np.ndarray) -> dict[str, Any]:
    """Return the correlation of values and of their ranks; where there is none, None and why."""
    found = {"rank_correlation": rank_correlation(a, b), "correlation": correlation(a, b)}
    if np.isfinite(list(found.values())).all():
        return dict(found)
    why = "no correlation is defined: one of the two does not vary over these places"
    return {**dict.fromkeys(found), "correlation_note": why}


def described(row: pd.Series[Any]) -> str:
    """A place in few words: `9.6` for a head, else its component, layer and position."""
    parts = []
    if row["set"]:
        parts.append(str(row["set"]))
    if not pd.isna(row["head"]):
        parts.append(f"{row['layer']}.{row['head']}")
    elif not pd.isna(row["layer"]):
        parts.append(f"{row['component']} {row['layer']}")
    if not pd.isna(row["neuron"]):
        parts.append(f"neuron {row['neuron']}")
    if row["role"] and row["role"] != "whole":
        parts.append(f"at {row['role']}")
    elif not pd.isna(row["pos"]):
        parts.append(f"at {row['pos']}")
    if row["receiver"] and row["receiver"] != "logits":
        parts.append(f"→ {row['receiver']}")
    return " ".join(parts) or str(row["component"])


def decomposed(plan: PatchPlan) -> str:
    """What is decomposed: the answer's logit, less the mean of others' or not."""
    compared = {bool(pair.wrong_ids) for pair in plan.pairs.values()}
    alone = "logit" if plan.spec.decompose.unembedding == "raw" else _CENTRED
    return " or ".join("logit difference" if wrong else alone for wrong in sorted(compared))


_CENTRED = "logit − mean over the vocabulary"


def decomposition_table(plan: PatchPlan, journal: Journal) -> pd.DataFrame:
    """Direct logit attributions of every part, and the logit lens (`component` is `lens`).

    `mean` is over the clean prompts, of what `of` names. The lens of layer l reads the stream
    after l blocks.
    """
    records = [journal[part_id(plan, index, "decompose")] for index in wanted_pairs(plan, journal)]
    places: list[tuple[Any, ...]] = []
    groups: list[np.ndarray] = []
    if "parts" in records[0]:
        places += [tuple(part) for part in records[0]["parts"]]
        groups += list(np.array([record["direct"] for record in records]).T)
    if "lens" in records[0]:
        lens = np.array([record["lens"] for record in records]).T
        places += [("lens", layer, None) for layer in range(len(lens))]
        groups += list(lens)
    table = pd.DataFrame(places, columns=["component", "layer", "head"])
    table["of"] = decomposed(plan)
    statistics = plan.spec.statistics
    found = uncertainty(groups, plan.spec.seed, statistics.level, statistics.resamples)
    table = table.assign(mean=[float(g.mean()) for g in groups], n=found["n"].to_numpy())
    for name in ("sem", *INTERVAL):
        table[name] = found[name].to_numpy()
    return table.astype({"layer": "Int64", "head": "Int64"})


_TOP_HEADS = 20


def paths_against_direct(
    plan: PatchPlan, summary: pd.DataFrame, direct: pd.DataFrame
) -> dict[str, Any]:
    """How heads' paths to the logits agree with their direct attribution; empty without either.

    A head's path is patched out of the clean run, or into the corrupted one: the first lowers
    what the head adds. Most heads write next to nothing to the logits and their order is chance,
    so that ranks are compared among the twenty with the largest paths too.
    """
    metric: MetricName = plan.metrics[0]
    paths = summary[
        (summary["receiver"] == "logits")
        & (summary["metric"] == metric.name)
        & summary["head"].notna()
    ]
    heads = direct[direct["component"] == "head"]
    both = paths.merge(heads, on=["layer", "head"], suffixes=("", "_direct"))
    if len(both) < 3:
        return {}
    sign = 1.0 if plan.relative_to == "corrupted" else -1.0
    first = sign * both["mean"].to_numpy(dtype=float)
    second = both["mean_direct"].to_numpy(dtype=float)
    top = np.argsort(-np.abs(first), kind="stable")[:_TOP_HEADS]
    return {
        **_correlations(first, second),
        f"rank_correlation_of_top_{len(top)}": _correlations(first[top], second[top])[
            "rank_correlation"
        ],
    }
