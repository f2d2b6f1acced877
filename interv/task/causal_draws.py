"""Drawing samples of a causal model until there are enough of each sort."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from interv.task.causal_model import CausalModel, Variable
from interv.task.causal_values import Array, CausalError, column

_CHUNK = 2**18  # samples drawn at once


@dataclass(frozen=True)
class Interchanges:
    """n samples; every array has length n.

    Attributes:
        variables: those that may be exchanged.
        base: every variable's value in the base.
        sources: for each of `variables` every variable's value in its source, which is the base
            itself in samples where the variable is not exchanged.
        exchanged: `[n, len(variables)]` bool.
        label: the output's value once the variables have their values from the sources.
        template, source_templates: the number of the prompt's template, from 0; of each source.
    """

    variables: tuple[str, ...]
    base: Mapping[str, Array]
    sources: tuple[Mapping[str, Array], ...]
    exchanged: Array
    label: Array
    template: Array
    source_templates: tuple[Array, ...]

    def __len__(self) -> int:
        return len(self.label)

    def take(self, indices: Array) -> Interchanges:
        """Some of the samples, in this order."""

        def of(values: Mapping[str, Array]) -> dict[str, Array]:
            return {name: array[indices] for name, array in values.items()}

        return replace(
            self,
            base=of(self.base),
            sources=tuple(map(of, self.sources)),
            exchanged=self.exchanged[indices],
            label=self.label[indices],
            template=self.template[indices],
            source_templates=tuple(t[indices] for t in self.source_templates),
        )


class Sampler:
    """Draws inputs that fit the model's conditions; entities are numbered on from a start."""

    def __init__(self, model: CausalModel, rng: np.random.Generator) -> None:
        self.model, self.rng = model, rng
        # Far from the numbers of a finite set of entities, and from other streams'.
        self.fresh = int(rng.integers(2**40, 2**62))

    def __call__(self, n: int) -> dict[str, Array]:
        """Every variable in `n` samples."""
        parts: list[dict[str, Array]] = []
        have = drawn = 0
        while have < n or not parts:
            size = n - have
            if drawn:  # as many as the conditions have let through so far, and some more
                size = min(_CHUNK, int(1.2 * size * drawn / max(have, 1)) + 64)
            values = self._draw(size)
            fits = self._fits(values, size)
            parts.append(values if fits is None else _rows(values, fits))
            have += size if fits is None else int(fits.sum())
            drawn += size
            if have * 5000 + 100_000 < drawn:
                raise CausalError(
                    f"{have} of {drawn:,} samples fit the conditions on bases and sources",
                    "inputs that fit them more often" + self._conditions(),
                )
        if len(parts) == 1:
            return {name: array[:n] for name, array in parts[0].items()}
        return {name: np.concatenate([p[name] for p in parts])[:n] for name in parts[0]}

    def _conditions(self) -> str:
        texts = [repr(e.text) for e in self.model.where]
        texts += [f"'{name}' among {len(v)} values" for name, v in self.model.allowed.items()]
        return f": {'; '.join(texts)}" if texts else ""

    def _fits(self, values: Mapping[str, Array], n: int) -> Array | None:
        fits: Array | None = None
        for expression in self.model.where:
            holds = expression(values, n)
            if holds.dtype == object:
                message = f"{expression.text!r} is neither true nor false"
                raise CausalError(message, "a comparison", at=("where",))
            fits = (holds != 0) if fits is None else fits & (holds != 0)
        for name in self.model.allowed:
            holds = self.usable(name, values[name])
            fits = holds if fits is None else fits & holds
        return fits

    def usable(self, name: str, values: Array) -> Array:
        """Where a variable's value may stand in a prompt, or as an answer."""
        if name not in self.model.allowed:
            return np.ones(len(values), dtype=bool)
        known = self.model.allowed[name]
        return np.fromiter((v in known for v in values.tolist()), dtype=bool, count=len(values))

    def _draw(self, n: int) -> dict[str, Array]:
        drawn: dict[str, Array] = {}
        for name, variable in self.model.variables.items():
            if variable.is_input:
                drawn[name] = self._input(variable, drawn, n)
        return self.model.run(drawn)

    def _input(self, variable: Variable, drawn: Mapping[str, Array], n: int) -> Array:
        if variable.how == "vector":
            return self._entities(variable, drawn, n)
        if variable.how == "one_of":
            which = self.rng.integers(len(variable.parents), size=n)
            return np.choose(which, [drawn[p] for p in variable.parents])
        assert variable.values is not None
        return column(variable.values)[self.rng.integers(len(variable.values), size=n)]

    def _entities(self, variable: Variable, drawn: Mapping[str, Array], n: int) -> Array:
        same = drawn[variable.parents[0]] if variable.parents else None
        if variable.entities is None:
            ids = np.arange(self.fresh, self.fresh + n, dtype=np.int64)
            self.fresh += n
        elif same is None:
            ids = self.rng.integers(variable.entities, size=n)
        else:  # one of the others
            ids = (same + self.rng.integers(1, variable.entities, size=n)) % variable.entities
        if same is not None:
            ids = np.where(self.rng.random(n) < variable.share, same, ids)
        return ids


def _rows(values: Mapping[str, Array], mask: Array) -> dict[str, Array]:
    return {name: array[mask] for name, array in values.items()}


def maker(
    model: CausalModel, variables: tuple[str, ...], kind: tuple[str, ...], draw: Sampler
) -> Callable[[int], Interchanges]:
    """What draws samples in which all of `kind` are exchanged, and no other."""

    def make(n: int) -> Interchanges:
        base = draw(n)
        sources = tuple(draw(n) if v in kind else base for v in variables)
        fixed = {v: s[v] for v, s in zip(variables, sources, strict=True) if v in kind}
        after = model.run({v: base[v] for v in model.inputs}, fixed) if kind else base
        exchanged = np.tile(np.array([v in kind for v in variables], dtype=bool), (n, 1))
        zeros = np.zeros(n, dtype=np.int64)
        found = Interchanges(
            variables, base, sources, exchanged, after[model.output], zeros, (zeros,) * len(sources)
        )
        usable = draw.usable(model.output, found.label)
        return found if usable.all() else found.take(np.flatnonzero(usable))

    return make


def filled(
    make: Callable[[int], Interchanges],
    wanted: Mapping[bool | None, int],
    balance: bool,
    names: str,
    output: str,
    patience: int | None = None,
) -> dict[bool | None, Interchanges]:
    """Draw samples until each group (label changed, or not, or None: any) has its number.

    Args:
        patience: give what there is once so many draws have brought nothing that is wanted.

    Raises:
        CausalError: a group has too few samples, without `patience`.
    """
    total = sum(wanted.values())
    if total < 1:
        raise CausalError(f"{total} samples", "1 or more")
    limit = 100 * total + 100_000
    pools: dict[bool | None, list[Interchanges]] = {flag: [] for flag in wanted}
    labels: dict[bool | None, dict[Any, int]] = {flag: {} for flag in wanted}
    have = dict.fromkeys(wanted, 0)
    drawn = idle = 0

    def short(flag: bool | None) -> bool:
        if have[flag] < wanted[flag]:
            return True
        seen = labels[flag]
        # A label that is rare is looked for a while, not for ever.
        return (
            balance
            and drawn < min(limit // 2, max(4 * total, _CHUNK))
            and (len(seen) < 2 or min(seen.values()) < wanted[flag] // len(seen))
        )

    while any(short(flag) for flag in wanted):
        if patience is not None and (idle >= patience or drawn >= limit):
            break
        if drawn >= limit:
            flag = next(f for f in wanted if have[f] < wanted[f])
            raise _too_few(flag, have[flag], wanted[flag], drawn, names)
        missing = sum(max(0, wanted[flag] - have[flag]) for flag in wanted)
        exact = None in wanted and not balance
        size = min(
            _CHUNK, missing if exact else max(2 * missing, total if balance else total // 4, 64)
        )
        size = size if patience is None else max(size, 64)
        part = make(size)
        drawn += size
        moved = changes(part, output)
        idle += size
        for flag, pool in pools.items():
            rows = np.flatnonzero(moved == flag) if flag is not None else np.arange(len(part))
            if len(rows) and short(flag):
                idle = 0
            if not balance:  # what is more than wanted is never looked at
                rows = rows[: wanted[flag] - have[flag]]
            have[flag] += len(rows)
            pool.append(part.take(rows))
            if balance:
                for value in part.label[rows].tolist():
                    labels[flag][value] = labels[flag].get(value, 0) + 1
    groups = {}
    for flag, pool in pools.items():
        found = joined(pool)
        order = _by_turns(found.label) if balance else np.arange(len(found))
        groups[flag] = found.take(order[: wanted[flag]])
    return groups


def changes(part: Interchanges, output: str) -> Array:
    """Whether the exchange changes each sample's label, `[n]`."""
    return np.asarray(part.label != part.base[output]).astype(bool)


def _too_few(flag: bool | None, have: int, wanted: int, drawn: int, names: str) -> CausalError:
    if flag is None:
        return CausalError(f"{have} of {wanted} samples in {drawn:,} draws", "fewer samples")
    word = "changes" if flag else "stays the same"
    what = f"no counterfactual pair whose label {word}"
    if have:
        what = f"only {have} of {wanted} counterfactual pairs whose label {word}"
    expected = "a variable that the output depends on, or no `changed`" if flag else "changed: 1"
    return CausalError(f"{what}: variables {names}, {drawn:,} draws", expected)


def _by_turns(labels: Array) -> Array:
    """Indices `[n]` such that labels take turns: all first ones, then all second ones, ..."""
    seen: dict[Any, int] = {}
    turns = np.empty(len(labels), dtype=np.int64)
    for at, value in enumerate(labels.tolist()):
        turns[at] = seen[value] = seen.get(value, -1) + 1
    return np.argsort(turns, kind="stable")


def joined(parts: Sequence[Interchanges]) -> Interchanges:
    if len(parts) == 1:
        return parts[0]

    def of(dicts: Iterable[Mapping[str, Array]]) -> dict[str, Array]:
        listed = list(dicts)
        return {name: np.concatenate([d[name] for d in listed]) for name in listed[0]}

    first = parts[0]
    number = range(len(first.sources))
    return Interchanges(
        first.variables,
        of(p.base for p in parts),
        tuple(of(p.sources[i] for p in parts) for i in number),
        np.concatenate([p.exchanged for p in parts]),
        np.concatenate([p.label for p in parts]),
        np.concatenate([p.template for p in parts]),
        tuple(np.concatenate([p.source_templates[i] for p in parts]) for i in number),
    )
