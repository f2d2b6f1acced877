"""Running a circuit of edges: all other edges carry what is given instead."""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from interv.engine.edge_parts import QKV, Block, Parts, check_carried
from interv.engine.hooks import Visit, module_input, visiting
from interv.engine.reference import check_finite
from interv.engine.runs import Run
from interv.errors import EngineError
from interv.models.anatomy import Place


def circuit_logits(
    parts: Parts, bases: Sequence[Run], carried: Tensor, keep: Tensor, at: Sequence[int]
) -> Tensor:
    """The base runs' logits where every edge that is not kept carries something else.

    As `evaluate_graph` of EAP-IG: a receiver reads the stream as it is in this run, plus the sum
    over its dropped edges of (carried − this run) of the sender's output. With all edges kept these
    are the logits of the bases, with none and what the senders write in other runs those of them.

    Args:
        parts: of the model, which is left as it was found.
        bases: runs of tokens of one length, without edits.
        carried: what each sender's dropped edges carry, `[sender, run, pos, d_model]`.
        keep: edges, bool `[sender, receiver]`; where the graph has none it does not matter.
        at: positions whose logits are wanted, negative ones from the end.

    Returns:
        `[run, len(at), vocab]`.

    Raises:
        EngineError: runs or edges that do not fit, a model whose residual stream is not the sum
            of its components, logits that are not finite.
    """
    check_carried(parts, bases, carried)
    exists = parts.graph.exists
    if keep.shape != exists.shape or keep.dtype != torch.bool:
        raise EngineError(
            f"keep: {keep.dtype} {tuple(keep.shape)}, expected bool {tuple(exists.shape)}"
        )
    dropped = exists & ~keep.cpu()
    batches = parts.batches(len(bases), len(bases[0]))
    return torch.cat(
        [_Circuit(parts, carried[:, some], dropped).logits(bases[some], at) for some in batches]
    )


class _Circuit:
    """One forward of some runs.

    Attributes:
        gap: carried − this run of the senders' outputs `[sender, run, pos, d_model]`, once they
            are known; until then what is carried.
    """

    def __init__(self, parts: Parts, carried: Tensor, dropped: Tensor) -> None:
        self.parts, self.graph = parts, parts.graph
        self.gap = carried.clone()
        self.dropped = dropped.to(self.gap.device)

    def logits(self, bases: Sequence[Run], at: Sequence[int]) -> Tensor:
        visits: dict[Place, Visit] = {}
        with contextlib.ExitStack() as stack:
            for layer, block in enumerate(self.parts.blocks):
                visits |= self._visits(layer, block, stack)
            last = visits.get(self.parts.end)

            def to_logits(value: Tensor, given: Callable[[], Tensor]) -> Tensor:
                value = last(value, given) if last else value
                return self._moved(value, slice(len(self.graph.receivers) - 1, None))[0]

            visits[self.parts.end] = to_logits
            with visiting(self.parts.model, visits):
                logits = self.parts.executor.call(bases, at, whole=False)
        check_finite(logits)
        return logits

    def _moved(self, stream: Tensor, receivers: slice) -> Tensor:
        """Some receivers' own copies of a stream, `[receiver, run, pos, d_model]`.

        Only what was computed before them can be dropped.
        """
        dropped = self.dropped[:, receivers]
        before = int(dropped.any(1).nonzero().max()) + 1 if dropped.any() else 0
        share = dropped[:before].to(stream.dtype)
        return stream + torch.einsum("sv,srpd->vrpd", share, self.gap[:before])

    def _visits(self, layer: int, block: Block, stack: contextlib.ExitStack) -> dict[Place, Visit]:
        """Those of one layer; hooks of another kind go onto the stack."""
        graph, parts = self.graph, self.parts
        heads, qkv = graph.heads_of(layer), graph.qkv_of(layer)
        for_mlp = slice(qkv.stop, qkv.stop + 1)
        changed = bool(self.dropped[:, qkv.start : for_mlp.stop].any())
        # In a parallel block what is put in for the MLP would reach the heads.
        into_heads = changed and (graph.parallel or bool(self.dropped[:, qkv].any()))
        seen: dict[str, Tensor] = {}

        def enter(stream: Tensor, run: _Upto) -> Tensor:
            if layer == 0:
                self.gap[0] -= stream
            seen["stream"] = stream
            if into_heads:
                seen["values"] = self._values(block, stream, self._moved(stream, qkv), run)
            # All else that reads a parallel block's input is its MLP.
            return self._moved(stream, for_mlp)[0] if graph.parallel and changed else stream

        def attend(value: Tensor, _given: Callable[[], Tensor]) -> Tensor:
            rows = seen.get("values", value.reshape(*seen["stream"].shape[:2], -1))
            self.gap[heads] -= parts.heads(block, rows)
            return rows.reshape(value.shape)

        def attended(value: Tensor, _given: Callable[[], Tensor]) -> Tensor:
            seen["attention"] = value.reshape(seen["stream"].shape).clone()
            return value

        def middle(value: Tensor, _given: Callable[[], Tensor]) -> Tensor:
            rows = value.reshape(seen["stream"].shape)
            return self._moved(rows, for_mlp)[0].reshape(value.shape)

        def mlp(value: Tensor, _given: Callable[[], Tensor]) -> Tensor:
            rows = value.reshape(seen["stream"].shape)
            self.gap[graph.mlp_of(layer)] -= rows
            # Falcon goes on to add to it in place.
            seen["mlp"] = rows.clone()
            return value

        def leave(_value: Tensor, _given: Callable[[], Tensor]) -> Tensor:
            # What was put in for the MLP went round it too.
            return seen["stream"] + seen["attention"] + seen["mlp"]

        stack.enter_context(_entering(block, enter))
        visits: dict[Place, Visit] = {block.project: attend, block.mlp: mlp}
        if not changed:
            return visits
        if graph.parallel:
            out = parts.executor.sites.anatomy.place("block_output", layer)
            return {**visits, block.attention: attended, out: leave}
        return {**visits, block.middle: middle}

    def _values(self, block: Block, stream: Tensor, copies: Tensor, run: _Upto) -> Tensor:
        """The heads' values where each of their inputs has its own copy, `[run, pos, width]`.

        Args:
            block: the layer's.
            stream: into the block.
            copies: of the stream, for queries, keys and values of each head in turn.
            run: the block, as far as it is wanted.
        """
        n_heads, share = self.graph.n_heads, self.graph.share
        normed = run(copies.flatten(0, 1), list(block.modules.values()), {}).reshape(copies.shape)
        of_kind = dict(zip(QKV, torch.split(normed, n_heads), strict=True))
        found = stream.new_empty(0)
        # Heads that share a key head take turns at having their own keys and values there.
        for member in range(share):
            writes: dict[nn.Module, list[tuple[Tensor, Tensor]]] = defaultdict(list)
            for kind in QKV:
                weight, bias = block.weights[kind]
                own = of_kind[kind] if kind == "q" else of_kind[kind][member::share]
                for columns, copy in zip(block.columns[kind], own, strict=True):
                    new = copy @ weight[:, columns]
                    new = new if bias is None else new + bias[columns]
                    writes[block.modules[kind]].append((columns, new))
            values = run(stream, (block.after_heads,), writes)
            by_head = values.reshape(*stream.shape[:2], n_heads, -1)
            if member == 0:
                found = by_head.clone()
            found[:, :, member::share] = by_head[:, :, member::share]
        return found.flatten(2)


_Writes = Mapping[nn.Module, Sequence[tuple[Tensor, Tensor]]]
_Upto = Callable[[Tensor, Sequence[nn.Module], _Writes], Tensor]
"""From a block's input to what first goes into one of some modules; columns of what others give
are written on the way."""


class _ReachedError(Exception):
    """Ends a block's forward where its projections begin; carries what they were to read."""

    def __init__(self, value: Tensor) -> None:
        super().__init__("not to be seen")
        self.value = value


@contextlib.contextmanager
def _entering(block: Block, enter: Callable[[Tensor, _Upto], Tensor]) -> Iterator[None]:
    """Within: what goes into a block is `enter` of what would have gone.

    It also gets a way to run the block itself, part of the way, on other streams.
    """

    def stop(_module: nn.Module, args: Any, kwargs: Any) -> None:
        raise _ReachedError(module_input(block.normed, args, kwargs)[1])

    def writing(some: Sequence[tuple[Tensor, Tensor]]) -> Callable[..., Tensor]:
        def write(_module: nn.Module, _args: Any, value: Tensor) -> Tensor:
            value = value.clone()
            for columns, new in some:
                value[..., columns] = new.reshape(*value.shape[:-1], -1)
            return value

        return write

    def on_input(module: nn.Module, args: Any, kwargs: Any) -> Any:
        name, stream = module_input(block.start, args, kwargs)

        def given(value: Tensor) -> tuple[Any, dict[str, Any]]:
            return ((value, *args[1:]), kwargs) if args else (args, {**kwargs, name: value})

        def run(value: Tensor, upto: Sequence[nn.Module], writes: _Writes) -> Tensor:
            args, kwargs = given(value)
            with contextlib.ExitStack() as stack:
                for end in upto:
                    # Before the visits of the run that goes on: this one is none of theirs.
                    handle = end.register_forward_pre_hook(stop, with_kwargs=True, prepend=True)
                    stack.callback(handle.remove)
                for written, some in writes.items():
                    handle = written.register_forward_hook(writing(some))
                    stack.callback(handle.remove)
                try:
                    module.forward(*args, **kwargs)
                except _ReachedError as reached:
                    return reached.value
            raise EngineError(f"{block.start}: its projections were not reached")

        return given(enter(stream, run))

    handle = block.module.register_forward_pre_hook(on_input, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()
