"""What carrying something else over one edge would do, estimated for all edges at once.

Edge attribution patching (Syed et al. 2023, arXiv 2310.10348; Hanna et al. 2024, arXiv
2403.17806): (what is carried instead − base) of what a component writes into the residual stream,
times the gradient at the copy of the stream that another one reads.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, get_args

import torch
from torch import Tensor

from interv.engine.edge_circuit import circuit_logits
from interv.engine.edge_parts import (
    QKV,
    Block,
    EdgeGraph,
    Parts,
    Receiver,
    Sender,
    check_carried,
    wide,
)
from interv.engine.hooks import Visit, visiting
from interv.engine.reference import check_finite
from interv.engine.runs import Run
from interv.errors import EngineError
from interv.models.anatomy import Place

__all__ = [
    "EdgeGraph",
    "Method",
    "Parts",
    "Receiver",
    "Score",
    "Sender",
    "circuit_logits",
    "edge_scores",
]

Score = Callable[[Tensor], Tensor]
"""Logits `[run, len(at), vocab]` to a number for each run `[run]`, differentiable."""

Method = Literal["eap", "eap_ig_inputs"]
Quadrature = Literal["riemann", "midpoint"]


def edge_scores(
    parts: Parts,
    bases: Sequence[Run],
    carried: Tensor,
    at: Sequence[int],
    score: Score,
    *,
    method: Method = "eap",
    steps: int = 5,
    quadrature: Quadrature = "riemann",
) -> Tensor:
    """First-order effects of carrying something else over one edge alone.

    For each edge the sum over positions of (carried − base) of the sender's output · the gradient
    of the score with respect to the receiver's input. By method the gradient is

    - `eap`: at the base; one forward and one backward.
    - `eap_ig_inputs`: the mean over points of the straight way of the input from what is carried
      to the base. By `quadrature` these are k / steps of that way for k = 0 ... steps − 1, as in
      the code of Hanna et al. (`riemann`), or (k + ½) / steps (`midpoint`, whose error is of
      second order in 1 / steps).

    Args:
        parts: of the model, which is left as it was found.
        bases: runs of tokens of one length, without edits.
        carried: what each sender's edges would carry, `[sender, run, pos, d_model]`.
        at: positions whose logits the score gets, negative ones from the end.
        score: called with the logits of some of the bases, in their order; no run's number may
            depend on another's logits.
        method: where gradients are taken.
        steps: how many points; of no meaning for `eap`.
        quadrature: which points; of no meaning for `eap`.

    Returns:
        `[run, sender, receiver]`, float64; 0 where there is no edge.

    Raises:
        EngineError: runs that do not fit, a model whose residual stream is not the sum of its
            components, a score that is no number for each run or cannot be differentiated.
    """
    check_carried(parts, bases, carried)
    if method not in get_args(Method):
        raise EngineError(f"method '{method}': one of {', '.join(get_args(Method))}")
    if steps < 1:
        raise EngineError(f"steps: {steps}, expected at least 1")
    shares = [0.0] if method == "eap" else _shares(steps, quadrature)
    found = []
    for some in parts.batches(len(bases), len(bases[0])):
        gap = carried[:, some] - parts.outputs(bases[some])
        scores = torch.stack(
            [_scores(parts, bases[some], at, score, gap, share) for share in shares]
        ).mean(0)
        check_finite(scores)
        found.append(scores.cpu())
    return torch.cat(found)


def _shares(steps: int, quadrature: Quadrature) -> list[float]:
    """Of the gap, by which the base's input is moved at each point."""
    offset = 0.0 if quadrature == "riemann" else 0.5
    return [1 - (k + offset) / steps for k in range(steps)]


def _scores(
    parts: Parts, runs: Sequence[Run], at: Sequence[int], score: Score, gap: Tensor, share: float
) -> Tensor:
    """Gap · gradient for every edge, `[run, sender, receiver]`, in float64.

    Args:
        parts: of the model.
        runs: in one forward.
        at, score: as of `edge_scores`.
        gap: of the senders' outputs, `[sender, run, pos, d_model]`.
        share: of the input's gap, by which it is moved before gradients are taken.
    """
    graph = parts.graph
    gap_rows = wide(gap).transpose(0, 1).flatten(2)  # [run, sender, pos · d_model]
    exists = graph.exists.to(gap.device)
    scores = torch.zeros(len(runs), *exists.shape, dtype=torch.float64, device=gap.device)

    def put(receivers: slice, gradients: Sequence[Tensor]) -> None:
        of_all = torch.stack([gradient.reshape(gap.shape[1:]) for gradient in gradients])
        columns = wide(of_all).flatten(2).permute(1, 2, 0)
        scores[..., receivers] = (gap_rows @ columns).double() * exists[:, receivers]

    with torch.inference_mode(False), torch.enable_grad():
        tape = _Tape(parts, runs, at, score, share * gap[0])
        for layer, block in enumerate(parts.blocks):
            qkv = graph.qkv_of(layer)
            put(qkv, tape.into_heads(block))
            put(slice(qkv.stop, qkv.stop + 1), [tape.into_mlp(block)])
        put(slice(len(graph.receivers) - 1, None), [tape.gradients[parts.end]])
    return scores


class _Tape:
    """A forward that was recorded, and the score's gradients at what the components give.

    From there they are taken back through a projection and a norm to the component's own copy of
    the stream, and no further: nothing of the others' gradients is in them.
    """

    def __init__(
        self, parts: Parts, runs: Sequence[Run], at: Sequence[int], score: Score, moved: Tensor
    ) -> None:
        self.seen: dict[Place, Tensor] = {}
        self._share, self._n_heads = parts.graph.share, parts.graph.n_heads
        blocks = parts.blocks
        outputs = {block.places[kind] for block in blocks for kind in QKV}
        outputs |= {block.mlp for block in blocks}

        def visit_at(place: Place) -> Visit:
            def visit(value: Tensor, _given: Callable[[], Tensor]) -> Tensor:
                if place == blocks[0].start:
                    value = value + moved.reshape(value.shape).to(value.dtype)
                    # Here the tape begins: no parameter needs a gradient.
                    value = value.detach().requires_grad_()
                self.seen[place] = value
                # Some models go on to change projections in place.
                return value.clone() if place in outputs else value

            return visit

        places = {*outputs, parts.end}
        for block in blocks:
            places |= {block.start, block.normed, block.middle, block.project}
        visits = {place: visit_at(place) for place in sorted(places, key=str)}
        with visiting(parts.model, visits, grad=True):
            logits = parts.executor.call(runs, at, whole=False)
        check_finite(logits.detach())
        scores = score(logits)
        if scores.shape != (len(runs),):
            raise EngineError(
                f"the score gives the shape {tuple(scores.shape)}, expected a number for each of "
                f"{len(runs)} runs"
            )
        if not scores.requires_grad:
            raise EngineError("the score cannot be differentiated in the logits")
        order = [*sorted(outputs | {b.project for b in blocks}, key=str), parts.end]
        seen = [self.seen[place] for place in order]
        found = torch.autograd.grad(scores.sum(), seen, retain_graph=True, allow_unused=True)
        self.gradients: dict[Place, Tensor] = {}
        for place, gradient in zip(order, found, strict=True):
            if gradient is None:
                raise EngineError(f"{place}: no gradient comes back to it from the score")
            self.gradients[place] = gradient

    def into_heads(self, block: Block) -> list[Tensor]:
        """At the copies that a layer's queries, keys and values read, each `[run, pos, d_model]`.

        Only the norm is gone back through for each head: the projections are matrices.
        """
        normed, stream = self.seen[block.normed], self.seen[block.start]
        through = self._through_each(block)
        found: list[Tensor] = []
        for kind in QKV:
            weight, _ = block.weights[kind]
            for head in range(self._n_heads):
                group, member = (head, 0) if kind == "q" else divmod(head, self._share)
                columns = block.columns[kind][group]
                gradients = self.gradients if kind == "q" else through[member]
                of_head = gradients[block.places[kind]][..., columns] @ weight[:, columns].T
                found += torch.autograd.grad(
                    normed, stream, of_head.reshape(normed.shape), retain_graph=True
                )
        return found

    def _through_each(self, block: Block) -> list[dict[Place, Tensor]]:
        """Gradients at keys and values that come through the first head of each group, and so on.

        Heads of one group read the same keys; what each of them alone makes of these comes back
        from its own values.
        """
        if self._share == 1:
            return [self.gradients]
        places = list(dict.fromkeys(block.places[kind] for kind in QKV[1:]))
        values, gradient = self.seen[block.project], self.gradients[block.project]
        member = torch.arange(self._n_heads, device=values.device) % self._share
        by_head = gradient.unflatten(-1, (self._n_heads, -1))  # type: ignore[no-untyped-call]
        found = []
        for i in range(self._share):
            of_these = (by_head * (member == i)[:, None]).reshape(gradient.shape)
            at_places = torch.autograd.grad(
                values, [self.seen[place] for place in places], of_these, retain_graph=True
            )
            found.append(dict(zip(places, at_places, strict=True)))
        return found

    def into_mlp(self, block: Block) -> Tensor:
        """At the copy that a layer's MLP reads, `[run, pos, d_model]`."""
        output, stream = self.seen[block.mlp], self.seen[block.middle]
        (found,) = torch.autograd.grad(output, stream, self.gradients[block.mlp], retain_graph=True)
        return found
