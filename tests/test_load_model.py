from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from interv.engine import Edit, ReferenceExecutor, Run, Site, SuffixExecutor, Vanilla, Zero
from interv.engine.load import LoadedModel, load_model
from interv.errors import ModelError
from interv.models import locate
from interv.spec.schema import ModelSection
from tests import zoo
from tests.conftest import tiny_config


def load(value: object, device: str = "cpu", seed: int = 0):
    section = ModelSection.model_validate(value)
    return load_model(locate(section, seed), section, seed, device)


def weights(model: LoadedModel) -> Tensor:
    """The word embeddings."""
    weight: Tensor = model.module.get_input_embeddings().weight  # type: ignore[operator,union-attr]
    return weight


def test_weights_are_frozen_in_evaluation_mode_and_in_float32(gpt2_folder: Path) -> None:
    model = load({"path": str(gpt2_folder)})
    assert not model.module.training
    assert all(not p.requires_grad and p.dtype == torch.float32 for p in model.module.parameters())
    assert weights(model).shape == (420, 24)
    assert model.attn_implementation == "sdpa"


def test_a_random_model_depends_on_the_seed_alone() -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    one = weights(load({"config": tiny_config("llama")}))
    assert torch.equal(torch.get_rng_state(), before), "the user's random state was moved"
    torch.manual_seed(6)
    assert torch.equal(one, weights(load({"config": tiny_config("llama")})))
    assert not torch.equal(one, weights(load({"config": tiny_config("llama")}, seed=1)))


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
    state = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(state, folder / "pytorch_model.bin")
    model = load({"path": str(folder)})
    assert torch.equal(weights(model), weights(load({"path": str(gpt2_folder)})))


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


def executors(value: object) -> list[ReferenceExecutor | SuffixExecutor]:
    model = load(value)
    return [kind(model.module, model.anatomy) for kind in (ReferenceExecutor, SuffixExecutor)]


@pytest.mark.parametrize("kind", ["bert", "roberta", "esm"])
def test_an_encoder_is_loaded_as_a_masked_language_model(kind: str) -> None:
    value = {"config": zoo.CONFIGS[kind], "dtype": "float64"}
    model = load(value)
    assert type(model.module).__name__.endswith("ForMaskedLM")
    assert model.anatomy.reach == "layers"
    ids = tuple(zoo.ids())
    run = Run(ids, (Edit(Site("mlp_output", 1, (4,)), Zero()),))
    one, other = (executor.logits([run, Run(ids)], None) for executor in executors(value))
    assert torch.allclose(one, other, rtol=0, atol=1e-12)
    # What stands before the site looks at it too.
    assert (one[0] - one[1]).abs().amax(1).min() > 1e-8


@pytest.mark.parametrize("kind", zoo.EXPERTS)
def test_experts_run_in_float64(kind: str) -> None:
    value = {"config": zoo.CONFIGS[kind], "dtype": "float64"}
    ids, other = tuple(zoo.ids()), tuple(zoo.ids(1))
    run = Run(ids, (Edit(Site("mlp_output", 1, (4,)), Vanilla(), Run(other)),))
    one, two = (executor.logits([run, Run(ids)], None) for executor in executors(value))
    assert one.dtype == torch.float64
    assert torch.allclose(one, two, rtol=0, atol=1e-10)
    assert (one[0] - one[1]).abs().max() > 1e-8


@pytest.mark.parametrize("kind", zoo.RECOGNISED)
def test_a_type_that_is_not_in_the_table_is_recognised(kind: str) -> None:
    value = {"config": zoo.CONFIGS[kind]}
    section = ModelSection.model_validate(value)
    facts = locate(section, 0).facts
    assert facts is not None and facts.family is None
    anatomy = load(value).anatomy
    assert anatomy.family is not None and anatomy.family.name == kind
    wanted = {"block_output", "mlp_output", "attention_output", "head_key_output", "logits"}
    assert wanted <= set(anatomy.components)
    assert anatomy.n_units("head_key_output") == 2


def test_a_type_that_nobody_knows_is_an_error() -> None:
    config = {**tiny_config("gpt2"), "model_type": "mystery"}
    with pytest.raises(ModelError, match=r"cannot be loaded: .*mystery"):
        load({"config": config})


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_kv_heads": 2}, "n_kv_heads 2, the model has 4"),
        ({"n_head": 8}, None),
        ({"head_dim": 12}, None),
        ({"n_inner": 48}, None),
    ],
)
def test_heads_that_are_not_the_models_are_an_error(
    fields: dict[str, object], message: str | None
) -> None:
    """A plan made for other heads would intervene on other columns. Of two names of a field the
    one that transformers reads counts, and its own fields are not mistaken for foreign ones."""
    config = {**tiny_config("llama"), **fields}
    if "num_kv_heads" in fields:
        del config["num_key_value_heads"]
    if message is None:
        load({"config": config})
        return
    with pytest.raises(ModelError, match=message):
        load({"config": config})
