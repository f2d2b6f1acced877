"""From sites to tensors: which module, which rows and columns of what passes there."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from interv.engine.runs import Edit, Run, Site
from interv.errors import EngineError
from interv.models.anatomy import Anatomy, Place


class Sites:
    """An anatomy's answers, kept: sweeps ask for the same ones over and over."""

    def __init__(self, anatomy: Anatomy) -> None:
        self.anatomy = anatomy
        self._places: dict[tuple[str, int], Place] = {}
        self._columns: dict[Site, Tensor | None] = {}

    def place(self, site: Site) -> Place:
        """Where a site stands; an EngineError where the model has no such place."""
        key = site.component, site.layer
        if key not in self._places:
            self._places[key] = self.anatomy.place(*key)
        return self._places[key]

    def columns(self, site: Site) -> Tensor | None:
        """Its columns of the module's tensor; None: all. An EngineError where there are none."""
        key = Site(site.component, 0, None, site.heads, site.dims)
        if key not in self._columns:
            found = self.anatomy.columns(site.component, site.heads, site.dims)
            self._columns[key] = None if found is None else torch.tensor(found)
        return self._columns[key]

    def wanted_by(self, runs: Iterable[Run]) -> dict[Run, set[Place]]:
        """The runs that these read from, and the places at which they do."""
        wanted: dict[Run, set[Place]] = defaultdict(set)
        for run in runs:
            for edit in run.edits:
                if edit.source is not None:
                    wanted[edit.source].add(self.place(edit.reads))
        return wanted

    def take(self, state: Tensor, site: Site) -> Tensor:
        """A site's part `[n_positions, width]` of what was kept `[pos, ...]` of its place."""
        if self.place(site).pattern:
            heads = state if site.heads is None else state[:, list(site.heads)]
            picked = heads if site.positions is None else heads[list(site.positions)]
            return picked.flatten(1)
        columns = self.columns(site)
        if site.positions is not None:
            if max(site.positions) >= len(state):
                raise EngineError(
                    f"{site.component}: position {max(site.positions)} of {len(state)}"
                )
            state = state[list(site.positions)]
        return state if columns is None else state[:, columns.to(state.device)]


def unfold(value: Tensor, rows: int, what: object) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """What passes a place as `[row, pos, width]`, and the way back.

    Rows come first; a tensor of two dimensions has one position a row, or its tokens flattened;
    a feature map `[row, channel, height, width]` has its pixels as positions.

    Raises:
        EngineError: it has another shape.
    """
    shape = value.shape
    if value.dim() == 2 and shape[0] % rows == 0:
        return value.reshape(rows, -1, shape[1]), lambda new: new.reshape(shape)
    if value.dim() in (3, 4) and shape[0] == 1 < rows:
        # The same for all rows (position embeddings): from here on each has its own.
        value = value.expand(rows, *shape[1:])
        shape = value.shape
    if value.dim() == 3 and shape[0] == rows:
        return value, lambda new: new
    if value.dim() == 4 and shape[0] == rows:
        return (
            value.flatten(2).transpose(1, 2),
            lambda new: new.transpose(1, 2).reshape(shape),
        )
    raise EngineError(f"{what}: shape {tuple(shape)}, expected {rows} rows first")


@dataclass(frozen=True)
class Todo:
    """An edit of one row: where the row's position 0 stands among all tokens, and its length."""

    edit: Edit
    start: int
    length: int

    def tokens(self) -> Tensor:
        """Indices of the tokens that are edited."""
        positions = self.edit.site.positions
        if positions is None:
            return torch.arange(self.start, self.start + self.length)
        if max(positions) >= self.length:
            raise EngineError(
                f"{self.edit.site.component}: position {max(positions)} of {self.length}"
            )
        return torch.tensor(positions) + self.start


def make_edits(
    flat: Tensor,
    todo: Sequence[Todo],
    sites: Sites,
    source: Callable[[Edit], Tensor],
    given: Callable[[], Tensor],
) -> Tensor:
    """`flat` with edits made; those of one row in order, like ones of several rows at once.

    Args:
        flat: what passes the place, `[token, width]`, the rows one after the other.
        todo: the edits.
        sites: of the model.
        source: an edit's source activations `[n_positions, width]`.
        given: the module's own input, as `flat`, for edits that read it.
    """
    flat = flat.clone()
    turns: dict[int, int] = defaultdict(int)
    groups: dict[tuple[object, ...], list[tuple[Todo, Tensor]]] = defaultdict(list)
    for item in todo:
        turn = turns[item.start]
        turns[item.start] += 1
        tokens, columns = item.tokens(), sites.columns(item.edit.site)
        width = None if columns is None else len(columns)
        groups[turn, item.edit.intervention, len(tokens), width].append((item, tokens))
    for _, group in sorted(groups.items(), key=lambda entry: entry[0][0]):  # type: ignore[arg-type,return-value]
        intervention = group[0][0].edit.intervention
        at = torch.stack([tokens for _, tokens in group]).to(flat.device)
        found = [sites.columns(item.edit.site) for item, _ in group]
        some = [columns for columns in found if columns is not None]
        where: tuple[Tensor, ...] = (at,)
        if some:
            where = at[:, :, None], torch.stack(some).to(flat.device)[:, None, :]
        other: Tensor | None = None
        if intervention.reads_input:
            other = given()[where]
        elif intervention.needs_source:
            other = torch.stack([source(item.edit) for item, _ in group]).to(flat.device)
        flat[where] = applied(group[0][0].edit, flat[where], other)
    return flat


def applied(edit: Edit, base: Tensor, source: Tensor | None) -> Tensor:
    """An edit's intervention on these activations.

    Raises:
        EngineError: source or result are of another shape than the base.
    """
    name = edit.site.component
    if source is not None and source.shape != base.shape:
        raise EngineError(
            f"{name}: the source has {tuple(source.shape[-2:])} (positions, width), the site "
            f"{tuple(base.shape[-2:])}"
        )
    new = edit.intervention.apply(base, source)
    if new.shape != base.shape:
        kind = type(edit.intervention).__name__
        raise EngineError(f"{name}: {kind} gives {tuple(new.shape)} for {tuple(base.shape)}")
    return new.to(base.dtype)
