"""GGUF files without torch: their config and tokenizer, as the JSON files of a hub model.

The weights are dequantised in `interv.engine.load`.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from interv.errors import ModelError
from interv.models.cache import cached
from interv.models.tokenizer import byte_level_bpe

# `tokenizer.ggml.pre` of byte-level BPE tokenizers: does it split every digit off?
_SPLITS_DIGITS = {"default": False, "gpt-2": False, "smollm": True}
_CONTROL = 3  # token type of special tokens


def unpack(path: Path, sha256: str) -> Path:
    """The cache folder with config.json, tokenizer.json and tokenizer_config.json of a file.

    Raises:
        ModelError: the file is not GGUF, or not a language model's.
    """

    def build(folder: Path) -> None:
        from gguf import GGUFReader

        try:
            reader = GGUFReader(path)
        except (ValueError, IndexError, OverflowError) as error:
            raise ModelError(f"{path}: is not a GGUF file: {error}") from error

        def value(key: str) -> object:
            field = reader.get_field(key)
            return None if field is None else field.contents()

        architecture = value("general.architecture")
        config: dict[str, object] = {
            "model_type": architecture,
            "num_hidden_layers": value(f"{architecture}.block_count"),
            "num_attention_heads": value(f"{architecture}.attention.head_count"),
            "num_key_value_heads": value(f"{architecture}.attention.head_count_kv"),
            "head_dim": value(f"{architecture}.attention.key_length"),
            "hidden_size": value(f"{architecture}.embedding_length"),
            "intermediate_size": value(f"{architecture}.feed_forward_length"),
            "max_position_embeddings": value(f"{architecture}.context_length"),
            "n_params": int(sum(int(t.n_elements) for t in reader.tensors)),
        }
        tokens = value("tokenizer.ggml.tokens")
        if not isinstance(tokens, list):
            raise ModelError(f"{path}: has no tokens; is it a language model?")
        config["vocab_size"] = len(tokens)
        config["tokenizer_absent"] = _tokenizer(path, folder, tokens, value)
        (folder / "config.json").write_text(json.dumps(config))

    return cached(f"gguf/{sha256[:16]}-tokens-3", build)


def _tokenizer(
    path: Path, folder: Path, tokens: list[str], value: Callable[[str], object]
) -> str | None:
    """Save a byte-level BPE tokenizer; for any other kind return why there is none."""
    kind, pre = value("tokenizer.ggml.model"), str(value("tokenizer.ggml.pre") or "default")
    merges, types = value("tokenizer.ggml.merges"), value("tokenizer.ggml.token_type")
    bos = value("tokenizer.ggml.bos_token_id")
    known = kind == "gpt2" and pre in _SPLITS_DIGITS
    if not known or not isinstance(merges, list) or not isinstance(types, list):
        return (
            f"that of {path.name} ({kind}, {pre}) is not known; set model.tokenizer to a folder "
            "with the model's tokenizer.json"
        )
    backend = byte_level_bpe(
        {token: i for i, token in enumerate(tokens)},
        [(left, right) for left, right in (str(m).split(" ") for m in merges)],
        split_digits=_SPLITS_DIGITS[pre],
        special=[t for t, kind in zip(tokens, types, strict=True) if kind == _CONTROL],
    )
    backend.save(str(folder / "tokenizer.json"))
    settings = {
        "bos_token": tokens[bos] if isinstance(bos, int) else None,
        "chat_template": value("tokenizer.chat_template"),
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return None
