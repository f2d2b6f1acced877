"""From a journal to tables: results (a row for each label and metric), summary, prompts."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd

from interv.plan import TracePlan
from interv.plan.trace import Label
from interv.report.statistics import sem, uncertainty
from interv.runner.journal import Journal, Record
from interv.runner.trace import wanted_prompts
from interv.spec.schema import ROLES

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

    `mean`, `sem`, `ci_low` and `ci_high` are of the effect; the interval is a 95 % percentile
    bootstrap. `over` says what `n` counts: prompts, where the data has several (a role with
    several tokens is averaged within its prompt first), else the one prompt's noise draws.
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
    uncertain = uncertainty([row[~np.isnan(row)] for row in aligned], plan.spec.seed)
    return _with_uncertainty(table, uncertain, "prompts")


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
    return _with_uncertainty(table, uncertain, "draws")


def _with_uncertainty(table: pd.DataFrame, uncertain: pd.DataFrame, over: str) -> pd.DataFrame:
    extra = uncertain.set_index(table.index)
    out = table.assign(over=over, n=extra["n"])
    return out.assign(**{name: extra[name] for name in ("sem", "ci_low", "ci_high")})


def to_csv(table: pd.DataFrame) -> str:
    """CSV that reads back as the same rows: a bare carriage return would end one."""
    text = table.select_dtypes(include=["object", "string"]).columns
    safe = table.assign(**{c: [str(v).replace("\r", "\\r") for v in table[c]] for c in text})
    return str(safe.to_csv(index=False, lineterminator="\n"))


def prompts_table(plan: TracePlan, journal: Journal) -> pd.DataFrame:
    """One row for each prompt: what it is, whether it was traced, and if not why."""
    wanted = set(wanted_prompts(plan, journal))
    rows = []
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
    columns = ["prompt_id", "prompt", "subject", "subject_first", "subject_last", "answer", "top"]
    columns += ["correct", "p_clean", "p_corrupted", "traced", "left_out_because"]
    return pd.DataFrame(rows, columns=[*columns, "tokens", "spans"])


def as_json(tokens: Sequence[str], spans: Mapping[str, Sequence[int]]) -> tuple[str, str]:
    """A prompt's tokens, and the positions of each of its spans, as a table holds them."""
    places = {name: list(positions) for name, positions in spans.items()}
    return json.dumps(tokens, ensure_ascii=False), json.dumps(places, ensure_ascii=False)
