"""From rows of a table to squares of a heat map."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from interv.errors import IntervError
from interv.report.html.charts import HeatMap
from interv.report.html.folder import Row, RunFolder, number


@dataclass(frozen=True)
class Axes:
    """How rows of a table become squares: keys and labels of both sides, and what is told."""

    row: Callable[[Row], Hashable]
    rows: Mapping[Hashable, str]
    row_title: str
    column: Callable[[Row], Hashable]
    columns: Mapping[Hashable, str]
    column_title: str


def level_of(run: RunFolder) -> str:
    """What the intervals of a run cover: `95 %`."""
    statistics = run.resolved.get("statistics") or {}
    return f"{100 * float(statistics.get('level', 0.95)):g} %"


def by(rows: Iterable[Row], *columns: str) -> dict[tuple[str, ...], list[Row]]:
    """Rows with the same values in some columns, in the order in which they come."""
    found: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        found.setdefault(tuple(row.get(name, "") for name in columns), []).append(row)
    return found


def told(row: Row, column: str, level: str) -> str:
    """A value with its interval and what it is over."""
    text = f"{number(row[column]):+.4g}" if column == "mean" else f"{number(row[column]):.4g}"
    low, high = number(row.get("ci_low")), number(row.get("ci_high"))
    if math.isfinite(low):
        text += f" ({level} {low:.4g} to {high:.4g})"
    if row.get("n"):
        text += f", n {row['n']}"
    return text


def heat_map(
    title: str,
    rows: Sequence[Row],
    column: str,
    axes: Axes,
    scale: tuple[float, float],
    colours: str,
    bar: str,
    hover: Callable[[Row], str],
) -> HeatMap:
    """A heat map of a column of a table.

    Raises:
        IntervError: two rows for one square whose values differ: neither would be the one shown.
    """
    at_row = {key: i for i, key in enumerate(axes.rows)}
    at_column = {key: i for i, key in enumerate(axes.columns)}
    values = np.full((len(at_row), len(at_column)), np.nan)
    hovers = [["no value"] * len(at_column) for _ in at_row]
    for row in rows:
        i, j = at_row[axes.row(row)], at_column[axes.column(row)]
        value = number(row[column])
        if math.isfinite(values[i, j]) and values[i, j] != value:
            raise IntervError(f"{title}: two values for one square ({hover(row)})")
        values[i, j], hovers[i][j] = value, hover(row)
    low, high = scale
    return HeatMap(
        title,
        list(axes.rows.values()),
        list(axes.columns.values()),
        values,
        axes.row_title,
        axes.column_title,
        low,
        high,
        colours,
        bar,
        hovers,
    )
