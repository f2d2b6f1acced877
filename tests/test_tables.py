from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from interv.plan import Plan, make_plan
from interv.report.tables import prompts_table, results_table, summary_table
from interv.runner.journal import Journal
from interv.spec import load_spec
from interv.spec.schema import ROLES
from tests.conftest import PROMPT, SpecWriter

FACTS = [
    {"prompt": PROMPT, "subject": "The Space Needle", "answer": "Seattle"},
    {"prompt": "The Old Bridge of Mostar is in downtown", "subject": "The Old Bridge of Mostar",
     "answer": "Mostar"},
    {"prompt": "The Eiffel Tower is located in the city of", "subject": "The Eiffel Tower",
     "answer": "Paris"},
]  # fmt: skip


def invented(plan: Plan, path: Path) -> Journal:
    """A journal of seeded numbers in place of a model's."""
    random = np.random.default_rng(0)

    def record(n: int) -> dict[str, list[float]]:
        return {
            "log_probability": (-random.exponential(size=n)).tolist(),
            "logit": random.normal(size=n).tolist(),
            "rank": random.integers(0, 9, size=n).astype(float).tolist(),
        }

    records: dict[str, dict[str, object]] = {c.id: record(plan.draws) for c in plan.cells}
    for key in plan.baselines.values():
        records[key] = {
            "clean": record(1), "corrupted": record(plan.draws), "correct": True, "top": 1,
        }  # fmt: skip
    return Journal(path, {}, {}, {}, records)


def tables(path: Path) -> tuple[Plan, Journal, pd.DataFrame, pd.DataFrame]:
    plan = make_plan(load_spec(path))
    journal = invented(plan, path)
    results = results_table(plan, journal)
    return plan, journal, results, summary_table(plan, journal, results)


def test_columns(write_spec: SpecWriter) -> None:
    _, _, results, summary = tables(write_spec())
    wanted = "prompt_id component layer window pos token metric value clean corrupted effect"
    assert set(wanted.split()) <= set(results.columns)
    assert {"n", "mean", "sem", "ci_low", "ci_high"} <= set(summary.columns)


def test_one_prompt_counts_its_draws(write_spec: SpecWriter) -> None:
    corrupt = {"type": "noise", "level": 1.0, "samples": 8}
    plan, journal, results, summary = tables(write_spec(corrupt=corrupt))
    assert len(summary) == len(results) == len(plan.labels)
    for label, row in zip(plan.labels, summary.to_dict("records"), strict=True):
        base = np.exp(journal[plan.baselines[0]]["corrupted"]["log_probability"])
        effect = np.exp(journal[label.cell.id]["log_probability"]) - base
        assert (row["over"], row["n"]) == ("draws", 8)
        assert row["mean"] == pytest.approx(effect.mean())
        assert row["sem"] == pytest.approx(effect.std(ddof=1) / np.sqrt(8))
        assert row["ci_low"] < row["mean"] < row["ci_high"]


def test_a_role_is_averaged_within_its_prompt_first(write_spec: SpecWriter) -> None:
    path = write_spec(
        data={"facts": FACTS, "keep": "all"},
        grid={"component": "block_output", "positions": "roles", "layers": [1]},
    )
    _, _, results, summary = tables(path)
    middle = results[results["role"] == "middle_subject"]
    by_prompt = middle.groupby("prompt_id")["effect"].mean()
    assert middle.groupby("prompt_id").size().max() > 1
    row = summary[summary["role"] == "middle_subject"].iloc[0]
    assert (row["over"], row["n"]) == ("prompts", 3)
    assert row["mean"] == pytest.approx(by_prompt.mean())
    assert row["sem"] == pytest.approx(by_prompt.std(ddof=1) / np.sqrt(3))
    assert len(summary) == 6


def test_tokens_of_all_facts_alike_as_the_authors_average_them(write_spec: SpecWriter) -> None:
    """Tokens are concatenated over facts, and low scores averaged over facts, as their notebook."""
    sections = {
        "data": {"facts": FACTS, "keep": "all"},
        "grid": {"component": "block_output", "positions": ["roles", 0], "layers": [1]},
        "metric": ["probability", "logit"],
    }
    plan, _, results, summary = tables(write_spec(average="tokens", **sections))
    *_, apart = tables(write_spec(**sections))
    assert summary.columns.tolist() == apart.columns.tolist()
    for metric in ("probability", "logit"):
        of_metric = results[results["metric"] == metric]
        low = [of_metric[of_metric["prompt_id"] == p]["corrupted"].iloc[0] for p in plan.prompts]
        for role in ROLES:
            scores = [
                of_metric[(of_metric["prompt_id"] == p) & (of_metric["role"] == role)]["value"]
                for p in plan.prompts
            ]
            right = np.concatenate(scores).mean() - np.mean(low)
            row = summary[(summary["role"] == role) & (summary["metric"] == metric)].iloc[0]
            other = apart[(apart["role"] == role) & (apart["metric"] == metric)].iloc[0]
            assert row["mean"] == pytest.approx(right)
            assert row["value"] - row["corrupted"] == pytest.approx(row["mean"])
            assert (row["over"], row["n"]) == ("prompts", 3)
            one_each = all(len(values) == 1 for values in scores)
            assert (row["mean"] == pytest.approx(other["mean"])) == one_each
            # A ratio of means over facts: its variance by the delta method.
            counts = np.array([len(values) for values in scores])
            sums = np.array([values.sum() for values in scores])
            ratio = sums.sum() / counts.sum()
            part = (sums - ratio * counts) / counts.mean() - np.array(low)
            assert row["sem"] == pytest.approx(part.std(ddof=1) / np.sqrt(3))
    by_index = ["pos", "mean", "sem", "n"]
    pd.testing.assert_frame_equal(
        summary[summary["role"] == ""][by_index], apart[apart["role"] == ""][by_index]
    )


def test_one_draw_of_one_prompt_has_no_interval(write_spec: SpecWriter) -> None:
    _, _, _, summary = tables(write_spec(corrupt={"type": "noise", "level": 1.0, "samples": 1}))
    assert summary[["sem", "ci_low", "ci_high"]].isna().all().all()
    assert set(summary["n"]) == {1}


def test_the_interval_covers_as_often_as_it_says() -> None:
    from interv.report.statistics import uncertainty

    groups = list(np.random.default_rng(1).normal(size=(600, 40)))
    table = uncertainty([*groups, groups[0][:5], groups[0][:4], groups[0][:1]], seed=0)
    covered = (table["ci_low"][:600] <= 0) & (table["ci_high"][:600] >= 0)
    assert 0.93 <= covered.mean() <= 0.98
    assert list(table["n"][600:]) == [5, 4, 1]
    assert table["ci_low"].isna().tolist() == [False] * 601 + [True, True]
    assert table["sem"].isna().tolist() == [False] * 602 + [True]


def test_a_copy_of_a_fact_counts_once(write_spec: SpecWriter) -> None:
    path = write_spec(data={"facts": [FACTS[0], *FACTS[:2], FACTS[0]], "keep": "all"})
    plan, journal, results, summary = tables(path)
    assert [(gone.index, gone.copy_of) for gone in plan.left_out] == [(1, 0), (3, 0)]
    assert plan.notes == ["2 of 4 prompts are copies of others and are left out: 2 distinct"]
    assert set(results["prompt_id"]) == {0, 2}
    assert set(summary["n"]) <= {1, 2} and set(summary["over"]) == {"prompts"}
    prompts = prompts_table(plan, journal)
    assert list(prompts["traced"]) == [True, False, True, False]
    assert list(prompts["left_out_because"]) == ["", "a copy of prompt 0"] * 2


def test_positions_from_the_end_are_averaged_as_such(write_spec: SpecWriter) -> None:
    grid = {"component": "block_output", "layers": [0], "positions": [-1]}
    _, _, _, summary = tables(write_spec(data={"facts": FACTS, "keep": "all"}, grid=grid))
    assert list(summary["role"]) == ["-1"]
    assert list(summary["n"]) == [3]


def test_csv_reads_back_as_the_same_rows() -> None:
    import io

    from interv.report.tables import to_csv

    table = pd.DataFrame({"token": ["a\rb", "NA", 'q"', "x\ny", ""], "value": [1.5, 2, 3, 4, 5]})
    back = pd.read_csv(io.StringIO(to_csv(table)), keep_default_na=False)
    assert len(back) == 5
    assert list(back["value"]) == [1.5, 2, 3, 4, 5]
    assert list(back["token"]) == ["a\\rb", "NA", 'q"', "x\ny", ""]


def test_the_same_journal_gives_the_same_tables(write_spec: SpecWriter) -> None:
    path = write_spec(data={"facts": FACTS, "keep": "all"})
    one, other = tables(path), tables(path)
    pd.testing.assert_frame_equal(one[2], other[2])
    pd.testing.assert_frame_equal(one[3], other[3])


def test_positions_by_index_are_averaged_by_index(write_spec: SpecWriter) -> None:
    path = write_spec(
        data={"facts": FACTS, "keep": "all"},
        grid={"component": "block_output", "layers": [0], "positions": [0, 2]},
    )
    _, _, results, summary = tables(path)
    assert list(summary["pos"]) == [0, 2]
    means = results.groupby("pos")["effect"].mean()
    assert summary["mean"].to_numpy() == pytest.approx(means.to_numpy())
