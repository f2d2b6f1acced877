"""Pairs of a causal model in splits that have no pair in common."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

import numpy as np

from interv.task.causal_draws import Interchanges, joined
from interv.task.causal_model import CausalModel
from interv.task.causal_pairs import Drawing, interchanges, samples
from interv.task.causal_text import value_text
from interv.task.causal_values import Array, CausalError

HeldOut = Literal["pairs", "values"]
Key = tuple[Any, ...]

_PROBE = 8192  # draws from which the pairs that there are, or values, are known
_LEAST_VALUES = 2  # in a split: a base and a source that differ


def splits(
    model: CausalModel,
    variables: Sequence[str],
    sizes: Mapping[str, int],
    seeds: Mapping[str, int],
    *,
    held_out: HeldOut = "pairs",
    **how: Any,
) -> dict[str, Interchanges]:
    """Draw the pairs of several splits; no pair of prompts, or of inputs, is in two of them.

    Pairs are drawn as they come where none comes twice. Else the distinct pairs that there are
    are dealt to the splits in proportion to their sizes, at random and for good; the first split,
    which is trained on, repeats its own pairs up to its size, and the others have each pair once
    and are smaller where there are too few.

    Args:
        sizes: pairs asked for, by split; the first is the one to train on.
        seeds: of each split's draws; the first one's also of how pairs are dealt.
        held_out: `values`: what is exchanged has values in each split, of base and source, that
            it has in no other.
        how: as `interchanges` has it.

    Raises:
        CausalError: as `interchanges`; and too few pairs or values for so many splits.
    """
    if held_out == "pairs":
        drawn = {s: interchanges(model, variables, n, seeds[s], **how) for s, n in sizes.items()}
        if not model.is_finite or not _repeated(model, drawn):
            return drawn
    first = next(iter(sizes))
    drawing = Drawing(model, tuple(variables), **how)
    seed = seeds[first]
    deal: _DealtPairs | _DealtValues = (
        _DealtValues(model, variables, sizes, seed)
        if held_out == "values"
        else _DealtPairs(drawing, sizes, seed)
    )
    found = {
        split: _dealt(drawing, deal, split, n, seeds[split], repeat=split == first)
        for split, n in sizes.items()
    }
    if _repeated(model, {split: some for split, some in found.items() if split != first}) or (
        set(pair_keys(model, found[first]))
        & {key for split, some in found.items() if split != first for key in pair_keys(model, some)}
    ):
        message = "a pair of prompts is there with two labels"
        raise CausalError(message, "templates that show every input", at=("templates",))
    return found


def pair_keys(model: CausalModel, pairs: Interchanges) -> list[Key]:
    """What a pair is to a language model: the texts of base and sources, or their inputs."""
    base = _said(model, pairs.base, pairs.template)
    sources = [
        _said(model, values, template)
        for values, template in zip(pairs.sources, pairs.source_templates, strict=True)
    ]
    return [
        (own, *(said if on else None for said, on in zip(of, exchanged, strict=True)))
        for own, exchanged, *of in zip(base, pairs.exchanged.tolist(), *sources, strict=True)
    ]


def _said(model: CausalModel, values: Mapping[str, Array], template: Array) -> list[Key]:
    """What of each sample is seen."""
    if model.is_vector:
        return list(zip(*(values[name].tolist() for name in model.inputs), strict=True))
    slots = dict.fromkeys(slot for each in model.templates for slot in each.slots)
    texts = {
        slot: [value_text(model.variables[slot], v) for v in values[slot].tolist()]
        for slot in slots
    }
    return [
        (model.templates[t].text, *(texts[slot][i] for slot in model.templates[t].slots))
        for i, t in enumerate(template.tolist())
    ]


def _repeated(model: CausalModel, drawn: Mapping[str, Interchanges]) -> bool:
    """Whether a pair is in two splits, or twice in one that is not the first."""
    seen: set[Key] = set()
    for number, pairs in enumerate(drawn.values()):
        keys = pair_keys(model, pairs)
        own = set(keys)
        if seen & own or (number and len(own) < len(keys)):
            return True
        seen |= own
    return False


def _place(key: object, seed: int) -> int:
    """A number of 64 bits for a key: the order in which keys are dealt."""
    text = f"{seed} {key!r}".encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big")


def _cuts(places: Sequence[int], sizes: Sequence[int], least: int) -> list[int]:
    """Where splits end among sorted places: in proportion to their sizes, at least so many each.

    Raises:
        ValueError: there are too few places.
    """
    n = len(places)
    if n < least * len(sizes):
        raise ValueError
    counts = [max(least, round(n * size / sum(sizes))) for size in sizes]
    while sum(counts) != n:
        # From the split that has most beyond its share, or to the one that lacks most.
        over = [c - n * size / sum(sizes) for c, size in zip(counts, sizes, strict=True)]
        if sum(counts) > n:
            able = [i for i, c in enumerate(counts) if c > least]
            counts[max(able, key=lambda i: over[i])] -= 1
        else:
            counts[min(range(len(counts)), key=lambda i: over[i])] += 1
    ends = np.cumsum(counts)[:-1]
    return [places[end] for end in ends.tolist()]


class _DealtPairs:
    """Which split a pair belongs to: by its place among the pairs of its kind."""

    def __init__(self, drawing: Drawing, sizes: Mapping[str, int], seed: int) -> None:
        self._model, self._seed, self._names = drawing.model, seed, list(sizes)
        self._cuts: dict[tuple[bool, ...], dict[bool | None, list[int]]] = {}
        self.known = 0
        rng = np.random.default_rng(seed)
        for kind, flags, make in drawing.makers(rng, sum(sizes.values())):
            part = drawing.templated(make(_PROBE), rng)
            row = tuple(v in kind for v in drawing.variables)
            places = self._places(part)
            moved = drawing.moved(part)
            cuts: dict[bool | None, list[int]] = {}
            for flag in flags:
                some = places if flag is None else places[moved == flag]
                distinct = sorted({int(place) for place in some.tolist()})
                self.known = max(self.known, len(distinct))
                try:
                    cuts[flag] = _cuts(distinct, list(sizes.values()), 1)
                except ValueError:
                    raise _too_few_pairs(len(distinct), flag, kind, sizes) from None
            self._cuts[row] = cuts

    def _places(self, part: Interchanges) -> Array:
        keys = pair_keys(self._model, part)
        return np.array([_place(key, self._seed) for key in keys], dtype=np.uint64)

    def __call__(self, part: Interchanges, split: str, flag_of: Array) -> Array:
        """Which rows belong to a split."""
        cuts = self._cuts[tuple(part.exchanged[0].tolist())] if len(part) else {}
        found = np.zeros(len(part), dtype=bool)
        places, number = self._places(part), self._names.index(split)
        for flag, ends in cuts.items():
            rows = np.ones(len(part), dtype=bool) if flag is None else flag_of == flag
            at = np.searchsorted(np.array(ends, dtype=np.uint64), places, side="right")
            found |= rows & (at == number)
        return found


def _too_few_pairs(
    n: int, flag: bool | None, kind: Sequence[str], sizes: Mapping[str, int]
) -> CausalError:
    whose = "" if flag is None else f" whose label {'changes' if flag else 'stays the same'}"
    names = "+".join(kind)
    return CausalError(
        f"{n} distinct pairs{whose}, with {names} exchanged: too few for {', '.join(sizes)}, which "
        "have none in common",
        "more values of the inputs, or more templates",
        at=("variables",),
    )


class _DealtValues:
    """Which split a pair belongs to: by the values of what is exchanged, in base and source."""

    def __init__(
        self, model: CausalModel, variables: Sequence[str], sizes: Mapping[str, int], seed: int
    ) -> None:
        self._variables, self._seed, self._names = variables, seed, list(sizes)
        values, _ = samples(model, _PROBE, seed)
        self._cuts: list[list[int]] = []
        for name in variables:
            distinct = sorted({_place(value, seed) for value in set(values[name].tolist())})
            try:
                self._cuts.append(_cuts(distinct, list(sizes.values()), _LEAST_VALUES))
            except ValueError:
                raise CausalError(
                    f"'{name}' has {len(distinct)} values, which held_out: values deals to "
                    f"{', '.join(sizes)}",
                    f"at least {_LEAST_VALUES} for each, or held_out: pairs",
                    at=("held_out",),
                ) from None
        self.known = _PROBE

    def __call__(self, part: Interchanges, split: str, flag_of: Array) -> Array:
        """Which rows belong to a split."""
        number = self._names.index(split)
        found = np.ones(len(part), dtype=bool)
        for v, name in enumerate(self._variables):
            ends = np.array(self._cuts[v], dtype=np.uint64)
            for values in (part.base[name], part.sources[v][name]):
                places = [_place(value, self._seed) for value in values.tolist()]
                at = np.searchsorted(ends, np.array(places, dtype=np.uint64), side="right")
                found &= (at == number) | ~part.exchanged[:, v]
        return found


def _dealt(
    drawing: Drawing,
    deal: Callable[[Interchanges, str, Array], Array],
    split: str,
    n: int,
    seed: int,
    *,
    repeat: bool,
) -> Interchanges:
    """One split's pairs, each once; repeated up to `n`, or fewer, in the same proportions."""
    rng = np.random.default_rng(seed)
    groups: list[tuple[Interchanges, int]] = []
    for kind, wanted, make in drawing.makers(rng, n):
        seen: set[Key] = set()

        def fresh(count: int, make: Any = make, seen: set[Key] = seen) -> Interchanges:
            part = drawing.templated(make(count), rng)
            part = part.take(np.flatnonzero(deal(part, split, drawing.moved(part))))
            rows = list(_unseen(pair_keys(drawing.model, part), seen))
            return part.take(np.array(rows, dtype=np.int64))

        for flag, found in drawing.filled(fresh, wanted, kind, _patience(deal)).items():
            if not len(found):
                names = "+".join(kind)
                raise CausalError(
                    f"no {split} pair with {names} exchanged is left",
                    "more values of the inputs, or a larger share of pairs for it",
                    at=("variables",),
                )
            groups.append((found, wanted[flag]))
    if repeat:
        filled = [some.take(np.resize(np.arange(len(some)), wanted)) for some, wanted in groups]
    else:
        share = min(len(some) / wanted for some, wanted in groups)
        filled = [
            some.take(np.arange(max(1, int(share * wanted + 1e-9)))) for some, wanted in groups
        ]
    whole = joined(filled)
    return whole.take(rng.permutation(len(whole)))


def _patience(deal: Any) -> int:
    # A pair among d that are as likely is missed in 20 d draws once in e^20.
    return int(20 * min(max(deal.known, 50), _PROBE))


def _unseen(keys: Sequence[Key], seen: set[Key]) -> Iterator[int]:
    for row, key in enumerate(keys):
        if key not in seen:
            seen.add(key)
            yield row
