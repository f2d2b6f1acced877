"""Interventions by saved activations and directions, rather than those of another run."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, final

import torch
from torch import Tensor

from interv.engine.interventions import Intervention, expect_width, fitting
from interv.errors import EngineError


@dataclass(frozen=True, eq=False)
class _Value(Intervention):
    """b ← `value`."""

    needs_source: ClassVar[bool] = False
    positionwise: ClassVar[bool] = False
    value: Tensor

    def __post_init__(self) -> None:
        object.__setattr__(self, "value", _kept(self.name, self.value))

    def apply(self, base: Tensor, source: Tensor | None) -> Tensor:
        return _everywhere(self.name, self.value, base)


@final
class Replace(_Value):
    """b ← `value`, `[width]` or `[n_positions, width]`: a saved activation (pyvene's vanilla
    with a `source_representation`)."""

    name: ClassVar[str] = "replace"


@final
class Mean(_Value):
    """b ← the mean activation, `value`, `[width]` or `[n_positions, width]`: mean ablation."""

    name: ClassVar[str] = "mean"

    @classmethod
    def of(cls, activations: Tensor) -> Mean:
        """The mean over the first dimension of `[n, width]` or `[n, n_positions, width]`.

        Raises:
            EngineError: there are none, or of another number of dimensions.
        """
        if activations.dim() not in (2, 3) or len(activations) == 0:
            raise EngineError(f"mean: no mean of the shape {tuple(activations.shape)}")
        return cls(activations.double().mean(0).to(activations.dtype))


@final
@dataclass(frozen=True, eq=False)
class Constant(Intervention):
    """`edit` with s = `value`, `[width]` or `[n_positions, width]`, in place of a run.

    With addition it is activation addition, or steering (Turner et al. 2023, arXiv 2308.10248);
    pyvene's `source_representation`.
    """

    name: ClassVar[str] = "constant"
    needs_source: ClassVar[bool] = False
    positionwise: ClassVar[bool] = False
    edit: Intervention
    value: Tensor

    def __post_init__(self) -> None:
        if not self.edit.needs_source:
            raise EngineError(f"constant: {self.edit.name} takes no source")
        object.__setattr__(self, "value", _kept(self.name, self.value))

    def apply(self, base: Tensor, source: Tensor | None) -> Tensor:
        return self.edit.apply(base, _everywhere(self.name, self.value, base))


@final
@dataclass(frozen=True, eq=False)
class ProjectOut(Intervention):
    """b ← b − (b V) Vᵀ, V an orthonormal basis of the span of `directions`.

    For one direction v: b − (b · v̂) v̂, directional ablation (Arditi et al. 2024,
    arXiv 2406.11717).

    Attributes:
        directions: `[width]` or `[n, width]`, of any length, but not zero.
        basis: V, `[width, rank]`, in float64.
    """

    name: ClassVar[str] = "project_out"
    needs_source: ClassVar[bool] = False
    directions: Tensor
    basis: Tensor = field(init=False, repr=False)

    def __post_init__(self) -> None:
        kept = _kept(self.name, self.directions)
        rows = kept.double().reshape(-1, kept.shape[-1])
        lengths = torch.linalg.vector_norm(rows, dim=-1, keepdim=True)
        if len(rows) == 0 or bool((lengths == 0).any()):
            raise EngineError("project_out: a direction is zero, or there is none")
        # Their span only: directions may depend on each other, to what their own numbers tell.
        _, sizes, basis = torch.linalg.svd(rows / lengths, full_matrices=False)
        smallest = max(rows.shape) * torch.finfo(kept.dtype).eps * sizes[0]
        object.__setattr__(self, "directions", kept)
        object.__setattr__(self, "basis", basis[sizes > smallest].T)

    def apply(self, base: Tensor, source: Tensor | None) -> Tensor:
        expect_width(self.name, "direction", len(self.basis), base)
        wide = base.to(torch.promote_types(base.dtype, torch.float32))
        basis = self.basis.to(wide)
        return (wide - (wide @ basis) @ basis.T).to(base.dtype)


def _kept(name: str, value: Tensor) -> Tensor:
    """A copy, which nobody else writes into."""
    if value.dim() not in (1, 2) or not value.is_floating_point():
        raise EngineError(
            f"{name}: numbers of the shape (width,) or (n, width) are wanted, not {value.dtype} "
            f"of the shape {tuple(value.shape)}"
        )
    if not bool(torch.isfinite(value).all()):
        raise EngineError(f"{name}: some of the numbers are not finite")
    return value.clone()


def _everywhere(name: str, value: Tensor, base: Tensor) -> Tensor:
    """A value `[width]` or `[n_positions, width]` in the base's shape and numbers."""
    expect_width(name, "value", value.shape[-1], base)
    if value.dim() == 1:
        return value.to(base).expand(base.shape)
    return fitting(name, "value", base, value.to(base))
