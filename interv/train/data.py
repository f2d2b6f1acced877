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
        torch.tensor([len(e.base.ids) - 1 for e in some]),
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


class Prepared:
    """A group under the sites of a fit: sources' states, and where each base starts.

    Args:
        runner: of the model.
        group: the pairs.
        fit: whose sites.
        budget: bytes that may be kept; beyond it each batch runs its bases in full once more.
    """

    def __init__(self, runner: BatchRunner, group: Group, fit: Fit, budget: int) -> None:
        self.group = group
        self._runner = runner
        self.spots = {site: group.spot(site, None) for site in fit.sites}
        self._layer = runner.first_layer(list(self.spots.values()))
        self._first = self._first_position()
        self.states: dict[tuple[FitSite, int], Tensor] = {}
        with torch.no_grad():
            for variable in sorted({v for site in fit.sites for v in site.variables}):
                self._read(variable, [site for site in fit.sites if variable in site.variables])
            self.kept = self._keep(budget)

    def _first_position(self) -> int:
        found = [spot.positions for spot in self.spots.values()]
        if any(positions is None for positions in found):
            return 0
        return min(int(positions.min()) for positions in found if positions is not None)

    def _read(self, variable: int, sites: Sequence[FitSite]) -> None:
        spots = [self.group.spot(site, variable) for site in sites]
        parts: list[list[Tensor]] = [[] for _ in sites]
        for rows in self.group.rows():
            inputs = self.group.sources[variable][rows]
            found = self._runner.states(inputs, [spot[rows] for spot in spots])
            for part, states in zip(parts, found, strict=True):
                part.append(states)
        for site, part in zip(sites, parts, strict=True):
            states = torch.cat(part)
            whole = site.unit is None and self.group.read is not None
            if whole and states.shape[1] != self.group.base.shape[1]:
                raise EngineError("positions: whole, but a source is of another length")
            self.states[site, variable] = states

    def _keep(self, budget: int) -> Kept | None:
        if self._layer is None:
            return None
        parts: list[Kept] = []
        for rows in self.group.rows():
            part = self._runner.keep(self.group.base[rows], self._layer, self._first)
            if part.n_bytes * len(self.group) > budget * len(rows):
                return None
            parts.append(part)
        return Kept.joined(parts)

    def logits(self, rows: Tensor, edits: Sequence[BatchEdit]) -> Tensor:
        """Logits of some pairs after edits that are made for them."""
        group = self.group
        read = None if group.read is None else group.read[rows]
        kept: Kept | None = None
        if self.kept is not None:
            kept = self.kept[rows]
        elif self._layer is not None:
            kept = self._runner.keep(group.base[rows], self._layer, self._first)
        # Training looks at its loss, and says what to do.
        finite = not torch.is_grad_enabled()
        return self._runner.logits(group.base[rows], edits, read, kept, finite=finite)

    def edits(self, parts: Sequence[FitPart], rows: Tensor) -> list[BatchEdit]:
        """The parts of a fit as edits of some pairs, each where its variable is exchanged."""
        return [self._edit(part.site, part.variable, part.intervention, rows) for part in parts]

    def whole(self, rows: Tensor) -> list[BatchEdit]:
        """The whole of each site exchanged."""
        return [self._edit(site, variable, Vanilla(), rows) for site, variable in self.states]

    def _edit(
        self, site: FitSite, variable: int, intervention: Intervention, rows: Tensor
    ) -> BatchEdit:
        exchanged = self.group.exchanged[rows, variable]
        source = self.states[site, variable][rows] if intervention.needs_source else None
        some = None if bool(exchanged.all()) else exchanged
        return BatchEdit(self.spots[site][rows], intervention, source, some)
