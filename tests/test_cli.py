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
    assert "largest effects" in result.err
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

    monkeypatch.setattr("interv.run.trace.load_model", never)
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
    assert "has no safetensors" in result.err


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
