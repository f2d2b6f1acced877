"""Interventions by a low-rank adapter."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch import Tensor, nn

from interv.engine.interventions import Intervention, changed, expect_width, parameter
from interv.errors import EngineError


@final
class Adapter(nn.Module):
    """A low-rank map: x ↦ alpha / rank · (x down) up.

    Args:
        down: `[width, rank]`.
        up: `[rank, width]`.
        alpha: its strength.

    Raises:
        EngineError: their shapes do not fit together.
    """

    def __init__(self, down: Tensor, up: Tensor, alpha: float) -> None:
        super().__init__()
        if down.dim() != 2 or up.shape != down.T.shape:
            raise EngineError(
                f"an adapter's down has the shape {tuple(down.shape)}, its up {tuple(up.shape)}; "
                f"expected (width, rank) and (rank, width)"
            )
        self.down = parameter(down)
        self.up = parameter(up)
        self.alpha = alpha

    @classmethod
    def seeded(cls, width: int, rank: int, alpha: float, seed: int) -> Adapter:
        """One to be trained, which does nothing yet: `down` within ± 1/√width, `up` 0."""
        generator = torch.Generator().manual_seed(seed)
        down = (2 * torch.rand(width, rank, generator=generator) - 1) / math.sqrt(width)
        return cls(down, torch.zeros(rank, width), alpha)

    def forward(self, activations: Tensor) -> Tensor:
        return self.alpha / self.down.shape[1] * (activations @ self.down) @ self.up


@final
@dataclass(frozen=True, eq=False)
class Lora(Intervention):
    """b ← b + alpha / rank · (b A) B: a low-rank adapter on a representation.

    After LoRA (Hu et al. 2021, arXiv 2106.09685), which adapts a weight: this is it for the map
    that is the identity. pyvene 0.1.8 names none.
    """

    name: ClassVar[str] = "lora"
    needs_source: ClassVar[bool] = False
    adapter: Adapter

    def apply(self, base: Tensor, source: Tensor | None) -> Tensor:
        down = self.adapter.down
        expect_width(self.name, "adapter", down.shape[0], base)
        return changed(base, self.adapter(base.to(down)))
