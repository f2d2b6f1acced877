"""Figures of train-das: each a function from a table to a figure.

IIA is interchange intervention accuracy, from 0 to 1 on every scale here.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence

import numpy as np
import pandas as pd
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from interv.report.fonts import plain
from interv.report.patch_figures import (
    _ABSENT,
    _CHARACTER,
    _GREY,
    _SERIES,
    _colour_bar,
    _floats,
    _mesh,
    _numbers,
    _open,
    _pivot,
    _short,
    _ticks,
    _values,
    _wrapped,
)

MAX_GROUPS, MAX_FITS, MAX_PLACES = 20, 8, len(_SERIES)
_IIA = "interchange intervention accuracy"
_MAP_COLOURS = "viridis"
_DOTS = 0.105  # inches between one metric's dots and the next's
_MAX_NUMBERS = 150  # squares of a map, if their values are to be printed
# Of each metric: what it is called, its colour (Okabe and Ito's), its marker and its dashes.
_METRICS = {
    "iia": ("trained", "#0072B2", "o", "-"),
    "iia_full": ("whole vector", "#009E73", "s", "--"),
    "iia_random": ("random subspace", "#D55E00", "D", ":"),
    "iia_shuffled": ("shuffled labels", "#CC79A7", "^", "-."),
}


def iia_maps(
    facets: Sequence[tuple[str, pd.DataFrame]], labels: Sequence[str], model: str
) -> Figure:
    """Heat maps of positions (rows, the first on top) by layers, all on one scale from 0 to 1.

    The first is the largest. The others, its controls, are beside it, their rows in line with
    its rows; where that would be too wide, they are below it, their layers below its layers.

    Args:
        facets: of each its title and its table: columns `row` (an index into labels), `layer` and
            `mean`; a row for each square. Squares that are not in a table, and those whose mean is
            NaN, are grey. The first is of what was trained.
    """
    layers = _values(facets, "layer")
    grids = [_pivot(table, "row", "layer", range(len(labels)), layers) for _, table in facets]
    names = [_short(label) for label in labels]
    aside, size, sizes = _arranged(len(facets), len(layers), names)
    figure = Figure(figsize=size, layout="constrained")
    widths, heights = zip(*sizes, strict=True)
    if aside:
        panels = figure.subplots(1, len(facets), squeeze=False, width_ratios=widths)
    else:
        panels = figure.subplots(len(facets), 1, squeeze=False, height_ratios=heights)
    scale = Normalize(0, 1)
    for i, (axes, grid, (wide, high)) in enumerate(zip(panels.flat, grids, sizes, strict=True)):
        _mesh(axes, grid, _MAP_COLOURS, scale)
        axes.set_facecolor(_ABSENT)
        _print_values(axes, grid, scale, wide, high)
        _ticks(axes, "x", _numbers(layers) if aside or i == len(facets) - 1 else [], wide)
        _ticks(axes, "y", names if not aside or i == 0 else [], high)
        most = max(12, int(wide / _CHARACTER))
        axes.set_title(_wrapped(facets[i][0], most), fontweight="normal" if i else "bold")
        if i == 0 and aside:
            axes.set_xlabel(_wrapped(f"layer of {model}", most))
        elif aside or i == len(facets) - 1:
            axes.set_xlabel("layer" if aside else plain(f"layer of {model}"))
    bar = ScalarMappable(scale, _MAP_COLOURS)
    _colour_bar(figure, list(panels.flat), bar, _IIA, (size[0], size[1] - 0.5))
    return figure


def iia_bars(frame: pd.DataFrame, chance: float | None) -> Figure:
    """IIA with its interval for each group, the controls beside what was trained.

    Groups are in the table's order; of more than `MAX_GROUPS`, those of the highest IIA.

    Args:
        frame: columns `label`, `metric` (iia, iia_full, iia_random or iia_shuffled), `mean`,
            `ci_low`, `ci_high` and `seeds`, a list of the values of the single seeds; a row for
            each label and metric. Intervals may be NaN, and metrics not be there.
        chance: what guessing gets; None if that is not known.
    """
    groups = list(dict.fromkeys(frame["label"]))
    shown = set(_highest(frame[frame["metric"] == "iia"], "label", "mean", groups, MAX_GROUPS))
    labels = [label for label in groups if label in shown]
    metrics = [metric for metric in _METRICS if (frame["metric"] == metric).any()]
    names = [_short(str(label), 48) for label in labels]
    step = _DOTS * max(len(metrics), 2) + 0.06  # inches of a group
    wide = 5.2 + _CHARACTER * max(map(len, names), default=0)
    # A legend of five lines has to fit beside a single group.
    figure = Figure(figsize=(wide, 0.9 + max(step * len(names), 0.8)), layout="constrained")
    axes = figure.subplots()
    if chance is not None:
        axes.axvline(chance, color="#555555", lw=0.9, ls="--", zorder=1, label="chance")
    for i in range(0, len(names), 2):
        axes.axhspan(i - 0.5, i + 0.5, color="#f4f4f4", lw=0, zorder=0)
    for i, metric in enumerate(metrics):
        word, colour, marker, _ = _METRICS[metric]
        one = frame[frame["metric"] == metric].set_index("label").reindex(labels)
        mean, low, high = _floats(one, "mean", "ci_low", "ci_high")
        at = np.arange(len(labels)) + (i - (len(metrics) - 1) / 2) * _DOTS / step
        for y, seeds in zip(at, one["seeds"], strict=True):
            # One seed is the mean itself.
            if isinstance(seeds, list | tuple | np.ndarray) and len(seeds) > 1:
                heights = [y] * len(seeds)
                axes.scatter(seeds, heights, 16, colour, marker=marker, alpha=0.3, lw=0, zorder=2)
        axes.hlines(at, low, high, color=colour, lw=0.9, zorder=3)
        axes.plot(
            mean, at, marker, color=colour, ms=3.8, mec="white", mew=0.3, zorder=4, label=word
        )
    axes.set_yticks(np.arange(len(names)), [plain(name) for name in names])
    axes.tick_params(axis="y", length=0)
    axes.set_ylim(max(len(names), 1) - 0.5, -0.5)
    axes.set_xlim(-0.02, 1.02)
    axes.set_xlabel(_IIA)
    if len(labels) < len(groups):
        axes.set_title(f"the {len(labels)} highest of {len(groups)}")
    axes.legend(fontsize=7, frameon=False, loc="upper left", bbox_to_anchor=(1.01, 1))
    _open(axes)
    return figure


def learning_curves(frame: pd.DataFrame) -> Figure:
    """Loss and held-out IIA over the steps of each fit, and below them any temperature.

    A strong line is the mean of a fit's seeds at the steps that all of them have; each seed has a
    faint one. Of more than `MAX_FITS`, the ones that end with the highest IIA have a colour.

    Args:
        frame: columns `fit`, `seed`, `step`, `loss`, `iia` and, if there is one, `temperature`;
            a value that was not taken at a step is NaN.
    """
    fits = list(dict.fromkeys(frame["fit"]))
    known = frame[frame["iia"].notna()].sort_values("step", kind="stable")
    last = known.groupby(["fit", "seed"], sort=False)["iia"].last().reset_index()
    ends = last.groupby("fit", sort=False)["iia"].mean().reset_index()
    named = _highest(ends, "fit", "iia", fits, MAX_FITS)
    columns = ["loss", "iia"]
    if "temperature" in frame and frame["temperature"].notna().any():
        columns.append("temperature")
    legend = 0.6 + _CHARACTER * max(len(_short(str(fit))) for fit in named)
    size = (4.4 + (legend if len(fits) > 1 else 0), 3.6 + 0.9 * (len(columns) - 2))
    figure = Figure(figsize=size, layout="constrained")
    heights = [1.0, 1.0, 0.55][: len(columns)]
    panels = list(figure.subplots(len(columns), 1, sharex=True, height_ratios=heights))
    words = {"iia": "held-out IIA"}
    for axes, column in zip(panels, columns, strict=True):
        values = frame[np.isfinite(_floats(frame, column)[0])]
        # The named ones last, so that they lie over the grey.
        for fit in [f for f in fits if f not in named] + named[::-1]:
            _learning(axes, values[values["fit"] == fit], column, _look(fit, named))
        if column != "iia" and len(values) and (values[column] > 0).all():
            axes.set_yscale("log")
        axes.set_ylabel(words.get(column, column))
        _open(axes)
    panels[1].set_ylim(-0.02, 1.02)
    panels[-1].set_xlabel("step")
    if len(fits) > 1:
        keys = [_key(plain(_short(str(fit))), *_look(fit, named)) for fit in named]
        if len(fits) > len(named):
            keys.append(_key(f"{len(fits) - len(named)} more", _GREY, "-"))
        panels[0].legend(
            handles=keys, fontsize=7, frameon=False, loc="upper left", bbox_to_anchor=(1, 1)
        )
    else:
        panels[0].set_title(plain(_short(str(fits[0]), 60)))
    return figure


def rank_curve(frame: pd.DataFrame) -> Figure:
    """IIA over the rank, on a log2 axis: a line and its band for each place, controls dashed.

    Of more than `MAX_PLACES`, those that reach the highest IIA have a colour and controls.

    Args:
        frame: columns `place`, `metric` (as in `iia_bars`), `rank`, `mean`, `ci_low` and `ci_high`;
            a row for each place, metric and rank. Intervals may be NaN; a control without a rank,
            as the whole vector is, may have NaN for it.
    """
    # pandas 2.2 takes two strings for one where they agree up to a NUL character; 3 does not.
    rows = list(zip(frame["place"], frame["metric"], frame["rank"].fillna(-1), strict=True))
    if len(set(rows)) < len(rows):
        raise ValueError("duplicate rows for one place, metric and rank")
    places = list(dict.fromkeys(frame["place"]))
    trained = frame[frame["metric"] == "iia"]
    highest = trained.groupby("place", sort=False)["mean"].max().reset_index()
    named = _highest(highest, "place", "mean", places, MAX_PLACES)
    controls = [m for m in _METRICS if m != "iia" and (frame["metric"] == m).any()]
    words = [_short(str(place)) for place in named]
    figure = Figure(
        figsize=(4.7 + _CHARACTER * max(16, *map(len, words)), 3.1), layout="constrained"
    )
    axes = figure.subplots()
    alpha = 0.8 if len(named) == 1 else 0.5
    for place in [p for p in places if p not in named] + named[::-1]:
        of_place = frame[frame["place"] == place]
        colour, _ = _look(place, named)
        for metric in [*controls, "iia"] if place in named else ["iia"]:
            line = of_place[of_place["metric"] == metric].sort_values("rank", kind="stable")
            rank, mean, low, high = _floats(line, "rank", "mean", "ci_low", "ci_high")
            dashes = _METRICS[metric][3]
            if metric == "iia":
                if place in named:
                    axes.fill_between(rank, low, high, color=colour, alpha=0.15, lw=0)
                style, wide = ("o-", 1.3) if place in named else ("-", 0.7)
                axes.plot(rank, mean, style, color=colour, ms=3, lw=wide)
                continue
            everywhere = np.isnan(rank)
            for level in mean[everywhere]:
                axes.axhline(level, ls=dashes, color=colour, lw=0.9, alpha=alpha)
            if not everywhere.all():
                axes.plot(rank, mean, dashes, color=colour, lw=0.9, alpha=alpha)
    _rank_axis(axes, frame["rank"].dropna().astype(int).unique().tolist(), 4.0)
    axes.set_ylim(-0.02, 1.02)
    axes.set_xlabel("rank")
    axes.set_ylabel(_IIA)
    keys = [
        _key(plain(word), _look(p, named)[0], "-") for p, word in zip(named, words, strict=True)
    ]
    if len(places) > len(named):
        keys.append(_key(f"{len(places) - len(named)} more", _GREY, "-"))
    grey = _SERIES[0] if len(places) == 1 else "#555555"
    keys += [_key(_METRICS[m][0], grey, _METRICS[m][3]) for m in controls]
    axes.legend(
        handles=keys, fontsize=7, frameon=False, loc="upper left", bbox_to_anchor=(1.01, 1),
        handlelength=2.6,
    )  # fmt: skip
    _open(axes)
    return figure


def _arranged(
    n: int, layers: int, names: Sequence[str]
) -> tuple[bool, tuple[float, float], list[tuple[float, float]]]:
    """Whether n maps are beside one another, the figure's size, and each map's, in inches."""
    margin = _CHARACTER * max(map(len, names), default=0) + 1.1  # labels and colour bar
    across = min(max(1.9, 0.4 * layers), max(7.2, 0.15 * layers), 14.0)
    across_control = max(1.2, min(0.6 * across, 0.26 * layers))
    tall = min(max(1.2, 0.22 * len(names)), 20.0)
    beside = margin + across + (n - 1) * (across_control + 0.2)
    flat = min(max(0.5, 0.24 * len(names)), 20.0)
    flat_control = min(max(0.3, 0.17 * len(names)), 20.0)
    below = 0.9 + flat + (n - 1) * (flat_control + 0.3)
    if beside <= max(10.0, below) or n == 1:
        sizes = [(across, tall), *[(across_control, tall)] * (n - 1)]
        return True, (beside, tall + 0.9), sizes
    sizes = [(across, flat), *[(across, flat_control)] * (n - 1)]
    return False, (margin + across, below), sizes


def _print_values(axes: Axes, grid: np.ndarray, scale: Normalize, wide: float, high: float) -> None:
    """The number in each square, where they are few and there is room for it."""
    rows, columns = grid.shape
    if grid.size > _MAX_NUMBERS or wide < 0.23 * columns or high < 0.13 * rows:
        return
    for (row, column), value in np.ndenumerate(grid):
        if np.isnan(value):
            continue
        r, g, b, _ = colormaps[_MAP_COLOURS](scale(value))
        dark = 0.299 * r + 0.587 * g + 0.114 * b < 0.38
        axes.text(
            column + 0.5, row + 0.5, f"{value:.2f}", ha="center", va="center_baseline",
            fontsize=6.5 if wide > 0.32 * columns else 6, color="white" if dark else "black",
        )  # fmt: skip


def _highest(
    frame: pd.DataFrame, key: str, value: str, groups: Sequence[Hashable], most: int
) -> list[Hashable]:
    """The groups of the highest values, in the order that they are given in.

    Groups without a value come after all others.
    """
    values = dict(zip(frame[key], _floats(frame, value)[0], strict=True))
    found = [values.get(group, math.nan) for group in groups]
    best = np.argsort(-np.array(found, dtype=float), kind="stable")[:most]
    return [groups[i] for i in sorted(best.tolist())]


def _look(group: Hashable, named: Sequence[Hashable]) -> tuple[str, str]:
    """Colour and dashes of a group: grey, if it is not named."""
    if group not in named:
        return _GREY, "-"
    i = named.index(group)
    return _SERIES[i % len(_SERIES)], ("-", "--")[i // len(_SERIES)]


def _key(label: str, colour: str, dashes: str) -> Line2D:
    return Line2D([], [], color=colour, ls=dashes, lw=1.3, label=label)


def _learning(axes: Axes, frame: pd.DataFrame, column: str, look: tuple[str, str]) -> None:
    """One fit's line, and a faint one for each seed if there are several."""
    colour, dashes = look
    grey = colour == _GREY
    table = frame.pivot(index="step", columns="seed", values=column).sort_index()
    if len(table.columns) > 1:
        for seed in table.columns:
            line = table[seed].dropna()
            axes.plot(line.index, line, color=colour, lw=0.6, alpha=0.15 if grey else 0.3)
    # Where a seed has ended, the mean of the others would jump.
    mean = table.dropna().mean(axis=1)
    axes.plot(mean.index, mean, dashes, color=colour, lw=0.7 if grey else 1.3)


def _rank_axis(axes: Axes, ranks: Sequence[int], inches: float) -> None:
    """A log2 axis with the ranks there are, powers of two first where all have no room."""
    axes.set_xscale("log", base=2)
    low, high = min(ranks), max(ranks)
    spread = max(math.log2(high / low), 1.0)
    axes.set_xlim(low / 2 ** (0.06 * spread), high * 2 ** (0.06 * spread))
    shown: list[int] = []
    for rank in sorted(ranks, key=lambda rank: (rank.bit_count() > 1, rank)):
        room = (0.1 + _CHARACTER * len(str(high))) * 1.12 * spread / inches  # in octaves
        if all(abs(math.log2(rank / other)) >= room for other in shown):
            shown.append(rank)
    axes.set_xticks(sorted(shown), _numbers(sorted(shown)))
    axes.minorticks_off()
