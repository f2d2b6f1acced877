"""Colour scales, as matplotlib's figures have them: ColorBrewer's, and viridis.

All of them are told apart by colour-blind eyes; the sequential ones by lightness alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

_STOPS = {
    "purple": "fcfbfd efedf5 dadaeb bcbddc 9e9ac8 807cba 6950a3 53268f 3f007d",
    "green": "f7fcf5 e5f5e0 c7e9c0 a0d99b 73c476 40aa5d 228a44 006c2c 00441b",
    "red": "fff5f0 fee0d2 fcbba1 fc9272 fb694a ee3a2c ca181d a30f15 67000d",
    "viridis": "440154 471063 481f70 472d7b 443983 404688 3b528b 365d8d 31688e 2c728e 287c8e "
    "24868e 21918c 1f9a8a 20a486 28ae80 35b779 48c16e 5ec962 75d054 90d743 addc30 c8e020 e5e419 "
    "fde725",
    "diverging": "67001f b1182b d6604d f3a481 fddbc7 f6f7f7 d1e5f0 90c4dd 4393c3 2065ab 053061",
    "difference": "7f3b08 b25706 e08214 fcb761 fee0b6 f6f6f7 d8daeb b1aad1 8073ac 532687 2d004b",
}
Rgb = tuple[int, int, int]


def _stops(name: str) -> list[Rgb]:
    codes = [int(code, 16) for code in _STOPS[name].split()]
    return [(code >> 16, code >> 8 & 255, code & 255) for code in codes]


SCALES: dict[str, list[Rgb]] = {name: _stops(name) for name in _STOPS}


def colour(name: str, share: float) -> Rgb:
    """The colour of a share of a scale, from 0 to 1; shares outside have the end's colour."""
    stops: Sequence[Rgb] = SCALES[name]
    place = min(max(share, 0.0), 1.0) * (len(stops) - 1)
    left = min(math.floor(place), len(stops) - 2)
    rest = place - left
    r, g, b = (round(a + (b - a) * rest) for a, b in zip(stops[left], stops[left + 1], strict=True))
    return r, g, b


def code(rgb: Rgb) -> str:
    """`#rrggbb`."""
    return "#{:02x}{:02x}{:02x}".format(*rgb)


def is_dark(rgb: Rgb) -> bool:
    """Whether white is easier to read on it than black."""
    r, g, b = rgb
    return 0.299 * r + 0.587 * g + 0.114 * b < 135
