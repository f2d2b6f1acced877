from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest

from interv import __version__
from tests.conftest import Result, SpecWriter

Cli = Callable[..., Result]


def test_the_last_line_on_stdout_is_the_run_folder(
    write_spec: SpecWriter, cli: Cli, tmp_path: Path
) -> None:
    result = cli("trace", write_spec(), "-o", tmp_path / "out")
    folder = Path(result.out.splitlines()[-1])
    names = {p.name for p in folder.iterdir()}
    assert names == {
        ".lock", "figures", "journal.jsonl", "prompts.csv", "resolved.yaml", "results.csv",
        "run.json", "spec.yaml", "summary.csv",
    }  # fmt: skip
    assert "the best layer of the best places" in result.err
    assert "\x1b" not in result.err, "colours or a bar where there is no terminal"


def test_quiet_is_quiet(write_spec: SpecWriter, cli: Cli, tmp_path: Path) -> None:
    result = cli("trace", write_spec(), "-o", tmp_path / "out", "--quiet")
    assert (result.code, result.err) == (0, "")
    assert Path(result.out.strip()).is_dir()


def test_json_is_one_document_with_the_summary(
    write_spec: SpecWriter, cli: Cli, tmp_path: Path
) -> None:
    result = cli("trace", write_spec(), "-o", tmp_path / "out", "--json")
    document = json.loads(result.out)
    table = pd.read_csv(Path(document["folder"]) / "summary.csv", keep_default_na=False)
    assert len(document["summary"]) == len(table)
    assert document["summary"][0]["value"] == pytest.approx(table["value"][0])
    assert all(Path(figure).is_file() for figure in document["figures"])


def test_version(cli: Cli) -> None:
    assert cli("--version").out == f"interv {__version__}\n"


@pytest.mark.parametrize("command", ["trace", "plan", "validate", "schema"])
def test_every_command_has_help_with_an_example(cli: Cli, command: str) -> None:
    result = cli(command, "--help")
    assert result.code == 0
    assert "Example: interv" in result.out or "schema.json" in result.out


def test_a_folder_that_cannot_be_written_is_refused_before_the_model_loads(
    write_spec: SpecWriter, cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "out").write_text("a file")

    def never(*_: object) -> None:
        raise AssertionError("the model was loaded")

    monkeypatch.setattr("interv.runner.sweep.load_model", never)
    result = cli("trace", write_spec(), "-o", tmp_path / "out")
    assert result.code == 1
    assert "cannot be written" in result.err


def test_weights_that_are_not_at_hand_are_an_error_with_the_reason(
    write_spec: SpecWriter, cli: Cli, tmp_path: Path, gpt2_folder: Path
) -> None:
    for name in ("config.json", "tokenizer.json"):
        (tmp_path / name).write_bytes((gpt2_folder / name).read_bytes())
    path = write_spec(model={"path": str(tmp_path)})
    assert cli("validate", path).code == 0
    result = cli("trace", path, "-o", tmp_path / "out")
    assert result.code == 1
    assert "has neither model.safetensors nor pytorch_model.bin" in result.err


def test_a_reader_that_goes_away_is_no_error(environment: dict[str, str]) -> None:
    done = subprocess.run(
        f"{sys.executable} -m interv schema | head -c 10",
        shell=True, capture_output=True, text=True, env=environment, check=False,
    )  # fmt: skip
    assert done.stdout == '{\n "$schema'[:10]
    assert done.stderr == ""


def test_a_bar_on_a_terminal_and_only_there(
    write_spec: SpecWriter, tmp_path: Path, environment: dict[str, str]
) -> None:
    script = "import pty, sys; sys.exit(pty.spawn(sys.argv[1:]) >> 8)"
    done = subprocess.run(
        [sys.executable, "-c", script, sys.executable, "-m", "interv", "trace", str(write_spec()),
         "-o", str(tmp_path / "out")],
        capture_output=True, text=True, env={**environment, "TERM": "xterm"}, check=False,
        stdin=subprocess.DEVNULL,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    assert "loading the model" in done.stdout


def test_a_line_now_and_then_where_there_is_no_terminal(
    write_spec: SpecWriter, cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("interv.cli.console._SECONDS_BETWEEN_LINES", 0)
    result = cli("trace", write_spec(), "-o", tmp_path / "out")
    assert "36 of 36, about 0 s to go" in result.err


def test_each_metric_has_its_table(write_spec: SpecWriter, cli: Cli, tmp_path: Path) -> None:
    result = cli("trace", write_spec(metric=["probability", "rank"]), "-o", tmp_path / "out")
    for metric in ("probability", "rank"):
        assert f"{metric}: the best layer" in result.err
    assert result.err.count("effect is value minus corrupted") == 2


def test_a_plan_without_a_model_says_what_is_not_known(
    write_spec: SpecWriter, cli: Cli, tmp_path: Path
) -> None:
    result = cli("plan", write_spec(model="owner/nowhere"), "-o", tmp_path)
    assert result.code == 0
    assert "cannot be counted before the model is at hand" in result.out
    assert "points" not in result.out
