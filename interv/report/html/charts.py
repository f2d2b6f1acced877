"""Heat maps as inline SVG, a square for each value, which it tells when pointed at."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from interv.report.html.colours import SCALES, code, colour, is_dark

_CHARACTER = 6.6  # pixels, at the size of font that labels have
_LONGEST = 26  # characters of a row's label
_BAR = 40  # pieces of the colour bar
_STEPS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000)


@dataclass(frozen=True)
class Square:
    """One value as it is drawn; `fill` None: there is none, `x` is in percent."""

    x: float
    y: float
    fill: str | None
    dark: bool
    number: str
    hover: str


@dataclass(frozen=True)
class Tick:
    """A label, and where the middle of its row (pixels) or column (percent) is."""

    at: float
    text: str


@dataclass(frozen=True)
class HeatMap:
    """A heat map; `charts.html` has the macro that draws it.

    Attributes:
        title: what it shows.
        rows, columns: labels, of the first row on top.
        values: `[row, column]`; NaN: there is none.
        row_title, column_title: of the axes.
        low, high: values at the ends of the colour scale; `high` below `low` turns it round.
        colours: a name of `SCALES`; `diverging` and `difference` want `low` = -`high`.
        bar: what the colours measure.
        hovers: what each square tells, `[row][column]`; empty: its labels and its value.
        note: a line under the title.
        compact: narrow squares, so that several maps stand side by side.
    """

    title: str
    rows: Sequence[str]
    columns: Sequence[str]
    values: np.ndarray
    row_title: str
    column_title: str
    low: float
    high: float
    colours: str
    bar: str
    hovers: Sequence[Sequence[str]] = ()
    note: str = ""
    compact: bool = False

    def __post_init__(self) -> None:
        if self.values.shape != (len(self.rows), len(self.columns)):
            raise ValueError(f"{self.title}: {self.values.shape} values for its labels")
        if self.colours not in SCALES:
            raise ValueError(f"{self.title}: no colours '{self.colours}'")

    @property
    def size(self) -> int:
        """How many squares it has."""
        return int(self.values.size)

    @property
    def wide(self) -> int:
        """Of a square, in pixels."""
        count = len(self.columns)
        if self.compact:
            return 26 if count <= 8 else 18 if count <= 16 else 9
        return 44 if count <= 8 else 26 if count <= 16 else 16 if count <= 64 else 10

    @property
    def narrow(self) -> int:
        """Of a square at the least, where the page is narrow."""
        return min(self.wide, 36 if self.numbered else 9)

    @property
    def high_of_row(self) -> int:
        """Of a square, in pixels."""
        return 20 if len(self.rows) <= 48 else 12

    @property
    def width(self) -> int:
        return self.wide * len(self.columns)

    @property
    def least_width(self) -> int:
        return self.narrow * len(self.columns)

    @property
    def height(self) -> int:
        return self.high_of_row * len(self.rows) + 1

    @cached_property
    def labels(self) -> list[Tick]:
        """Of the rows; of every second or fifth where they are low."""
        step = 1 if self.high_of_row >= 14 else 2
        return [
            Tick((i + 0.5) * self.high_of_row, shortened(label, _LONGEST))
            for i, label in enumerate(self.rows)
            if i % step == 0
        ]

    @property
    def margin(self) -> int:
        """Room for the rows' labels, in pixels."""
        longest = max((len(tick.text) for tick in self.labels), default=0)
        return 10 + math.ceil(_CHARACTER * longest)

    @property
    def turned(self) -> bool:
        """Whether the columns' labels stand upright."""
        return max(map(len, self.columns), default=0) > max(4, self.wide // 8)

    @cached_property
    def ticks(self) -> list[Tick]:
        """Of the columns; of every second, fifth … where they are many."""
        longest = max(map(len, self.columns), default=0)
        each = 13.0 if self.turned else 4 + _CHARACTER * longest
        step = next((s for s in _STEPS if s * self.narrow >= each), _STEPS[-1])
        return [
            Tick(100 * (i + 0.5) / len(self.columns), shortened(label, _LONGEST))
            for i, label in enumerate(self.columns)
            if i % step == 0
        ]

    @property
    def foot(self) -> int:
        """Room for the columns' labels, in pixels."""
        longest = max((len(tick.text) for tick in self.ticks), default=0)
        return 10 + math.ceil(_CHARACTER * longest) if self.turned else 20

    @property
    def numbered(self) -> bool:
        """Whether each square has room for its number."""
        return self.wide >= 40 and self.high_of_row >= 14

    @property
    def percent(self) -> float:
        """Width of a square, of all of them."""
        return 100 / max(1, len(self.columns))

    def squares(self) -> Iterator[Square]:
        """Row by row."""
        for (row, column), value in np.ndenumerate(self.values):
            known = math.isfinite(value)
            rgb = colour(self.colours, self._share(float(value))) if known else (0, 0, 0)
            yield Square(
                column * self.percent,
                row * self.high_of_row,
                code(rgb) if known else None,
                is_dark(rgb),
                short_number(float(value)) if known and self.numbered else "",
                self._hover(row, column),
            )

    def _share(self, value: float) -> float:
        span = self.high - self.low
        return (value - self.low) / span if span else 0.0

    def _hover(self, row: int, column: int) -> str:
        if self.hovers:
            return self.hovers[row][column]
        value = float(self.values[row, column])
        told = f"{value:.4g}" if math.isfinite(value) else "no value"
        place = f"{self.row_title} {self.rows[row]}, {self.column_title} {self.columns[column]}"
        return f"{place.strip(' ,')}: {told}"

    @cached_property
    def gradient(self) -> list[str]:
        """The colour bar's pieces, from low to high."""
        return [code(colour(self.colours, i / (_BAR - 1))) for i in range(_BAR)]

    @property
    def marks(self) -> tuple[str, str, str]:
        """Values at the ends and in the middle of the colour bar."""
        middle = (self.low + self.high) / 2
        return f"{self.low:.3g}", f"{middle:.3g}", f"{self.high:.3g}"

    @property
    def described(self) -> str:
        """For those who do not see it."""
        what = f"Heat map: {self.title}. {len(self.rows)} rows ({self.row_title}) by "
        what += f"{len(self.columns)} columns ({self.column_title})."
        if not np.isfinite(self.values).any():
            return f"{what} It has no values."
        ends = []
        for word, at in (("Lowest", np.nanargmin), ("Highest", np.nanargmax)):
            row, column = np.unravel_index(int(at(self.values)), self.values.shape)
            ends.append(f"{word}: {self._hover(int(row), int(column))}.")
        return " ".join([what, *ends])


def shortened(text: str, most: int) -> str:
    """Text of at most so many characters."""
    return text if len(text) <= most else f"{text[: most - 1]}…"


def short_number(value: float) -> str:
    """A number in five characters or so."""
    size = abs(value)
    if size >= 1000 or 0 < size < 0.005:
        return f"{value:.0e}".replace("e-0", "e-").replace("e+0", "e")
    return f"{value:.0f}" if size >= 100 else f"{value:.1f}" if size >= 10 else f"{value:.2f}"
