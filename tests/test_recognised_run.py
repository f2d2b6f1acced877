"""Runs of models outside the table: circuits by the loaded model's anatomy, grids that are kept."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import yaml

from interv.engine.load import anatomy_of
from interv.errors import EngineError
from interv.runner.recognised import anatomy_of_run
from tests import zoo
from tests.conftest import Result
from tests.test_patch import PAIRS

Cli = Callable[..., Result]
CIRCUIT = {"method": "eap", "fractions": [0.0, 0.5, 1.0], "choose": {"share": 1.0}}
PARALLEL = {"stablelm": False, "cohere": True}


def written(tmp_path: Path, name: str, tokenizer: Path, **sections: Any) -> Path:
    config = {**zoo.CONFIGS[name], "vocab_size": 420}
    spec = {
        "kind": "patch",
        "name": name,
        "model": {"config": config, "tokenizer": str(tokenizer), "dtype": "float64"},
        "data": {"pairs": PAIRS[:4], "keep": "all"},
        "grid": {"component": "block_output", "positions": "END"},
        "figures": {"formats": ["svg"], "dpi": 40},
        **sections,
    }
    path = tmp_path / f"{name}.yaml"
    path.write_text(yaml.safe_dump(spec))
    return path


@pytest.mark.parametrize("name", PARALLEL)
def test_a_circuit_of_a_family_outside_the_table(
    name: str, gpt2_folder: Path, cli: Cli, tmp_path: Path
) -> None:
    """The whole circuit is the model; a second call, which loads nothing, tells the same."""
    path = written(tmp_path, name, gpt2_folder, circuit=CIRCUIT)
    first = cli("patch", path, "-o", tmp_path / "outputs")
    assert first.code == 0, first.err
    folder = Path(first.out.strip())
    curve = pd.read_csv(folder / "curve.csv")
    assert curve["mean"].iloc[-1] == pytest.approx(1)
    edges = json.loads((folder / "circuit.json").read_text())["edges"]
    # In a parallel block a head writes nothing that the MLP beside it reads.
    inside = {e["source"].partition(".")[0][1:] == e["target"][1:] for e in edges
              if e["source"].startswith("a") and e["target"].startswith("m")}  # fmt: skip
    assert inside == ({False} if PARALLEL[name] else {True, False})
    told = json.loads((folder / "run.json").read_text())["recognised"]
    assert told["components"]["mlp_output"]["path"] == "mlp"
    before = (folder / "curve.csv").read_bytes()
    again = cli("patch", path, "-o", tmp_path / "outputs")
    assert again.code == 0, again.err
    assert "nothing was left to compute" in again.err
    assert (folder / "curve.csv").read_bytes() == before


def test_components_in_the_journal_are_the_models_own(
    gpt2_folder: Path, cli: Cli, tmp_path: Path
) -> None:
    from interv.plan import make_patch_plan
    from interv.runner.journal import JOURNAL, read
    from interv.spec import load_spec

    path = written(tmp_path, "phi", gpt2_folder, grid={"component": "block_output", "layers": 0})
    folder = Path(cli("patch", path, "-o", tmp_path / "outputs").out.strip())
    journal = read(folder / JOURNAL)
    assert journal is not None
    found = anatomy_of_run(make_patch_plan(load_spec(path, (), kind="patch")), journal).family
    own = anatomy_of(zoo.make("phi")).family
    assert found is not None and own is not None
    assert (found.components, found.layerless) == (own.components, own.layerless)


@pytest.mark.parametrize("name", ["gemma2", "gemma3_text", "olmo2", "bert", "mamba"])
def test_edges_that_are_not_to_be_had_are_told_by_validate(
    name: str, gpt2_folder: Path, cli: Cli, tmp_path: Path
) -> None:
    path = written(tmp_path, name, gpt2_folder, circuit=CIRCUIT)
    outcome = cli("validate", path)
    assert outcome.code == 2
    assert f"{name}.yaml" in outcome.err and "no circuit: " in outcome.err
    words = {"bert": "the residual stream is what a norm gives", "mamba": "have no attention"}
    assert words.get(name, "a norm follows the attention") in outcome.err
    assert "no circuit" not in cli("validate", written(tmp_path, name, gpt2_folder)).err


def test_a_recognised_model_without_edges_is_refused_before_anything_is_computed(
    gpt2_folder: Path, cli: Cli, tmp_path: Path
) -> None:
    path = written(tmp_path, "granite", gpt2_folder, circuit=CIRCUIT)
    outcome = cli("patch", path, "-o", tmp_path / "outputs")
    assert outcome.code == 1
    assert "edges: granite models have no attention_residual, mlp_residual" in outcome.err
    assert not list(tmp_path.rglob("journal.jsonl"))


def test_a_finished_grid_is_kept_where_the_circuit_fails(
    gpt2_folder: Path, cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object) -> None:
        raise EngineError("no edges today")

    path = written(tmp_path, "llama", gpt2_folder, circuit=CIRCUIT)
    with monkeypatch.context() as patched:
        patched.setattr("interv.runner.circuit_runs.CircuitRuns.circuit", fails)
        failed = cli("patch", path, "-o", tmp_path / "outputs")
    assert failed.code == 1
    assert "no edges today" in failed.err and "the grid is done" in failed.err
    [kept] = tmp_path.rglob("results.csv")
    apart = tmp_path / "plain"
    apart.mkdir()
    plain = cli("patch", written(apart, "llama", gpt2_folder), "-o", apart)
    [right] = apart.rglob("results.csv")
    assert plain.code == 0
    values = [pd.read_csv(at)["value"].to_numpy() for at in (kept, right)]
    assert np.allclose(*values, rtol=1e-12)
    after = cli("patch", path, "-o", tmp_path / "outputs")
    assert after.code == 0, after.err
    assert (kept.parent / "curve.csv").is_file()


def test_mpt_s_mlp_is_not_the_stream(gpt2_folder: Path, cli: Cli, tmp_path: Path) -> None:
    """A swap of what its MLP gives, as a plain hook on its down projection makes it."""
    import transformers

    from tests.conftest import save_tokenizer

    config = transformers.AutoConfig.for_model(
        "mpt", d_model=48, n_heads=4, n_layers=2, max_seq_len=64, vocab_size=420
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(config).eval()
        for parameter in model.parameters():
            if parameter.dim() > 1:
                torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(tmp_path / "mpt")
    save_tokenizer(tmp_path / "mpt")
    path = written(
        tmp_path, "llama", gpt2_folder,
        model={"path": str(tmp_path / "mpt")},
        data={"pairs": PAIRS[:1], "keep": "all"},
        grid={"component": ["block_output", "mlp_output"], "positions": [2]},
        metric="logit",
    )  # fmt: skip
    outcome = cli("patch", path, "-o", tmp_path / "outputs")
    assert outcome.code == 0, outcome.err
    results = pd.read_csv(Path(outcome.out.strip()) / "results.csv")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "mpt")
    clean, corrupted, answer = (
        tokenizer(text, add_special_tokens=False)["input_ids"]
        for text in (PAIRS[0]["clean"], PAIRS[0]["corrupted"], f" {PAIRS[0]['answer']}")
    )
    down = model.transformer.blocks[0].ffn.down_proj
    seen: list[torch.Tensor] = []
    with torch.no_grad():
        handle = down.register_forward_hook(lambda _m, _a, output: seen.append(output))
        model(torch.tensor([clean]))
        handle.remove()

        def swap(_m: object, _a: object, output: torch.Tensor) -> torch.Tensor:
            return torch.cat([output[:, :2], seen[0][:, 2:3], output[:, 3:]], 1)

        handle = down.register_forward_hook(swap)
        right = float(model(torch.tensor([corrupted])).logits[0, -1, answer[0]])
        handle.remove()
    first = results[results["layer"] == 0].set_index("component")["value"]
    assert first["mlp_output"] == pytest.approx(right, abs=1e-5)
    assert abs(first["block_output"] - right) > 1e-3
