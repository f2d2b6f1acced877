"""`interv reproduce`: specs run for their reference, told in a table, JSON, XML and a page."""

from __future__ import annotations

import json
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
    assert "has no scores" in outcomes[2]["reason"]
    assert "no such file" in outcomes[3]["reason"]


def test_of_a_folder_the_specs_with_a_reference(write_spec: SpecWriter, tmp_path: Path) -> None:
    below = tmp_path / "below"
    below.mkdir()
    one = write_spec("one.yaml", reference=[TRUE])
    two = write_spec("below/two.yaml", reference=[TRUE])
    write_spec("three.yaml")
    (tmp_path / "data.yaml").write_text("- a\n- b\n")
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
    assert cli("reproduce", one, two, "-o", outputs).code == 130
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
