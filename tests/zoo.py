"""One tiny random model of each family, for tests; knows nothing of interv.

Each has 3 layers and 100 tokens. Weights are drawn anew with a gain that makes a swap at any
site move the logits visibly, so that a test cannot pass because a site does not matter.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM

VOCAB = 100
LAYERS = 3
GAIN = 1.5

_SPECIAL = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 1}
_LENGTH = {"max_position_embeddings": 64}
_WIDE = {"hidden_size": 48, "vocab_size": VOCAB, **_SPECIAL}
_LLAMA = {
    **_WIDE,
    **_LENGTH,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 80,
}
_FULL = {k: v for k, v in _LLAMA.items() if k != "num_key_value_heads"}
_EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 40, "num_experts": 4}
_QUARTER = {"hidden_size": 64}  # a quarter of each head is rotated, and must be even
_MIXED = ["sliding_attention", "full_attention", "sliding_attention"]
_FALCON = {
    **_WIDE,
    **_LENGTH,
    "model_type": "falcon",
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
}
_ENCODER = {**_FULL, "type_vocab_size": 2, "hidden_dropout_prob": 0.0}

CONFIGS: dict[str, dict[str, object]] = {
    "gpt2": {
        "model_type": "gpt2",
        "n_layer": LAYERS,
        "n_head": 4,
        "n_embd": 48,
        "n_positions": 64,
        "vocab_size": VOCAB,
        **_SPECIAL,
    },
    "gpt_neo": {
        **_WIDE,
        **_LENGTH,
        "model_type": "gpt_neo",
        "num_layers": LAYERS,
        "num_heads": 4,
        "attention_types": [[["global", "local"], 1], [["local"], 1]],
        "window_size": 3,
        "intermediate_size": 80,
    },
    "gptj": {
        "model_type": "gptj",
        "n_layer": LAYERS,
        "n_head": 4,
        "n_embd": 48,
        "n_positions": 64,
        "rotary_dim": 8,
        "n_inner": 80,
        "vocab_size": VOCAB,
        "tie_word_embeddings": False,
        **_SPECIAL,
    },
    "gpt_neox": {**_FULL, **_QUARTER, "model_type": "gpt_neox", "use_parallel_residual": True},
    "gpt_neox_serial": {
        **_FULL,
        **_QUARTER,
        "model_type": "gpt_neox",
        "use_parallel_residual": False,
    },
    "opt": {
        **_WIDE,
        **_LENGTH,
        "model_type": "opt",
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "ffn_dim": 80,
        "word_embed_proj_dim": 48,
        "do_layer_norm_before": True,
        "dropout": 0.0,
    },
    "llama": {**_LLAMA, "model_type": "llama"},
    "mistral": {**_LLAMA, "model_type": "mistral", "sliding_window": 3},
    "mixtral": {
        **_LLAMA,
        "model_type": "mixtral",
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
    },
    "qwen2": {**_LLAMA, "model_type": "qwen2"},
    "qwen3": {**_LLAMA, "model_type": "qwen3", "head_dim": 16},
    "qwen2_moe": {
        **_LLAMA,
        **_EXPERTS,
        "model_type": "qwen2_moe",
        "shared_expert_intermediate_size": 56,
    },
    "qwen3_moe": {**_LLAMA, **_EXPERTS, "model_type": "qwen3_moe", "head_dim": 16},
    "gemma": {**_LLAMA, "model_type": "gemma", "head_dim": 16},
    "gemma2": {
        **_LLAMA,
        "model_type": "gemma2",
        "head_dim": 16,
        "query_pre_attn_scalar": 24,
        "attn_logit_softcapping": 4.0,
        "final_logit_softcapping": 8.0,
        "sliding_window": 3,
        "layer_types": _MIXED,
    },
    "gemma3_text": {
        **_LLAMA,
        "model_type": "gemma3_text",
        "head_dim": 16,
        "query_pre_attn_scalar": 16,
        "sliding_window": 3,
        "layer_types": _MIXED,
    },
    "phi3": {**_LLAMA, "model_type": "phi3"},
    "olmo": {**_LLAMA, "model_type": "olmo", "clip_qkv": 2.0},  # clamps in place
    "olmo2": {**_LLAMA, "model_type": "olmo2"},
    "gpt_oss": {
        **_LLAMA,
        "model_type": "gpt_oss",
        "head_dim": 16,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "sliding_window": 3,
        "layer_types": _MIXED,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    },
    "falcon": {
        **_FALCON,
        "new_decoder_architecture": True,
        "num_kv_heads": 2,
        "ffn_hidden_size": 80,
    },
    "falcon_mq": {
        **_FALCON,
        "new_decoder_architecture": False,
        "multi_query": True,
        "parallel_attn": True,
        "alibi": False,
    },
    # As Falcon-RW: alibi, no shared keys, attention before the MLP.
    "falcon_alibi": {
        **_FALCON,
        "new_decoder_architecture": False,
        "multi_query": False,
        "parallel_attn": False,
        "bias": True,
        "alibi": True,
    },
    "bloom": {**_WIDE, "model_type": "bloom", "n_layer": LAYERS, "n_head": 4},
    "mamba": {
        **_WIDE,
        "model_type": "mamba",
        "num_hidden_layers": LAYERS,
        "state_size": 8,
        "conv_kernel": 3,
        "time_step_rank": 3,
        "residual_in_fp32": False,
    },
    "stablelm": {**_LLAMA, **_QUARTER, "model_type": "stablelm"},
    "starcoder2": {**_LLAMA, "model_type": "starcoder2"},
    "cohere": {**_LLAMA, "model_type": "cohere", "logit_scale": 0.5},
    "granite": {
        **_LLAMA,
        "model_type": "granite",
        "embedding_multiplier": 6.0,
        "attention_multiplier": 0.2,
        "residual_multiplier": 0.4,
        "logits_scaling": 0.5,
    },
    "phi": {**_LLAMA, "model_type": "phi"},
    "bert": {**_ENCODER, "model_type": "bert"},
    "roberta": {**_ENCODER, "model_type": "roberta"},
    "esm": {
        **_FULL,
        "model_type": "esm",
        "position_embedding_type": "rotary",
        "mask_token_id": 2,
        "hidden_dropout_prob": 0.0,
    },
    "blip": {
        "model_type": "blip",
        "text_config": {
            **_FULL,
            "encoder_hidden_size": 32,
            "sep_token_id": 3,
            "hidden_dropout_prob": 0.0,
        },
        "vision_config": {
            "hidden_size": 32,
            "intermediate_size": 56,
            "num_hidden_layers": LAYERS,
            "num_attention_heads": 4,
            "image_size": 8,
            "patch_size": 4,
        },
    },
}

ENCODERS = ("bert", "roberta", "esm")
VISION = ("blip",)
RECOGNISED = ("stablelm", "starcoder2", "cohere", "granite", "phi")
CAUSAL = tuple(name for name in CONFIGS if name not in ENCODERS + VISION)

# Families without an `sdpa` implementation in transformers.
EAGER_ONLY = ("gpt_neo", "gptj", "gemma2", "gpt_oss", "bloom", "mamba", "blip")
EXPERTS = ("mixtral", "qwen2_moe", "qwen3_moe", "gpt_oss")


def config(name: str) -> object:
    """The configuration object of `CONFIGS[name]`."""
    fields = dict(CONFIGS[name])
    return AutoConfig.for_model(str(fields.pop("model_type")), **fields)


def make(
    name: str, dtype: torch.dtype = torch.float64, attn: str = "sdpa", seed: int = 0
) -> nn.Module:
    """A model of the family, in eval mode, its weights a function of (name, seed) alone.

    Args:
        attn: the attention implementation; families without an `sdpa` one get `eager`.
    """
    options: dict[str, object] = {
        "dtype": dtype,
        "attn_implementation": "eager" if name in EAGER_ONLY else attn,
    }
    if name in EXPERTS:
        options["experts_implementation"] = "eager"  # `grouped_mm` has no float64
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if name in VISION:
            blip = importlib.import_module("transformers.models.blip")
            model = blip.BlipForConditionalGeneration._from_config(config(name), **options)
        else:
            auto = AutoModelForMaskedLM if name in ENCODERS else AutoModelForCausalLM
            model = auto.from_config(config(name), **options)
        model.eval().requires_grad_(False)
        for key, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, dtype=torch.float64)
            if parameter.dim() > 1:
                parameter.copy_(noise * GAIN / math.sqrt(parameter.shape[-1]))
            elif key.endswith("weight") or key.endswith(".D"):
                parameter.add_((0.2 * noise).to(dtype))  # a norm's weight: about 1, or about 0
            else:
                parameter.copy_(0.2 * noise)
    return model


def ids(variant: int = 0, length: int = 7) -> list[int]:
    """A prompt of distinct ordinary tokens (5 and above); variants differ at every position."""
    step = 11 + 7 * variant
    return [5 + (29 * variant + step * position) % 89 for position in range(length)]


def extras(name: str, variant: int = 0) -> dict[str, Tensor]:
    """What the family's forward needs beside `input_ids`: pixel values `[1, 3, 8, 8]` for BLIP."""
    if name not in VISION:
        return {}
    generator = torch.Generator().manual_seed(1000 + variant)
    pixels = torch.randn(1, 3, 8, 8, generator=generator, dtype=torch.float64)
    return {"pixel_values": 2 * pixels}


def inputs(name: str, variant: int = 0, length: int = 7) -> Mapping[str, Tensor]:
    """Keyword arguments of a forward: `input_ids` `[1, length]`, and the extras."""
    return {"input_ids": torch.tensor([ids(variant, length)]), **extras(name, variant)}
