from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest

from interv.errors import IntervError
from interv.report.claims import check_claims
from interv.spec.claims import Claim
from tests.conftest import Result, SpecWriter

SUMMARY = pd.DataFrame(
    {
        "component": ["block_output"] * 3 + ["mlp_output"],
        "layer": [0, 1, 2, 0],
        "role": ["", "", "", "last"],
        "value": [0.1, 0.9, 0.5, 0.2],
        "mean": [0.0, 0.8, 0.4, 0.1],
        "pos": pd.array([0, 1, None, 3], dtype="Int64"),
        "metric": "probability",
        "severed": "",
    }
)
SUMMARY = pd.concat([SUMMARY, SUMMARY.assign(metric="rank", value=SUMMARY["value"] * 1000)])


def verdict(outside: bool = False, **fields: object):
    claim = Claim(claim="c", source="s", **fields)
    return check_claims([claim], {"summary": SUMMARY}, ["probability", "rank"], outside=outside)[0]


@pytest.mark.parametrize(
    ("fields", "found", "holds"),
    [
        ({"where": {"layer": 1}, "value": 0.85, "tolerance": 0.051}, 0.9, True),
        ({"where": {"layer": 1}, "value": 0.85, "tolerance": 0.049}, 0.9, False),
        ({"where": {"component": "mlp_output"}, "between": [0.2, 0.3]}, 0.2, True),
        ({"where": {"role": None}, "reduce": "max", "of": "effect", "between": [0, 1]}, 0.8, True),
        ({"where": {"role": None}, "reduce": "layer_of_max", "between": [1, 1]}, 1.0, True),
        ({"where": {"layer": "1-2"}, "reduce": "min", "between": [0.6, 1]}, 0.5, False),
        ({"where": {"layer": "1-2"}, "reduce": "mean", "value": 0.7, "tolerance": 1e-9}, 0.7, True),
    ],
)
def test_claims(fields: dict[str, object], found: float, holds: bool) -> None:
    outcome = verdict(**fields)
    assert outcome.found == pytest.approx(found)
    assert outcome.holds is holds
    assert outcome.fails_run is not holds


def test_a_miss_may_only_be_noted() -> None:
    assert not verdict(where={"layer": 1}, value=0, tolerance=0, on_miss="note").fails_run


def test_a_place_that_the_command_line_took_out_of_the_grid_neither_holds_nor_fails() -> None:
    outcome = verdict(True, where={"layer": 9}, value=0, tolerance=1)
    assert (outcome.found, outcome.holds, outcome.fails_run) == (None, False, False)


def test_a_place_that_the_run_left_out_is_a_miss() -> None:
    outcome = verdict(where={"layer": 9}, value=0, tolerance=1)
    assert (outcome.found, outcome.holds, outcome.fails_run) == (None, False, True)


def test_a_claim_is_about_one_metric() -> None:
    assert verdict(where={"layer": 1}, value=0.9, tolerance=0).holds
    assert verdict(where={"layer": 1, "metric": "rank"}, value=900, tolerance=1e-9).holds
    assert verdict(where={"pos": 1}, value=0.9, tolerance=0).holds
    assert verdict(where={"pos": None}, value=0.5, tolerance=0).holds


def test_a_claim_about_one_place_takes_no_other() -> None:
    with pytest.raises(IntervError, match="2 rows"):
        verdict(where={"layer": 0}, value=0, tolerance=1)


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ({"layr": 1}, "did you mean 'layer'"),
        ({"component": "mlp_input"}, "no place of the grid"),
        ({"layer": "7-9"}, "no place of the grid"),
        ({"layer": 1, "component": "block_output"}, "about 6 places"),
    ],
)
def test_a_claim_about_no_place_is_found_before_anything_runs(
    write_spec: SpecWriter, cli: Callable[..., Result], where: dict[str, object], message: str
) -> None:
    claim = {"claim": "c", "source": "s", "value": 0, "tolerance": 1, "where": where}
    path = write_spec(reference=[claim])
    result = cli("validate", path)
    assert result.code == 2
    assert message in result.err
    if "no place" in message:
        assert cli("plan", path, "grid.positions=0").code == 0


@pytest.mark.parametrize(("low", "code", "word"), [(0.0, 0, "holds"), (0.999, 1, "MISSED")])
def test_a_missed_reference_is_exit_code_1(
    write_spec: SpecWriter,
    cli: Callable[..., Result],
    tmp_path: Path,
    low: float,
    code: int,
    word: str,
) -> None:
    claim = {
        "claim": "it is high", "source": "nobody", "between": [low, 1.0], "reduce": "max",
        "where": {"component": "block_output"},
    }  # fmt: skip
    result = cli("trace", write_spec(reference=[claim]), "-o", tmp_path / "outputs")
    assert result.code == code, result.err
    assert word in result.err
    assert (Path(result.out.strip()) / "results.csv").is_file()
