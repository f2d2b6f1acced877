"""GGUF files: the logits of the model they were made from, transformers' tokens, and refusals."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

from interv.engine.gguf import write_facts
from interv.engine.load import load_model
from interv.errors import ModelError
from interv.models import PromptTokenizer, locate
from interv.models.gguf import cache_key
from interv.spec.schema import ModelSection
from tests import gguf_files

IDS = torch.tensor([[5, 300, 70, 33, 280, 12, 90, 41, 22, 7]])
TEXTS = ["The Space Needle is in downtown", "Paris, 42 naïve  ünder", " Berlin London\n"]


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file to be written, and a cache of its own; facts are read in this process."""
    monkeypatch.setenv("INTERV_CACHE", str(tmp_path / "cache"))

    def unpack(source: Path, sha256: str) -> Path:
        folder = tmp_path / "facts" / sha256[:16]
        if not folder.exists():
            folder.mkdir(parents=True)
            write_facts(str(source), str(folder))
        return folder

    monkeypatch.setattr("interv.models.gguf.unpack", unpack)
    return tmp_path / "small.gguf"


def logits(path: Path) -> torch.Tensor:
    section = ModelSection(path=str(path))
    model = load_model(locate(section, 0), section, 0, "cpu")
    with torch.no_grad():
        found = model.module(IDS).logits
    assert isinstance(found, torch.Tensor)
    return found


def tokenizer(path: Path) -> PromptTokenizer:
    found = locate(ModelSection(path=str(path)), 0).tokenizer
    assert found is not None
    return found


@pytest.mark.parametrize("kind", gguf_files.CONFIGS)
def test_a_file_gives_the_logits_and_tokens_of(kind: str, path: Path) -> None:
    model = gguf_files.write(kind, path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name)
    with torch.no_grad():
        expected, again = model(IDS).logits, theirs(IDS).logits
    found = logits(path)
    assert torch.allclose(found, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))
    assert torch.equal(found, again)
    facts = locate(ModelSection(path=str(path)), 0).facts
    assert facts is not None and facts.n_params == sum(p.numel() for p in model.parameters())
    assert facts.model_type == gguf_files.CONFIGS[kind]["model_type"]
    theirs = transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    for text in TEXTS:
        ids = theirs(text, add_special_tokens=False)["input_ids"]
        assert list(tokenizer(path).encode(text).ids) == ids
    assert len(set(ids)) >= 3


def test_digits_are_split_where_llama_cpp_splits_them(path: Path) -> None:
    gguf_files.write("qwen2", path, pre="smollm")
    pieces = [tokenizer(path).decode(i) for i in tokenizer(path).encode("in 42").ids]
    assert "".join(pieces) == "in 42" and pieces[-2:] == ["4", "2"]


def test_a_way_to_split_that_is_not_known_is_no_tokenizer(path: Path) -> None:
    gguf_files.write("qwen2", path, pre="somebody-s")
    files = locate(ModelSection(path=str(path)), 0)
    assert files.tokenizer is None
    assert "(gpt2, somebody-s) is not known; set model.tokenizer" in files.absent[0]


def test_llama_3s_angles_are_scaled_as_the_file_says(path: Path) -> None:
    scaling = {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    fields = {**gguf_files.CONFIGS["llama"], "rope_parameters": scaling}
    made = transformers.LlamaConfig(**fields)
    scaled = transformers.models.llama.modeling_llama.LlamaRotaryEmbedding(made).inv_freq
    plain = 500000.0 ** -(torch.arange(0, gguf_files.HEAD, 2) / gguf_files.HEAD)
    factors = (plain / scaled).numpy().astype(np.float32)
    assert factors.max() > 2, "the scaling must matter"
    model = gguf_files.write(
        "llama",
        path,
        tensors={"rope_freqs.weight": factors},
        config={"rope_parameters": scaling},
    )
    with torch.no_grad():
        expected = model(IDS).logits
    assert torch.allclose(logits(path), expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


def test_angles_that_are_scaled_otherwise_are_an_error(path: Path) -> None:
    factors = np.linspace(1, 3, gguf_files.HEAD // 2, dtype=np.float32)
    gguf_files.write("llama", path, tensors={"rope_freqs.weight": factors})
    with pytest.raises(ModelError, match="scales the rotary angles in a way that is not known"):
        locate(ModelSection(path=str(path)), 0)


@pytest.mark.parametrize(
    ("kind", "keys", "message"),
    [
        ("qwen2", {"rope.scaling.type": "yarn"}, "qwen2.rope.scaling.type is yarn"),
        ("llama", {"expert_weights_scale": 2.0}, "llama.expert_weights_scale .* is not read"),
        ("gemma3", {"final_logit_softcapping": 30.0}, "final_logit_softcapping is 30"),
        ("llama", {"attention.causal": False}, "attention.causal is False"),
    ],
)
def test_what_transformers_would_leave_out_is_an_error(
    kind: str, keys: dict[str, float | str | bool], message: str, path: Path
) -> None:
    gguf_files.write(kind, path, keys=keys)
    with pytest.raises(ModelError, match=message):
        locate(ModelSection(path=str(path)), 0)


def test_a_weight_that_is_not_used_is_an_error(path: Path) -> None:
    gguf_files.write("llama", path, tensors={"blk.0.extra.weight": np.ones(32, np.float32)})
    with pytest.raises(ModelError, match="some of its weights are not used"):
        logits(path)


def test_an_architecture_that_cannot_be_loaded_is_an_error(path: Path) -> None:
    import gguf

    writer = gguf.GGUFWriter(path, "rwkv6")
    writer.add_token_list(["a", "b"])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ModelError, match="cannot read a GGUF file of architecture 'rwkv6'"):
        locate(ModelSection(path=str(path)), 0)


def test_the_cache_key_changes_with_all_that_reads_a_file(monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.metadata

    version = importlib.metadata.version
    keys = {cache_key("a" * 64, "facts"), cache_key("b" * 64, "facts"), cache_key("a" * 64, "x")}
    for changed in ("transformers", "gguf", "tokenizers"):
        monkeypatch.setattr(
            importlib.metadata,
            "version",
            lambda name, changed=changed: "9.9" if name == changed else version(name),
        )
        keys.add(cache_key("a" * 64, "facts"))
    monkeypatch.undo()
    monkeypatch.setattr("interv.models.gguf._VERSION", 99)
    keys.add(cache_key("a" * 64, "facts"))
    assert len(keys) == 7


def test_what_the_process_that_reads_a_file_refuses_is_an_error_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it reads of a file that it does not refuse: test_default_model.py."""
    from interv.models.gguf import unpack

    monkeypatch.setenv("INTERV_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "small.gguf"
    gguf_files.write("qwen2", path, keys={"rope.scaling.type": "yarn"})
    with pytest.raises(ModelError, match=r"^.*small\.gguf: .*rope\.scaling\.type is yarn"):
        unpack(path, "a" * 64)
