"""Recognising a causal model that no row of the table knows, by names and by arithmetic.

Blocks, attention and MLP go by the names that `transformers` uses; forwards of a few tokens check
what was found (`engine.arithmetic`). A component that some block lacks, or that does not add up in
every block, is left out; the others are offered. Module paths reach what is left out.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final

import torch
from torch import Tensor, nn

from interv.engine.arithmetic import (
    arrives_by_head,
    divides,
    factors_of,
    find_stream,
    gates,
    is_parallel,
    same_to_rounding,
)
from interv.engine.attention import Call, routing
from interv.engine.trial import BLOCK_INPUT, BLOCK_OUTPUT, Trial, ordinary_tokens
from interv.errors import EngineError, ModelError
from interv.models.anatomy import Anatomy, Place
from interv.models.config import ModelFacts
from interv.models.families import HEAD_PREFIX, Family, Side, Stand

_ATTENTION = ("self_attn", "attn", "attention", "self_attention")
_PROJECT = ("o_proj", "out_proj", "dense", "c_proj", "wo")
_QKV = (("q_proj", "k_proj", "v_proj"), ("wq", "wk", "wv"), ("query", "key", "value"))
_MLP = ("mlp", "feed_forward", "ffn", "block_sparse_moe", "moe")
_DOWN = ("down_proj", "c_proj", "fc2", "dense_4h_to_h", "fc_out", "w2")
_ACTIVATION = ("act_fn", "activation_fn", "act")
_SIDES: Final[tuple[Side, ...]] = ("input", "output")


@dataclass(frozen=True)
class _Names:
    """Modules that every block has under the same name, as paths from the block; or None."""

    attention: str | None
    project: str | None
    qkv: tuple[str, str, str] | None
    mlp: str | None
    down: str | None
    activation: str | None
    norms: tuple[str, ...]

    @property
    def stands(self) -> set[Stand]:
        """Return all sides of these modules that may be components, and the block's own."""
        found = {BLOCK_INPUT, BLOCK_OUTPUT}
        both = (self.attention, self.project, self.mlp, self.down, *self.norms)
        found |= {Stand(path, side) for path in both if path for side in _SIDES}
        given = (self.activation, *(self.qkv or ()))
        return found | {Stand(path) for path in given if path}


def recognise(model: nn.Module, facts: ModelFacts) -> Family:
    """Return a family for this one model.

    Raises:
        ModelError: its blocks are not found, or do not follow one another as blocks do.
    """
    kind = facts.model_type
    path = _find_blocks(model, facts.n_layers)
    names = _names(list(model.get_submodule(path).children()))
    outside = _outside(model, path)
    ids = ordinary_tokens(model, facts.vocab_size)
    try:
        trial = Trial(model, path, facts.n_layers, ids, names.stands, outside.values())
    except EngineError as error:
        raise ModelError(f"models of type '{kind}' are not recognised: {error}") from error
    _check_blocks(trial, facts)
    family = Family(
        kind,
        (kind,),
        path,
        {"block_input": BLOCK_INPUT, "block_output": BLOCK_OUTPUT},
        _layerless(trial, outside, facts),
        note="not in the table, recognised by its modules' names",
    )
    anatomy = Anatomy(family, facts)
    pattern = _uses_interface(trial, anatomy)
    components = {**family.components, **_stream(trial, names, facts)}
    components |= _heads(trial, names, anatomy, components, pattern=pattern)
    components |= _neurons(trial, names, facts, components)
    if pattern and names.attention:
        components["attention_weight"] = Stand(names.attention, width="pattern")
    return replace(
        family,
        components=components,
        causal=_is_causal(trial),
        interface=pattern and _starts_anywhere(trial, anatomy),
    )


def _names(blocks: Sequence[nn.Module]) -> _Names:
    def common(names: Sequence[str], within: str | None = "") -> str | None:
        if within is None:
            return None
        paths = [f"{within}.{name}" if within else name for name in names]
        modules = [dict(block.named_modules()) for block in blocks]
        return next((path for path in paths if all(path in of for of in modules)), None)

    attention, mlp = common(_ATTENTION), common(_MLP)
    qkv = [[common((name,), attention) for name in names] for names in _QKV]
    first = next(((q, k, v) for q, k, v in qkv if q and k and v), None)
    norms = [name for name, child in blocks[0].named_children() if _is_norm(name, child)]
    return _Names(
        attention,
        common(_PROJECT, attention),
        first,
        mlp,
        common(_DOWN, mlp),
        common(_ACTIVATION, mlp),
        tuple(name for name in norms if common((name,))),
    )


def _is_norm(name: str, module: nn.Module) -> bool:
    return "norm" in type(module).__name__.lower() or "norm" in name or name.startswith("ln_")


def _find_blocks(model: nn.Module, n_layers: int) -> str:
    lists = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == n_layers
    }
    # Of several lists the one whose modules have attention or an MLP.
    named = [
        name
        for name, module in lists.items()
        if any(_one_of(block, names) for block in module for names in (_ATTENTION, _MLP))
    ]
    found = named or list(lists)
    if len(found) != 1:
        raise ModelError(
            f"{type(model).__name__} is not recognised: {len(found)} lists of {n_layers} blocks; "
            "name modules by path"
        )
    return str(found[0])


def _check_blocks(trial: Trial, facts: ModelFacts) -> None:
    """That a stream of vectors goes from block to block.

    Raises:
        ModelError: it does not.
    """
    start = f"models of type '{facts.model_type}' are not recognised: "
    given, after = trial.at(BLOCK_INPUT), trial.at(BLOCK_OUTPUT)
    if given is None or after is None or not trial.has(BLOCK_OUTPUT, facts.d_model):
        raise ModelError(
            f"{start}not every block gets and gives one [row, position, {facts.d_model}] once"
        )
    for layer in range(1, trial.n_layers):
        if not torch.equal(after[layer - 1], given[layer]):
            raise ModelError(
                f"{start}block {layer} does not start from what block {layer - 1} gives"
            )


def _stream(trial: Trial, names: _Names, facts: ModelFacts) -> dict[str, Stand]:
    """What the sub-layers read and add, and the stream between them."""
    found: dict[str, Stand] = {}
    ends = {
        part: [Stand(path) for path in paths if path]
        for part, *paths in (
            ("attention", names.attention, names.project),
            ("mlp", names.mlp, names.down),
        )
    }
    stream = find_stream(trial, ends["attention"], ends["mlp"], names.norms)
    for part, path, branch in (
        ("attention", names.attention, stream.attention),
        ("mlp", names.mlp, stream.mlp),
    ):
        if path and trial.has(Stand(path, "input"), facts.d_model):
            found[f"{part}_input"] = Stand(path, "input")
        if branch is not None:
            found[f"{part}_output"] = branch.output
            if branch.is_plain:
                found[f"{part}_residual"] = branch.residual
    if stream.middle:
        found["resid_mid"] = Stand(stream.middle, "input", shared=True)
    elif stream.mlp and stream.mlp.residual == stream.mlp.output and not is_parallel(trial, stream):
        # A sum without a middle is taken for that of a parallel block, by edges for one.
        found.pop("mlp_residual", None)
    return found


def _heads(
    trial: Trial,
    names: _Names,
    anatomy: Anatomy,
    known: Mapping[str, Stand],
    *,
    pattern: bool,
) -> dict[str, Stand]:
    """The input of the output projection, and the projections before it, where they have heads."""
    facts = anatomy.facts
    assert facts is not None
    if names.attention is None or names.project is None or not facts.n_heads:
        return {}
    width, kv = facts.n_heads * facts.d_head, facts.n_kv_heads * facts.d_head
    value, projected = Stand(names.project, "input", "query"), Stand(names.project)
    output = known.get("attention_output", Stand(names.attention))
    if not trial.has(Stand(names.project, "input"), width) or not _scales(trial, output, projected):
        return {}
    found = {"attention_value_output": value}
    reach = Stand(names.project, "input")
    by_head = False
    for name, path, units, size in zip(
        ("query", "key", "value"),
        names.qkv or (),
        (facts.n_heads, facts.n_kv_heads, facts.n_kv_heads),
        (width, kv, kv),
        strict=False,
    ):
        stand = Stand(path, width=name)  # type: ignore[arg-type]
        if not trial.has(Stand(path), size):
            continue
        alone = name == "value"
        if divides(trial, Stand(path), units, reach, facts.n_heads, alone=alone):
            found |= {f"{name}_output": stand, f"{HEAD_PREFIX}{name}_output": stand}
            by_head = by_head or alone
    if by_head or (pattern and _attends_by_head(trial, anatomy, reach)):
        found[f"{HEAD_PREFIX}attention_value_output"] = value
    return found


def _attends_by_head(trial: Trial, anatomy: Anatomy, projected: Stand) -> bool:
    """Whether what each head gives arrives in its own columns of what is projected."""
    assert anatomy.facts is not None
    n_heads = anatomy.facts.n_heads

    def shift(call: Call) -> Tensor:
        given = call.plain()
        for row in range(n_heads):
            given[row + 1, :, row] += given.std()
        return given

    with routing(trial.model, anatomy, shift, range(trial.n_layers), masks=True):
        [found] = trial.again({}, [projected], n_heads + 1)
    return all(arrives_by_head(of_layer, range(n_heads), 1, alone=True) for of_layer in found)


def _neurons(
    trial: Trial, names: _Names, facts: ModelFacts, known: Mapping[str, Stand]
) -> dict[str, Stand]:
    """The input of the down projection, and the gate's activation where that is a factor of it."""
    if names.mlp is None or names.down is None:
        return {}
    neurons = Stand(names.down, "input")
    output = known.get("mlp_output", Stand(names.mlp))
    if not trial.has(neurons, facts.d_mlp) or not _scales(trial, output, Stand(names.down)):
        return {}
    found = {"mlp_activation": replace(neurons, width="d_mlp")}
    if names.activation and gates(trial, Stand(names.activation), neurons):
        found["mlp_gate_activation"] = Stand(names.activation, width="d_mlp")
    return found


def _scales(trial: Trial, output: Stand, projected: Stand) -> bool:
    """Whether a module gives what its output projection does, or a multiple of it."""
    given, made = trial.at(output), trial.at(projected)
    return (
        given is not None
        and made is not None
        and given[0].shape == made[0].shape
        and all(factors_of(one, [of]) is not None for one, of in zip(given, made, strict=True))
    )


def _outside(model: nn.Module, blocks: str) -> dict[str, Place]:
    """Where the components of the whole model may stand, by their names."""
    paths = {id(module): name for name, module in model.named_modules()}
    found = {}
    for name, module in (
        ("token_embedding", model.get_input_embeddings()),  # type: ignore[operator]
        ("logits", model.get_output_embeddings()),  # type: ignore[operator]
    ):
        if module is not None:
            found[name] = Place(paths[id(module)], "output")
    around = blocks.rpartition(".")[0]
    for name, child in model.get_submodule(around).named_children():
        if _is_norm(name, child):
            path = f"{around}.{name}" if around else name
            found |= {f"{side} {path}": Place(path, side) for side in _SIDES}
    return found


def _layerless(trial: Trial, outside: Mapping[str, Place], facts: ModelFacts) -> dict[str, Stand]:
    found: dict[str, Stand] = {}
    embedding, logits = outside.get("token_embedding"), outside.get("logits")
    if embedding and trial.once(embedding) is not None and _embeds_all(trial, embedding):
        found["token_embedding"] = Stand(embedding.path)
    given = trial.once(logits) if logits else None
    if logits and given is not None and given.shape[-1] == facts.vocab_size:
        found["logits"] = Stand(logits.path, width="vocab")
    last = (trial.at(BLOCK_OUTPUT) or [])[-1]
    for name, place in outside.items():
        read = trial.once(place) if name.startswith("input ") else None
        given = trial.once(replace(place, side="output"))
        if read is not None and given is not None and torch.equal(read, last):
            found["final_norm"] = Stand(place.path)
    return found


def _embeds_all(trial: Trial, embedding: Place) -> bool:
    """Whether nothing of the tokens reaches the model but through the embedding.

    Models with embeddings for each layer (Gemma 3n) are told the tokens elsewhere too: noise on
    the first ones leaves them the subject.
    """
    kept = trial.once(embedding)
    assert kept is not None
    again = trial.forward(
        {embedding: lambda value, _given: kept.reshape(value.shape)}, ids=trial.ids[::-1]
    )
    return torch.equal(again[0], trial.logits)


def _is_causal(trial: Trial) -> bool:
    """Whether what a block gives at a position depends on nothing behind it."""
    last = trial.place(BLOCK_OUTPUT, trial.n_layers - 1)
    before = trial.once(last)
    assert before is not None
    changed = _at_place(trial, last, (*trial.ids[:-1], trial.ids[0]))
    return same_to_rounding(changed[:-1], before[:-1])


def _starts_anywhere(trial: Trial, anatomy: Anatomy) -> bool:
    """Whether a row can start at its first changed position, given the keys and values before.

    Not where positions see others elsewhere than in attention (in a state-space branch), and not
    where blocks read the tokens themselves, of all positions.
    """
    if "token_embedding" not in anatomy.components:
        return False
    last = trial.place(BLOCK_OUTPUT, trial.n_layers - 1)
    layers = range(trial.n_layers)
    found = []
    for ids in (trial.ids, (trial.ids[-1], *trial.ids[1:])):
        with routing(
            trial.model, anatomy, lambda call: torch.zeros_like(call.plain()), layers, masks=True
        ):
            found.append(_at_place(trial, last, ids))
    before, changed = found
    return same_to_rounding(changed[1:], before[1:])


def _at_place(trial: Trial, place: Place, ids: Sequence[int]) -> Tensor:
    """What passes a place where these tokens are run, `[token, width]`."""
    kept: list[Tensor] = []

    def keep(value: Tensor, _given: Callable[[], Tensor]) -> Tensor:
        kept.append(value.clone())
        return value

    trial.forward({place: keep}, ids=ids)
    return kept[0].reshape(len(ids), -1)


def _uses_interface(trial: Trial, anatomy: Anatomy) -> bool:
    """Whether every layer's attention goes through transformers' attention functions, once."""
    assert anatomy.facts is not None
    if "position_ids" not in inspect.signature(trial.model.forward).parameters:
        return False
    heads: set[int] = set()

    def plain(call: Call) -> Tensor:
        heads.add(call.query.shape[1])
        return call.plain()

    try:
        with routing(trial.model, anatomy, plain, range(anatomy.n_layers), masks=True):
            trial.forward({})
    except EngineError:
        return False
    return heads == {anatomy.facts.n_heads}


def _one_of(module: nn.Module, names: Sequence[str]) -> str | None:
    return next((name for name in names if module._modules.get(name) is not None), None)
