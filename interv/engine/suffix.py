"""The suffix executor: exact, and as little arithmetic as the runs need.

In a causal model a run differs from its *base* (the same tokens, with only its embeddings
edited) at layers from its first edit's on, and at positions from its first changed one on. So
each base runs once, keeping every block's input and its keys and values, and a row joins the
batch at its first layer, with the base's input from its first position on. Keys and values
before that come from the base, through a `transformers` Cache, so that a family's own attention
code runs unchanged. The model's forward is called with one dummy row, whose hidden states are
replaced at each block by those of the rows that have joined; masks, positions and rotary angles
are the same for all rows and broadcast. Rows may be of different length: padding on the right
is exact where attention looks left only.

Nothing is trusted: `interv.run.certify` compares rows of each plan with the reference.
"""

from __future__ import annotations

import contextlib
import itertools
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache

from interv.engine.hooks import Visit, find_module, visiting
from interv.engine.interventions import Collect, Vanilla
from interv.engine.prefix import Prefix, Recording
from interv.engine.reference import ReferenceExecutor, check_finite, device_of
from interv.engine.runs import TOKEN_EMBEDDING, Edit, Place, Run, Site, at_sites, sources_of
from interv.errors import EngineError
from interv.models.families import Family

# At the last layer these reach no position but their own.
_LOCAL = {"block_output", "mlp_input", "mlp_activation", "mlp_output", "attention_output"}


@dataclass(frozen=True)
class _Base:
    """What a base run leaves behind.

    Attributes:
        inputs: for each block its input `[position, d_model]`; last, the last block's output.
        keys, values: for each block `[kv head, position, head width]`.
        logits: `[keep, vocab]` at the last positions.
    """

    inputs: list[Tensor]
    keys: list[Tensor]
    values: list[Tensor]
    logits: Tensor


@dataclass(frozen=True)
class _Row:
    """A run as the walk sees it: where it joins, and what happens to it at which place.

    `layer` may be the number of layers, where only the last block's output is edited.
    """

    run: Run
    base: Run
    layer: int
    position: int
    edits: Mapping[Place, list[Edit]]


class SuffixExecutor:
    """Runs a causal `transformers` model whose blocks are a plain sequence."""

    def __init__(self, model: nn.Module, family: Family, n_layers: int) -> None:
        self._model = model
        self._family = family
        self._n_layers = n_layers
        self._reference = ReferenceExecutor(model, family)
        self._bases: dict[Run, _Base] = {}
        self._states: dict[tuple[Run, Place], Tensor] = {}

    def logits(self, runs: Sequence[Run], keep: int) -> Tensor:
        distinct = list(dict.fromkeys(runs))
        self._need(sources_of(distinct))
        self._need_bases([_base(run) for run in distinct], keep)
        rows = [self._row(run, keep) for run in distinct]
        values = {
            run: self._bases[_base(run)].logits[-keep:]
            for run, row in zip(distinct, rows, strict=True)
            if row is None
        }
        walked = [row for row in rows if row is not None]
        if walked:
            logits, _ = self._walk(walked, keep)
            values |= {row.run: logits[i] for i, row in enumerate(walked)}
        return torch.stack([values[run] for run in runs])

    def states(self, runs: Sequence[Run], sites: Sequence[Site]) -> list[Tensor]:
        places = {(site.component, site.layer) for site in sites}
        self._need(dict.fromkeys(runs, places))
        return at_sites(self._states, runs, sites)

    def forget(self) -> None:
        self._reference.forget()
        self._bases.clear()
        self._states.clear()

    def _need(self, wanted: Mapping[Run, set[Place]]) -> None:
        """Keep the states of these runs at these places."""
        missing = {
            run: {place for place in places if (run, place) not in self._states}
            for run, places in wanted.items()
        }
        missing = {run: places for run, places in missing.items() if places}
        # Edited sources are rows too; what they share with their base is read from the base.
        edited = [run for run in missing if _base(run) != run]
        plain: dict[Run, set[Place]] = defaultdict(set)
        for run, places in missing.items():
            plain[_base(run)] |= places
        for _, group in itertools.groupby(sorted(plain, key=_length), key=_length):
            together = list(group)
            wanted_places = sorted(set().union(*(plain[run] for run in together)))
            everywhere = tuple(range(_length(together[0])))
            sites = [Site(*place, everywhere) for place in wanted_places]
            found = self._reference.states(together, sites)
            for place, states in zip(wanted_places, found, strict=True):
                for run, state in zip(together, states, strict=True):
                    self._states[run, place] = state
        if edited:
            self._need(sources_of(edited))
            self._need_bases([_base(run) for run in edited], 1)
            for run in edited:
                self._follow(run, missing[run])

    def _follow(self, run: Run, places: set[Place]) -> None:
        """Keep an edited run's states: its base's, and from its first position on its own."""
        row = self._row(run, len(run.ids))
        for place in places:
            self._states[run, place] = self._states[_base(run), place]
        if row is None:
            return
        seen = {place for place in places if self._reaches(row, place)}
        _, captured = self._walk([row], 1, seen)
        for place, state in captured.items():
            whole = self._states[run, place].clone()
            whole[row.position :] = state[0]
            self._states[run, place] = whole

    def _reaches(self, row: _Row, place: Place) -> bool:
        component, layer = place
        if component == TOKEN_EMBEDDING:
            return False
        return layer >= row.layer or (component == "block_output" and layer + 1 >= row.layer)

    def _need_bases(self, bases: Sequence[Run], keep: int) -> None:
        missing = [
            run
            for run in dict.fromkeys(bases)
            if run not in self._bases or len(self._bases[run].logits) < keep
        ]
        for _, group in itertools.groupby(sorted(missing, key=_length), key=_length):
            self._record(list(group), keep)

    def _record(self, bases: list[Run], keep: int) -> None:
        """Run bases of one length in full, and keep what their rows will start from."""
        layers = range(self._n_layers)
        cache = Cache(layers=[Recording() for _ in layers])
        places = [(side, i) for side in ("block_input", "block_output") for i in layers]
        logits, states = self._reference.forward(
            bases, keep, places, use_cache=True, past_key_values=cache
        )
        for i in layers[1:]:
            if not torch.equal(states["block_output", i - 1], states["block_input", i]):
                raise EngineError(f"block {i} does not start from what block {i - 1} gives")
        last = states["block_output", self._n_layers - 1]
        for row, base in enumerate(bases):
            inputs = [states["block_input", i][row] for i in layers] + [last[row]]
            keys = [cache.layers[i].keys[row] for i in layers]
            values = [cache.layers[i].values[row] for i in layers]
            self._bases[base] = _Base(inputs, keys, values, logits[row])

    def _row(self, run: Run, keep: int) -> _Row | None:
        """Where a run joins the walk; None where it is its base at the last `keep` positions."""
        base = _base(run)
        unread = len(run.ids) - keep
        active: list[tuple[int, int]] = []
        for edit in run.edits:
            if edit in base.edits or isinstance(edit.intervention, Collect):
                continue
            layer = self._joins(edit)
            local = edit.site.component in _LOCAL and edit.site.layer == self._n_layers - 1
            live = [
                position
                for position in edit.site.positions
                if not (local and position < unread) and not _is_hold(edit, position, base)
            ]
            if live and not isinstance(edit.intervention, Vanilla):
                # What is drawn or computed over several positions is not cut apart.
                live = list(edit.site.positions)
            active += [(layer, position) for position in live]
        if not active:
            return None
        first_layer = min(layer for layer, _ in active)
        first = min(position for _, position in active)
        edits: dict[Place, list[Edit]] = defaultdict(list)
        for edit in run.edits:
            kept = tuple(p for p in edit.site.positions if p >= first)
            if edit in base.edits or self._joins(edit) < first_layer or not kept:
                continue
            edits[edit.site.component, edit.site.layer].append(
                replace(edit, site=replace(edit.site, positions=kept))
            )
        return _Row(run, base, first_layer, first, edits)

    def _joins(self, edit: Edit) -> int:
        """The layer at which a row with this edit must have joined.

        A block's output is the next block's input, so that the block itself need not run.
        """
        component, layer = edit.site.component, edit.site.layer
        find_module(self._model, self._family, (component, layer))
        return layer + 1 if component == "block_output" else layer

    def _walk(
        self, rows: Sequence[_Row], keep: int, capture: Collection[Place] = ()
    ) -> tuple[Tensor, dict[Place, Tensor]]:
        """One pass through the blocks for all rows.

        Returns:
            Logits `[row, keep, vocab]` in the order of `rows`; at each captured place the
            states `[row, position from the first on, width]` (for a single row).
        """
        order = sorted(range(len(rows)), key=lambda i: rows[i].layer)
        walk = [rows[i] for i in order]
        start = min(row.position for row in walk)
        length = max(len(row.run.ids) for row in walk) - start
        joining: dict[int, list[_Row]] = defaultdict(list)
        for row in walk:
            joining[row.layer].append(row)
        captured: dict[Place, Tensor] = {}

        def passing(place: Place, value: Tensor) -> Tensor:
            here = [(i, row.edits[place]) for i, row in enumerate(walk) if place in row.edits]
            if here:
                value = self._edit(value, here, start)
            if place in capture:
                captured[place] = value
            return value

        def entering(layer: int) -> Visit:
            def visit(value: Tensor) -> Tensor:
                value = self._joined(value, joining[layer], layer, start, length, first=first)
                return passing(("block_input", layer), passing(("block_output", layer - 1), value))

            return visit

        def inside(place: Place) -> Visit:
            return lambda value: passing(place, value)

        def leaving(value: Tensor) -> Tensor:
            # Only what is read goes on, in a shape that the model's head expects.
            value = entering(self._n_layers)(value)
            flat = self._read(value, walk, keep, start).flatten(0, 1)
            whole = nn.functional.pad(flat, (0, 0, 0, -len(flat) % length))
            return whole.reshape(-1, length, flat.shape[-1])

        first = walk[0].layer
        visits: dict[Place, Visit] = {
            ("block_input", i): entering(i) for i in range(first, self._n_layers)
        }
        places = {place for row in walk for place in row.edits} | set(capture)
        for place in sorted(places):
            if place[0] not in ("block_input", "block_output"):
                visits[place] = inside(place)
        visits["block_output", self._n_layers - 1] = leaving
        device = device_of(self._model)
        stream = self._bases[walk[0].base].inputs[0]
        with self._skipping(first), visiting(self._model, self._family, visits):
            out: Tensor = self._model(
                inputs_embeds=stream.new_zeros(1, length, stream.shape[-1]),
                position_ids=torch.arange(start, start + length, device=device)[None],
                past_key_values=self._prefix(walk, start),
                use_cache=True,
            ).logits
        logits = out.flatten(0, 1)[: len(walk) * keep].reshape(len(walk), keep, -1)
        check_finite(logits)
        back = torch.empty(len(rows), dtype=torch.long)
        back[torch.tensor(order)] = torch.arange(len(rows))
        return logits[back.to(logits.device)], captured

    def _joined(
        self, value: Tensor, joining: list[_Row], layer: int, start: int, length: int, *, first: int
    ) -> Tensor:
        """The rows that were there, and behind them those that join at this layer."""
        new = [_padded(self._bases[row.base].inputs[layer][start:], length) for row in joining]
        # Before the first row joins, what passes is the dummy.
        there = [] if layer == first else [value]
        return torch.cat([*there, torch.stack(new)]) if new else value

    def _edit(self, value: Tensor, edits: list[tuple[int, list[Edit]]], start: int) -> Tensor:
        """`value` with the rows' edits made; the swaps, if they are all there is, at once."""
        value = value.clone()
        if all(len(of_row) == 1 for _, of_row in edits) and all(
            isinstance(of_row[0].intervention, Vanilla) for _, of_row in edits
        ):
            rows = [i for i, [edit] in edits for _ in edit.site.positions]
            positions = [p - start for _, [edit] in edits for p in edit.site.positions]
            sources = torch.cat([self._source(edit) for _, [edit] in edits])
            value[rows, positions] = sources.to(value.device)
            return value
        for i, of_row in edits:
            for edit in of_row:
                at = torch.tensor([p - start for p in edit.site.positions], device=value.device)
                source = None if edit.source is None else self._source(edit).to(value.device)
                value[i, at] = edit.intervention.apply(value[i, at], source)
        return value

    def _source(self, edit: Edit) -> Tensor:
        assert edit.source is not None
        state = self._states[edit.source, (edit.site.component, edit.site.layer)]
        return state[list(edit.site.positions)]

    def _read(self, value: Tensor, walk: list[_Row], keep: int, start: int) -> Tensor:
        """The last block's output `[row, keep, d_model]` at each row's last positions."""
        ends = torch.tensor([len(row.run.ids) for row in walk], device=value.device)
        at = ends[:, None] - keep + torch.arange(keep, device=value.device)
        rows = torch.arange(len(walk), device=value.device)[:, None]
        read = value[rows, (at - start).clamp(min=0)]
        for i, position in (at < start).nonzero().tolist():
            # Read, but before anything changed.
            read[i, position] = self._bases[walk[i].base].inputs[-1][int(at[i, position])]
        return read

    def _prefix(self, walk: list[_Row], start: int) -> Cache:
        bases = list(dict.fromkeys(row.base for row in walk))
        numbers = {base: i for i, base in enumerate(bases)}
        device = device_of(self._model)
        which = torch.tensor([numbers[row.base] for row in walk], device=device)
        kept = [self._bases[base] for base in bases]
        return Cache(
            layers=[
                Prefix(
                    torch.stack([base.keys[i][:, :start] for base in kept]),
                    torch.stack([base.values[i][:, :start] for base in kept]),
                    which,
                )
                for i in range(self._n_layers)
            ]
        )

    @contextlib.contextmanager
    def _skipping(self, first: int) -> Iterator[None]:
        """Blocks before `first` pass the dummy row on, untouched."""
        blocks = [
            find_module(self._model, self._family, ("block_input", i))[0] for i in range(first)
        ]
        before = [vars(block).get("forward") for block in blocks]

        def passing(hidden_states: Tensor, *_: Any, **__: Any) -> Tensor:
            return hidden_states

        try:
            for block in blocks:
                block.forward = passing
            yield
        finally:
            for block, old in zip(blocks, before, strict=True):
                del block.forward
                if old is not None:
                    block.forward = old


def _length(run: Run) -> int:
    return len(run.ids)


def _base(run: Run) -> Run:
    """The run with only its edits of the embeddings."""
    edits = tuple(edit for edit in run.edits if edit.site.component == TOKEN_EMBEDDING)
    return run if len(edits) == len(run.edits) else Run(run.ids, edits)


def _is_hold(edit: Edit, position: int, base: Run) -> bool:
    """Whether an edit writes what the base has there: it matters only after another edit.

    Source and base agree before the first token or edit in which they differ.
    """
    if not isinstance(edit.intervention, Vanilla) or edit.source is None:
        return False
    source = edit.source
    if source == base:
        return True
    if len(source.ids) <= position or source.ids[: position + 1] != base.ids[: position + 1]:
        return False
    different = set(source.edits) ^ set(base.edits)
    return all(position < min(e.site.positions) for e in different)


def _padded(state: Tensor, length: int) -> Tensor:
    return (
        nn.functional.pad(state, (0, 0, 0, length - len(state))) if len(state) < length else state
    )
