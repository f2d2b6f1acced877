"""Recognising a causal model that no row of the table knows, by names and by arithmetic.

Blocks, attention and MLP go by the names that `transformers` uses; then one forward of a few
tokens checks what was found, and what does not add up is left out: heads by their widths, the
residual stream by its sums.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from interv.engine.attention import routing
from interv.engine.hooks import visiting
from interv.errors import EngineError, ModelError
from interv.models.anatomy import Anatomy, Place
from interv.models.config import ModelFacts, read_facts
from interv.models.families import Family, Stand, Width

_ATTENTION = ("self_attn", "attn", "attention", "self_attention")
_PROJECT = ("o_proj", "out_proj", "dense", "c_proj", "wo")
_QKV = (("q_proj", "k_proj", "v_proj"), ("wq", "wk", "wv"), ("query", "key", "value"))
_MLP = ("mlp", "feed_forward", "ffn", "block_sparse_moe", "moe")
_DOWN = ("down_proj", "c_proj", "fc2", "dense_4h_to_h", "fc_out", "w2")
_GATE = ("gate_proj", "w1")
_ACTIVATION = ("act_fn", "activation_fn", "act")
_MIDDLE = ("pre_feedforward_layernorm", "post_attention_layernorm", "ln_2", "ffn_norm", "norm2")
_NORM = ("norm", "ln_f", "final_layernorm", "final_layer_norm", "norm_f")
_TOKENS = (1, 2, 3, 2)


def from_config(config: Mapping[str, Any]) -> Family:
    """The family of a model that is not at hand, from two random layers of its kind.

    Raises:
        ModelError: as `recognise` does, or the config is not one that transformers knows.
    """
    fields = {**config, "num_hidden_layers": 2, "layer_types": None}
    kind = fields.pop("model_type")
    try:
        made = transformers.AutoConfig.for_model(kind, **fields)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = transformers.AutoModelForCausalLM.from_config(made, dtype=torch.float32)
    except Exception as error:
        # What a strange config makes transformers raise can be anything; it is the cause.
        raise ModelError(f"models of type '{kind}' cannot be made: {error}") from error
    return recognise(model.eval(), read_facts(made.to_dict(), str(kind)))


def recognise(model: nn.Module, facts: ModelFacts) -> Family:
    """A family for this one model.

    Raises:
        ModelError: its blocks are not found, or do not follow one another as blocks do.
    """
    kind = facts.model_type
    blocks = _find_blocks(model, facts.n_layers)
    first = model.get_submodule(blocks).get_submodule("0")
    components = {"block_input": Stand("", "input"), "block_output": Stand("")}
    components |= _attention(first, facts)
    components |= _mlp(first, facts)
    middle = _one_of(first, _MIDDLE)
    if middle and "attention_output" in components and "mlp_output" in components:
        components["resid_mid"] = Stand(middle, "input", shared=True)
    family = Family(kind, (kind,), blocks, components, _layerless(model, blocks), interface=False)
    anatomy = Anatomy(family, facts)
    try:
        seen = _states(model, anatomy)
    except EngineError as error:
        raise ModelError(f"models of type '{kind}' are not recognised: {error}") from error
    for layer in range(1, facts.n_layers):
        before = seen[anatomy.place("block_output", layer - 1)]
        if not torch.equal(before, seen[anatomy.place("block_input", layer)]):
            raise ModelError(
                f"models of type '{kind}' are not recognised: block {layer} does not start from "
                f"what block {layer - 1} gives"
            )
    last = anatomy.place("block_output", facts.n_layers - 1)
    changed = _states(model, anatomy, (*_TOKENS[:-1], _TOKENS[-1] + 1))
    causal = torch.equal(changed[last][:, :-1], seen[last][:, :-1])
    if "resid_mid" in components and not _is_stream(model, anatomy, seen):
        del components["resid_mid"]
    pattern = (
        Stand(components["attention_output"].path, width="pattern")
        if ("attention_output" in components and _uses_interface(model, anatomy))
        else None
    )
    if pattern:
        components["attention_weight"] = pattern
    note = "not in the table, recognised by its modules' names"
    interface = pattern is not None
    return replace(family, components=components, causal=causal, interface=interface, note=note)


def _find_blocks(model: nn.Module, n_layers: int) -> str:
    found = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList)
        and len(module) == n_layers
        and len({type(child) for child in module}) == 1
        and any(_one_of(module[0], names) for names in (_ATTENTION, _MLP))
    ]
    if len(found) != 1:
        raise ModelError(
            f"{type(model).__name__} is not recognised: {len(found)} lists of {n_layers} blocks; "
            "name modules by path"
        )
    path: str = found[0]
    return path


def _attention(block: nn.Module, facts: ModelFacts) -> dict[str, Stand]:
    path = _one_of(block, _ATTENTION)
    if path is None:
        return {}
    module = block.get_submodule(path)
    found = {"attention_input": Stand(path, "input"), "attention_output": Stand(path)}
    project = _one_of(module, _PROJECT)
    width = facts.n_heads * facts.d_head
    if project and _sizes(module.get_submodule(project))[0] == width:
        stand = Stand(f"{path}.{project}", "input", "query")
        found |= {"attention_value_output": stand, "head_attention_value_output": stand}
    for names in _QKV:
        parts = [module._modules.get(name) for name in names]
        kv = facts.n_kv_heads * facts.d_head
        if [p is not None and _sizes(p)[1] for p in parts] == [width, kv, kv]:
            query, key, value = (f"{path}.{name}" for name in names)
            for name, stand in (
                ("query_output", Stand(query, width="query")),
                ("key_output", Stand(key, width="key")),
                ("value_output", Stand(value, width="value")),
            ):
                found |= {name: stand, f"head_{name}": stand}
    return found


def _mlp(block: nn.Module, facts: ModelFacts) -> dict[str, Stand]:
    path = _one_of(block, _MLP)
    if path is None:
        return {}
    module = block.get_submodule(path)
    found = {"mlp_input": Stand(path, "input"), "mlp_output": Stand(path)}
    down = _one_of(module, _DOWN)
    if down and _sizes(module.get_submodule(down)) == (facts.d_mlp, facts.d_model):
        found["mlp_activation"] = Stand(f"{path}.{down}", "input", "d_mlp")
        activation = _one_of(module, _ACTIVATION)
        if activation and _one_of(module, _GATE):
            found["mlp_gate_activation"] = Stand(f"{path}.{activation}", width="d_mlp")
    return found


def _layerless(model: nn.Module, blocks: str) -> dict[str, Stand]:
    paths = {id(module): name for name, module in model.named_modules()}
    found = {}
    for name, module in (
        ("token_embedding", model.get_input_embeddings()),  # type: ignore[operator]
        ("logits", model.get_output_embeddings()),  # type: ignore[operator]
    ):
        if module is not None:
            width: Width = "vocab" if name == "logits" else "d_model"
            found[name] = Stand(paths[id(module)], width=width)
    around = blocks.rpartition(".")[0]
    norm = _one_of(model.get_submodule(around), _NORM)
    if norm:
        found["final_norm"] = Stand(f"{around}.{norm}" if around else norm)
    return found


def _states(
    model: nn.Module, anatomy: Anatomy, tokens: Sequence[int] = _TOKENS
) -> dict[Place, Tensor]:
    """What passes each place in one forward."""
    seen: dict[Place, Tensor] = {}

    def keep(place: Place) -> Callable[[Tensor, Callable[[], Tensor]], Tensor]:
        def visit(value: Tensor, _given: Callable[[], Tensor]) -> Tensor:
            seen[place] = value.clone()
            return value

        return visit

    names = anatomy.components
    places = {
        anatomy.place(name, layer)
        for name in names
        for layer in (range(anatomy.n_layers) if anatomy.has_layers(name) else (0,))
    }
    with visiting(model, {place: keep(place) for place in places}):
        model(input_ids=torch.tensor([tokens], device=next(model.parameters()).device))
    return seen


def _is_stream(model: nn.Module, anatomy: Anatomy, seen: dict[Place, Tensor]) -> bool:
    """Whether what goes on after the middle is the middle plus what the MLP adds.

    Shifting the middle must shift the block's output by as much, beside the MLP's own change.
    """
    place, out = anatomy.place("resid_mid", 0), anatomy.place("block_output", 0)
    mlp = anatomy.place("mlp_output", 0)
    found: dict[Place, Tensor] = {}
    shift = seen[place].std() * torch.linspace(-1, 1, seen[place].shape[-1]).to(seen[place])

    def keep(at: Place) -> Callable[[Tensor, Callable[[], Tensor]], Tensor]:
        def visit(value: Tensor, _given: Callable[[], Tensor]) -> Tensor:
            value = value + shift if at == place else value
            found[at] = value.clone()
            return value

        return visit

    with visiting(model, {at: keep(at) for at in (place, out, mlp)}):
        model(input_ids=torch.tensor([_TOKENS], device=next(model.parameters()).device))
    moved = (found[out] - seen[out]) - (found[mlp] - seen[mlp])
    return bool((moved - shift).abs().max() <= 1e-3 * shift.abs().max())


def _uses_interface(model: nn.Module, anatomy: Anatomy) -> bool:
    """Whether every layer's attention goes through transformers' attention functions, once."""
    if "position_ids" not in inspect.signature(model.forward).parameters:
        return False
    try:
        with (
            routing(model, anatomy, lambda call: call.plain(), range(anatomy.n_layers), masks=True),
            torch.no_grad(),
        ):
            model(input_ids=torch.tensor([_TOKENS], device=next(model.parameters()).device))
    except EngineError:
        return False
    return True


def _one_of(module: nn.Module, names: Sequence[str]) -> str | None:
    return next((name for name in names if module._modules.get(name) is not None), None)


def _sizes(module: nn.Module) -> tuple[int | None, int | None]:
    """A projection's input and output widths."""
    weight = getattr(module, "weight", None)
    if not isinstance(module, nn.Linear) or not isinstance(weight, Tensor):
        return None, None
    return module.in_features, module.out_features
