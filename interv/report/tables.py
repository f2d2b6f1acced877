"""From a journal to tables: results (a row for each label and metric), summary, prompts."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd

from interv.plan import TracePlan
from interv.plan.trace import Label
from interv.report.statistics import INTERVAL, sem, uncertainty
from interv.runner.journal import Journal, Record
from interv.runner.trace import wanted_prompts
from interv.spec.schema import ROLES
from interv.task.left_out import LeftOut

Values = np.ndarray
_SITE = ["component", "layer", "window", "severed"]


def metric_values(record: Record, metric: str) -> Values:
    """A record's values of one metric, `[draw]`."""
    stored = "log_probability" if metric == "probability" else metric
    values: Values = np.asarray(record[stored], dtype=float)
    return np.exp(values) if metric == "probability" else values


def by_site(frame: pd.DataFrame) -> list[tuple[str, int, str, pd.DataFrame]]:
    """The table cut into what belongs in one heat map: component, window, severed, rows."""
    groups = frame.groupby(["component", "window", "severed"], sort=False)
    return [(str(c), int(str(w)), str(s), rows) for (c, w, s), rows in groups]


def results_table(plan: TracePlan, journal: Journal) -> pd.DataFrame:
    """One row for each label and metric of each prompt that was traced.

    `value` and `corrupted` are means over the noise draws, `effect` is their difference, and
    `sem` the standard error of the effect over the draws (the same draws in both: paired).
    """
    rows = []
    wanted = set(wanted_prompts(plan, journal))
    for label in plan.labels:
        if label.prompt not in wanted:
            continue
        base = journal[plan.baselines[label.prompt]]
        record = journal[label.cell.id]
        for metric in plan.spec.metric:
            value = metric_values(record, metric)
            corrupted = metric_values(base["corrupted"], metric)
            clean = metric_values(base["clean"], metric)
            rows.append(
                (
                    *_place(plan, label),
                    metric,
                    value.mean(),
                    clean.mean(),
                    corrupted.mean(),
                    (value - corrupted).mean(),
                    sem(value - corrupted),
                    len(value),
                )
            )
    columns = ["prompt_id", *_SITE, "pos", "token", "role", "metric"]
    columns += ["value", "clean", "corrupted", "effect", "sem", "draws"]
    return pd.DataFrame(rows, columns=columns)


def _place(plan: TracePlan, label: Label) -> tuple[object, ...]:
    cell = label.cell
    token = plan.prompts[label.prompt].tokens[cell.position]
    severed = cell.sever or ""
    site = (cell.component, label.layer, label.window, severed)
    return (label.prompt, *site, cell.position, token, label.role)


def summary_table(plan: TracePlan, journal: Journal, results: pd.DataFrame) -> pd.DataFrame:
    """One row for each place: what is reported, with its uncertainty.

    `mean`, `sem`, `ci_low` and `ci_high` are of the effect; the interval (95 %) is that of
    `uncertainty`, and `no_interval` says why there is none. `over` says what `n` counts: prompts,
    where the data has several (a role with several tokens is averaged within its prompt first, or
    under `average: tokens` over all prompts), else the one prompt's noise draws.
    """
    if len(plan.prompts) == 1:
        return _over_draws(plan, journal, results)
    # A position named by a role is averaged over prompts as that role, whatever its index.
    frame = results.copy()
    named = frame["role"] != ""
    frame["pos"] = frame["pos"].where(~named).astype("Int64")
    frame["token"] = ""
    place = [*_SITE, "pos", "token", "role", "metric"]
    columns = ["value", "clean", "corrupted", "effect"]
    each = frame.groupby([*place, "prompt_id"], sort=False, dropna=False)[columns].mean()
    effects = each["effect"].unstack("prompt_id")
    table = each.groupby(place, sort=False, dropna=False).mean().reset_index()
    table = table.rename(columns={"effect": "mean"})
    keys = pd.MultiIndex.from_frame(table[place])
    aligned = effects.reindex(keys).to_numpy(dtype=float)
    spread = [row[~np.isnan(row)] for row in aligned]
    if plan.spec.average == "tokens":
        spread = _pooled(frame, table, place, spread)
    uncertain = uncertainty(spread, plan.spec.seed)
    table = _with_uncertainty(table, uncertain, "prompts")
    changes = {_named(label) for label in plan.labels if plan.width(label.cell)}
    lines = table[[*_SITE, "pos", "role"]].astype(object)
    lines = lines.where(lines.notna(), None)
    idle = [line not in changes for line in lines.itertuples(index=False, name=None)]
    return with_certain(table, idle)


def _pooled(
    frame: pd.DataFrame, table: pd.DataFrame, place: list[str], spread: Sequence[Values]
) -> list[Values]:
    """Put means over the tokens of all prompts into a summary's roles.

    As `average_causal_effects.ipynb` of Meng et al. 2022 has it: the mean of a role's tokens, whose
    ever they are, less the mean of the corrupted runs over all prompts.

    Args:
        frame: the results.
        table: the summary, whose roles are changed in place.
        place: the columns that name a place.
        spread: for each row each prompt's part in the mean.

    Returns:
        The same for what the rows are now. A role's mean is a ratio, of the sum over tokens and
        their number: a prompt's part is by the delta method.
    """
    ends = frame.groupby(["metric", "prompt_id"])[["clean", "corrupted"]].first()
    groups = [rows for _, rows in frame.groupby(place, sort=False, dropna=False)]
    found = list(spread)
    for i, rows in zip(table.index, groups, strict=True):
        if not rows["role"].iloc[0]:
            continue
        base = ends.loc[str(rows["metric"].iloc[0])]
        mean = rows["value"].mean()
        own = rows.groupby("prompt_id")["value"].agg(["size", "mean"]).reindex(base.index)
        weight = own["size"].fillna(0) * len(base) / len(rows)
        part = mean + weight * (own["mean"].fillna(mean) - mean)
        table.loc[i, ["clean", "corrupted"]] = base.mean()
        table.loc[i, "value"] = mean
        table.loc[i, "mean"] = mean - base["corrupted"].mean()
        found[i] = (part - base["corrupted"]).to_numpy(dtype=float)
    return found


def _named(label: Label) -> tuple[object, ...]:
    """The line of a summary over prompts that a label belongs to."""
    cell, pos = label.cell, None if label.role else label.cell.position
    return (cell.component, label.layer, label.window, cell.sever or "", pos, label.role)


def _over_draws(plan: TracePlan, journal: Journal, results: pd.DataFrame) -> pd.DataFrame:
    [prompt] = plan.prompts
    base = journal[plan.baselines[prompt]]["corrupted"]
    effects = [
        metric_values(journal[label.cell.id], metric) - metric_values(base, metric)
        for label in plan.labels
        for metric in plan.spec.metric
    ]
    uncertain = uncertainty(effects, plan.spec.seed)
    columns = [*_SITE, "pos", "token", "role", "metric", "value", "clean", "corrupted"]
    table = results[columns].assign(mean=results["effect"])
    table = _with_uncertainty(table, uncertain, "draws")
    changes = [plan.width(label.cell) > 0 for label in plan.labels for _ in plan.spec.metric]
    return with_certain(table, [not change for change in changes])


def _with_uncertainty(table: pd.DataFrame, uncertain: pd.DataFrame, over: str) -> pd.DataFrame:
    extra = uncertain.set_index(table.index)
    out = table.assign(over=over, n=extra["n"])
    return out.assign(**{name: extra[name] for name in ("sem", *INTERVAL)})


def with_certain(table: pd.DataFrame, idle: Sequence[bool]) -> pd.DataFrame:
    """Give the rows of places at which nothing can change an interval of width zero.

    Args:
        table: a summary: `mean` and the columns of an interval.
        idle: of each row, whether it is of such a place.
    """
    certain = np.asarray(idle) & (table["no_interval"] != "")
    out = table.copy()
    for end in ("ci_low", "ci_high"):
        out.loc[certain, end] = out.loc[certain, "mean"]
    out.loc[certain, "no_interval"] = ""
    return out


def to_csv(table: pd.DataFrame) -> str:
    """CSV that reads back as the same rows: a bare carriage return would end one."""
    text = table.select_dtypes(include=["object", "string"]).columns
    safe = table.assign(**{c: [str(v).replace("\r", "\\r") for v in table[c]] for c in text})
    return str(safe.to_csv(index=False, lineterminator="\n"))


def prompts_table(plan: TracePlan, journal: Journal) -> pd.DataFrame:
    """One row for each prompt: what it is, whether it was traced, and if not why."""
    wanted = set(wanted_prompts(plan, journal))
    rows: list[tuple[object, ...]] = []
    for index, prompt in plan.prompts.items():
        record = journal[plan.baselines[index]]
        top = plan.files.tokenizer.decode(record["top"]) if plan.files.tokenizer else ""
        reason = "" if index in wanted else f"the model's top answer is {top!r}"
        clean = float(metric_values(record["clean"], "probability").mean())
        corrupted = float(metric_values(record["corrupted"], "probability").mean())
        first, end = prompt.subject
        roles = {role: found for role in ROLES if (found := prompt.role(role))}
        rows.append(
            (
                *(index, prompt.text, prompt.subject_text, first, end - 1, prompt.answer, top),
                *(record["correct"], clean, corrupted, index in wanted, reason),
                *as_json(prompt.tokens, roles),
            )
        )
    rows += [_unused(gone) for gone in plan.left_out]
    columns = ["prompt_id", "prompt", "subject", "subject_first", "subject_last", "answer", "top"]
    columns += ["correct", "p_clean", "p_corrupted", "traced", "left_out_because"]
    table = pd.DataFrame(rows, columns=[*columns, "tokens", "spans"])
    return table.sort_values("prompt_id", kind="stable").reset_index(drop=True)


def _unused(gone: LeftOut) -> tuple[object, ...]:
    """A line of prompts.csv about a row that nothing was computed of."""
    return (gone.index, gone.text, *(None,) * 8, False, gone.reason, "", "")


def as_json(tokens: Sequence[str], spans: Mapping[str, Sequence[int]]) -> tuple[str, str]:
    """A prompt's tokens, and the positions of each of its spans, as a table holds them."""
    places = {name: list(positions) for name, positions in spans.items()}
    return json.dumps(tokens, ensure_ascii=False), json.dumps(places, ensure_ascii=False)
