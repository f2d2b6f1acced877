"""A copy of a model in float64, for what rounding alone cannot decide."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from interv.engine.memory import is_out_of_memory, release
from interv.errors import EngineError

_SHARE = 2  # of the memory that is free, what a copy may take
_KNOWS = ("eager", "sdpa")  # attention implementations that have float64


def in_float64(model: nn.Module, free_bytes: int) -> nn.Module:
    """Return a copy of a model whose parameters and buffers are in float64.

    Args:
        model: the model; left as it is.
        free_bytes: how much memory is free where it is.

    Raises:
        EngineError: there is no such copy; says why.
    """
    tensors = {id(t): t for t in (*model.parameters(), *model.buffers())}
    if getattr(model, "is_quantized", False):
        raise EngineError("the model is quantised")
    if len({t.device for t in tensors.values()}) > 1 or any(t.is_meta for t in tensors.values()):
        raise EngineError("the model is spread over devices")
    if any(t.device.type == "mps" for t in tensors.values()):
        raise EngineError("mps has no float64")
    needed = sum(8 * t.numel() for t in tensors.values())
    if needed * _SHARE > free_bytes:
        raise EngineError(
            f"a copy takes {needed / 2**30:,.1f} GiB, and {free_bytes / 2**30:,.1f} GiB are free"
        )
    try:
        # Tensors are converted one by one, and those that modules share stay shared.
        memo: dict[int, Any] = {key: _converted(tensor) for key, tensor in tensors.items()}
        copied = copy.deepcopy(model, memo)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        release()
        raise EngineError("a copy does not fit in memory") from None
    for module in copied.modules():
        config: Any = getattr(module, "config", None)
        # Fused kernels of attention and of experts have no float64.
        if getattr(config, "_attn_implementation_internal", None) not in (None, *_KNOWS):
            config._attn_implementation_internal = "sdpa"
        if getattr(config, "_experts_implementation_internal", None) is not None:
            config._experts_implementation_internal = "eager"
    return copied


def _converted(tensor: torch.Tensor) -> torch.Tensor:
    kept = tensor.detach()
    wide = kept.double() if kept.is_floating_point() else kept.clone()
    if isinstance(tensor, nn.Parameter):
        return nn.Parameter(wide, requires_grad=False)
    return wide
