"""Interventions by a function of the caller's own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, final

from torch import Tensor

from interv.engine.interventions import FromSource, Intervention
from interv.errors import EngineError


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
