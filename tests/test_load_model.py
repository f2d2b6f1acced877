from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from interv.engine.load import load_model, token_embeddings
from interv.errors import ModelError
from interv.models import locate
from interv.spec.schema import ModelSection
from tests.conftest import tiny_config


def load(value: object, device: str = "cpu", seed: int = 0):
    section = ModelSection.model_validate(value)
    return load_model(locate(section, seed), section, seed, device)


def test_weights_are_frozen_in_evaluation_mode_and_in_float32(gpt2_folder: Path) -> None:
    model = load({"path": str(gpt2_folder)})
    assert not model.module.training
    assert all(not p.requires_grad and p.dtype == torch.float32 for p in model.module.parameters())
    assert token_embeddings(model).shape == (420, 24)
    assert model.attn_implementation == "sdpa"


def test_a_random_model_depends_on_the_seed_alone() -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    one = token_embeddings(load({"config": tiny_config("llama")}))
    assert torch.equal(torch.get_rng_state(), before), "the user's random state was moved"
    torch.manual_seed(6)
    assert torch.equal(one, token_embeddings(load({"config": tiny_config("llama")})))
    assert not torch.equal(one, token_embeddings(load({"config": tiny_config("llama")}, seed=1)))


def test_weights_that_do_not_fill_the_model_are_an_error(gpt2_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(gpt2_folder, folder)
    weights = load_file(folder / "model.safetensors")
    weights.pop("transformer.h.1.mlp.c_fc.weight")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"1 weights are missing.*h\.1\.mlp\.c_fc\.weight"):
        load({"path": str(folder)})


def test_a_config_that_cuts_the_model_short_is_an_error(gpt2_folder: Path, tmp_path: Path) -> None:
    import json

    folder = tmp_path / "model"
    shutil.copytree(gpt2_folder, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "n_layer": 2}))
    with pytest.raises(ModelError, match=r"no place for: transformer\.h\.2"):
        load({"path": str(folder)})


def test_a_config_under_other_names_is_an_error() -> None:
    config = {**tiny_config("gpt2"), "n_layers": 3}
    del config["n_layer"]
    with pytest.raises(ModelError, match="n_layers 3, the model has 12"):
        load({"config": config})


@pytest.mark.parametrize("damage", [{"activation_function": "nope"}, {"resid_pdrop": "x"}])
def test_a_config_that_is_wrong_in_any_way_is_an_error(damage: dict[str, object]) -> None:
    with pytest.raises(ModelError, match="cannot be loaded"):
        load({"config": {**tiny_config("gpt2"), **damage}})


def test_damaged_weights_are_an_error(gpt2_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(gpt2_folder, folder)
    files = locate(ModelSection(path=str(folder)), 0)
    (folder / "model.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0{}      ")
    with pytest.raises(ModelError, match=r"missing|cannot be loaded"):
        load_model(files, ModelSection(path=str(folder)), 0, "cpu")


def test_a_pickle_with_code_in_it_is_refused(gpt2_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(gpt2_folder, folder)
    (folder / "model.safetensors").unlink()
    marker = tmp_path / "ran"

    class Evil:
        def __reduce__(self) -> tuple[object, ...]:
            return (Path.touch, (marker,))

    torch.save({"transformer.wte.weight": Evil()}, folder / "pytorch_model.bin")
    with pytest.raises(ModelError, match="hold more than tensors"):
        load({"path": str(folder)})
    assert not marker.exists(), "code in the pickle ran"


def test_a_pickle_of_plain_weights_is_read(gpt2_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(gpt2_folder, folder)
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(weights, folder / "pytorch_model.bin")
    model = load({"path": str(folder)})
    assert torch.equal(token_embeddings(model), token_embeddings(load({"path": str(gpt2_folder)})))


def test_code_in_a_models_folder_is_not_run(gpt2_folder: Path, tmp_path: Path) -> None:
    import json

    folder = tmp_path / "model"
    shutil.copytree(gpt2_folder, folder)
    marker = tmp_path / "ran"
    (folder / "modeling_evil.py").write_text(f"open({str(marker)!r}, 'w')\nclass Evil: pass\n")
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {"AutoModelForCausalLM": "modeling_evil.Evil"}
    (folder / "config.json").write_text(json.dumps(config))
    load({"path": str(folder)})
    assert not marker.exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
def test_a_device_that_is_not_there_is_an_error(gpt2_folder: Path) -> None:
    with pytest.raises(ModelError, match=r"run\.device: cuda"):
        load({"path": str(gpt2_folder)}, device="cuda")


def test_an_attention_that_cannot_be_had_is_an_error(gpt2_folder: Path) -> None:
    with pytest.raises(ModelError, match="cannot be loaded"):
        load({"path": str(gpt2_folder), "attn_implementation": "flash_attention_2"})
