"""Prompts longer than a model was trained on, under scaled rotary embeddings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from interv.errors import SpecError
from interv.plan import PatchPlan, make_patch_plan
from interv.report.patch_tables import results_table
from interv.runner.patch_steps import PATCH
from interv.runner.sweep import run_sweep
from interv.spec import load_spec
from tests.conftest import save_tokenizer, tiny_config

LONG = "The Space Needle is in the downtown of the Old Bridge in the city of Paris in"
OTHER = LONG.replace("Space Needle", "Eiffel Tower")


def saved(folder: Path, scaling: dict[str, Any]) -> Path:
    fields = {**tiny_config("llama"), "max_position_embeddings": 16}
    config = transformers.LlamaConfig(
        **{k: v for k, v in fields.items() if k != "model_type"},
        rope_parameters={"rope_theta": 10000.0, **scaling},
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(config)
        for parameter in model.parameters():
            if parameter.dim() > 1:
                torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder)
    save_tokenizer(folder)
    return folder


def planned(folder: Path, *pairs: tuple[str, str], executor: str = "suffix") -> PatchPlan:
    spec = {
        "kind": "patch",
        "name": "test",
        "model": {"path": str(folder), "dtype": "float64"},
        "data": {
            "pairs": [
                {"clean": a, "corrupted": b, "answer": "Rome", "wrong": "Paris"} for a, b in pairs
            ]
        },
        "grid": {"component": "block_output", "positions": [2, -1]},
        "run": {"executor": executor},
    }
    return make_patch_plan(load_spec(spec, (), kind="patch"))


@pytest.mark.parametrize("executor", ["suffix", "reference"])
@pytest.mark.parametrize(
    "scaling",
    [
        {"rope_type": "linear", "factor": 4.0},
        {"rope_type": "dynamic", "factor": 4.0},
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
    ],
    ids=lambda scaling: str(scaling["rope_type"]),
)
def test_beyond_the_stated_length_values_are_transformers_own(
    scaling: dict[str, Any], executor: str, tmp_path: Path
) -> None:
    folder = saved(tmp_path / "model", scaling)
    plan = planned(folder, (LONG, OTHER), executor=executor)
    pair = plan.pairs[0]
    assert 16 < len(pair.ids) <= 64
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()
    corrupted, clean = list(pair.corrupted_ids or ()), list(pair.ids)
    (tmp_path / "run").mkdir()
    outcome = run_sweep(plan, PATCH, tmp_path / "run", lambda *_: None, adopt=False)
    rows = results_table(plan, outcome.journal).to_dict("records")
    assert len(rows) == 6
    right, wrong = pair.answer_ids[0][0], pair.wrong_ids[0][0]
    for row in rows:
        at = int(row["pos"])
        with torch.no_grad():
            states = model(torch.tensor([clean]), output_hidden_states=True).hidden_states
        state = states[row["layer"] + 1][0, at]

        def put(_module: Any, _inputs: Any, output: Any, at: int = at, state: Any = state) -> Any:
            whole = output[0] if isinstance(output, tuple) else output
            whole = whole.clone()
            whole[0, at] = state
            return (whole, *output[1:]) if isinstance(output, tuple) else whole

        if row["layer"] < 2:  # the last hidden state of transformers is behind the norm
            hook = model.model.layers[row["layer"]].register_forward_hook(put)
            with torch.no_grad():
                logits = model(torch.tensor([corrupted])).logits[0, -1]
            hook.remove()
            expected = float(logits[right] - logits[wrong])
            assert row["value"] == pytest.approx(expected, abs=1e-9)


def test_runs_that_would_change_each_others_angles_are_refused(tmp_path: Path) -> None:
    folder = saved(tmp_path / "model", {"rope_type": "dynamic", "factor": 4.0})
    shorter = ("The Space Needle is in", "The Eiffel Tower is in")
    with pytest.raises(SpecError, match="beyond 16 the model's dynamic RoPE scaling depends on"):
        planned(folder, (LONG, OTHER), shorter)
    assert len(planned(folder, shorter).pairs) == 1
    too_long = " ".join([LONG] * 4)
    with pytest.raises(SpecError, match="at most 64, the model's"):
        planned(folder, (too_long, too_long.replace("Space Needle", "Eiffel Tower")))
