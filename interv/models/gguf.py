"""GGUF files without torch: their config and tokenizer, as the JSON files of a hub model.

The weights are dequantised in `interv.engine.load`.
"""

from __future__ import annotations

import json
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
        ModelError: the file is not GGUF, or its tokenizer is of a kind that is not known.
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

        kind, pre = value("tokenizer.ggml.model"), value("tokenizer.ggml.pre") or "default"
        if kind != "gpt2" or pre not in _SPLITS_DIGITS:
            raise ModelError(
                f"{path}: its tokenizer ({kind}, {pre}) is not known; set model.tokenizer to a "
                "folder with the model's tokenizer.json"
            )
        architecture = value("general.architecture")
        config = {
            "model_type": architecture,
            "num_hidden_layers": value(f"{architecture}.block_count"),
            "num_attention_heads": value(f"{architecture}.attention.head_count"),
            "hidden_size": value(f"{architecture}.embedding_length"),
            "intermediate_size": value(f"{architecture}.feed_forward_length"),
            "max_position_embeddings": value(f"{architecture}.context_length"),
            "n_params": int(sum(int(t.n_elements) for t in reader.tensors)),
        }
        tokens, types = value("tokenizer.ggml.tokens"), value("tokenizer.ggml.token_type")
        merges, bos = value("tokenizer.ggml.merges"), value("tokenizer.ggml.bos_token_id")
        assert isinstance(tokens, list) and isinstance(types, list) and isinstance(merges, list)
        config["vocab_size"] = len(tokens)
        backend = byte_level_bpe(
            {token: i for i, token in enumerate(tokens)},
            [(left, right) for left, right in (m.split(" ") for m in merges)],
            split_digits=_SPLITS_DIGITS[str(pre)],
            special=[t for t, kind in zip(tokens, types, strict=True) if kind == _CONTROL],
        )
        backend.save(str(folder / "tokenizer.json"))
        settings = {
            "bos_token": tokens[bos] if isinstance(bos, int) else None,
            "chat_template": value("tokenizer.chat_template"),
        }
        (folder / "config.json").write_text(json.dumps(config))
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))

    return cached(f"gguf/{sha256[:16]}-tokens", build)
