"""From sites to tensors: which module, which rows and columns of what passes there."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from interv.engine.runs import Edit, Inputs, Run, Site
from interv.errors import EngineError
from interv.models.anatomy import Anatomy, Place


class Sites:
    """An anatomy's answers, kept: sweeps ask for the same ones over and over."""

    def __init__(self, anatomy: Anatomy) -> None:
        self.anatomy = anatomy
        self._places: dict[tuple[str, int], Place] = {}
        self._layers: dict[Place, int | None] = {}
        self._columns: dict[Site, Tensor | None] = {}

    @property
    def n_tokens(self) -> int | None:
        """Of the vocabulary, where that is known."""
        return self.anatomy.facts.vocab_size if self.anatomy.facts else None

    def place(self, site: Site) -> Place:
        """Where a site stands; an EngineError where the model has no such place."""
        key = site.component, site.layer
        if key not in self._places:
            self._places[key] = self.anatomy.place(*key)
        return self._places[key]

    def layer(self, place: Place) -> int | None:
        """The block in which a place stands; see `Anatomy.layer_of`."""
        if place not in self._layers:
            self._layers[place] = self.anatomy.layer_of(place)
        return self._layers[place]

    def check(self, run: Run) -> None:
        """That each site of a run's edits is there, also of those that will change nothing.

        Raises:
            EngineError: one is not.
        """
        n_tokens = self.n_tokens
        if not isinstance(run.ids, Inputs) and n_tokens is not None:
            low, high = min(run.ids, default=-1), max(run.ids, default=-1)
            if low < 0 or high >= n_tokens:
                raise EngineError(
                    f"token ids {low if low < 0 else high} of a run of {len(run)} tokens: at least "
                    f"one, each from 0 to {n_tokens - 1}"
                )
        for edit in run.edits:
            self._check(edit.site, run)
            if edit.source is not None:
                self._check(edit.reads, edit.source)

    def check_all(self, runs: Sequence[Run], sites: Sequence[Site]) -> None:
        """That these runs have these sites; an EngineError where one has not."""
        for run in runs:
            for site in sites:
                self._check(site, run)

    def _check(self, site: Site, run: Run) -> None:
        self.place(site)
        self.columns(site)
        if site.positions is None or isinstance(run.ids, Inputs):
            return
        if max(site.positions) >= len(run):
            raise EngineError(
                f"{site.component}: position {max(site.positions)} of {len(run)} tokens"
            )

    def columns(self, site: Site) -> Tensor | None:
        """Its columns of the module's tensor; None: all. An EngineError where there are none."""
        key = Site(site.component, 0, None, site.heads, site.dims)
        if key not in self._columns:
            found = self.anatomy.columns(site.component, site.heads, site.dims)
            self._columns[key] = None if found is None else torch.tensor(found)
        return self._columns[key]

    def wanted_by(self, runs: Iterable[Run]) -> dict[Run, set[Place]]:
        """The runs that these read from, and the places at which they do; checks their sites."""
        wanted: dict[Run, set[Place]] = defaultdict(set)
        for run in runs:
            self.check(run)
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


def unfold(
    value: Tensor, rows: int, what: object, *, maps: bool, length: int | None = None
) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """What passes a place as `[row, pos, width]`, and the way back.

    Rows come first; a tensor of two dimensions has one position a row, or its tokens flattened.
    One of four is a feature map `[row, channel, height, width]`, whose pixels are positions, where
    the model has `maps`; else it is `[row, pos, head, head_width]`.

    Args:
        value: what passes.
        rows: how many there are.
        what: names the place, in errors.
        maps: whether the model is of no known family.
        length: how many positions a row has, where that is known.

    Raises:
        EngineError: it has another shape, or one that can be read in two ways.
    """
    shape = value.shape
    if maps and value.dim() == 2 and rows > 1 and shape[0] not in (rows, rows * (length or 0)):
        # Flattened tokens of all rows, or one table for all of them (positions, say)?
        if shape[0] != length:
            raise EngineError(
                f"{what}: shape {tuple(shape)} for {rows} rows can be read in two ways; ask for "
                "one run at a time"
            )
        value = value.expand(rows, *shape)
        shape = value.shape
    if value.dim() == 2 and shape[0] % rows == 0:
        return value.reshape(rows, -1, shape[1]), lambda new: new.reshape(shape)
    if value.dim() in (3, 4) and shape[0] == 1 < rows:
        # The same for all rows (position embeddings): from here on each has its own.
        value = value.expand(rows, *shape[1:])
        shape = value.shape
    if value.dim() == 3 and shape[0] == rows:
        return value, lambda new: new
    if value.dim() == 4 and shape[0] == rows and not maps:
        return value.flatten(2), lambda new: new.reshape(shape)
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
        most = max((int(columns.max()) for columns in some), default=-1)
        if most >= flat.shape[1]:
            name = group[0][0].edit.site.component
            raise EngineError(f"{name}: dimension {most}: there are {flat.shape[1]}")
        base = flat[where]
        other: Tensor | None = None
        if intervention.reads_input:
            whole = given()
            if whole.shape != flat.shape:
                raise EngineError(
                    f"{group[0][0].edit.site.component}: its module gets a width of "
                    f"{whole.shape[-1]} and gives {flat.shape[-1]}: it cannot be skipped"
                )
            other = whole[where]
        elif intervention.needs_source:
            sources = [source(item.edit) for item, _ in group]
            for (item, _), one in zip(group, sources, strict=True):
                _fits(item.edit, one, base.shape[1:])
            other = torch.stack(sources).to(flat.device)
        flat[where] = applied(group[0][0].edit, base, other)
    return flat


def _fits(edit: Edit, source: Tensor, shape: Sequence[int]) -> None:
    if tuple(source.shape) != tuple(shape):
        raise EngineError(
            f"{edit.site.component}: the source has {tuple(source.shape)} (positions, width), the "
            f"site {tuple(shape)}"
        )


def applied(edit: Edit, base: Tensor, source: Tensor | None) -> Tensor:
    """An edit's intervention on these activations.

    Raises:
        EngineError: the result is of another shape than the base.
    """
    name = edit.site.component
    new = edit.intervention.apply(base, source)
    if new.shape != base.shape:
        kind = type(edit.intervention).__name__
        raise EngineError(f"{name}: {kind} gives {tuple(new.shape)} for {tuple(base.shape)}")
    return new.to(base.dtype)
