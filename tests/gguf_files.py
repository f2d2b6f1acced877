"""Small GGUF files, written as llama.cpp's converter writes them; knows nothing of interv."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
import transformers
from numpy.typing import NDArray

from tests.conftest import CORPUS, save_tokenizer

LAYERS, WIDTH, HEADS, KV_HEADS, MLP, LENGTH = 2, 32, 4, 2, 48, 64
NORM, HEAD = 1e-5, WIDTH // HEADS
_SHAPE: dict[str, Any] = {
    "num_hidden_layers": LAYERS,
    "hidden_size": WIDTH,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "intermediate_size": MLP,
    "max_position_embeddings": LENGTH,
    "rms_norm_eps": NORM,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 2,
}
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama", **_SHAPE},
    "qwen2": {"model_type": "qwen2", **_SHAPE, "tie_word_embeddings": True},
    "gemma3": {"model_type": "gemma3_text", **_SHAPE, "head_dim": HEAD, "sliding_window": 8},
    "phi3": {"model_type": "phi3", **_SHAPE},
    "gpt2": {
        "model_type": "gpt2",
        "n_layer": LAYERS,
        "n_embd": WIDTH,
        "n_head": HEADS,
        "n_positions": 1024,  # transformers does not read another length
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
}
SENTENCEPIECE = ("llama", "gemma3", "phi3")


def _pieces() -> tuple[list[str], list[float], list[int]]:
    """Tokens, scores and types of a SentencePiece vocabulary: bytes, letters, words' beginnings."""
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    types = [2, 3, 3] + 256 * [6]
    words = sorted({word for text in CORPUS for word in text.split()})
    found = dict.fromkeys(letter for word in words for letter in "▁" + word)
    found |= dict.fromkeys(f"▁{word}"[:end] for word in words for end in range(2, len(word) + 2))
    tokens += found
    types += len(found) * [1]
    return tokens, [-float(i) for i in range(len(tokens))], types


def _byte_level(folder: Path) -> tuple[list[str], list[str]]:
    save_tokenizer(folder)
    model = json.loads((folder / "tokenizer.json").read_text())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].__getitem__)
    return tokens, [" ".join(pair) for pair in model["merges"]]


def _permuted(weight: NDArray[Any], heads: int) -> NDArray[Any]:
    """Rows of a head in llama.cpp's order: the halves that rotate together side by side."""
    parts = weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:])
    return parts.swapaxes(1, 2).reshape(weight.shape)


def _stored(kind: str, name: str, weight: NDArray[Any]) -> NDArray[Any]:
    if kind == "llama" and "q_proj" in name:
        return _permuted(weight, HEADS)
    if kind == "llama" and "k_proj" in name:
        return _permuted(weight, KV_HEADS)
    if kind == "gemma3" and name.endswith("norm.weight"):
        return weight + 1
    conv = any(part in name for part in ("c_attn.weight", "c_proj.weight", "c_fc.weight"))
    return weight.T if kind == "gpt2" and conv else weight


def write(
    kind: str,
    path: Path,
    *,
    keys: dict[str, float | str | bool] | None = None,
    tensors: dict[str, NDArray[Any]] | None = None,
    pre: str | None = None,
    config: dict[str, Any] | None = None,
) -> torch.nn.Module:
    """Write a random model.

    Args:
        kind: of `CONFIGS`, as llama.cpp calls it.
        keys: more metadata, below the architecture.
        tensors: more tensors.
        pre: how a byte-level tokenizer splits; unset: as GPT-2, or as Qwen 2.
        config: more fields of the model's own config.
    """
    writer = gguf.GGUFWriter(path, kind)
    if kind in SENTENCEPIECE:
        tokens, scores, types = _pieces()
        writer.add_tokenizer_model("llama")
        writer.add_token_scores(scores)
        writer.add_token_types(types)
    else:
        tokens, merges = _byte_level(path.parent)
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(pre or ("gpt-2" if kind == "gpt2" else "qwen2"))
        writer.add_token_merges(merges)
    writer.add_token_list(tokens)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(2)
    fields = CONFIGS[kind] | {"vocab_size": len(tokens)} | (config or {})
    made = transformers.AutoConfig.for_model(fields.pop("model_type"), **fields)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(made).eval()
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
    writer.add_block_count(LAYERS)
    writer.add_context_length(1024 if kind == "gpt2" else LENGTH)
    writer.add_embedding_length(WIDTH)
    writer.add_feed_forward_length(4 * WIDTH if kind == "gpt2" else MLP)
    writer.add_head_count(HEADS)
    if kind == "gpt2":
        writer.add_layer_norm_eps(NORM)
    else:
        writer.add_head_count_kv(KV_HEADS)
        writer.add_layer_norm_rms_eps(NORM)
        writer.add_rope_dimension_count(HEAD)
        writer.add_rope_freq_base(1e6 if kind == "gemma3" else made.rope_parameters["rope_theta"])
    if kind == "gemma3":
        writer.add_key_length(HEAD)
        writer.add_value_length(HEAD)
        writer.add_sliding_window(8)
    for name, value in (keys or {}).items():
        add = {float: writer.add_float32, str: writer.add_string, bool: writer.add_bool}
        add[type(value)](f"{kind}.{name}", value)
    names = gguf.get_tensor_name_map(
        next(k for k, v in gguf.MODEL_ARCH_NAMES.items() if v == kind), LAYERS
    )
    tied = set(model._tied_weights_keys or ()) if made.tie_word_embeddings else set()
    for name, weight in model.state_dict().items():
        if name not in tied:
            stored = _stored(kind, name, weight.numpy())
            target = names.get_name(name, try_suffixes=(".weight", ".bias"))
            writer.add_tensor(target, np.ascontiguousarray(stored))
    for name, array in (tensors or {}).items():
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return model
