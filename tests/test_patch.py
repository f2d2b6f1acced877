"""`interv patch` as a whole: its summary, which pairs it takes, how it goes on, both executors."""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import transformers
from torch import Tensor

import interv
from interv.errors import IntervError
from interv.plan import make_patch_plan
from interv.report.patch import PatchReport, patch_report
from interv.report.tables import to_csv
from interv.runner import journal as journals
from interv.runner.circuit import Ranks
from interv.runner.patch_steps import PATCH
from interv.runner.sweep import run_sweep
from interv.spec import load_spec
from tests import toy
from tests.test_statistics import by_hand

HEAD = "head_attention_value_output"
# All of one length, with answers that are words of the tokenizer.
PAIRS = [
    {
        "clean": f"The {a} {b} is in the",
        "corrupted": f"The {c} {d} is in the",
        "answer": "Seattle",
        "wrong": ["Mostar", "Paris"][: 1 + (a == "Old")],
    }
    for (a, b), (c, d) in itertools.pairwise(
        itertools.product(["Space", "Old", "Eiffel"], ["Needle", "Bridge", "Tower"])
    )
]


def spec_of(folder: Path, **sections: Any) -> dict[str, Any]:
    return {
        "kind": "patch",
        "name": "test",
        "model": {"path": str(folder), "dtype": "float64"},
        "data": {"pairs": PAIRS[:6]},
        "intervention": "denoise",
        **sections,
    }


def report_of(spec: Mapping[str, Any], folder: Path) -> PatchReport:
    """All tables, without figures."""
    folder.mkdir(parents=True, exist_ok=True)
    plan = make_patch_plan(load_spec(spec, (), kind="patch"))
    outcome = run_sweep(plan, PATCH, folder, lambda *_: None, adopt=False)
    return patch_report(plan, outcome.journal)


# The summary.


def test_the_summary_is_of_the_effects(gpt2_folder: Path, tmp_path: Path) -> None:
    level, resamples, seed = 0.8, 300, 4
    report = report_of(
        spec_of(
            gpt2_folder,
            seed=seed,
            grid={"component": ["block_output", HEAD], "positions": [1, "END", "whole"]},
            metric=["logit_difference", "recovery"],
            statistics={"level": level, "resamples": resamples, "test": True},
        ),
        tmp_path,
    )
    results, summary = report.tables["results"], report.tables["summary"]
    assert len(summary) == 2 * (3 * 3 + 3 * 2 * 3)
    assert len(results) == 6 * len(summary)
    p_by_hand: dict[str, list[float]] = {"logit_difference": [], "recovery": []}
    for row in summary.to_dict("records"):
        rows = _rows_of(results, row)
        assert list(rows["prompt_id"]) == list(range(6))
        effects = rows["effect"].to_numpy(dtype=float)
        assert row["value"] == pytest.approx(rows["value"].mean(), rel=1e-12)
        assert row["clean"] == pytest.approx(rows["clean"].mean(), rel=1e-12)
        assert row["corrupted"] == pytest.approx(rows["corrupted"].mean(), rel=1e-9, abs=1e-12)
        assert row["mean"] == pytest.approx(sum(effects) / 6, rel=1e-12, abs=1e-15)
        parts = effects
        if row["metric"] == "recovery":
            # A ratio of means x / d varies as x - r d does.
            plain = _rows_of(results, {**row, "metric": "logit_difference"})
            up, gap = plain["effect"], plain["clean"] - plain["corrupted"]
            ratio = up.sum() / gap.sum()
            assert row["mean"] == pytest.approx(ratio, rel=1e-9, abs=1e-12)
            parts = (ratio + (up - ratio * gap) / gap.mean()).to_numpy(dtype=float)
        spread = np.sqrt(((parts - parts.mean()) ** 2).sum() / 5 / 6)
        assert row["sem"] == pytest.approx(spread, rel=1e-9, abs=1e-12)
        assert (row["n"], row["over"], row["relative_to"]) == (6, "prompts", "corrupted")
        ends = [row["ci_low"], row["ci_high"]]
        if np.ptp(parts) > 1e-9:
            wanted = by_hand(parts, seed, level, resamples)
            assert ends == pytest.approx(wanted, rel=1e-9, abs=1e-12)
        elif row["no_interval"]:
            # All of a layer exchanged: the ratio is 1 whatever the pair.
            assert np.isnan(ends).all()
        else:
            assert ends == pytest.approx([row["mean"]] * 2, abs=1e-9)
        flipped = [
            abs(np.dot(signs, effects)) for signs in itertools.product((1.0, -1.0), repeat=6)
        ]
        found = abs(effects.sum())
        p = sum(value >= found - 1e-12 * abs(effects).sum() for value in flipped) / 64
        assert row["p"] == pytest.approx(p, abs=1e-12)
        p_by_hand[row["metric"]].append(p)
    for metric, p_values in p_by_hand.items():
        found = summary[summary["metric"] == metric]["p_holm"]
        assert list(found) == pytest.approx(_holm(p_values), abs=1e-12)
    assert summary["p"].nunique() > 3
    # The mean of what is recovered whole is 1, however the prompts differ.
    whole = summary[(summary["role"] == "whole") & (summary["component"] == "block_output")]
    whole = whole[whole["metric"] == "recovery"]
    assert list(whole["value"]) == pytest.approx([1.0] * 3, abs=1e-9)
    assert list(whole["corrupted"]) == pytest.approx([0.0] * 3, abs=1e-9)
    each = results[(results["role"] == "whole") & (results["metric"] == "recovery")]
    assert each[each["component"] == "block_output"]["value"].std() > 0.1


def _rows_of(results: pd.DataFrame, row: Mapping[str, Any]) -> pd.DataFrame:
    for column in ("component", "layer", "head", "pos", "role", "metric"):
        wanted = row[column]
        same = results[column].isna() if pd.isna(wanted) else results[column] == wanted
        results = results[same]
    return results


def _holm(p: list[float]) -> list[float]:
    """Step by step: the smallest times their number, the next times one less, never falling."""
    adjusted, least = [0.0] * len(p), 0.0
    for step, i in enumerate(sorted(range(len(p)), key=lambda i: p[i])):
        least = max(least, min(1.0, p[i] * (len(p) - step)))
        adjusted[i] = least
    return adjusted


@pytest.mark.parametrize(
    ("intervention", "metric", "at"),
    [
        ("denoise", "recovery", 0),  # read before the prompts differ
        ("noise", "recovery:probability", 0),
        ("noise", "relative:kl_divergence", -1),  # the clean run has none
        ("noise", "relative:js_divergence", -1),
    ],
)
@pytest.mark.parametrize("executor", ["suffix", "reference"])
def test_what_is_normalised_by_nothing_is_an_error(
    gpt2_folder: Path, tmp_path: Path, intervention: str, metric: str, at: int, executor: str
) -> None:
    spec = spec_of(
        gpt2_folder,
        model={"path": str(gpt2_folder), "dtype": "float32"},
        data={"pairs": PAIRS[:3], "at": at},
        intervention=intervention,
        grid={"component": "block_output", "positions": "END"},
        metric=metric,
        run={"executor": executor},
    )
    with pytest.raises(IntervError, match=f"{metric} is not defined: it divides by") as found:
        report_of(spec, tmp_path)
    assert f"the metric {metric.partition(':')[2] or 'logit_difference'} itself" in str(found.value)
    assert "over 3 pairs" in str(found.value)


# Which pairs are patched.


@pytest.fixture(scope="module")
def toy_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("toy")
    toy.induction_model(folder)
    return folder


def _toy_pair(seed: int) -> tuple[dict[str, Any], Tensor]:
    """A pair, and the model's logits for the clean prompt."""
    clean, corrupted, answer, wrong, _ = toy.example(random.Random(seed))
    pair = {
        "clean": toy.text(clean),
        "corrupted": toy.text(corrupted),
        "answer": toy.VOCABULARY[answer],
        "wrong": toy.VOCABULARY[wrong],
    }
    with torch.no_grad():
        logits = toy.induction_model().double()(torch.tensor([clean])).logits[0, -1]
    return pair, logits


def test_keep_leaves_out_with_reasons(toy_folder: Path, tmp_path: Path) -> None:
    right, logits = _toy_pair(0)
    # Neither is the model's answer; one is above the other.
    order = [toy.VOCABULARY[i] for i in logits.argsort(descending=True) if i > 1]
    assert order[0] == right["answer"] and logits.unique().numel() > 3
    swapped = {**right, "answer": right["wrong"], "wrong": right["answer"]}
    third = {**right, "answer": order[1], "wrong": order[-1]}
    several = {**right, "answer": [order[1], order[0]], "wrong": order[2]}
    pairs = [swapped, right, third, {**swapped, "wrong": [order[-1], order[0]]}, several]

    def run(keep: str) -> tuple[pd.DataFrame, pd.DataFrame]:
        report = report_of(
            spec_of(
                toy_folder,
                data={"pairs": pairs, "keep": keep},
                grid={"component": "block_output", "positions": "END"},
                metric=["logit_difference", "recovery"],
            ),
            tmp_path / keep,
        )
        return report.tables["results"], report.tables["prompts"]

    top = order[0]
    patched = {"all": [0, 1, 2, 3, 4], "correct": [1, 4], "preferred": [1, 2, 4]}
    for keep, wanted in patched.items():
        results, prompts = run(keep)
        assert list(dict.fromkeys(results["prompt_id"])) == wanted
        assert list(prompts["prompt_id"]) == list(range(5))
        assert list(prompts["top"]) == [top] * 5
        assert list(prompts["correct"]) == [False, True, False, False, True]
        assert list(prompts["preferred"]) == [False, True, True, False, True]
        assert list(prompts["patched"]) == [i in wanted for i in range(5)]
        reason = {
            "correct": f"the model's top answer is {top!r}",
            "preferred": "the model prefers a wrong answer",
            "all": "",
        }[keep]
        assert list(prompts["left_out_because"]) == [
            "" if i in wanted else reason for i in range(5)
        ]
        known = prompts[prompts["patched"]]
        assert list(prompts["clean_logit_difference"].isna()) == [i not in wanted for i in range(5)]
        ids = {word: toy.VOCABULARY.index(word) for word in order}
        for row in known.to_dict("records"):
            right = [float(logits[ids[word.strip()]]) for word in row["answer"].split(" | ")]
            together = float(np.log(np.exp(right).sum()))
            others = [float(logits[ids[word.strip()]]) for word in row["wrong"].split(" | ")]
            expected = together - np.mean(others)
            assert row["clean_logit_difference"] == pytest.approx(expected, abs=1e-9)
        # A recovery is of the pairs that are kept, and of no others.
        clean, corrupted = (
            results[results["metric"] == "logit_difference"].groupby("prompt_id")[run_].first()
            for run_ in ("clean", "corrupted")
        )
        recovery = results[results["metric"] == "recovery"]["value"].to_numpy()
        plain = results[results["metric"] == "logit_difference"]["value"].to_numpy()
        expected = (plain - corrupted.mean()) / (clean.mean() - corrupted.mean())
        assert recovery == pytest.approx(expected, abs=1e-9)


def test_an_answer_of_several_tokens_is_preferred_as_a_whole(
    gpt2_folder: Path, tmp_path: Path
) -> None:
    """Answers whose first tokens are the same one differ in what follows."""
    prompt = "The Space Needle is in the"
    tokenizer = transformers.AutoTokenizer.from_pretrained(gpt2_folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(gpt2_folder, dtype=torch.float64)

    def chance(answer: str) -> float:
        ids, n = tokenizer(f"{prompt} {answer}")["input_ids"], len(tokenizer(prompt)["input_ids"])
        with torch.no_grad():
            logs = model(torch.tensor([ids])).logits[0].log_softmax(-1)
        return float(sum(logs[i - 1, ids[i]] for i in range(n, len(ids))))

    likely, unlikely = sorted(["Seattle Rome", "Seattle Paris"], key=chance, reverse=True)
    pairs = [
        {**PAIRS[0], "clean": prompt, "answer": likely, "wrong": unlikely},
        {**PAIRS[0], "clean": prompt, "answer": unlikely, "wrong": likely},
    ]
    report = report_of(
        spec_of(
            gpt2_folder,
            data={"pairs": pairs, "keep": "preferred"},
            grid={"component": "block_output", "positions": "END"},
            metric="log_probability_difference",
        ),
        tmp_path,
    )
    assert list(report.tables["prompts"]["patched"]) == [True, False]


def test_an_answer_of_several_tokens_is_correct_as_a_whole(
    gpt2_folder: Path, tmp_path: Path
) -> None:
    """Each token the top one after those before it; any of several answers will do."""
    prompt = "The Space Needle is in the"
    tokenizer = transformers.AutoTokenizer.from_pretrained(gpt2_folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(gpt2_folder, dtype=torch.float64)
    ids = tokenizer(prompt)["input_ids"]
    words = [f" {word}" for word in ["Seattle", "Mostar", "Paris", "Rome", "Berlin", "London"]]
    # No word of its own is this model's top token: its last layer is told which to like.
    liked = [tokenizer(word)["input_ids"][0] for word in words]
    made = tmp_path / "model"
    with torch.no_grad():
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.clone())
        model.lm_head.weight[[i for i in range(420) if i not in liked]] *= 0.0
        model.config.tie_word_embeddings = False
    model.save_pretrained(made)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (made / name).write_bytes((gpt2_folder / name).read_bytes())
    told = []
    for _ in range(2):
        with torch.no_grad():
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
        told.append(tokenizer.decode([ids[-1]]))
    assert set(told) <= set(words)
    whole = "".join(told)
    other = next(word for word in words if word not in told)
    answers = [whole, told[0] + other, [other, whole], other, [other, told[0]]]
    pairs = [{**PAIRS[0], "clean": prompt, "answer": answer, "wrong": []} for answer in answers]
    report = report_of(
        spec_of(
            made,
            data={"pairs": pairs, "keep": "correct"},
            grid={"component": "block_output", "positions": "END"},
            metric="log_probability",
        ),
        tmp_path / "run",
    )
    prompts = report.tables["prompts"]
    assert list(prompts["correct"]) == [True, False, True, False, True]
    assert set(prompts["top"]) == {told[0]}


@pytest.mark.parametrize("keep", ["correct", "preferred"])
def test_no_pair_left_is_an_error_that_says_what_the_model_says(
    toy_folder: Path, tmp_path: Path, keep: str
) -> None:
    right, _ = _toy_pair(1)
    swapped = {**right, "answer": right["wrong"], "wrong": right["answer"]}
    spec = spec_of(
        toy_folder,
        data={"pairs": [swapped], "keep": keep},
        grid={"component": "block_output", "positions": "END"},
        figures={"patterns": [[0, 1]]},
    )
    for _ in range(2):  # the same where its baselines are known already
        with pytest.raises(IntervError) as found:
            report_of(spec, tmp_path)
        told = str(found.value)
        assert f"no pair is left (data.keep: {keep})" in told
        assert repr(right["clean"]) in told
        assert f"expected ' {right['wrong']}', the model says {right['answer']!r}" in told
        assert "data.keep=all" in told


# Everything at once.


def everything(folder: Path, dtype: str, executor: str = "auto") -> dict[str, Any]:
    """A spec that has every part."""
    return spec_of(
        folder,
        model={"path": str(folder), "dtype": dtype},
        data={"pairs": [*PAIRS[:5], _LONGER, _LONGER_STILL]},
        grid=[
            {"component": "block_output", "positions": [1, "END"]},
            {"component": HEAD, "positions": "whole"},
        ],
        paths={
            "senders": {"component": HEAD, "layers": [0, 1], "positions": "END"},
            "receivers": ["logits", {"component": "head_query_output", "layers": 2}],
        },
        attribution={"method": "integrated_inputs", "steps": 2, "verify": 5},
        decompose=True,
        circuit={
            "steps": 2,
            "choose": {"share": 0.3},
            "fractions": [0.1, 0.5, 1.0],
            "knockouts": 1,
        },
        metric=["logit_difference", "recovery:probability"],
        figures={"formats": ["svg"], "patterns": [[1, 0]]},
        run={"executor": executor, "max_tokens": 24, "threads": 1},
    )


_LONGER = {
    "clean": "The Old Tower is located in the city of",
    "corrupted": "The Eiffel Tower is located in the city of",
    "answer": "Paris",
    "wrong": "Rome",
}
_LONGER_STILL = {**_LONGER, "corrupted": "The Space Tower is located in the city of"}
_TABLES = {
    "results",
    "summary",
    "prompts",
    "attribution",
    "decomposition",
    "curve",
    "scores",
    "nodes",
}


def _written(folder: Path) -> dict[str, bytes]:
    """All that is written of a run, but for the record of how it went."""
    left = {"run.json", ".lock", "journal.jsonl"}
    files = [path for path in folder.rglob("*") if path.is_file() and path.name not in left]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


class _InterruptedError(Exception):
    pass


def _stop_after(monkeypatch: pytest.MonkeyPatch, lines: int) -> Callable[[], int]:
    """Journals take so many more lines, and then fail; gives how many they took."""
    append = journals.Journal.append
    taken = 0

    def counting(self: journals.Journal, records: Mapping[str, Any]) -> None:
        nonlocal taken
        if taken == lines:
            raise _InterruptedError
        taken += 1
        append(self, records)

    monkeypatch.setattr(journals.Journal, "append", counting)
    return lambda: taken


@pytest.mark.parametrize("executor", ["suffix", "reference"])
def test_a_run_that_is_interrupted_again_and_again_gives_the_same_bytes(
    model_folder: Path, tmp_path: Path, executor: str
) -> None:
    spec = everything(model_folder, "float32", executor)
    whole = report_of(spec, tmp_path / "whole")
    sessions = 0
    while sessions < 40:
        sessions += 1
        # Sometimes in the middle of a prompt's packs, sometimes between parts.
        with pytest.MonkeyPatch.context() as patch:
            _stop_after(patch, 3 + sessions % 5)
            try:
                again = report_of(spec, tmp_path / "broken")
            except _InterruptedError:
                continue
        break
    assert sessions > 6
    one, other = ((tmp_path / name / journals.JOURNAL).read_bytes() for name in ("whole", "broken"))
    assert one == other
    assert set(whole.tables) == set(again.tables) == _TABLES
    for name, table in whole.tables.items():
        assert to_csv(table) == to_csv(again.tables[name]), name
    assert whole.files == again.files and set(whole.files) == {"circuit.json"}
    assert whole.findings == again.findings
    # Nothing is left to do, and nothing is done.
    with pytest.MonkeyPatch.context() as patch:
        _stop_after(patch, 0)
        report_of(spec, tmp_path / "broken")


@pytest.mark.parametrize("executor", ["suffix", "reference"])
@pytest.mark.parametrize("kind", ["zero", "mean", "resample"])
def test_an_interrupted_ablation_gives_the_same_bytes(
    gpt2_folder: Path, tmp_path: Path, kind: str, executor: str
) -> None:
    """Means over prompts and draws of them are made anew."""
    options = {"zero": {}, "mean": {"least": 2}, "resample": {"samples": 2}}
    spec = spec_of(
        gpt2_folder,
        model={"path": str(gpt2_folder), "dtype": "float32"},
        data={"pairs": PAIRS[:4]},
        intervention={"type": kind, **options[kind]},
        grid=[
            {"component": ["block_output", "mlp_output"], "positions": [1, "END"]},
            {"component": HEAD, "positions": "whole"},
        ],
        paths={
            "senders": {"component": HEAD, "layers": [0, 1], "positions": "END"},
            "receivers": ["logits", {"component": "mlp_input", "layers": 2}],
        },
        metric=["logit_difference", "kl_divergence"],
        run={"executor": executor, "max_tokens": 12, "threads": 1},
    )
    whole = report_of(spec, tmp_path / "whole")
    for lines in (2, 3, 4, 5):
        with pytest.MonkeyPatch.context() as patch:
            _stop_after(patch, lines)
            with pytest.raises(_InterruptedError):
                report_of(spec, tmp_path / "broken")
    again = report_of(spec, tmp_path / "broken")
    one, other = ((tmp_path / name / journals.JOURNAL).read_bytes() for name in ("whole", "broken"))
    assert one == other
    for name, table in whole.tables.items():
        assert to_csv(table) == to_csv(again.tables[name]), name


def test_what_is_written_is_the_same_after_an_interruption(
    gpt2_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With figures, and by the way that the command takes."""
    # Fewer figures: they take longest.
    spec = {**everything(gpt2_folder, "float32"), "metric": "logit_difference", "paths": []}
    whole = interv.run(spec, outputs=tmp_path / "whole")
    with monkeypatch.context() as patch:
        taken = _stop_after(patch, 20)
        with pytest.raises(_InterruptedError):
            interv.run(spec, outputs=tmp_path / "broken")
        assert taken() == 20
    again = interv.run(spec, outputs=tmp_path / "broken")
    assert again.folder.name == whole.folder.name
    first, second = _written(whole.folder), _written(again.folder)
    assert {f"{name}.csv" for name in _TABLES} | {"circuit.json"} <= set(first)
    assert any(name.endswith(".svg") for name in first)
    assert sorted(first) == sorted(second)
    assert [name for name in first if first[name] != second[name]] == []
    assert whole.findings == again.findings


def test_both_executors_agree_on_every_table(model_folder: Path, tmp_path: Path) -> None:
    one, two = (
        report_of(everything(model_folder, "float64", name), tmp_path / name)
        for name in ("suffix", "reference")
    )
    assert set(one.tables) == set(two.tables) == _TABLES
    for name, table in one.tables.items():
        assert len(table)
        pd.testing.assert_frame_equal(table, two.tables[name], rtol=1e-8, atol=1e-9)
    circuits = [json.loads(report.files["circuit.json"]) for report in (one, two)]
    assert circuits[0]["nodes"] == circuits[1]["nodes"]
    names = [[(e["source"], e["target"]) for e in circuit["edges"]] for circuit in circuits]
    assert names[0] == names[1]


def test_edges_into_nodes_outside_the_circuit_do_nothing(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that a circuit of nodes has none of them."""
    spec = spec_of(
        model_folder,
        circuit={
            "level": "nodes",
            "steps": 2,
            "choose": {"share": 0.9},
            "fractions": [0.1, 0.25, 0.5, 0.75, 1.0],
        },
    )
    within = report_of(spec, tmp_path / "within")

    monkeypatch.setattr(Ranks, "pruned", lambda _self, kept: kept)
    sent = report_of(spec, tmp_path / "sent")
    # Effects that are rounding alone have an interval of width 0 in one run and none in the other.
    first, second = (
        r.tables["curve"].drop(columns=["edges", "no_interval"]).fillna(0.0) for r in (within, sent)
    )
    pd.testing.assert_frame_equal(first, second, rtol=1e-9, atol=1e-9)
    counts = [
        dict(zip(report.tables["scores"]["name"], report.tables["scores"]["value"], strict=True))
        for report in (within, sent)
    ]
    assert counts[0]["nodes_in_circuit"] == counts[1]["nodes_in_circuit"] > 2
    assert 0 < counts[0]["edges_in_circuit"] < counts[1]["edges_in_circuit"]
    assert counts[0]["faithfulness"] == pytest.approx(counts[1]["faithfulness"], abs=1e-9)


def test_the_command_writes_what_the_api_gives(
    gpt2_folder: Path, tmp_path: Path, cli: Callable[..., Any]
) -> None:
    spec = spec_of(
        gpt2_folder,
        grid={"component": HEAD, "positions": "END"},
        figures={"formats": ["svg"]},
    )
    given = interv.run(spec, outputs=tmp_path / "api")
    path = tmp_path / "test.yaml"
    path.write_text(json.dumps(spec))
    result = cli("patch", path, "-o", tmp_path / "cli")
    assert result.code == 0, result.err
    folder = Path(result.out.strip())
    assert folder.name == given.folder.name
    for name, table in (
        ("results", given.results),
        ("summary", given.summary),
        ("prompts", given.prompts),
    ):
        assert (folder / f"{name}.csv").read_bytes() == (given.folder / f"{name}.csv").read_bytes()
        read = pd.read_csv(folder / f"{name}.csv", keep_default_na=False)
        assert list(read.columns) == list(table.columns) and len(read) == len(table)
    # Numbers are written whole.
    read = pd.read_csv(folder / "results.csv")
    assert list(read["value"]) == list(given.results["value"])
