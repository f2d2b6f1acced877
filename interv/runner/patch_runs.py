"""Patches as runs of the engine: base runs with sites, or paths, from another run."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from interv.engine import (
    Edit,
    Intervention,
    Mean,
    ReferenceExecutor,
    Run,
    Site,
    Vanilla,
    Zero,
)
from interv.engine.metrics import Answers
from interv.models.anatomy import Place
from interv.plan import PatchPlan
from interv.plan.grid import Spot
from interv.plan.patch import Patch
from interv.runner.trained import swaps_of
from interv.task.pairs import Pair

Ids = tuple[int, ...]
_HEADS, _MLPS = "attention_value_output", "mlp_output"


class PatchRuns:
    """What a plan's cells are on a model.

    Args:
        plan: whose cells.
        reference: computes the means of mean ablation.
        n_layers: of the model.
    """

    def __init__(self, plan: PatchPlan, reference: ReferenceExecutor, n_layers: int) -> None:
        self._plan, self._reference, self._n_layers = plan, reference, n_layers
        self._means: dict[tuple[str, Place], Tensor] = {}
        self._mean_edits: dict[tuple[str, Site], Mean] = {}
        folder = plan.spec.intervention.trained
        self._swaps: Sequence[Intervention] = [Vanilla()]
        if folder is not None:
            self._swaps = swaps_of(Path(folder), plan.files, reference.model)

    def patched(self, cell: Patch, tail: Ids) -> list[Run]:
        """The base run of a pair, patched: a run for each draw.

        Of a path (Wang et al. 2022, appendix B): the sender is changed while what is frozen stays
        as in the base run; the logits of that run are what arrives at them, and what it gives a
        receiver is put into a further run.
        """
        pair = self._plan.pairs[cell.prompt]
        base = Run(self._plan.base_ids(pair) + tail)
        sources: Sequence[Run | None] = self.sources(pair, tail) or [None]
        runs = []
        for source in sources:
            edits = tuple(e for spot in cell.spots for e in self._edits(pair, spot, source))
            if cell.freeze is None:
                runs.append(Run(base.ids, edits))
                continue
            middle = Run(base.ids, (*edits, *self._frozen(cell, base)))
            if not cell.receivers:
                runs.append(middle)
                continue
            arrive = tuple(Edit(site_of(spot), Vanilla(), middle) for spot in cell.receivers)
            runs.append(Run(base.ids, arrive))
        return runs

    def _frozen(self, cell: Patch, base: Run) -> Iterable[Edit]:
        """Heads and MLPs behind the sender, at every position, as in the base run."""
        assert cell.freeze is not None
        [sender] = cell.spots
        last = max((s.layer for s in cell.receivers), default=self._n_layers - 1)
        after = range(sender.layer + 1, last + 1)
        # A head's own layer's MLP reads what it writes.
        behind = after if sender.component == _MLPS else range(sender.layer, last + 1)
        for layer in behind:
            if "heads" in cell.freeze and layer in after:
                yield Edit(Site(_HEADS, layer), Vanilla(), base)
            if "mlps" in cell.freeze:
                yield Edit(Site(_MLPS, layer), Vanilla(), base)

    def sources(self, pair: Pair, tail: Ids) -> list[Run]:
        """The runs that states come from, one for each draw; none where they are constants."""
        kind, over = self._plan.spec.intervention.type, self._plan.spec.intervention.over
        if kind == "denoise":
            return [Run(pair.ids + tail)]
        if kind == "noise":
            return [Run((pair.corrupted_ids or ()) + tail)]
        if kind == "resample":
            others = [self._plan.pairs[i] for i in self._plan.drawn[pair.index]]
            return [Run(other.source(over) + tail) for other in others]
        return []

    def _edits(self, pair: Pair, spot: Spot, source: Run | None) -> list[Edit]:
        site = site_of(spot)
        if source is not None:
            return [Edit(site, swap, source) for swap in self._swaps]
        made: Intervention = Zero()
        if self._plan.spec.intervention.type == "mean":
            key = pair.group, site
            if key not in self._mean_edits:
                self._mean_edits[key] = Mean(
                    self._reference.sites.take(self._mean(pair, site), site)
                )
            made = self._mean_edits[key]
        return [Edit(site, made)]

    def _mean(self, pair: Pair, site: Site) -> Tensor:
        """The mean state at a place over the prompts of a pair's group, `[pos, ...]`."""
        place = self._reference.sites.place(site)
        if (pair.group, place) not in self._means:
            over = self._plan.spec.intervention.over
            others = [self._plan.pairs[i] for i in self._plan.drawn[pair.index]]
            runs = [Run(other.source(over)) for other in others]
            # All that the plan reads of these prompts at once, so that they run once.
            wanted = {
                self._reference.sites.place(Site(s.component, s.layer))
                for cell in self._plan.by_prompt[pair.index]
                for s in cell.spots
            } | {place}
            self._reference.need(dict.fromkeys(runs, wanted))
            for each in wanted:
                states = torch.stack([self._reference.kept[run, each] for run in runs])
                self._means[pair.group, each] = states.double().mean(0).to(states.dtype)
            self._reference.forget()
        return self._means[pair.group, place]

    def targets(
        self, pairs: Sequence[Pair], bases: Sequence[Run], keys: Iterable[tuple[str, int]]
    ) -> dict[tuple[str, int], Tensor]:
        """What patches would put at these places, `[run, pos, width]`."""
        wanted = list(keys)
        sites = [Site(*key) for key in wanted]
        kind = self._plan.spec.intervention.type
        if kind == "mean":
            found = [
                [self._reference.sites.take(self._mean(pair, site), site) for pair in pairs]
                for site in sites
            ]
        else:
            runs = bases if kind == "zero" else [self.sources(pair, ())[0] for pair in pairs]
            found = self._reference.states(runs, sites)
        stacked = [torch.stack(states) for states in found]
        if kind == "zero":
            stacked = [torch.zeros_like(states) for states in stacked]
        return dict(zip(wanted, stacked, strict=True))


def read_at(pair: Pair, tail: Ids) -> range:
    """Where an answer's tokens are predicted, from the end of the prompt and its tail."""
    if pair.read != len(pair.ids) - 1:
        at = pair.read - len(pair.ids)
        return range(at, at + 1)
    return range(-len(tail) - 1, 0)


def answers_of(pair: Pair) -> Answers:
    """The answers of a pair."""
    return Answers(pair.answer_ids, pair.wrong_ids)


def site_of(spot: Spot) -> Site:
    """A spot as the engine's site."""
    return Site(spot.component, spot.layer, spot.positions, spot.heads, spot.dims)


def held_by(cell: Patch) -> list[str]:
    """Components that a path holds as in the base run."""
    names = {"heads": _HEADS, "mlps": _MLPS}
    return [names[word] for word in cell.freeze or ()]
