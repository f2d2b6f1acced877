"""What checkpoints of each family hold on the hub beside their weights; knows nothing of interv.

After the files of gpt2, distilgpt2, EleutherAI/gpt-neo-125M, EleutherAI/gpt-j-6b,
EleutherAI/pythia-70m, facebook/opt-125m, early conversions of Llama, tiiuae/falcon-7b,
bigscience/bloom-560m, state-spaces/mamba-130m-hf, bert-base-uncased, roberta-base,
facebook/esm2_t6_8M_UR50D and Salesforce/blip-image-captioning-base: masks, positions and angles
that older code saved, copies of tied weights, other prefixes, old names of norms, and heads of
other tasks.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

State = dict[str, Tensor]

LAYERS = 3
_MASK = torch.ones(1, 1, 64, 64, dtype=torch.bool).tril()


def _in_blocks(pattern: str, value: Tensor) -> State:
    return {pattern.format(layer): value.clone() for layer in range(LAYERS)}


def _masks(pattern: str) -> State:
    """A causal mask and the number that it writes, in each block."""
    return _in_blocks(f"{pattern}.bias", _MASK) | _in_blocks(
        f"{pattern}.masked_bias", torch.tensor(-1e9)
    )


def _angles(pattern: str) -> State:
    return _in_blocks(pattern + ".inv_freq", 10000.0 ** (-torch.arange(0, 12, 2) / 12))


def _without(prefix: str, state: State) -> State:
    return {key.removeprefix(prefix): value for key, value in state.items()}


def _copy(state: State, head: str, embedding: str) -> State:
    return state | {head: state[embedding].clone()}


def _gpt2(state: State) -> State:
    state |= _masks("transformer.h.{}.attn")
    return _copy(_without("transformer.", state), "lm_head.weight", "wte.weight")


def _gpt_neo(state: State) -> State:
    state |= _masks("transformer.h.{}.attn.attention")
    return _copy(state, "lm_head.weight", "transformer.wte.weight")


def _gpt_neox(state: State) -> State:
    layer = "gpt_neox.layers.{}.attention"
    return state | _masks(layer) | _angles(layer + ".rotary_emb")


def _opt(state: State) -> State:
    state = _without("model.", state) | {"decoder.version": torch.tensor(3.0)}
    return _copy(state, "lm_head.weight", "decoder.embed_tokens.weight")


def _llama(state: State) -> State:
    return state | _angles("model.layers.{}.self_attn.rotary_emb")


def _tied(state: State) -> State:
    return _copy(state, "lm_head.weight", "model.embed_tokens.weight")


def _bloom(state: State) -> State:
    return _without("transformer.", state)


def _falcon(state: State) -> State:
    return _copy(state, "lm_head.weight", "transformer.word_embeddings.weight")


def _mamba(state: State) -> State:
    return _copy(state, "lm_head.weight", "backbone.embeddings.weight")


def _encoder(name: str) -> State:
    width = 48
    return {
        f"{name}.embeddings.position_ids": torch.arange(64)[None],
        f"{name}.pooler.dense.weight": torch.ones(width, width),
        f"{name}.pooler.dense.bias": torch.ones(width),
    }


def _bert(state: State) -> State:
    old = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
    for new, name in old.items():
        state = {key.replace(new, name): value for key, value in state.items()}
    state |= _encoder("bert") | {
        "cls.seq_relationship.weight": torch.ones(2, 48),
        "cls.seq_relationship.bias": torch.ones(2),
    }
    embedding = "bert.embeddings.word_embeddings.weight"
    return _copy(state, "cls.predictions.decoder.weight", embedding)


def _roberta(state: State) -> State:
    state |= _encoder("roberta")
    state = _copy(state, "lm_head.decoder.weight", "roberta.embeddings.word_embeddings.weight")
    return _copy(state, "lm_head.decoder.bias", "lm_head.bias")


def _esm(state: State) -> State:
    layer = "esm.encoder.layer.{}.attention.self.rotary_embeddings"
    return state | _encoder("esm") | _angles(layer)


def _blip(state: State) -> State:
    positions = torch.arange(64)[None]
    state |= {"text_decoder.bert.embeddings.position_ids": positions}
    embedding = "text_decoder.bert.embeddings.word_embeddings.weight"
    return _copy(state, "text_decoder.cls.predictions.decoder.weight", embedding)


AS_ON_THE_HUB: dict[str, Callable[[State], State]] = {
    "gpt2": _gpt2,
    "gpt_neo": _gpt_neo,
    "gptj": lambda state: state | _masks("transformer.h.{}.attn"),
    "gpt_neox": _gpt_neox,
    "gpt_neox_serial": _gpt_neox,
    "opt": _opt,
    **dict.fromkeys(("llama", "mistral", "qwen2", "phi3", "stablelm", "phi"), _llama),
    **dict.fromkeys(("gemma", "gemma2", "gemma3_text", "starcoder2", "cohere"), _tied),
    **dict.fromkeys(("falcon", "falcon_mq", "falcon_alibi"), _falcon),
    "bloom": _bloom,
    "mamba": _mamba,
    "bert": _bert,
    "roberta": _roberta,
    "esm": _esm,
    "blip": _blip,
}
"""By family; those that are not here hold their weights alone."""
