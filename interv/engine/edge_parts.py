"""The graph of edges between a model's components, and the modules that its nodes are.

Nodes and edges are those of Hanna et al. 2024 (EAP-IG, arXiv 2403.17806) and MIB (arXiv
2504.13151): the embeddings, attention heads and MLPs write into the residual stream, which is
their sum; each head's queries, keys and values, each MLP and the logits read the stream from
copies of their own, before the norm. Where several heads share a key head, each of them still has
keys and values of its own, as in the authors' code (`ungroup_grouped_query_attention`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final, Literal, final

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from interv.engine.hooks import find_module, visiting
from interv.engine.interventions import Zero
from interv.engine.reference import ReferenceExecutor
from interv.engine.runs import Edit, Inputs, Run, Site
from interv.errors import EngineError
from interv.models.anatomy import Anatomy, Place
from interv.models.edges import why_no_edges

Part = Literal["q", "k", "v"]
QKV: Final[tuple[Part, ...]] = ("q", "k", "v")
_COMPONENTS: Final[dict[Part, str]] = {
    "q": "head_query_output",
    "k": "head_key_output",
    "v": "head_value_output",
}
_MAX_NUMBERS = 2**26  # in one tensor of all senders' outputs
_MAX_TOKENS = 2048  # in one forward whose activations are kept for the way back


@dataclass(frozen=True)
class Sender:
    """What writes into the residual stream: the embeddings, a head or an MLP."""

    kind: Literal["input", "head", "mlp"]
    layer: int = 0
    head: int = 0

    def __str__(self) -> str:
        names = {"input": "input", "head": f"a{self.layer}.h{self.head}", "mlp": f"m{self.layer}"}
        return names[self.kind]


@dataclass(frozen=True)
class Receiver:
    """What reads the residual stream: a head's queries, keys or values, an MLP, or the logits."""

    kind: Literal["q", "k", "v", "mlp", "logits"]
    layer: int = 0
    head: int = 0

    def __str__(self) -> str:
        if self.kind == "logits":
            return "logits"
        return f"m{self.layer}" if self.kind == "mlp" else f"a{self.layer}.h{self.head}.{self.kind}"


@final
class EdgeGraph:
    """The senders and receivers of a model, and the edges between them.

    Attributes:
        senders: in the order in which they are computed.
        receivers: in the order in which they are computed.
        exists: whether a sender is computed before a receiver, `[sender, receiver]`.
        reads: whether a receiver is an input of the node that sends, `[sender, receiver]`.
        share: how many heads have one key head in common.
        parallel: an MLP reads the stream before its layer's attention.

    Raises:
        EngineError: the model has no such components, or a norm follows its sub-layers: what a
            head adds to the stream then depends on the other heads.
    """

    def __init__(self, anatomy: Anatomy) -> None:
        if why := why_no_edges(anatomy):
            raise EngineError(f"edges: {why}")
        facts = anatomy.facts
        assert facts is not None
        self.parallel = "resid_mid" not in anatomy.components
        self.n_layers, self.n_heads, self.n_kv_heads = (
            facts.n_layers,
            facts.n_heads,
            facts.n_kv_heads,
        )
        self.share = self.n_heads // self.n_kv_heads
        senders, receivers = [Sender("input")], list[Receiver]()
        for layer in range(self.n_layers):
            senders += [Sender("head", layer, head) for head in range(self.n_heads)]
            senders.append(Sender("mlp", layer))
            for kind in QKV:
                receivers += [Receiver(kind, layer, head) for head in range(self.n_heads)]
            receivers.append(Receiver("mlp", layer))
        self.senders = tuple(senders)
        self.receivers = (*receivers, Receiver("logits"))
        # Senders come in order: those before a receiver are the first so many.
        before = torch.tensor([self._before(receiver) for receiver in self.receivers])
        self.exists = torch.arange(len(self.senders))[:, None] < before
        self.reads = torch.tensor([[_is_input(s, r) for r in self.receivers] for s in self.senders])

    def _before(self, receiver: Receiver) -> int:
        if receiver.kind == "logits":
            return len(self.senders)
        heads = self.n_heads if receiver.kind == "mlp" and not self.parallel else 0
        return 1 + receiver.layer * (self.n_heads + 1) + heads

    def heads_of(self, layer: int) -> slice:
        """Where a layer's heads are among the senders; its MLP follows."""
        begin = 1 + layer * (self.n_heads + 1)
        return slice(begin, begin + self.n_heads)

    def mlp_of(self, layer: int) -> int:
        """Where a layer's MLP is among the senders."""
        return (layer + 1) * (self.n_heads + 1)

    def qkv_of(self, layer: int) -> slice:
        """Where a layer's queries, keys and values are among the receivers; its MLP follows."""
        size = 3 * self.n_heads
        return slice(layer * (size + 1), layer * (size + 1) + size)

    def pruned(self, keep: Tensor) -> Tensor:
        """The kept edges that lie on a way from the input to the logits, `[sender, receiver]`.

        As `Graph.prune` of EAP-IG: nodes that no kept edge goes into or none leaves are removed
        with their edges, until none is left; the input needs none into it.
        """
        keep = keep & self.exists
        while True:
            fed = (self.reads & keep.any(0)).any(1)
            fed[0] = True
            alive = fed & keep.any(1)
            ends = self.reads[alive].any(0)
            ends[-1] = True
            left = keep & alive[:, None] & ends
            if bool((left == keep).all()):
                return keep
            keep = left


def _is_input(node: Sender, receiver: Receiver) -> bool:
    kinds = {"head": QKV, "mlp": ("mlp",), "input": ()}[node.kind]
    return receiver.kind in kinds and (node.layer, node.head) == (receiver.layer, receiver.head)


@dataclass(frozen=True)
class Block:
    """One layer's modules and what is seen at them.

    Attributes:
        module: the block itself.
        modules: its projections for queries, keys and values; they may be one.
        after_heads: its output projection.
        start, normed, project, attention, middle, mlp: the block's input, the input of its
            query projection, that of its output projection, what attention gives, the stream
            where the MLP's norm reads it, what the MLP gives.
        places: outputs of the projections for queries, keys and values; they may be one.
        columns: of each head in its projection's output; of keys and values, of each key head.
        weights: matrix `[d_model, width]` and bias of each projection.
        output: matrix and bias of the output projection.
    """

    module: nn.Module
    modules: dict[Part, nn.Module]
    after_heads: nn.Module
    start: Place
    normed: Place
    project: Place
    attention: Place
    middle: Place
    mlp: Place
    places: dict[Part, Place]
    columns: dict[Part, list[Tensor]]
    weights: dict[Part, tuple[Tensor, Tensor | None]]
    output: tuple[Tensor, Tensor | None]


class Parts:
    """A graph's senders and receivers as the modules of one model."""

    def __init__(self, executor: ReferenceExecutor, model: nn.Module, graph: EdgeGraph) -> None:
        self.executor, self.model, self.graph = executor, model, graph
        anatomy = executor.sites.anatomy
        facts = anatomy.facts
        if facts is None or (facts.n_layers, facts.n_heads, facts.n_kv_heads) != (
            graph.n_layers,
            graph.n_heads,
            graph.n_kv_heads,
        ):
            raise EngineError("edges: the graph is of another model")
        self.d_model = facts.d_model
        self._d_heads = facts.n_heads * facts.d_head
        heads = {kind: facts.n_heads if kind == "q" else facts.n_kv_heads for kind in QKV}
        columns = {
            kind: [
                torch.tensor(anatomy.columns(_COMPONENTS[kind], (head,), None))
                for head in range(heads[kind])
            ]
            for kind in QKV
        }
        self.blocks = [self._block(anatomy, layer, columns) for layer in range(facts.n_layers)]
        self._has_embedding = "token_embedding" in anatomy.components
        self.end = anatomy.place("block_output", facts.n_layers - 1)

    def _block(self, anatomy: Anatomy, layer: int, columns: dict[Part, list[Tensor]]) -> Block:
        places = {kind: anatomy.place(_COMPONENTS[kind], layer) for kind in QKV}
        start = anatomy.place("block_input", layer)
        project = anatomy.place("head_attention_value_output", layer)
        middle = start if self.graph.parallel else anatomy.place("resid_mid", layer)
        modules = {kind: find_module(self.model, place.path) for kind, place in places.items()}
        return Block(
            module=find_module(self.model, start.path),
            modules=modules,
            after_heads=find_module(self.model, project.path),
            start=start,
            normed=replace(places["q"], side="input"),
            project=project,
            attention=anatomy.place("attention_output", layer),
            # What is put here is for the MLP alone: the stream goes round it as it is.
            middle=replace(middle, shared=False),
            mlp=anatomy.place("mlp_output", layer),
            places=places,
            columns=columns,
            weights={kind: affine(modules[kind], self.d_model) for kind in QKV},
            output=affine(find_module(self.model, project.path), self._d_heads),
        )

    def batches(self, n_runs: int, length: int) -> list[slice]:
        """Runs that share a forward."""
        numbers = len(self.graph.senders) * length * self.d_model
        size = max(1, min(_MAX_NUMBERS // numbers, _MAX_TOKENS // length))
        return [slice(begin, begin + size) for begin in range(0, n_runs, size)]

    def outputs(self, runs: Sequence[Run]) -> Tensor:
        """What each sender writes into the stream, `[sender, run, pos, d_model]`.

        An output projection's bias belongs to no head: it is the same in all runs.

        Raises:
            EngineError: it is not what the model's stream is the sum of.
        """
        places = {self.end}
        for block in self.blocks:
            places |= {block.start, block.normed, block.project, block.attention, block.mlp}
            places |= set(block.places.values())
        _, seen = self.executor.forward(runs, (-1,), places)
        after = [*(seen[block.start] for block in self.blocks[1:]), seen[self.end]]
        found = [seen[self.blocks[0].start][None]]
        for layer, (block, then) in enumerate(zip(self.blocks, after, strict=True)):
            _check_block(layer, block, seen, then)
            found += [self.heads(block, seen[block.project]), seen[block.mlp][None]]
        return torch.cat(found)

    def zeros(self, runs: Sequence[Run]) -> Tensor:
        """What each sender writes where it is ablated to zero, `[sender, run, pos, d_model]`.

        Heads and MLPs write nothing; of the input the tokens' embeddings are zero, and what the
        model adds to them (learned positions) stays, as in the authors' code.

        Raises:
            EngineError: the model is not known to have an embedding of tokens.
        """
        _must(self._has_embedding, "zero ablation needs a token_embedding, which is not known here")
        self.outputs(runs[:1])  # refuses a stream that is not their sum
        blank = [Run(run.ids, (Edit(Site("token_embedding"), Zero()),)) for run in runs]
        start = self.blocks[0].start
        _, seen = self.executor.forward(blank, (-1,), {start})
        found = torch.zeros(
            len(self.graph.senders),
            *seen[start].shape,
            dtype=seen[start].dtype,
            device=seen[start].device,
        )
        found[0] = seen[start]
        return found

    def heads(self, block: Block, values: Tensor) -> Tensor:
        """What each head of a layer writes, `[head, run, pos, d_model]`, of `[run, pos, ...]`."""
        weight = block.output[0].reshape(self.graph.n_heads, -1, self.d_model)
        by_head = values.reshape(*values.shape[:2], *weight.shape[:2])
        return torch.einsum("rphd,hdm->hrpm", by_head, weight)


def affine(module: nn.Module, width: int) -> tuple[Tensor, Tensor | None]:
    """A projection as a matrix `[width, width out]` and a bias `[width out]`, detached.

    Modules of kinds that are not known (adapters, quantized ones) are asked what they do.
    """
    if type(module) in (nn.Linear, Conv1D):
        weight, bias = module.weight, module.bias
        assert isinstance(weight, Tensor)
        matrix = weight.detach().T if isinstance(module, nn.Linear) else weight.detach()
        return matrix, bias.detach() if isinstance(bias, Tensor) else None
    like = next(p for p in module.parameters() if p.is_floating_point())
    unit = torch.eye(width, dtype=like.dtype, device=like.device)
    with visiting(module, {}):
        offset = module(torch.zeros_like(unit[None, :1]))[0, 0]
        return module(unit[None])[0] - offset, offset


def check_runs(runs: Sequence[Run]) -> None:
    """Raise EngineError unless these are plain runs of tokens, all of one length."""
    if not runs:
        raise EngineError("edges: no runs")
    if any(isinstance(run.ids, Inputs) for run in runs):
        raise EngineError("edges are of runs of tokens only")
    if len({len(run) for run in runs}) > 1:
        raise EngineError("edges: runs of one length only")
    if any(run.edits for run in runs):
        raise EngineError("edges: runs with edits of their own have none")


def check_carried(parts: Parts, bases: Sequence[Run], carried: Tensor) -> None:
    """Raise EngineError unless bases fit together, and `carried` them and the graph."""
    check_runs(bases)
    expected = (len(parts.graph.senders), len(bases), len(bases[0]), parts.d_model)
    if carried.shape != expected:
        raise EngineError(f"edges carry {tuple(carried.shape)}, expected {expected}")


def _check_block(layer: int, block: Block, seen: dict[Place, Tensor], then: Tensor) -> None:
    """That the block adds its two parts, and that its projections are the matrices found."""
    before = seen[block.start]
    added = seen[block.attention] + seen[block.mlp]
    close = _like(then - before, added, slack=float(before.abs().max()))
    _must(close, f"layer {layer} does not add what its attention and its MLP give to the stream")
    for kind in QKV:
        _must(
            _like(_applied(seen[block.normed], block.weights[kind]), seen[block.places[kind]]),
            f"layer {layer}: the projection of {kind} is not linear in what that of q reads",
        )
    _must(
        _like(_applied(seen[block.project], block.output), seen[block.attention]),
        f"layer {layer}: attention's output is not linear in the heads",
    )


def _applied(value: Tensor, matrix: tuple[Tensor, Tensor | None]) -> Tensor:
    weight, bias = matrix
    return value @ weight if bias is None else value @ weight + bias


def _like(found: Tensor, expected: Tensor, slack: float = 0.0) -> bool:
    """Whether two tensors are the same within rounding; `slack`: numbers that were added."""
    eps = torch.finfo(expected.dtype).eps
    limit = min(0.1, 4096 * eps) * float(expected.abs().max()) + 8 * eps * slack
    return bool((found - expected).abs().max() <= limit)


def _must(holds: bool, otherwise: str) -> None:
    if not holds:
        raise EngineError(f"edges: {otherwise}")


def wide(value: Tensor) -> Tensor:
    """In a precision that sums can be taken in."""
    return value.float() if value.dtype.itemsize < 4 else value
