"""Certification: the fast executor against the reference, on rows of the plan itself.

Two questions are kept apart. Whether the fast executor computes the same function is asked in
float64, where rounding is next to nothing: always where the model is in 16 bits, and where float32
leaves a doubt. Whether it computes it as precisely is asked in the model's own dtype: it may differ
from the reference by what the reference's own rounding explains, and no more.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from interv.engine import (
    Edit,
    Executor,
    ReferenceExecutor,
    Run,
    Site,
    SuffixExecutor,
    Vanilla,
)
from interv.engine.wide import in_float64
from interv.errors import EngineError
from interv.models.anatomy import Anatomy
from interv.plan.cost import free_cpu_bytes

T = TypeVar("T")

_TIMES = 10  # what the reference itself is off by
# Of the largest |logit|. Models compute parts in float32 also where they are in float64; in 16
# bits two right orders of summation are some roundings apart.
_FLOOR = {torch.float16: 4e-3, torch.bfloat16: 3e-2}
_WIDE_FLOOR = 1e-5
_MOST = 6  # rows of one kind
_LENGTH = 8  # tokens of a row, where there is no plan


@dataclass(frozen=True)
class Sample:
    """A row to compare: what it does, in words, and the positions that are read."""

    kind: str
    run: Run
    at: tuple[int, ...]


@dataclass(frozen=True)
class Comparison:
    """How far two executors are apart on the logits of some rows, and how far they may be.

    Attributes:
        difference: the largest, of any logit.
        allowed: the limit.
        worst: what the row with the largest difference does.
    """

    difference: float
    allowed: float
    worst: str

    @property
    def holds(self) -> bool:
        # A difference that is no number does not hold.
        return self.difference <= self.allowed


@dataclass(frozen=True)
class Certificate:
    """What was found on some rows.

    Attributes:
        rows: how many were compared.
        own: in the model's dtype. Allowed are 1e-5 of the largest |logit| (in bfloat16 0.03, in
            float16 0.004) or, if more, ten times the reference's own spread between batch sizes;
            where float64 was asked, ten times the reference's distance to it.
        float64: the same rows on a copy of the model in float64; None: not asked.
        not_in_float64: why it could not be asked.
    """

    rows: int
    own: Comparison
    float64: Comparison | None = None
    not_in_float64: str = ""

    @property
    def holds(self) -> bool:
        return self.own.holds and (self.float64 is None or self.float64.holds)

    @property
    def excess(self) -> float:
        """By how much the larger of the differences is more than allowed; negative: it holds."""
        both = [self.own, *([self.float64] if self.float64 else [])]
        return max(one.difference - one.allowed for one in both)

    def as_dict(self) -> dict[str, Any]:
        return {
            "rows": self.rows,
            **asdict(self.own),
            "holds": self.holds,
            "float64": asdict(self.float64) if self.float64 else None,
            "not_in_float64": self.not_in_float64,
        }


@dataclass(frozen=True)
class Measured:
    """Logits of the same rows, each `[read position, vocab]`.

    Attributes:
        fast, reference: of the two executors.
        alone: the reference's, one row at a time; only asked where it matters.
    """

    fast: Sequence[Tensor]
    reference: Sequence[Tensor]
    alone: Callable[[], Sequence[Tensor]]


def judged(
    kinds: Sequence[str], own: Measured, in_float64: Callable[[], Measured] | None
) -> Certificate:
    """Return the verdict on rows that were measured.

    Args:
        kinds: what each row does.
        own: in the model's dtype.
        in_float64: measures them in float64, or raises EngineError where that cannot be.
    """
    dtype = own.reference[0].dtype
    found = _compared(kinds, own)
    narrow = dtype in _FLOOR
    if in_float64 is None or dtype == torch.float64 or (found.holds and not narrow):
        return Certificate(len(kinds), found)
    try:
        wide = in_float64()
    except EngineError as error:
        return Certificate(len(kinds), found, not_in_float64=str(error))
    if not found.holds:
        off = max(map(_apart, own.reference, wide.reference))
        found = Comparison(found.difference, max(found.allowed, _TIMES * off), found.worst)
    return Certificate(len(kinds), found, _compared(kinds, wide))


def _compared(kinds: Sequence[str], measured: Measured) -> Comparison:
    apart = [*map(_apart, measured.fast, measured.reference)]
    worst = max(range(len(apart)), key=lambda i: (apart[i] != apart[i], apart[i]))
    largest = max(float(logits.abs().max()) for logits in measured.reference)
    allowed = _FLOOR.get(measured.reference[0].dtype, _WIDE_FLOOR) * largest
    if not apart[worst] <= allowed:
        spread = max(map(_apart, measured.alone(), measured.reference))
        allowed = max(allowed, _TIMES * spread)
    return Comparison(apart[worst], allowed, kinds[worst])


def _apart(one: Tensor, other: Tensor) -> float:
    return float((one.double() - other.to(one.device).double()).abs().max())


def certify(
    fast: Executor,
    reference: Executor,
    samples: Sequence[Sample],
    in_float64: Callable[[], tuple[Executor, Executor]] | None = None,
) -> Certificate:
    """Compare two executors.

    Args:
        fast: the executor to certify.
        reference: the executor to believe.
        samples: rows of all the kinds that a plan has.
        in_float64: makes the same two on a copy of the model in float64, or raises EngineError.
    """

    def measured(one: Executor, other: Executor) -> Measured:
        return Measured(
            _logits(one, samples),
            _logits(other, samples),
            lambda: [other.logits([sample.run], sample.at)[0] for sample in samples],
        )

    def wide() -> Measured:
        assert in_float64 is not None
        return measured(*in_float64())

    kinds = [sample.kind for sample in samples]
    return judged(kinds, measured(fast, reference), wide if in_float64 else None)


def _logits(executor: Executor, samples: Sequence[Sample]) -> list[Tensor]:
    found: dict[int, Tensor] = {}
    for at in dict.fromkeys(sample.at for sample in samples):
        rows = [i for i, sample in enumerate(samples) if sample.at == at]
        found |= zip(rows, executor.logits([samples[i].run for i in rows], at), strict=True)
    return [found[i] for i in range(len(samples))]


def free_bytes(model: nn.Module) -> int:
    """Memory that is free where a model is."""
    device = next(model.parameters()).device
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else free_cpu_bytes()


def wide_executors(
    model: nn.Module, anatomy: Anatomy, max_tokens: int = 1024
) -> Callable[[], tuple[Executor, Executor]]:
    """A way to both executors on a copy of a model in float64, as `certify` asks for it."""

    def make() -> tuple[Executor, Executor]:
        copied = in_float64(model, free_bytes(model))
        return SuffixExecutor(copied, anatomy, max_tokens), ReferenceExecutor(copied, anatomy)

    return make


def some_of(items: Sequence[T], most: int = _MOST) -> list[T]:
    """At most so many of some items, from first to last and evenly between."""
    if len(items) <= most:
        return list(items)
    if most == 1:
        return [items[0]]
    return [items[round(i * (len(items) - 1) / (most - 1))] for i in range(most)]


def certify_model(fast: SuffixExecutor, reference: ReferenceExecutor) -> Certificate:
    """Compare two executors on a model, by swaps in every component of a few layers.

    The prompt is of ordinary tokens, over the whole vocabulary: on special ones, which no text has
    one after the other, some models are so ill-conditioned that float32 says little.

    Raises:
        EngineError: they differ.
    """
    model, anatomy = reference.model, reference.sites.anatomy
    samples = list(model_samples(anatomy))
    certificate = certify(fast, reference, samples, wide_executors(model, anatomy))
    if not certificate.holds:
        raise refuse(certificate)
    fast.forget()
    reference.forget()
    return certificate


def model_samples(anatomy: Anatomy) -> Iterable[Sample]:
    """Swaps of two tokens' states in every component, of all its heads and of one."""
    assert anatomy.facts is not None
    special = {
        value
        for name, value in anatomy.config.items()
        if name.endswith("_token_id") and isinstance(value, int)
    }
    ordinary = [i for i in range(anatomy.facts.vocab_size) if i not in special]
    picked = some_of(ordinary, _LENGTH + 3)[1:-1]
    base = tuple(picked[:_LENGTH])
    source = Run((*base[:2], picked[-1], *base[3:]))
    for name in anatomy.components:
        layers = [0]
        if anatomy.has_layers(name):
            layers = sorted({0, anatomy.n_layers // 2, anatomy.n_layers - 1})
        units = anatomy.n_units(name)
        for layer in layers:
            yield Sample(name, _swap(base, source, Site(name, layer, (2, 4))), (-1,))
        if units:
            site = Site(name, layers[len(layers) // 2], (3, 5), heads=(units - 1,))
            yield Sample(f"{name} by head", _swap(base, source, site), (-1,))


def _swap(base: tuple[int, ...], source: Run, site: Site) -> Run:
    return Run(base, (Edit(site, Vanilla(), source),))


def refuse(certificate: Certificate) -> EngineError:
    """The error of a certificate that does not hold."""
    wide = certificate.float64
    found, where = certificate.own, ""
    if wide is not None and not wide.holds:
        found, where = wide, " in float64"
    doubt = ""
    if certificate.not_in_float64:
        doubt = f" (float64 could not be asked: {certificate.not_in_float64})"
    return EngineError(
        f"the suffix executor is not certified on this model: {found.worst} differs from the "
        f"reference by {found.difference:.3g} in a logit{where}, {found.allowed:.3g} allowed"
        f"{doubt}. Set run.on_uncertified=reference to go on, slowly; and please report it"
    )
