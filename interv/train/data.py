"""The pairs of a split as tensors, in groups that share forwards; what a fit keeps of them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from interv.engine.batch import BatchEdit, BatchRunner, Kept, Spot
from interv.engine.interventions import Intervention, Vanilla
from interv.engine.runs import Site
from interv.errors import EngineError
from interv.models.made import class_indices, classes_of
from interv.plan.train import Fit, TrainPlan, vectors_of
from interv.plan.train_grid import FitSite
from interv.task.causal_values import Array
from interv.task.causal_vectors import encode
from interv.task.exchanges import Exchange, Said, position_of
from interv.train.parts import FitPart

_CHUNK_TOKENS = 4096
_CHUNK_VECTORS = 65536


@dataclass(frozen=True)
class Group:
    """Pairs whose bases have one length, and each variable's sources too.

    Attributes:
        index: of each pair, in its split.
        base, sources: token ids `[pair, pos]`, or vectors `[pair, width]`.
        exchanged: `[pair, variable]`.
        label, own: what the answer should be after the exchange, and the base's own.
        read: the position after which it is read; None for vectors.
        said: the prompts, whose spans are looked up; empty for vectors.
    """

    index: Tensor
    base: Tensor
    sources: tuple[Tensor, ...]
    exchanged: Tensor
    label: Tensor
    own: Tensor
    source_own: Tensor
    read: Tensor | None
    said: tuple[Exchange, ...]

    def __len__(self) -> int:
        return len(self.index)

    @property
    def chunk(self) -> int:
        """Pairs that go through the model at once where nothing is trained."""
        if self.read is None:
            return _CHUNK_VECTORS
        return max(1, _CHUNK_TOKENS // self.base.shape[1])

    def rows(self) -> Iterator[Tensor]:
        """All pairs, a chunk at a time."""
        yield from torch.split(torch.arange(len(self)), self.chunk)

    def take(self, rows: Tensor) -> Group:
        """Some of the pairs."""
        return Group(
            self.index[rows],
            self.base[rows],
            tuple(source[rows] for source in self.sources),
            self.exchanged[rows],
            self.label[rows],
            self.own[rows],
            self.source_own[rows],
            None if self.read is None else self.read[rows],
            tuple(self.said[i] for i in rows.tolist()) if self.said else (),
        )

    def spot(self, site: FitSite, variable: int | None) -> Spot:
        """A site in the bases (None), or in a variable's sources."""
        positions = None
        if self.said and site.unit is not None:
            said = [e.base if variable is None else e.sources[variable] for e in self.said]
            positions = torch.tensor([_positions(one, site.unit) for one in said])
        return Spot(Site(site.component, site.layer, None, site.heads, site.dims), positions)


def _positions(said: Said, unit: str | int) -> tuple[int, ...]:
    found = position_of(said, unit)
    assert found is not None
    return found


def groups_of(plan: TrainPlan, split: str) -> list[Group]:
    """A split's pairs as tensors."""
    if plan.causal.is_vector:
        return [_vectors(plan, split)]
    exchanges = [e for e in plan.exchanges if e.split == split]
    alike: dict[tuple[int, ...], list[int]] = defaultdict(list)
    for i, exchange in enumerate(exchanges):
        lengths = (exchange.base, *exchange.sources)
        alike[tuple(len(said.ids) for said in lengths)].append(i)
    return [_prompts(plan, exchanges, rows) for rows in alike.values()]


def _prompts(plan: TrainPlan, exchanges: Sequence[Exchange], rows: Sequence[int]) -> Group:
    some = [exchanges[i] for i in rows]
    names = plan.spec.variables
    return Group(
        torch.tensor(rows),
        torch.tensor([e.base.ids for e in some]),
        tuple(torch.tensor([e.sources[v].ids for e in some]) for v in range(len(names))),
        torch.tensor([[name in e.exchanged for name in names] for e in some]),
        torch.tensor([e.label_id for e in some]),
        torch.tensor([e.base.answer_id for e in some]),
        torch.tensor([[source.answer_id for source in e.sources] for e in some]),
        torch.tensor([e.base.read for e in some]),
        tuple(some),
    )


def _vectors(plan: TrainPlan, split: str) -> Group:
    made = vectors_of(plan, split)
    causal = plan.causal
    classes = classes_of(causal.variables[causal.output].values, causal.output)

    def labels(values: Array) -> Tensor:
        return torch.from_numpy(class_indices(classes, values))

    return Group(
        torch.arange(len(made)),
        torch.from_numpy(encode(causal, made.base)),
        tuple(torch.from_numpy(encode(causal, source)) for source in made.sources),
        torch.from_numpy(made.exchanged),
        labels(made.label),
        labels(made.base[causal.output]),
        torch.stack([labels(source[causal.output]) for source in made.sources], dim=1),
        None,
        (),
    )


States = dict[tuple[FitSite, int], Tensor]
"""By site and variable."""


class Prepared:
    """A group under the sites of a fit: sources' states, and where each base starts.

    What does not fit the budget is computed anew for each batch, to the same numbers.

    Args:
        runner: of the model.
        group: the pairs.
        fit: whose sites.
        budget: bytes that may be kept.
    """

    def __init__(self, runner: BatchRunner, group: Group, fit: Fit, budget: int) -> None:
        self.group = group
        self._runner = runner
        self._budget = budget
        self.spots = {site: group.spot(site, None) for site in fit.sites}
        self._layer = runner.first_layer(list(self.spots.values()))
        self._first = self._first_position()
        variables = sorted({v for site in fit.sites for v in site.variables})
        self._sources = [
            (variable, [site for site in fit.sites if variable in site.variables])
            for variable in variables
        ]
        # Sources first: they are less, and cost as much to compute.
        self._states = self._keep_states()
        self._kept = self._keep_bases()

    @property
    def keeps(self) -> tuple[bool, bool]:
        """Whether sources' states and bases are kept."""
        return self._states is not None, self._kept is not None

    def _first_position(self) -> int:
        found = [spot.positions for spot in self.spots.values()]
        if any(positions is None for positions in found):
            return 0
        return min(int(positions.min()) for positions in found if positions is not None)

    @torch.no_grad()
    def sources(self, rows: Tensor) -> States:
        """States of some pairs' sources at every site, `[pair, n, width]`."""
        if self._states is not None:
            return {at: states[rows] for at, states in self._states.items()}
        found: States = {}
        for variable, sites in self._sources:
            spots = [self.group.spot(site, variable)[rows] for site in sites]
            read = self._runner.states(self.group.sources[variable][rows], spots)
            for site, states in zip(sites, read, strict=True):
                whole = site.unit is None and self.group.read is not None
                if whole and states.shape[1] != self.group.base.shape[1]:
                    raise EngineError("positions: whole, but a source is of another length")
                found[site, variable] = states
        return found

    def _keep_states(self) -> States | None:
        self._states = None
        parts: list[States] = []
        for rows in self.group.rows():
            parts.append(self.sources(rows))
            n_bytes = sum(states.nbytes for states in parts[0].values())
            if len(parts) == 1 and n_bytes * len(self.group) > self._budget * len(rows):
                return None
        kept = {at: torch.cat([part[at] for part in parts]) for at in parts[0]}
        self._budget -= sum(states.nbytes for states in kept.values())
        return kept

    @torch.no_grad()
    def _keep_bases(self) -> Kept | None:
        if self._layer is None:
            return None
        parts: list[Kept] = []
        for rows in self.group.rows():
            part = self._runner.keep(self.group.base[rows], self._layer, self._first)
            if part.n_bytes * len(self.group) > self._budget * len(rows):
                return None
            parts.append(part)
        return Kept.joined(parts)

    def some_states(self, site: FitSite, most: int) -> Tensor:
        """The first states at a site, `[n, width]`, at most so many."""
        parts: list[Tensor] = []
        for rows in self.group.rows():
            parts.append(self.sources(rows)[site, site.variables[0]].flatten(0, 1))
            if sum(map(len, parts)) >= most:
                break
        return torch.cat(parts)[:most]

    def logits(self, rows: Tensor, edits: Sequence[BatchEdit]) -> Tensor:
        """Logits of some pairs after edits that are made for them."""
        group = self.group
        read = None if group.read is None else group.read[rows]
        kept: Kept | None = None
        if self._kept is not None:
            kept = self._kept[rows]
        elif self._layer is not None:
            kept = self._runner.keep(group.base[rows], self._layer, self._first)
        # Training looks at its loss, and says what to do.
        finite = not torch.is_grad_enabled()
        return self._runner.logits(group.base[rows], edits, read, kept, finite=finite)

    def edits(self, parts: Sequence[FitPart], rows: Tensor) -> list[BatchEdit]:
        """The parts of a fit as edits of some pairs, each where its variable is exchanged."""
        states = self.sources(rows) if any(p.intervention.needs_source for p in parts) else {}
        return [
            self._edit(part.site, part.variable, part.intervention, rows, states) for part in parts
        ]

    def whole(self, rows: Tensor) -> list[BatchEdit]:
        """The whole of each site exchanged."""
        states = self.sources(rows)
        return [self._edit(*at, Vanilla(), rows, states) for at in states]

    def _edit(
        self,
        site: FitSite,
        variable: int,
        intervention: Intervention,
        rows: Tensor,
        states: States,
    ) -> BatchEdit:
        exchanged = self.group.exchanged[rows, variable]
        source = states[site, variable] if intervention.needs_source else None
        some = None if bool(exchanged.all()) else exchanged
        return BatchEdit(self.spots[site][rows], intervention, source, some)
