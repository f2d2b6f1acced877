"""One walk through the blocks: many rows, each only from its first layer and position on.

The tokens of all rows stand one after the other in a single batch row, so that projections,
norms and MLPs compute exactly the tokens that differ, whatever the rows' lengths. A row joins at
its first layer with its base's states. Attention alone needs the rows apart: it is called
through `routing`, with each row's queries, and before them the keys and values of its base, and
the base's own mask and angles, gathered by position.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from interv.engine.attention import Call, routing
from interv.engine.hooks import Visit, find_module, skipping, visiting
from interv.engine.reference import check_finite, edit_pattern, output_of
from interv.engine.rows import BY_POSITION, Base, Length, Row
from interv.engine.runs import Edit, Run
from interv.engine.sites import Sites, Todo, make_edits, unfold
from interv.errors import EngineError
from interv.models.anatomy import Place

_ATTENTION_ELEMENTS = 1 << 24  # of keys, values and scores of the rows that attend at once


class Walk:
    """Rows on their way through a model's blocks."""

    def __init__(
        self,
        model: nn.Module,
        sites: Sites,
        rows: Sequence[Row],
        bases: Mapping[Run, Base],
        lengths: Mapping[int, Length],
        source: Callable[[Edit], Tensor],
        *,
        in_tuple: bool,
    ) -> None:
        self._in_tuple = in_tuple
        self._model, self._sites, self._bases, self._source = model, sites, bases, source
        self._anatomy = sites.anatomy
        self._n_layers = sites.anatomy.n_layers
        self._order = sorted(range(len(rows)), key=lambda i: rows[i].layer)
        self._rows = [rows[i] for i in self._order]
        counts = [row.n_tokens for row in self._rows]
        self._starts = [0, *itertools.accumulate(counts)]
        self._reads = [0, *itertools.accumulate(len(row.read) for row in self._rows)]
        self._first = self._rows[0].layer
        after = [name for name in ("final_norm", "logits") if name in self._anatomy.components]
        self._after = {self._anatomy.place(name, 0) for name in after}
        # How many rows have joined before each block runs, and after the last.
        self._joined = [sum(r.layer <= k for r in self._rows) for k in range(self._n_layers + 1)]
        self._device = next(model.parameters()).device
        self._captured: dict[Place, Tensor] = {}
        self._attention = _Attention(self._rows, self._starts, bases, lengths, self._device)

    def run(
        self, tokens: Sequence[int] | None, capture: Collection[Place] = ()
    ) -> tuple[list[Tensor], list[dict[Place, Tensor]]]:
        """Walk.

        Returns:
            For each row its logits `[read position, vocab or tokens]`, and the states
            `[position from its first on, ...]` at the captured places that it passed.
        """
        # A row that has not joined yet is its base.
        first = self._anatomy.place("block_output", self._first - 1) if self._first else None
        here = [
            place
            for place in capture
            if place == first or (self._sites.layer(place) or 0) >= self._first
        ]
        visits = self._visits(here)
        layers = range(self._first, self._n_layers)
        # Not one of these tokens is looked at: each block gets the rows' own states.
        stand_in = torch.zeros(1, self._reads[-1], dtype=torch.long, device=self._device)
        with contextlib.ExitStack() as stack:
            blocks = find_module(self._model, self._anatomy.blocks())
            stack.enter_context(skipping(blocks, self._first, in_tuple=self._in_tuple))
            stack.enter_context(visiting(self._model, visits))
            for layer in layers:
                stack.enter_context(self._given(blocks.get_submodule(str(layer)), layer))
            stack.enter_context(
                routing(self._model, self._anatomy, self._attend(here), layers, masks=False)
            )
            head = self._anatomy.place("logits", 0)
            few = tokens is not None and head not in visits
            if tokens is not None and few:
                stack.enter_context(self._only(tokens))
            out = output_of(self._model(input_ids=stand_in, position_ids=stand_in, use_cache=False))
        logits = out[0]
        check_finite(logits)
        if tokens is not None and not few:
            logits = logits[:, list(tokens)]
        by_row = {i: logits[self._reads[j] : self._reads[j + 1]] for j, i in enumerate(self._order)}
        states = {i: self._states_of(j) for j, i in enumerate(self._order)}
        return [by_row[i] for i in range(len(by_row))], [states[i] for i in range(len(states))]

    def _states_of(self, number: int) -> dict[Place, Tensor]:
        row = self._rows[number]
        start, end = self._starts[number], self._starts[number + 1]
        found = {}
        for place, state in self._captured.items():
            if place in self._after:
                # What follows the blocks sees the positions that are read, here all of them.
                begin = self._reads[number] + row.position
                found[place] = state[begin : self._reads[number + 1]]
            elif len(state) >= end:
                found[place] = state[start:end]
        return found

    def _visits(self, capture: Collection[Place]) -> dict[Place, Visit]:
        anatomy = self._anatomy
        visits: dict[Place, Visit] = {
            anatomy.place("block_input", k): self._entering(k, capture)
            for k in range(self._first, self._n_layers)
        }
        last = anatomy.place("block_output", self._n_layers - 1)
        outputs = {anatomy.place("block_output", k) for k in range(self._n_layers)}
        places = {place for row in self._rows for place in row.edits} | set(capture)
        for place in places - visits.keys() - outputs:
            if not place.pattern:
                visits[place] = self._inside(place, capture)
        for place in outputs - {last}:
            if any(_reads_input(row, place) for row in self._rows):
                visits[place] = self._at_output(place)
        leave = self._entering(self._n_layers, capture)
        at_output = self._at_output(last)

        def leaving(value: Tensor, given: Callable[[], Tensor]) -> Tensor:
            if self._first < self._n_layers:
                value = at_output(value, given)
            return self._read(leave(value, given)[0])[None]

        visits[last] = leaving
        return visits

    def _edit(
        self,
        flat: Tensor,
        place: Place,
        given: Callable[[], Tensor] | None = None,
        *,
        reading: bool | None = None,
    ) -> Tensor:
        """Edits at a place; perhaps only of rows that there do (not) read a module's input."""
        todo = [
            self._todo(i, row, edit, after=place in self._after)
            for i, row in enumerate(self._rows)
            for edit in row.edits.get(place, ())
            if reading is None or _reads_input(row, place) == reading
        ]
        if not todo:
            return flat

        def own() -> Tensor:
            assert given is not None
            return unfold(given(), 1, place, maps=False)[0][0]

        return make_edits(flat, todo, self._sites, self._source, own)

    def _todo(self, number: int, row: Row, edit: Edit, *, after: bool) -> Todo:
        if not after:
            return Todo(edit, self._starts[number] - row.position, len(row.run))
        # Behind the blocks there are only the positions that are read.
        positions = edit.site.positions
        assert positions is not None
        moved = replace(edit.site, positions=tuple(row.read.index(p) for p in positions))
        read = edit.reads if edit.source is not None else None
        return Todo(replace(edit, site=moved, read=read), self._reads[number], len(row.read))

    def _entering(self, layer: int, capture: Collection[Place]) -> Visit:
        """The rows that were there, behind them those that join; edits of what enters a block."""

        def visit(value: Tensor, _given: Callable[[], Tensor]) -> Tensor:
            there = self._joined[layer - 1] if layer > self._first else 0
            new = self._rows[there : self._joined[layer]]
            parts = [value[0]] if there else []
            parts += [self._bases[row.base].inputs[layer][row.position :] for row in new]
            flat = torch.cat(parts) if len(parts) > 1 else parts[0]
            if layer > 0:
                flat = self._passed(flat, self._anatomy.place("block_output", layer - 1), capture)
            if layer < self._n_layers:
                flat = self._passed(flat, self._anatomy.place("block_input", layer), capture)
            return flat[None]

        return visit

    def _passed(self, flat: Tensor, place: Place, capture: Collection[Place]) -> Tensor:
        flat = self._edit(flat, place, reading=False if place.side == "output" else None)
        if place in capture:
            self._captured[place] = flat.clone()
        return flat

    def _inside(self, place: Place, capture: Collection[Place]) -> Visit:
        def visit(value: Tensor, given: Callable[[], Tensor]) -> Tensor:
            rows, back = unfold(value, 1, place, maps=False)
            flat = self._edit(rows[0], place, given)
            if place in capture:
                self._captured[place] = flat.clone()
            return back(flat[None])

        return visit

    def _at_output(self, place: Place) -> Visit:
        def visit(value: Tensor, given: Callable[[], Tensor]) -> Tensor:
            return self._edit(value[0], place, given, reading=True)[None]

        return visit

    def _read(self, flat: Tensor) -> Tensor:
        """The last block's output at each row's read positions `[read, d_model]`."""
        parts = []
        for i, row in enumerate(self._rows):
            own = [self._starts[i] + p - row.position for p in row.read if p >= row.position]
            if len(own) == len(row.read):
                parts.append(torch.tensor(own))
                continue
            # Read, but before anything changed: from the base, put behind all tokens.
            final = self._bases[row.base].inputs[-1]
            parts.append(
                torch.tensor(
                    [
                        self._starts[i] + p - row.position if p >= row.position else len(flat) + p
                        for p in row.read
                    ]
                )
            )
            flat = torch.cat([flat, final[: row.position].to(flat.device)])
        return flat[torch.cat(parts).to(flat.device)]

    def _attend(self, capture: Collection[Place]) -> Callable[[Call], Tensor]:
        patterns = "attention_weight" in self._anatomy.components

        def through(call: Call) -> Tensor:
            place = self._anatomy.place("attention_weight", call.layer) if patterns else None
            edits = [
                (i, edit)
                for i, row in enumerate(self._rows)
                for edit in (row.edits.get(place, ()) if place else ())
            ]
            out, pattern = self._attention.through(
                call, self._joined[call.layer], edits, self._source, place in capture
            )
            if pattern is not None and place is not None:
                self._captured[place] = pattern
            return out

        return through

    @contextlib.contextmanager
    def _given(self, block: nn.Module, layer: int) -> Iterator[None]:
        """A block gets its arguments by position for the tokens that are there."""

        def give(_module: nn.Module, args: Any, kwargs: Any) -> Any:
            tokens = self._starts[self._joined[layer]]
            return args, {**kwargs, **self._attention.given(layer, tokens, kwargs)}

        handle = block.register_forward_pre_hook(give, with_kwargs=True)
        try:
            yield
        finally:
            handle.remove()

    @contextlib.contextmanager
    def _only(self, tokens: Sequence[int]) -> Iterator[None]:
        """The head computes these tokens' logits alone."""
        head = find_module(self._model, self._anatomy.place("logits", 0).path)
        if type(head) is not nn.Linear or "forward" in vars(head):
            raise EngineError(f"the head is a {type(head).__name__}, not a plain linear layer")
        wanted = torch.tensor(tokens, device=head.weight.device)
        weight = head.weight[wanted]
        bias = None if head.bias is None else head.bias[wanted]
        try:
            vars(head)["forward"] = lambda value: nn.functional.linear(value, weight, bias)
            yield
        finally:
            del vars(head)["forward"]


def _reads_input(row: Row, place: Place) -> bool:
    return any(edit.intervention.reads_input for edit in row.edits.get(place, ()))


class _Attention:
    """Attention of the rows of a walk: which tokens are whose, and what each may look at."""

    def __init__(
        self,
        rows: Sequence[Row],
        starts: Sequence[int],
        bases: Mapping[Run, Base],
        lengths: Mapping[int, Length],
        device: torch.device,
    ) -> None:
        self._rows, self._starts = rows, starts
        self._distinct = list(dict.fromkeys(row.base for row in rows))
        self._kept = [bases[base] for base in self._distinct]
        self._lengths = sorted({len(row.run) for row in rows})
        self._by_length = [lengths[n] for n in self._lengths]
        counts = [row.n_tokens for row in rows]
        self._wide, self._long = max(1, *counts), max(len(row.run) for row in rows)
        number = {base: i for i, base in enumerate(self._distinct)}
        ends = [0, *itertools.accumulate(len(base) for base in self._distinct)]
        before = torch.tensor([ends[number[row.base]] for row in rows])
        first = torch.tensor([row.position for row in rows])
        length = torch.tensor([len(row.run) for row in rows])
        start = torch.tensor(starts[:-1])
        n = torch.tensor(counts)
        # Padding repeats a row's last token; what it gives is dropped.
        slot = torch.minimum(torch.arange(self._wide)[None], (n - 1).clamp(min=0)[:, None])
        key = torch.arange(self._long)[None]
        own = ends[-1] + start[:, None] + key - first[:, None]
        keys = torch.where(key < first[:, None], before[:, None] + key, own)
        keys = torch.where(key < length[:, None], keys, torch.zeros_like(keys))
        self._queries = (start[:, None] + slot).to(device)
        self._keys = keys.to(device)
        self._positions = (first[:, None] + slot).to(device)
        self._which = torch.tensor([self._lengths.index(len(row.run)) for row in rows]).to(device)
        row_of = torch.repeat_interleave(torch.arange(len(rows)), n)
        self._row_of = row_of.to(device)
        self._slot_of = (torch.arange(len(row_of)) - start[row_of]).to(device)
        offsets = torch.tensor([0, *itertools.accumulate(self._lengths)])[self._which.cpu()]
        self._at = (offsets[row_of] + first[row_of]).to(device) + self._slot_of
        self._visible = (key < length[:, None]).to(device)
        self._seen: dict[tuple[object, ...], Tensor] = {}
        self._angles: dict[tuple[int, ...], Tensor] = {}

    def given(self, layer: int, tokens: int, kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """A block's arguments by position, for the first so many tokens."""

        def gather(parts: tuple[Any, ...]) -> Any:
            if isinstance(parts[0], tuple):
                return tuple(gather(each) for each in zip(*parts, strict=True))
            key = (tokens, *map(id, parts))
            if key not in self._angles:
                self._angles[key] = torch.cat(parts)[self._at[:tokens]][None]
            return self._angles[key]

        # What the model passes here only because it was given positions, its base did without.
        return {
            name: gather(tuple(length.given[layer][name] for length in self._by_length))
            if name in self._by_length[0].given[layer]
            else None
            for name in BY_POSITION
            if kwargs.get(name) is not None
        }

    def through(
        self,
        call: Call,
        n_rows: int,
        edits: Sequence[tuple[int, Edit]],
        source: Callable[[Edit], Tensor],
        capture: bool,
    ) -> tuple[Tensor, Tensor | None]:
        """What attention gives the tokens `[1, token, head, head_width]`, and their patterns."""
        layer = call.layer
        keys = torch.cat([*(base.keys[layer] for base in self._kept), call.key[0]], dim=1)
        values = torch.cat([*(base.values[layer] for base in self._kept), call.value[0]], dim=1)
        wide = call.query.shape[1] * self._wide + 2 * keys.shape[0] * keys.shape[2]
        size = max(1, _ATTENTION_ELEMENTS // (wide * self._long))
        out, patterns = [], []
        for begin in range(0, n_rows, size):
            some = slice(begin, min(begin + size, n_rows))
            query = call.query[0][:, self._queries[some]].transpose(0, 1)
            key = keys[:, self._keys[some]].transpose(0, 1)
            value = values[:, self._keys[some]].transpose(0, 1)
            mask = self._mask(layer, some, query.dtype)
            found = call.attend(query, key, value, mask)
            here = [(i - begin, edit) for i, edit in edits if some.start <= i < some.stop]
            if here or capture:
                pattern, attend = call.weights(query, key, value, mask)
                rows = self._rows[some]
                if here:
                    pattern = edit_pattern(
                        pattern,
                        here,
                        source,
                        [row.position for row in rows],
                        [len(row.run) for row in rows],
                    )
                    edited = sorted({i for i, _ in here})
                    found = found.clone()
                    found[edited] = attend(pattern)[edited]
                patterns.append(pattern.transpose(1, 2))
            out.append(found)
        tokens = self._starts[n_rows]
        at = self._row_of[:tokens], self._slot_of[:tokens]
        whole = torch.cat(out) if len(out) > 1 else out[0]
        return whole[at][None], torch.cat(patterns)[at] if capture else None

    def _mask(self, layer: int, some: slice, dtype: torch.dtype) -> Tensor:
        """`[row, head or 1, query, key]`: what the base's own mask says of these positions.

        It is added to the scores: 0 where a key is seen.
        """
        masks = [length.masks[layer] for length in self._by_length]
        # Layers of one kind share their masks; rows join, so that slices differ.
        key = (*map(id, masks), some.start, some.stop)
        if key not in self._seen:
            if all(mask is None for mask in masks):
                column = torch.arange(self._long, device=self._keys.device)
                seen = column <= self._positions[some][:, None, :, None]
                mask = seen & self._visible[some][:, None, None, :]
            else:
                # A window makes a mask only where a prompt is longer than it.
                pairs = zip(masks, self._lengths, strict=True)
                padded = torch.stack([self._padded(m, length) for m, length in pairs])
                mask = padded[self._which[some][:, None], :, self._positions[some]].transpose(1, 2)
            if mask.dtype == torch.bool:
                lowest = torch.finfo(dtype).min
                mask = torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(
                    ~mask, lowest
                )
            self._seen[key] = mask
        return self._seen[key]

    def _padded(self, mask: Tensor | None, length: int) -> Tensor:
        if mask is None:
            mask = torch.ones(1, length, length, dtype=torch.bool, device=self._keys.device).tril()
        more = self._long - length
        unseen = False if mask.dtype == torch.bool else torch.finfo(mask.dtype).min
        return nn.functional.pad(mask, (0, more, 0, more), value=unseen)
