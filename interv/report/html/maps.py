"""A run's heat maps, drawn anew from its tables so that each square tells its value."""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from interv.report.html.charts import HeatMap
from interv.report.html.folder import Row, RunFolder, number, whole
from interv.report.html.grid import Axes, by, heat_map, level_of, told
from interv.report.html.prompts import spans_of, tokens_of

MOST_SQUARES = 24_000  # on a page: about four megabytes
_MOST_FACETS = 12
_ROLES = (
    "first_subject", "middle_subject", "last_subject", "first_subsequent", "further", "last",
    "subject",
)  # fmt: skip
_WORDS = {
    "probability": "p({})",
    "log_probability": "log p({})",
    "logit": "logit of {}",
    "rank": "rank of {}",
}
_COLOURS = {"block": "purple", "resid": "purple", "mlp": "green", "mixer": "green"}
TRAINED = {
    "iia": "trained",
    "iia_full": "whole vector",
    "iia_random": "random directions",
    "iia_shuffled": "shuffled labels",
}


@dataclass
class Group:
    """Heat maps that belong together.

    Attributes:
        left_out: how many are not drawn, the page being large enough already.
        folded: whether it is to be opened first.
    """

    title: str
    maps: list[HeatMap] = field(default_factory=list)
    note: str = ""
    left_out: int = 0
    folded: bool = False


def map_groups(run: RunFolder) -> list[Group]:
    """All heat maps of a run, as many as a page can hold."""
    made = {"trace": _traced, "patch": _patched, "train-das": _trained}
    groups = list(made[run.kind](run)) if run.kind in made else []
    room = MOST_SQUARES
    for group in groups:
        kept: list[HeatMap] = []
        for one in group.maps:
            room -= one.size
            if room >= 0:
                kept.append(one)
        group.left_out = len(group.maps) - len(kept)
        group.maps = kept
    return [group for group in groups if group.maps or group.left_out]


# Causal tracing.


def _traced(run: RunFolder) -> Iterable[Group]:
    summary, results = run.table("summary.csv"), run.table("results.csv")
    prompts = {row["prompt_id"]: row for row in run.table("prompts.csv")}
    metrics = [str(metric) for metric in run.resolved["metric"]]
    level = level_of(run)
    for metric in metrics:
        named = [row for row in summary if row["metric"] == metric and row["role"]]
        roles = sorted(
            {row["role"] for row in named}, key=lambda r: _ROLES.index(r) if r in _ROLES else 99
        )
        labels: dict[Hashable, str] = {role: role.replace("_", " ") for role in roles}
        bar = f"average effect on {_WORDS[metric].format('the answer')}"
        each = by((row for row in results if row["metric"] == metric), "prompt_id").values()
        taken = [number(rows[0]["clean"]) - number(rows[0]["corrupted"]) for rows in each]
        whole = sum(taken) / len(taken)
        if maps := [
            _trace_map(run, site, rows, "mean", labels, "role", bar, level, (0.0, whole))
            for site, rows in by(named, "component", "window", "severed").items()
        ]:
            yield Group(f"Averages by role of the token: {metric.replace('_', ' ')}", maps)
    for count, ((metric, prompt_id), rows) in enumerate(
        by((row for row in results if not row["role"]), "metric", "prompt_id").items()
    ):
        prompt = prompts[prompt_id]
        first, last = int(prompt["subject_first"]), int(prompt["subject_last"])
        labels = {
            int(row["pos"]): row["token"].strip(" ")
            + ("*" if first <= int(row["pos"]) <= last else "")
            for row in sorted(rows, key=lambda row: int(row["pos"]))
        }
        word = _WORDS[metric].format(prompt["answer"].strip())
        corrupted, clean = number(rows[0]["corrupted"]), number(rows[0]["clean"])
        ends = f"clean {clean:.4g}, corrupted {corrupted:.4g}"
        maps = [
            _trace_map(run, site, some, "value", labels, "token", word, level, (corrupted, clean))
            for site, some in by(rows, "component", "window", "severed").items()
        ]
        title = f"{prompt['prompt']} … {prompt['answer'].strip()}"
        yield Group(
            f"{title}: {metric.replace('_', ' ')}" if len(metrics) > 1 else title,
            maps,
            f"{word} after restoring one state; {ends}, the ends of the colours. Tokens of the "
            "subject have a star.",
            folded=count >= 2,
        )


def _trace_map(
    run: RunFolder,
    site: tuple[str, ...],
    rows: Sequence[Row],
    column: str,
    labels: Mapping[Hashable, str],
    side: str,
    bar: str,
    level: str,
    scale: tuple[float, float],
) -> HeatMap:
    component, window, severed = site
    title = f"Restoring {component.replace('_', ' ')}"
    if severed:
        title += f", {severed.replace('_', ' ')} severed"
    wide = int(window) > 1
    axis = f"middle of {window} restored layers" if wide else "restored layer"
    axes = Axes(
        (lambda row: row["role"]) if side == "role" else (lambda row: int(row["pos"])),
        labels,
        side,
        _layer,
        _layers(rows),
        f"{axis} of {run.model}",
    )
    colours = _COLOURS.get(component.split("_")[0], "red")

    def hover(row: Row) -> str:
        place = f"{labels[axes.row(row)]}, layer {row['layer']}"
        if column == "mean":
            return f"{place}: {told(row, 'mean', level)}"
        sem = number(row["sem"])
        spread = f" (standard error {sem:.2g})" if math.isfinite(sem) else ""
        return (
            f"{place}: {number(row['value']):.4g}\neffect {number(row['effect']):+.4g}{spread}, "
            f"draws {row['draws']}"
        )

    return heat_map(title, rows, column, axes, scale, colours, bar, hover)


# Activation patching.


def _patched(run: RunFolder) -> Iterable[Group]:
    where = _Places(run)
    summary = run.table("summary.csv")
    for (metric, receiver), rows in by(summary, "metric", "receiver").items():
        ends = f" → {receiver}" if receiver else ""
        bar = f"effect on {metric.replace('_', ' ')} (value − {rows[0]['relative_to']})"
        maps = list(_patch_maps(run, rows, "mean", where, ends, bar))
        yield Group(f"Effect on {metric.replace('_', ' ')}{ends}", maps)
    attribution = run.table("attribution.csv")
    if attribution:
        method = run.resolved["attribution"]["method"].replace("_", " ")
        bar = f"attribution by {method}, in the units of the metric's plain values"
        yield Group(
            "Attribution", list(_patch_maps(run, attribution, "attribution", where, "", bar))
        )
    heads = [row for row in run.table("decomposition.csv") if row["component"] == "head"]
    if heads:
        title, bar = "direct logit attribution of heads", "share of the logit difference"
        maps = _head_maps(run, {title: heads}, "mean", bar)
        yield Group("Direct logit attribution", maps)


def _patch_maps(
    run: RunFolder, rows: Sequence[Row], column: str, where: _Places, ends: str, bar: str
) -> Iterable[HeatMap]:
    """Layer × position of what has no heads; layer × head, one for each place, of heads."""
    level = level_of(run)
    placed = [row for row in rows if row["layer"] and not row["neuron"] and not row["set"]]
    for (component, window), some in by(placed, "component", "window").items():
        title = component.replace("_", " ") + ends
        if int(window or 1) > 1:
            title += f", {window} layers together"
        if all(row["head"] for row in some):
            facets = {
                f"{title} {where.label(role, pos)}".strip(): of_place
                for (role, pos), of_place in list(by(some, "role", "pos").items())[:_MOST_FACETS]
            }
            yield from _head_maps(run, facets, column, bar)
            continue
        some = [row for row in some if not row["head"]]
        labels: dict[Hashable, str] = {
            place: where.label(*place) or "whole" for place in by(some, "role", "pos")
        }
        axes = Axes(_place, labels, "position", _layer, _layers(some), f"layer of {run.model}")

        def hover(row: Row, labels: Mapping[Hashable, str] = labels) -> str:
            place = f"{labels[_place(row)]}, layer {row['layer']}"
            return f"{place}: {_effect(row, column, level)}"

        limit = _limit(some, column)
        yield heat_map(title, some, column, axes, (-limit, limit), "diverging", bar, hover)


def _effect(row: Row, column: str, level: str) -> str:
    """An effect, and where the tables have them the value itself and what is exact."""
    text = f"{number(row[column]):+.4g}"
    low = number(row.get("ci_low"))
    if math.isfinite(low):
        text += f" ({level} {low:.4g} to {number(row.get('ci_high')):.4g})"
    text += f", n {row['n']}"
    for name, word in (("value", "value"), ("exact", "patched exactly"), ("p_holm", "Holm's p")):
        if row.get(name):
            text += f"\n{word} {number(row[name]):.4g}"
    return text


def _head_maps(
    run: RunFolder, facets: Mapping[str, Sequence[Row]], column: str, bar: str
) -> list[HeatMap]:
    """Layers by heads, on one scale of colours."""
    every = [row for rows in facets.values() for row in rows]
    layers, level = _layers(every), level_of(run)
    heads: dict[Hashable, str] = {
        head: str(head) for head in sorted({whole(row["head"]) or 0 for row in every})
    }
    axes = Axes(
        _layer, layers, f"layer of {run.model}", lambda row: whole(row["head"]), heads, "head"
    )
    limit = _limit(every, column)

    def hover(row: Row) -> str:
        return f"head {row['layer']}.{row['head']}: {_effect(row, column, level)}"

    return [
        heat_map(title, rows, column, axes, (-limit, limit), "diverging", bar, hover)
        for title, rows in facets.items()
    ]


def _limit(rows: Sequence[Row], column: str) -> float:
    """The largest |value|: colours go as far on both sides of zero."""
    sizes = [abs(number(row[column])) for row in rows]
    return max((size for size in sizes if math.isfinite(size)), default=0.0) or 1e-9


class _Places:
    """What a position is called: its span, or its token where all prompts have the same."""

    def __init__(self, run: RunFolder) -> None:
        rows = [row for row in run.table("prompts.csv") if tokens_of(row)]
        self._tokens = [tokens_of(row) for row in rows]
        self._spans = [spans_of(row) for row in rows]

    def label(self, role: str, pos: str) -> str:
        if role:
            return "" if role == "whole" else role
        at = whole(pos)
        if at is None:
            return ""
        names = sorted(
            name
            for name in (self._spans[0] if self._spans else {})
            if name != "END" and all(at in spans.get(name, ()) for spans in self._spans)
        )
        spans = ", ".join(names)
        tokens = {tokens[at] for tokens in self._tokens if at < len(tokens)}
        if len(tokens) == 1:
            return f"{at} {tokens.pop().strip()}" + (f" ({spans})" if spans else "")
        return f"{at} {spans}".strip()


# Distributed alignment search.


def _trained(run: RunFolder) -> Iterable[Group]:
    whole_rows = [
        row
        for row in run.table("summary.csv")
        if row["exchanged"] == "any" and row["layer"] and not row["set"]
    ]
    for (component, kind, rank), rows in by(whole_rows, "component", "type", "rank").items():
        if len(by(rows, "layer", "role", "pos")) < 2:
            continue
        labels: dict[Hashable, str] = {
            place: place[0] or place[1] or "all" for place in by(rows, "role", "pos")
        }
        axes = Axes(_place, labels, "position", _layer, _layers(rows), f"layer of {run.model}")

        def hover(row: Row, labels: Mapping[Hashable, str] = labels) -> str:
            low, high = number(row["ci_low"]), number(row["ci_high"])
            return (
                f"{labels[_place(row)]}, layer {row['layer']}: {number(row['mean']):.3f} "
                f"(95 % {low:.3f} to {high:.3f})\nbest seed {number(row['best']):.3f} of "
                f"{row['seeds']}, {row['n']} pairs"
            )

        metrics = by(rows, "metric")
        title = f"{component.replace('_', ' ')}, {kind.replace('_', ' ')}"
        yield Group(
            title + (f" of rank {rank}" if rank else ""),
            [
                heat_map(word, metrics[metric,], "mean", axes, (0.0, 1.0), "viridis",
                          "interchange intervention accuracy", hover)
                for metric, word in TRAINED.items()
                if (metric,) in metrics
            ],
            "The share of held-out pairs that get the causal model's answer, and its controls.",
        )  # fmt: skip


def _place(row: Row) -> tuple[str, str]:
    return row["role"], row["pos"]


def _layer(row: Row) -> Hashable:
    return whole(row["layer"])


def _layers(rows: Sequence[Row]) -> dict[Hashable, str]:
    return {layer: str(layer) for layer in sorted({int(float(row["layer"])) for row in rows})}
