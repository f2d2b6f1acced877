"""Swaps in part: how much of each coordinate is learned, and sharpened by a temperature."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch import Tensor, nn

from interv.engine.interventions import FromSource, changed, difference, expect_width
from interv.engine.rotations import Rotation, swapped
from interv.errors import EngineError


class Gate(nn.Module, ABC):
    """How much of each of `width` coordinates is swapped, m in (0, 1), sharper as T falls."""

    temperature: Tensor

    def __init__(self, width: int, temperature: float | Tensor) -> None:
        super().__init__()
        self.width = width
        self.register_buffer("temperature", torch.ones(()))
        self.set_temperature(temperature)

    def set_temperature(self, temperature: float | Tensor) -> None:
        """Set T, which is not trained.

        Raises:
            EngineError: it is not one finite number above 0.
        """
        value = torch.as_tensor(temperature).detach()
        if value.numel() != 1 or not 0 < float(value) < math.inf:
            raise EngineError(f"a temperature is a finite number above 0, not {temperature}")
        self.temperature = value.reshape(()).to(self.temperature, copy=True)

    @abstractmethod
    def forward(self) -> Tensor:
        """m, `[width]`."""


@final
class Boundary(Gate):
    """m_i = σ(i / T) · σ((β · width − i) / T), for i from 0; β a parameter.

    β is held to [0.001, 1], as in pyvene: beyond that its gradient is 0, so let a penalty on
    `boundary` itself keep it there. As in pyvene and the paper m_0 is at most a half.
    """

    def __init__(
        self, width: int, *, boundary: float = 0.5, temperature: float | Tensor = 50.0
    ) -> None:
        super().__init__(width, temperature)
        self.boundary = nn.Parameter(torch.tensor(float(boundary)))

    def forward(self) -> Tensor:
        at = torch.arange(self.width, dtype=self.boundary.dtype, device=self.boundary.device)
        end = self.boundary.clamp(1e-3, 1) * self.width
        return torch.sigmoid(at / self.temperature) * torch.sigmoid((end - at) / self.temperature)


@final
class Mask(Gate):
    """m = σ(mask / T), the mask a parameter that starts at `start`, 0 as in pyvene.

    `each` columns share a gate (those of a head): the mask is `[width / each]`.
    """

    def __init__(
        self,
        width: int,
        *,
        start: float | Tensor = 0.0,
        temperature: float | Tensor = 0.01,
        each: int = 1,
    ) -> None:
        super().__init__(width, temperature)
        values = torch.as_tensor(start, dtype=torch.float32).detach()
        if width % each:
            raise EngineError(f"a gate for each {each} columns where the width is {width}")
        n = width // each
        if values.shape not in ((), (n,)):
            raise EngineError(f"a mask of {tuple(values.shape)} where the width is {n}")
        self.each = each
        self.mask = nn.Parameter(values.expand(n).clone())

    def forward(self) -> Tensor:
        gates = torch.sigmoid(self.mask / self.temperature)
        return gates if self.each == 1 else gates.repeat_interleave(self.each)


@final
@dataclass(frozen=True, eq=False)
class BoundlessRotatedSpace(FromSource):
    """((1 − m) bR + m sR) Rᵀ, m a `Boundary`: the first β · width coordinates, softly.

    Boundless DAS (Wu et al. 2023, arXiv 2305.08809); pyvene.
    """

    name: ClassVar[str] = "boundless_rotated_space"
    rotation: Rotation
    boundary: Boundary

    def __post_init__(self) -> None:
        _expect_gate(self.name, self.rotation, self.boundary)

    def combine(self, base: Tensor, source: Tensor) -> Tensor:
        return _partly(self.name, base, source, self.rotation, self.boundary)


@final
@dataclass(frozen=True, eq=False)
class SigmoidMaskRotatedSpace(FromSource):
    """((1 − m) bR + m sR) Rᵀ, m a `Mask` of the coordinates (pyvene, whose mask starts at 100
    with T = 50). As long as m is the same everywhere, R makes no difference and has no gradient.
    """

    name: ClassVar[str] = "sigmoid_mask_rotated_space"
    rotation: Rotation
    mask: Mask

    def __post_init__(self) -> None:
        _expect_gate(self.name, self.rotation, self.mask)

    def combine(self, base: Tensor, source: Tensor) -> Tensor:
        return _partly(self.name, base, source, self.rotation, self.mask)


def _expect_gate(name: str, rotation: Rotation, gate: Gate) -> None:
    if rotation.shape[1] != gate.width:
        raise EngineError(f"{name}: {gate.width} gates for a rotation of rank {rotation.shape[1]}")


def _partly(name: str, base: Tensor, source: Tensor, rotation: Rotation, gate: Gate) -> Tensor:
    basis = rotation()
    return swapped(name, base, source, basis * gate().to(basis), basis.T)


@final
@dataclass(frozen=True, eq=False)
class SigmoidMask(FromSource):
    """(1 − m) b + m s, m a `Mask`: which neurons matter (pyvene; De Cao et al. 2022,
    differentiable binary masks)."""

    name: ClassVar[str] = "sigmoid_mask"
    mask: Mask

    def combine(self, base: Tensor, source: Tensor) -> Tensor:
        expect_width(self.name, "mask", self.mask.width, base)
        gate = self.mask().to(base.device)
        return changed(base, gate * difference(base, source, gate))
