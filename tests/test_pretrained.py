"""Checkpoints as the hub has them: loaded whole, or refused by the names of what is left over."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from interv.engine.load import load_model
from interv.errors import ModelError
from interv.models import locate
from interv.spec.schema import ModelSection
from tests import zoo
from tests.hub_checkpoints import AS_ON_THE_HUB, State

WEIGHTS = "model.safetensors"


def load(folder: Path) -> torch.nn.Module:
    section = ModelSection(path=str(folder), dtype="float64")
    return load_model(locate(section, 0), section, 0, "cpu").module


def save(
    name: str, folder: Path, change: Callable[[State], State] | None = None
) -> torch.nn.Module:
    """Save a family's model with transformers, its weights changed as asked."""
    model = zoo.make(name)
    assert isinstance(model, transformers.PreTrainedModel)
    model.save_pretrained(folder)
    if change is not None:
        state = change(load_file(folder / WEIGHTS))
        save_file(state, folder / WEIGHTS, metadata={"format": "pt"})
    return model


@pytest.mark.parametrize("name", zoo.CONFIGS)
def test_a_checkpoint_as_on_the_hub_gives_the_logits_of(name: str, tmp_path: Path) -> None:
    model = save(name, tmp_path, AS_ON_THE_HUB.get(name))
    inputs = zoo.inputs(name)
    with torch.no_grad():
        expected, found = model(**inputs).logits, load(tmp_path)(**inputs).logits
    assert torch.allclose(found, expected, rtol=0, atol=1e-6 * float(expected.abs().max()))


@pytest.mark.parametrize("name", ["gpt2", "gpt_neo", "bert", "blip", "stablelm"])
def test_a_weight_that_is_not_used_is_an_error_in(name: str, tmp_path: Path) -> None:
    def foreign(state: State) -> State:
        return AS_ON_THE_HUB[name](state) | {"score.weight": torch.ones(2, 48)}

    save(name, tmp_path, foreign)
    with pytest.raises(ModelError, match=r"1 weights .* no place for: score\.weight"):
        load(tmp_path)


def test_a_weight_of_a_pickle_that_is_not_used_is_an_error(tmp_path: Path) -> None:
    save("llama", tmp_path)
    state = load_file(tmp_path / WEIGHTS) | {"score.weight": torch.ones(2, 48)}
    (tmp_path / WEIGHTS).unlink()
    torch.save(state, tmp_path / "pytorch_model.bin")
    with pytest.raises(ModelError, match=r"1 weights .* no place for: score\.weight"):
        load(tmp_path)


def test_a_weight_of_another_shape_is_an_error(tmp_path: Path) -> None:
    save("llama", tmp_path, lambda state: state | {"model.norm.weight": torch.ones(47)})
    with pytest.raises(ModelError, match=r"1 weights are missing or misshapen: .*model\.norm"):
        load(tmp_path)


def test_a_mask_is_left_out_only_where_the_type_has_one(tmp_path: Path) -> None:
    """A `bias` right below a module named attention is a mask in GPT-2, a weight elsewhere."""
    save("llama", tmp_path, lambda state: state | {"model.layers.0.attn.bias": torch.ones(48)})
    with pytest.raises(ModelError, match=r"no place for: model\.layers\.0\.attn\.bias"):
        load(tmp_path)
