from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest

from interv.report.claims import check_claims
from interv.spec.schema import Claim
from tests.conftest import Result, SpecWriter

SUMMARY = pd.DataFrame(
    {
        "component": ["block_output"] * 3 + ["mlp_output"],
        "layer": [0, 1, 2, 0],
        "role": ["", "", "", "last"],
        "value": [0.1, 0.9, 0.5, 0.2],
        "mean": [0.0, 0.8, 0.4, 0.1],
    }
)


def verdict(**fields: object):
    return check_claims([Claim(claim="c", source="s", **fields)], SUMMARY)[0]


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
    outcome = verdict(where={"layer": 9}, value=0, tolerance=1)
    assert (outcome.found, outcome.holds, outcome.fails_run) == (None, False, False)


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
