"""Killed at any instant and started again: the same CSV, byte for byte."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import PROMPT, Result, SpecWriter

FACTS = [
    {"prompt": PROMPT, "subject": "The Space Needle", "answer": "Seattle"},
    {"prompt": "The Old Bridge is in downtown", "subject": "The Old Bridge", "answer": "Mostar"},
]


@pytest.fixture
def spec(write_spec: SpecWriter) -> Path:
    """280 packs, each of a few milliseconds."""
    return write_spec(
        data={"facts": FACTS, "keep": "all"},
        corrupt={"type": "noise", "level": "3s", "samples": 4},
        grid=[
            {"component": ["block_output", "mlp_output", "attention_output", "mlp_input"]},
            {"component": "block_output", "sever": "mlp_output"},
        ],
        run={"max_tokens": 10, "threads": 1},
    )


def start(spec: Path, outputs: Path, environment: dict[str, str]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "interv", "trace", str(spec), "-o", str(outputs)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )


def lines(outputs: Path) -> int:
    found = list(outputs.glob("*/*/journal.jsonl"))
    return found[0].read_bytes().count(b"\n") if found else 0


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    while not condition() and process.poll() is None:
        time.sleep(0.002)


def test_ten_kills(spec: Path, tmp_path: Path, environment: dict[str, str]) -> None:
    whole = start(spec, tmp_path / "whole", environment)
    out, err = whole.communicate()
    assert whole.returncode == 0, err
    total = lines(tmp_path / "whole")
    chance = random.Random(0)
    outputs = tmp_path / "killed"
    kills = 0
    while kills < 10:
        process = start(spec, outputs, environment)
        # Nine somewhere among the packs, one wherever the process is.
        target = (total * (kills + 1)) // 12
        if kills == 4:
            time.sleep(chance.uniform(0.0, 3.0))
        else:
            wait_for(lambda target=target: lines(outputs) >= target, process)
            time.sleep(chance.uniform(0.0, 0.01))
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert process.returncode == -signal.SIGKILL, "it had finished before it was killed"
        kills += 1
    last = start(spec, outputs, environment)
    out_killed, err = last.communicate()
    assert last.returncode == 0, err
    one, other = Path(out.strip()), Path(out_killed.strip())
    assert one.name == other.name
    for name in ("results.csv", "summary.csv", "prompts.csv", "resolved.yaml"):
        assert (one / name).read_bytes() == (other / name).read_bytes(), name
    assert (one / "figures" / "trace_prompt0_panel.svg").read_bytes() == (
        other / "figures" / "trace_prompt0_panel.svg"
    ).read_bytes()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_keeps_what_is_done(
    spec: Path, tmp_path: Path, environment: dict[str, str], number: signal.Signals
) -> None:
    outputs = tmp_path / "outputs"
    process = start(spec, outputs, environment)
    wait_for(lambda: lines(outputs) >= 10, process)
    process.send_signal(number)
    out, err = process.communicate()
    assert process.returncode == 130, err
    assert out == ""
    assert "the same command goes on from there" in err
    assert "Traceback" not in err
    before = lines(outputs)
    assert before >= 10
    again = start(spec, outputs, environment)
    out, err = again.communicate()
    assert again.returncode == 0, err
    assert len(json.loads((Path(out.strip()) / "run.json").read_text())["sessions"]) == 1


def test_a_run_in_use_is_refused_with_its_process(
    spec: Path, tmp_path: Path, environment: dict[str, str], cli: Callable[..., Result]
) -> None:
    outputs = tmp_path / "outputs"
    process = start(spec, outputs, environment)
    wait_for(lambda: lines(outputs) >= 2, process)
    result = cli("trace", spec, "-o", outputs)
    process.kill()
    process.communicate()
    assert result.code == 1
    assert f"in use by process {process.pid}" in result.err


def test_a_full_disk_keeps_what_is_done(
    spec: Path, tmp_path: Path, environment: dict[str, str]
) -> None:
    """A limit on file size stands in for the disk."""
    outputs = tmp_path / "outputs"
    limited = (
        "import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (9000, 9000));"
        "from interv.cli import main; sys.argv[0] = 'interv'; main()"
    )
    done = subprocess.run(
        [sys.executable, "-c", limited, "trace", str(spec), "-o", str(outputs)],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    assert done.returncode == 1
    assert "cannot be written: File too large" in done.stderr
    assert "Traceback" not in done.stderr
    kept = lines(outputs)
    assert kept > 1
    again = start(spec, outputs, environment)
    out, err = again.communicate()
    assert again.returncode == 0, err
    assert (Path(out.strip()) / "results.csv").is_file()
