"""What each part of a model writes into a logit, and what the stream would say at each layer.

The residual stream is a sum: what the embeddings, each head and each MLP wrote (Elhage et al.
2021, "A mathematical framework for transformer circuits"). With the scales of the norms held at
what they were in the run, a logit is linear in it, so each part has its share (direct logit
attribution). The logit lens (nostalgebraist 2020) reads the stream after each block as if it were
the last.

Nothing is taken on trust: the linear form of a norm is compared with what it gives, and the shares
must sum to the model's own logit.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from interv.engine.hooks import find_module
from interv.engine.linear_forms import Linear, Norm, call_norm
from interv.engine.reference import ReferenceExecutor, Start, by_shape
from interv.engine.runs import Inputs, Run
from interv.engine.sites import Sites
from interv.errors import EngineError
from interv.models.anatomy import Anatomy, Place

_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4}
"""Of sums, against the largest part."""
_NORMS = {torch.float64: 1e-6, torch.float32: 1e-5}
"""Of norms, against the largest number; many compute in float32 whatever the model's dtype is."""
_MAX_ROWS = 16384  # of the unembedding, in float64 at once
_MAX_TOKENS = 1024  # in one forward, of which every block's states are kept


@dataclass(frozen=True)
class Part:
    """Something that writes into the residual stream, or adds to the logits.

    Attributes:
        component: "embedding" is all that is there before the first block; "attention_bias" what
            the output projection adds whatever the heads do (and the norm behind it, where there
            is one); "unembedding_bias" also has what the final norm adds.
        layer: of heads, attention biases and MLPs.
        head: of heads.
    """

    component: Literal["embedding", "head", "attention_bias", "mlp", "unembedding_bias"]
    layer: int | None = None
    head: int | None = None


def logit_attributions(
    executor: ReferenceExecutor,
    model: nn.Module,
    runs: Sequence[Run],
    positions: Sequence[int],
    right: Sequence[Sequence[int]],
    wrong: Sequence[Sequence[int]],
    *,
    centred: bool = False,
) -> tuple[list[Part], Tensor]:
    """Each part's share of the mean logit of the right tokens less that of the wrong ones.

    One forward for each batch of runs. Norms after the stream (the final one, and those of
    Gemma 2 and 3 and OLMo 2 behind each sub-layer) are held at the run's own scale.

    Args:
        executor: of the model.
        model: of a family with attention, MLPs and a final norm, in float32 or float64.
        runs: may have edits of heads, attention patterns and what goes into the sub-layers. One
            that changes the stream itself is no part, and refused where it reaches the logits.
        positions: one for each run, negative ones from its end.
        right: tokens for each run, at least one.
        wrong: tokens for each run; none: the share of the logit itself.
        centred: of a logit itself, less the mean over the vocabulary (`center_unembed` of
            TransformerLens): what a part adds to all logits alike moves no probability. Of no
            meaning where there are wrong tokens: a difference has no such part.

    Returns:
        The parts, and `[part, run]` in float64. For each run they sum to the model's difference,
        within 1e-4 of the largest (float32) or 1e-9 (float64; 1e-5 where a norm computes in
        float32 all the same).

    Raises:
        EngineError: the model is not such a sum (its logits are capped or scaled, say, or
            what blocks add is), or what is asked for does not fit the runs.
    """
    _check(runs, positions)
    if not len(runs) == len(right) == len(wrong):
        raise EngineError(f"{len(runs)} runs, {len(right)} right and {len(wrong)} wrong answers")
    if not all(right):
        raise EngineError("a run without a right token")
    shape = _Shape.of(executor, model)
    executor.need(executor.sites.wanted_by(runs))
    shares: dict[int, Tensor] = {}
    parts: list[Part] = []
    for some in _batches(runs):
        batch = _Batch.run(executor, shape, [runs[i] for i in some], [positions[i] for i in some])
        difference = torch.stack(
            [_difference(right[i], wrong[i], batch.logits, centred=centred) for i in some]
        )
        parts, found = _shares(shape, batch, difference)
        shares |= zip(some, found.T, strict=True)
    return parts, torch.stack([shares[i] for i in range(len(runs))], 1)


def logit_lens(
    executor: ReferenceExecutor,
    model: nn.Module,
    runs: Sequence[Run],
    positions: Sequence[int],
    tokens: Sequence[Sequence[int]] | None = None,
) -> Tensor:
    """What the model would say if the stream after the first `layer` blocks were its last.

    The model's own forward with its blocks left out, so that all it does behind them (final
    norm, unembedding, caps and scales) is done.

    Args:
        executor: of the model.
        model: of a family with one list of blocks.
        runs: may have edits.
        positions: one for each run, negative ones from its end.
        tokens: for each run as many tokens; None: the whole vocabulary.

    Returns:
        `[n_layers + 1, run, vocab or n_tokens]`: row 0 is that of the embeddings,
        the last the model's logits.

    Raises:
        EngineError: the model has no such blocks, or what is asked for does not fit the runs.
    """
    _check(runs, positions)
    anatomy = executor.sites.anatomy
    if anatomy.reach == "nothing":
        raise EngineError("the logit lens needs a model of a known family, with one list of blocks")
    if tokens is not None and (len(tokens) != len(runs) or len({len(t) for t in tokens}) > 1):
        raise EngineError("tokens: for each run, and for each as many")
    executor.need(executor.sites.wanted_by(runs))
    places = [
        anatomy.place("block_input", 0),
        *(anatomy.place("block_output", layer) for layer in range(anatomy.n_layers)),
    ]
    found: dict[int, Tensor] = {}
    for some in _batches(runs):
        batch = [runs[i] for i in some]
        at, columns = _reading(batch, [positions[i] for i in some])
        rows = torch.arange(len(some))
        with _TupleWatch(find_module(model, places[1].path)) as watch:
            _, states = executor.forward(batch, at, set(places))
        tails = [_behind(run, executor.sites) for run in batch]
        layers = []
        for place in places:
            start = Start(anatomy.n_layers, states[place], watch.in_tuple)
            logits = executor.forward(tails, at, start=start)[0][rows, columns]
            if tokens is not None:
                wanted = [_known(tokens[i], logits.shape[-1]) for i in some]
                logits = logits.gather(1, torch.tensor(wanted, device=logits.device))
            layers.append(logits)
        found |= zip(some, torch.stack(layers, 1), strict=True)
    return torch.stack([found[i] for i in range(len(runs))], 1)


class _TupleWatch:
    """Within: sees whether a module gives tuples."""

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self.in_tuple = False

    def __enter__(self) -> _TupleWatch:
        def gives(_module: nn.Module, _args: object, output: object) -> None:
            self.in_tuple = isinstance(output, tuple)

        self._handle = self._module.register_forward_hook(gives)
        return self

    def __exit__(self, *_: object) -> None:
        self._handle.remove()


@dataclass(frozen=True)
class _Shape:
    """The modules that a model's stream is written and read by.

    Attributes:
        anatomy: of the model.
        projections: each layer's output projection.
        normed: each layer's norm behind attention, None where there is none.
        final_norm, unembedding: what reads the stream.
    """

    anatomy: Anatomy
    projections: list[Linear]
    normed: list[Norm | None]
    final_norm: Norm
    unembedding: Linear

    @classmethod
    def of(cls, executor: ReferenceExecutor, model: nn.Module) -> _Shape:
        anatomy = executor.sites.anatomy
        if anatomy.reach == "nothing":
            raise EngineError(
                "logits are taken apart in models of a known family, with one list of blocks"
            )
        layers = range(anatomy.n_layers)
        d_model = anatomy.width("block_output")
        assert d_model is not None
        projections = [
            Linear.of(model, anatomy.place("attention_value_output", layer)) for layer in layers
        ]
        normed: list[Norm | None] = []
        for layer in layers:
            own, added = _attention(anatomy, layer)
            normed.append(None if own == added else Norm.probe(model, added, d_model))
        return cls(
            anatomy,
            projections,
            normed,
            Norm.probe(model, anatomy.place("final_norm", 0), d_model),
            Linear.of(model, anatomy.place("logits", 0)),
        )


@dataclass(frozen=True)
class _Batch:
    """What runs of one length have at the one position of each that is read, in float64.

    Attributes:
        dtype: of the model.
        logits: `[run, vocab]`.
        stream: into the first block and out of the last, `[run, d_model]` each.
        normed: what the final norm makes of the latter.
        heads, mlp: for each layer `[run, n_heads · d_head]` and `[run, d_model]`.
        attention: for each layer what a norm behind attention gets and gives, if there is one.
    """

    dtype: torch.dtype
    logits: Tensor
    stream: tuple[Tensor, Tensor]
    normed: Tensor
    heads: list[Tensor]
    mlp: list[Tensor]
    attention: list[tuple[Tensor, Tensor]]

    @classmethod
    def run(
        cls,
        executor: ReferenceExecutor,
        shape: _Shape,
        runs: Sequence[Run],
        positions: Sequence[int],
    ) -> _Batch:
        anatomy = shape.anatomy
        layers = range(anatomy.n_layers)
        first, last = anatomy.place("block_input", 0), anatomy.place("block_output", layers[-1])
        heads = [anatomy.place("attention_value_output", layer) for layer in layers]
        mlp = [_added(anatomy, "mlp", layer) for layer in layers]
        attention = [_attention(anatomy, layer) for layer in layers]
        both = {place for one in attention if one[0] != one[1] for place in one}
        at, columns = _reading(runs, positions)
        logits, states = executor.forward(runs, at, {first, last, *heads, *mlp, *both})
        rows = torch.arange(len(runs))
        where = [at[column] for column in columns]

        def read(place: Place) -> Tensor:
            return states[place][rows, where]

        end = read(last)
        return cls(
            logits.dtype,
            logits[rows, columns].double(),
            (read(first).double(), end.double()),
            call_norm(shape.final_norm.module, end).double(),
            [read(place).double() for place in heads],
            [read(place).double() for place in mlp],
            [(read(a).double(), read(b).double()) for a, b in attention if a != b],
        )


def _shares(shape: _Shape, batch: _Batch, difference: Tensor) -> tuple[list[Part], Tensor]:
    """The parts, and `[part, run]`.

    Args:
        shape: of the model.
        batch: its runs.
        difference: what each run's logits are weighted by, `[run, vocab]`.
    """
    if batch.dtype not in _TOLERANCE:
        raise EngineError(f"logits are taken apart in float32 or float64, not {batch.dtype}")
    tolerance = _TOLERANCE[batch.dtype]

    def scaled(norm: Norm, given: Tensor, gives: Tensor) -> Tensor:
        nonlocal tolerance
        scale, off = norm.scale(given, gives)
        if not off <= _NORMS[batch.dtype]:
            raise EngineError(
                f"{norm.path}: {type(norm.module).__name__} is not a weight times a centred or "
                f"plain input over its scale, plus a bias (off by {off:.1e} of its largest number)"
            )
        # Sums are no more exact than what the norms do.
        tolerance = max(tolerance, 10 * off)
        return scale

    unembedding, final = shape.unembedding, shape.final_norm
    read = _rows_of(unembedding.weight, difference)
    scale = scaled(final, batch.stream[1], batch.normed)
    direction, constant = final.pull(read, scale)
    if unembedding.bias is not None:
        constant = constant + difference @ unembedding.bias
    parts, shares = [Part("embedding")], [(batch.stream[0] * direction).sum(1)]
    behind = iter(batch.attention)
    n_heads = shape.anatomy.n_units("head_attention_value_output")
    assert n_heads is not None
    for layer, (project, norm) in enumerate(zip(shape.projections, shape.normed, strict=True)):
        before, bias = direction, torch.zeros_like(constant)
        if norm is not None:
            before, bias = norm.pull(direction, scaled(norm, *next(behind)))
        if project.bias is not None:
            bias = bias + before @ project.bias
        by_column = batch.heads[layer] * (before @ project.weight.double())
        by_head = by_column.reshape(len(by_column), n_heads, -1).sum(2)
        parts += [Part("head", layer, head) for head in range(n_heads)]
        shares += by_head.T
        if project.bias is not None or (norm is not None and norm.bias.any()):
            parts.append(Part("attention_bias", layer))
            shares.append(bias)
        parts.append(Part("mlp", layer))
        shares.append((batch.mlp[layer] * direction).sum(1))
    if unembedding.bias is not None or final.bias.any():
        parts.append(Part("unembedding_bias"))
        shares.append(constant)
    found = torch.stack(shares)
    _compare(
        "what blocks add is scaled, or an edit changes the stream itself",
        found.sum(0) - constant,
        (batch.stream[1] * direction).sum(1),
        found,
        tolerance,
    )
    _compare(
        "the logits are capped or scaled, or edited behind the blocks",
        found.sum(0),
        (batch.logits * difference).sum(1),
        found,
        tolerance,
    )
    return parts, found


def _compare(why: str, total: Tensor, truth: Tensor, parts: Tensor, tolerance: float) -> None:
    off = (total - truth).abs()
    largest = torch.maximum(parts.abs().amax(0), truth.abs())
    if not bool((off <= tolerance * largest).all()):
        raise EngineError(
            f"the parts do not sum to the logits: off by {float(off.max()):.2g}, where the "
            f"largest is {float(largest.max()):.2g}; perhaps {why}"
        )


def _attention(anatomy: Anatomy, layer: int) -> tuple[Place, Place]:
    """What attention gives, and what of it is added to the stream."""
    return anatomy.place("attention_output", layer), _added(anatomy, "attention", layer)


def _added(anatomy: Anatomy, sublayer: str, layer: int) -> Place:
    """What a sub-layer adds to the stream; of models not in the table, its output if it does."""
    name = f"{sublayer}_residual"
    known = name in anatomy.components
    return anatomy.place(name if known else f"{sublayer}_output", layer)


def _rows_of(weight: Tensor, difference: Tensor) -> Tensor:
    """`difference` times the rows of `weight`, `[run, d_model]` in float64, some at a time."""
    used = difference.any(0).nonzero()[:, 0]
    parts = [difference[:, some] @ weight[some].double() for some in torch.split(used, _MAX_ROWS)]
    return torch.stack(parts).sum(0)


def _difference(
    right: Sequence[int], wrong: Sequence[int], logits: Tensor, *, centred: bool
) -> Tensor:
    """What logits are weighted by, `[vocab]`: the right tokens' mean less the wrong ones'.

    Or, where there are none of these and `centred`, less that of all.
    """
    vocab = logits.shape[-1]
    found = torch.zeros(vocab, dtype=torch.float64, device=logits.device)
    if centred and not wrong:
        found -= 1 / vocab
    for sign, tokens in ((1, right), (-1, wrong)):
        for token in _known(tokens, vocab):
            found[token] += sign / len(tokens)
    return found


def _known(tokens: Sequence[int], vocab: int) -> list[int]:
    for token in tokens:
        if not 0 <= token < vocab:
            raise EngineError(f"token {token}: there are {vocab}, counted from 0")
    return list(tokens)


def _reading(runs: Sequence[Run], positions: Sequence[int]) -> tuple[list[int], list[int]]:
    """Positions to read of runs of one length, and the index among them of each run's own."""
    own = [position % len(run) for run, position in zip(runs, positions, strict=True)]
    at = sorted(set(own))
    return at, [at.index(position) for position in own]


def _behind(run: Run, sites: Sites) -> Run:
    """A run with only those edits that stand behind the blocks."""
    layers = [sites.layer(sites.place(edit.site)) for edit in run.edits]
    if None in layers:
        raise EngineError("the logit lens cannot tell whether an edit by path is behind the blocks")
    n_layers = sites.anatomy.n_layers
    return Run(
        run.ids,
        tuple(e for e, layer in zip(run.edits, layers, strict=True) if layer == n_layers),
    )


def _batches(runs: Sequence[Run]) -> Iterator[list[int]]:
    """Indices of runs of one length, few enough for one forward."""
    for together in by_shape(runs):
        size = max(1, _MAX_TOKENS // len(runs[together[0]]))
        for begin in range(0, len(together), size):
            yield together[begin : begin + size]


def _check(runs: Sequence[Run], positions: Sequence[int]) -> None:
    if not runs:
        raise EngineError("no runs to take apart")
    if len(positions) != len(runs):
        raise EngineError(f"{len(positions)} positions for {len(runs)} runs")
    for run, position in zip(runs, positions, strict=True):
        if isinstance(run.ids, Inputs):
            raise EngineError("logits are taken apart in runs of tokens only")
        if not -len(run) <= position < len(run):
            raise EngineError(f"position {position} of a run of {len(run)} tokens")
