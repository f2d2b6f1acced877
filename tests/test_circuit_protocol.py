"""What a circuit is measured on, and what is taken out of it, by the published definitions."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import GPT2LMHeadModel

from interv.errors import IntervError
from interv.plan.circuit import split
from interv.report.patch import PatchReport
from interv.task.pairs import Pair
from tests import eap_ig
from tests.test_patch import report_of

PROMPTS = list(zip(eap_ig.CLEAN, eap_ig.CORRUPTED, eap_ig.ANSWERS, strict=True))
# One more, so that either half has two.
PROMPTS.append(([8, 72, 41, 9, 90, 72, 14], [8, 72, 41, 9, 90, 41, 14], (41, 72)))
WIDTH = 12  # of a head
SIMPLE = {"method": "eap", "fractions": [0.5, 1.0]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("gpt2")
    eap_ig.save("gpt2", made)
    return made


def run(
    folder: Path, outputs: Path, which: Sequence[int], *, keep: str = "all", **sections: Any
) -> PatchReport:
    pairs = [
        {
            "clean": eap_ig.text(clean),
            "corrupted": eap_ig.text(corrupted),
            "answer": f"w{right}",
            "wrong": f"w{wrong}",
        }
        for clean, corrupted, (right, wrong) in (PROMPTS[i] for i in which)
    ]
    spec = {
        "kind": "patch",
        "name": "protocol",
        "model": {"path": str(folder), "dtype": "float64", "prepend_bos": False},
        "data": {"pairs": pairs, "keep": keep},
        **sections,
    }
    return report_of(spec, outputs)


def scores_of(report: PatchReport) -> dict[str, float]:
    return dict(report.tables["scores"].itertuples(index=False))


def pair(index: int, ids: tuple[int, ...]) -> Pair:
    texts = {"text": "", "corrupted_text": "", "tokens": (), "corrupted_tokens": ()}
    return Pair(
        **texts,  # type: ignore[arg-type]
        index=index,
        ids=ids,
        corrupted_ids=(1, *ids[1:]),
        answers=("a",),
        answer_ids=((2,),),
        wrong=("b",),
        wrong_ids=((3,),),
        spans={},
        group="",
        read=len(ids) - 1,
    )


def test_pairs_are_held_out_by_the_seed() -> None:
    pairs = [pair(i, (5, i, 7)) for i in range(6)]
    for seed in range(5):
        found = split(pairs, 0.5, seed)
        assert found.scored | found.evaluated == set(range(6))
        assert not found.scored & found.evaluated
        assert len(found.evaluated) == 3
        assert split(pairs[::-1], 0.5, seed) == found
    assert len({split(pairs, 0.5, seed) for seed in range(5)}) > 1
    everything = split(pairs, 0.0, 0)
    assert everything.scored == everything.evaluated == set(range(6))
    assert not split(pairs[:1], 0.5, 0).evaluated or not split(pairs[:1], 0.5, 0).scored


def test_edges_are_scored_on_other_pairs_than_circuits_are_evaluated_on(
    folder: Path, tmp_path: Path
) -> None:
    circuit = SIMPLE
    which = [0, 1, 2, 3, 3]
    whole = run(folder, tmp_path / "whole", which, circuit={**circuit, "held_out": 0.5})
    told = whole.findings["circuit"]["evaluated_on"]
    sides = [[0, 1], [0, 2], [0, 3], [1, 2], [1, 3], [2, 3]]
    attribution = whole.tables["nodes"]["attribution"].tolist()
    found = []
    for scored in sides:
        report = run(folder, tmp_path / str(scored), scored, circuit=circuit)
        if report.tables["nodes"]["attribution"].tolist() == pytest.approx(attribution):
            found.append(scored)
    [scored] = found
    # The fifth is a copy of the fourth, and counts on neither side.
    others = [i for i in range(4) if i not in scored]
    assert told == "2 held-out pairs (2 others gave the scores)"
    report = run(folder, tmp_path / "others", others, circuit=circuit)
    for name in ("clean", "empty"):
        assert scores_of(whole)[name] == pytest.approx(scores_of(report)[name], rel=1e-12)
    assert set(whole.tables["curve"]["n"]) == {2}


def test_no_pair_left_on_one_side(folder: Path, tmp_path: Path) -> None:
    """Of these two the model prefers the right answer of the first alone."""
    circuit = {**SIMPLE, "held_out": 0.5}
    with pytest.raises(IntervError, match=r"1 pairs that data\.keep leaves none is (evalu|scor)"):
        run(folder, tmp_path, [0, 1], keep="preferred", circuit=circuit)


def ablated(folder: Path, nodes: Sequence[str]) -> float:
    """The mean logit difference where these nodes write nothing, by plain hooks."""
    model = GPT2LMHeadModel.from_pretrained(folder, dtype=torch.float64).eval()
    for name in nodes:
        layer, _, head = name[1:].partition(".h")
        block = model.transformer.h[int(layer)]
        if name[0] == "m":
            block.mlp.register_forward_hook(lambda _m, _a, out: torch.zeros_like(out))
            continue
        columns = slice(int(head) * WIDTH, (int(head) + 1) * WIDTH)

        def blank(_module: Any, args: tuple[Tensor], columns: slice = columns) -> tuple[Tensor]:
            [value] = args
            value = value.clone()
            value[..., columns] = 0
            return (value,)

        block.attn.c_proj.register_forward_pre_hook(blank)
    with torch.no_grad():
        logits = model(torch.tensor([clean for clean, _, _ in PROMPTS])).logits[:, -1]
    found = [
        float(row[right] - row[wrong])
        for row, (_, _, (right, wrong)) in zip(logits, PROMPTS, strict=True)
    ]
    return sum(found) / len(found)


def test_completeness_and_minimality_of_the_whole_model_by_hooks(
    folder: Path, tmp_path: Path
) -> None:
    """Where the circuit is the model, C \\ K is M \\ K, and both are nodes taken out of it.

    A node's minimality is the largest |F(C \\ (K ∪ {v})) − F(C \\ K)| over the sets K without
    it: was that of the empty K alone.
    """
    report = run(
        folder,
        tmp_path,
        range(4),
        intervention="zero",
        circuit={
            "method": "eap",
            "choose": {"share": 1.0},
            "fractions": [0.5, 1.0],
            "knockouts": 2,
        },
    )
    without = json.loads(report.files["circuit.json"])["without"]
    sets = [frozenset(one["nodes"].split()) for one in without]
    assert len(sets) == 2 and all(0 < len(nodes) < 15 for nodes in sets)
    assert [one["incompleteness"] for one in without] == pytest.approx([0, 0], abs=1e-9)
    nodes = report.tables["nodes"].set_index("node")["minimality"].drop("input")
    for node in ("a0.h1", "a2.h3", "m1"):
        tried = [
            abs(ablated(folder, sorted(nodes | {node})) - ablated(folder, sorted(nodes - {node})))
            for nodes in (frozenset[str](), *sets)
        ]
        assert nodes[node] == pytest.approx(max(tried), rel=1e-8)
        assert max(tried) > tried[0] or node != "m1"
    assert scores_of(report)["minimality_min"] == nodes.min()


def test_incompleteness_is_what_the_circuit_and_the_model_differ_by(
    folder: Path, tmp_path: Path
) -> None:
    report = run(
        folder,
        tmp_path,
        range(4),
        intervention="zero",
        circuit={
            "method": "eap",
            "choose": {"share": 0.4},
            "fractions": [0.5, 1.0],
            "knockouts": 3,
        },
    )
    without = json.loads(report.files["circuit.json"])["without"]
    scores = scores_of(report)
    apart = [one["incompleteness"] for one in without]
    assert scores["incompleteness_mean"] == pytest.approx(sum(apart) / len(apart))
    assert scores["incompleteness_max"] == max(apart) > 0
    # Each set is of the circuit's own nodes; the model without it by plain hooks bounds them.
    inside = report.tables["nodes"].set_index("node")["edges_in_circuit"]
    for one in without:
        nodes = one["nodes"].split()
        assert all(inside[node] > 0 for node in nodes)
        assert ablated(folder, nodes) != pytest.approx(scores["clean"])


def test_the_decomposition_names_what_it_is_of(folder: Path, tmp_path: Path) -> None:
    """Lens and parts of a logit alone: raw, or less the mean over the vocabulary."""
    clean, _, (right, _) = PROMPTS[0]
    data = {"pairs": [{"clean": eap_ig.text(clean), "answer": f"w{right}"}]}
    model = GPT2LMHeadModel.from_pretrained(folder, dtype=torch.float64).eval()
    with torch.no_grad():
        logits = model(torch.tensor([clean])).logits[0, -1]
    expected = {
        "raw": ("logit", float(logits[right])),
        "centred": ("logit − mean over the vocabulary", float(logits[right] - logits.mean())),
    }
    for unembedding, (name, value) in expected.items():
        report = run(
            folder,
            tmp_path / unembedding,
            [],
            data=data,
            decompose={"unembedding": unembedding},
            metric="logit",
        )
        table = report.tables["decomposition"]
        assert set(table["of"]) == {name}
        lens = table[table["component"] == "lens"]["mean"]
        assert lens.iloc[-1] == pytest.approx(value, rel=1e-9)
        assert table[table["component"] != "lens"]["mean"].sum() == pytest.approx(value, rel=1e-9)
