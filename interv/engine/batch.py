"""Differentiable forwards of a batch, whole or only what follows an intervention.

Training an intervention runs the same rows over and over, and nothing before its site ever
changes. So a data set's hidden states at the first edited layer, and of the positions before
the first edited one the keys and values of all later layers, are kept once (`keep`), and a step
runs, forward and backward, the blocks from there on. Rows are a rectangle here: of one length,
edited at as many positions each. That is what makes it quicker than a `Walk`, whose rows may be
anything.
"""

from __future__ import annotations

import contextlib
import functools
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from interv.engine.attention import Call, routing
from interv.engine.hooks import Visit, find_module, running, skipping, visiting
from interv.engine.interventions import Intervention
from interv.engine.memory import halving
from interv.engine.reference import check_finite, output_of
from interv.engine.rows import BY_POSITION, recording
from interv.engine.runs import Site
from interv.engine.sites import Sites, unfold
from interv.errors import EngineError
from interv.models.anatomy import Anatomy, Place

T = TypeVar("T")


@dataclass(frozen=True)
class Spot:
    """A site in every row: its own positions are none, each row has its own.

    Attributes:
        positions: `[row, n]`, counted from 0; None: all of them.
    """

    site: Site
    positions: Tensor | None = None

    def __getitem__(self, rows: Tensor) -> Spot:
        """That of some rows."""
        return self if self.positions is None else replace(self, positions=self.positions[rows])


@dataclass(frozen=True)
class BatchEdit:
    """An intervention at a spot.

    Attributes:
        source: `[row, n, width]`, where one is needed.
        rows: `[row]`, whether it is made in a row; None: in all.
    """

    spot: Spot
    intervention: Intervention
    source: Tensor | None = None
    rows: Tensor | None = None

    def __getitem__(self, rows: Tensor) -> BatchEdit:
        """That of some rows."""
        return replace(
            self,
            spot=self.spot[rows],
            source=None if self.source is None else self.source[rows],
            rows=None if self.rows is None else self.rows[rows],
        )


@dataclass(frozen=True)
class Kept:
    """What rows start from.

    Attributes:
        layer: the first block that runs.
        first: the first position that does.
        hidden: what enters that block, `[row, pos - first, d_model]`.
        keys, values: for each block from `layer` on those of the positions before `first`,
            `[row, head, first, head_width]`; none where `first` is 0.
        shared: what is the same for all rows of the length.
    """

    layer: int
    first: int
    hidden: Tensor
    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]
    shared: Shared

    def __getitem__(self, rows: Tensor) -> Kept:
        """That of some rows."""
        return replace(
            self,
            hidden=self.hidden[rows],
            keys=tuple(key[rows] for key in self.keys),
            values=tuple(value[rows] for value in self.values),
        )

    @property
    def n_bytes(self) -> int:
        tensors = (self.hidden, *self.keys, *self.values)
        return sum(t.numel() * t.element_size() for t in tensors)

    @classmethod
    def joined(cls, parts: Sequence[Kept]) -> Kept:
        """The rows of several, which start at the same place."""
        first = parts[0]
        layers = range(len(first.keys))
        return replace(
            first,
            hidden=torch.cat([part.hidden for part in parts]),
            keys=tuple(torch.cat([part.keys[i] for part in parts]) for i in layers),
            values=tuple(torch.cat([part.values[i] for part in parts]) for i in layers),
        )


@dataclass(frozen=True)
class Shared:
    """What blocks are given besides their input, for rows of one length.

    Attributes:
        masks: of each block `[1, head or 1, query, key]`, added to the scores.
        given: of each block the arguments that go by position.
        in_tuple: whether blocks give tuples.
    """

    masks: tuple[Tensor | None, ...]
    given: tuple[Mapping[str, Any], ...]
    in_tuple: bool


class BatchRunner:
    """Forwards of a model, with gradients where these are enabled.

    Args:
        model: a `transformers` language model, or any module that takes one tensor.
        anatomy: where its components stand.
        whole: always run the whole model.
        checkpointing: where gradients are wanted, keep only what enters a block, and run it again
            in the backward pass: less memory, about a third more time.
    """

    def __init__(
        self,
        model: nn.Module,
        anatomy: Anatomy,
        *,
        whole: bool = False,
        checkpointing: bool = False,
    ) -> None:
        self.model = model
        self.whole = whole
        self.checkpointing = checkpointing
        self.sites = Sites(anatomy)
        self.anatomy = anatomy

    def first_layer(self, edits: Sequence[Spot]) -> int | None:
        """The block from which rows with these edits can start; None: from the beginning."""
        found = []
        for spot in edits:
            place = self.sites.place(spot.site)
            layer = self.sites.layer(place)
            if layer == self.anatomy.n_layers:
                raise EngineError(f"{spot.site.component}: nothing is trained behind the blocks")
            if layer is None or layer < 0 or self.whole or self.anatomy.reach == "nothing":
                return None
            found.append(layer + (place == self.anatomy.place("block_output", layer)))
        return min(found, default=None)

    def logits(
        self,
        inputs: Tensor,
        edits: Sequence[BatchEdit] = (),
        read: Tensor | None = None,
        kept: Kept | None = None,
        *,
        finite: bool = True,
    ) -> Tensor:
        """Logits `[row, vocab]` after edits; without gradients, in halves where memory is short.

        Args:
            inputs: token ids `[row, pos]`, or what else the model takes, rows first.
            edits: those at one place are made in order.
            read: the position of each row whose logits are wanted; None: the model's output
                has no positions.
            kept: where to start, of these rows.
            finite: whether logits that are not finite are an error.

        Raises:
            EngineError: an edit that did not happen once, or logits that are not finite.
        """
        if torch.is_grad_enabled():
            return self._logits(inputs, edits, read, kept, finite=finite)

        def of(rows: Tensor) -> Tensor:
            if len(rows) == len(inputs):
                return self._logits(inputs, edits, read, kept, finite=finite)
            some = None if kept is None else kept[rows]
            at = None if read is None else read[rows]
            few = [edit[rows] for edit in edits]
            return self._logits(inputs[rows], few, at, some, finite=finite)

        return torch.cat(_by_halves(len(inputs), of))

    def _logits(
        self,
        inputs: Tensor,
        edits: Sequence[BatchEdit],
        read: Tensor | None,
        kept: Kept | None,
        *,
        finite: bool,
    ) -> Tensor:
        by_place: dict[Place, list[BatchEdit]] = defaultdict(list)
        for edit in edits:
            by_place[self.sites.place(edit.spot.site)].append(edit)
        first = kept.first if kept else 0

        def visit_at(place: Place) -> Visit:
            def visit(value: Tensor, given: Callable[[], Tensor]) -> Tensor:
                return self._edited(value, len(inputs), by_place[place], first, given)

            return visit

        visits: dict[Place, Visit] = {place: visit_at(place) for place in by_place}
        # Where rows start at positions, what follows the blocks sees one of each row.
        narrow = read is not None and kept is not None and self.anatomy.reach == "positions"
        with contextlib.ExitStack() as stack:
            if kept is not None:
                visits = self._entering(kept, visits)
                blocks = find_module(self.model, self.anatomy.blocks())
                in_tuple = kept.shared.in_tuple
                stack.enter_context(skipping(blocks, kept.layer, in_tuple=in_tuple))
                if self.anatomy.reach == "positions":
                    stack.enter_context(self._attending(kept, blocks))
            if self.checkpointing and torch.is_grad_enabled():
                stack.enter_context(self._checkpointed(kept, by_place))
            if narrow and read is not None:
                last = self.anatomy.place("block_output", self.anatomy.n_layers - 1)
                visits[last] = _then(visits.get(last), _reading(read - first))
            stack.enter_context(visiting(self.model, visits, grad=torch.is_grad_enabled()))
            logits = self._forward(inputs, narrow=narrow)
        if narrow:
            logits = logits[:, 0]
        elif read is not None:
            logits = logits[torch.arange(len(logits)), read.to(logits.device)]
        if finite:
            check_finite(logits)
        return logits

    def states(self, inputs: Tensor, spots: Sequence[Spot]) -> list[Tensor]:
        """Activations `[row, n, width]` at each spot of a plain forward; halved as `logits`."""
        if torch.is_grad_enabled():
            return self._states(inputs, spots)

        def of(rows: Tensor) -> list[Tensor]:
            if len(rows) == len(inputs):
                return self._states(inputs, spots)
            return self._states(inputs[rows], [spot[rows] for spot in spots])

        parts = _by_halves(len(inputs), of)
        return [torch.cat(each) for each in zip(*parts, strict=True)]

    def _states(self, inputs: Tensor, spots: Sequence[Spot]) -> list[Tensor]:
        found: dict[Place, Tensor] = {}

        def visit_at(place: Place) -> Visit:
            def visit(value: Tensor, _given: Callable[[], Tensor]) -> Tensor:
                rows, _ = unfold(value, len(inputs), place, maps=False)
                found[place] = rows.clone()
                return value

            return visit

        visits = {p: visit_at(p) for p in {self.sites.place(spot.site) for spot in spots}}
        with visiting(self.model, visits, grad=torch.is_grad_enabled()):
            self._forward(inputs)
        return [self._at(found[self.sites.place(spot.site)], spot, 0) for spot in spots]

    @torch.no_grad()
    def keep(self, inputs: Tensor, layer: int, first: int, spots: Sequence[Spot] = ()) -> Kept:
        """One plain forward; what rows leave behind that start at this layer and position.

        Args:
            inputs: as `logits` has them.
            layer: the first block that will run.
            first: the first position that will; 0 where rows can start at layers only.
            spots: checked to exist.
        """
        for spot in spots:
            self.sites.place(spot.site)
        parts = _by_halves(len(inputs), lambda rows: self._keep(inputs[rows], layer, first))
        return parts[0] if len(parts) == 1 else Kept.joined(parts)

    def _keep(self, inputs: Tensor, layer: int, first: int) -> Kept:
        whole = self.anatomy.reach == "positions"
        first = first if whole else 0
        n_layers = self.anatomy.n_layers
        calls: dict[int, Call] = {}
        given: list[dict[str, Any]] = [{} for _ in range(n_layers)]
        hidden: list[Tensor] = []
        tuples: list[bool] = []
        inside = layer < n_layers
        entry = self.anatomy.place(
            *(("block_input", layer) if inside else ("block_output", -1 + n_layers))
        )

        def enter(value: Tensor, _given: Callable[[], Tensor]) -> Tensor:
            rows, _ = unfold(value, len(inputs), entry, maps=False)
            hidden.append(rows[:, first:].clone())
            return value

        def keep_call(call: Call) -> Tensor:
            calls[call.layer] = call
            return call.plain()

        blocks = find_module(self.model, self.anatomy.blocks())
        with contextlib.ExitStack() as stack:
            stack.enter_context(visiting(self.model, {entry: enter}))
            for i, block in enumerate(blocks.children()):
                handle = block.register_forward_pre_hook(recording(given[i]), with_kwargs=True)
                stack.callback(handle.remove)
            handle = next(iter(blocks.children())).register_forward_hook(
                lambda _module, _args, out: tuples.append(isinstance(out, tuple))
            )
            stack.callback(handle.remove)
            if whole:
                stack.enter_context(
                    routing(self.model, self.anatomy, keep_call, range(n_layers), masks=True)
                )
            self._forward(inputs)
        after = range(layer, n_layers) if whole else ()
        return Kept(
            layer,
            first,
            hidden[0],
            tuple(calls[i].key[:, :, :first].clone() for i in after) if first else (),
            tuple(calls[i].value[:, :, :first].clone() for i in after) if first else (),
            Shared(
                tuple(_additive(calls[i], first) if whole else None for i in range(n_layers)),
                tuple(given),
                tuples[0],
            ),
        )

    def _forward(self, inputs: Tensor, *, narrow: bool = False) -> Tensor:
        weights = next(self.model.parameters())
        inputs = inputs.to(weights.device)
        if inputs.is_floating_point():
            return output_of(self.model(inputs.to(weights.dtype)))
        if not narrow:
            return output_of(self.model(input_ids=inputs, use_cache=False))
        # Not one of these tokens is looked at: the first block gets the kept states, the norm
        # after the last one a position of each row.
        stand_in = torch.zeros_like(inputs[:, :1])
        return output_of(self.model(input_ids=stand_in, position_ids=stand_in[:1], use_cache=False))

    def _entering(self, kept: Kept, visits: dict[Place, Visit]) -> dict[Place, Visit]:
        """Visits of a forward that starts from kept states; edits of what enters come first."""
        anatomy = self.anatomy
        visits = dict(visits)
        before = None
        if kept.layer:
            before = visits.pop(anatomy.place("block_output", kept.layer - 1), None)
        start: Visit = _starting(kept.hidden)
        if kept.layer == anatomy.n_layers:
            last = anatomy.place("block_output", anatomy.n_layers - 1)
            return {**visits, last: _then(start, before)}
        entry = anatomy.place("block_input", kept.layer)
        return {**visits, entry: _then(_then(start, before), visits.get(entry))}

    @contextlib.contextmanager
    def _attending(self, kept: Kept, blocks: nn.Module) -> Iterator[None]:
        """Within: blocks see the keys and values before the first position, and its angles."""
        n_layers = self.anatomy.n_layers

        def giving(given: Mapping[str, Any]) -> Callable[..., Any]:
            def give(_module: nn.Module, args: Any, kwargs: Any) -> Any:
                own = {
                    name: _from(given[name], kept.first) if name in given else None
                    for name in BY_POSITION
                    if kwargs.get(name) is not None
                }
                return args, {**kwargs, **own}

            return give

        with contextlib.ExitStack() as stack:
            for i in range(kept.layer, n_layers):
                block = blocks.get_submodule(str(i))
                handle = block.register_forward_pre_hook(
                    giving(kept.shared.given[i]), with_kwargs=True
                )
                stack.callback(handle.remove)
            layers = range(kept.layer, n_layers)
            through = _looking_back(kept)
            stack.enter_context(routing(self.model, self.anatomy, through, layers, masks=False))
            yield

    @contextlib.contextmanager
    def _checkpointed(self, kept: Kept | None, edited: Collection[Place]) -> Iterator[None]:
        """Within: blocks in which nothing is edited keep their input only."""
        blocks = find_module(self.model, self.anatomy.blocks())
        inside = {self.sites.layer(place) for place in edited} - {None}
        first = kept.layer if kept else 0
        attending = kept is not None and self.anatomy.reach == "positions"

        def again() -> contextlib.AbstractContextManager[None]:
            # The backward pass is outside of the forward's contexts.
            if not attending:
                return contextlib.nullcontext()
            assert kept is not None
            return routing(self.model, self.anatomy, _looking_back(kept), (), masks=False)

        with contextlib.ExitStack() as stack:
            for i, block in enumerate(blocks.children()):
                if i >= first and i not in inside:
                    again_later = functools.partial(
                        checkpoint,
                        block.forward,
                        use_reentrant=False,
                        preserve_rng_state=False,
                        context_fn=lambda: (contextlib.nullcontext(), again()),
                    )
                    stack.enter_context(running(block, again_later))
            yield

    def _at(self, rows: Tensor, spot: Spot, first: int) -> Tensor:
        """A spot's part `[row, n, width]` of rows `[row, pos, width]`."""
        columns = self.sites.columns(spot.site)
        if spot.positions is not None:
            at = spot.positions.to(rows.device) - first
            rows = rows[torch.arange(len(rows), device=rows.device)[:, None], at]
        return rows if columns is None else rows[..., columns.to(rows.device)]

    def _edited(
        self,
        value: Tensor,
        n_rows: int,
        edits: Sequence[BatchEdit],
        first: int,
        given: Callable[[], Tensor],
    ) -> Tensor:
        place = self.sites.place(edits[0].spot.site)
        rows, back = unfold(value, n_rows, place, maps=False)
        for edit in edits:
            spot, intervention = edit.spot, edit.intervention
            base = self._at(rows, spot, first)
            source = edit.source
            if intervention.reads_input:
                source = self._at(unfold(given(), n_rows, place, maps=False)[0], spot, first)
            new = intervention.apply(base, source).to(rows.dtype)
            if new.shape != base.shape:
                raise EngineError(f"{spot.site.component}: {intervention.name} changes the shape")
            if edit.rows is not None:
                new = torch.where(edit.rows.to(new.device)[:, None, None], new, base)
            columns = self.sites.columns(spot.site)
            if spot.positions is None and columns is None:
                rows = new
                continue
            device = rows.device
            n_positions = rows.shape[1]
            at = (
                torch.arange(n_positions, device=device)[None].expand(n_rows, -1)
                if spot.positions is None
                else spot.positions.to(device) - first
            )
            which = torch.arange(n_rows, device=device)[:, None]
            where: tuple[Tensor, ...] = (which, at)
            if columns is not None:
                where = which[:, :, None], at[:, :, None], columns.to(device)[None, None]
            rows = rows.index_put(where, new)
        return back(rows)


def _by_halves(n_rows: int, do: Callable[[Tensor], T]) -> list[T]:
    """Results of all rows, or of halves of them where memory is short."""
    rows = list(range(n_rows))
    return halving(rows, lambda some: [do(torch.tensor(some))])


def _looking_back(kept: Kept) -> Callable[[Call], Tensor]:
    """Attention to what stands before the first position, too."""

    def through(call: Call) -> Tensor:
        key, value = call.key, call.value
        if kept.first:
            key = torch.cat([kept.keys[call.layer - kept.layer], key], dim=2)
            value = torch.cat([kept.values[call.layer - kept.layer], value], dim=2)
        mask = kept.shared.masks[call.layer]
        assert mask is not None
        return call.attend(call.query, key, value, mask)

    return through


def _starting(hidden: Tensor) -> Visit:
    def start(value: Tensor, _given: Callable[[], Tensor]) -> Tensor:
        return hidden.reshape(len(hidden), *hidden.shape[2:]) if value.dim() == 2 else hidden

    return start


def _then(one: Visit | None, other: Visit | None) -> Visit:
    """One visit after another; at least one is there."""
    if one is None or other is None:
        found = one or other
        assert found is not None
        return found
    first, second = one, other
    return lambda value, given: second(first(value, given), given)


def _reading(read: Tensor) -> Visit:
    """What follows the blocks sees one position of each row."""

    def visit(value: Tensor, _given: Callable[[], Tensor]) -> Tensor:
        at = read.to(value.device)[:, None, None].expand(-1, 1, value.shape[-1])
        return value.gather(1, at)

    return visit


def _from(value: Any, first: int) -> Any:
    if isinstance(value, tuple):
        return tuple(_from(each, first) for each in value)
    return value[first:][None]


def _additive(call: Call, first: int) -> Tensor:
    """A call's mask for queries from `first` on, `[1, head or 1, query, key]`: 0 where seen."""
    dtype, device = call.query.dtype, call.query.device
    mask = call.mask
    if mask is None:
        length = call.query.shape[2]
        mask = torch.ones(1, 1, length, length, dtype=torch.bool, device=device).tril()
    mask = mask[:1, :, first:]
    if mask.dtype != torch.bool:
        return mask.clone()
    lowest = torch.finfo(dtype).min
    return torch.zeros(mask.shape, dtype=dtype, device=device).masked_fill_(~mask, lowest)
