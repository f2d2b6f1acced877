"""What a run found, in a few sentences made from its tables."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from interv.report.html.folder import Row, RunFolder, number
from interv.report.html.grid import by, level_of, told
from interv.report.html.maps import TRAINED

_TENSORS = 24  # names that are listed
_MOST = 4  # sentences about components or receivers


def headline(run: RunFolder) -> list[str]:
    """Sentences in plain text, the most important first."""
    made: dict[str, Callable[[RunFolder], list[str]]] = {
        "trace": _traced,
        "patch": _patched,
        "train-das": _trained,
        "collect": _collected,
    }
    return made[run.kind](run)


def _over(row: Row) -> str:
    n, over = row["n"], row["over"]
    return f"{n} {over if n != '1' else over.removesuffix('s')}"


def _traced(run: RunFolder) -> list[str]:
    metric = str(run.resolved["metric"][0])
    rows = [row for row in run.table("summary.csv") if row["metric"] == metric]
    words = metric.replace("_", " ")
    first = max(rows, key=lambda row: int(row["n"]))
    sentences = [
        f"With the prompt intact, {run.model} gives the answer a {words} of "
        f"{number(first['clean']):.3g}; with the subject corrupted, "
        f"{number(first['corrupted']):.3g} ({_over(first)})."
    ]
    level = level_of(run)
    sign = -1 if metric == "rank" else 1
    for (component, window, severed), some in list(
        by(rows, "component", "window", "severed").items()
    )[:_MOST]:
        ranked = sorted(some, key=lambda row: -sign * number(row["mean"]))
        best = ranked[0]
        other = next((row for row in ranked if _token(row) != _token(best)), None)
        wide = f"{window} layers around layer" if int(window) > 1 else "layer"
        held = f" with the {severed.replace('_', ' ')} severed" if severed else ""
        sentences.append(
            f"Restoring {component.replace('_', ' ')}{held} has its largest effect at "
            f"{_token(best)} in {wide} {best['layer']}: {told(best, 'mean', level)}, which brings "
            f"the {words} to {number(best['value']):.3g}" + (f"; {_next(other)}." if other else ".")
        )
    return sentences


def _next(row: Row) -> str:
    return f"next is {_token(row)} in layer {row['layer']}: {number(row['mean']):+.3g}"


def _token(row: Row) -> str:
    if row["role"]:
        return f"the {row['role'].replace('_', ' ')} token"
    return f"“{row['token'].strip()}” (position {row['pos']})"


def _patched(run: RunFolder) -> list[str]:
    rows, level = run.table("summary.csv"), level_of(run)
    sentences = []
    metric = rows[0]["metric"] if rows else ""
    some = [row for row in rows if row["metric"] == metric]
    if some:
        words = metric.replace("_", " ")
        sentences.append(
            f"The {words} of {run.model} is {number(some[0]['clean']):.3g} on the clean prompts "
            f"and {_zero(number(some[0]['corrupted'])):.3g} on the corrupted ones; effects are the "
            f"value less that of the {some[0]['relative_to']} run, over {_over(some[0])}."
        )
    for (component, receiver), group in list(by(some, "component", "receiver").items())[:_MOST]:
        best = max(group, key=lambda row: abs(number(row["mean"])))
        ends = f" → {receiver}" if receiver else ""
        sentences.append(
            f"{component.replace('_', ' ').capitalize()}{ends} has its largest effect at "
            f"{place_of(best)}: {told(best, 'mean', level)}."
        )
    return [*sentences, *_findings(run.record)]


def _zero(value: float) -> float:
    """What rounding has left of nothing is nothing."""
    return 0.0 if abs(value) < 1e-9 else value


def _findings(record: Any) -> list[str]:
    sentences = []
    if circuit := record.get("circuit"):
        sentences.append(
            f"A circuit of {circuit['edges_in_circuit']:,} edges between "
            f"{circuit['nodes_in_circuit']:,} nodes has a faithfulness of "
            f"{circuit['faithfulness']:.3g}; over circuits of every size, CPR is "
            f"{circuit['CPR']:.3g} (edges ranked by what they help) and CMD {circuit['CMD']:.3g} "
            f"(by magnitude), on {circuit['evaluated_on']}."
        )
        if n := circuit["sizes_above_1"]:
            sentences.append(
                f"Faithfulness is above 1 at {n} sizes (up to "
                f"{circuit['largest_faithfulness']:.3g}): there CPR is no share of what "
                "the model gains, and a larger CPR is no better."
            )
    if against := record.get("attribution_against_patching"):
        sentence = f"At {against['places']} places attribution was compared with exact patching"
        if "rank_correlation" in against:
            sentence += (
                f": rank correlation {_defined(against['rank_correlation'])}, worst error "
                f"{against['worst_error']:+.3g} ({against['worst_place']})"
            )
        sentences.append(f"{sentence}.")
    if agreement := record.get("paths_against_direct_logit_attribution"):
        sentences.append(
            "Paths to the logits and direct logit attribution of heads have a rank correlation of "
            f"{_defined(agreement['rank_correlation'])}."
        )
    return sentences


def _defined(correlation: float | None) -> str:
    """A correlation in words: of values that do not vary there is none."""
    return "not defined" if correlation is None else f"{correlation:.3f}"


def place_of(row: Row) -> str:
    """A place in few words: `head 9.6`, or its layer and position."""
    parts = [row["set"]] if row["set"] else []
    if row["head"]:
        parts.append(f"head {row['layer']}.{row['head']}")
    elif row["layer"]:
        parts.append(f"layer {row['layer']}")
    if row["neuron"]:
        parts.append(f"neuron {row['neuron']}")
    if row["role"] and row["role"] != "whole":
        parts.append(row["role"])
    elif row["pos"]:
        parts.append(f"position {row['pos']}")
    return ", ".join(parts) or row["component"].replace("_", " ")


def _trained(run: RunFolder) -> list[str]:
    rows = [row for row in run.table("summary.csv") if row["exchanged"] == "any"]
    fits = by(rows, "component", "layer", "pos", "role", "set", "type", "rank")

    def value(some: Sequence[Row], metric: str) -> float:
        return next((number(row["mean"]) for row in some if row["metric"] == metric), math.nan)

    known = {key: some for key, some in fits.items() if math.isfinite(value(some, "iia"))}
    accuracy = float(run.record["task_accuracy"])
    task = f"The model itself has an accuracy of {accuracy:.3f} on the task"
    if not known:
        return [f"{task}; nothing was trained."]
    best = max(known.values(), key=lambda some: value(some, "iia"))
    row = next(row for row in best if row["metric"] == "iia")
    where = [row["set"], row["component"].replace("_", " ")]
    where += [f"layer {row['layer']}" if row["layer"] else "", row["role"] or row["pos"]]
    rank = f" of rank {row['rank']}" if row["rank"] else ""
    variables = " and ".join(map(str, run.resolved["variables"]))
    controls = [
        f"{word} {value(best, metric):.3f}"
        for metric, word in TRAINED.items()
        if metric != "iia" and math.isfinite(value(best, metric))
    ]
    sentence = (
        f"{variables}: the highest interchange intervention accuracy on held-out pairs is "
        f"{number(row['mean']):.3f} (95 % {number(row['ci_low']):.3f} to "
        f"{number(row['ci_high']):.3f}, {int(row['n']):,} pairs), by a "
        f"{row['type'].replace('_', ' ')}{rank} at {', '.join(filter(None, where))}."
    )
    if controls:
        sentence += f" Its controls: {', '.join(controls)}."
    return [sentence, f"{task}."]


def _collected(run: RunFolder) -> list[str]:
    record = run.record
    names = [str(name) for name in record["tensors"]]
    more = f" and {len(names) - _TENSORS:,} more" if len(names) > _TENSORS else ""
    return [
        f"{record['rows']:,} rows of {len(record['tensors']):,} tensors, from "
        f"{record['prompts']:,} prompts, by {run.model}.",
        f"The tensors: {', '.join(names[:_TENSORS])}{more}.",
    ]
