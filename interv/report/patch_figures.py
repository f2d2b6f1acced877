"""Figures of a patch: each a function from a table to a figure.

Effects are red below zero and blue above, with white at zero.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import FancyBboxPatch, PathPatch
from matplotlib.path import Path
from matplotlib.ticker import MaxNLocator

from interv.report.fonts import plain

_EFFECT = "RdBu"
_ABOVE, _BELOW = "#2166AC", "#B2182B"
_ABSENT = "#e4e4e4"
_GREY = "#999999"
# Okabe and Ito's colours: told apart by colour-blind eyes.
_SERIES = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
# Inches: a line of text, and a character of it, at the size of font that figures have.
_LINE, _CHARACTER = 0.15, 0.066
_LONGEST = 28  # characters of a label, of most figures
_NODE_COLOURS = {"input": "#f0f0f0", "head": "#fff3d6", "mlp": "#dff0df", "logits": "#f0f0f0"}


def layer_by_position(
    table: pd.DataFrame, labels: Sequence[str], model: str, title: str, bar: str
) -> Figure:
    """A heat map of positions (rows, the first on top) by layers.

    Args:
        table: columns `row` (an index into labels), `layer` and `mean`; a row for each square.
    """
    layers = _values([("", table)], "layer")
    grid = _pivot(table, "row", "layer", range(len(labels)), layers)
    names = [_short(label) for label in labels]
    tall = min(max(1.3, 0.19 * len(names)), 24.0)
    across = max(2.4, _cells(len(layers)))
    width = across + 1.1 + _CHARACTER * max(map(len, names))
    figure = Figure(
        figsize=(max(width, _CHARACTER * len(title) + 1.0), tall + 0.9), layout="constrained"
    )
    axes = figure.subplots()
    limit = _limit([grid])
    _squares(axes, grid, limit)
    _ticks(axes, "y", names, tall)
    _ticks(axes, "x", _numbers(layers), across)
    axes.set_title(plain(title))
    axes.set_xlabel(plain(f"layer of {model}"))
    scale = ScalarMappable(Normalize(-limit, limit), _EFFECT)
    _colour_bar(figure, [axes], scale, bar, (width, tall))
    return figure


def layer_by_head(facets: Sequence[tuple[str, pd.DataFrame]], model: str, bar: str) -> Figure:
    """Heat maps of layers (rows, the first on top) by heads, on one scale of colours.

    Args:
        facets: of each its title and its table: columns `layer`, `head` and `mean`. Heads that
            are not in a table, and those whose mean is NaN, are grey. Rows without a head, of
            all heads as one, have no square.
    """
    facets = [(title, table.dropna(subset=["layer", "head"])) for title, table in facets]
    layers = _values(facets, "layer")
    heads = _values(facets, "head")
    grids = [_pivot(table, "layer", "head", layers, heads) for _, table in facets]
    limit = _limit(grids)
    titles = [_wrapped(title, 30) for title, _ in facets]
    columns = min(len(facets), 4 if len(facets) > 6 else 3)
    lines = math.ceil(len(facets) / columns)
    tall = min(max(1.2, _LINE * len(layers)), 12.0)
    across = max(1.9, _cells(len(heads)))
    room = 0.5 + _LINE * max(title.count("\n") for title in titles)
    size = ((across + 0.35) * columns + 1.2, (tall + room) * lines + 0.3)
    figure = Figure(figsize=size, layout="constrained")
    panels = figure.subplots(lines, columns, squeeze=False)
    for i, axes in enumerate(panels.flat):
        if i >= len(facets):
            axes.set_axis_off()
            continue
        _squares(axes, grids[i], limit)
        _ticks(axes, "x", _numbers(heads), across)
        _ticks(axes, "y", _numbers(layers) if i % columns == 0 else [], tall)
        axes.set_title(titles[i])
        if i + columns >= len(facets):
            axes.set_xlabel("head")
        if i % columns == 0:
            axes.set_ylabel(plain(f"layer of {model}") if lines == 1 else "layer")
    if lines > 1:
        figure.suptitle(plain(model), fontsize=9)
    scale = ScalarMappable(Normalize(-limit, limit), _EFFECT)
    _colour_bar(figure, list(panels.flat), scale, bar, size)
    return figure


def bars(frame: pd.DataFrame, bar: str, top: int = 20) -> Figure:
    """The rows of the largest |mean|, the largest on top, each a bar with its interval.

    Args:
        frame: columns `label`, `mean`, `ci_low` and `ci_high`; intervals may be NaN.
    """
    known = frame[frame["mean"].notna()]
    order = np.argsort(-known["mean"].abs().to_numpy(dtype=float), kind="stable")[:top]
    chosen = known.iloc[order]
    mean = chosen["mean"].to_numpy(dtype=float)
    names = [_short(str(label), 48) for label in chosen["label"]]
    wide = 3.4 + _CHARACTER * max(map(len, names), default=0)
    figure = Figure(figsize=(wide, 0.7 + 0.18 * max(len(names), 3)), layout="constrained")
    axes = figure.subplots()
    at = np.arange(len(names))
    axes.barh(at, mean, height=0.72, color=[_ABOVE if m >= 0 else _BELOW for m in mean])
    low, high = (chosen[name].to_numpy(dtype=float) for name in ("ci_low", "ci_high"))
    axes.hlines(at, low, high, color="black", lw=0.9)
    axes.axvline(0, color="black", lw=0.6)
    axes.set_yticks(at, [plain(name) for name in names])
    axes.tick_params(axis="y", length=0)
    axes.set_ylim(max(len(names), 1) - 0.4, -0.6)
    axes.set_xlabel(_wrapped(bar, int((wide - 0.6) / _CHARACTER)))
    _open(axes)
    return figure


def lines(frame: pd.DataFrame, xlabel: str, ylabel: str) -> Figure:
    """A line and its band for each series.

    Args:
        frame: columns `series`, `x`, `mean`, `ci_low` and `ci_high`; intervals may be NaN.
    """
    names = list(dict.fromkeys(frame["series"]))
    legend = 0.5 + _CHARACTER * max(len(_short(str(name))) for name in names)
    size = (4.4 + (legend if len(names) > 1 else 0), 2.9)
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots()
    axes.axhline(0, color="#bbbbbb", lw=0.6)
    for i, name in enumerate(names):
        colour, dashes = _SERIES[i % len(_SERIES)], ("-", "--", ":")[i // len(_SERIES) % 3]
        line = frame[frame["series"] == name].sort_values("x", kind="stable")
        x, mean, low, high = _floats(line, "x", "mean", "ci_low", "ci_high")
        axes.plot(x, mean, dashes, color=colour, lw=1.2, label=plain(_short(str(name))))
        axes.fill_between(x, low, high, color=colour, alpha=0.2, lw=0)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel(plain(xlabel))
    axes.set_ylabel(plain(ylabel))
    if len(names) > 1:
        axes.legend(fontsize=7, frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    _open(axes)
    return figure


def pattern(panels: Sequence[tuple[str, np.ndarray]], tokens: Sequence[str]) -> Figure:
    """Attention patterns, [query, key] each, queries downwards, on one scale from 0 to 1."""
    names = [_short(token.strip(" ") or "␣", 16) for token in tokens]
    side = min(max(1.3, _LINE * len(names)), 14.0)
    columns = min(len(panels), max(1, int(12 / side)), 4)
    rows = math.ceil(len(panels) / columns)
    text = _CHARACTER * max(map(len, names)) + 0.3
    size = (columns * (side + 0.3) + text + 0.8, rows * (side + text + 0.35))
    figure = Figure(figsize=size, layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False)
    for i, axes in enumerate(grid.flat):
        if i >= len(panels):
            axes.set_axis_off()
            continue
        title, weights = panels[i]
        _mesh(axes, np.asarray(weights, dtype=float), "Blues", Normalize(0, 1))
        _ticks(axes, "x", names, side, turned=True)
        _ticks(axes, "y", names if i % columns == 0 else [], side)
        axes.set_title(_wrapped(title, max(16, int(side / _CHARACTER))))
        axes.set_xlabel("key")
        if i % columns == 0:
            axes.set_ylabel("query")
    scale = ScalarMappable(Normalize(0, 1), "Blues")
    _colour_bar(figure, list(grid.flat), scale, "attention", size)
    return figure


def curve(frame: pd.DataFrame, scores: Mapping[str, float], label: str) -> Figure:
    """Faithfulness over the share that is kept under both rankings, and the areas of the curves.

    Args:
        frame: columns `ranking`, `fraction`, `mean`, `ci_low` and `ci_high`; intervals may be NaN.
        scores: `CPR` and `CMD`, and `sizes_above_1`: at how many sizes CPR rewards a faithfulness
            above the model's own.
        label: what the fractions are shares of.
    """
    figure = Figure(figsize=(4.4, 3.3), layout="constrained")
    axes = figure.subplots()
    for level in (0, 1):
        axes.axhline(level, color=_GREY, lw=0.7, ls="--" if level else "-")
    names = {"signed": "by what edges help", "magnitude": "by magnitude"}
    for colour, (ranking, part) in zip(
        (_ABOVE, _BELOW), frame.groupby("ranking", sort=False), strict=False
    ):
        x, mean, low, high = _floats(part, "fraction", "mean", "ci_low", "ci_high")
        axes.fill_between(x, low, high, color=colour, alpha=0.2, lw=0)
        axes.plot(x, mean, "o-", color=colour, ms=3, lw=1.2, label=names[str(ranking)])
    [x] = _floats(frame, "fraction")
    axes.legend(frameon=False)
    if x.min() > 0:
        axes.set_xscale("log")
    else:
        # Nothing kept is no place of a log axis: linear below the first share that is.
        axes.set_xscale("symlog", linthresh=float(x[x > 0].min()), linscale=0.4)
    decades = [10.0**power for power in range(-9, 1)]
    marks = [d for d in decades if x[x > 0].min() <= d <= x.max()]
    axes.set_xticks([*np.unique(x[x == 0]), *marks] if len(marks) > 1 else np.unique(x))
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:.12g}")
    axes.minorticks_off()
    title = f"CPR {scores['CPR']:.3g}, CMD {scores['CMD']:.3g} (areas over a linear axis)"
    if scores["sizes_above_1"]:
        title += f"\nf is above 1 at {scores['sizes_above_1']:.0f} sizes: CPR is no share there"
    axes.set_title(title)
    axes.set_xlabel(plain(label))
    axes.set_ylabel("faithfulness")
    _open(axes)
    return figure


def scatter(frame: pd.DataFrame, r: float | None) -> Figure:
    """Attribution against exact patching, with the largest effects and errors named.

    Args:
        frame: columns `attribution`, `exact` and `label`; a row for each place.
        r: the rank correlation; None where it is not defined.
    """
    known = frame.dropna(subset=["attribution", "exact"])
    x, y = _floats(known, "exact", "attribution")
    figure = Figure(figsize=(3.9, 3.9), layout="constrained")
    axes = figure.subplots()
    ends = float(min(x.min(), y.min())), float(max(x.max(), y.max()))
    margin = 0.08 * (ends[1] - ends[0]) or 1.0
    low, high = ends[0] - margin, ends[1] + margin
    axes.plot([low, high], [low, high], color=_GREY, lw=0.8, ls="--", zorder=1)
    for draw in (axes.axhline, axes.axvline):
        draw(0, color="#cccccc", lw=0.6, zorder=0)
    axes.scatter(x, y, s=9, color=_ABOVE, alpha=0.55, lw=0, zorder=2)
    axes.set_xlim(low, high)
    axes.set_ylim(low, high)
    axes.set_aspect("equal")
    names = [_short(str(label), 20) for label in known["label"]]
    _name_points(axes, x, y, names, high - low)
    told = "not defined" if r is None else f"{r:.3f}"
    axes.set_title(f"rank correlation {told}, {len(known)} places")
    axes.set_xlabel("effect of exact patching")
    axes.set_ylabel("attribution")
    _open(axes)
    return figure


def circuit(
    nodes: Sequence[Mapping[str, Any]], edges: Sequence[Mapping[str, Any]], model: str
) -> Figure:
    """A circuit from the input, at the bottom, up to the logits.

    A layer has a row of heads and above it its MLP. Lines are the wider the larger |score|.

    Args:
        nodes: `name`, `kind` (input, head, mlp or logits) and `layer`.
        edges: `source`, `target` (names of nodes) and `score`.
    """
    levels = _levels(nodes)
    row = min(max(16 / len(levels), 0.32), 0.46)
    box = 0.09 / row
    places = _places(levels, edges)
    names = {str(node["name"]): _node_label(node) for node in nodes}
    paths = [_bend(places[str(edge["source"])], places[str(edge["target"])], box) for edge in edges]
    halves = {name: 0.1 + 0.065 * len(label) for name, label in names.items()}
    ends = [x + side * halves[name] for name, (x, _) in places.items() for side in (-1, 1)]
    boxes = [path.get_extents() for path in paths]
    ends += [end for extent in boxes for end in (extent.x0, extent.x1)]
    left, right = min(ends) - 0.2, max(ends) + 0.2
    wide = min(max(3.6, 0.55 * (right - left)), 30.0)
    figure = Figure(figsize=(wide, row * len(levels) + 0.8), layout="constrained")
    axes = figure.subplots()
    largest = max((abs(float(edge["score"])) for edge in edges), default=0.0) or 1.0
    scores = np.array([float(edge["score"]) for edge in edges])
    for i in np.argsort(np.abs(scores), kind="stable"):
        share = abs(float(scores[i])) / largest
        colour = _ABOVE if scores[i] >= 0 else _BELOW
        width, alpha = 0.35 + 2.6 * share, 0.3 + 0.55 * share
        axes.add_patch(
            PathPatch(paths[i], fc="none", ec=colour, lw=width, alpha=alpha, capstyle="butt")
        )
    for node in nodes:
        x, y = places[str(node["name"])]
        half = halves[str(node["name"])]
        shape = FancyBboxPatch(
            (x - half, y - box), 2 * half, 2 * box, boxstyle="round,pad=0,rounding_size=0.1",
            fc=_NODE_COLOURS[str(node["kind"])], ec="#555555", lw=0.6, zorder=3,
        )  # fmt: skip
        axes.add_patch(shape)
        name = plain(names[str(node["name"])])
        axes.text(x, y, name, ha="center", va="center", fontsize=7, zorder=4)
    axes.set_xlim(left, right)
    axes.set_ylim(-0.5, len(levels) - 0.5)
    axes.set_axis_off()
    axes.set_title(plain(f"circuit in {model}: {len(nodes)} nodes, {len(edges)} edges"))
    keys = [
        Line2D([], [], color=_ABOVE, lw=2, label="score above zero"),
        Line2D([], [], color=_BELOW, lw=2, label="below zero"),
        Line2D([], [], color=_GREY, lw=2.95, label=f"|score| {largest:.2g}"),
    ]
    figure.legend(handles=keys, loc="outside lower center", ncols=3, fontsize=7, frameon=False)
    return figure


def _levels(nodes: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """Names of nodes by row, the input's first; only rows that have any."""
    rank = {"input": 0, "head": 1, "mlp": 2, "logits": 3}
    rows: dict[tuple[bool, bool, int, int], list[str]] = {}
    for node in nodes:
        kind = str(node["kind"])
        layer = int(node["layer"]) if kind in ("head", "mlp") else 0
        key = (kind == "logits", kind != "input", layer, rank[kind])
        rows.setdefault(key, []).append(str(node["name"]))
    return [rows[key] for key in sorted(rows)]


def _places(
    levels: Sequence[Sequence[str]], edges: Sequence[Mapping[str, Any]]
) -> dict[str, tuple[float, float]]:
    """Where each node is: near the middle of what it is joined to, one apart in its row."""
    joined: dict[str, list[tuple[str, float]]] = {name: [] for row in levels for name in row}
    for edge in edges:
        source, target = str(edge["source"]), str(edge["target"])
        weight = abs(float(edge["score"])) + 1e-12
        joined[source].append((target, weight))
        joined[target].append((source, weight))
    x = {name: i - (len(row) - 1) / 2 for row in levels for i, name in enumerate(row)}
    for sweep in range(8):
        for row in levels if sweep % 2 == 0 else reversed(levels):
            wish = {
                name: sum(x[other] * w for other, w in joined[name])
                / (sum(w for _, w in joined[name]) or 1)
                for name in row
            }
            order = sorted(row, key=lambda name: wish[name])
            for i, name in enumerate(order):
                x[name] = i - (len(row) - 1) / 2
    return {name: (1.1 * x[name], float(level)) for level, row in enumerate(levels) for name in row}


def _bend(start: tuple[float, float], end: tuple[float, float], box: float) -> Path:
    """A curve from the top of one node to the foot of another, around those between."""
    (x0, y0), (x1, y1) = start, end
    y0, y1 = y0 + box, y1 - box
    rows = abs(y1 - y0)
    side = 1.0 if x0 + x1 >= 0 else -1.0
    out = side * min(0.25 * rows, 2.4) if rows > 1 else 0.0
    up = max(0.35 * rows, 0.3)
    points = [(x0, y0), (x0 + out, y0 + up), (x1 + out, y1 - up), (x1, y1)]
    return Path(points, [Path.MOVETO, Path.CURVE4, Path.CURVE4, Path.CURVE4])


def _node_label(node: Mapping[str, Any]) -> str:
    """`9.6` of `a9.h6`; others by their names."""
    name = str(node["name"])
    if node["kind"] == "head":
        layer, _, head = name.removeprefix("a").partition(".h")
        return f"{layer}.{head}" if head else name
    return name


def _name_points(axes: Axes, x: np.ndarray, y: np.ndarray, names: list[str], span: float) -> None:
    """Name the largest effects and the largest errors, where there is room beside them."""
    wrong = np.argsort(-np.abs(y - x), kind="stable")[:4]
    largest = np.argsort(-np.abs(x), kind="stable")[:8]
    character, line, gap = 0.0175 * span, 0.036 * span, 0.02 * span
    low, high = axes.get_xlim()
    taken: list[tuple[float, float, float]] = []
    for i in dict.fromkeys([*wrong.tolist(), *largest.tolist()]):
        width = character * len(names[i])
        for align, left in (("left", x[i] + gap), ("right", x[i] - gap - width)):
            on_name = any(
                left < end and start < left + width and abs(y[i] - height) < line
                for start, end, height in taken
            )
            on_point = (x > left) & (x < left + width) & (np.abs(y - y[i]) < 0.6 * line)
            if left < low or left + width > high or on_name or on_point.any():
                continue
            taken.append((left, left + width, float(y[i])))
            axes.text(
                x[i] + (gap if align == "left" else -gap), y[i], plain(names[i]),
                fontsize=6.5, va="center_baseline", ha=align,
            )  # fmt: skip
            break


def _pivot(
    table: pd.DataFrame, row: str, column: str, rows: Sequence[int], columns: Sequence[int]
) -> np.ndarray:
    """Means as [row, column], NaN where there are none.

    Two means for one square are an error: neither would be the one shown.
    """
    found = table.astype({row: int, column: int}).pivot(index=row, columns=column, values="mean")
    found = found.reindex(index=list(rows), columns=list(columns))
    return found.to_numpy(dtype=float, na_value=np.nan)


def _values(facets: Sequence[tuple[str, pd.DataFrame]], column: str) -> list[int]:
    """What a column holds in any of the tables, in order."""
    return sorted({int(value) for _, table in facets for value in table[column]})


def _limit(grids: Sequence[np.ndarray]) -> float:
    """The largest |value|: colours go as far on both sides of zero."""
    finite = np.concatenate([grid[np.isfinite(grid)] for grid in grids])
    return float(np.abs(finite).max(initial=0.0)) or 1e-9


def _squares(axes: Axes, values: np.ndarray, limit: float) -> None:
    _mesh(axes, values, _EFFECT, Normalize(-limit, limit))
    axes.set_facecolor(_ABSENT)


def _mesh(axes: Axes, values: np.ndarray, colours: str, scale: Normalize) -> None:
    """Squares, the first row on top; pixels even in an SVG, a thousand paths would be large."""
    height, width = values.shape
    axes.pcolormesh(
        np.arange(width + 1),
        np.arange(height + 1),
        np.ma.masked_invalid(values),
        rasterized=True,
        cmap=colours,
        norm=scale,
    )
    axes.invert_yaxis()


def _cells(n: int) -> float:
    """Inches for n columns: room for each number below them where they are few."""
    return min(max(0.17 * n, min(0.24 * n, 3.6)), 14.0)


def _numbers(values: Sequence[int]) -> list[str]:
    return [str(value) for value in values]


def _ticks(
    axes: Axes, which: str, names: Sequence[str], inches: float, turned: bool = False
) -> None:
    """A label in the middle of every square, or of every second, fifth … where they are many."""
    level = which == "x" and not turned
    each = 0.09 + _CHARACTER * max(map(len, names), default=0) if level else 0.13
    steps = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000)
    step = next((s for s in steps if inches * s >= each * len(names)), steps[-1])
    at = range(0, len(names), step)
    axis = axes.xaxis if which == "x" else axes.yaxis
    axis.set_ticks([i + 0.5 for i in at], [plain(names[i]) for i in at])
    axis.set_tick_params(length=2, rotation=90 if turned else 0)


def _colour_bar(
    figure: Figure,
    axes: list[Axes],
    scale: ScalarMappable,
    label: str,
    size: tuple[float, float],
) -> None:
    """As tall as its axes, and no wider in a large figure of `size` (inches) than in a small."""
    width, height = size
    bar = figure.colorbar(
        scale, ax=axes, fraction=0.2 / width, pad=0.1 / width, aspect=height / 0.12
    )
    bar.set_label(_wrapped(label, max(18, int(height / 0.062))))


def _wrapped(text: str, width: int) -> str:
    """Plain text in lines of at most so many characters, broken at spaces."""
    found: list[str] = []
    for word in (_short(word, width) for word in text.split(" ")):
        if found and len(found[-1]) + 1 + len(word) <= width:
            found[-1] += f" {word}"
        else:
            found.append(word)
    return "\n".join(map(plain, found))


def _short(text: str, most: int = _LONGEST) -> str:
    return text if len(text) <= most else f"{text[: most - 1]}…"


def _floats(frame: pd.DataFrame, *columns: str) -> list[np.ndarray]:
    return [frame[name].to_numpy(dtype=float, na_value=np.nan) for name in columns]


def _open(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
