"""Circuits of `interv patch` against the authors' own code (numbers in tests/eap_ig.py)."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from interv.report.patch import PatchReport
from interv.spec.patch_parts import FRACTIONS
from tests import eap_ig
from tests.test_patch import report_of

Folders = Callable[[str], Path]

INTERVENTIONS: dict[str, Any] = {
    "patching": "noise",
    "zero": "zero",
    # Theirs are means over the clean prompts.
    "mean-positional": {"type": "mean", "over": "clean"},
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    made: dict[str, Path] = {}

    def folder(name: str) -> Path:
        if name not in made:
            made[name] = tmp_path_factory.mktemp(name)
            eap_ig.save(name, made[name])
        return made[name]

    return folder


def run(folder: Path, outputs: Path, intervention: Any, **circuit: Any) -> PatchReport:
    prompts = zip(eap_ig.CLEAN, eap_ig.CORRUPTED, eap_ig.ANSWERS, strict=True)
    pairs = [
        {
            "clean": eap_ig.text(clean),
            "corrupted": eap_ig.text(corrupted),
            "answer": f"w{right}",
            "wrong": f"w{wrong}",
        }
        for clean, corrupted, (right, wrong) in prompts
    ]
    if isinstance(intervention, dict) and intervention["type"] == "mean":
        intervention = {"least": len(pairs), **intervention}
    spec = {
        "kind": "patch",
        "name": "authors",
        "model": {"path": str(folder), "dtype": "float64", "prepend_bos": False},
        "data": {"pairs": pairs},
        "intervention": intervention,
        "circuit": {"choose": {"share": 1.0}, **circuit},
    }
    return report_of(spec, outputs)


@pytest.mark.parametrize(
    "published", eap_ig.NUMBERS, ids=lambda n: f"{n.model}-{n.method}-{n.intervention}"
)
def test_zero_mean_and_patching_are_those_of_the_authors(
    published: eap_ig.Numbers, folders: Folders, tmp_path: Path
) -> None:
    """Was: zero and mean left every number of a circuit as it was (case 04).

    Keys of GPT-2 have one head each, those of the Llama two; its norms compute in float32.
    """
    method: dict[str, Any] = {"method": "eap"}
    if published.method == "EAP-IG-inputs":
        method = {"method": "eap_ig_inputs", "steps": eap_ig.STEPS}
    report = run(
        folders(published.model), tmp_path, INTERVENTIONS[published.intervention], **method
    )
    precise = published.model == "gpt2"
    found = {
        f"{edge['source']} {edge['target']}": -edge["score"]
        for edge in json.loads(report.files["circuit.json"])["edges"]
    }
    assert len(found) == published.n_edges
    for edge, score in published.scores.items():
        # Their scores are kept in float32.
        assert found[edge] == pytest.approx(score, rel=1e-6, abs=1e-6), edge
    scores = dict(report.tables["scores"].itertuples(index=False))
    near = 1e-8 if precise else 1e-6
    assert scores["clean"] == pytest.approx(published.baseline, rel=near)
    assert scores["empty"] == pytest.approx(published.empty, rel=near, abs=near)
    curve = report.tables["curve"]
    for by in ("signed", "magnitude"):
        theirs: eap_ig.Side = getattr(published, by)
        ours = curve[curve["ranking"] == by]
        assert list(ours["fraction"]) == FRACTIONS
        assert list(ours["units"]) == [int(x * published.n_edges) for x in FRACTIONS]
        assert list(ours["edges"]) == theirs.edges
        # Where model and empty circuit are near each other, what float32 rounds is a large share.
        near = 1e-8 if precise else 1e-3
        assert list(ours["mean"]) == pytest.approx(theirs.faithfulness, rel=near, abs=near)
    assert scores["CPR"] == pytest.approx(published.signed.area_under, rel=near)
    assert scores["CMD"] == pytest.approx(published.magnitude.area_from_1, rel=near)
    above = [f for f in published.signed.faithfulness if f > 1 + 1e-6]
    assert scores["sizes_above_1"] == len(above)
    assert scores["largest_faithfulness"] == pytest.approx(max(above), rel=near)


def test_resampled_circuits_are_means_over_those_of_each_draw(
    folders: Folders, tmp_path: Path
) -> None:
    """Of three prompts each has two others: drawn both, whatever their order.

    Where all edges are dropped, the metric is that of the other prompts' own logits; all scores
    of edges to the logits, which read a sum, are the mean of those of the two prompts.
    """
    intervention = {"type": "resample", "samples": 2, "over": "clean"}
    report = run(folders("gpt2"), tmp_path, intervention, method="eap")
    model = AutoModelForCausalLM.from_pretrained(folders("gpt2"), dtype=torch.float64)
    with torch.no_grad():
        logits = model(torch.tensor(eap_ig.CLEAN)).logits[:, -1]
    expected = sum(
        float(logits[other, right] - logits[other, wrong])
        for own, (right, wrong) in enumerate(eap_ig.ANSWERS)
        for other in range(3)
        if other != own
    )
    scores = dict(report.tables["scores"].itertuples(index=False))
    assert scores["empty"] == pytest.approx(expected / 6, rel=1e-9)
    assert scores["circuit"] == pytest.approx(scores["clean"], rel=1e-9)
    by_mean = run(
        folders("gpt2"), tmp_path / "mean", {"type": "mean", "over": "clean"}, method="eap"
    )
    # (mean of all three - own) is two thirds of (mean of the two others - own).
    drawn, mean = (r.tables["nodes"].set_index("node")["attribution"] for r in (report, by_mean))
    assert list(drawn) == pytest.approx(list(mean * 1.5), rel=1e-9, abs=1e-12)
    assert float(mean.abs().max()) > 0.1


def test_accuracy_over_the_logarithm_of_the_size(folders: Folders, tmp_path: Path) -> None:
    """acc-AUC of the signed ranking, as github.com/aryamanarora/MIB-circuit-track gives it."""
    report = run(folders("gpt2"), tmp_path, "zero", method="eap")
    curve = report.tables["curve"]
    accuracy = curve[curve["ranking"] == "signed"]["accuracy"].tolist()
    assert accuracy == pytest.approx([0.0] * 5 + [2 / 3, 1.0, 1.0, 1.0, 1 / 3])
    scores = dict(report.tables["scores"].itertuples(index=False))
    assert scores["acc-AUC"] == pytest.approx(0.4277205586, rel=1e-7)
    # A metric without a wrong answer to be above has no accuracy.
    spec = run_metric(folders("gpt2"), tmp_path / "logit")
    assert "accuracy" not in spec.tables["curve"]
    assert "acc-AUC" not in set(spec.tables["scores"]["name"])


def run_metric(folder: Path, outputs: Path) -> PatchReport:
    pair = {
        "clean": eap_ig.text(eap_ig.CLEAN[0]),
        "corrupted": eap_ig.text(eap_ig.CORRUPTED[0]),
        "answer": "w41",
    }
    return report_of(
        {
            "kind": "patch",
            "name": "logit",
            "model": {"path": str(folder), "dtype": "float64", "prepend_bos": False},
            "data": {"pairs": [pair]},
            "circuit": {"method": "eap", "fractions": [0.0, 1.0]},
            "metric": "logit",
        },
        outputs,
    )
