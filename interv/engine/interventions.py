"""What is done at a site: small, final, frozen classes.

Each maps the base's activations at a site, and for some the source's, to what stands there
instead. b = base, s = source, both `[n_positions, width]` in the model's numbers. The names
are pyvene's (Wu et al. 2024, arXiv 2403.07809).
"""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, final

import numpy as np
import torch
from torch import Tensor


class Intervention(ABC):
    """A function of base and source, of the same shape as the base."""

    needs_source: ClassVar[bool]

    @abstractmethod
    def apply(self, base: Tensor, source: Tensor | None) -> Tensor:
        """New activations `[n_positions, width]`; never writes into its arguments."""


class _FromSource(Intervention):
    needs_source: ClassVar[bool] = True

    def apply(self, base: Tensor, source: Tensor | None) -> Tensor:
        assert source is not None
        return self.combine(base, source)

    @abstractmethod
    def combine(self, base: Tensor, source: Tensor) -> Tensor:
        """`apply`, with the source there."""


@final
@dataclass(frozen=True)
class Vanilla(_FromSource):
    """b ← s: activation patching, interchange (Geiger et al. 2021), restoration."""

    def combine(self, base: Tensor, source: Tensor) -> Tensor:
        return source


@final
@dataclass(frozen=True)
class Addition(_FromSource):
    """b ← b + s."""

    def combine(self, base: Tensor, source: Tensor) -> Tensor:
        return base + source


@final
@dataclass(frozen=True)
class Subtraction(_FromSource):
    """b ← b − s."""

    def combine(self, base: Tensor, source: Tensor) -> Tensor:
        return base - source


@final
@dataclass(frozen=True)
class Zero(Intervention):
    """b ← 0."""

    needs_source: ClassVar[bool] = False

    def apply(self, base: Tensor, source: Tensor | None) -> Tensor:
        return torch.zeros_like(base)


@final
@dataclass(frozen=True)
class Collect(Intervention):
    """b ← b: nothing is written; the site is there to be read."""

    needs_source: ClassVar[bool] = False

    def apply(self, base: Tensor, source: Tensor | None) -> Tensor:
        return base


@final
@dataclass(frozen=True)
class Noise(Intervention):
    """b ← b + level · ε, ε the `draw`-th of the standard normal draws of `seed`.

    ε comes from `numpy.random.RandomState(seed).randn(draws, n_positions, width)`, which gives
    the same first draws however many are asked for: the numbers of the authors' code
    (`trace_with_patch` in experiments/causal_trace.py of Meng et al. 2022) for seed 1.
    """

    needs_source: ClassVar[bool] = False
    level: float
    seed: int
    draw: int

    def apply(self, base: Tensor, source: Tensor | None) -> Tensor:
        # A power of two at least: the draws of one seed share an array.
        upto = 1 << self.draw.bit_length()
        noise = _standard_normal(self.seed, upto, *base.shape)[self.draw]
        # Scaled and added in float64, then rounded once: as numpy's draw meets the model's
        # numbers in the authors' code.
        scaled = self.level * torch.from_numpy(noise).to(base.device)
        return (base.double() + scaled).to(base.dtype)


@functools.lru_cache(maxsize=16)
def _standard_normal(seed: int, draws: int, n_positions: int, width: int) -> np.ndarray:
    noise: np.ndarray = np.random.RandomState(seed).randn(draws, n_positions, width)
    return noise
