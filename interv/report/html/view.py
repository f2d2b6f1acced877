"""Tables as a page shows them: short numbers, no empty columns, not all of a million rows."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from interv.report.html.folder import Row, number

MOST_ROWS = 400


@dataclass(frozen=True)
class Cell:
    """`text` is shown; `full` is what is sorted by."""

    text: str
    full: str


@dataclass(frozen=True)
class Column:
    name: str
    number: bool


@dataclass(frozen=True)
class TableView:
    """A table on a page.

    Attributes:
        same: names and values of columns that are the same in every row, which are left out.
        shown, total: rows.
        cut: which rows are shown, where not all are.
    """

    title: str
    columns: list[Column]
    rows: list[list[Cell]]
    same: list[tuple[str, str]]
    total: int
    cut: str = ""

    @property
    def shown(self) -> int:
        return len(self.rows)


def table_view(
    title: str,
    file: str,
    rows: Sequence[Row],
    size: str | None = None,
    most: int = MOST_ROWS,
) -> TableView:
    """A CSV file's rows.

    Args:
        title: the table's caption.
        file: what holds all of them.
        rows: all of them.
        size: a column; of more rows than `most`, those where it is farthest from zero are shown.
            None: the first ones.
        most: rows that are shown.
    """
    cut = ""
    shown = list(range(len(rows)))
    if len(rows) > most:
        if size is not None:
            sizes = [-_known(abs(number(row[size]))) for row in rows]
            shown = sorted(sorted(shown, key=lambda i: sizes[i])[:most])
        which = "with the largest effects" if size is not None else "that come first"
        cut = f"The {most:,} rows of {len(rows):,} {which}; all of them are in {file}."
    names = list(rows[0]) if rows else []
    columns, same = [], []
    for name in names:
        values = {row[name] for row in rows}
        if values <= {"", "nan", "None"}:
            continue
        if len(values) == 1 and len(rows) > 1:
            same.append((name, short(values.pop())))
        else:
            columns.append(Column(name, all(_is_number(row[name]) for row in rows)))
    cells = [
        [Cell(short(rows[i][c.name]), _plain(rows[i][c.name])) for c in columns] for i in shown
    ]
    return TableView(title, columns, cells, same, len(rows), cut)


def _known(value: float) -> float:
    return value if math.isfinite(value) else -math.inf


def _plain(text: str) -> str:
    return "" if text in ("nan", "None") else text


def _is_number(text: str) -> bool:
    try:
        number(text)
    except ValueError:
        return False
    return True


def short(text: str) -> str:
    """A cell's text; long decimal numbers rounded to four digits."""
    if not _is_number(text) or text.lstrip("-").isdigit():
        return text
    value = number(text)
    if math.isnan(value):
        return ""
    return f"{value:.0f}" if value.is_integer() and abs(value) < 1e9 else f"{value:.4g}"
