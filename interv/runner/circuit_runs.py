"""Edge attribution and circuits of a patch plan, on a loaded model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from interv.engine import EdgeGraph, LoadedModel, Parts, ReferenceExecutor, Run
from interv.engine.edges import circuit_logits, edge_scores
from interv.engine.memory import halving
from interv.engine.metrics import differentiable
from interv.plan import PatchPlan
from interv.runner.journal import Record
from interv.runner.patch_runs import PatchRuns, answers_of, read_at
from interv.runner.sweep import Step
from interv.task.pairs import Pair


class CircuitRuns:
    """Scores of edges, and values of circuits, on a plan's pairs.

    Args:
        plan: whose pairs.
        model: that they go through.
        reference: of the model.
        runs: know which prompts an ablation takes activations from.
    """

    def __init__(
        self, plan: PatchPlan, model: LoadedModel, reference: ReferenceExecutor, runs: PatchRuns
    ) -> None:
        self._plan, self._reference, self._runs = plan, reference, runs
        self._parts = Parts(reference, model.module, EdgeGraph(model.anatomy))
        self._means: dict[tuple[Run, ...], Tensor] = {}

    def edges(self, step: Step) -> dict[str, Record]:
        """Scores of every edge, the mean over some pairs and over what each of them draws."""
        found: list[Tensor] = []
        for pairs in self._together(step.payload):
            found += halving(pairs, self._scores)
        self._reference.forget()
        mean = torch.stack(found).mean(0)[self._parts.graph.exists]
        return {step.ids[0]: {"scores": mean.tolist(), "n": len(step.payload)}}

    def _scores(self, pairs: Sequence[Pair]) -> Tensor:
        """Of pairs in one forward, for each draw, `[draw · pair, sender, receiver]`."""
        spec = self._plan.spec.circuit
        bases = [Run(pair.ids) for pair in pairs]
        score = differentiable(self._plan.metrics[0].of, [answers_of(pair) for pair in pairs])
        found = [
            edge_scores(
                self._parts,
                bases,
                carried,
                read_at(pairs[0], ()),
                score,
                method=spec.method,
                steps=spec.steps,
                quadrature=spec.quadrature,
            )
            for carried in self._carried(pairs, bases)
        ]
        return torch.cat(found)

    def circuit(self, step: Step) -> dict[str, Record]:
        """Some pairs' values where only some edges are kept, `[pair][draw]`."""
        indices, kept = step.payload
        exists = self._parts.graph.exists
        keep = torch.zeros_like(exists)
        keep[exists] = torch.tensor(kept(), dtype=torch.bool)

        def drawn(pairs: Sequence[Pair]) -> list[list[float]]:
            bases, at = [Run(pair.ids) for pair in pairs], read_at(pairs[0], ())
            score = differentiable(self._plan.metrics[0].of, [answers_of(pair) for pair in pairs])
            found = [
                score(circuit_logits(self._parts, bases, carried, keep, at)).double()
                for carried in self._carried(pairs, bases)
            ]
            values: list[list[float]] = torch.stack(found, 1).tolist()
            return values

        values = [row for pairs in self._together(indices) for row in halving(pairs, drawn)]
        self._reference.forget()
        return {step.ids[0]: {"values": values}}

    def _together(self, indices: Sequence[int]) -> Iterator[list[Pair]]:
        """Pairs, as many as go through the model at once."""
        pairs = [self._plan.pairs[i] for i in indices]
        for some in self._parts.batches(len(pairs), len(pairs[0].ids)):
            yield pairs[some]

    def _carried(self, pairs: Sequence[Pair], bases: Sequence[Run]) -> Iterator[Tensor]:
        """What dropped edges carry, `[sender, pair, pos, d_model]`, for each draw."""
        kind = self._plan.spec.intervention.type
        if kind == "zero":
            yield self._parts.zeros(bases)
        elif kind == "mean":
            yield torch.stack([self._mean(tuple(self._runs.averaged(pair))) for pair in pairs], 1)
        elif kind == "resample":
            sources = [self._runs.sources(pair, ()) for pair in pairs]
            for draw in zip(*sources, strict=True):
                yield self._parts.outputs(draw)
        else:
            # Restored or corrupted, a circuit runs on the clean prompt.
            yield self._parts.outputs([Run(pair.corrupted_ids or ()) for pair in pairs])

    def _mean(self, runs: tuple[Run, ...]) -> Tensor:
        """Of what senders write, at each position, over some runs, `[sender, pos, d_model]`."""
        if runs not in self._means:
            total: Tensor | None = None
            for some in self._parts.batches(len(runs), len(runs[0])):
                outputs = self._parts.outputs(runs[some]).double().sum(1)
                total = outputs if total is None else total + outputs
            assert total is not None
            dtype = next(self._parts.model.parameters()).dtype
            self._means[runs] = (total / len(runs)).to(dtype)
        return self._means[runs]
