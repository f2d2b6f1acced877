"""A reference's cells and those reproduced, side by side on one scale, and their difference."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from interv.report.claims import Verdict
from interv.report.figures import STYLE, files_of
from interv.report.fonts import plain
from interv.spec.run import FiguresSection

_APART = ("metric", "component", "severed", "receiver", "set", "window", "exchanged", "type")
"""Columns of which each value is a picture of its own."""
_VALUES = ("reference", "tolerance", "found", "difference", "holds", "apart")
_NAMES = ("reference", "reproduced")


@dataclass(frozen=True)
class Panel:
    """One picture of a claim's cells: rows by columns, not a number where there is no cell.

    Attributes:
        title: what is the same for all of its cells and not for the claim's others.
        reference, found: `[row, column]`.
        tolerance: the largest of its cells'.
    """

    title: str
    row_title: str
    column_title: str
    rows: tuple[str, ...]
    columns: tuple[str, ...]
    reference: np.ndarray
    found: np.ndarray
    tolerance: float

    @property
    def scale(self) -> tuple[float, float, bool]:
        """Lowest and highest colour of both pictures, and whether 0 is in their middle."""
        both = np.concatenate([self.reference.ravel(), self.found.ravel()])
        known = both[np.isfinite(both)]
        low, high = (float(known.min()), float(known.max())) if len(known) else (0.0, 1.0)
        if low < 0 < high:
            high = max(-low, high)
            return -high, high, True
        return low, high if high > low else low + 1e-9, False

    @property
    def difference(self) -> np.ndarray:
        apart: np.ndarray = self.found - self.reference
        return apart

    @property
    def farthest(self) -> float:
        """The end of the difference's scale: no less than what is allowed."""
        known = self.difference[np.isfinite(self.difference)]
        return max(float(np.abs(known).max()) if len(known) else 0.0, self.tolerance, 1e-12)


def panels_of(cells: pd.DataFrame) -> list[Panel]:
    """The pictures of a claim's cells: layers (or heads) across, all else down."""
    places = [c for c in cells.columns if c not in _VALUES]
    varying = [c for c in places if cells[c].astype(str).nunique() > 1]
    apart = [c for c in varying if c in _APART]
    axes = [c for c in varying if c not in apart]
    across = "head" if {"head", "layer"} <= set(axes) else "layer" if "layer" in axes else ""
    if not across:
        across = axes[-1] if axes else (places[0] if places else "claim")
    down = [c for c in axes if c != across]
    groups = cells.groupby([cells[c].astype(str) for c in apart], sort=False) if apart else None
    parts = list(groups) if groups is not None else [((), cells)]
    return [_panel([str(name) for name in names], some, across, down) for names, some in parts]


def _panel(names: Sequence[str], cells: pd.DataFrame, across: str, down: Sequence[str]) -> Panel:
    def labels(columns: Sequence[str]) -> list[str]:
        if not columns or columns[0] not in cells:
            return [""] * len(cells)
        texts = cells[list(columns)].astype(object).where(cells[list(columns)].notna(), "")
        return [" ".join(str(v) for v in row if v != "") for row in texts.itertuples(index=False)]

    row_of, column_of = labels(down), labels([across])
    rows, columns = _in_order(row_of), _in_order(column_of)
    reference = np.full((len(rows), len(columns)), np.nan)
    found = reference.copy()
    for r, c, one, other in zip(row_of, column_of, cells["reference"], cells["found"], strict=True):
        reference[rows.index(r), columns.index(c)] = one
        found[rows.index(r), columns.index(c)] = other
    title = ", ".join(name.replace("_", " ") for name in names if name not in ("", "None"))
    return Panel(
        title,
        " ".join(down),
        across,
        tuple(rows),
        tuple(columns),
        reference,
        found,
        float(cells["tolerance"].max()) if "tolerance" in cells else 0.0,
    )


def _in_order(labels: Sequence[str]) -> list[str]:
    """Distinct labels, numbers by size."""
    distinct = list(dict.fromkeys(labels))
    if all(label.removeprefix("-").isdecimal() for label in distinct):
        return sorted(distinct, key=int)
    return distinct


def draw_reference(
    section: FiguresSection, verdicts: Sequence[Verdict]
) -> Iterator[tuple[str, bytes]]:
    """A figure for each claim of cells, as (file name, content)."""
    with rc_context(STYLE):
        for verdict in verdicts:
            if verdict.cells is not None:
                title = f"{verdict.claim}: {verdict.told}"
                figure = _figure(verdict.cells, title, _NAMES)
                yield from files_of(section, figure_stem(verdict), figure)


def side_by_side(cells: pd.DataFrame, title: str, names: tuple[str, str]) -> bytes:
    """Two runs' cells and their difference, as a PNG."""
    with rc_context(STYLE):
        section = FiguresSection(formats=["png"])
        [(_, content)] = files_of(section, "", _figure(cells, title, names))
    return content


def figure_stem(verdict: Verdict) -> str:
    """The name of a claim's figure, without its suffix."""
    words = re.sub(r"[^a-z0-9]+", "_", verdict.claim.lower()).strip("_")
    return f"reference_{words[:60]}"


def _figure(cells: pd.DataFrame, title: str, names: tuple[str, str]) -> Figure:
    panels = panels_of(cells)
    wide = max(len(panel.columns) for panel in panels)
    heights = [0.95 + 0.19 * len(panel.rows) for panel in panels]
    size = (3 * max(2.4, 1.5 + 0.08 * wide), sum(heights) + 0.3)
    figure = Figure(figsize=size, layout="constrained")
    grid = figure.subplots(len(panels), 3, squeeze=False, height_ratios=heights)
    for axes, panel in zip(grid, panels, strict=True):
        _draw(figure, axes, panel, names)
    figure.suptitle(plain(title), fontsize=8)
    return figure


def _draw(figure: Figure, axes: Sequence[Axes], panel: Panel, names: tuple[str, str]) -> None:
    low, high, centred = panel.scale
    far = panel.farthest
    pictures = (
        (names[0], panel.reference, "RdBu" if centred else "Purples", low, high),
        (names[1], panel.found, "RdBu" if centred else "Purples", low, high),
        ("difference", panel.difference, "PuOr", -far, far),
    )
    edges = np.arange(len(panel.columns) + 1), np.arange(len(panel.rows) + 1)
    for one, (name, values, colours, bottom, top) in zip(axes, pictures, strict=True):
        mesh = one.pcolormesh(*edges, values, rasterized=True, cmap=colours, vmin=bottom, vmax=top)
        one.invert_yaxis()
        first = one is axes[0]
        rows = [plain(row) for row in panel.rows] if first else []
        one.set_yticks(np.arange(len(rows)) + 0.5, rows)
        step = max(1, len(panel.columns) // 8)
        ticks = range(0, len(panel.columns), step)
        one.set_xticks([i + 0.5 for i in ticks], [plain(panel.columns[i]) for i in ticks])
        one.set_xlabel(panel.column_title)
        one.set_title(plain(f"{panel.title}: {name}" if panel.title else name))
        if one is not axes[0]:
            figure.colorbar(mesh, ax=one)
