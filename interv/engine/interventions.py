"""What is done at a site: the abstract base, and the types that hold nothing but numbers.

An intervention maps the base's activations at a site, and for some the source's, to what stands
there instead. b = base, s = source, both `[..., n_positions, width]` in the model's numbers: any
leading dimensions are rows to which the same is done, and `width` is that of the columns the
site chooses (a component, some of its heads, or a subspace). The names are pyvene's (Wu et al.
2024, arXiv 2403.07809) where it has the type.

The types are small, final, frozen classes. Those that hold tensors or modules are hashed by
identity, the others by value: an executor that keeps states must `forget` them after parameters,
or a temperature, were changed.

Parameters are in small modules (`Rotation`, a `Gate`, a `Dictionary`, an `Adapter`) which the
interventions hold, so that two are linked by giving both the same module. What is computed is
differentiable in base, source and parameters.
"""

from __future__ import annotations

import functools
import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, final

import numpy as np
import torch
from torch import Tensor, nn

from interv.errors import EngineError


class Intervention(ABC):
    """A function of base and source, of the same shape as the base.

    Attributes:
        name: as it is called in a spec.
        needs_source: whether a run is named whose activations are the source.
        reads_input: whether what `apply` gets as source is the input of the site's module.
        positionwise: whether the result at a position depends on nothing but base and source at
            that position, so that positions may be left out, or done in any order.
    """

    name: ClassVar[str]
    needs_source: ClassVar[bool]
    reads_input: ClassVar[bool] = False
    positionwise: ClassVar[bool] = True

    @abstractmethod
    def apply(self, base: Tensor, source: Tensor | None) -> Tensor:
        """New activations `[..., n_positions, width]`; never writes into its arguments.

        Args:
            base: `[..., n_positions, width]`.
            source: the same, or without its leading dimensions; the input of the site's module
                where `reads_input`; None where neither is wanted.

        Raises:
            EngineError: base, source and what the intervention holds do not fit together.
        """

    def modules(self) -> dict[str, nn.Module]:
        """The modules that hold the parameters, by the name of the field they are in."""
        found: dict[str, nn.Module] = {}
        for key, value in vars(self).items():
            if isinstance(value, nn.Module):
                found[key] = value
            elif isinstance(value, Intervention):
                found |= {f"{key}.{inner}": module for inner, module in value.modules().items()}
        return found

    def parameters(self) -> list[nn.Parameter]:
        """All parameters, each once; what has none gives none."""
        return list(dict.fromkeys(p for m in self.modules().values() for p in m.parameters()))


class FromSource(Intervention):
    """An intervention that needs a source."""

    needs_source: ClassVar[bool] = True

    def apply(self, base: Tensor, source: Tensor | None) -> Tensor:
        return self.combine(base, fitting(self.name, "source", base, source))

    @abstractmethod
    def combine(self, base: Tensor, source: Tensor) -> Tensor:
        """`apply`, with the source there and of the base's shape."""


def fitting(name: str, what: str, base: Tensor, source: Tensor | None) -> Tensor:
    """`source`, seen in the base's shape: only leading dimensions may be missing, or 1."""
    if source is None:
        raise EngineError(f"{name}: there is no {what}")
    if source.shape == base.shape:
        return source
    expect_width(name, what, source.shape[-1], base)
    if source.dim() < 2 or source.shape[-2] != base.shape[-2]:
        positions = source.shape[-2] if source.dim() > 1 else "no"
        raise EngineError(
            f"{name}: the {what} has {positions} positions, the site {base.shape[-2]}"
        )
    try:
        return source.expand(base.shape)
    except RuntimeError as error:
        raise EngineError(
            f"{name}: the {what} has the shape {tuple(source.shape)}, the site {tuple(base.shape)}"
        ) from error


def expect_width(name: str, what: str, width: int, base: Tensor) -> None:
    """Raise EngineError unless what is `width` wide fits the base."""
    if width != base.shape[-1]:
        raise EngineError(f"{name}: the {what} is {width} wide, the site {base.shape[-1]}")


def expect_among(name: str, what: str, indices: tuple[int, ...] | None, n: int) -> None:
    """Raise EngineError unless `indices` are some of n, each once; None is all of them."""
    if indices is None:
        return
    if not indices or len(set(indices)) != len(indices):
        raise EngineError(f"{name}: {what} {indices} are none, or some of them twice")
    wrong = [i for i in indices if not 0 <= i < n]
    if wrong:
        raise EngineError(f"{name}: {what} {wrong[0]} is not among the {n}, from 0 to {n - 1}")


def parameter(value: Tensor) -> nn.Parameter:
    """A copy of it that can be trained, in float32 at least."""
    wide = torch.promote_types(value.dtype, torch.float32)
    return nn.Parameter(value.detach().to(wide, copy=True))


def difference(base: Tensor, source: Tensor, like: Tensor) -> Tensor:
    """s − b in the parameters' numbers; rounded to them after the subtraction, if wider."""
    wide = torch.promote_types(base.dtype, like.dtype)
    return (source.to(wide) - base.to(wide)).to(like.dtype)


def changed(base: Tensor, change: Tensor) -> Tensor:
    """base + change in the wider numbers of the two, then as the base.

    A swap is written so: it leaves b as it is to the last bit where s = b.
    """
    wide = torch.promote_types(base.dtype, change.dtype)
    return (base.to(wide) + change.to(base.device)).to(base.dtype)


@final
@dataclass(frozen=True)
class Vanilla(FromSource):
    """b ← s: activation patching, interchange (Geiger et al. 2021), restoration.

    Resample ablation (Chan et al. 2022) is this too, with another prompt's run, chosen at
    random by the plan, as the source; it has no class of its own.
    """

    name: ClassVar[str] = "vanilla"

    def combine(self, base: Tensor, source: Tensor) -> Tensor:
        return source


@final
@dataclass(frozen=True)
class Addition(FromSource):
    """b ← b + s (pyvene)."""

    name: ClassVar[str] = "addition"

    def combine(self, base: Tensor, source: Tensor) -> Tensor:
        return base + source


@final
@dataclass(frozen=True)
class Subtraction(FromSource):
    """b ← b − s (pyvene)."""

    name: ClassVar[str] = "subtraction"

    def combine(self, base: Tensor, source: Tensor) -> Tensor:
        return base - source


@final
@dataclass(frozen=True)
class Zero(Intervention):
    """b ← 0: zero ablation (pyvene)."""

    name: ClassVar[str] = "zero"
    needs_source: ClassVar[bool] = False

    def apply(self, base: Tensor, source: Tensor | None) -> Tensor:
        return torch.zeros_like(base)


@final
@dataclass(frozen=True)
class Collect(Intervention):
    """b ← b: nothing is written; the site is there to be read (pyvene)."""

    name: ClassVar[str] = "collect"
    needs_source: ClassVar[bool] = False

    def apply(self, base: Tensor, source: Tensor | None) -> Tensor:
        return base


@final
@dataclass(frozen=True)
class Skip(Intervention):
    """b ← x, the input of the module whose output b is (pyvene): the module does nothing."""

    name: ClassVar[str] = "skip"
    needs_source: ClassVar[bool] = False
    reads_input: ClassVar[bool] = True

    def apply(self, base: Tensor, source: Tensor | None) -> Tensor:
        return fitting(self.name, "module's input", base, source)


@final
@dataclass(frozen=True)
class Noise(Intervention):
    """b ← b + level · ε, ε the `draw`-th of the standard normal draws of `seed`.

    ε comes from `numpy.random.RandomState(seed).randn(draws, n_positions, width)`, which gives
    the same first draws however many are asked for: the numbers of the authors' code
    (`trace_with_patch` in experiments/causal_trace.py of Meng et al. 2022) for seed 1. It is
    the same for each leading index.
    """

    name: ClassVar[str] = "noise"
    needs_source: ClassVar[bool] = False
    # Which numbers a position gets depends on how many there are.
    positionwise: ClassVar[bool] = False
    level: float
    seed: int
    draw: int

    def apply(self, base: Tensor, source: Tensor | None) -> Tensor:
        # A power of two at least: the draws of one seed share an array.
        upto = 1 << self.draw.bit_length()
        noise = _standard_normal(self.seed, upto, *base.shape[-2:])[self.draw]
        # Scaled and added in float64, then rounded once: as numpy's draw meets the model's
        # numbers in the authors' code.
        scaled = self.level * torch.from_numpy(noise).to(base.device)
        return (base.double() + scaled).to(base.dtype)


@functools.lru_cache(maxsize=16)
def _standard_normal(seed: int, draws: int, n_positions: int, width: int) -> np.ndarray:
    noise: np.ndarray = np.random.RandomState(seed).randn(draws, n_positions, width)
    return noise


@final
@dataclass(frozen=True)
class Scale(Intervention):
    """b ← factor · b. Attention heads and neurons turned up, down or round."""

    name: ClassVar[str] = "scale"
    needs_source: ClassVar[bool] = False
    factor: float

    def __post_init__(self) -> None:
        if not math.isfinite(self.factor):
            raise EngineError(f"scale: the factor is {self.factor}")

    def apply(self, base: Tensor, source: Tensor | None) -> Tensor:
        return self.factor * base


@final
@dataclass(frozen=True)
class Clamp(Intervention):
    """b ← min(max(b, low), high): b ← low where low = high. A bound may be infinite.

    For neurons; for the latents of an autoencoder within `EditLatents` (the steering by clamped
    features of Templeton et al. 2024).
    """

    name: ClassVar[str] = "clamp"
    needs_source: ClassVar[bool] = False
    low: float
    high: float

    def __post_init__(self) -> None:
        if not self.low <= self.high:
            raise EngineError(f"clamp: low is {self.low}, which is not at most high, {self.high}")

    def apply(self, base: Tensor, source: Tensor | None) -> Tensor:
        return base.clamp(self.low, self.high)
