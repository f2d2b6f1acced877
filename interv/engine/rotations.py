"""Swaps in a basis: one that is learned, or principal components.

Where R is orthogonal, b + (s − b) R Rᵀ is the usual (swap(bR, sR)) Rᵀ; what is not chosen is left
as it is, as near as the basis is orthonormal.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch import Tensor, nn

from interv.engine.interventions import (
    FromSource,
    changed,
    difference,
    expect_among,
    expect_width,
    parameter,
)
from interv.errors import EngineError


@final
class Rotation(nn.Module):
    """R, `[width, rank]`, whose columns are orthonormal whatever an optimiser does.

    R is the Q of the QR decomposition of the free parameter, with a positive diagonal of the
    triangle. So it is orthonormal to the last bits at each step, the free parameter is a plain
    matrix to save, and where that is orthonormal R is it, and their gradients agree in all
    directions in which the columns stay orthonormal.

    Args:
        matrix: what R is at first, `[width, rank]`.

    Raises:
        EngineError: the matrix is wider than tall, or its columns are not orthonormal.
    """

    def __init__(self, matrix: Tensor) -> None:
        super().__init__()
        if matrix.dim() != 2 or not 0 < matrix.shape[1] <= matrix.shape[0]:
            raise EngineError(
                f"a rotation has the shape (width, rank), rank at most the width, not "
                f"{tuple(matrix.shape)}"
            )
        _expect_orthonormal("the rotation's columns", matrix)
        self.free = parameter(matrix)
        self._known: tuple[Tensor, Tensor] | None = None

    @classmethod
    def seeded(cls, width: int, rank: int, seed: int) -> Rotation:
        """A random one, uniform over all; torch's own generator is left alone."""
        if not 0 < rank <= width:
            raise EngineError(f"a rotation of rank {rank} does not fit a width of {width}")
        generator = torch.Generator().manual_seed(seed)
        return cls(_orthonormal(torch.randn(width, rank, generator=generator)))

    @property
    def shape(self) -> tuple[int, int]:
        """The width and the rank."""
        return self.free.shape[0], self.free.shape[1]

    def forward(self) -> Tensor:
        """R, `[width, rank]`."""
        if torch.is_grad_enabled():
            return _orthonormal(self.free)
        # An executor asks for each row. Versions of a tensor do not tell of writes into `.data`.
        known = self._known
        if known is None or not _same(known[0], self.free):
            known = self._known = self.free.detach().clone(), _orthonormal(self.free.detach())
        return known[1]


def _same(one: Tensor, other: Tensor) -> bool:
    return one.dtype == other.dtype and one.device == other.device and torch.equal(one, other)


def _orthonormal(free: Tensor) -> Tensor:
    q, r = torch.linalg.qr(free)
    unique: Tensor = q * torch.where(r.diagonal() < 0, -1.0, 1.0).to(q)
    return unique


def _expect_orthonormal(what: str, columns: Tensor) -> None:
    wide = columns.detach().double()
    eye = torch.eye(wide.shape[1], dtype=wide.dtype, device=wide.device)
    off = float((wide.T @ wide - eye).abs().max())
    # Matrices that were saved in float16 pass. A NaN does not.
    if not off < 1e-3:
        raise EngineError(f"{what} are not orthonormal: their products are off by {off:.2g}")


def swapped(name: str, base: Tensor, source: Tensor, into: Tensor, back: Tensor) -> Tensor:
    """b + (s − b) into back, for `into` `[width, rank]` and `back` `[rank, width]`."""
    expect_width(name, "basis", len(into), base)
    into, back = into.to(base.device), back.to(base.device)
    return changed(base, difference(base, source, into) @ into @ back)


@dataclass(frozen=True, eq=False)
class _Turned(FromSource):
    """b + (sR − bR) Rᵀ, R the columns `dims` of the rotation, all without."""

    rotation: Rotation
    dims: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        expect_among(self.name, "dims", self.dims, self.rotation.shape[1])

    def combine(self, base: Tensor, source: Tensor) -> Tensor:
        basis = self.rotation()
        if self.dims is not None:
            basis = basis[:, list(self.dims)]
        return swapped(self.name, base, source, basis, basis.T)


@final
class RotatedSpace(_Turned):
    """(swap(bR, sR)) Rᵀ on the coordinates `dims`, R square: distributed interchange, or DAS.

    Geiger et al. 2023, arXiv 2303.02536; pyvene. Without `dims` all are swapped, which is b ← s.
    """

    name: ClassVar[str] = "rotated_space"

    def __post_init__(self) -> None:
        width, rank = self.rotation.shape
        if width != rank:
            raise EngineError(f"{self.name}: the rotation is {width} by {rank}, not square")
        super().__post_init__()


@final
class LowRankRotatedSpace(_Turned):
    """b + (sW − bW) Wᵀ, W `[width, rank]` with orthonormal columns, or its columns `dims`.

    pyvene; Geiger et al. 2023.
    """

    name: ClassVar[str] = "low_rank_rotated_space"


@final
@dataclass(frozen=True, eq=False)
class PCARotatedSpace(FromSource):
    """Swap of principal components: b + ((s − b) / scale · Cᵀ) C · scale, C the rows `dims`.

    The mean cancels. pyvene's drops what the components leave out; here that stays as it is.

    Attributes:
        components: `[n_components, width]`, orthonormal rows.
        mean, scale: `[width]`, of the activations they were fitted to; the scale is 1 unless
            those were standardised.
        dims: the components that are swapped, all without.
    """

    name: ClassVar[str] = "pca_rotated_space"
    components: Tensor
    mean: Tensor
    scale: Tensor
    dims: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        n, width = self.components.shape
        if self.mean.shape != (width,) or self.scale.shape != (width,):
            raise EngineError(
                f"{self.name}: the components are {width} wide, the mean has the shape "
                f"{tuple(self.mean.shape)}, the scale {tuple(self.scale.shape)}"
            )
        if not bool((self.scale > 0).all()):
            raise EngineError(f"{self.name}: the scale is not above 0 everywhere")
        _expect_orthonormal(f"{self.name}: the components", self.components.T)
        expect_among(self.name, "dims", self.dims, n)

    @classmethod
    def fit(
        cls,
        activations: Tensor,
        n_components: int | None = None,
        *,
        standardise: bool = False,
        dims: tuple[int, ...] | None = None,
    ) -> PCARotatedSpace:
        """The components of activations `[n, width]`, those of most variance first.

        Args:
            activations: at least two.
            n_components: how many; without, as many as there can be, min(n − 1, width).
            standardise: divide each column by its standard deviation first.
            dims: the components to swap.

        Raises:
            EngineError: there are too few activations.
        """
        if activations.dim() != 2 or len(activations) < 2:
            raise EngineError(f"{cls.name}: no components of the shape {tuple(activations.shape)}")
        wide = activations.detach().double()
        mean = wide.mean(0)
        scale = wide.std(0) if standardise else torch.ones_like(mean)
        scale = torch.where(scale > 0, scale, torch.ones_like(scale))
        most = min(len(wide) - 1, wide.shape[1])
        n = most if n_components is None else n_components
        if not 0 < n <= most:
            raise EngineError(
                f"{cls.name}: {n} components of {len(wide)} activations that are "
                f"{wide.shape[1]} wide; at most {most}"
            )
        _, _, rows = torch.linalg.svd((wide - mean) / scale, full_matrices=False)
        rows = rows[:n]
        # Which way a component points is anyone's guess: let its largest entry be positive.
        largest = rows.gather(1, rows.abs().argmax(1, keepdim=True))
        rows = rows * torch.where(largest < 0, -1.0, 1.0)
        return cls(rows.float(), mean.float(), scale.float(), dims)

    def combine(self, base: Tensor, source: Tensor) -> Tensor:
        rows = self.components if self.dims is None else self.components[list(self.dims)]
        scale = self.scale.to(rows)
        return swapped(self.name, base, source, (rows / scale).T, rows * scale)
