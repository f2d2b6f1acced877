"""Text in figures: every character in a font that has it."""

from __future__ import annotations

import functools
from collections.abc import Iterable

from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, findfont, fontManager, get_font
from matplotlib.text import Text

_NO_SHAPE = "·"


def plain(text: str) -> str:
    """Text that matplotlib prints as it is: no mathematics, nothing without a shape."""
    shown = "".join(c if c.isprintable() and _has_shape(c) else _NO_SHAPE for c in text)
    return shown.replace("$", r"\$")


def without_font(texts: Iterable[str]) -> str:
    """Return the characters, in order, that no installed font has."""
    found = {c for text in texts for c in text if c.isprintable() and not _has_shape(c)}
    return "".join(sorted(found))


def fit_fonts(figure: Figure) -> None:
    """Give each text of a figure further fonts for the characters that its own lacks."""
    for text in figure.findobj(Text):
        assert isinstance(text, Text)
        others = [_fallback(c) for c in text.get_text() if ord(c) not in _own_shapes()]
        if names := [name for name in dict.fromkeys(others) if name]:
            text.set_fontfamily([*text.get_fontfamily(), *names])


def _has_shape(character: str) -> bool:
    return ord(character) in _own_shapes() or _fallback(character) is not None


@functools.cache
def _own_shapes() -> frozenset[int]:
    return _shapes(findfont(FontProperties()))


@functools.cache
def _shapes(path: str) -> frozenset[int]:
    return frozenset(get_font(path).get_charmap())


@functools.cache
def _fallback(character: str) -> str | None:
    """The name of an installed font that has a character, an upright one of plain weight first."""
    entries = sorted(
        fontManager.ttflist,
        key=lambda e: (e.style != "normal", e.weight not in (400, "normal", "regular"), e.name),
    )
    for entry in entries:
        # Placeholders for every character there is; TeX's fonts, whose codes are not Unicode's.
        if entry.name.startswith(("Last Resort", "cm")):
            continue
        if ord(character) in _shapes(entry.fname):
            return str(entry.name)
    return None
