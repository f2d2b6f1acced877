"""Base and source pairs of a causal model, labelled with what the model says after the exchange."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from interv.task.causal_model import CausalModel, Variable, unknown
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


def interchanges(
    model: CausalModel,
    variables: Sequence[str],
    n: int,
    seed: int,
    *,
    mixture: Mapping[str, float] | None = None,
    changed: float | None = None,
    balance: bool = False,
    same_template: bool = True,
) -> Interchanges:
    """Draw `n` bases with a source for each exchanged variable; deterministic in `seed`.

    Args:
        variables: which may be exchanged; each has a source of its own.
        mixture: weights of what is exchanged, by names joined with `+` (`WX`, `WX+YZ`). Unset:
            each variable alone and all together, equally often.
        changed: the share of samples whose label is not the base's own answer, within each
            part of the mixture; unset: as it comes.
        balance: every label equally often, as far as it can be.
        same_template: base and sources are prompts of one template.

    Raises:
        CausalError: unknown names, or what is asked for does not occur.
    """
    exchanged = tuple(model.variable(name).name for name in variables)
    if not exchanged or len(set(exchanged)) < len(exchanged):
        raise CausalError("no variables, or one twice", "each variable once")
    if n < 1:
        raise CausalError(f"{n} samples", "1 or more")
    if changed is not None and not 0 <= changed <= 1:
        raise CausalError(f"a share of {changed}", "0 to 1")
    rng = np.random.default_rng(seed)
    draw = _Sampler(model, rng)
    parts = []
    kinds = _mixture(exchanged, mixture)
    counts = _shares(n, list(kinds.values()))
    for kind, count in zip(kinds, counts, strict=True):
        if count:
            wanted: dict[bool | None, int] = {None: count}
            wanted = wanted if changed is None else _split(count, changed)
            maker = _maker(model, exchanged, kind, draw)
            parts.append(_filled(maker, wanted, balance, "+".join(kind), model.output))
    whole = _joined(parts).take(rng.permutation(n))
    numbers = max(1, len(model.templates))
    template = rng.integers(numbers, size=n)
    others = [template if same_template else rng.integers(numbers, size=n) for _ in exchanged]
    return replace(
        whole,
        template=template,
        # What is not exchanged is the base, template and all.
        source_templates=tuple(
            np.where(whole.exchanged[:, i], other, template) for i, other in enumerate(others)
        ),
    )


def samples(
    model: CausalModel, n: int, seed: int, *, balance: bool = False
) -> tuple[dict[str, Array], Array]:
    """Values `[n]` of every variable in `n` samples with nothing exchanged, and templates `[n]`.

    Args:
        balance: every value of the output equally often, as far as it can be.

    Raises:
        CausalError: no samples fit the model's conditions.
    """
    rng = np.random.default_rng(seed)
    maker = _maker(model, (), (), _Sampler(model, rng))
    found = _filled(maker, {None: n}, balance, "", model.output).take(rng.permutation(n))
    return dict(found.base), rng.integers(max(1, len(model.templates)), size=n)


def _mixture(
    variables: tuple[str, ...], mixture: Mapping[str, float] | None
) -> dict[tuple[str, ...], float]:
    if mixture is None:
        alone: dict[tuple[str, ...], float] = {(v,): 1.0 for v in variables}
        return alone if len(variables) == 1 else {**alone, variables: 1.0}
    found: dict[tuple[str, ...], float] = {}
    for text, weight in mixture.items():
        names = [part.strip() for part in text.split("+")]
        for name in names:
            if name not in variables:
                raise unknown("exchanged variable", name, variables).within("mixture", text)
        kind = tuple(v for v in variables if v in names)
        if len(kind) < len(names) or kind in found:
            raise CausalError(f"'{text}' is there twice", "each once", at=("mixture", text))
        if not 0 < weight < float("inf"):
            message = f"the weight of '{text}' is {weight}"
            raise CausalError(message, "more than 0", at=("mixture", text))
        found[kind] = float(weight)
    if not found:
        raise CausalError("an empty mixture", "names and weights", at=("mixture",))
    return found


def _shares(n: int, weights: Sequence[float]) -> list[int]:
    """`n` in parts as the weights, by largest remainder."""
    exact = n * np.array(weights) / sum(weights)
    counts = np.floor(exact).astype(int)
    for at in np.argsort(-(exact - counts), kind="stable")[: n - counts.sum()]:
        counts[at] += 1
    return [int(c) for c in counts]


def _split(count: int, changed: float) -> dict[bool | None, int]:
    yes = round(count * changed)
    return {flag: c for flag, c in ((True, yes), (False, count - yes)) if c}


class _Sampler:
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


def _maker(
    model: CausalModel, variables: tuple[str, ...], kind: tuple[str, ...], draw: _Sampler
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


def _filled(
    make: Callable[[int], Interchanges],
    wanted: Mapping[bool | None, int],
    balance: bool,
    names: str,
    output: str,
) -> Interchanges:
    """Samples drawn until each group (label changed, or not, or None: any) has its number."""
    total = sum(wanted.values())
    if total < 1:
        raise CausalError(f"{total} samples", "1 or more")
    limit = 100 * total + 100_000
    pools: dict[bool | None, list[Interchanges]] = {flag: [] for flag in wanted}
    labels: dict[bool | None, dict[Any, int]] = {flag: {} for flag in wanted}
    have = dict.fromkeys(wanted, 0)
    drawn = 0

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
        if drawn >= limit:
            flag = next(f for f in wanted if have[f] < wanted[f])
            raise _too_few(flag, have[flag], wanted[flag], drawn, names)
        missing = sum(max(0, wanted[flag] - have[flag]) for flag in wanted)
        exact = None in wanted and not balance
        size = min(
            _CHUNK, missing if exact else max(2 * missing, total if balance else total // 4, 64)
        )
        part = make(size)
        drawn += size
        moved = (part.label != part.base[output]).astype(bool)
        for flag, pool in pools.items():
            rows = np.flatnonzero(moved == flag) if flag is not None else np.arange(len(part))
            if not balance:  # what is more than wanted is never looked at
                rows = rows[: wanted[flag] - have[flag]]
            have[flag] += len(rows)
            pool.append(part.take(rows))
            if balance:
                for value in part.label[rows].tolist():
                    labels[flag][value] = labels[flag].get(value, 0) + 1
    groups = []
    for flag, pool in pools.items():
        found = _joined(pool)
        order = _by_turns(found.label) if balance else np.arange(len(found))
        groups.append(found.take(order[: wanted[flag]]))
    return _joined(groups)


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


def _joined(parts: Sequence[Interchanges]) -> Interchanges:
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
