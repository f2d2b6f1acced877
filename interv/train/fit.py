"""One fit: an intervention, or the model itself, under its data, its loss and its controls."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from interv.engine.batch import BatchEdit, BatchRunner
from interv.engine.interventions import Vanilla
from interv.engine.masks import Boundary
from interv.plan.train import Fit
from interv.spec.train import TrainSpec, part_of
from interv.train.data import Group, Prepared
from interv.train.parts import (
    About,
    FitPart,
    make_parts,
    modules_of,
    openness,
    randomised,
    set_temperature,
)

_SAMPLE = 65536  # activations of a site, for principal components
Edits = Callable[[Prepared, Tensor], Sequence[BatchEdit]]


@dataclass
class Split:
    """A split's pairs under the sites of a fit, in groups that share forwards."""

    groups: list[Prepared]

    def __len__(self) -> int:
        return sum(len(prepared.group) for prepared in self.groups)

    def of(self, pairs: Tensor) -> Iterator[tuple[Prepared, Tensor, int]]:
        """Groups, their rows, and the number of their first pair, of pairs numbered over all."""
        first = 0
        for prepared in self.groups:
            n = len(prepared.group)
            rows = pairs[(pairs >= first) & (pairs < first + n)] - first
            if len(rows):
                yield prepared, rows, first
            first += n


def prepare(runner: BatchRunner, groups: Sequence[Group], fit: Fit, budget: int) -> Split:
    """The pairs of some groups, with all that a fit's training does not change."""
    share = budget // max(1, len(groups))
    return Split([Prepared(runner, group, fit, share) for group in groups if len(group)])


class Intervening:
    """A trained intervention.

    Args:
        spec: of the run.
        fit: which one.
        train, validation: the pairs.
        among: columns that an answer is chosen from; None: the vocabulary.
        seed: of the intervention at first.
        labels: instead of the right ones, of all training pairs (a control).
    """

    def __init__(
        self,
        spec: TrainSpec,
        fit: Fit,
        runner: BatchRunner,
        train: Split,
        validation: Split,
        among: Tensor | None,
        seed: int,
        labels: Tensor | None = None,
    ) -> None:
        self._spec, self._runner = spec, runner
        self._train, self._validation, self._among = train, validation, among
        self.parts = make_parts(fit, spec.intervention, about_sites(runner, fit, train), seed)
        self.modules: nn.Module = modules_of(self.parts).to(device_of(runner))
        self._labels = labels
        self.sizes: Sequence[int] = [len(prepared.group) for prepared in train.groups]

    def groups(self) -> list[dict[str, Any]]:
        lr = self._spec.train.lr
        boundaries = [m.boundary for m in self.modules.modules() if isinstance(m, Boundary)]
        known = set(map(id, boundaries))
        others = [p for p in self.modules.parameters() if p.requires_grad and id(p) not in known]
        found: list[dict[str, Any]] = [{"params": others, "lr": lr}] if others else []
        if boundaries:
            found.append({"params": boundaries, "lr": self._spec.train.boundary_lr or lr})
        return found

    def loss(self, pairs: Tensor) -> Tensor:
        total = torch.zeros(())
        for prepared, rows, first in self._train.of(pairs):
            labels = prepared.group.label[rows]
            if self._labels is not None:
                labels = self._labels[first + rows]
            with self._mixed():
                logits = prepared.logits(rows, prepared.edits(self.parts, rows))
            total = total.to(logits.device) + cross_entropy(logits, labels, self._among)
        if self._spec.intervention.penalty:
            share = openness(self.parts)
            if share is not None:
                total = total + self._spec.intervention.penalty * share * len(pairs)
        return total

    def _mixed(self) -> contextlib.AbstractContextManager[Any]:
        # On CUDA only: the plan and the worker see to that.
        if self._spec.train.autocast is None:
            return contextlib.nullcontext()
        return torch.autocast("cuda", dtype=torch.bfloat16)

    def accuracy(self) -> float:
        found = hits(self._validation, lambda p, rows: p.edits(self.parts, rows), self._among)
        return float(found.double().mean())

    def temper(self, value: float) -> None:
        set_temperature(self.parts, value)

    def changed(self) -> None:
        pass

    def random(self, seed: int) -> list[FitPart]:
        """The same parts in random directions."""
        return randomised(self.parts, seed)


class Interchanging:
    """A model that is trained itself, under fixed interchanges (Geiger et al. 2022).

    The loss is that of the counterfactual labels, and `task_weight` times that of the base's own;
    gradients go through the sources too.

    Args:
        runner: of the model, whose parameters are trained.
    """

    def __init__(
        self,
        spec: TrainSpec,
        fit: Fit,
        runner: BatchRunner,
        train: Sequence[Group],
        validation: Sequence[Group],
        among: Tensor | None,
    ) -> None:
        self._spec, self._fit, self._runner = spec, fit, runner
        self._train, self._validation, self._among = list(train), list(validation), among
        self.modules = runner.model
        self.modules.requires_grad_(True)
        self.sizes: Sequence[int] = [len(group) for group in train]

    def groups(self) -> list[dict[str, Any]]:
        return [{"params": list(self.modules.parameters()), "lr": self._spec.train.lr}]

    def loss(self, pairs: Tensor) -> Tensor:
        # Of a batch without a pair that is taught the loss is 0, and so is its gradient.
        first, total = 0, torch.zeros((), requires_grad=True)
        for group in self._train:
            rows = pairs[(pairs >= first) & (pairs < first + len(group))] - first
            first += len(group)
            if not len(rows):
                continue
            some = group.take(rows)
            weight = self._spec.train.task_weight
            if weight:
                plain = self._runner.logits(some.base, (), some.read)
                total = total + weight * cross_entropy(plain, some.own, self._among)
            taught = some.take(self._taught(some).nonzero()[:, 0])
            if len(taught):
                logits = interchanged(self._runner, self._fit, taught)
                total = total + cross_entropy(logits, taught.label, self._among)
        return total

    def _taught(self, group: Group) -> Tensor:
        """Pairs whose exchange is among those that are trained on."""
        only = self._spec.train.exchange
        if only is None:
            return torch.ones(len(group), dtype=torch.bool)
        names = self._spec.variables
        wanted = [part_of(text, names) for text in only]
        found = [
            "+".join(n for n, on in zip(names, row, strict=True) if on) in wanted
            for row in group.exchanged.tolist()
        ]
        return torch.tensor(found)

    @torch.no_grad()
    def accuracy(self) -> float:
        found = [
            right(interchanged(self._runner, self._fit, some), some.label, self._among)
            for group in self._validation
            for some in (group.take(rows) for rows in group.rows())
        ]
        return float(torch.cat(found).double().mean())

    def temper(self, value: float) -> None:
        pass

    def changed(self) -> None:
        pass


def interchanged(runner: BatchRunner, fit: Fit, group: Group) -> Tensor:
    """Logits of pairs whose variables' sites have the sources' states; gradients go everywhere."""
    edits = []
    for variable in sorted({v for site in fit.sites for v in site.variables}):
        sites = [site for site in fit.sites if variable in site.variables]
        spots = [group.spot(site, variable) for site in sites]
        states = runner.states(group.sources[variable], spots)
        edits += [
            BatchEdit(group.spot(site, None), Vanilla(), state, group.exchanged[:, variable])
            for site, state in zip(sites, states, strict=True)
        ]
    return runner.logits(group.base, edits, group.read)


def about_sites(runner: BatchRunner, fit: Fit, split: Split) -> dict[Any, About]:
    """Width, heads and some activations of each site of a fit."""
    found = {}
    for site in fit.sites:
        states = torch.cat([prepared.some_states(site, _SAMPLE) for prepared in split.groups])
        units = runner.anatomy.n_units(site.component)
        heads = len(site.heads) if site.heads is not None else units or 1
        found[site] = About(states.shape[-1], heads, states[:_SAMPLE].cpu().float())
    return found


def cross_entropy(logits: Tensor, labels: Tensor, among: Tensor | None) -> Tensor:
    """The sum over rows, in float32 at least; labels are columns of the whole vocabulary."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    labels = labels.to(logits.device)
    if among is not None:
        logits = logits[:, among]
        labels = torch.searchsorted(among.to(labels.device), labels)
    return nn.functional.cross_entropy(logits, labels, reduction="sum")


def right(logits: Tensor, labels: Tensor, among: Tensor | None) -> Tensor:
    """Whether the top answer of each row is its label, `[row]`."""
    if among is None:
        top = logits.argmax(-1)
    else:
        top = among.to(logits.device)[logits[:, among].argmax(-1)]
    return (top.cpu() == labels.cpu()).detach()


@torch.no_grad()
def hits(split: Split, edits: Edits, among: Tensor | None) -> Tensor:
    """Whether each pair's top answer is its counterfactual label, in the groups' order."""
    found = []
    for prepared in split.groups:
        group = prepared.group
        for rows in group.rows():
            logits = prepared.logits(rows, edits(prepared, rows))
            found.append(right(logits, group.label[rows], among))
    return torch.cat(found)


def device_of(runner: BatchRunner) -> torch.device:
    """Where the model is."""
    return next(runner.model.parameters()).device
