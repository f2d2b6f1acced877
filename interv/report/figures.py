"""Figures of a trace, as the paper draws them: heat maps, one panel of all, averages as lines."""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from interv.plan import TracePlan
from interv.report.corruption import Corruption, corruption
from interv.report.fonts import fit_fonts, plain
from interv.report.tables import by_site
from interv.spec.run import FiguresSection
from interv.spec.schema import ROLES

MAX_PROMPT_FIGURES = 12
_STATE, _MLP, _ATTENTION = ("state", "Purples"), ("MLP", "Greens"), ("Attn", "Reds")
_KINDS = {"block": _STATE, "resid": _STATE, "mlp": _MLP, "mixer": _MLP}  # all else is attention
_METRIC_WORDS = {
    "probability": "p({})",
    "log_probability": "log p({})",
    "logit": "logit of {}",
    "rank": "rank of {}",
}
# Okabe and Ito's colours: told apart by colour-blind eyes.
_ROLE_COLOURS = dict(
    zip(ROLES, ("#999999", "#56B4E9", "#D55E00", "#009E73", "#CC79A7", "#0072B2"), strict=True)
)
STYLE: Any = {
    "font.size": 8,
    "axes.titlesize": 8,
    "svg.hashsalt": "interv",
    "svg.fonttype": "path",
    "figure.max_open_warning": 0,
}


@dataclass(frozen=True)
class Map:
    """One heat map.

    Attributes:
        values: `[row, layer]`.
        rows: their labels.
        clean, corrupted: what the values are in these runs: the ends of the colours.
        bar: what the colours measure.
        warning: why it shows little; empty where it does not.
    """

    name: str
    component: str
    window: int
    severed: str
    values: np.ndarray
    layers: Sequence[int]
    rows: Sequence[str]
    clean: float
    corrupted: float
    bar: str
    warning: str

    @property
    def title(self) -> str:
        kind = _kind(self.component)[0]
        severed = f"\n{self.severed.replace('_', ' ')} severed" if self.severed else ""
        what = (
            kind
            if self.component in ("block_output", "mlp_output", "attention_output")
            else (self.component.replace("_", " "))
        )
        return f"Impact of restoring {what} after corrupted input{severed}"

    def axis(self, model: str) -> str:
        if self.window == 1:
            return f"single restored layer within {model}"
        kind = _kind(self.component)[0]
        return f"center of interval of {self.window} restored {kind} layers"


def _kind(component: str) -> tuple[str, str]:
    """What a component is called in a figure, and its colours."""
    return _KINDS.get(component.split("_")[0], _ATTENTION)


def draw(
    plan: TracePlan, results: pd.DataFrame, summary: pd.DataFrame, prompts: pd.DataFrame
) -> list[tuple[str, bytes]]:
    """Every figure of a run, as (file name, content)."""
    judged = {
        int(row["prompt_id"]): corruption([(row["p_clean"], row["p_corrupted"])])
        for row in prompts.to_dict("records")
        if row["traced"]
    }
    with rc_context(STYLE):
        return list(_draw(plan, results, summary, judged))


def _draw(
    plan: TracePlan,
    results: pd.DataFrame,
    summary: pd.DataFrame,
    judged: Mapping[int, Corruption],
) -> Iterator[tuple[str, bytes]]:
    model = plan.files.label
    for stem, maps in _maps(plan, results, summary, judged):
        for one in maps:
            yield from files_of(plan.spec.figures, f"{stem}_{one.name}", _heatmaps([one], model))
        if len(maps) > 1:
            yield from files_of(plan.spec.figures, f"{stem}_panel", _heatmaps(maps, model))
    for metric in plan.spec.metric:
        averages = summary[(summary["metric"] == metric) & (summary["role"].isin(ROLES))]
        if len(averages) and (summary["over"] == "prompts").any():
            suffix = _suffix(plan, metric)
            yield from files_of(
                plan.spec.figures,
                f"lines{suffix}",
                _lines(averages, metric, model, _together(judged).short),
            )


def _together(judged: Mapping[int, Corruption]) -> Corruption:
    return corruption((one.clean, one.corrupted) for one in judged.values())


def _suffix(plan: TracePlan, metric: str) -> str:
    return f"_{metric}" if len(plan.spec.metric) > 1 else ""


def _maps(
    plan: TracePlan,
    results: pd.DataFrame,
    summary: pd.DataFrame,
    judged: Mapping[int, Corruption],
) -> Iterator[tuple[str, list[Map]]]:
    """Heat maps that belong on one panel, and the stem of their files' names."""
    ids = list(dict.fromkeys(results["prompt_id"]))
    for metric in plan.spec.metric:
        suffix = _suffix(plan, metric)
        by_token = results[(results["metric"] == metric) & (results["role"] == "")]
        for index in ids[:MAX_PROMPT_FIGURES]:
            prompt = plan.prompts[index]
            first, end = prompt.subject
            labels = [
                t.strip() + ("*" if first <= i < end else "") for i, t in enumerate(prompt.tokens)
            ]
            word = _METRIC_WORDS[metric].format(prompt.answer.strip())
            of_prompt = by_token[by_token["prompt_id"] == index]
            ends = of_prompt[["clean", "corrupted"]]
            maps = [
                _map(
                    site,
                    _several(of_prompt, site),
                    frame,
                    "pos",
                    "value",
                    dict(enumerate(labels)),
                    tuple(ends.iloc[0]),
                    word,
                    judged[index].short,
                )
                for *site, frame in by_site(of_prompt)
            ]
            if maps:
                stem = "trace" if len(ids) == 1 else f"trace_prompt{index}"
                yield stem + suffix, maps
        by_role = summary[(summary["metric"] == metric) & (summary["role"] != "")]
        named = [*ROLES, "subject", *dict.fromkeys(by_role["role"])]
        roles = [r for r in dict.fromkeys(named) if (by_role["role"] == r).any()]
        words = {r: r.replace("_", " ") + ("*" if "subject" in r else "") for r in roles}
        bar = f"average effect on {_METRIC_WORDS[metric].format('answer')}"
        # The largest effect that there could be: what the corruption takes, over all prompts.
        each = results[results["metric"] == metric].groupby("prompt_id")[["clean", "corrupted"]]
        ends = each.first().mean()
        whole = float(ends["clean"] - ends["corrupted"])
        maps = [
            _map(
                site,
                _several(by_role, site),
                frame,
                "role",
                "mean",
                words,
                (whole, 0.0),
                bar,
                _together(judged).short,
            )
            for *site, frame in by_site(by_role)
        ]
        if maps:
            yield "average" + suffix, maps


def _several(frame: pd.DataFrame, site: list[Any]) -> bool:
    """Whether a site's component is there with more than one window."""
    return int(frame.loc[frame["component"] == site[0], "window"].nunique()) > 1


def _map(
    site: list[Any],
    windows: bool,
    frame: pd.DataFrame,
    row: str,
    column: str,
    labels: Mapping[Any, str],
    ends: tuple[float, float],
    bar: str,
    warning: str,
) -> Map:
    component, window, severed = site
    table = frame.pivot_table(index=row, columns="layer", values=column, aggfunc="mean")
    table = table.loc[[key for key in labels if key in table.index]]
    name = component + (f"_window{window}" if windows else "")
    name += f"_without_{severed}" if severed else ""
    rows = [labels[key] for key in table.index]
    layers = [int(layer) for layer in table.columns]
    values = table.to_numpy()
    return Map(name, component, window, severed, values, layers, rows, *ends, bar, warning)


def _heatmaps(maps: Sequence[Map], model: str) -> Figure:
    longest = max(len(label) for m in maps for label in m.rows)
    width = max(4.2, 1.9 + 0.075 * len(maps[0].layers) + 0.06 * longest)
    height = max(2.2, 1.2 + 0.19 * max(len(m.rows) for m in maps))
    figure = Figure(figsize=(width * len(maps), height), layout="constrained")
    _warn(figure, maps[0].warning)
    for axes, one in zip(figure.subplots(1, len(maps), squeeze=False)[0], maps, strict=True):
        _heatmap(figure, axes, one, model)
    return figure


def _heatmap(figure: Figure, axes: Axes, one: Map, model: str) -> None:
    # Strong colour for the clean value and none for the corrupted one, whichever is larger: a trace
    # that restores little looks like one.
    cmap = _kind(one.component)[1] + ("_r" if one.clean < one.corrupted else "")
    low, high = sorted((one.clean, one.corrupted))
    finite = one.values[np.isfinite(one.values)]
    below, above = bool((finite < low).any()), bool((finite > high).any())
    extend = {(0, 0): "neither", (1, 0): "min", (0, 1): "max", (1, 1): "both"}[below, above]
    edges = np.arange(len(one.layers) + 1), np.arange(len(one.rows) + 1)
    # Pixels, not a thousand paths: the same picture in an SVG a tenth as large.
    mesh = axes.pcolormesh(
        *edges, one.values, rasterized=True, cmap=cmap, vmin=low, vmax=max(high, low + 1e-9)
    )
    axes.invert_yaxis()
    axes.set_yticks(np.arange(len(one.rows)) + 0.5, [plain(label) for label in one.rows])
    ticks = [i for i, layer in enumerate(one.layers) if layer % 5 == 0 or len(one.layers) <= 16]
    axes.set_xticks([i + 0.5 for i in ticks], [str(one.layers[i]) for i in ticks])
    axes.set_title(one.title)
    axes.set_xlabel(plain(one.axis(model)))
    bar = figure.colorbar(mesh, ax=axes, extend=extend)
    bar.set_label(plain(one.bar))


def _warn(figure: Figure, warning: str) -> None:
    if warning:
        figure.suptitle(warning, color="#b00020", fontsize=8)


def _lines(summary: pd.DataFrame, metric: str, model: str, warning: str) -> Figure:
    """Average effect by role over layers, with 95 % intervals over prompts."""
    groups = by_site(summary)
    figure = Figure(figsize=(3.8 * len(groups), 2.9), layout="constrained")
    _warn(figure, warning)
    panels = figure.subplots(1, len(groups), squeeze=False, sharey=True)[0]
    for axes, (component, window, severed, frame) in zip(panels, groups, strict=True):
        for role in ROLES:
            line = frame[frame["role"] == role].sort_values("layer")
            if len(line):
                colour = _ROLE_COLOURS[role]
                layers, mean = line["layer"].to_numpy(), line["mean"].to_numpy()
                axes.plot(layers, mean, color=colour, lw=1.2, label=role.replace("_", " "))
                low, high = line["ci_low"].to_numpy(), line["ci_high"].to_numpy()
                axes.fill_between(layers, low, high, color=colour, alpha=0.2, lw=0)
        axes.axhline(0, color="#bbbbbb", lw=0.6)
        kind = component.replace("_", " ") + (f", window {window}" if window > 1 else "")
        axes.set_title(kind + (f", {severed.replace('_', ' ')} severed" if severed else ""))
        axes.set_xlabel(plain(f"layer of {model}"))
    panels[0].set_ylabel(f"average effect on {_METRIC_WORDS[metric].format('answer')}")
    panels[-1].legend(fontsize=7, frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def files_of(section: FiguresSection, stem: str, figure: Figure) -> Iterator[tuple[str, bytes]]:
    """A figure in each of the formats asked for, as (file name, content)."""
    # The same run writes the same bytes: no dates.
    fit_fonts(figure)
    dates = {"png": {}, "svg": {"Date": None}, "pdf": {"CreationDate": None}}
    for kind in section.formats:
        buffer = io.BytesIO()
        figure.savefig(buffer, format=kind, dpi=section.dpi, metadata=dates[kind])
        yield f"{stem}.{kind}", buffer.getvalue()
