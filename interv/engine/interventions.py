"""What is done at a site: small, final, frozen classes. Those with parameters are in `trainable`.

Each maps the base's activations at a site, and for some the source's, to what stands there
instead. b = base, s = source, both `[..., n_positions, width]` in the model's numbers: any
leading dimensions are rows to which the same is done, and `width` is that of the columns the
site chooses (a component, some of its heads, or a subspace). The names are pyvene's (Wu et al.
2024, arXiv 2403.07809) where it has the type.

Those that hold tensors or modules are hashed by identity, the others by value.
"""

from __future__ import annotations

import functools
import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
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
        return self.combine(base, self._fitting(base, source))

    @abstractmethod
    def combine(self, base: Tensor, source: Tensor) -> Tensor:
        """`apply`, with the source there and of the base's shape."""

    def _fitting(self, base: Tensor, source: Tensor | None) -> Tensor:
        return fitting(self.name, "source", base, source)


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

    For neurons; for the latents of an autoencoder within `trainable.EditLatents` (the steering
    by clamped features of Templeton et al. 2024).
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


@final
@dataclass(frozen=True)
class Lambda(FromSource):
    """b ← f(b, s), f any function to the base's shape (pyvene).

    It gets copies, so that it may write into them. It is identified by the function itself.
    """

    name: ClassVar[str] = "lambda"
    positionwise: ClassVar[bool] = False
    function: Callable[[Tensor, Tensor], Tensor]

    def combine(self, base: Tensor, source: Tensor) -> Tensor:
        return _result(self.name, self.function(base.clone(), source.clone()), base)


@final
@dataclass(frozen=True)
class BaseLambda(Intervention):
    """b ← f(b): a `Lambda` that takes no source."""

    name: ClassVar[str] = "base_lambda"
    needs_source: ClassVar[bool] = False
    positionwise: ClassVar[bool] = False
    function: Callable[[Tensor], Tensor]

    def apply(self, base: Tensor, source: Tensor | None) -> Tensor:
        return _result(self.name, self.function(base.clone()), base)


def _result(name: str, result: object, base: Tensor) -> Tensor:
    if not isinstance(result, Tensor):
        raise EngineError(f"{name}: the function gave {type(result).__name__}, not a tensor")
    if result.shape != base.shape:
        raise EngineError(
            f"{name}: the function gave the shape {tuple(result.shape)}, the site has "
            f"{tuple(base.shape)}"
        )
    return result.to(base.dtype)


@final
@dataclass(frozen=True, eq=False)
class Mean(Intervention):
    """b ← the mean activation, `value`, `[width]` or `[n_positions, width]`: mean ablation."""

    name: ClassVar[str] = "mean"
    needs_source: ClassVar[bool] = False
    positionwise: ClassVar[bool] = False
    value: Tensor

    def __post_init__(self) -> None:
        object.__setattr__(self, "value", _kept(self.name, self.value))

    @classmethod
    def of(cls, activations: Tensor) -> Mean:
        """The mean over the first dimension of `[n, width]` or `[n, n_positions, width]`.

        Raises:
            EngineError: there are none, or of another number of dimensions.
        """
        if activations.dim() not in (2, 3) or len(activations) == 0:
            raise EngineError(f"mean: no mean of the shape {tuple(activations.shape)}")
        return cls(activations.double().mean(0).to(activations.dtype))

    def apply(self, base: Tensor, source: Tensor | None) -> Tensor:
        return _everywhere(self.name, self.value, base)


@final
@dataclass(frozen=True, eq=False)
class Replace(Intervention):
    """b ← `value`, `[width]` or `[n_positions, width]`: a saved activation (pyvene's vanilla
    with a `source_representation`)."""

    name: ClassVar[str] = "replace"
    needs_source: ClassVar[bool] = False
    positionwise: ClassVar[bool] = False
    value: Tensor

    def __post_init__(self) -> None:
        object.__setattr__(self, "value", _kept(self.name, self.value))

    def apply(self, base: Tensor, source: Tensor | None) -> Tensor:
        return _everywhere(self.name, self.value, base)


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
