"""The suffix executor: exact, and as little arithmetic as the runs need.

A run differs from its *base* (the same input, with only what stands before the blocks edited) at
layers from its first edit's on, and in a causal model at positions from its first changed one on.
So each base runs once, its block inputs, keys and values are kept, and runs start from there:
at their first layer and position where the family's attention lets them (`Walk`), at their first
layer otherwise (encoders, Mamba, attention of an own making). Runs that change nothing are their
base. What is out of memory is done in halves.

Nothing is trusted: `interv.runner.certify` compares rows of each plan with the reference.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from interv.engine.attention import Call
from interv.engine.hooks import find_module, foreign_hooks
from interv.engine.memory import halving
from interv.engine.reference import ReferenceExecutor, Start, by_shape, check_lengths
from interv.engine.rows import Base, Length, Row, Rows, recording
from interv.engine.runs import Inputs, Run, Site, check_asked, read_positions
from interv.engine.walk import Walk
from interv.errors import EngineError
from interv.models.anatomy import Anatomy, Place

_LOGITS = 1 << 26  # numbers: what one walk may give at most


class SuffixExecutor:
    """Runs a `transformers` model whose blocks are a plain sequence.

    Args:
        model: the model; left as it was found.
        anatomy: where its components stand.
        max_tokens: in one walk, about.
    """

    def __init__(self, model: nn.Module, anatomy: Anatomy, max_tokens: int = 1024) -> None:
        if anatomy.reach == "nothing":
            raise EngineError("the suffix executor needs blocks in one plain sequence")
        self._model = model
        self._anatomy = anatomy
        self._max_tokens = max_tokens
        self._reference = ReferenceExecutor(model, anatomy)
        self._sites = self._reference.sites
        # One store: what either has computed, both read.
        self._states = self._reference.kept
        self._rows = Rows(self._sites)
        self._in_tuple = False
        layers = range(anatomy.n_layers)
        # Each block's input and the last one's output, by their index in a base's inputs.
        self._inputs = [anatomy.place("block_input", i) for i in layers]
        self._outputs = [anatomy.place("block_output", i) for i in layers]
        self._stream = {place: i for i, place in enumerate(self._inputs)}
        self._stream |= {place: i + 1 for i, place in enumerate(self._outputs)}
        self._is_chain = False
        self._bases: dict[Run, Base] = {}
        self._lengths: dict[int, Length] = {}

    def logits(
        self,
        runs: Sequence[Run],
        at: Sequence[int] | None = (-1,),
        tokens: Sequence[int] | None = None,
    ) -> Tensor:
        self._refuse_hooks()
        check_asked(runs, at, tokens, self._sites.n_tokens)
        check_lengths(runs, at)
        found: dict[Run, Tensor] = {}
        distinct = list(dict.fromkeys(runs))
        known = [run for run in distinct if self._is_known(run)]
        # Nobody knows what an edit at some other module changes: those runs run in full.
        others = [run for run in distinct if run not in set(known)]
        if others:
            found |= zip(others, self._reference.logits(others, at, tokens), strict=True)
        self._prepare(known)
        rows = {run: self._rows.row(run, at) for run in known}
        # Those that change nothing share their base's.
        todo = {(row.run, row.read): row for row in rows.values()}
        values = {
            (row.run, row.read): logits
            for row, logits, _ in self._walked(list(todo.values()), tokens)
        }
        for run, row in rows.items():
            asked = read_positions(run, at) or row.read
            logits = values[row.run, row.read]
            # Usually what was computed is what was asked for.
            found[run] = logits if asked == row.read else logits[[row.read.index(p) for p in asked]]
        return _stacked([found[run] for run in runs])

    def states(self, runs: Sequence[Run], sites: Sequence[Site]) -> list[list[Tensor]]:
        self._refuse_hooks()
        check_asked(runs)
        self._sites.check_all(runs, sites)
        self._need({run: {self._sites.place(site) for site in sites} for run in runs})
        return [[self._reference.take(run, site).clone() for run in runs] for site in sites]

    def _refuse_hooks(self) -> None:
        if hooked := foreign_hooks(self._model):
            raise EngineError(
                f"{hooked[0]} has hooks of somebody else's, which would see some positions only: "
                "use the reference executor"
            )

    def _is_known(self, run: Run) -> bool:
        if isinstance(run.ids, Inputs):
            raise EngineError("the suffix executor takes token ids only")
        return self._rows.is_known(run)

    def forget(self, runs: Collection[Run] | None = None) -> None:
        self._reference.forget(runs)
        if runs is not None:
            for run in runs:
                self._bases.pop(run, None)
            return
        self._bases.clear()
        self._lengths.clear()

    def _prepare(self, runs: Sequence[Run]) -> None:
        """Keep the sources of these runs and their bases."""
        self._need(self._sites.wanted_by(runs), [self._rows.base_of(run) for run in runs])

    def _need(self, wanted: Mapping[Run, Collection[Place]], bases: Iterable[Run] = ()) -> None:
        """Keep the states of these runs at these places, and what these bases leave behind."""
        missing = {
            run: {place for place in places if not self._has(run, place)}
            for run, places in wanted.items()
        }
        others = {
            run: places
            for run, places in missing.items()
            if places
            and not (self._is_known(run) and all(self._layer(p) is not None for p in places))
        }
        if others:
            self._reference.need(others)
            for run in others:
                missing[run] = set()
        plain: dict[Run, set[Place]] = {base: set() for base in bases if base not in self._bases}
        for run, places in missing.items():
            base = self._rows.base_of(run)
            unknown = {place for place in places if not self._has(base, place)}
            if unknown:
                plain.setdefault(base, set()).update(unknown)
        todo = list(plain)
        self._reference.need(self._sites.wanted_by(todo))
        for together in by_shape(todo):
            places = set().union(*(plain[todo[i]] for i in together))
            halving([todo[i] for i in together], partial(self._record, places=places))
        # Edited sources are rows too; what they share with their base is read from the base.
        edited = {
            run: places
            for run, places in missing.items()
            if places and self._rows.base_of(run) != run
        }
        if edited:
            self._follow(edited)

    def _has(self, run: Run, place: Place) -> bool:
        """Whether a state is kept; the residual stream of a base is, once the base is."""
        if (run, place) not in self._states and run in self._bases and place in self._stream:
            self._states[run, place] = self._bases[run].inputs[self._stream[place]]
        return (run, place) in self._states

    def _follow(self, wanted: Mapping[Run, set[Place]]) -> None:
        """Keep edited runs' states: their bases', and from their first position on their own."""
        self._prepare(list(wanted))
        places = set().union(*wanted.values())
        after = any((self._layer(place) or 0) >= self._anatomy.n_layers for place in places)
        rows = [self._rows.row(run, None if after else (-1,), states=True) for run in wanted]
        owners = {id(row): run for row, run in zip(rows, wanted, strict=True)}
        for row, _, states in self._walked(rows, None, places):
            run = owners[id(row)]
            for place in wanted[run]:
                base = self._rows.base_of(run)
                assert self._has(base, place)
                whole = self._states[base, place]
                if place in states and row.run == run:
                    whole = whole.clone()
                    own = states[place]
                    if place.pattern:
                        own = own[..., : whole.shape[-1]]
                    whole[row.position :] = own
                self._states[run, place] = whole

    def _layer(self, place: Place) -> int | None:
        return self._sites.layer(place)

    def _record(self, bases: Sequence[Run], places: Collection[Place]) -> list[Run]:
        """Run bases of one length in full; keep what their rows will start from, and states."""
        layers = range(self._anatomy.n_layers)
        calls: dict[int, Call] = {}
        given: list[dict[str, Any]] = [{} for _ in layers]

        def keep(call: Call) -> None:
            calls[call.layer] = call

        whole = self._anatomy.reach == "positions"
        handles = [
            find_module(self._model, place.path).register_forward_pre_hook(
                recording(given[i]), with_kwargs=True
            )
            for i, place in enumerate(self._inputs)
        ]

        def gives(_module: nn.Module, _args: Any, output: Any) -> None:
            self._in_tuple = isinstance(output, tuple)

        handles.append(find_module(self._model, self._outputs[0].path).register_forward_hook(gives))
        stream = [*self._inputs, *(self._outputs[-1:] if self._is_chain else self._outputs)]
        try:
            _, states = self._reference.forward(
                bases, (-1,), {*stream, *places}, inside=keep if whole else None
            )
        finally:
            for handle in handles:
                handle.remove()
        for i in layers[1:] if not self._is_chain else ():
            if not torch.equal(states[self._outputs[i - 1]], states[self._inputs[i]]):
                raise EngineError(f"block {i} does not start from what block {i - 1} gives")
        self._is_chain = True
        for place in places:
            self._states.update({(b, place): s for b, s in zip(bases, states[place], strict=True)})
        inputs = [states[place] for place in (*self._inputs, self._outputs[-1])]
        for row, base in enumerate(bases):
            keys = [calls[i].key[row] for i in layers] if whole else []
            values = [calls[i].value[row] for i in layers] if whole else []
            self._bases[base] = Base([state[row] for state in inputs], keys, values)
        if whole:
            masks = [calls[i].mask for i in layers]
            alike = {id(m): m[0] for m in masks if m is not None}
            self._lengths[len(bases[0])] = Length(
                [None if m is None else alike[id(m)] for m in masks], given
            )
        return list(bases)

    def _walked(
        self,
        rows: Sequence[Row],
        tokens: Sequence[int] | None,
        capture: Collection[Place] = (),
    ) -> Iterator[tuple[Row, Tensor, dict[Place, Tensor]]]:
        """Each row with its logits and the states at the places that it passed."""
        for some in self._cut(rows, tokens):
            done = halving(some, partial(self._walk, tokens=tokens, capture=capture))
            yield from ((row, *found) for row, found in zip(some, done, strict=True))

    def _walk(
        self, rows: Sequence[Row], tokens: Sequence[int] | None, capture: Collection[Place]
    ) -> Iterator[tuple[Tensor, dict[Place, Tensor]]]:
        if self._anatomy.reach != "positions":
            return zip(*self._restart(rows, tokens, capture), strict=True)
        walk = Walk(
            self._model,
            self._sites,
            rows,
            self._bases,
            self._lengths,
            self._reference.source,
            in_tuple=self._in_tuple,
        )
        return zip(*walk.run(tokens, capture), strict=True)

    def _restart(
        self, rows: Sequence[Row], tokens: Sequence[int] | None, capture: Collection[Place]
    ) -> tuple[list[Tensor], list[dict[Place, Tensor]]]:
        """Whole rows of one length, from the first layer at which one of them differs."""
        layer = rows[0].layer
        inputs = torch.stack([self._bases[row.base].inputs[layer] for row in rows])
        start = Start(layer, inputs, self._in_tuple)
        # The edits before its first layer have had their effect in its base.
        runs = [
            Run(row.run.ids, tuple(itertools.chain.from_iterable(row.edits.values())))
            for row in rows
        ]
        seen = [place for place in capture if (self._layer(place) or 0) >= layer]
        read = sorted(set().union(*(row.read for row in rows)))
        logits, states = self._reference.forward(runs, read, seen, start)
        found = [
            one[[read.index(p) for p in row.read]] for one, row in zip(logits, rows, strict=True)
        ]
        if tokens is not None:
            found = [one[..., list(tokens)] for one in found]
        return found, [{p: s[i] for p, s in states.items()} for i in range(len(rows))]

    def _cut(self, rows: Sequence[Row], tokens: Sequence[int] | None) -> Iterator[list[Row]]:
        """Rows that go together: of like first layers, within the budget."""
        ordered = sorted(rows, key=lambda row: row.layer)
        if self._anatomy.reach != "positions":
            groups = defaultdict(list)
            for row in ordered:
                groups[len(row.run)].append(row)
            for group in groups.values():
                size = max(1, self._max_tokens // len(group[0].run))
                yield from (group[i : i + size] for i in range(0, len(group), size))
            return
        facts = self._anatomy.facts
        width = len(tokens) if tokens is not None else facts.vocab_size if facts else 1
        some: list[Row] = []
        n_tokens = n_logits = 0
        for row in ordered:
            more = len(row.read) * width
            full = n_tokens + row.n_tokens > self._max_tokens or n_logits + more > _LOGITS
            if some and full:
                yield some
                some, n_tokens, n_logits = [], 0, 0
            some.append(row)
            n_tokens += row.n_tokens
            n_logits += more
        if some:
            yield some


def _stacked(parts: list[Tensor]) -> Tensor:
    """Tensors stacked; not copied where they are slices, one after the other, of one tensor."""
    first = parts[0]
    step, start = first.numel(), first.storage_offset()
    storage = first.untyped_storage().data_ptr()
    in_a_row = all(
        part.shape == first.shape
        and part.is_contiguous()
        and part.untyped_storage().data_ptr() == storage
        and part.storage_offset() == start + i * step
        for i, part in enumerate(parts)
    )
    if not in_a_row:
        return torch.stack(parts)
    return first.as_strided((len(parts), *first.shape), (step, *first.stride()), start)
