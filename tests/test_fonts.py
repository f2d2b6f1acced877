"""Characters that the default font lacks: another font's where one is installed, else told."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from pathlib import Path

import matplotlib.font_manager
import numpy as np
import pytest
from fontTools.fontBuilder import FontBuilder
from fontTools.pens.ttGlyphPen import TTGlyphPen
from matplotlib.figure import Figure
from matplotlib.image import imread
from tokenizers import Tokenizer

from interv.report import fonts
from interv.report.figures import files_of
from interv.report.fonts import fit_fonts, plain, without_font
from interv.spec.schema import FiguresSection
from tests.conftest import Result, SpecWriter, save_tokenizer, tiny_config

TEXT = "東京"
NAME = "Interv Squares"


def forget() -> None:
    for cached in (fonts._own_shapes, fonts._shapes, fonts._fallback):
        cached.cache_clear()


@pytest.fixture
def squares(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """An installed font that has the characters of `TEXT`, each as a square."""
    pen = TTGlyphPen(None)
    pen.moveTo((0, 0))
    for corner in ((0, 900), (900, 900), (900, 0)):
        pen.lineTo(corner)
    pen.closePath()
    square = pen.glyph()
    builder = FontBuilder(1000, isTTF=True)
    builder.setupGlyphOrder([".notdef", "square"])
    builder.setupCharacterMap({ord(c): "square" for c in TEXT})
    builder.setupGlyf({".notdef": TTGlyphPen(None).glyph(), "square": square})
    builder.setupHorizontalMetrics({".notdef": (1000, 0), "square": (1000, 0)})
    builder.setupHorizontalHeader(ascent=900, descent=-100)
    builder.setupNameTable({"familyName": NAME, "styleName": "Regular"})
    builder.setupOS2()
    builder.setupPost()
    builder.save(tmp_path / "squares.ttf")
    manager = matplotlib.font_manager.fontManager
    monkeypatch.setattr(manager, "ttflist", list(manager.ttflist))
    manager.addfont(tmp_path / "squares.ttf")
    forget()
    yield
    forget()


@pytest.fixture
def no_squares(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No installed font has the characters of `TEXT`, whatever this machine has."""
    manager = matplotlib.font_manager.fontManager
    known = [font for font in manager.ttflist if font.name.startswith("DejaVu")]
    monkeypatch.setattr(manager, "ttflist", known)
    forget()
    yield
    forget()


def drawn(text: str) -> np.ndarray:
    figure = Figure(figsize=(1, 1))
    figure.text(0.1, 0.4, plain(text), fontsize=20)
    [(_, content)] = files_of(FiguresSection(formats=["png"], dpi=50), "", figure)
    pixels: np.ndarray = imread(io.BytesIO(content))
    return pixels


@pytest.mark.usefixtures("squares")
def test_a_character_is_drawn_in_a_font_that_has_it() -> None:
    assert plain(f" {TEXT}$") == rf" {TEXT}\$"
    assert without_font([TEXT, "Tokyo"]) == ""
    black = (drawn(TEXT)[..., :3].mean(-1) < 0.5).sum()
    # Two squares of nine tenths of 20 points, at 50 dots an inch.
    assert black == pytest.approx(2 * (0.9 * 20 * 50 / 72) ** 2, rel=0.2)
    figure = Figure()
    both = figure.text(0, 0, f"a{TEXT}"), figure.text(0, 0, "a")
    fit_fonts(figure)
    assert [NAME in text.get_fontfamily() for text in both] == [True, False]


@pytest.mark.usefixtures("no_squares")
def test_a_character_of_no_font_is_a_dot() -> None:
    assert plain(f"a{TEXT}\t") == "a···"
    assert without_font(["a", TEXT]) == "".join(sorted(TEXT))
    assert (drawn(TEXT) == drawn("··")).all()


@pytest.mark.usefixtures("no_squares")
@pytest.mark.parametrize("whole", [True, False])
def test_what_no_font_has_is_told_in_one_line(
    whole: bool, write_spec: SpecWriter, cli: Callable[..., Result], tmp_path: Path
) -> None:
    """Where the tokenizer has the word; of one that splits it, bytes are shown as their codes."""
    save_tokenizer(tmp_path)
    if whole:
        backend = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
        backend.add_tokens([TEXT])
        backend.save(str(tmp_path / "tokenizer.json"))
    fact = {"prompt": f"The {TEXT} Needle is in", "subject": "Needle", "answer": "Seattle"}
    path = write_spec(
        model={"config": tiny_config("gpt2"), "tokenizer": str(tmp_path)},
        data={"facts": [fact], "keep": "all"},
        grid={"component": "block_output", "layers": 0},
    )
    outcome = cli("trace", path, "-o", tmp_path / "outputs")
    assert outcome.code == 0, outcome.err
    lines = [line for line in outcome.err.splitlines() if "no installed font has" in line]
    assert len(lines) == (1 if whole else 0)
    tokens = (Path(outcome.out.strip()) / "prompts.csv").read_text("utf-8")
    if whole:
        assert "".join(sorted(TEXT)) in lines[0]
        assert f'""{TEXT}""' in tokens
    else:
        assert "<E6>" in tokens and "<9D>" in tokens
    assert "\ufffd" not in tokens
