"""GGUF files through transformers' own tables: config and tokenizer, and weights in float32.

`write_facts` runs in a process of its own (`interv.models.gguf`), since transformers' tables need
torch. What a file states and transformers does not read is an error, unless it agrees with what
the model does anyway.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
import transformers
from tokenizers import pre_tokenizers
from transformers.integrations.ggml import GGUF_CONFIG_MAPPING
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from interv.errors import ModelError
from interv.models.cache import cached
from interv.models.checkpoint import check_kind
from interv.models.config import ModelFacts, read_facts
from interv.models.gguf import cache_key

# What llama.cpp splits as GPT-2 does, each digit by itself (`tokenizer.ggml.pre`).
_DIGITS = ("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone")
_FACTORS = "rope_freqs.weight"
# Llama 3.1's scaling of its rotary angles; the factor is the largest in the file.
_LLAMA_3 = {
    "rope_type": "llama3",
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


class _Reader(gguf.GGUFReader):  # type: ignore[misc]
    """gguf's reader, quicker with arrays, which a vocabulary is."""

    def _get_field_parts(self, orig_offs: int, raw_type: int) -> Any:
        if raw_type != gguf.GGUFValueType.ARRAY:
            return super()._get_field_parts(orig_offs, raw_type)
        data = np.asarray(self.data)  # a slice of the mapped file itself costs far more
        kind = gguf.GGUFValueType(int(data[orig_offs : orig_offs + 4].view(np.uint32)[0]))
        count = int(data[orig_offs + 4 : orig_offs + 12].view(np.uint64)[0])
        offset = orig_offs + 12
        parts: list[Any] = []
        if kind == gguf.GGUFValueType.STRING:
            for _ in range(count):
                length = int.from_bytes(data[offset : offset + 8].tobytes(), "little")
                parts.append(data[offset + 8 : offset + 8 + length])
                offset += 8 + length
        elif kind in self.gguf_scalar_to_np:
            number = np.dtype(self.gguf_scalar_to_np[kind])
            values = data[offset : offset + count * number.itemsize].view(number)
            parts = [values[i : i + 1] for i in range(count)]
            offset += count * number.itemsize
        else:
            return super()._get_field_parts(orig_offs, raw_type)
        return offset - orig_offs, parts, list(range(count)), [gguf.GGUFValueType.ARRAY, kind]


def read(path: Path) -> Any:
    """Open a GGUF file.

    Raises:
        ModelError: it is none, or one of several parts.
    """
    try:
        reader = _Reader(path)
    except (ValueError, IndexError, OverflowError, KeyError) as error:
        raise ModelError(f"{path}: is not a GGUF file: {error}") from error
    if (_value(reader, "split.count") or 1) > 1:
        raise ModelError(
            f"{path}: is one of {_value(reader, 'split.count')} parts; join them first with "
            "llama.cpp's `llama-gguf-split --merge`"
        )
    return reader


def write_facts(source: str, target: str) -> None:
    """Write a GGUF file's config.json and its tokenizer's files into a folder.

    Raises:
        ModelError: transformers cannot read it as a language model, or would leave out something
            that it states.
    """
    path, folder = Path(source), Path(target)
    reader = read(path)
    architecture = _value(reader, "general.architecture")
    if not isinstance(_value(reader, "tokenizer.ggml.tokens"), list):
        raise ModelError(f"{path}: has no tokens; is it a language model?")
    with _opened(reader), _silent():
        try:
            config = transformers.AutoConfig.from_pretrained(path.parent, gguf_file=path.name)
        except Exception as error:
            # Anything can be wrong with a file; the cause is kept.
            raise ModelError(
                f"{path}: transformers {transformers.__version__} cannot read a GGUF file of "
                f"architecture '{architecture}': {error}"
            ) from error
        check_kind(config.to_dict(), str(path))
        facts = read_facts(config.to_dict(), str(path))
        _scale_angles(path, reader, config, facts)
        _check_stated(path, reader, str(architecture), config, facts)
        absent = _write_tokenizer(path, reader, folder)
    stated = config.to_dict() | {
        "n_params": sum(int(t.n_elements) for t in reader.tensors),
        "tokenizer_absent": absent,
    }
    (folder / "config.json").write_text(json.dumps(stated, indent=1))


def _check_stated(
    path: Path, reader: Any, architecture: str, config: Any, facts: ModelFacts
) -> None:
    """Check that the config says all that the file does."""
    read_by = {name.replace("_", "").replace("-", ""): m for name, m in GGUF_CONFIG_MAPPING.items()}
    mapped = read_by.get(architecture.replace("_", "").replace("-", ""))
    ropes = getattr(config, "rope_parameters", None) or {}
    known: dict[str, Any] = {
        "block_count": facts.n_layers,
        "embedding_length": facts.d_model,
        "feed_forward_length": facts.d_mlp,
        "context_length": facts.n_positions,
        "vocab_size": facts.vocab_size,
        "attention.head_count": facts.n_heads,
        "attention.head_count_kv": facts.n_kv_heads,
        "attention.key_length": facts.d_head,
        "attention.value_length": facts.d_head,
        "attention.sliding_window": getattr(config, "sliding_window", None),
        "attention.causal": True,
        "attn_logit_softcapping": getattr(config, "attn_logit_softcapping", None),
        "final_logit_softcapping": getattr(config, "final_logit_softcapping", None),
        "rope.freq_base": ropes.get("rope_theta"),
        "rope.dimension_count": int(facts.d_head * ropes.get("partial_rotary_factor", 1)),
        "rope.scaling.type": "none",
        "use_parallel_residual": getattr(config, "use_parallel_residual", None),
    }
    for key, values in {
        "attention.layer_norm_rms_epsilon": ("rms_norm_eps", "norm_eps", "layer_norm_epsilon"),
        "attention.layer_norm_epsilon": ("layer_norm_epsilon", "layer_norm_eps", "norm_epsilon"),
    }.items():
        known[key] = next((getattr(config, v) for v in values if hasattr(config, v)), None)
    # One frequency for each kind of layer, or a window for some: transformers' own table says.
    by_kind = "rope_theta" not in ropes and bool(ropes)
    wrong = []
    for key in reader.fields:
        name = key.removeprefix(f"{architecture}.")
        if name == key or (by_kind and name == "rope.freq_base"):
            continue
        value = _value(reader, key)
        if name in known:
            if not _same(value, known[name]):
                wrong.append(f"{key} is {value}, and the model has {known[name]}")
        elif mapped is not None and mapped.get(name) is None:
            wrong.append(f"{key} ({value}) is not read")
    if wrong:
        raise ModelError(
            f"{path}: transformers {transformers.__version__} makes another model of it than the "
            f"file states: {'; '.join(wrong[:4])}"
        )


def _same(stated: Any, known: Any) -> bool:
    if isinstance(stated, float) and isinstance(known, int | float):
        return abs(stated - known) <= 1e-6 * abs(known)
    return bool(stated == known)


def _scale_angles(path: Path, reader: Any, config: Any, facts: ModelFacts) -> None:
    """Set Llama 3's scaling, which a GGUF file holds as one factor for each angle.

    Raises:
        ModelError: the factors are not those of that scaling.
    """
    tensor = next((t for t in reader.tensors if t.name == _FACTORS), None)
    if tensor is None:
        return
    factors = torch.from_numpy(np.array(tensor.data, dtype=np.float64))
    plain = dict(config.rope_parameters)
    theta = plain["rope_theta"]
    angles = theta ** -(torch.arange(0, facts.d_head, 2, dtype=torch.float64) / facts.d_head)
    config.rope_parameters = {**_LLAMA_3, "rope_theta": theta, "factor": float(factors.max())}
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    if not torch.allclose(scaled.double(), angles / factors, rtol=1e-4, atol=0):
        raise ModelError(f"{path}: {_FACTORS} scales the rotary angles in a way that is not known")


def _write_tokenizer(path: Path, reader: Any, folder: Path) -> str | None:
    """Save the tokenizer; return why there is none where llama.cpp's way to split is not known."""
    kind = _value(reader, "tokenizer.ggml.model")
    pre = _value(reader, "tokenizer.ggml.pre") or "default"
    splits = importlib.import_module("transformers.integrations.gguf")
    known = getattr(
        getattr(splits, "gguf_tokenizer_mapping", None), "GGUF_PRE_TOKENIZER_SPLITS", {}
    )
    as_gpt2 = pre == "gpt-2" or (
        pre == "default" and _value(reader, "general.architecture") == "gpt2"
    )
    if kind == "gpt2" and not as_gpt2 and pre not in (*known, *_DIGITS):
        return (
            f"that of {path.name} ({kind}, {pre}) is not known; set model.tokenizer to a folder "
            "with the model's tokenizer.json"
        )
    try:
        made = transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    except Exception as error:  # a damaged vocabulary raises anything
        return (
            f"that of {path.name} ({kind}) cannot be read: {error}; set model.tokenizer to a "
            "folder with the model's tokenizer.json"
        )
    if kind == "gpt2" and pre in _DIGITS:
        made.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Digits(individual_digits=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False),
            ]
        )
    made.save_pretrained(folder)
    return None


def dequantised(path: Path, sha256: str, folder: Path) -> Path:
    """Return the cache folder with a GGUF file's weights as float32 safetensors, made once.

    Args:
        path: the file.
        sha256: its hash.
        folder: what `write_facts` wrote of it.

    Raises:
        ModelError: a weight of the file is not used, or one is missing.
    """

    def build(target: Path) -> None:
        from safetensors.torch import save_file

        from interv.engine.pretrained import check_complete

        fields = json.loads((folder / "config.json").read_text())
        config = transformers.AutoConfig.for_model(fields.pop("model_type"), **fields)
        options: dict[str, Any] = {}
        if hasattr(transformers, "GgufConfig"):
            options["quantization_config"] = transformers.GgufConfig(dequantize=True)
        reader = read(path)
        with _opened(reader), _silent():
            module, info = transformers.AutoModelForCausalLM.from_pretrained(
                str(path.parent),
                gguf_file=path.name,
                config=config,
                dtype=torch.float32,
                local_files_only=True,
                output_loading_info=True,
                **options,
            )
        check_complete(path.name, config.model_type, info)
        _check_count(path, reader, module)
        tied = set(module._tied_weights_keys or ()) if module.config.tie_word_embeddings else set()
        state = {k: v.contiguous() for k, v in module.state_dict().items() if k not in tied}
        save_file(state, target / "model.safetensors", metadata={"format": "pt"})
        stated = module.config.to_dict()
        stated.pop("quantization_config", None)
        (target / "config.json").write_text(json.dumps(stated, indent=1))

    return cached(cache_key(sha256, "float32"), build)


def _check_count(path: Path, reader: Any, module: Any) -> None:
    """Check that the file's numbers are as many as the model's: transformers skips what it has
    no name for, in silence."""
    tensors = {t.name: t for t in reader.tensors if t.name != _FACTORS}
    same = ("output.weight", "token_embd.weight")
    if module.config.tie_word_embeddings and all(name in tensors for name in same):
        head, embedding = (tensors[name] for name in same)
        if np.array_equal(head.data, embedding.data):
            del tensors["output.weight"]
    stated = sum(int(t.n_elements) for t in tensors.values())
    have = sum(p.numel() for p in module.parameters())
    if stated != have:
        raise ModelError(
            f"{path}: has {stated:,} numbers and transformers {transformers.__version__} makes a "
            f"model of {have:,} of them: some of its weights are not used"
        )


def _value(reader: Any, key: str) -> Any:
    field = reader.get_field(key)
    return None if field is None else field.contents()


@contextlib.contextmanager
def _opened(reader: Any) -> Iterator[None]:
    """Let transformers use a file that is open; it reads it anew, slowly, for each question."""
    own: Callable[..., Any] = gguf.GGUFReader
    gguf.GGUFReader = lambda *_: reader
    try:
        yield
    finally:
        gguf.GGUFReader = own


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """Without the bars that transformers draws whatever it is told."""
    with contextlib.redirect_stderr(io.StringIO()):
        yield
