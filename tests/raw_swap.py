"""Swaps of one activation with plain hooks, on the models of `tests/zoo.py`.

Knows nothing of interv.

Written by hand from the modeling sources of transformers 5: for each family, which module a
component is, on which side of it, and which columns. Where the source of a component is not one
side of a module (`resid_mid` of a pre-norm block, `attention_weight`), it is reached another way,
said at the place.
"""

from __future__ import annotations

import contextlib
import itertools
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn

from tests import zoo

Columns = list[list[int]]
"""For each head, the columns of the module's input or output that are the head's, in order."""


@dataclass(frozen=True)
class At:
    """One side of a module; `path` is relative to the block, or to the model with `root`."""

    path: str
    side: Literal["in", "out"]
    columns: Columns | None = None
    root: bool = False
    times: float = 1.0  # what the block multiplies it by before it is the component


@dataclass(frozen=True)
class Stack:
    """The blocks of a family, or of one of its towers, and the components in them."""

    blocks: str
    at: Mapping[str, At]
    mid_read: At | None = None
    """Where the stream between attention and MLP can be read."""
    mid_write: At | None = None
    """What to change so that it becomes another: the stream itself, or what is added to get it."""
    mid_is_sum: bool = True
    """`mid_write` is what is added to the block's input (else it is the stream itself)."""
    heads: int = 0
    attention: str | None = None
    """Module that calls transformers' attention interface, for `attention_weight`."""


# Columns of projections.


def plain(heads: int, width: int, start: int = 0) -> Columns:
    """Heads side by side from column `start`."""
    return [list(range(start + h * width, start + (h + 1) * width)) for h in range(heads)]


def by_head(heads: int, width: int, part: int) -> Columns:
    """Each head has its query, key and value (`part` 0, 1, 2): NeoX, BLOOM, Falcon-RW."""
    return [list(range((3 * h + part) * width, (3 * h + part + 1) * width)) for h in range(heads)]


def by_group(groups: int, queries: int, width: int, part: str) -> Columns:
    """Each group has its queries, then one key, then one value: Falcon's new architecture."""
    group = (queries + 2) * width
    if part == "query":
        starts = [g * group + q * width for g in range(groups) for q in range(queries)]
    else:
        offset = queries * width + (width if part == "value" else 0)
        starts = [g * group + offset for g in range(groups)]
    return [list(range(start, start + width)) for start in starts]


# Components that families share in shape.


def outside(embedding: str, norm: str | None, head: str) -> dict[str, At]:
    found = {
        "token_embedding": At(embedding, "out", root=True),
        "logits": At(head, "out", root=True),
    }
    if norm is not None:
        found["final_norm"] = At(norm, "out", root=True)
    return found


BLOCK = {"block_input": At("", "in"), "block_output": At("", "out")}


def attention(
    module: str,
    projection: str,
    *,
    output: str | None = None,
    residual: str | None = None,
    times: float = 1.0,
) -> dict[str, At]:
    """The sides of the attention module.

    Args:
        projection: the output projection.
        output: the module whose output is attention's own, where that is not `module`.
        residual: a norm that follows.
    """
    return {
        "attention_input": At(module, "in"),
        "attention_output": At(output or module, "out"),
        "attention_residual": At(residual or output or module, "out", times=times),
        "attention_value_output": At(projection, "in"),
    }


def heads_of(
    projection: str,
    query: tuple[str, Columns],
    key: tuple[str, Columns],
    value: tuple[str, Columns],
) -> dict[str, At]:
    """Head components, and the projections as wholes; (module, columns by head) for each."""
    count, width = len(query[1]), len(query[1][0])
    found = {"head_attention_value_output": At(projection, "in", plain(count, width))}
    for word, (path, columns) in {"query": query, "key": key, "value": value}.items():
        found[f"{word}_output"] = At(path, "out", [list(itertools.chain(*columns))])
        found[f"head_{word}_output"] = At(path, "out", columns)
    return found


def separate(prefix: str, names: Sequence[str], heads: int, kv: int, width: int) -> dict[str, At]:
    """Projections that are modules of their own: `names` of query, key, value and output."""
    q, k, v, o = (f"{prefix}.{name}" for name in names)
    return heads_of(o, (q, plain(heads, width)), (k, plain(kv, width)), (v, plain(kv, width)))


def mlp(
    module: str | None,
    first: str,
    down: str | None,
    *,
    output: str | None = None,
    residual: str | None = None,
    gate: str | None = None,
    times: float = 1.0,
) -> dict[str, At]:
    """The MLP; `first` is the module whose input is the MLP's, `down` absent in experts."""
    out = output or module
    assert out is not None
    found = {
        "mlp_input": At(first, "in"),
        "mlp_output": At(out, "out"),
        "mlp_residual": At(residual or out, "out", times=times),
    }
    if down is not None:
        found["mlp_activation"] = At(down, "in")
    if gate is not None:
        found["mlp_gate_activation"] = At(gate, "out")
    return found


QKVO = ("q_proj", "k_proj", "v_proj", "o_proj")


def llama_like(
    heads: int = 4,
    kv: int = 2,
    width: int = 12,
    *,
    experts: bool = False,
    post_norms: bool = False,
    mid: str | None = "post_attention_layernorm",
    act: str = "mlp.act_fn",
    times: float = 1.0,
) -> Stack:
    """Llama and its descendants: `self_attn` and `mlp`, projections apart, a gated MLP.

    Args:
        post_norms: the sub-layers' outputs are normalised before they are added.
        mid: the module whose input is the stream between attention and MLP; None if parallel.
    """
    after_attention = "post_attention_layernorm" if post_norms else None
    after_mlp = "post_feedforward_layernorm" if post_norms else None
    return Stack(
        blocks="model.layers",
        at={
            **outside("model.embed_tokens", "model.norm", "lm_head"),
            **BLOCK,
            **attention("self_attn", "self_attn.o_proj", residual=after_attention, times=times),
            **separate("self_attn", QKVO, heads, kv, width),
            **mlp(
                "mlp",
                "mlp",
                None if experts else "mlp.down_proj",
                residual=after_mlp,
                gate=None if experts else act,
                times=times,
            ),
        },
        mid_read=None if mid is None else At(mid, "in"),
        mid_write=None if mid is None else At(after_attention or "self_attn", "out", times=times),
        heads=heads,
        attention="self_attn",
    )


def _gpt2() -> Stack:
    fused = "attn.c_attn"  # [48 queries | 48 keys | 48 values]
    return Stack(
        blocks="transformer.h",
        at={
            **outside("transformer.wte", "transformer.ln_f", "lm_head"),
            **BLOCK,
            **attention("attn", "attn.c_proj"),
            **heads_of(
                "attn.c_proj",
                (fused, plain(4, 12)),
                (fused, plain(4, 12, 48)),
                (fused, plain(4, 12, 96)),
            ),
            **mlp("mlp", "mlp", "mlp.c_proj"),
        },
        mid_read=At("ln_2", "in"),
        mid_write=At("attn", "out"),
        heads=4,
        attention="attn",
    )


def _gpt_neo() -> Stack:
    inner = "attn.attention"
    return Stack(
        blocks="transformer.h",
        at={
            **outside("transformer.wte", "transformer.ln_f", "lm_head"),
            **BLOCK,
            **attention("attn", f"{inner}.out_proj"),
            **separate(inner, ("q_proj", "k_proj", "v_proj", "out_proj"), 4, 4, 12),
            **mlp("mlp", "mlp", "mlp.c_proj"),
        },
        mid_read=At("ln_2", "in"),
        mid_write=At("attn", "out"),
    )


def _gptj() -> Stack:
    return Stack(
        blocks="transformer.h",
        at={
            **outside("transformer.wte", "transformer.ln_f", "lm_head"),
            **BLOCK,
            **attention("attn", "attn.out_proj"),
            **separate("attn", ("q_proj", "k_proj", "v_proj", "out_proj"), 4, 4, 12),
            **mlp("mlp", "mlp", "mlp.fc_out"),
        },
    )


def _gpt_neox(parallel: bool) -> Stack:
    fused = "attention.query_key_value"
    return Stack(
        blocks="gpt_neox.layers",
        at={
            **outside("gpt_neox.embed_in", "gpt_neox.final_layer_norm", "lm_head"),
            **BLOCK,
            **attention("attention", "attention.dense"),
            **heads_of(
                "attention.dense",
                (fused, by_head(4, 16, 0)),
                (fused, by_head(4, 16, 1)),
                (fused, by_head(4, 16, 2)),
            ),
            **mlp("mlp", "mlp", "mlp.dense_4h_to_h"),
        },
        mid_read=None if parallel else At("post_attention_layernorm", "in"),
        mid_write=None if parallel else At("attention", "out"),
        heads=4,
        attention="attention",
    )


def _opt() -> Stack:
    # No MLP module: the block itself calls `fc1` and `fc2`, on tokens flattened to 2-D.
    return Stack(
        blocks="model.decoder.layers",
        at={
            **outside("model.decoder.embed_tokens", "model.decoder.final_layer_norm", "lm_head"),
            **BLOCK,
            **attention("self_attn", "self_attn.out_proj"),
            **separate("self_attn", ("q_proj", "k_proj", "v_proj", "out_proj"), 4, 4, 12),
            **mlp(None, "fc1", "fc2", output="fc2"),
        },
        mid_read=At("final_layer_norm", "in"),
        mid_write=At("self_attn", "out"),
        heads=4,
        attention="self_attn",
    )


def _phi3() -> Stack:
    fused = "self_attn.qkv_proj"  # [4 queries | 2 keys | 2 values], 12 columns each
    stack = llama_like(act="mlp.activation_fn")
    at = {
        **stack.at,
        **heads_of(
            "self_attn.o_proj",
            (fused, plain(4, 12)),
            (fused, plain(2, 12, 48)),
            (fused, plain(2, 12, 72)),
        ),
    }
    return Stack(stack.blocks, at, stack.mid_read, stack.mid_write, heads=4, attention="self_attn")


def _falcon(query: Columns, key: Columns, value: Columns, parallel: bool) -> Stack:
    fused = "self_attention.query_key_value"
    return Stack(
        blocks="transformer.h",
        at={
            **outside("transformer.word_embeddings", "transformer.ln_f", "lm_head"),
            **BLOCK,
            **attention("self_attention", "self_attention.dense"),
            **heads_of("self_attention.dense", (fused, query), (fused, key), (fused, value)),
            **mlp("mlp", "mlp", "mlp.dense_4h_to_h"),
        },
        mid_read=None if parallel else At("post_attention_layernorm", "in"),
        mid_write=None if parallel else At("self_attention", "out"),
    )


def _bloom() -> Stack:
    # Attention and MLP add the residual themselves: their own outputs are the projections'.
    fused = "self_attention.query_key_value"
    return Stack(
        blocks="transformer.h",
        at={
            **outside("transformer.word_embeddings", "transformer.ln_f", "lm_head"),
            **BLOCK,
            **attention("self_attention", "self_attention.dense", output="self_attention.dense"),
            **heads_of(
                "self_attention.dense",
                (fused, by_head(4, 12, 0)),
                (fused, by_head(4, 12, 1)),
                (fused, by_head(4, 12, 2)),
            ),
            **mlp("mlp", "mlp", "mlp.dense_4h_to_h", output="mlp.dense_4h_to_h"),
        },
        mid_read=At("post_attention_layernorm", "in"),
        mid_write=At("self_attention.dense", "out"),
    )


def _mamba() -> Stack:
    return Stack(
        blocks="backbone.layers",
        at={
            **outside("backbone.embeddings", "backbone.norm_f", "lm_head"),
            **BLOCK,
            "mixer_input": At("mixer", "in"),
            "mixer_output": At("mixer", "out"),
            "mixer_activation": At("mixer.out_proj", "in"),
        },
    )


def _starcoder2() -> Stack:
    stack = llama_like()
    at = {k: v for k, v in stack.at.items() if k != "mlp_gate_activation"}
    at["mlp_activation"] = At("mlp.c_proj", "in")
    return Stack(stack.blocks, at, stack.mid_read, stack.mid_write, heads=4, attention="self_attn")


def _phi() -> Stack:
    # Attention and MLP stand side by side, after one norm.
    return Stack(
        blocks="model.layers",
        at={
            **outside("model.embed_tokens", "model.final_layernorm", "lm_head"),
            **BLOCK,
            **attention("self_attn", "self_attn.dense"),
            **separate("self_attn", ("q_proj", "k_proj", "v_proj", "dense"), 4, 2, 12),
            **mlp("mlp", "mlp", "mlp.fc2"),
        },
        heads=4,
        attention="self_attn",
    )


def bert_like(blocks: str, ends: Mapping[str, At], *, interface: bool, mid: bool) -> Stack:
    """BERT and its descendants: `attention.output` and `output` add the residual.

    Their inputs are read inside (`attention.self`, `intermediate`), where the residual is not.
    """
    return Stack(
        blocks=blocks,
        at={
            **ends,
            **BLOCK,
            **attention(
                "attention.self", "attention.output.dense", output="attention.output.dense"
            ),
            **heads_of(
                "attention.output.dense",
                ("attention.self.query", plain(4, 12)),
                ("attention.self.key", plain(4, 12)),
                ("attention.self.value", plain(4, 12)),
            ),
            **mlp(None, "intermediate", "output.dense", output="output.dense"),
        },
        mid_read=At("attention.output", "out") if mid else None,
        mid_write=At("attention.output", "out") if mid else None,
        mid_is_sum=False,
        heads=4,
        attention="attention.self" if interface else None,
    )


def _blip_vision() -> Stack:
    fused = "self_attn.qkv"  # [32 queries | 32 keys | 32 values]
    return Stack(
        blocks="vision_model.encoder.layers",
        at={
            **BLOCK,
            "final_norm": At("vision_model.post_layernorm", "out", root=True),
            **attention("self_attn", "self_attn.projection"),
            **heads_of(
                "self_attn.projection",
                (fused, plain(4, 8)),
                (fused, plain(4, 8, 32)),
                (fused, plain(4, 8, 64)),
            ),
            **mlp("mlp", "mlp", "mlp.fc2"),
        },
        mid_read=At("layer_norm2", "in"),
        mid_write=At("self_attn", "out"),
    )


STACKS: dict[str, Stack] = {
    "gpt2": _gpt2(),
    "gpt_neo": _gpt_neo(),
    "gptj": _gptj(),
    "gpt_neox": _gpt_neox(parallel=True),
    "gpt_neox_serial": _gpt_neox(parallel=False),
    "opt": _opt(),
    "llama": llama_like(),
    "mistral": llama_like(),
    "mixtral": llama_like(experts=True),
    "qwen2": llama_like(),
    "qwen3": llama_like(width=16),
    "qwen2_moe": llama_like(experts=True),
    "qwen3_moe": llama_like(width=16, experts=True),
    "gemma": llama_like(width=16),
    "gemma2": llama_like(width=16, post_norms=True, mid="pre_feedforward_layernorm"),
    "gemma3_text": llama_like(width=16, post_norms=True, mid="pre_feedforward_layernorm"),
    "phi3": _phi3(),
    "olmo": llama_like(),
    "olmo2": llama_like(post_norms=True, mid="mlp"),
    "gpt_oss": llama_like(width=16, experts=True),
    "falcon": _falcon(
        by_group(2, 2, 12, "query"),
        by_group(2, 2, 12, "key"),
        by_group(2, 2, 12, "value"),
        parallel=True,
    ),
    # [4 queries | 1 key | 1 value]
    "falcon_mq": _falcon(plain(4, 12), plain(1, 12, 48), plain(1, 12, 60), parallel=True),
    "falcon_alibi": _falcon(
        by_head(4, 12, 0), by_head(4, 12, 1), by_head(4, 12, 2), parallel=False
    ),
    "bloom": _bloom(),
    "mamba": _mamba(),
    "stablelm": llama_like(width=16),
    "starcoder2": _starcoder2(),
    "cohere": llama_like(mid=None),
    "granite": llama_like(times=0.4),
    "phi": _phi(),
    "bert": bert_like(
        "bert.encoder.layer",
        outside("bert.embeddings.word_embeddings", None, "cls"),
        interface=True,
        mid=True,
    ),
    "roberta": bert_like(
        "roberta.encoder.layer",
        outside("roberta.embeddings.word_embeddings", None, "lm_head"),
        interface=True,
        mid=True,
    ),
    "esm": bert_like(
        "esm.encoder.layer",
        outside("esm.embeddings.word_embeddings", "esm.encoder.emb_layer_norm_after", "lm_head"),
        interface=True,
        mid=True,
    ),
    # Cross-attention stands between attention and MLP, so there is no one `resid_mid`.
    "blip": bert_like(
        "text_decoder.bert.encoder.layer",
        outside("text_decoder.bert.embeddings.word_embeddings", None, "text_decoder.cls"),
        interface=False,
        mid=False,
    ),
}
VISION_STACKS: dict[str, Stack] = {"blip": _blip_vision()}
UNPREFIXED = ("token_embedding", "logits")
"""Names that BLIP's components keep as they are; the others have the tower before them."""


def _own(stack: Stack) -> tuple[str, ...]:
    extra = (["resid_mid"] if stack.mid_read else []) + (
        ["attention_weight"] if stack.attention else []
    )
    return (*stack.at, *extra)


def components(name: str) -> tuple[str, ...]:
    """Every component that the family has."""
    text = _own(STACKS[name])
    if name not in VISION_STACKS:
        return text
    return (
        *(c if c in UNPREFIXED else f"text_{c}" for c in text),
        *(f"vision_{c}" for c in _own(VISION_STACKS[name])),
    )


def has_layer(component: str) -> bool:
    """Whether the component is one of a block's."""
    return component.removeprefix("vision_").removeprefix("text_") not in (
        "token_embedding",
        "final_norm",
        "logits",
    )


def head_count(name: str, component: str) -> int | None:
    """How many heads the component counts; None where it has no heads."""
    stack, word = _find(name, component)
    if word == "attention_weight":
        return stack.heads
    columns = stack.at[word].columns if word.startswith("head_") else None
    return None if columns is None else len(columns)


def _find(name: str, component: str) -> tuple[Stack, str]:
    if component not in components(name):
        raise KeyError(f"{name} has no {component}")
    if name not in VISION_STACKS:
        return STACKS[name], component
    if component.startswith("vision_"):
        return VISION_STACKS[name], component.removeprefix("vision_")
    return STACKS[name], component.removeprefix("text_")


# Hooks.


def _module(model: nn.Module, stack: Stack, at: At, layer: int) -> nn.Module:
    block = f"{stack.blocks}.{layer}"
    path = at.path if at.root else f"{block}.{at.path}" if at.path else block
    return model.get_submodule(path)


@dataclass
class _Watch:
    """Calls `edit` with a private copy `[pos, width]` of a module's input or output.

    `first` puts it before the hooks that are there, which then see what it wrote.
    """

    module: nn.Module
    side: str
    edit: Callable[[Tensor], Tensor | None]
    first: bool = False
    fired: int = 0
    handles: list[torch.utils.hooks.RemovableHandle] = field(default_factory=list)

    def __enter__(self) -> _Watch:
        if self.side == "in":
            handle = self.module.register_forward_pre_hook(
                self._before, with_kwargs=True, prepend=self.first
            )
        else:
            handle = self.module.register_forward_hook(self._after, prepend=self.first)
        self.handles.append(handle)
        return self

    def __exit__(self, *error: object) -> None:
        for handle in self.handles:
            handle.remove()
        if error[0] is None and self.fired != 1:
            raise RuntimeError(f"the hook fired {self.fired} times")

    def _new(self, value: Tensor) -> Tensor | None:
        # The copy matters: Falcon, OLMo and BLIP change such tensors in place later on.
        rows = value.detach().clone()
        flat = rows if rows.dim() == 2 else rows[0]
        if rows.dim() == 3 and len(rows) != 1:
            raise ValueError("one prompt at a time")
        changed = self.edit(flat)
        return None if changed is None else changed.reshape(value.shape)

    def _before(
        self, _module: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]
    ) -> tuple[tuple[object, ...], dict[str, object]] | None:
        self.fired += 1
        value = args[0] if args else kwargs["hidden_states"]
        assert isinstance(value, Tensor)
        new = self._new(value)
        if new is None:
            return None
        if args:
            return (new, *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": new}

    def _after(self, module: nn.Module, _args: object, output: object) -> object:
        value = output[0] if isinstance(output, tuple) else output
        assert isinstance(value, Tensor)
        if value.dim() == 2 and isinstance(module, nn.LayerNorm) and len(value) == 1:
            return None  # BLIP's `post_layernorm` runs a second time, on the pooled vector
        self.fired += 1
        new = self._new(value)
        if new is None:
            return None
        return (new, *output[1:]) if isinstance(output, tuple) else new


def _forward(
    name: str, model: nn.Module, ids: Sequence[int], extras: Mapping[str, Tensor] | None
) -> Tensor:
    """Logits `[pos, vocab]` of one prompt."""
    more = zoo.extras(name) if extras is None else extras
    dtype = next(model.parameters()).dtype
    with torch.no_grad():
        output = model(
            input_ids=torch.tensor([list(ids)]), **{k: v.to(dtype) for k, v in more.items()}
        )
    logits: Tensor = output.logits[0]
    return logits


def _read(model: nn.Module, stack: Stack, at: At, layer: int, run: Callable[[], object]) -> Tensor:
    """What stands at the place, `[pos, width]`, or `[pos, head, head_width]` of several heads."""
    kept: list[Tensor] = []

    def keep(rows: Tensor) -> None:
        kept.append(rows)

    with _Watch(_module(model, stack, at, layer), at.side, keep):
        run()
    rows = kept[0]
    if at.columns is not None:
        rows = torch.stack([rows[:, columns] for columns in at.columns], 1)
    return rows * at.times if at.times != 1.0 else rows


def capture(
    model: nn.Module,
    name: str,
    component: str,
    layer: int,
    ids: Sequence[int],
    extras: Mapping[str, Tensor] | None = None,
) -> Tensor:
    """The component's activation on one prompt.

    Args:
        layer: not looked at by components that have none.
        extras: what else the forward takes; by default `zoo.extras(name)`.

    Returns:
        `[pos, width]`; `[pos, head, head_width]` of a head component; `[head, query, key]` of
        `attention_weight`.
    """
    stack, word = _find(name, component)

    def run() -> Tensor:
        return _forward(name, model, ids, extras)

    if word == "attention_weight":
        kept: list[Tensor] = []
        with _own_attention(model, stack, layer, lambda pattern: kept.append(pattern.clone())):
            run()
        return kept[0]
    if word == "resid_mid":
        assert stack.mid_read is not None
        return _read(model, stack, stack.mid_read, layer, run)
    rows = _read(model, stack, stack.at[word], layer, run)
    return rows if word.startswith("head_") else rows.flatten(1)


def swapped_logits(
    model: nn.Module,
    name: str,
    component: str,
    layer: int,
    ids: Sequence[int],
    source: Tensor,
    positions: Sequence[int],
    heads: Sequence[int] | None = None,
    source_positions: Sequence[int] | None = None,
    extras: Mapping[str, Tensor] | None = None,
) -> Tensor:
    """Logits `[pos, vocab]` of one forward in which an activation is replaced at some positions.

    Args:
        source: another run's activation, laid out as `capture` returns it.
        positions: where in the base; of queries, for `attention_weight`.
        heads: which of a head component's heads; all by default.
        source_positions: the rows of `source` to take; those of `positions` by default.
    """
    stack, word = _find(name, component)
    count = head_count(name, component)
    if heads is not None and count is None:
        raise ValueError(f"{component} has no heads")
    chosen = range(count or 1) if heads is None else heads
    pairs = list(zip(positions, source_positions or positions, strict=True))

    def run() -> Tensor:
        return _forward(name, model, ids, extras)

    if word == "attention_weight":

        def put(pattern: Tensor) -> None:
            for head in chosen:
                for position, row in pairs:
                    pattern[head, position] = source[head, row]

        with _own_attention(model, stack, layer, put):
            return run()

    if word == "resid_mid":
        assert stack.mid_write is not None
        at = stack.mid_write
        # Of a sum, the other term is the block's input, which goes by earlier in the forward.
        seen: list[Tensor] = []

        def shift(rows: Tensor) -> Tensor:
            for position, row in pairs:
                wanted = source[row] - seen[0][position] if stack.mid_is_sum else source[row]
                rows[position] = wanted / at.times
            return rows

        block = _Watch(_module(model, stack, At("", "in"), layer), "in", seen.append)
        with block, _Watch(_module(model, stack, at, layer), at.side, shift, first=True):
            return run()

    at = stack.at[word]

    def write(rows: Tensor) -> Tensor:
        for position, row in pairs:
            if at.columns is None:
                rows[position] = source[row] / at.times
            elif count is None:
                rows[position, at.columns[0]] = source[row]
            else:
                for head in chosen:
                    rows[position, at.columns[head]] = source[row, head]
        return rows

    with _Watch(_module(model, stack, at, layer), at.side, write, first=True):
        return run()


# The attention pattern.


@contextlib.contextmanager
def _own_attention(
    model: nn.Module, stack: Stack, layer: int, edit: Callable[[Tensor], None]
) -> Iterator[None]:
    """Runs the model with attention written out here; `edit` gets the layer's pattern, in place.

    The pattern is `[head, query, key]`, after the softmax; the values are multiplied by it.
    """
    assert stack.attention is not None
    wanted = model.get_submodule(f"{stack.blocks}.{layer}.{stack.attention}")
    fired = 0

    def attend(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        scaling: float,
        softcap: float | None = None,
        s_aux: Tensor | None = None,
        **_: object,
    ) -> tuple[Tensor, Tensor]:
        nonlocal fired
        share = query.shape[1] // key.shape[1]
        patterns = []
        for head in range(query.shape[1]):
            scores = query[0, head] @ key[0, head // share].T * scaling
            if softcap is not None:
                scores = softcap * torch.tanh(scores / softcap)
            if attention_mask is not None:
                scores = scores + attention_mask[0, 0]
            elif module.is_causal:
                raise RuntimeError("no mask was made")
            if s_aux is not None:
                sink = s_aux[head].expand(len(scores), 1)
                scores = torch.cat([scores, sink], dim=1)
            pattern = torch.softmax(scores, dim=1)
            patterns.append(pattern[:, : key.shape[2]])
        weights = torch.stack(patterns)
        if module is wanted:
            fired += 1
            edit(weights)
        outputs = [w @ value[0, head // share] for head, w in enumerate(weights)]
        return torch.stack(outputs, 1)[None], weights[None]

    modeling = sys.modules[type(wanted).__module__]
    before, implementation = modeling.eager_attention_forward, model.config._attn_implementation
    modeling.eager_attention_forward = attend
    model.config._attn_implementation = "eager"
    try:
        yield
    finally:
        modeling.eager_attention_forward = before
        model.config._attn_implementation = implementation
    if fired != 1:
        raise RuntimeError(f"the layer's attention ran {fired} times")


# The check of this file by itself.


def _gap(one: Tensor, two: Tensor) -> float:
    return (one - two).abs().max().item()


def _swaps(name: str, model: nn.Module, component: str, layer: int) -> str:
    """What a self-swap and a swap of another prompt's activation do, and the faults in it."""
    base, place = zoo.ids(0), 3
    plain_logits = _forward(name, model, base, None)
    own = capture(model, name, component, layer, base)
    source = capture(model, name, component, layer, zoo.ids(1), zoo.extras(name, 1))
    pattern = component == "attention_weight"
    heads = head_count(name, component)

    def swap(rows: Tensor, at: Sequence[int], only: Sequence[int] | None = None) -> Tensor:
        return swapped_logits(model, name, component, layer, base, rows, at, only)

    def effect(logits: Tensor) -> Tensor:
        return (logits - plain_logits).abs().amax(1)

    # Attention written out here is float64 where some families' own softmax is float32.
    close = 1e-6 if pattern else 1e-12
    faults = []
    same = effect(swap(own, range(own.shape[1] if pattern else len(own)))).max().item()
    if same > close:
        faults.append("SELF-SWAP")
    after = effect(swap(source, [place]))
    if name not in zoo.ENCODERS and not component.startswith("vision_"):
        if after[:place].max() > close:
            faults.append("BEFORE")
        after = after[place:]
    weakest = [effect(swap(source, [place], [h])).max().item() for h in range(heads or 0)]
    if min([after.max().item(), *weakest]) < 1e-4:
        faults.append("NO EFFECT")
    if not pattern:
        # Read back while it is swapped: the source's at the place, as it was elsewhere.
        stack, word = _find(name, component)
        at = stack.mid_read if word == "resid_mid" else stack.at[word]
        assert at is not None
        back = _read(model, stack, at, layer, lambda: swap(source, [place]))
        back = back.reshape(own.shape)
        expected = own.clone()
        expected[place] = source[place]
        if _gap(back, expected) > 1e-12:
            faults.append("READ BACK")
    few = f" weakest head {min(weakest):.3f}" if weakest else ""
    return (
        f"{name:16}{component:32}{layer} {tuple(own.shape)!s:14} self {same:.0e}"
        f" effect {after.max().item():.3f}{few} {' '.join(faults)}"
    )


def _sums(name: str, model: nn.Module, prefix: str, layer: int) -> str:
    """Whether what is added to the stream adds up to it, wherever no norm stands between."""

    def get(word: str) -> Tensor:
        return capture(model, name, prefix + word, layer, zoo.ids(0))

    middle = get("block_input") + get("attention_residual")
    gaps = []
    if f"{prefix}resid_mid" in components(name):
        gaps.append(_gap(get("resid_mid"), middle))
    gaps.append(_gap(get("block_output"), middle + get("mlp_residual")))
    return f"{name:16}{prefix}sums {layer} {max(gaps):.0e} {'SUM' if max(gaps) > 1e-12 else ''}"


def _heads(name: str, model: nn.Module, prefix: str, layer: int) -> str:
    """Whether each head's columns are its own.

    A query changes its own head and position alone, a key its group's heads from its position
    on, and a group without values leaves nothing in its heads; where the pattern is to be had,
    it times the values is the value output.
    """
    base, place, faults = zoo.ids(0), 2, []
    stack, _ = _find(name, f"{prefix}block_input")
    here = stack.at["head_attention_value_output"]
    clean = capture(model, name, f"{prefix}head_attention_value_output", layer, base)
    share = clean.shape[1] // (head_count(name, f"{prefix}head_key_output") or 0)
    causal = name not in zoo.ENCODERS and prefix != "vision_"

    def under(word: str, head: int, rows: Tensor, positions: Sequence[int]) -> Tensor:
        full = f"{prefix}head_{word}_output"
        return _read(
            model,
            stack,
            here,
            layer,
            lambda: swapped_logits(model, name, full, layer, base, rows, positions, [head]),
        )

    for word in ("query", "key", "value"):
        rows = capture(model, name, f"{prefix}head_{word}_output", layer, base)
        for head in range(rows.shape[1]):
            mine = (
                range(head, head + 1)
                if word == "query"
                else range(head * share, (head + 1) * share)
            )
            if word != "query":
                empty = under(word, head, torch.zeros_like(rows), range(len(rows)))
                zero = {h for h in range(clean.shape[1]) if not empty[:, h].any()}
                if zero != (set(mine) if word == "value" else set()):
                    faults.append(f"ZERO {word.upper()} {head}")
            if word == "value":
                continue
            moved = (under(word, head, -rows, [place]) - clean).abs().amax(2) > 1e-9
            others = [h for h in range(clean.shape[1]) if h not in mine]
            if moved[:, others].any() or not moved[:, list(mine)].any(0).all():
                faults.append(f"{word.upper()} {head}")
            elsewhere = [p for p in range(len(clean)) if p != place]
            if word == "query" and moved[elsewhere].any():
                faults.append(f"QUERY POSITION {head}")
            if word == "key" and not moved[elsewhere].any():
                faults.append(f"KEY POSITION {head}")
            if word == "key" and causal and moved[:place].any():
                faults.append(f"KEY BEFORE {head}")
    if f"{prefix}attention_weight" in components(name):
        pattern = capture(model, name, f"{prefix}attention_weight", layer, base)
        values = capture(model, name, f"{prefix}head_value_output", layer, base)
        if name == "olmo":
            values = values.clamp(-2.0, 2.0)  # `clip_qkv`, after the projection
        made = torch.einsum("hqk,khd->qhd", pattern, values.repeat_interleave(share, 1))
        if _gap(made, clean) > 1e-5:
            faults.append("PATTERN")
    return f"{name:16}{prefix}heads {layer} {' '.join(faults)}"


def _check(name: str) -> Iterator[str]:
    """One line for each site, and for each layer what holds between its components."""
    model = zoo.make(name)
    have = components(name)
    for component in have:
        for layer in range(zoo.LAYERS) if has_layer(component) else (0,):
            yield _swaps(name, model, component, layer)
    for prefix in ("text_", "vision_") if name in zoo.VISION else ("",):
        normed_after = name in ("bert", "roberta") or prefix == "text_"
        for layer in range(zoo.LAYERS):
            if f"{prefix}attention_residual" in have and not normed_after:
                yield _sums(name, model, prefix, layer)
            if f"{prefix}head_key_output" in have:
                yield _heads(name, model, prefix, layer)


def main(names: Sequence[str]) -> int:
    torch.set_num_threads(1)
    lines = [line for name in names or zoo.CONFIGS for line in _check(name)]
    print("\n".join(lines))
    bad = [line for line in lines if any(word.isupper() for word in line.split())]
    print(f"{len(lines)} checks, {len(bad)} with a fault", *bad, sep="\n")
    return bool(bad)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
