"""`interv report`: pages of all kinds of runs, what they escape, and how a browser shows them."""

from __future__ import annotations

import itertools
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import interv
from interv.errors import IntervError
from interv.report.html.charts import HeatMap
from interv.report.html.colours import SCALES, code, colour, is_dark
from interv.report.html.folder import read_folder
from interv.report.html.page import render
from interv.report.html.prompts import groups_of
from interv.report.html.view import table_view
from tests.browser import Browser, in_a_browser
from tests.conftest import PROMPT, Result
from tests.test_das import SPEC as DAS
from tests.test_run_trace import known_fact

HOSTILE = "</pre><script>alert(1)</script><img src=x onerror=alert(2)> is in the"
FIGURES = {"formats": ["svg"], "dpi": 40}
KINDS = ("trace", "patch", "train-das", "collect")


def specs(folder: Path) -> dict[str, dict[str, Any]]:
    """A small spec of each kind."""
    model = {"path": str(folder)}
    fact = {"prompt": PROMPT, "subject": "The Space Needle", "answer": "Seattle"}
    pairs = [
        {
            "clean": f"The {name} Needle {HOSTILE}",
            "corrupted": f"The {other} Needle {HOSTILE}",
            "answer": "Seattle",
            "wrong": "Mostar",
        }
        for name, other in (("Space", "Old"), ("Old", "Space"))
    ]
    claim = {"where": {"component": "block_output", "layer": 0, "pos": 0}, "source": "nobody"}
    return {
        "trace": {
            "kind": "trace",
            "name": "traced",
            "model": model,
            "data": {"facts": [fact], "keep": "all"},
            "corrupt": {"type": "noise", "level": 1.0, "samples": 3},
            "grid": [{"component": "block_output"}, {"component": "mlp_output", "window": 2}],
            "figures": FIGURES,
            "reference": [
                {"claim": "it <b>holds</b>", "between": [-100, 100], **claim},
                {"claim": "it is missed", "between": [7, 8], **claim},
            ],
        },
        "patch": {
            "kind": "patch",
            "name": "patched",
            "model": model,
            "data": {"pairs": pairs},
            "intervention": "denoise",
            "grid": [
                {"component": "block_output"},
                {"component": "head_attention_value_output", "positions": "whole"},
            ],
            "figures": FIGURES,
        },
        "train-das": {**DAS, "figures": FIGURES, "grid": {"component": "block_output"}},
        "collect": {
            "kind": "collect",
            "name": "collected",
            "model": model,
            "data": {"prompts": [PROMPT, HOSTILE]},
            "grid": {"component": "block_output", "layers": 1},
        },
    }


@pytest.fixture(scope="module")
def runs(gpt2_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A run folder of each kind, with its page."""
    from interv.report.html.run_page import write_page

    outputs = tmp_path_factory.mktemp("outputs")
    folders = {}
    for kind, spec in specs(gpt2_folder).items():
        # Results and Activations both know their folder.
        folders[kind] = Path(interv.run(spec, outputs=outputs).folder)
        write_page(folders[kind])
    return folders


class Page(HTMLParser):
    """Elements of a page, and its text without styles and scripts."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self._texts: list[str] = []
        self.feed(text)
        self.text = " ".join(" ".join(self._texts).split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        if self.elements and self.elements[-1][0] not in ("style", "script"):
            self._texts.append(data)

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


def page_of(folder: Path) -> Page:
    return Page((folder / "report.html").read_text("utf-8"))


# What is on a page.


@pytest.mark.parametrize("kind", KINDS)
def test_a_page_has_what_a_reader_asks_for(runs: dict[str, Path], kind: str) -> None:
    page, run = page_of(runs[kind]), read_folder(runs[kind])
    for part in ("Result", "What was asked", "Record", "How to cite it and repeat it"):
        assert part in page.text
    assert str(run.record["identity"]) in page.text
    assert f"interv {kind} {runs[kind] / 'resolved.yaml'} -o elsewhere" in page.text
    assert run.record["environment"]["torch"] in page.text
    assert f"kind: {kind}" in page.text
    assert "arXiv" in page.text
    levels = [int(tag[1]) for tag, _ in page.elements if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(below - above <= 1 for above, below in itertools.pairwise(levels))
    identifiers = [a["id"] for _, a in page.elements if "id" in a]
    assert len(identifiers) == len(set(identifiers))
    links = [a["href"] or "" for a in page.all("a")]
    assert {link[1:] for link in links if link.startswith("#")} <= set(identifiers)
    assert all(image["alt"] for image in page.all("img"))
    assert all(head.get("scope") for head in page.all("th"))


def test_squares_tell_what_the_tables_hold(runs: dict[str, Path]) -> None:
    text = (runs["trace"] / "report.html").read_text("utf-8")
    page, run = page_of(runs["trace"]), read_folder(runs["trace"])
    rows = run.table("results.csv")
    maps = [svg for svg in page.all("svg") if svg.get("class") == "heat"]
    assert [m["data-columns"] for m in maps] == ["3", "3"]
    for row in rows:
        star = "*" if int(row["pos"]) <= 2 else ""
        place = f"{row['token'].strip()}{star}, layer {row['layer']}"
        assert f"<title>{place}: {float(row['value']):.4g}\neffect" in text
    heads = [r for r in read_folder(runs["patch"]).table("summary.csv") if r["head"]]
    patched = (runs["patch"] / "report.html").read_text("utf-8")
    for row in heads:
        assert f"<title>head {row['layer']}.{row['head']}: {float(row['mean']):+.4g}" in patched


def test_verdicts_and_warnings_are_told(runs: dict[str, Path]) -> None:
    text = page_of(runs["trace"]).text
    assert "✓ holds it <b>holds</b>" in text
    assert "✗ missed it is missed" in text
    assert "1 of 2 claims of the reference was missed." in text
    assert "No row has an interval (" in text and ": 3 values, 95 % needs 5)." in text
    assert "draws of noise on one prompt" in text
    assert "n = 2 prompts" in page_of(runs["patch"]).text


def test_prompts_have_their_tokens_and_roles(runs: dict[str, Path]) -> None:
    run = read_folder(runs["trace"])
    [row] = run.table("prompts.csv")
    assert "".join(json.loads(row["tokens"])) == PROMPT
    spans = json.loads(row["spans"])
    assert spans["last_subject"] == [2] and spans["last"] == [5]
    assert "last subject" in page_of(runs["trace"]).text
    rows = read_folder(runs["patch"]).table("prompts.csv")
    assert json.loads(rows[0]["spans"])["END"] == [len(json.loads(rows[0]["tokens"])) - 1]
    changed = [a for a in page_of(runs["patch"]).all("span") if a.get("class") == "token changed"]
    assert len(changed) >= len(rows)


def test_a_prompt_left_out_is_told_with_its_reason(gpt2_folder: Path, tmp_path: Path) -> None:
    from interv.report.html.run_page import run_page

    spec = specs(gpt2_folder)["trace"]
    prompt, answer = known_fact(gpt2_folder)
    known = {"prompt": prompt, "subject": prompt.split()[0], "answer": answer}
    data = {"facts": [known, *spec["data"]["facts"]], "keep": "correct", "join": ""}
    folder = Path(interv.run({**spec, "data": data, "reference": []}, outputs=tmp_path).folder)
    text = Page(run_page(read_folder(folder))).text
    assert "1 of 2 prompts are left out (1: the model's top answer is another)." in text
    assert "Prompt 1 left out: the model's top answer is" in text


@pytest.mark.parametrize("kind", KINDS)
def test_hostile_text_is_text_and_nothing_is_loaded(runs: dict[str, Path], kind: str) -> None:
    page = page_of(runs[kind])
    text = (runs[kind] / "report.html").read_text("utf-8")
    assert len(page.all("script")) == 1
    assert not any(name.startswith("on") for _, a in page.elements for name in a)
    assert all((image["src"] or "").startswith("data:image/") for image in page.all("img"))
    assert not page.all("link") and not page.all("iframe") and not page.all("object")
    assert "url(" not in text and "@import" not in text
    [policy] = [m for m in page.all("meta") if m.get("http-equiv") == "Content-Security-Policy"]
    assert (policy["content"] or "").startswith("default-src 'none'; img-src data:;")
    if kind in ("patch", "collect"):
        assert "<script>alert(1)</script>" in page.text


def test_the_same_folder_gives_the_same_page(runs: dict[str, Path]) -> None:
    from interv.report.html.run_page import run_page

    for folder in runs.values():
        written = (folder / "report.html").read_text("utf-8")
        assert run_page(read_folder(folder)) == written


# The parts.


def test_colours_are_those_of_matplotlib() -> None:
    from matplotlib import colormaps
    from matplotlib.colors import to_rgb

    names = {"purple": "Purples", "red": "Reds", "diverging": "RdBu", "difference": "PuOr",
             "green": "Greens", "viridis": "viridis"}  # fmt: skip
    assert set(names) == set(SCALES)
    for name, theirs in names.items():
        for share in np.linspace(0, 1, 21):
            ours = to_rgb(code(colour(name, float(share))))
            assert ours == pytest.approx(colormaps[theirs](float(share))[:3], abs=0.02)
    assert colour("purple", -3) == SCALES["purple"][0]
    assert is_dark((0, 0, 0)) and not is_dark((255, 255, 255))


def test_a_heat_map_draws_every_value_once() -> None:
    values = np.array([[0.0, 0.5, np.nan], [1.0, 2.0, -1.0]])
    one = HeatMap("t", ["a", "<b>"], ["0", "1", "2"], values, "row", "layer", 0, 1, "purple", "p")
    squares = list(one.squares())
    assert [s.fill for s in squares] == [
        "#fcfbfd", "#9e9ac8", None, "#3f007d", "#3f007d", "#fcfbfd",
    ]  # fmt: skip
    assert squares[1].hover == "row a, layer 1: 0.5"
    assert squares[2].hover == "row a, layer 2: no value"
    assert "Highest: row <b>, layer 1: 2." in one.described
    turned = HeatMap("t", ["a"], ["0"], np.array([[1.0]]), "", "", 5, 1, "purple", "rank")
    assert next(turned.squares()).fill == "#3f007d"
    with pytest.raises(ValueError, match="values for its labels"):
        HeatMap("t", ["a"], ["0"], values, "", "", 0, 1, "purple", "p")
    with pytest.raises(ValueError, match="no colours 'blue'"):
        HeatMap("t", ["a"], ["0"], values[:1, :1], "", "", 0, 1, "blue", "p")


def test_other_pages_extend_the_base() -> None:
    text = render("base.html", version="<1>")
    assert "Made by interv &lt;1&gt; from files alone" in text


def test_tables_are_cut_and_say_so() -> None:
    rows = [{"x": str(i), "mean": str(i % 7 - 3.25), "same": "k", "empty": ""} for i in range(900)]
    view = table_view("t", "summary.csv", rows, "mean", most=100)
    assert [column.name for column in view.columns] == ["x", "mean"]
    assert view.same == [("same", "k")] and view.shown == 100
    assert view.cut == (
        "The 100 rows of 900 with the largest effects; all of them are in summary.csv."
    )
    assert {row[1].full for row in view.rows} == {"-3.25"}


def test_tokens_of_one_span_stand_together() -> None:
    groups = groups_of(["a", " b", "\n", "d"], {"S": [1, 2], "END": [3]}, ["a", " c", "\n", "d"])
    assert [(g.names, [t.text for t in g.tokens]) for g in groups] == [
        ("", ["a"]), ("S", ["\N{NO-BREAK SPACE}b", "↵"]), ("END", ["d"]),
    ]  # fmt: skip
    assert [t.changed for g in groups for t in g.tokens] == [False, True, False, False]


# The command.


def test_the_command_writes_and_prints_the_path(
    runs: dict[str, Path], cli: Callable[..., Result], tmp_path: Path
) -> None:
    page = tmp_path / "page.html"
    result = cli("report", runs["trace"], "--output", page)
    assert (result.code, result.out, result.err) == (0, f"{page}\n", "")
    assert page.read_text("utf-8") == (runs["trace"] / "report.html").read_text("utf-8")
    assert cli("report", runs["trace"]).out == f"{runs['trace'] / 'report.html'}\n"


def test_mistakes_name_the_nearest_runs(
    runs: dict[str, Path], cli: Callable[..., Result], tmp_path: Path
) -> None:
    outputs = runs["trace"].parent.parent
    wrong = cli("report", outputs)
    assert wrong.code == 2 and "is no run folder; there are" in wrong.err
    assert str(runs["collect"]) in wrong.err
    absent = cli("report", f"{runs['patch']}x")
    assert absent.code == 2 and "no such folder" in absent.err and str(runs["patch"]) in absent.err
    assert "and there is none in it" in cli("report", tmp_path).err
    assert "is a file" in cli("report", runs["trace"] / "run.json").err


def test_a_run_that_has_not_finished_says_how_to_go_on(
    runs: dict[str, Path], cli: Callable[..., Result], tmp_path: Path
) -> None:
    folder = tmp_path / "outputs" / "traced" / "12345678"
    shutil.copytree(runs["trace"], folder)
    (folder / "run.json").unlink()
    result = cli("report", folder)
    assert result.code == 2 and "The same command again goes on where it stopped" in result.err
    assert f"interv trace {folder / 'resolved.yaml'} -o {tmp_path / 'outputs'}" in result.err
    (folder / "run.json").write_text("{")
    with pytest.raises(IntervError, match=r"run\.json: is damaged"):
        read_folder(folder)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("resolved.yaml", b"a: [", "is damaged"),
        ("run.json", b"[]", "no 'kind'"),
        ("run.json", b'{"kind": "trace"}', "no 'identity'"),
        ("summary.csv", b"", "no column 'component'"),
        ("summary.csv", b"component,layer,metric,mean,n\na,1,p,much,1\n", "row 1: could not"),
        ("summary.csv", None, "is not there"),
        ("prompts.csv", b"", "no column 'prompt_id'"),
        ("reference.csv", b"a\n1\n", "no column 'claim'"),
        ("figures/strange.svg", b"<svg></svg>", "is no SVG of matplotlib's"),
    ],
)
def test_a_damaged_file_is_named(
    runs: dict[str, Path],
    cli: Callable[..., Result],
    tmp_path: Path,
    name: str,
    content: bytes | None,
    message: str,
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(runs["trace"], copy)
    if content is None:
        (copy / name).unlink()
    else:
        (copy / name).write_bytes(content)
    result = cli("report", copy)
    assert result.code == 1
    assert f"{copy / name}" in result.err and message in result.err


def test_the_page_needs_no_torch(runs: dict[str, Path], environment: dict[str, str]) -> None:
    code = (
        "import sys; from interv.cli import app; app(sys.argv[1:], standalone_mode=False); "
        "heavy = {'torch', 'transformers', 'pandas', 'matplotlib'}; "
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)"
    )
    for folder in runs.values():
        subprocess.run(
            [sys.executable, "-c", code, "report", str(folder)], check=True, env=environment
        )


# In a browser.


@in_a_browser
@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize("kind", KINDS)
def test_no_page_scrolls_sideways_and_none_asks_the_network(
    runs: dict[str, Path], chromium: Browser, kind: str, width: int
) -> None:
    page = runs[kind] / "report.html"
    chromium.open(page, width, touch=width < 500)
    chromium.evaluate("document.querySelectorAll('details').forEach((one) => { one.open = true; })")
    assert chromium.evaluate("document.documentElement.scrollWidth <= innerWidth")
    assert chromium.evaluate("innerWidth") == width
    asked = [url for url in chromium.requests() if not url.startswith("data:image/")]
    assert asked == [page.as_uri()]
    assert chromium.complaints() == []


SQUARE = "document.querySelectorAll('svg.heat rect')[4]"
TIP = (
    "(() => { const t = document.getElementById('tip'); return t.hidden ? '' : t.textContent; })()"
)


def middle_of_square(tab: Browser) -> dict[str, float]:
    tab.evaluate(f"{SQUARE}.scrollIntoView({{block: 'center'}})")
    # Scrolling hides what is told, a frame later.
    tab.evaluate("new Promise((done) => setTimeout(done, 200))")
    box = f"{SQUARE}.getBoundingClientRect()"
    found: dict[str, float] = tab.evaluate(
        f"({{x: {box}.x + {box}.width / 2, y: {box}.y + {box}.height / 2}})"
    )
    return found


@in_a_browser
def test_a_square_tells_its_value_when_pointed_at(runs: dict[str, Path], chromium: Browser) -> None:
    chromium.open(runs["trace"] / "report.html", 1280)
    wanted = chromium.evaluate(f"{SQUARE}.querySelector('title').textContent")
    assert chromium.evaluate(TIP) == ""
    at = middle_of_square(chromium)
    chromium.call("Input.dispatchMouseEvent", type="mouseMoved", **at)
    assert chromium.evaluate(TIP) == wanted
    chromium.call("Input.dispatchMouseEvent", type="mouseMoved", x=2, y=2)
    assert chromium.evaluate(TIP) == ""


@in_a_browser
def test_a_square_tells_its_value_when_tapped(runs: dict[str, Path], chromium: Browser) -> None:
    chromium.open(runs["trace"] / "report.html", 390, touch=True)
    wanted = chromium.evaluate(f"{SQUARE}.querySelector('title').textContent")
    at = middle_of_square(chromium)
    chromium.call("Input.dispatchTouchEvent", type="touchStart", touchPoints=[at])
    chromium.call("Input.dispatchTouchEvent", type="touchEnd", touchPoints=[])
    assert chromium.evaluate(TIP) == wanted
    assert chromium.evaluate(
        "(() => { const box = document.getElementById('tip').getBoundingClientRect(); "
        "return box.left >= 0 && box.right <= innerWidth && box.top >= 0; })()"
    )


@in_a_browser
def test_keys_go_from_square_to_square(runs: dict[str, Path], chromium: Browser) -> None:
    chromium.open(runs["trace"] / "report.html", 1280)
    wanted = chromium.evaluate(f"{SQUARE}.querySelector('title').textContent")
    chromium.evaluate("document.querySelector('svg.heat').focus({preventScroll: true})")
    for key in ("ArrowRight", "ArrowRight", "ArrowDown"):
        chromium.call("Input.dispatchKeyEvent", type="keyDown", key=key)
    assert chromium.evaluate(TIP) == wanted


@in_a_browser
def test_tables_are_sorted_and_filtered(runs: dict[str, Path], chromium: Browser) -> None:
    chromium.open(runs["trace"] / "report.html", 1280)
    table = "document.getElementById('table-summary')"
    column = f"[...{table}.tHead.rows[0].cells].findIndex((h) => h.textContent === 'mean')"
    values = f"[...{table}.tBodies[0].rows].map((row) => Number(row.cells[{column}].textContent))"
    chromium.evaluate(f"{table}.tHead.rows[0].cells[{column}].querySelector('button').click()")
    falling = chromium.evaluate(values)
    assert falling == sorted(falling, reverse=True) and len(set(falling)) > 5
    chromium.evaluate(
        "(() => { const box = document.querySelector('input[data-table=table-summary]'); "
        "box.value = 'needle mlp'; box.dispatchEvent(new Event('input')); })()"
    )
    shown = f"[...{table}.tBodies[0].rows].filter((row) => !row.hidden).map((row) => row.innerText)"
    lines = chromium.evaluate(shown)
    assert len(lines) == 3 and all("Needle" in line and "mlp_output" in line for line in lines)
