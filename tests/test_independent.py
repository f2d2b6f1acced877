"""The CSVs of configs/default_model are what the scripts of tests/independent compute: some cells.

And the pairs that both sides of `ioi_das` use are those that its spec makes.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

import interv
from interv.plan import TrainPlan
from tests.conftest import CONFIGS
from tests.independent import (
    ioi_activation_patching,
    ioi_circuit,
    ioi_das,
    ioi_figure3b,
    rome_figure1,
    rome_figure2,
    rome_figure3,
)
from tests.independent.__main__ import NAMES
from tests.independent.model import FOLDER, Row, read, run

pytestmark = pytest.mark.model


def same(table: str, computed: Sequence[Row], tolerance: float) -> None:
    """That the CSV has these rows; 9 digits of it are written."""
    written = {
        tuple(text for name, text in row.items() if name != "value"): float(row["value"])
        for row in read(table)
    }
    assert computed
    for row in computed:
        where = tuple(str(v) for name, v in row.items() if name != "value")
        assert written[where] == pytest.approx(row["value"], abs=tolerance), (table, where)


def test_each_has_a_spec_and_a_csv() -> None:
    for name in NAMES:
        assert (FOLDER / f"{name}.yaml").is_file() and read(name)


def test_nothing_imports_interv() -> None:
    for path in (Path(__file__).parent / "independent").glob("*.py"):
        text = path.read_text("utf-8")
        assert "import interv" not in text and "from interv" not in text


def test_rome_figure1() -> None:
    same("rome_figure1", rome_figure1.cells([23]), 1e-4)
    same("rome_figure1_baselines", rome_figure1.baselines(), 1e-4)


def test_rome_figure2() -> None:
    values, effects = rome_figure2.cells([18], ["block_output"])
    same("rome_figure2", values, 1e-4)
    same("rome_figure2_effects", effects, 1e-4)


def test_rome_figure3() -> None:
    same("rome_figure3", rome_figure3.cells([6]), 1e-4)


def test_activation_patching() -> None:
    same("ioi_activation_patching", ioi_activation_patching.cells([18]), 1e-3)


@torch.no_grad()
def test_pyvene_and_plain_hooks_agree() -> None:
    roles = ["S2", "END"]
    for component in ioi_activation_patching.COMPONENTS:
        theirs = ioi_activation_patching.by_pyvene(component, 20, roles)
        ours = [ioi_activation_patching.by_hooks(component, 20, role) for role in roles]
        assert ours == pytest.approx(theirs, abs=1e-4)


def test_figure3b() -> None:
    same("ioi_figure3b", ioi_figure3b.cells([(0, 0), (23, 3), (24, 4), (29, 8)]), 1e-3)


def test_das_pairs_are_those_of_the_spec() -> None:
    plan = interv.load(CONFIGS / "default_model" / "ioi_das.yaml")
    assert isinstance(plan, TrainPlan)
    lines = (FOLDER / "ioi_das_pairs.jsonl").read_text("utf-8").splitlines()
    written = [tuple(json.loads(line).values()) for line in lines]
    made = [(e.split, e.base.text, e.sources[0].text, e.label.strip()) for e in plan.exchanges]
    assert written == made


def test_das() -> None:
    # Of 79 pairs that are kept one may stand on the edge.
    same("ioi_das", ioi_das.cells(ioi_das.SPOTS[:1]), 0.013)
    with (FOLDER / "ioi_das_seeds.csv").open(encoding="utf-8", newline="") as file:
        found = list(csv.DictReader(file))
    assert len(found) == len(ioi_das.SPOTS) * len(ioi_das.SEEDS)


def test_circuit() -> None:
    same("ioi_circuit_edges", ioi_circuit.edges()[:10], 1e-3)
    n = ioi_circuit.size_of(0.01)
    kept = ioi_circuit.connected(ioi_circuit.top(n, "signed"))
    value = ioi_circuit.faithfulness(ioi_circuit.circuit(kept))
    # At the edge of the size two scores that are nearly equal may change places.
    same("ioi_circuit", [{"ranking": "signed", "units": n, "value": value}], 5e-3)


@torch.no_grad()
def test_the_forward_by_hand_is_the_model() -> None:
    ids = ioi_circuit.pairs().clean
    by_hand = ioi_circuit.forward(ids, ioi_circuit.as_it_is, [])
    torch.testing.assert_close(by_hand, run(ids)[0], atol=5e-4, rtol=0)


def test_all_edges_and_none() -> None:
    clean, corrupted = ioi_circuit.ends()
    everything = ioi_circuit.exists()
    assert float(ioi_circuit.circuit(everything).mean()) == pytest.approx(clean, abs=1e-4)
    assert float(ioi_circuit.circuit(~everything).mean()) == pytest.approx(corrupted, abs=1e-4)


def test_what_is_not_on_a_way_is_not_connected() -> None:
    senders, receivers = ioi_circuit.SENDERS.index, ioi_circuit.RECEIVERS.index
    on_a_way = [("input", "a3.h1.v"), ("a3.h1", "m4"), ("m4", "logits"), ("input", "logits")]
    loose = [("input", "a5.h0.q"), ("a2.h0", "m7"), ("m7", "a8.h8.k"), ("a9.h0", "logits")]
    kept = torch.zeros_like(ioi_circuit.exists())
    for sender, receiver in (*on_a_way, *loose):
        kept[senders(sender), receivers(receiver)] = True
    found = ioi_circuit.connected(kept).nonzero().tolist()
    expected = [[senders(sender), receivers(receiver)] for sender, receiver in on_a_way]
    assert sorted(found) == sorted(expected)
