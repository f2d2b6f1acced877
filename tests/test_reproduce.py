"""`interv reproduce`: specs run for their reference, told in a table, JSON, XML and a page."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pandas as pd
import pytest
import yaml

from interv.report.claims import Verdict
from interv.reproduce.junit import junit
from interv.reproduce.outcome import Outcome
from interv.reproduce.specs import find_specs
from tests.browser import Browser, in_a_browser
from tests.conftest import Result, SpecWriter
from tests.test_plugins import GOOD

Cli = Callable[..., Result]
TRUE = {"claim": "it is a share", "source": "nobody", "between": [0, 1], "reduce": "max"}
FALSE = {"claim": "it is two", "source": "nobody", "value": 2, "tolerance": 0.1, "reduce": "max"}


def run(cli: Cli, *arguments: object) -> tuple[Result, list[dict[str, Any]]]:
    result = cli("reproduce", *arguments, "--json")
    return result, json.loads(result.out) if result.out else []


def test_claims_that_hold_exit_with_0_and_a_page(
    write_spec: SpecWriter, cli: Cli, tmp_path: Path
) -> None:
    path = write_spec(reference=[TRUE])
    result = cli("reproduce", path, "-o", tmp_path / "outputs")
    assert result.code == 0, result.err
    page = tmp_path / "outputs" / "reproduce.html"
    assert result.out.strip() == str(page)
    text = page.read_text()
    assert "it is a share" in text and "http://" not in text.replace("http://www.w3.org", "")
    assert "1 of 1 claim hold" in result.err and "1 spec: 1 reproduced" in result.err
    # Nothing is computed twice.
    again, [outcome] = run(cli, path, "-o", tmp_path / "outputs")
    assert again.code == 0
    folder = Path(outcome["folder"])
    assert len(json.loads((folder / "run.json").read_text())["sessions"]) == 1


def test_a_miss_exits_with_1_and_the_others_run(
    write_spec: SpecWriter, cli: Cli, tmp_path: Path
) -> None:
    missed = write_spec("missed.yaml", reference=[TRUE, FALSE])
    holds = write_spec("holds.yaml", reference=[TRUE])
    xml = tmp_path / "junit.xml"
    result, outcomes = run(cli, missed, holds, "-o", tmp_path / "outputs", "--junit", xml)
    assert result.code == 1
    assert [outcome["status"] for outcome in outcomes] == ["missed", "reproduced"]
    assert [v["verdict"] for v in outcomes[0]["verdicts"]] == ["holds", "missed"]
    root = ElementTree.fromstring(xml.read_bytes())
    assert (root.get("tests"), root.get("failures"), root.get("errors")) == ("3", "1", "0")
    [failure] = root.findall(".//failure")
    assert "wanted 2 ± 0.1" in str(failure.get("message"))
    assert f"interv trace {missed}" in str(failure.text)


def test_a_miss_that_is_noted_fails_nothing(
    write_spec: SpecWriter, cli: Cli, tmp_path: Path
) -> None:
    path = write_spec(reference=[{**FALSE, "on_miss": "note"}])
    result, [outcome] = run(cli, path, "-o", tmp_path)
    assert (result.code, outcome["status"]) == (0, "reproduced")
    assert outcome["verdicts"][0]["verdict"] == "noted"
    assert "missed (noted)" in result.err


def test_a_model_that_is_not_here_is_said_and_no_failure(
    write_spec: SpecWriter, cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    path = write_spec(reference=[TRUE], model="somebody/something")
    result, [outcome] = run(cli, path, "-o", tmp_path / "outputs")
    assert (result.code, outcome["status"]) == (0, "not run")
    assert "somebody/something" in outcome["reason"] and "validated" in outcome["checked"]
    assert "not run: " in result.err


def test_a_wrong_spec_exits_with_2_and_the_others_run(
    write_spec: SpecWriter, cli: Cli, tmp_path: Path
) -> None:
    wrong = write_spec("wrong.yaml", reference=[TRUE], seed=-1)
    without = write_spec("without.yaml")
    failing = write_spec("failing.yaml", reference=[{**TRUE, "table": "scores"}])
    right = write_spec("right.yaml", reference=[TRUE])
    paths = [wrong, without, failing, tmp_path / "absent.yaml", right]
    result, outcomes = run(cli, *paths, "-o", tmp_path / "outputs")
    assert result.code == 2
    assert [o["status"] for o in outcomes] == ["failed"] * 4 + ["reproduced"]
    assert "seed" in outcomes[0]["reason"] and "wrong.yaml:" in outcomes[0]["reason"]
    assert "has no `reference`" in outcomes[1]["reason"]
    assert "will have no scores" in outcomes[2]["reason"]
    assert "no such file" in outcomes[3]["reason"]


def test_of_a_folder_the_specs_with_a_reference(write_spec: SpecWriter, tmp_path: Path) -> None:
    (tmp_path / "below").mkdir()
    (tmp_path / "outputs").mkdir()
    one = write_spec("one.yaml", reference=[TRUE])
    two = write_spec("below/two.yaml", reference=[TRUE])
    write_spec("three.yaml")
    (tmp_path / "data.yaml").write_text("- a\n- b\n")
    (tmp_path / "no_yaml.yaml").write_text("kind: [\n")
    write_spec("outputs/spec.yaml", reference=[TRUE])
    (tmp_path / "outputs" / "journal.jsonl").touch()
    assert find_specs([tmp_path]) == [two, one]
    assert find_specs([one, tmp_path]) == [one, two]


def test_what_is_asked_for_is_clear(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write_spec: SpecWriter
) -> None:
    monkeypatch.chdir(tmp_path)
    assert "name specs or folders" in cli("reproduce").err
    assert "there is no folder configs/ here" in cli("reproduce", "--all").err
    (tmp_path / "configs").mkdir()
    write_spec("configs/none.yaml")
    result = cli("reproduce", "--all")
    assert result.code == 2 and "none of its 1 YAML files" in result.err
    write_spec("configs/one.yaml", reference=[TRUE])
    assert cli("reproduce", "--all").code == 0
    assert cli("reproduce", "--all", "configs/one.yaml").code == 2


def test_update_writes_what_was_found_and_keeps_the_rest(
    write_spec: SpecWriter, cli: Cli, tmp_path: Path
) -> None:
    table = tmp_path / "cells.csv"
    table.write_text("component,layer,pos,value\nblock_output,0,1,9\nblock_output,2,3,-9\n")
    inline = [{"component": "mlp_output", "layer": 1, "pos": 2, "value": 5, "tolerance": 0.01}]
    claims = [
        {**FALSE, "where": {"component": "block_output"}, "tolerance": 0.001},
        {"claim": "cells", "source": "nobody", "cells": "cells.csv", "tolerance": 1e-5},
        {"claim": "inline", "source": "nobody", "cells": inline},
        TRUE,
    ]
    path = write_spec(reference=claims)
    path.write_text(path.read_text().replace("value: 2\n", "value: 2  # by hand\n"))
    assert cli("reproduce", path, "-o", tmp_path / "o", "--update").code == 2  # nobody can answer
    assert cli("reproduce", path, "-o", tmp_path / "o").code == 1
    result = cli("reproduce", path, "-o", tmp_path / "o", "--update", "--yes")
    assert result.code == 1  # of the reference as it was
    assert "2 → " in result.err and f"{table}:3" in result.err
    text = path.read_text()
    assert "  # by hand\n" in text and "value: 2 " not in text
    lines = table.read_text().splitlines()
    assert lines[0] == "component,layer,pos,value" and lines[1].split(",")[-1] != "9"
    again = cli("reproduce", path, "-o", tmp_path / "o", "--update", "--yes")
    assert again.code == 0, again.err
    document = yaml.safe_load(text)
    assert document["reference"][3] == TRUE


def place(**more: Any) -> dict[str, Any]:
    where = {"component": "block_output", "layer": 2, "pos": 5}
    return {"claim": "c", "source": "s", "where": where, "tolerance": 0.1, **more}


def test_updates_have_the_digits_that_the_tolerance_asks_for(
    write_spec: SpecWriter, cli: Cli, tmp_path: Path
) -> None:
    path = write_spec(reference=[place(value=1), place(value=2, tolerance=1e-15)])
    update = ("reproduce", path, "-o", tmp_path / "o", "--update", "--yes")
    assert cli(*update).code == 1
    again = cli(*update)
    assert again.code == 0 and "its numbers are what was found" in again.err
    first, second = (claim["value"] for claim in yaml.safe_load(path.read_text())["reference"])
    assert first == float(f"{second:.6g}") and len(str(second)) > len(str(first))


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (b"\xef\xbb\xbfvalue,layer,pos\r\n9,1,1\r\n", b"\xef\xbb\xbfvalue,layer,pos\r\n#,1,1\r\n"),
        (b"layer,pos,value\n\n1,1,9\n\n", b"layer,pos,value\n\n1,1,#\n\n"),
        (b'"layer",token,"value"\n"1"," Space","9"', b'"layer",token,"value"\n"1"," Space","#"'),
    ],
)
def test_an_update_changes_numbers_of_a_csv_and_no_other_byte(
    write_spec: SpecWriter, cli: Cli, tmp_path: Path, before: bytes, after: bytes
) -> None:
    table = tmp_path / "cells.csv"
    table.write_bytes(before)
    where = {"component": "block_output"}
    path = write_spec(reference=[place(where=where, cells="cells.csv", tolerance=0.01)])
    result = cli("reproduce", path, "-o", tmp_path / "o", "--update", "--yes")
    assert result.code == 1, result.err
    head, tail = after.split(b"#")
    written = table.read_bytes()
    assert written.startswith(head) and written.endswith(tail)
    assert float(written[len(head) : len(written) - len(tail)]) != 9
    assert cli("reproduce", path, "-o", tmp_path / "o").code == 0


def test_an_update_keeps_the_ends_of_lines_of_a_spec(
    write_spec: SpecWriter, cli: Cli, tmp_path: Path
) -> None:
    path = write_spec(reference=[place(value=1)])
    path.write_bytes(path.read_bytes().replace(b"\n", b"\r\n"))
    cli("reproduce", path, "-o", tmp_path / "o", "--update", "--yes")
    text = path.read_bytes()
    assert text.count(b"\r\n") == text.count(b"\n") and b"value: 1\r" not in text


@pytest.mark.parametrize(("written", "word"), [("&v 7", "&v"), ("0x7", "0x7")])
def test_an_update_of_what_is_no_plain_number_is_refused(
    write_spec: SpecWriter, cli: Cli, tmp_path: Path, written: str, word: str
) -> None:
    path = write_spec(reference=[place(value=3), place(value=7)])
    path.write_text(path.read_text().replace("value: 7", f"value: {written}"))
    before = path.read_text()
    result = cli("reproduce", path, "-o", tmp_path / "o", "--update", "--yes")
    assert result.code == 2 and f"'{word}' is not a plain number" in result.err
    assert path.read_text() == before


def test_an_update_knows_the_plugin_of_the_run(
    write_spec: SpecWriter, cli: Cli, tmp_path: Path
) -> None:
    mine = tmp_path / "mine.py"
    mine.write_text(GOOD)
    pair = {"clean": "The Space Needle is in", "corrupted": "The Old Needle is in",
            "answer": "Seattle", "wrong": "Mostar"}  # fmt: skip
    where = {"component": "block_output", "layer": 1, "pos": 1}
    path = write_spec(
        kind="patch", data={"pairs": [pair]}, corrupt=None, intervention="denoise",
        metric=["margin"], grid=[{"component": "block_output"}],
        reference=[place(where=where, value=99)],
    )  # fmt: skip
    more = ("-o", tmp_path / "o", "--plugin", mine)
    result = cli("reproduce", path, *more, "--update", "--yes")
    assert result.code == 1 and "99 → " in result.err, result.err
    assert cli("reproduce", path, *more).code == 0


def test_a_number_of_two_claims_is_not_written_for_one(
    write_spec: SpecWriter, cli: Cli, tmp_path: Path
) -> None:
    (tmp_path / "cells.csv").write_text("pos,value\n1,9\n")
    wheres = [{"component": "block_output", "layer": layer} for layer in (0, 1)]
    claims = [place(where=where, cells="cells.csv", tolerance=1e-9) for where in wheres]
    path = write_spec(reference=claims)
    result = cli("reproduce", path, "-o", tmp_path / "o", "--update", "--yes")
    assert result.code == 2 and "stands for several claims" in result.err
    assert (tmp_path / "cells.csv").read_text() == "pos,value\n1,9\n"


def test_an_update_of_a_read_only_file_is_refused(
    write_spec: SpecWriter, cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_spec(reference=[place(value=3)])
    monkeypatch.setattr("interv.reproduce.update.os.access", lambda _, mode: mode != os.W_OK)
    result = cli("reproduce", path, "-o", tmp_path / "o", "--update", "--yes")
    assert result.code == 2 and f"{path}: is read-only" in result.err
    assert "value: 3" in path.read_text()


def test_where_to_write_is_checked_before_anything_runs(
    write_spec: SpecWriter, cli: Cli, tmp_path: Path
) -> None:
    path, file = write_spec(reference=[TRUE]), tmp_path / "file"
    file.touch()
    for more, code, message in (
        (("--html", tmp_path), 2, "is a folder; name a file in it"),
        (("--junit", tmp_path), 2, "is a folder; name a file in it"),
        (("--html", tmp_path / "a", "--junit", tmp_path / "a"), 2, "are both"),
        (("--junit", file / "a.xml"), 1, "cannot be written"),
    ):
        result = cli("reproduce", path, "-o", tmp_path / "o", *more)
        assert result.code == code and message in result.err, result.err
    assert not list(tmp_path.glob("o/*/*"))


def test_a_spec_of_this_folder_is_named_with_the_folder() -> None:
    outcome = Outcome(Path("a.yaml"), "trace", "a", "m", "failed", exit_code=1)
    assert outcome.label == f"{Path.cwd().name}/a"


def test_a_no_changes_nothing(
    write_spec: SpecWriter, cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_spec(reference=[FALSE])
    before = path.read_text()
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    monkeypatch.setattr("typer.confirm", lambda *_, **__: False)
    assert cli("reproduce", path, "-o", tmp_path / "o", "--update").code == 1
    assert path.read_text() == before


def test_what_xml_cannot_hold_is_left_out() -> None:
    cells = pd.DataFrame({"layer": [0]})
    verdict = Verdict("bell \x07 <&>", "summary", 1.0, "\x00", "1", "missed", "s", "", cells)
    outcome = Outcome(Path("a.yaml"), "trace", "a", "m", "missed", verdicts=(verdict,), exit_code=1)
    [case] = ElementTree.fromstring(junit([outcome])).findall(".//testcase")
    assert case.get("name") == "bell \N{REPLACEMENT CHARACTER} <&>"


def test_a_run_that_is_broken_off_goes_on(
    write_spec: SpecWriter, cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C leaves the runs before it done, and the command goes on with the rest."""
    one = write_spec("one.yaml", reference=[TRUE])
    two = write_spec("two.yaml", reference=[TRUE], seed=3)
    outputs = tmp_path / "outputs"
    from interv.runner import sweep

    real, seen = sweep.run_sweep, []

    def interrupted(plan: Any, *arguments: Any, **more: Any) -> Any:
        seen.append(plan.spec.name)
        if plan.spec.name == "two" and len(seen) == 2:
            raise KeyboardInterrupt
        return real(plan, *arguments, **more)

    monkeypatch.setattr("interv.runner.sweep.run_sweep", interrupted)
    stopped = cli("reproduce", one, two, "-o", outputs)
    assert stopped.code == 130 and stopped.err.endswith("interv: interrupted\n")
    assert not (outputs / "reproduce.html").exists()
    assert cli("reproduce", one, two, "-o", outputs).code == 0
    record = next(outputs.glob("one/*/run.json"))
    assert len(json.loads(record.read_text())["sessions"]) == 1


@in_a_browser
@pytest.mark.parametrize("width", [390, 1280])
def test_the_page_in_a_browser(
    write_spec: SpecWriter, cli: Cli, tmp_path: Path, chromium: Browser, width: int
) -> None:
    cells = [
        {"component": "block_output", "layer": i, "pos": p, "value": 0.001 * i}
        for i in range(3)
        for p in range(6)
    ]
    figure = {"claim": "the <b>figure</b>", "source": "s", "cells": cells, "tolerance": 1}
    path = write_spec(reference=[TRUE, FALSE, figure])
    missing = write_spec("missing.yaml", reference=[TRUE], model={"path": "./nowhere"})
    assert cli("reproduce", path, missing, "-o", tmp_path).code == 2
    page = tmp_path / "reproduce.html"
    chromium.open(page, width, touch=width < 500)
    chromium.evaluate("document.querySelectorAll('details').forEach((one) => { one.open = true; })")
    assert chromium.evaluate("document.documentElement.scrollWidth <= innerWidth")
    assert [url for url in chromium.requests() if not url.startswith("data:")] == [page.as_uri()]
    assert chromium.complaints() == []
    titles = chromium.evaluate(
        "[...document.querySelectorAll('figure.chart strong')].map((one) => one.textContent)"
    )
    assert titles == ["reference", "reproduced", "difference"]
    # Reference and reproduced have one scale: the same words under their colour bars.
    bars = chromium.evaluate(
        "[...document.querySelectorAll('.legend svg')].map((one) => one.textContent.trim())"
    )
    assert bars[0] == bars[1] != bars[2]
    told = chromium.evaluate(
        "[...document.querySelectorAll('svg.heat')].map((one) => "
        "[...one.querySelectorAll('rect title')].at(-1).textContent)"
    )
    assert "0.002" in told[0] and told[0] != told[1]
    assert chromium.evaluate("document.querySelectorAll('.claims .missed').length") == 1
    assert "the <b>figure</b>" in chromium.evaluate("document.body.textContent")
