"""`interv patch` on a model whose circuit is known finds this circuit, and nothing else."""

from __future__ import annotations

import itertools
import json
import random
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from interv.report.patch import PatchReport
from tests import toy
from tests.test_patch import HEAD, report_of, spec_of

N = 6
HEADS = [(layer, head) for layer in range(2) for head in range(toy.HEADS)]
CIRCUIT = {toy.PREVIOUS, toy.INDUCTION}
# Of a whole effect: what the norm before MLP 1 makes of it (see tests/test_toy.py).
NOTHING = 1e-3


def pair(seed: int) -> dict[str, Any]:
    clean, corrupted, answer, wrong, at = toy.example(random.Random(seed))
    return {
        "clean": toy.text(clean),
        "corrupted": toy.text(corrupted),
        "answer": toy.VOCABULARY[answer],
        "wrong": toy.VOCABULARY[wrong],
        "spans": {
            "changed": f"{toy.VOCABULARY[clean[at['changed']]]}@2",
            "after": toy.VOCABULARY[answer],
        },
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("toy")
    toy.induction_model(made)
    return made


def run(folder: Path, outputs: Path, **sections: Any) -> PatchReport:
    pairs = [pair(seed) for seed in range(N)]
    data = {"pairs": pairs, "keep": "correct"}
    return report_of(spec_of(folder, data=data, **sections), outputs)


def head(table: pd.DataFrame, at: tuple[int, int]) -> pd.DataFrame:
    return table[(table["layer"] == at[0]) & (table["head"] == at[1])]


@pytest.mark.parametrize("kind", ["denoise", "noise"])
def test_heads_where_they_work(folder: Path, tmp_path: Path, kind: str) -> None:
    """PREVIOUS writes after the word that is changed, INDUCTION at the end."""
    report = run(
        folder,
        tmp_path,
        intervention=kind,
        grid=[
            {"component": HEAD, "positions": ["whole", "spans", "END"]},
            {"component": "mlp_output"},
        ],
        metric="recovery",
    )
    summary = report.tables["summary"]
    assert len(summary) == 8 * 4 + 2 * toy.LENGTH
    full = 1.0 if kind == "denoise" else -1.0
    found = set()
    for row in summary.to_dict("records"):
        at = (row["layer"], row["head"])
        where = {toy.PREVIOUS: ("whole", "after"), toy.INDUCTION: ("whole", "END")}
        works = not pd.isna(row["head"]) and row["role"] in where.get(at, ())
        assert row["mean"] == pytest.approx(full if works else 0.0, abs=NOTHING), row
        assert row["n"] == N
        if works:
            found.add((at, row["role"]))
    assert len(found) == 4


def test_the_stream_tells_where_the_word_travels(folder: Path, tmp_path: Path) -> None:
    """From the changed word to the one after it in layer 0, from there to the end in layer 1."""
    report = run(
        folder,
        tmp_path,
        grid={"component": ["block_input", "block_output"], "positions": ["changed", "after", -1]},
        metric="recovery",
    )
    whole = {
        ("block_input", 0, "changed"),
        ("block_output", 0, "after"),
        ("block_input", 1, "after"),
        ("block_output", 1, "-1"),
    }
    summary = report.tables["summary"]
    assert len(summary) == 2 * 2 * 3
    for row in summary.to_dict("records"):
        expected = (row["component"], row["layer"], row["role"]) in whole
        assert row["value"] == pytest.approx(float(expected), abs=NOTHING), row


@pytest.mark.parametrize("kind", ["denoise", "noise"])
@pytest.mark.parametrize("freeze", [["heads"], ["heads", "mlps"]])
def test_paths(folder: Path, tmp_path: Path, kind: str, freeze: list[str]) -> None:
    """INDUCTION writes the answer; what PREVIOUS writes is read as its key, at one place."""
    inputs = ["query", "key", "value"]
    report = run(
        folder,
        tmp_path,
        intervention=kind,
        paths={
            "senders": [
                {"component": HEAD, "positions": "whole"},
                {"component": "mlp_output", "positions": "whole"},
            ],
            "receivers": [
                "logits",
                *({"component": f"head_{part}_output", "layers": 1} for part in inputs),
                {
                    "component": "head_key_output",
                    "layers": 1,
                    "heads": [toy.INDUCTION[1]],
                    "positions": "after",
                    "name": "there",
                },
                {"component": "mlp_input", "layers": [0, 1]},
            ],
            "freeze": freeze,
        },
        metric="recovery",
    )
    key = f"1.{toy.INDUCTION[1]}.key"
    expected = {(toy.PREVIOUS, key), (toy.PREVIOUS, "there"), (toy.INDUCTION, "logits")}
    summary = report.tables["summary"]
    # Layer 0 has five senders, and after them 3 * 4 inputs of heads, the named key and an MLP;
    # its heads reach its MLP too, those of layer 1 theirs.
    assert len(summary) == 10 + 5 * (3 * 4 + 1 + 1) + 4 + 4
    full = 1.0 if kind == "denoise" else -1.0
    found = set()
    for row in summary.to_dict("records"):
        sender = (row["layer"], None if pd.isna(row["head"]) else row["head"])
        carries = (sender, row["receiver"]) in expected
        assert row["mean"] == pytest.approx(full if carries else 0.0, abs=NOTHING), row
        found |= {(sender, row["receiver"])} if carries else set()
    assert found == expected


@pytest.mark.parametrize("kind", ["denoise", "noise"])
@pytest.mark.parametrize("method", ["gradient", "integrated_inputs", "integrated_activations"])
def test_attribution(folder: Path, tmp_path: Path, kind: str, method: str) -> None:
    steps = {} if method == "gradient" else {"steps": 20}
    report = run(
        folder,
        tmp_path,
        intervention=kind,
        grid=[
            {"component": HEAD, "positions": "whole"},
            {"component": "mlp_output", "positions": "whole"},
        ],
        attribution={"method": method, "verify": "all", **steps},
        metric=["logit_difference", "recovery"],
    )
    table = report.tables["attribution"]
    assert len(table) == 10
    assert report.findings["attribution_against_patching"]["places"] == 10
    scale = table["exact"].abs().max()
    assert scale > 10  # logits
    # All that is exact is so, whatever the gradient says.
    exact = report.tables["summary"]
    exact = exact[exact["metric"] == "logit_difference"]["mean"]
    assert list(table["exact"]) == pytest.approx(list(exact), abs=1e-12)
    sized = table.assign(size=table["attribution"].abs() / scale)
    big = sized[sized["size"] > 0.01].to_dict("records")
    heads = {(row["layer"], row["head"]) for row in big}
    if method == "gradient":
        # Where attention is all on one place, its gradient is nothing: the head that decides which
        # place is overlooked in one direction, and underrated in the other.
        assert heads == ({toy.INDUCTION} if kind == "denoise" else CIRCUIT)
        assert float(head(sized, toy.PREVIOUS)["size"].iloc[0]) < 0.2
    else:
        assert heads == CIRCUIT
    near = {"gradient": 0.1, "integrated_inputs": 0.3, "integrated_activations": 1e-2}[method]
    for at in [toy.INDUCTION] if method == "gradient" else CIRCUIT:
        row = head(table, at).iloc[0]
        assert row["attribution"] == pytest.approx(row["exact"], rel=near)


def test_the_top_of_an_attribution_is_patched(folder: Path, tmp_path: Path) -> None:
    report = run(
        folder,
        tmp_path,
        grid=[{"component": HEAD, "positions": "whole"}, {"component": "mlp_output"}],
        attribution={"method": "integrated_inputs", "steps": 20, "verify": 2},
    )
    table, summary = report.tables["attribution"], report.tables["summary"]
    assert len(table) == 8 + 2 * toy.LENGTH
    patched = {(row.layer, row.head) for row in summary.itertuples()}
    assert len(summary) == 2 and patched == CIRCUIT
    assert table["exact"].notna().sum() == 2
    assert len(report.tables["results"]) == 2 * N


FRACTIONS = [0.01, 0.05, 0.1, 0.2, 0.5, 1.0]


@pytest.mark.parametrize("method", ["eap", "eap_ig_inputs"])
def test_the_circuit_of_edges(folder: Path, tmp_path: Path, method: str) -> None:
    report = run(
        folder,
        tmp_path,
        circuit={
            "method": method,
            **({"steps": 20} if method == "eap_ig_inputs" else {}),
            "choose": {"top": 4},
            "fractions": FRACTIONS,
            "knockouts": 2,
        },
    )
    circuit = json.loads(report.files["circuit.json"])
    layer, number = toy.PREVIOUS
    previous = f"a{layer}.h{number}"
    induction = f"a{toy.INDUCTION[0]}.h{toy.INDUCTION[1]}"
    needed = {
        ("input", f"{previous}.v"),
        (previous, f"{induction}.k"),
        (induction, "logits"),
    }
    edges = {(edge["source"], edge["target"]) for edge in circuit["edges"]}
    # One more than needed was asked for: where it leads nowhere it is pruned.
    assert needed <= edges and len(edges) in (3, 4)
    sending = {edge["source"] for edge in circuit["edges"]}
    assert sending == {"input", previous, induction}
    _check_scores(report)
    scores = dict(zip(*(report.tables["scores"][c] for c in ("name", "value")), strict=True))
    assert scores["edges"] == 110 and scores["edges_in_circuit"] == len(edges)
    assert scores["nodes_in_circuit"] == 2
    # Without either of its heads nothing is left of it.
    minimal = report.tables["nodes"].set_index("node")["minimality"].dropna()
    full = scores["clean"] - scores["empty"]
    assert dict(minimal / full) == pytest.approx({previous: 1.0, induction: 1.0}, abs=NOTHING)
    assert scores["minimality_min"] == minimal.min()
    assert scores["incompleteness_max"] < NOTHING * full


@pytest.mark.parametrize("method", ["eap", "eap_ig_inputs"])
def test_the_circuit_of_nodes(folder: Path, tmp_path: Path, method: str) -> None:
    report = run(
        folder,
        tmp_path,
        circuit={
            "level": "nodes",
            "method": method,
            **({"steps": 20} if method == "eap_ig_inputs" else {}),
            "choose": {"top": 3},
            "fractions": FRACTIONS,
        },
    )
    nodes = report.tables["nodes"]
    inside = nodes[nodes["edges_in_circuit"] > 0]
    heads = {(row.layer, row.head) for row in inside.itertuples() if row.kind == "head"}
    assert heads == CIRCUIT
    assert set(inside["kind"]) == {"input", "head"}
    circuit = json.loads(report.files["circuit.json"])
    assert {node["name"] for node in circuit["nodes"]} == {*inside["node"], "logits"}
    _check_scores(report)
    scores = dict(zip(*(report.tables["scores"][c] for c in ("name", "value")), strict=True))
    assert scores["nodes_in_circuit"] == 2
    assert scores["edges_in_circuit"] == len(circuit["edges"]) == inside["edges_in_circuit"].sum()


def _check_scores(report: PatchReport) -> None:
    """The curves go from nothing to the whole model; CPR is of the one, CMD of the other."""
    curve = report.tables["curve"]
    by = {name: list(part["mean"]) for name, part in curve.groupby("ranking")}
    assert set(by) == {"signed", "magnitude"}
    for shares in by.values():
        assert len(shares) == len(FRACTIONS)
        assert shares[0] == pytest.approx(0.0, abs=NOTHING)
        assert shares[-1] == pytest.approx(1.0, abs=1e-9)
    steps = [(b - a, i) for i, (a, b) in enumerate(itertools.pairwise(FRACTIONS))]
    f, g = by["signed"], by["magnitude"]
    cpr = sum(wide * (f[i] + f[i + 1]) / 2 for wide, i in steps)
    cmd = sum(wide * (abs(1 - g[i]) + abs(1 - g[i + 1])) / 2 for wide, i in steps)
    scores = dict(zip(*(report.tables["scores"][c] for c in ("name", "value")), strict=True))
    assert scores["CPR"] == pytest.approx(cpr, rel=1e-12)
    assert scores["CMD"] == pytest.approx(cmd, rel=1e-12)
    assert scores["faithfulness"] == pytest.approx(1.0, abs=NOTHING)
    assert scores["unfaithfulness"] == pytest.approx(
        abs(scores["clean"] - scores["circuit"]), rel=1e-12
    )
    told = report.findings["circuit"]
    assert told["CPR"] == scores["CPR"] and told["CMD"] == scores["CMD"]
    assert told["faithfulness"] == scores["faithfulness"]
    assert told["evaluated_on"] == f"the {N} pairs that gave the scores (held_out: 0)"
