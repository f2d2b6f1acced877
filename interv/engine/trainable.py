"""Interventions with parameters: swaps in a learned basis, under a mask, in a latent space.

The parameters are in small modules (`Rotation`, a `Gate`, a `Dictionary`, an `Adapter`) which
the interventions hold, so that two interventions are linked by giving both the same module.
What is computed is differentiable in base, source and parameters. Products are taken in the
parameters' numbers (float32) and the result is in the base's. Swaps are written as b plus a
change, which is the usual formula wherever R is orthogonal: they leave b as it is to the last
bit where s = b, and what is not chosen as near to b as the basis is orthonormal.

An intervention is hashed by identity: an executor that keeps states must `forget` them after
the parameters, or a temperature, were changed.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch import Tensor, nn

from interv.engine import interventions as plain
from interv.engine.interventions import FromSource, Intervention, expect_width
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
        start = matrix.detach().to(torch.promote_types(matrix.dtype, torch.float32), copy=True)
        self.free = nn.Parameter(start)
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
        value = torch.as_tensor(temperature).detach().reshape(-1)
        if len(value) != 1 or not 0 < float(value) < math.inf:
            raise EngineError(f"a temperature is a finite number above 0, not {temperature}")
        self.temperature = value[0].to(self.temperature, copy=True)

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
    """m = σ(mask / T), the mask `[width]` a parameter that starts at `start`, 0 as in pyvene."""

    def __init__(
        self, width: int, *, start: float | Tensor = 0.0, temperature: float | Tensor = 0.01
    ) -> None:
        super().__init__(width, temperature)
        values = torch.as_tensor(start, dtype=torch.float32).detach()
        if values.shape not in ((), (width,)):
            raise EngineError(f"a mask of {tuple(values.shape)} where the width is {width}")
        self.mask = nn.Parameter(values.expand(width).clone())

    def forward(self) -> Tensor:
        return torch.sigmoid(self.mask / self.temperature)


def _change(base: Tensor, change: Tensor) -> Tensor:
    """base + change in the wider numbers of the two, then as the base."""
    return (base.to(torch.promote_types(base.dtype, change.dtype)) + change).to(base.dtype)


def _difference(base: Tensor, source: Tensor, like: Tensor) -> Tensor:
    """s − b in the parameters' numbers; rounded to them after the subtraction, if wider."""
    wide = torch.promote_types(base.dtype, like.dtype)
    return (source.to(wide) - base.to(wide)).to(like.dtype)


def _turned(base: Tensor, source: Tensor, basis: Tensor, gate: Tensor | None = None) -> Tensor:
    """b + ((s − b) basis · gate) basisᵀ."""
    basis = basis.to(base.device)
    inside = _difference(base, source, basis) @ basis
    if gate is not None:
        inside = inside * gate.to(inside)
    return _change(base, inside @ basis.T)


def _chosen(name: str, what: str, indices: tuple[int, ...] | None, n: int) -> None:
    """Raise EngineError unless `indices` are some of n, each once."""
    if indices is None:
        return
    if not indices or len(set(indices)) != len(indices):
        raise EngineError(f"{name}: {what} {indices} are none, or some of them twice")
    wrong = [i for i in indices if not 0 <= i < n]
    if wrong:
        raise EngineError(f"{name}: {what} {wrong[0]} is not among the {n}, from 0 to {n - 1}")


@final
@dataclass(frozen=True, eq=False)
class RotatedSpace(FromSource):
    """(swap(bR, sR)) Rᵀ on the coordinates `dims`, R square: distributed interchange, or DAS.

    Geiger et al. 2023, arXiv 2303.02536; pyvene. Without `dims` all are swapped, which is b ← s.
    """

    name: ClassVar[str] = "rotated_space"
    rotation: Rotation
    dims: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        width, rank = self.rotation.shape
        if width != rank:
            raise EngineError(f"{self.name}: the rotation is {width} by {rank}, not square")
        _chosen(self.name, "dims", self.dims, rank)

    def combine(self, base: Tensor, source: Tensor) -> Tensor:
        return _swapped(self.name, self.rotation, self.dims, base, source)


@final
@dataclass(frozen=True, eq=False)
class LowRankRotatedSpace(FromSource):
    """b + (sW − bW) Wᵀ, W `[width, rank]` with orthonormal columns, or its columns `dims`.

    pyvene; Geiger et al. 2023.
    """

    name: ClassVar[str] = "low_rank_rotated_space"
    rotation: Rotation
    dims: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        _chosen(self.name, "dims", self.dims, self.rotation.shape[1])

    def combine(self, base: Tensor, source: Tensor) -> Tensor:
        return _swapped(self.name, self.rotation, self.dims, base, source)


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
        expect_width(self.name, "rotation", self.rotation.shape[0], base)
        return _turned(base, source, self.rotation(), self.boundary())


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
        expect_width(self.name, "rotation", self.rotation.shape[0], base)
        return _turned(base, source, self.rotation(), self.mask())


def _swapped(
    name: str, rotation: Rotation, dims: tuple[int, ...] | None, base: Tensor, source: Tensor
) -> Tensor:
    expect_width(name, "rotation", rotation.shape[0], base)
    basis = rotation()
    return _turned(base, source, basis if dims is None else basis[:, list(dims)])


def _expect_gate(name: str, rotation: Rotation, gate: Gate) -> None:
    if rotation.shape[1] != gate.width:
        raise EngineError(f"{name}: {gate.width} gates for a rotation of rank {rotation.shape[1]}")


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
        return _change(base, gate * _difference(base, source, gate))


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
        _chosen(self.name, "dims", self.dims, n)

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
        expect_width(self.name, "basis", self.components.shape[1], base)
        rows = self.components if self.dims is None else self.components[list(self.dims)]
        rows = rows.to(base.device)
        scale = self.scale.to(rows)
        inside = (_difference(base, source, rows) / scale) @ rows.T
        return _change(base, (inside @ rows) * scale)


class Dictionary(nn.Module, ABC):
    """An autoencoder of one layer each way: latents `[..., n_latents]`, their decoder's rows.

    Args:
        encoder: `[width, n_latents]`.
        encoder_bias: `[n_latents]`.
        decoder: `[n_latents, width]`.
        decoder_bias: `[width]`.

    Raises:
        EngineError: their shapes do not fit together.
    """

    def __init__(
        self, encoder: Tensor, encoder_bias: Tensor, decoder: Tensor, decoder_bias: Tensor
    ) -> None:
        super().__init__()
        self.encoder = _parameter(encoder)
        self.encoder_bias = _parameter(encoder_bias)
        self.decoder = _parameter(decoder)
        self.decoder_bias = _parameter(decoder_bias)
        width, n_latents = encoder.shape
        wanted = {"encoder_bias": (n_latents,), "decoder": (n_latents, width)}
        wanted["decoder_bias"] = (width,)
        for key, parameter in self.named_parameters():
            if key in wanted and parameter.shape != wanted[key]:
                raise EngineError(
                    f"an autoencoder's {key} has the shape {tuple(parameter.shape)}, "
                    f"expected {wanted[key]}"
                )

    @property
    def shape(self) -> tuple[int, int]:
        """The width and the number of latents."""
        return self.encoder.shape[0], self.encoder.shape[1]

    @abstractmethod
    def encode(self, activations: Tensor) -> Tensor:
        """Latents `[..., n_latents]` of activations `[..., width]`, in the parameters' numbers."""

    def decode(self, latents: Tensor) -> Tensor:
        """Activations `[..., width]` of latents `[..., n_latents]`."""
        return latents @ self.decoder + self.decoder_bias


def _parameter(value: Tensor) -> nn.Parameter:
    wide = torch.promote_types(value.dtype, torch.float32)
    return nn.Parameter(value.detach().to(wide, copy=True))


@final
class ReluDictionary(Dictionary):
    """z = relu((x − decoder_bias) encoder + encoder_bias), as in pyvene's AutoencoderLayer."""

    @classmethod
    def seeded(cls, width: int, n_latents: int, seed: int) -> ReluDictionary:
        """One to be trained: the decoder's rows of length 1, the encoder its transpose."""
        generator = torch.Generator().manual_seed(seed)
        decoder = nn.functional.normalize(torch.randn(n_latents, width, generator=generator))
        return cls(decoder.T, torch.zeros(n_latents), decoder, torch.zeros(width))

    def encode(self, activations: Tensor) -> Tensor:
        return torch.relu((activations - self.decoder_bias) @ self.encoder + self.encoder_bias)


@final
class JumpReluDictionary(Dictionary):
    """z = p where p > threshold and p > 0, else 0; p = x encoder + encoder_bias.

    Rajamanoharan et al. 2024 (arXiv 2407.14435). The threshold `[n_latents]` is a buffer: a step
    has no gradient.
    """

    threshold: Tensor

    def __init__(
        self,
        encoder: Tensor,
        encoder_bias: Tensor,
        decoder: Tensor,
        decoder_bias: Tensor,
        threshold: Tensor,
    ) -> None:
        super().__init__(encoder, encoder_bias, decoder, decoder_bias)
        if threshold.shape != encoder_bias.shape:
            raise EngineError(
                f"an autoencoder's threshold has the shape {tuple(threshold.shape)}, expected "
                f"{tuple(encoder_bias.shape)}"
            )
        self.register_buffer("threshold", threshold.detach().to(self.encoder.dtype, copy=True))

    def encode(self, activations: Tensor) -> Tensor:
        before = activations @ self.encoder + self.encoder_bias
        return torch.relu(before) * (before > self.threshold)


@final
@dataclass(frozen=True, eq=False)
class Autoencoder(FromSource):
    """decode(swap(encode(b), encode(s))) on some `latents`, or all.

    Attributes:
        dictionary: the autoencoder.
        latents: those that are swapped, all without.
        error_term: add b − decode(encode(b)), so that only the swap changes anything. Without
            it, as in pyvene, the site gets the reconstruction: a swap with s = b changes it.
    """

    name: ClassVar[str] = "autoencoder"
    dictionary: ReluDictionary
    latents: tuple[int, ...] | None = None
    error_term: bool = True

    def __post_init__(self) -> None:
        _chosen(self.name, "latents", self.latents, self.dictionary.shape[1])

    def combine(self, base: Tensor, source: Tensor) -> Tensor:
        swap = plain.Vanilla()
        return _in_latents(
            self.name, self.dictionary, swap, base, source, self.latents, self.error_term
        )


@final
@dataclass(frozen=True, eq=False)
class JumpReLUAutoencoder(FromSource):
    """`Autoencoder`, of a JumpReLU dictionary (pyvene; Gemma Scope, Lieberum et al. 2024)."""

    name: ClassVar[str] = "jump_relu_autoencoder"
    dictionary: JumpReluDictionary
    latents: tuple[int, ...] | None = None
    error_term: bool = True

    def __post_init__(self) -> None:
        _chosen(self.name, "latents", self.latents, self.dictionary.shape[1])

    def combine(self, base: Tensor, source: Tensor) -> Tensor:
        swap = plain.Vanilla()
        return _in_latents(
            self.name, self.dictionary, swap, base, source, self.latents, self.error_term
        )


@final
@dataclass(frozen=True, eq=False)
class EditLatents(Intervention):
    """decode(z with edit(z) at `latents`), z = encode(b): latents clamped, scaled, put to zero.

    The error term is as for `Autoencoder`.

    Raises:
        EngineError: the edit needs a source, or reads the module's input.
    """

    name: ClassVar[str] = "edit_latents"
    needs_source: ClassVar[bool] = False
    # As its edit is, which may be any.
    positionwise: ClassVar[bool] = False
    dictionary: Dictionary
    edit: Intervention
    latents: tuple[int, ...] | None = None
    error_term: bool = True

    def __post_init__(self) -> None:
        if self.edit.needs_source or self.edit.reads_input:
            raise EngineError(f"{self.name}: {self.edit.name} needs more than the latents")
        _chosen(self.name, "latents", self.latents, self.dictionary.shape[1])

    def apply(self, base: Tensor, source: Tensor | None) -> Tensor:
        return _in_latents(
            self.name, self.dictionary, self.edit, base, None, self.latents, self.error_term
        )


def _in_latents(
    name: str,
    dictionary: Dictionary,
    edit: Intervention,
    base: Tensor,
    source: Tensor | None,
    latents: tuple[int, ...] | None,
    error_term: bool,
) -> Tensor:
    """`edit` made in the latents, and what becomes of the base."""
    expect_width(name, "autoencoder", dictionary.shape[0], base)
    like = dictionary.encoder
    before = dictionary.encode(base.to(like))
    other = None if source is None else dictionary.encode(source.to(like))
    at = list(range(dictionary.shape[1]) if latents is None else latents)
    after = before.clone()
    after[..., at] = edit.apply(before[..., at], None if other is None else other[..., at])
    decoded = dictionary.decode(after)
    if error_term:
        change = decoded - dictionary.decode(before)
        return _change(base, change.to(base.device))
    return decoded.to(base)


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
        self.down = _parameter(down)
        self.up = _parameter(up)
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
        change: Tensor = self.adapter(base.to(down))
        return _change(base, change.to(base.device))


BY_NAME: Mapping[str, type[Intervention]] = {
    kind.name: kind
    for kind in (
        plain.Vanilla,
        plain.Addition,
        plain.Subtraction,
        plain.Zero,
        plain.Collect,
        plain.Skip,
        plain.Noise,
        plain.Scale,
        plain.Clamp,
        plain.Lambda,
        plain.BaseLambda,
        plain.Mean,
        plain.Replace,
        plain.Constant,
        plain.ProjectOut,
        RotatedSpace,
        LowRankRotatedSpace,
        BoundlessRotatedSpace,
        SigmoidMask,
        SigmoidMaskRotatedSpace,
        PCARotatedSpace,
        Autoencoder,
        JumpReLUAutoencoder,
        EditLatents,
        Lora,
    )
}
"""Every intervention, of this module and of `interventions`, by its name."""
