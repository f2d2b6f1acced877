"""Which files of a folder decide what is loaded, and what kind of model a config describes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from interv.engine.load import load_model
from interv.errors import ModelError
from interv.models import ModelFiles, locate
from interv.models.checkpoint import check_kind
from interv.spec.schema import ModelSection
from tests.conftest import Result, SpecWriter, tiny_config


@pytest.fixture
def folder(gpt2_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(gpt2_folder, tmp_path / "model"))


def found(folder: Path) -> ModelFiles:
    return locate(ModelSection(path=str(folder)), 0)


def edit(folder: Path, **fields: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def scaled(folder: Path, name: str, factor: float) -> dict[str, torch.Tensor]:
    """Save the folder's weights, scaled, under another name."""
    state = {k: factor * v for k, v in load_file(folder / "model.safetensors").items()}
    if name.endswith(".bin"):
        torch.save(state, folder / name)
    else:
        save_file(state, folder / name, metadata={"format": "pt"})
    return state


def shards(folder: Path, stem: str, factor: float) -> None:
    """Save the folder's weights, scaled, as two shards with an index."""
    state = scaled(folder, "whole.safetensors", factor)
    (folder / "whole.safetensors").unlink()
    suffix = "bin" if stem == "pytorch_model" else "safetensors"
    names = {key: f"{stem}-{i % 2 + 1:05}-of-00002.{suffix}" for i, key in enumerate(sorted(state))}
    for name in set(names.values()):
        part = {key: state[key] for key in state if names[key] == name}
        if suffix == "bin":
            torch.save(part, folder / name)
        else:
            save_file(part, folder / name, metadata={"format": "pt"})
    index = {"metadata": {"total_size": 1}, "weight_map": names}
    (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps(index))


def embedding(model: torch.nn.Module) -> torch.Tensor:
    weight = model.get_submodule("transformer.wte").weight
    assert isinstance(weight, torch.Tensor)
    return weight


def test_the_weights_are_those_that_transformers_reads(folder: Path) -> None:
    """From the last in transformers' order to the first, each hiding those before it."""
    section = ModelSection(path=str(folder))
    original = load_file(folder / "model.safetensors")
    steps: list[tuple[str, Callable[[], object]]] = [
        ("pytorch_model.bin.index.json", lambda: shards(folder, "pytorch_model", 2.0)),
        ("pytorch_model.bin", lambda: scaled(folder, "pytorch_model.bin", 3.0)),
        ("model.safetensors.index.json", lambda: shards(folder, "model", 4.0)),
        ("model.safetensors", lambda: None),
    ]
    for _, make in steps:
        make()
    seen: list[float] = []
    identities = set()
    for name, _ in reversed(steps):
        files = found(folder)
        assert files.weights is not None and files.weights.every[0].name == name
        identities.add(files.identity)
        ours = embedding(load_model(files, section, 0, "cpu").module)
        theirs = embedding(transformers.AutoModelForCausalLM.from_pretrained(folder))
        assert torch.equal(ours, theirs)
        seen.append(float((ours / original["transformer.wte.weight"]).mean()))
        (folder / name).unlink()
    assert seen == pytest.approx([1, 4, 3, 2])
    assert len(identities) == 4
    assert [a.split(":")[0] for a in found(folder).absent] == ["weights"]


def test_a_file_that_is_not_read_changes_no_identity(folder: Path) -> None:
    before = found(folder).identity
    scaled(folder, "pytorch_model.bin", 2.0)
    scaled(folder, "consolidated.safetensors", 2.0)
    assert found(folder).identity == before


def test_what_is_read_changes_the_identity(folder: Path) -> None:
    identities = {found(folder).identity}
    edit(folder, attn_pdrop=0.2)
    identities.add(found(folder).identity)
    scaled(folder, "model.safetensors", 2.0)
    identities.add(found(folder).identity)
    scaled(folder, "other.safetensors", 3.0)
    edit(folder, transformers_weights="other.safetensors")
    identities.add(found(folder).identity)
    section = ModelSection(path=str(folder))
    ours = embedding(load_model(found(folder), section, 0, "cpu").module)
    assert torch.equal(ours, load_file(folder / "other.safetensors")["transformer.wte.weight"])
    shards(folder, "model", 4.0)
    edit(folder, transformers_weights="model.safetensors.index.json")
    identities.add(found(folder).identity)
    assert len(identities) == 5


def test_a_variant_alone_is_not_there(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "model.fp16.safetensors")
    [absent] = found(folder).absent
    assert "neither model.safetensors nor pytorch_model.bin" in absent
    assert "model.fp16.safetensors" in absent


@pytest.mark.parametrize("name", ["../model.safetensors", "nowhere.safetensors"])
def test_an_index_that_names_no_file_of_the_folder_is_an_error(folder: Path, name: str) -> None:
    (folder / "model.safetensors").rename(folder.parent / "model.safetensors")
    index = {"weight_map": {"transformer.wte.weight": name}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ModelError, match="which is not in"):
        found(folder)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"architectures": ["GPT2ForSequenceClassification"]}, "not a causal language model"),
        ({"architectures": ["GPT2ForTokenClassification"]}, "not a causal language model"),
        ({"architectures": ["GPT2DoubleHeadsModel"]}, "not a causal language model"),
        ({"is_encoder_decoder": True}, "an encoder and a decoder"),
        ({"transformers_weights": "../other.safetensors"}, "is no file name"),
        ({"architectures": ["GPT2LMHeadModel"]}, None),
        ({"architectures": ["GPT2Model"]}, None),
        ({"architectures": None}, None),
        ({"architectures": []}, None),
    ],
)
def test_a_model_of_another_kind_is_refused_before_it_is_loaded(
    fields: dict[str, object],
    message: str | None,
    folder: Path,
    write_spec: SpecWriter,
    cli: Callable[..., Result],
) -> None:
    edit(folder, **fields)
    result = cli("validate", write_spec(model={"path": str(folder)}))
    assert result.code == (2 if message else 0), result.err
    assert message is None or message in " ".join(result.err.split())


@pytest.mark.parametrize(
    ("kind", "architecture", "right"),
    [
        ("bert", "BertForMaskedLM", True),
        ("bert", "BertForPreTraining", True),
        ("bert", "BertModel", True),
        ("bert", "BertLMHeadModel", False),
        ("bert", "BertForSequenceClassification", False),
        ("bert", "BertForNextSentencePrediction", False),
        ("roberta", "RobertaForQuestionAnswering", False),
        ("esm", "EsmForTokenClassification", False),
        ("blip", "BlipForConditionalGeneration", True),
        ("blip", "BlipForQuestionAnswering", False),
        ("llama", "LlamaForSequenceClassification", False),
        ("stablelm", "StableLmForCausalLM", True),
        ("stablelm", "StableLmForSequenceClassification", False),
        ("vit", "ViTForImageClassification", False),
        ("whisper", "WhisperForConditionalGeneration", False),
    ],
)
def test_the_architecture_decides(kind: str, architecture: str, right: bool) -> None:
    config = {"model_type": kind, "architectures": [architecture]}
    if right:
        check_kind(config, "config.json")
        return
    with pytest.raises(ModelError, match=rf"^config\.json: architectures is {architecture}"):
        check_kind(config, "config.json")


def test_a_random_model_of_another_kind_is_refused() -> None:
    config = {**tiny_config("llama"), "architectures": ["LlamaForSequenceClassification"]}
    with pytest.raises(ModelError, match=r"^model\.config: architectures is"):
        locate(ModelSection(config=config), 0)


def test_a_network_without_its_own_head_is_an_error(tmp_path: Path) -> None:
    """BertModel: the head of a masked language model would be random."""
    from tests import zoo

    model = zoo.make("bert")
    model.get_submodule("bert").save_pretrained(tmp_path)  # type: ignore[operator]
    with pytest.raises(ModelError, match="its weights have no 'cls'"):
        found(tmp_path)
