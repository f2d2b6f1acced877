"""Model families as data: where each component stands in a model.

A component is one side of a module, perhaps only some columns of it (queries, keys and values
often share one projection). Paths are relative to the block; those of components without a
layer are from the model's root. The components are pyvene's, with these definitions:

- `mlp_activation` is the input of the down projection (the neurons), on gated MLPs too;
  `mlp_gate_activation` is the gate's activation.
- `attention_output` and `mlp_output` are what the sub-layer computes, before anything is added;
  `attention_residual` and `mlp_residual` what is added to the residual stream, which is another
  thing where a norm follows the sub-layer (Gemma 2 and 3, OLMo 2).
- `resid_mid` is the stream between attention and MLP; parallel blocks have none.
- `query_output`, `key_output` and `value_output` are the projections' outputs, before norms and
  rotary angles; `attention_value_output` is the input of the output projection; `head_...` are
  the same by head (key and value heads as many as the model has of them).
- `attention_weight` is the pattern, after the softmax, that multiplies the values.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

Side = Literal["input", "output"]
Width = Literal["d_model", "d_mlp", "query", "key", "value", "pattern", "vocab"]
Fused = Literal["", "concat", "grouped"]
Reach = Literal["positions", "layers", "nothing"]

HEAD_PREFIX = "head_"
LAYERLESS = ("token_embedding", "final_norm", "logits")


@dataclass(frozen=True)
class Stand:
    """Where a component stands.

    Attributes:
        path: of the module; empty for the block itself.
        side: of the module.
        width: what its columns are; query, key, value and pattern are divided into heads.
        fused: how queries, keys and values share a projection's output: one after the other,
            or for each key head its queries, its key and its value.
        shared: the residual stream is the same tensor, and changes with it.
        needs: a field of the config and the value without which the component is not there.
    """

    path: str
    side: Side = "output"
    width: Width = "d_model"
    fused: Fused = ""
    shared: bool = False
    needs: tuple[str, Any] | None = None


@dataclass(frozen=True)
class Family:
    """One row of the table.

    Attributes:
        name: as people say it.
        model_types: as config.json says it.
        blocks: path of the list of blocks; of each tower's where there are several, by the
            prefix of its components.
        components: of one block.
        layerless: components of the whole model.
        causal: attention looks left only.
        interface: attention goes through transformers' attention functions, so that the
            pattern can be changed and a row can start at its first changed position.
        auto: the class of transformers that loads it.
        defaults: fields that a config.json may leave out, as transformers fills them in.
        note: what is otherwise than elsewhere.
    """

    name: str
    model_types: tuple[str, ...]
    blocks: str | Mapping[str, str]
    components: Mapping[str, Stand]
    layerless: Mapping[str, Stand]
    causal: bool = True
    interface: bool = True
    auto: str = "AutoModelForCausalLM"
    defaults: Mapping[str, Any] = field(default_factory=dict)
    note: str = ""

    @property
    def reach(self) -> Reach:
        """Where the suffix executor can start a row: at a layer, or also at a position."""
        if not isinstance(self.blocks, str):
            return "nothing"
        return "positions" if self.causal and self.interface else "layers"


def _attention(
    path: str,
    project: str,
    qkv: tuple[str, str, str] | str,
    *,
    fused: Fused = "",
    added: bool = False,
    residual: str | None = None,
    pattern: bool = True,
) -> dict[str, Stand]:
    """Components of an attention module.

    Args:
        path: the module.
        project: its output projection.
        qkv: its projections, or the one that they share.
        fused: how they share it.
        added: the module adds the residual itself.
        residual: the norm that follows, if one does.
        pattern: whether its pattern can be changed.
    """
    query, key, value = (qkv, qkv, qkv) if isinstance(qkv, str) else qkv
    output = Stand(project) if added else Stand(path)
    components = {
        "attention_input": Stand(path, "input"),
        "attention_output": output,
        "attention_residual": Stand(residual) if residual else output,
        "attention_value_output": Stand(project, "input", "query"),
        "query_output": Stand(query, width="query", fused=fused),
        "key_output": Stand(key, width="key", fused=fused),
        "value_output": Stand(value, width="value", fused=fused),
    }
    by_head = ("attention_value_output", "query_output", "key_output", "value_output")
    components |= {HEAD_PREFIX + name: components[name] for name in by_head}
    if pattern:
        components["attention_weight"] = Stand(path, width="pattern")
    return components


def _mlp(
    path: str,
    down: str | None,
    *,
    up: str | None = None,
    gate: str | None = None,
    added: bool = False,
    residual: str | None = None,
) -> dict[str, Stand]:
    """Components of an MLP; without a down projection those of a mixture of experts.

    Args:
        path: the module; empty where the block has the projections itself.
        down: its down projection.
        up: where its input is read, unless at the module.
        gate: its gate's activation function.
        added: the module adds the residual itself, or there is no such module.
        residual: the norm that follows, if one does.
    """
    output = Stand(down) if added and down else Stand(path)
    components = {
        "mlp_input": Stand(up or path, "input"),
        "mlp_output": output,
        "mlp_residual": Stand(residual) if residual else output,
    }
    if down:
        components["mlp_activation"] = Stand(down, "input", "d_mlp")
    if gate:
        components["mlp_gate_activation"] = Stand(gate, width="d_mlp")
    return components


def _middle(path: str, *needs: Any, side: Side = "input") -> dict[str, Stand]:
    """The stream between attention and MLP, where the path's module reads (or makes) it."""
    condition = (needs[0], needs[1]) if needs else None
    return {"resid_mid": Stand(path, side, shared=side == "input", needs=condition)}


def _whole(embedding: str, norm: str | None, head: str) -> dict[str, Stand]:
    layerless = {"token_embedding": Stand(embedding), "logits": Stand(head, width="vocab")}
    if norm:
        layerless["final_norm"] = Stand(norm)
    return layerless


_STREAM = {"block_input": Stand("", "input"), "block_output": Stand("")}
_SEPARATE = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
_WHOLE = _whole("model.embed_tokens", "model.norm", "lm_head")
_LLAMA_ATTENTION = _attention("self_attn", "self_attn.o_proj", _SEPARATE)
_LLAMA_MLP = _mlp("mlp", "mlp.down_proj", gate="mlp.act_fn")
_LLAMA_MIDDLE = _middle("post_attention_layernorm")

LLAMA = Family(
    "Llama",
    ("llama",),
    "model.layers",
    {**_STREAM, **_LLAMA_ATTENTION, **_LLAMA_MLP, **_LLAMA_MIDDLE},
    _WHOLE,
)
_EXPERTS = replace(
    LLAMA,
    components={**_STREAM, **_LLAMA_ATTENTION, **_mlp("mlp", None), **_LLAMA_MIDDLE},
    note="a mixture of experts has no single neurons: no mlp_activation",
)
_GEMMA_2 = replace(
    LLAMA,
    name="Gemma 2",
    model_types=("gemma2",),
    components={
        **_STREAM,
        **_attention(
            "self_attn", "self_attn.o_proj", _SEPARATE, residual="post_attention_layernorm"
        ),
        **_mlp("mlp", "mlp.down_proj", gate="mlp.act_fn", residual="post_feedforward_layernorm"),
        **_middle("pre_feedforward_layernorm"),
    },
    defaults={"head_dim": 256},
)


def _bert(
    blocks: str, embedding: str, head: str, norm: str | None = None, **options: Any
) -> Family:
    """BERT and its kin: attention and MLP add the residual themselves."""
    qkv = ("attention.self.query", "attention.self.key", "attention.self.value")
    return Family(
        blocks=blocks,
        components={
            **_STREAM,
            **_attention("attention.self", "attention.output.dense", qkv, added=True),
            **_mlp("", "output.dense", up="intermediate", added=True),
            **_middle("attention.output", side="output"),
        },
        layerless=_whole(embedding, norm, head),
        causal=False,
        auto="AutoModelForMaskedLM",
        note="" if norm else "the residual stream is what follows each norm",
        **options,
    )


_BLIP_TEXT = {
    **_STREAM,
    **_attention(
        "attention.self",
        "attention.output.dense",
        ("attention.self.query", "attention.self.key", "attention.self.value"),
        added=True,
        pattern=False,
    ),
    **_mlp("", "output.dense", up="intermediate", added=True),
}
_BLIP_VISION = {
    **_STREAM,
    **_attention(
        "self_attn", "self_attn.projection", "self_attn.qkv", fused="concat", pattern=False
    ),
    **_mlp("mlp", "mlp.fc2"),
    **_middle("layer_norm2"),
}

FAMILIES = (
    Family(
        "GPT-2",
        ("gpt2",),
        "transformer.h",
        {
            **_STREAM,
            **_attention("attn", "attn.c_proj", "attn.c_attn", fused="concat"),
            **_mlp("mlp", "mlp.c_proj"),
            **_middle("ln_2"),
        },
        _whole("transformer.wte", "transformer.ln_f", "lm_head"),
    ),
    Family(
        "GPT-Neo",
        ("gpt_neo",),
        "transformer.h",
        {
            **_STREAM,
            **_attention(
                "attn",
                "attn.attention.out_proj",
                ("attn.attention.q_proj", "attn.attention.k_proj", "attn.attention.v_proj"),
                pattern=False,
            ),
            **_mlp("mlp", "mlp.c_proj"),
            **_middle("ln_2"),
        },
        _whole("transformer.wte", "transformer.ln_f", "lm_head"),
        interface=False,
    ),
    Family(
        "GPT-J",
        ("gptj",),
        "transformer.h",
        {
            **_STREAM,
            **_attention(
                "attn",
                "attn.out_proj",
                ("attn.q_proj", "attn.k_proj", "attn.v_proj"),
                pattern=False,
            ),
            **_mlp("mlp", "mlp.fc_out"),
        },
        _whole("transformer.wte", "transformer.ln_f", "lm_head"),
        interface=False,
        note="parallel blocks: no resid_mid",
    ),
    Family(
        "GPT-NeoX, Pythia",
        ("gpt_neox",),
        "gpt_neox.layers",
        {
            **_STREAM,
            **_attention(
                "attention", "attention.dense", "attention.query_key_value", fused="grouped"
            ),
            **_mlp("mlp", "mlp.dense_4h_to_h"),
            **_middle("post_attention_layernorm", "use_parallel_residual", False),
        },
        _whole("gpt_neox.embed_in", "gpt_neox.final_layer_norm", "lm_head"),
        defaults={"use_parallel_residual": True},
    ),
    Family(
        "OPT",
        ("opt",),
        "model.decoder.layers",
        {
            **_STREAM,
            **_attention("self_attn", "self_attn.out_proj", _SEPARATE),
            **_mlp("", "fc2", up="fc1", added=True),
            **_middle("final_layer_norm", "do_layer_norm_before", True),
        },
        {
            **_whole("model.decoder.embed_tokens", None, "lm_head"),
            "final_norm": Stand(
                "model.decoder.final_layer_norm", needs=("do_layer_norm_before", True)
            ),
        },
        defaults={"do_layer_norm_before": True},
    ),
    LLAMA,
    replace(LLAMA, name="Mistral", model_types=("mistral",), defaults={"num_key_value_heads": 8}),
    replace(
        _EXPERTS, name="Mixtral", model_types=("mixtral",), defaults={"num_key_value_heads": 8}
    ),
    replace(LLAMA, name="Qwen 2", model_types=("qwen2",), defaults={"num_key_value_heads": 32}),
    replace(
        LLAMA,
        name="Qwen 3",
        model_types=("qwen3",),
        defaults={"num_key_value_heads": 32, "head_dim": 128},
    ),
    replace(
        _EXPERTS,
        name="Qwen 2 MoE",
        model_types=("qwen2_moe",),
        defaults={"num_key_value_heads": 16},
    ),
    replace(
        _EXPERTS, name="Qwen 3 MoE", model_types=("qwen3_moe",), defaults={"num_key_value_heads": 4}
    ),
    replace(
        LLAMA,
        name="Gemma",
        model_types=("gemma",),
        defaults={"head_dim": 256, "num_key_value_heads": 16},
    ),
    replace(_GEMMA_2, defaults={"head_dim": 256, "num_key_value_heads": 4}),
    replace(
        _GEMMA_2,
        name="Gemma 3",
        model_types=("gemma3_text",),
        defaults={"head_dim": 256, "num_key_value_heads": 4},
    ),
    replace(
        LLAMA,
        name="Phi 3",
        model_types=("phi3",),
        components={
            **_STREAM,
            **_attention("self_attn", "self_attn.o_proj", "self_attn.qkv_proj", fused="concat"),
            **_mlp("mlp", "mlp.down_proj", gate="mlp.activation_fn"),
            **_LLAMA_MIDDLE,
        },
    ),
    replace(LLAMA, name="OLMo", model_types=("olmo",)),
    replace(
        LLAMA,
        name="OLMo 2",
        model_types=("olmo2",),
        components={
            **_STREAM,
            **_attention(
                "self_attn", "self_attn.o_proj", _SEPARATE, residual="post_attention_layernorm"
            ),
            **_mlp(
                "mlp", "mlp.down_proj", gate="mlp.act_fn", residual="post_feedforward_layernorm"
            ),
            **_middle("mlp"),
        },
    ),
    replace(
        _EXPERTS,
        name="gpt-oss",
        model_types=("gpt_oss",),
        defaults={"head_dim": 64, "num_key_value_heads": 8},
    ),
    Family(
        "Falcon",
        ("falcon",),
        "transformer.h",
        {
            **_STREAM,
            **_attention(
                "self_attention",
                "self_attention.dense",
                "self_attention.query_key_value",
                fused="grouped",
                pattern=False,
            ),
            **_mlp("mlp", "mlp.dense_4h_to_h"),
            **_middle("post_attention_layernorm", "parallel_attn", False),
        },
        _whole("transformer.word_embeddings", "transformer.ln_f", "lm_head"),
        interface=False,
        defaults={"parallel_attn": True},
    ),
    Family(
        "BLOOM",
        ("bloom",),
        "transformer.h",
        {
            **_STREAM,
            **_attention(
                "self_attention",
                "self_attention.dense",
                "self_attention.query_key_value",
                fused="grouped",
                added=True,
                pattern=False,
            ),
            **_mlp("mlp", "mlp.dense_4h_to_h", added=True),
            **_middle(
                "post_attention_layernorm", "apply_residual_connection_post_layernorm", False
            ),
        },
        _whole("transformer.word_embeddings", "transformer.ln_f", "lm_head"),
        interface=False,
        defaults={"apply_residual_connection_post_layernorm": False},
    ),
    Family(
        "Mamba",
        ("mamba",),
        "backbone.layers",
        {
            **_STREAM,
            "mixer_input": Stand("mixer", "input"),
            "mixer_activation": Stand("mixer.out_proj", "input", "d_mlp"),
            "mixer_output": Stand("mixer"),
        },
        _whole("backbone.embeddings", "backbone.norm_f", "lm_head"),
        interface=False,
        note="no attention: its state carries from position to position",
    ),
    _bert(
        "bert.encoder.layer",
        "bert.embeddings.word_embeddings",
        "cls.predictions.decoder",
        name="BERT",
        model_types=("bert",),
    ),
    _bert(
        "roberta.encoder.layer",
        "roberta.embeddings.word_embeddings",
        "lm_head.decoder",
        name="RoBERTa",
        model_types=("roberta",),
    ),
    _bert(
        "esm.encoder.layer",
        "esm.embeddings.word_embeddings",
        "lm_head",
        "esm.encoder.emb_layer_norm_after",
        name="ESM",
        model_types=("esm",),
    ),
    Family(
        "BLIP",
        ("blip",),
        {"text_": "text_decoder.bert.encoder.layer", "vision_": "vision_model.encoder.layers"},
        {
            **{f"text_{name}": stand for name, stand in _BLIP_TEXT.items()},
            **{f"vision_{name}": stand for name, stand in _BLIP_VISION.items()},
        },
        _whole(
            "text_decoder.bert.embeddings.word_embeddings",
            None,
            "text_decoder.cls.predictions.decoder",
        ),
        interface=False,
        auto="AutoModelForImageTextToText",
        note="pixels and text come from Python only",
    ),
)

BY_MODEL_TYPE: dict[str, Family] = {t: f for f in FAMILIES for t in f.model_types}
