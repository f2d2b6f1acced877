from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest

import interv
from interv.errors import IntervError
from interv.report.claims import check_claims
from interv.spec.claims import Claim
from tests.conftest import Result, SpecWriter
from tests.test_das import SPEC as DAS

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


def summary(rows: list[tuple[int, int, float]], **more: object) -> pd.DataFrame:
    table = pd.DataFrame(rows, columns=["layer", "head", "value"])
    return table.assign(component="head", mean=table["value"] / 2, **more)


HEADS = summary([(9, 9, -0.6), (10, 7, 0.5), (9, 6, -0.3), (0, 0, 0.01), (1, 2, 0.0)])


def judge(table: pd.DataFrame, outside: bool = False, **fields: object):
    claim = Claim(claim="c", source="s", **fields)
    return check_claims([claim], {"summary": table}, ["m"], outside=outside)[0]


def place(layer: int, head: int) -> dict[str, int]:
    return {"layer": layer, "head": head}


@pytest.mark.parametrize(
    ("order", "more", "holds"),
    [
        ([place(10, 7), place(0, 0)], {}, True),
        ([place(10, 7), place(1, 2)], {}, False),  # 0.0 is not the second largest
        ([place(9, 9), place(10, 7), place(9, 6)], {"magnitude": True}, True),
        ([place(10, 7), place(9, 9)], {"magnitude": True}, False),
        ([place(10, 7), place(9, 9)], {"magnitude": True, "tolerance": 0.11}, True),
        ([place(10, 7), place(9, 9)], {"magnitude": True, "tolerance": 0.09}, False),
        ([place(10, 7), place(0, 0)], {"of": "effect"}, True),
        ([place(10, 7)], {"where": {"layer": "10-11"}}, True),
    ],
)
def test_orders(order: list[dict[str, int]], more: dict[str, object], holds: bool) -> None:
    found = judge(HEADS, order=order, **more)
    assert found.holds is holds
    if holds and not more.get("tolerance"):
        assert found.told.startswith(f"{order[0]['layer']}.{order[0]['head']} ")


def test_an_order_of_a_place_that_is_not_there_is_a_miss() -> None:
    assert judge(HEADS, order=[place(3, 3)]).fails_run
    assert judge(HEADS, True, order=[place(3, 3)]).word == "outside"


@pytest.mark.parametrize("at", range(5))
def test_an_order_among_places_without_a_number_is_not_known(at: int) -> None:
    values = HEADS["value"].tolist()
    values[at] = float("nan")
    found = judge(HEADS.assign(value=values), order=[place(10, 7), place(0, 0)], magnitude=True,
                  tolerance=9)  # fmt: skip
    assert found.fails_run
    assert found.as_dict()["found"] is None  # JSON has no such number


INTERVALS = pd.DataFrame(
    {
        "layer": [0, 1, 2, 3],
        "value": [0.9, 0.5, 0.45, 0.2],
        "mean": [0.8, 0.4, 0.35, 0.1],
        "ci_low": [0.7, 0.3, 0.25, float("nan")],
        "ci_high": [0.9, 0.5, 0.45, float("nan")],
    }
)


@pytest.mark.parametrize(
    ("here", "there", "more", "holds", "found"),
    [
        (0, 1, {"of": "effect"}, True, 0.2),  # 0.7 over 0.5
        (0, 1, {"of": "value"}, True, 0.2),  # the same, both a tenth higher
        (1, 2, {}, False, 0.3 - 0.45),
        (1, 2, {"by": 0.04}, True, 0.05),
        (1, 3, {"by": 0.31}, False, 0.3),
        ("0-1", "2", {"reduce": "max"}, True, 0.25),
        ("1-2", 3, {"reduce": "mean", "by": 0.2}, True, 0.275),
    ],
)
def test_one_place_above_another(
    here: object, there: object, more: dict[str, object], holds: bool, found: float
) -> None:
    outcome = judge(INTERVALS, where={"layer": here}, exceeds={"layer": there}, **more)
    assert outcome.holds is holds
    assert outcome.found == pytest.approx(found)


def test_intervals_of_a_value_stay_where_they_are() -> None:
    """As in results.csv of `train-das`, which has no mean."""
    table = INTERVALS.drop(columns="mean").assign(ci_low=INTERVALS["value"] - 0.1)
    table["ci_high"] = table["value"] + 0.1
    outcome = judge(table, where={"layer": 0}, exceeds={"layer": 1})
    assert outcome.holds and outcome.found == pytest.approx(0.8 - 0.6)


def test_what_a_table_does_not_have_is_said() -> None:
    assert judge(INTERVALS.rename(columns={"mean": "effect"}), where={"layer": 0}, of="effect",
                 value=0.8, tolerance=0).holds  # fmt: skip
    with pytest.raises(IntervError, match=r"of: clean, but .* has only layer, value"):
        judge(INTERVALS, where={"layer": 0}, of="clean", value=0, tolerance=1)
    nowhere = INTERVALS.assign(layer="")
    with pytest.raises(IntervError, match="in no layer"):
        judge(nowhere, reduce="layer_of_max", between=[0, 9])


def test_without_an_interval_nothing_is_above_by_it() -> None:
    with pytest.raises(IntervError, match="no interval there"):
        judge(INTERVALS, where={"layer": 0}, exceeds={"layer": 3})


def cells(*values: float) -> list[dict[str, float]]:
    return [{**place(int(row.layer), int(row.head)), "value": value}
            for row, value in zip(HEADS.itertuples(), values, strict=False)]  # fmt: skip


def test_cells() -> None:
    right = judge(HEADS, cells=cells(-0.6, 0.5, -0.31), tolerance=0.02)
    assert right.holds and right.found == pytest.approx(0.01)
    assert right.cells is not None and list(right.cells["found"]) == [-0.6, 0.5, -0.3]
    wrong = judge(HEADS, cells=cells(-0.6, 0.5, -0.4), tolerance=0.02)
    assert wrong.fails_run and wrong.told == "2 of 3 within, the farthest 0.1 off"
    assert judge(HEADS, cells=cells(-0.6, 0.5, -0.4), tolerance=0.02, share=0.6).holds
    assert not judge(HEADS, cells=cells(-0.6, 0.5, -0.4), tolerance=0.02, share=0.67).holds
    own = [{**place(9, 9), "value": -0.5, "tolerance": 0.2}, *cells(-0.6, 0.5)[1:]]
    assert judge(HEADS, cells=own, tolerance=0.02).holds


def test_cells_outside_the_grid() -> None:
    absent = [*cells(-0.6), {**place(5, 5), "value": 0.0}]
    assert judge(HEADS, cells=absent, tolerance=0.02).told.endswith("1 not there")
    inside = judge(HEADS, True, cells=absent, tolerance=0.02)
    assert inside.holds and inside.cells is not None and len(inside.cells) == 1
    assert judge(HEADS, True, cells=absent[1:], tolerance=0.02).word == "outside"


def test_a_cell_that_is_no_number_does_not_hold() -> None:
    table = HEADS.assign(value=[float("nan"), *HEADS["value"][1:]])
    assert judge(table, cells=cells(-0.6), tolerance=9).fails_run


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "no form of comparison"),
        ({"value": 1}, "no form of comparison"),
        ({"value": 1, "tolerance": 1, "between": [0, 1]}, "value and between"),
        ({"order": [place(9, 9)], "reduce": "max"}, "reduce: max of order"),
        ({"exceeds": place(9, 9), "reduce": "mean"}, "has no interval"),
        ({"cells": [place(9, 9)], "tolerance": 1}, "the cell {'layer': 9, 'head': 9}"),
        ({"cells": [{**place(9, 9), "value": 1}]}, "a `value`, and a tolerance|the cell"),
        ({"where": {"layer": "deep"}, "between": [0, 1]}, "where.layer"),
        ({"between": [float("nan"), 1]}, "holds nothing"),
        ({"value": float("nan"), "tolerance": 1}, "value: nan"),
        ({"value": 1, "tolerance": float("inf")}, "tolerance: inf"),
        ({"cells": [{**place(9, 9), "value": float("nan")}], "tolerance": 1}, "the cell"),
        ({"cells": [{**place(9, 9), "value": 1, "tolerance": -1}]}, "the cell"),
        ({"where": {"layer": 1}, "exceeds": {"layer": 1}}, "the place of `where`"),
        ({"where": {"layer": 1}, "exceeds": {"layer": 2}, "of": "clean"}, "has no interval"),
    ],
)
def test_claims_that_are_none(fields: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Claim(claim="c", source="s", **fields)


CSV = "component,layer,pos,value\n"


@pytest.mark.parametrize(
    ("text", "message", "line"),
    [
        (None, "is not a file", None),
        (CSV, "has no records", None),
        (CSV + "block_output,0,0,much\n", "no `value` that is a number", 2),
        (CSV + "block_output,0,0,nan\n", "no `value` that is a number", 2),
        (CSV + "block_output,0,0,1\nblock_output,9,0,1\n", "about no place of the grid", 3),
        ("component,layr,value\nblock_output,0,1\n", "did you mean 'layer'", 2),
        ("component,layer,value\nblock_output,0,1\n", "is about 6 places", 2),
        (CSV + "block_output,0\n", "number of cells", 2),
        (CSV + "\n\nblock_output,9,0,1\n", "its layer: 0, 1, 2", 4),
        (CSV + "block_output,0,-1,1\n", "its pos: 0, 1, 2, 3, 4, 5", 2),
        (CSV + "block_output,0,0,1\nblock_output,0,0,2\n", "a place is there twice", 3),
        ("component,layer,pos,value,tolerance\nblock_output,0,0,1,-1\n", "no tolerance", 2),
        ("Component,Layer,Value\nblock_output,0,1\n", "this has 'Component', 'Layer'", 2),
    ],
)
def test_files_of_cells_are_checked_before_anything_runs(
    write_spec: SpecWriter,
    cli: Callable[..., Result],
    tmp_path: Path,
    text: str | None,
    message: str,
    line: int | None,
) -> None:
    file = tmp_path / "cells.csv"
    if text is not None:
        file.write_text(text)
    claim = {"claim": "c", "source": "s", "cells": "cells.csv", "tolerance": 1}
    result = cli("validate", write_spec(reference=[claim]))
    assert result.code == 2
    assert message in result.err
    if line is not None:
        assert f"{file}:{line}:1: " in result.err


@pytest.mark.parametrize(
    ("claim", "message"),
    [
        ({"table": "scores", "value": 1, "tolerance": 1}, "no scores with values"),
        ({"table": "curve", "value": 1, "tolerance": 1}, "expected summary, results"),
        (
            {"where": {"component": "block_output"}, "order": [{"layer": 1, "pos": 1}] * 2},
            "a place is there twice",
        ),
        (
            {"where": {"component": "block_output", "layer": 1, "pos": 1},
             "exceeds": {"layer": "1-1"}, "by": 1},
            "a place is there twice",
        ),
    ],
)  # fmt: skip
def test_what_a_run_cannot_have_is_found_before_it(
    write_spec: SpecWriter, cli: Callable[..., Result], claim: dict[str, object], message: str
) -> None:
    path = write_spec(reference=[{"claim": "c", "source": "s", **claim}])
    result = cli("validate", path)
    assert result.code == 2
    assert message in result.err and f"{path}:" in result.err


@pytest.mark.parametrize(
    ("table", "right"), [("summary", False), ("nodes", False), ("curve", True), ("scores", True)]
)
def test_tables_of_a_circuit_alone(gpt2_folder: Path, table: str, right: bool) -> None:
    pair = {"clean": "The Space Needle is in", "corrupted": "The Old Needle is in",
            "answer": "Seattle", "wrong": "Mostar"}  # fmt: skip
    claim = {"claim": "c", "source": "s", "table": table, "reduce": "max", "between": [0, 1]}
    spec = {"kind": "patch", "name": "c", "model": {"path": str(gpt2_folder)},
            "data": {"pairs": [pair]}, "circuit": {}, "reference": [claim]}  # fmt: skip
    if right:
        interv.load(spec)
    else:
        with pytest.raises(IntervError, match=f"no {table} with values"):
            interv.load(spec)


def test_accuracies_are_not_of_a_clean_run() -> None:
    claim = {"claim": "c", "source": "s", "of": "clean", "reduce": "max", "between": [0, 1]}
    for more, message in (({}, "of: clean, which"), ({"table": "curve"}, "no curve with values")):
        with pytest.raises(IntervError, match=message):
            interv.load({**DAS, "reference": [{**claim, **more}]})


def test_many_wrong_cells_are_told_in_a_few_lines(
    write_spec: SpecWriter, cli: Callable[..., Result], tmp_path: Path
) -> None:
    lines = [f"block_output,{layer},0,1\n" for layer in range(3, 40)]
    (tmp_path / "cells.csv").write_text(CSV + "".join(lines))
    claim = {"claim": "c", "source": "s", "cells": "cells.csv", "tolerance": 1}
    result = cli("validate", write_spec(reference=[claim]))
    assert result.err.count("about no place") == 3
    assert "34 more of its places are wrong" in result.err


def test_cells_are_written_and_drawn(
    write_spec: SpecWriter, cli: Callable[..., Result], tmp_path: Path
) -> None:
    table = [{"component": "block_output", "layer": i, "pos": p, "value": 0.0}
             for i in range(3) for p in range(6)]  # fmt: skip
    source = {"paper": "Somebody 2022", "figure": "1e", "page": 3, "read": "by eye"}
    claim = {"claim": "All of it!", "source": source, "cells": table, "tolerance": 2.0}
    result = cli("trace", write_spec(reference=[claim]), "-o", tmp_path / "outputs")
    assert result.code == 0, result.err
    folder = Path(result.out.strip())
    told = pd.read_csv(folder / "reference.csv")
    assert list(told["source"]) == ["Somebody 2022, figure 1e, page 3 (by eye)"]
    assert list(told["verdict"]) == ["holds"]
    written = pd.read_csv(folder / "reference_cells.csv")
    results = pd.read_csv(folder / "summary.csv")
    wanted = results[results["component"] == "block_output"]["value"]
    assert sorted(written["found"]) == pytest.approx(sorted(wanted))
    assert (folder / "figures" / "reference_all_of_it.png").is_file()
