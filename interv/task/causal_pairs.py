"""Base and source pairs of a causal model, labelled with what the model says after the exchange."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from interv.task.causal_draws import Interchanges, Sampler, changes, filled, joined, maker
from interv.task.causal_model import CausalModel, unknown
from interv.task.causal_values import Array, CausalError

__all__ = ["Drawing", "Interchanges", "interchanges", "samples"]

Make = Callable[[int], Interchanges]


@dataclass(frozen=True)
class Drawing:
    """How pairs are drawn.

    Attributes:
        variables: which may be exchanged; each has a source of its own.
        mixture: weights of what is exchanged, by names joined with `+` (`WX`, `WX+YZ`). Unset:
            each variable alone and all together, equally often.
        changed: the share of samples whose label is not the base's own answer, within each
            part of the mixture; unset: as it comes.
        balance: every label equally often, as far as it can be.
        same_template: base and sources are prompts of one template.

    Raises:
        CausalError: unknown names, or a share outside 0 to 1.
    """

    model: CausalModel
    variables: tuple[str, ...]
    mixture: Mapping[str, float] | None = None
    changed: float | None = None
    balance: bool = False
    same_template: bool = True

    def __post_init__(self) -> None:
        names = [self.model.variable(name).name for name in self.variables]
        if not names or len(set(names)) < len(names):
            raise CausalError("no variables, or one twice", "each variable once")
        if self.changed is not None and not 0 <= self.changed <= 1:
            raise CausalError(f"a share of {self.changed}", "0 to 1")

    def makers(
        self, rng: np.random.Generator, n: int
    ) -> Iterator[tuple[tuple[str, ...], dict[bool | None, int], Make]]:
        """Yield each part of the mixture: its names, how many samples of each sort, their source.

        Raises:
            CausalError: no samples are asked for, or the mixture has unknown names.
        """
        if n < 1:
            raise CausalError(f"{n} samples", "1 or more")
        draw = Sampler(self.model, rng)
        kinds = _mixture(self.variables, self.mixture)
        counts = _shares(n, list(kinds.values()))
        for kind, count in zip(kinds, counts, strict=True):
            if count:
                wanted: dict[bool | None, int] = {None: count}
                wanted = wanted if self.changed is None else _flags(count, self.changed)
                yield kind, wanted, maker(self.model, self.variables, kind, draw)

    def filled(
        self,
        make: Make,
        wanted: Mapping[bool | None, int],
        names: Sequence[str],
        patience: int | None = None,
    ) -> dict[bool | None, Interchanges]:
        """Samples of each sort, as `causal_draws.filled` has it."""
        return filled(make, wanted, self.balance, "+".join(names), self.model.output, patience)

    def templated(self, pairs: Interchanges, rng: np.random.Generator) -> Interchanges:
        """The same pairs in templates that are drawn."""
        numbers, n = max(1, len(self.model.templates)), len(pairs)
        template = rng.integers(numbers, size=n)
        others = [
            template if self.same_template else rng.integers(numbers, size=n)
            for _ in self.variables
        ]
        return replace(
            pairs,
            template=template,
            # What is not exchanged is the base, template and all.
            source_templates=tuple(
                np.where(pairs.exchanged[:, i], other, template) for i, other in enumerate(others)
            ),
        )

    def moved(self, pairs: Interchanges) -> Array:
        """Whether the exchange changes each pair's label, `[n]`."""
        return changes(pairs, self.model.output)


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

    The options are those of `Drawing`. A pair may come more than once.

    Raises:
        CausalError: unknown names, or what is asked for does not occur.
    """
    drawing = Drawing(model, tuple(variables), mixture, changed, balance, same_template)
    rng = np.random.default_rng(seed)
    parts = [
        part
        for kind, wanted, make in drawing.makers(rng, n)
        for part in drawing.filled(make, wanted, kind).values()
    ]
    return drawing.templated(joined(parts).take(rng.permutation(n)), rng)


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
    make = maker(model, (), (), Sampler(model, rng))
    found = filled(make, {None: n}, balance, "", model.output)[None].take(rng.permutation(n))
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


def _flags(count: int, changed: float) -> dict[bool | None, int]:
    yes = round(count * changed)
    return {flag: c for flag, c in ((True, yes), (False, count - yes)) if c}
