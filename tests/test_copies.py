"""Rows that are there twice, grids that select nothing, values that do not vary: end to end."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from interv.errors import SpecError
from interv.plan import PatchPlan, make_patch_plan
from interv.spec import load_spec
from tests.conftest import Result, SpecWriter
from tests.test_patch import PAIRS as DISTINCT
from tests.test_patch_plan import PAIRS, patch_spec

Cli = Callable[..., Result]
GRID = {"component": "block_output", "layers": [1], "positions": "END"}


def run(cli: Cli, command: str, path: Path, tmp_path: Path, *more: str) -> tuple[Path, Result]:
    result = cli(command, path, *more, "-o", tmp_path / "outputs")
    assert result.code == 0, result.err
    return Path(result.out.strip()), result


def plan_of(write_spec: SpecWriter, pairs: list[dict[str, Any]], **sections: object) -> PatchPlan:
    path = patch_spec(write_spec, data={"pairs": pairs}, **sections)
    return make_patch_plan(load_spec(path, (), kind="patch"))


def test_twelve_copies_of_a_pair_are_one_prompt(
    cli: Cli, write_spec: SpecWriter, tmp_path: Path
) -> None:
    path = patch_spec(
        write_spec, data={"pairs": [PAIRS[0]] * 12}, grid=GRID, statistics={"test": True}
    )
    told = "11 of 12 prompts are copies of others and are left out: 1 distinct"
    assert f"note: {told}" in cli("data", path).err
    assert f"note: {told}" in cli("validate", path).err
    assert told in cli("plan", path).out
    folder, result = run(cli, "patch", path, tmp_path)
    assert f"note: {told}" in result.err
    assert "11 of 12 prompts left out (11: a copy of prompt 0)" in result.err
    assert told in json.loads((folder / "run.json").read_text())["notes"]
    [row] = pd.read_csv(folder / "summary.csv").to_dict("records")
    assert row["n"] == 1
    assert pd.isna([row["sem"], row["ci_low"], row["ci_high"], row["p"], row["p_holm"]]).all()
    prompts = pd.read_csv(folder / "prompts.csv")
    assert list(prompts["patched"]) == [True] + [False] * 11
    cli("report", folder)
    assert told in (folder / "report.html").read_text("utf-8")


def test_copies_weigh_nothing_in_means_and_recoveries(
    cli: Cli, write_spec: SpecWriter, tmp_path: Path
) -> None:
    tables = []
    for pairs in (DISTINCT[:6], [*DISTINCT[:6], *[DISTINCT[2]] * 5]):
        path = patch_spec(
            write_spec,
            data={"pairs": pairs},
            grid=GRID,
            metric=["logit_difference", "recovery"],
            attribution={"verify": "all"},
        )
        folder, _ = run(cli, "patch", path, tmp_path)
        tables.append([pd.read_csv(folder / f"{n}.csv") for n in ("summary", "attribution")])
    for one, other in zip(*tables, strict=True):
        pd.testing.assert_frame_equal(one, other)


def test_copies_of_a_traced_fact_are_one_prompt(
    cli: Cli, write_spec: SpecWriter, tmp_path: Path
) -> None:
    fact = {"prompt": "The Space Needle is in downtown", "subject": "The Space Needle",
            "answer": "Seattle"}  # fmt: skip
    path = write_spec(data={"facts": [fact] * 3, "keep": "all"})
    folder, result = run(cli, "trace", path, tmp_path)
    assert "note: 2 of 3 prompts are copies of others and are left out: 1 distinct" in result.err
    summary = pd.read_csv(folder / "summary.csv")
    # Of one prompt the draws count.
    assert set(summary["over"]) == {"draws"}


def test_a_copy_is_one_whatever_the_order_of_answers(write_spec: SpecWriter) -> None:
    several = {**PAIRS[0], "answer": ["Seattle", "Paris"], "wrong": ["Mostar", "Rome"]}
    turned = {**several, "answer": ["Paris", "Seattle"], "wrong": ["Rome", "Mostar"]}
    plan = plan_of(write_spec, [several, turned, {**several, "answer": "Seattle"}])
    assert list(plan.pairs) == [0, 2]
    assert [(gone.index, gone.copy_of) for gone in plan.left_out] == [(1, 0)]


def test_a_copy_with_other_spans_is_an_error(write_spec: SpecWriter) -> None:
    for other in ({"spans": {"place": "Needle"}}, {"template": "t"}):
        with pytest.raises(SpecError, match="are those of pair 0, spans or template are not"):
            plan_of(write_spec, [PAIRS[0], {**PAIRS[0], **other}])


@pytest.mark.parametrize("field", ["answer", "wrong"])
def test_answers_that_begin_alike_would_count_twice(write_spec: SpecWriter, field: str) -> None:
    for answers in (["Seattle", "Seattle"], ["Seattle", "Seattle Rome"]):
        pair = {**PAIRS[0], "answer": "Paris", "wrong": "London", field: answers}
        with pytest.raises(SpecError, match="would count twice"):
            plan_of(write_spec, [pair], metric="probability")


def test_a_decomposition_is_of_one_right_answer(write_spec: SpecWriter) -> None:
    several = {**PAIRS[0], "answer": ["Seattle", "Paris"]}
    assert plan_of(write_spec, [PAIRS[0]], decompose=True).spec.decompose
    with pytest.raises(SpecError, match="decompose needs one right answer; pair 0 has 2"):
        plan_of(write_spec, [several], decompose=True)


def test_a_grid_that_selects_no_token_is_an_error(cli: Cli, write_spec: SpecWriter) -> None:
    """A subject of one token has no middle."""
    fact = {"prompt": "Paris is in", "subject": "Paris", "answer": "Rome"}
    for positions in ("middle_subject", ["last_subject", "middle_subject"]):
        grid = {"component": "block_output", "positions": positions}
        path = write_spec(data={"facts": [fact], "keep": "all"}, grid=grid)
        for command in ("validate", "plan", "trace"):
            result = cli(command, path)
            assert result.code == 2
            assert "no prompt has a token that is 'middle_subject'" in result.err
            assert "expected one of: first_subject, last_subject" in result.err
    # All six together are those that there are.
    path = write_spec(
        data={"facts": [fact], "keep": "all"},
        grid={"component": "block_output"} | {"positions": "roles"},
    )
    assert cli("validate", path).code == 0


def test_a_grid_that_selects_no_token_of_what_is_kept_is_an_error(
    cli: Cli, write_spec: SpecWriter, tmp_path: Path, gpt2_folder: Path
) -> None:
    """Which prompts are kept is known in the run alone."""
    from tests.test_run_trace import known_fact

    prompt, answer = known_fact(gpt2_folder)
    first = prompt.split()[0]
    facts = [
        {"prompt": prompt, "subject": first, "answer": answer},
        {"prompt": "The Space Needle is in downtown", "subject": "The Space Needle",
         "answer": "zzz"},
    ]  # fmt: skip
    grid = {"component": "block_output", "positions": "middle_subject"}
    path = write_spec(data={"facts": facts, "join": ""}, grid=grid)
    assert cli("validate", path).code == 0
    result = cli("trace", path, "-o", tmp_path / "outputs")
    assert result.code == 1
    assert "the grid selects no point in any of the 1 prompts that are left" in result.err


def _no_constant(name: str) -> float:
    raise AssertionError(f"{name} is not JSON")


def test_values_that_do_not_vary_have_no_correlation(
    cli: Cli, write_spec: SpecWriter, tmp_path: Path
) -> None:
    # Nothing reaches the answer from before the token that differs: all effects are 0.
    path = patch_spec(
        write_spec,
        data={"pairs": PAIRS[:1]},
        grid={"component": "block_output", "layers": [0, 1], "positions": 0},
        attribution={"method": "gradient", "verify": 2},
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = cli("patch", path, "-o", tmp_path / "outputs", "--json")
    assert result.code == 0, result.err
    assert "Warning" not in result.err
    told = json.loads(result.out, parse_constant=_no_constant)
    record = (Path(told["folder"]) / "run.json").read_text()
    for found in (told, json.loads(record, parse_constant=_no_constant)):
        against = found["attribution_against_patching"]
        assert against["rank_correlation"] is None and against["correlation"] is None
        assert "does not vary" in against["correlation_note"]
    assert cli("report", told["folder"]).code == 0


def test_tails_that_the_resamples_do_not_show_are_refused(write_spec: SpecWriter) -> None:
    with pytest.raises(SpecError) as caught:
        plan_of(write_spec, PAIRS[:1], statistics={"level": 0.999})
    assert "level 0.999 has tails that 2,000 resamples do not show" in str(caught.value)
    assert "resamples: 10000 or more" in str(caught.value)
    plan_of(write_spec, PAIRS[:1], statistics={"level": 0.999, "resamples": 10_000})


def test_a_metric_of_a_plug_in_gets_whole_answers(write_spec: SpecWriter, tmp_path: Path) -> None:
    """It is given one token id of each, which of a longer one was the first."""
    plugin = tmp_path / "own.py"
    plugin.write_text(
        "import interv\n\n\n@interv.metric\ndef margin(logits, answers, wrong):\n"
        "    return logits[:, answers[0]]\n"
    )
    for answer in ("Seattle", "Seattle Rome"):
        data = {"pairs": [{**PAIRS[0], "answer": answer}]}
        path = patch_spec(write_spec, data=data, metric="margin")
        loaded = load_spec(path, (), kind="patch", plugin=plugin)
        if answer == "Seattle":
            assert make_patch_plan(loaded).metrics[0].of == "margin"
            continue
        with pytest.raises(SpecError, match="margin, a metric of a plug-in, needs answers of one"):
            make_patch_plan(loaded)
