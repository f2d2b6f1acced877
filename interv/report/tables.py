"""From a journal to tables: results (a row for each label and metric), summary, prompts."""

from __future__ import annotations

import numpy as np
import pandas as pd

from interv.plan import Label, Plan
from interv.run.journal import Journal, Record
from interv.run.trace import wanted_prompts

Values = np.ndarray
_RESAMPLES = 2000
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


def results_table(plan: Plan, journal: Journal) -> pd.DataFrame:
    """One row for each label and metric of each prompt that was traced.

    `value` and `corrupted` are means over the noise draws, `effect` is their difference, and
    `sem` the standard error of the effect over the draws (the same draws in both: paired).
    """
    rows = []
    wanted = set(wanted_prompts(plan, journal))
    for label in plan.labels:
        if label.cell.prompt not in wanted:
            continue
        base = journal[plan.baselines[label.cell.prompt]]
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
                    _sem(value - corrupted),
                    len(value),
                )
            )
    columns = ["prompt_id", *_SITE, "pos", "token", "role", "metric"]
    columns += ["value", "clean", "corrupted", "effect", "sem", "draws"]
    return pd.DataFrame(rows, columns=columns)


def _place(plan: Plan, label: Label) -> tuple[object, ...]:
    cell = label.cell
    token = plan.prompts[cell.prompt].tokens[cell.position]
    severed = cell.sever or ""
    site = (cell.component, label.layer, label.window, severed)
    return (cell.prompt, *site, cell.position, token, label.role)


def summary_table(plan: Plan, journal: Journal, results: pd.DataFrame) -> pd.DataFrame:
    """One row for each place: what is reported, with its uncertainty.

    `mean`, `sem`, `ci_low` and `ci_high` are of the effect; the interval is a 95 % percentile
    bootstrap. `over` says what `n` counts: prompts, where there are several (a role with
    several tokens is averaged within its prompt first), else the one prompt's noise draws.
    """
    if results["prompt_id"].nunique() == 1:
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
    uncertain = [_uncertainty(row[~np.isnan(row)], plan.spec.seed) for row in aligned]
    return _with_uncertainty(table, uncertain, "prompts")


def _over_draws(plan: Plan, journal: Journal, results: pd.DataFrame) -> pd.DataFrame:
    wanted = wanted_prompts(plan, journal)[0]
    labels = [label for label in plan.labels if label.cell.prompt == wanted]
    base = journal[plan.baselines[wanted]]["corrupted"]
    uncertain = [
        _uncertainty(
            metric_values(journal[label.cell.id], metric) - metric_values(base, metric),
            plan.spec.seed,
        )
        for label in labels
        for metric in plan.spec.metric
    ]
    columns = [*_SITE, "pos", "token", "role", "metric", "value", "clean", "corrupted"]
    table = results[columns].assign(mean=results["effect"])
    return _with_uncertainty(table, uncertain, "draws")


def _with_uncertainty(
    table: pd.DataFrame, uncertain: list[tuple[int, float, float, float]], over: str
) -> pd.DataFrame:
    columns = ["n", "sem", "ci_low", "ci_high"]
    extra = pd.DataFrame(uncertain, columns=columns, index=table.index)
    out = table.assign(over=over, n=extra["n"])
    return out.assign(**{name: extra[name] for name in columns[1:]})


def _sem(values: Values) -> float:
    return float(values.std(ddof=1) / np.sqrt(len(values))) if len(values) > 1 else float("nan")


def _uncertainty(values: Values, seed: int) -> tuple[int, float, float, float]:
    """n, standard error, and the ends of a 95 % percentile bootstrap interval of the mean.

    The resamples depend on the seed and n alone, so that places are compared on the same ones.
    """
    n = len(values)
    if n < 2:
        return n, float("nan"), float("nan"), float("nan")
    picks = np.random.default_rng([seed, n]).integers(0, n, size=(_RESAMPLES, n))
    low, high = np.percentile(values[picks].mean(axis=1), [2.5, 97.5])
    return n, _sem(values), float(low), float(high)


def prompts_table(plan: Plan, journal: Journal) -> pd.DataFrame:
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
        rows.append(
            (
                *(index, prompt.text, prompt.subject_text, first, end - 1, prompt.answer, top),
                *(record["correct"], clean, corrupted, index in wanted, reason),
            )
        )
    columns = ["prompt_id", "prompt", "subject", "subject_first", "subject_last", "answer", "top"]
    columns += ["correct", "p_clean", "p_corrupted", "traced", "left_out_because"]
    return pd.DataFrame(rows, columns=columns)
