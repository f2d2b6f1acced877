"""`interv compare`: two runs, place by place."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest

from interv.report.compare import compare
from tests.conftest import Result, SpecWriter

Cli = Callable[..., Result]


@pytest.fixture
def runs(write_spec: SpecWriter, cli: Cli, tmp_path: Path) -> tuple[Path, Path]:
    """The same spec with two seeds, the second without its last layer."""
    path = write_spec()
    found = [
        cli("trace", path, "-o", tmp_path / "outputs", *more)
        for more in (("corrupt.samples=6",), ("corrupt.samples=6", "seed=5", "grid.layers=0-1"))
    ]
    assert [result.code for result in found] == [0, 0], found
    return Path(found[0].out.strip()), Path(found[1].out.strip())


def test_a_run_is_the_same_as_itself(runs: tuple[Path, Path], cli: Cli) -> None:
    result = cli("compare", runs[0], runs[0], "--tolerance", 0, "--json")
    assert result.code == 0, result.err
    told = json.loads(result.out)
    assert told["asked"] == told["environment"] == {}
    assert (told["largest_difference"], told["only_in_first"], told["only_in_second"]) == (0, 0, 0)
    assert told["places"] == len(pd.read_csv(runs[0] / "summary.csv"))
    assert "the same was asked of both" in result.err


def test_what_differs_is_told(runs: tuple[Path, Path], cli: Cli, tmp_path: Path) -> None:
    one, other = (pd.read_csv(run / "summary.csv") for run in runs)
    found = compare(*runs)
    assert found.asked["seed"] == (0, 5)
    assert found.only == (len(one) - len(other), 0)
    both = one[one["layer"] < 2].reset_index(drop=True)
    expected = (other["value"] - both["value"]).abs().max()
    assert found.farthest == pytest.approx(expected)
    far = (both["ci_low"] > other["ci_high"]) | (other["ci_low"] > both["ci_high"])
    assert found.as_dict()["intervals_apart"] == int(far.sum())

    picture = tmp_path / "both.png"
    result = cli("compare", *runs, "--tolerance", 1e-9, "--figure", picture)
    assert result.code == 1
    assert "asked seed: 0 and 5" in result.err
    assert picture.read_bytes().startswith(b"\x89PNG")
    table = pd.read_csv(io.StringIO(result.out))
    assert len(table) == len(other)
    assert cli("compare", *runs, "--figure", tmp_path / "both.jpg").code == 2


def test_a_value_that_only_one_run_has_is_a_difference(
    runs: tuple[Path, Path], cli: Cli, tmp_path: Path
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(runs[0], copy)
    table = pd.read_csv(copy / "summary.csv")
    table.loc[0, "value"] = float("nan")
    table.to_csv(copy / "summary.csv", index=False)
    result = cli("compare", runs[0], copy, "--tolerance", 1, "--json")
    assert result.code == 1
    assert "1 place with a value in one of the runs only" in result.err
    table["value"] = float("nan")
    table.to_csv(copy / "summary.csv", index=False)
    told = cli("compare", runs[0], copy, "--json").out
    assert "NaN" not in told and json.loads(told)["only_one_has_a_value"] == len(table)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("summary.csv", b"", "is damaged: No columns"),
        ("summary.csv", b"\xff\xfe", "is damaged: 'utf-8'"),
        ("summary.csv", b"metric,mean\nprobability,much\n", "is damaged: Unable to parse"),
        ("summary.csv", b"component\nx\n", "it has no column 'metric'"),
        ("run.json", b"{", "is damaged"),
        ("run.json", b"[]", "is damaged"),
        ("resolved.yaml", b"- 1\n", "is damaged"),
    ],
)
def test_a_damaged_file_is_named(
    runs: tuple[Path, Path], cli: Cli, name: str, content: bytes, message: str
) -> None:
    (runs[1] / name).write_bytes(content)
    result = cli("compare", *runs)
    assert (result.code, result.out) == (1, "")
    assert f"{runs[1] / name}: " in result.err and message in result.err


def test_what_is_no_run_is_said(runs: tuple[Path, Path], cli: Cli) -> None:
    wrong = runs[0].with_name(runs[0].name[:-1] + "x")
    result = cli("compare", runs[0], wrong)
    assert result.code == 2
    assert "is no finished run" in result.err and f"did you mean {runs[0]}" in result.err
    (runs[1] / "summary.csv").unlink()
    assert "summary.csv is not there" in cli("compare", *runs).err
