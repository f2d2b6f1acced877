"""Text of users and models on a terminal: shown as it is written, never as markup or control."""

from __future__ import annotations

import ast
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import interv.cli
from interv.cli.console import Console
from interv.text import printable
from tests.conftest import Result, SpecWriter

# Rich markup that closes what was never opened, with and without a backslash, and an emoji code.
MARKUP = r"lies in [/a] \[/b] [bold]c \[ :bomb:"
# Sets the clipboard, a colour and the window's title; reverses what follows; cannot be encoded.
CONTROL = "\x1b]52;c;cm0gLXJmIH4=\x07\x1b[31m\x9b2J\u202e\x00key"


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    """What a rich console prints, as on a terminal of 400 columns."""
    file = io.StringIO()
    real = Console.__init__

    def wide(self: Console, quiet: bool) -> None:
        real(self, quiet)
        self._console.file = file
        self._console.width = 400

    monkeypatch.setattr(Console, "__init__", wide)
    return file


def trace(**reference: Any) -> dict[str, Any]:
    claim = {"source": "s", "where": {"pos": 1}, "reduce": "max", "value": 0.0, "tolerance": 9}
    return {
        "grid": {"component": "block_output", "layers": 0, "positions": [1, 2]},
        "figures": {"formats": ["png"], "dpi": 30},
        "reference": [{**claim, "because": "b", **reference}],
    }


def test_markup_in_a_claim_is_shown_as_written(
    cli: Callable[..., Result], write_spec: SpecWriter, tmp_path: Path, seen: io.StringIO
) -> None:
    """It was a MarkupError after everything had been computed, with nothing on stdout."""
    done = cli("trace", write_spec(**trace(claim=MARKUP)), "-o", tmp_path / "outputs")
    assert done.code == 0, done.err
    assert Path(done.out.splitlines()[-1], "results.csv").is_file()
    assert MARKUP in seen.getvalue()


def test_markup_in_the_name_of_a_set_is_shown_as_written(
    cli: Callable[..., Result], write_spec: SpecWriter, tmp_path: Path, seen: io.StringIO
) -> None:
    pair = {
        "clean": "The Space Needle is in Paris",
        "corrupted": "The Space Needle is in Rome",
        "answer": "Berlin",
        "wrong": ["London"],
    }
    site = {"component": "block_output", "layers": 1, "positions": "END"}
    spec = write_spec(
        kind="patch",
        data={"pairs": [pair], "keep": "all"},
        corrupt=None,
        intervention="denoise",
        grid=[{"name": MARKUP, "set": [site]}],
        metric=["logit_difference"],
        figures={"formats": ["png"], "dpi": 30},
    )
    done = cli("patch", spec, "-o", tmp_path / "outputs")
    assert done.code == 0, done.err
    assert MARKUP in seen.getvalue()


def test_reproduce_writes_its_page_whatever_claims_say(
    cli: Callable[..., Result], write_spec: SpecWriter, tmp_path: Path, seen: io.StringIO
) -> None:
    done = cli(
        "reproduce", write_spec(**trace(claim=MARKUP)), "-o", tmp_path / "outputs",
        "--junit", tmp_path / "junit.xml",
    )  # fmt: skip
    assert done.code == 0, done.err
    assert (tmp_path / "outputs" / "reproduce.html").is_file()
    assert (tmp_path / "junit.xml").is_file()
    assert MARKUP in seen.getvalue()


def test_a_finished_run_is_printed_before_it_is_described(
    cli: Callable[..., Result],
    write_spec: SpecWriter,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Whatever goes wrong on stderr, stdout has the folder already."""

    def broken(*_: object) -> None:
        raise OSError("stderr is gone")

    monkeypatch.setattr(Console, "top", broken)
    with pytest.raises(OSError, match="stderr is gone"):
        cli("trace", write_spec(**trace(claim="c")), "-o", tmp_path / "outputs")
    assert Path(capsys.readouterr().out.strip(), "results.csv").is_file()


@pytest.mark.parametrize("command", ["validate", "trace", "plan", "data"])
def test_control_sequences_of_an_unknown_key_do_not_reach_the_terminal(
    cli: Callable[..., Result], write_spec: SpecWriter, command: str
) -> None:
    spec = write_spec()
    spec.write_text(spec.read_text() + '"\\e]52;c;cm0gLXJmIH4=\\a\\e[31mkey": 1\n')
    done = cli(command, spec)
    assert done.code == 2
    assert "\\x1b]52;c;cm0gLXJmIH4=\\x07\\x1b[31mkey" in done.err
    assert_harmless(done.out + done.err)


def test_control_sequences_of_claims_subjects_and_tokens_do_not_reach_the_terminal(
    cli: Callable[..., Result], write_spec: SpecWriter, tmp_path: Path, seen: io.StringIO
) -> None:
    subject = "The \x1b[32mSpace Needle"
    facts = [{"prompt": f"{subject} is in downtown", "subject": subject, "answer": "Seattle"}]
    spec = write_spec(data={"facts": facts, "keep": "all"}, **trace(claim=CONTROL))
    done = cli("trace", spec, "-o", tmp_path / "outputs")
    assert done.code == 0, done.err
    assert "\\x1b]52;c;" in seen.getvalue()
    assert_harmless(done.out + done.err + seen.getvalue())
    shown = cli("data", spec)
    assert_harmless(shown.out + shown.err)


@given(st.text())
def test_printable_text_steers_no_terminal(text: str) -> None:
    shown = printable(text)
    assert_harmless(shown)
    shown.encode()
    assert printable(shown) == shown


@pytest.mark.parametrize("text", ["東京タワー", "مرحبا", "Café", "a\tb\nc", "👩‍🔬", "می‌خواهم"])
def test_printable_text_keeps_what_people_write(text: str) -> None:
    assert printable(text) == text


def test_commands_print_through_one_module() -> None:
    """Its functions escape; `typer.echo` and `print` do not."""
    for path in Path(interv.cli.__file__).parent.glob("*.py"):
        if path.name == "output.py":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call):
                assert ast.unparse(node.func) not in ("typer.echo", "print"), path
                # A cell or title that is a plain `str` is read as markup.
                assert ast.unparse(node.func) != "table.add_row" or path.name == "console.py"


def assert_harmless(text: str) -> None:
    steering = [c for c in text if c not in "\n\t" and (ord(c) < 32 or 127 <= ord(c) < 160)]
    assert not steering
    assert not set(text) & set("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")
