"""`interv train-das` on small networks: what it finds, its errors, and runs that are killed."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
import yaml

from interv.engine.rotations import Rotation
from interv.keep import read
from interv.runner.train import from_bits, to_bits
from tests.conftest import Result

EQUALITY = {
    "variables": {
        "w": {"vector": 2},
        "x": {"vector": 2, "equal": "w"},
        "y": {"vector": 2},
        "z": {"vector": 2, "equal": "y"},
        "WX": "w == x",
        "YZ": "y == z",
        "O": "WX == YZ",
    },
    "output": "O",
}
SPEC: dict[str, Any] = {
    "kind": "train-das",
    "name": "das",
    "model": {"kind": "mlp", "weights": "equality"},
    "causal_model": EQUALITY,
    "variables": ["WX", "YZ"],
    "data": {"train": 1000, "validation": 100, "test": 200},
    "intervention": {"type": "rotated_space", "rank": 4},
    "grid": {"component": "block_output", "layers": 0},
    "train": {"epochs": 2, "batch": 100, "lr": 0.01},
    "figures": {"formats": ["png"], "dpi": 40},
    "run": {"threads": 1},
}


def write(folder: Path, **sections: Any) -> Path:
    """A spec with some sections of its own; None: without that section."""
    path = folder / "das.yaml"
    given = {key: value for key, value in {**SPEC, **sections}.items() if value is not None}
    path.write_text(yaml.safe_dump(given, sort_keys=False))
    return path


def run_of(result: Result) -> Path:
    assert result.code == 0, result.err
    return Path(result.out.strip().splitlines()[-1])


def units(first: str, second: str) -> list[dict[str, Any]]:
    site = {"component": "block_output", "layer": 0}
    return [
        {**site, "dims": first, "variable": "WX"},
        {**site, "dims": second, "variable": "YZ"},
    ]


def test_the_hand_set_network_has_each_variable_where_it_was_put(
    tmp_path: Path, cli: Callable[..., Result]
) -> None:
    grid = [
        {"name": "right", "set": units("0-3", "4-7")},
        {"name": "swapped", "set": units("4-7", "0-3")},
    ]
    path = write(tmp_path, intervention="vanilla", grid=grid, train=None)
    folder = run_of(cli("train-das", path, "-o", tmp_path / "out", "-q"))
    summary = pd.read_csv(folder / "summary.csv", keep_default_na=False)
    iia = summary[summary["metric"] == "iia"].set_index(["set", "exchanged"])["mean"]
    assert list(iia["right"]) == [1.0] * 4
    # By hand: exchanging the other units exchanges the other variable, so that the answer is that
    # of the base with the other equality of the source.
    from interv.plan import make_train_plan
    from interv.plan.train import vectors_of
    from interv.spec import load_spec

    pairs = vectors_of(make_train_plan(load_spec(path)), "test")
    answer = {}
    for i in range(len(pairs)):
        wx, yz = bool(pairs.base["WX"][i]), bool(pairs.base["YZ"][i])
        if pairs.exchanged[i, 0]:
            yz = bool(pairs.sources[0]["YZ"][i])
        if pairs.exchanged[i, 1]:
            wx = bool(pairs.sources[1]["WX"][i])
        answer[i] = (wx == yz) == bool(pairs.label[i])
    assert iia["swapped", "any"] == pytest.approx(sum(answer.values()) / len(answer), abs=1e-12)
    assert 0 < sum(answer.values()) < len(answer)


TYPES = [
    "rotated_space",
    "low_rank_rotated_space",
    "boundless_rotated_space",
    "sigmoid_mask",
    "sigmoid_mask_rotated_space",
    "pca_rotated_space",
    "autoencoder",
    "lora",
]


def test_every_type_is_trained_and_kept(tmp_path: Path, cli: Callable[..., Result]) -> None:
    path = write(tmp_path, intervention={"type": TYPES, "rank": [1, 4]})
    folder = run_of(cli("train-das", path, "-o", tmp_path / "out", "-q"))
    results = pd.read_csv(folder / "results.csv")
    assert set(results["type"]) == set(TYPES)
    ranked = results[results["rank"].notna()]["type"].unique()
    assert set(ranked) == {"rotated_space", "low_rank_rotated_space", "pca_rotated_space", "lora"}
    fits = list(folder.glob("fits/*/intervention.json"))
    assert len(fits) == 12
    for fit in fits:
        trained = read(fit.parent)
        assert [part.variable for part in trained.parts] == ["WX", "YZ"]
        for part in trained.parts:
            for module in part.intervention.modules().values():
                if isinstance(module, Rotation):
                    basis = module().detach().double()
                    eye = torch.eye(basis.shape[1], dtype=torch.float64)
                    assert float((basis.T @ basis - eye).abs().max()) < 1e-5
    assert not list(folder.glob("fits/*.checkpoint"))
    assert (folder / "figures" / "learning_curves.png").is_file()
    assert (folder / "figures" / "iia.csv").is_file() or len(results) > 20


def test_training_finds_the_variables(tmp_path: Path, cli: Callable[..., Result]) -> None:
    reference = [
        {
            "claim": "found",
            "table": "results",
            "reduce": "max",
            "between": [0.7, 1],
            "source": "this test",
        },
        {
            "claim": "by chance it is not",
            "where": {"metric": "iia_random"},
            "between": [0.3, 0.62],
            "source": "this test",
        },
    ]
    path = write(
        tmp_path,
        model={
            "kind": "mlp",
            "hidden": [16, 16],
            "train": {"examples": 262144, "batch": 512, "min_accuracy": 0.9},
        },
        intervention={"type": "rotated_space", "rank": 8},
        data={"train": 60000, "validation": 200, "test": 500},
        train={"epochs": 3, "batch": 300, "lr": 0.02},
        controls={"shuffled": False},
        reference=reference,
    )
    done = cli("train-das", path, "-o", tmp_path / "out", "--json", "-q")
    assert done.code == 0, done.err + done.out
    told = json.loads(done.out)
    assert [verdict["holds"] for verdict in told["reference"]] == [True, True]
    folder = Path(told["folder"])
    again = cli("train-das", path, "-o", tmp_path / "out")
    assert "nothing was left to compute" in again.err
    reference[0]["between"] = [1.1, 1.2]
    path = write(tmp_path, **{**yaml.safe_load(path.read_text()), "reference": reference})
    assert cli("train-das", path, "-o", tmp_path / "out").code == 1
    kept = cli("save", folder, tmp_path / "kept")
    assert kept.code == 0, kept.err
    assert "block_output 0" in cli("load", tmp_path / "kept").out
    assert "train-das" in (tmp_path / "kept" / "README.md").read_text()
    assert cli("save", folder, tmp_path / "kept").code == 2
    assert cli("save", tmp_path, tmp_path / "kept2").code == 2


def test_a_model_is_trained_under_interchanges(tmp_path: Path, cli: Callable[..., Result]) -> None:
    path = write(
        tmp_path,
        model={"kind": "mlp", "hidden": [16, 16], "weights": "random"},
        data={
            "train": 20000, "validation": 200, "test": 1000, "keep": "all", "min_accuracy": 0,
            "mixture": {"WX": 1, "YZ": 1},
        },
        intervention="vanilla",
        grid={"name": "units", "set": units("0-3", "4-7")},
        train={"what": "model", "epochs": 15, "batch": 200, "lr": 0.01, "task_weight": 1},
    )  # fmt: skip
    folder = run_of(cli("train-das", path, "-o", tmp_path / "out", "-q"))
    results = pd.read_csv(folder / "results.csv").set_index(["metric", "exchanged"])["value"]
    assert results["task_accuracy", "any"] > 0.95
    assert results["iia", "WX"] > 0.9
    assert results["iia", "YZ"] > 0.9
    assert list(folder.glob("fits/*/model.safetensors"))


@pytest.mark.parametrize(
    ("changes", "code", "message"),
    [
        ({"causal_model": "ioi", "variables": ["positoin"]}, 2, "did you mean 'position'"),
        ({"intervention": {"type": "rotated_space", "rank": 5}}, 2, "at most 8, the width"),
        ({"grid": {"component": "block_otput"}}, 2, "did you mean 'block_output'"),
        ({"grid": {"component": "block_output", "layers": 7}}, 2, "the model has 2 layers"),
        ({"variables": ["WX"], "data": {"mixture": {"YZ": 1}}}, 2, "YZ"),
        ({"grid": {"set": units("0-3", "4-7")}}, 2, "without a name"),
        ({"train": {"what": "model"}}, 2, "intervention: vanilla"),
        ({"train": {"lr": 1e30}, "intervention": "autoencoder"}, 1, "the loss is"),
    ],
)
def test_mistakes_are_named(
    changes: dict[str, Any],
    code: int,
    message: str,
    tmp_path: Path,
    cli: Callable[..., Result],
) -> None:
    done = cli("train-das", write(tmp_path, **changes), "-o", tmp_path / "out", "-q")
    assert done.code == code, done.out
    assert message in done.err
    assert "Traceback" not in done.err


def test_a_model_that_cannot_do_the_task(tmp_path: Path, cli: Callable[..., Result]) -> None:
    model = {"kind": "mlp", "hidden": [8, 8], "weights": "random"}
    path = write(tmp_path, model=model, data={"min_accuracy": 0.9, "train": 500})
    done = cli("train-das", path, "-o", tmp_path / "out", "-q")
    assert done.code == 1
    assert "below data.min_accuracy 90%" in done.err
    assert "%" in done.err.partition("below")[0]


def test_no_label_changes(tmp_path: Path, cli: Callable[..., Result]) -> None:
    causal = {**EQUALITY, "variables": {**EQUALITY["variables"], "other": "w == y"}}  # type: ignore[dict-item]
    path = write(tmp_path, causal_model=causal, variables=["other"], data={"changed": 1})
    done = cli("train-das", path, "-o", tmp_path / "out", "-q")
    assert done.code == 2
    assert "no counterfactual pair whose label changes" in done.err


def test_killed_and_started_again(tmp_path: Path, environment: dict[str, str]) -> None:
    path = write(
        tmp_path,
        data={"train": 6000, "validation": 100, "test": 200},
        train={"epochs": 6, "batch": 50, "lr": 0.01, "seeds": [0, 1], "keep": "best"},
    )

    def start(outputs: Path) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-m", "interv", "train-das", str(path), "-o", str(outputs), "-q"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
        )

    whole = start(tmp_path / "whole")
    _, err = whole.communicate()
    assert whole.returncode == 0, err
    outputs = tmp_path / "killed"
    seen: set[str] = set()
    for _ in range(3):
        process = start(outputs)
        while process.poll() is None:
            # In the middle of a fit: after an epoch of one that had no checkpoint before.
            fresh = {p.name for p in outputs.glob("*/*/fits/*.checkpoint")} - seen
            if fresh:
                seen |= fresh
                break
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        process.communicate()
    assert seen
    last = start(outputs)
    _, err = last.communicate()
    assert last.returncode == 0, err
    for name in ("results.csv", "summary.csv", "curve.csv"):
        [one], [other] = (list((tmp_path / d).glob(f"*/*/{name}")) for d in ("whole", "killed"))
        assert one.read_bytes() == other.read_bytes(), name


def test_bits_come_back() -> None:
    bits = torch.tensor([False, True, True, False, False])
    assert from_bits(to_bits(bits)).tolist() == bits.tolist()
    assert from_bits(to_bits(bits[:1])).tolist() == [False]


def test_fits_are_not_timed(cli: Callable[..., Result], tmp_path: Path) -> None:
    result = cli("plan", write(tmp_path), "--measure")
    assert result.code == 2
    assert "--measure times points" in result.err
