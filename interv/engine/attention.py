"""Attention patterns, through transformers' attention functions.

The weights that a model returns are not always those that it uses, so a pattern is changed
where it is used: within `routing` the model calls a function of ours, which has the model's own
attention compute the weights (soft caps, sinks and all), changes them, and multiplies the
values. Calls are counted: families that never call the function are refused.
"""

from __future__ import annotations

import contextlib
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from interv.engine.hooks import find_module
from interv.errors import EngineError
from interv.models.anatomy import Anatomy

_NAME = "interv"
_AGREEMENT = {torch.float64: 1e-6, torch.float32: 1e-4}
_WIDE = (torch.float32, torch.float64)
_SDPA_OPTIONS = {"scaling", "dropout", "is_causal", "sliding_window", "position_ids", "use_cache"}
"""What may be said to `sdpa` that its formula needs no more than; the model runs in eval mode."""
_LOOSE = 5e-2  # of the largest output, in 16 bits


class Call:
    """One layer's call of its attention function.

    Attributes:
        layer: the block that calls.
        query, key, value: `[row, head, pos, head_width]`, keys and values by key head.
        mask: as the model made it, or None.
    """

    def __init__(
        self,
        layer: int,
        module: nn.Module,
        implementation: str,
        tensors: tuple[Tensor, Tensor, Tensor],
        mask: Tensor | None,
        options: dict[str, Any],
    ) -> None:
        self.layer = layer
        self.query, self.key, self.value = tensors
        self.mask = mask
        self._module = module
        self._implementation = implementation
        self._options = options

    def plain(self) -> Tensor:
        """The model's own attention `[row, pos, head, head_width]`."""
        return self._own(self.query, self.key, self.value, self.mask)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
        """The model's attention of other tensors, with a mask that is added to the scores."""
        known = self._options.keys() <= _SDPA_OPTIONS
        if self._implementation == "sdpa" and known and query.dtype in _WIDE:
            return _written_out(query, key, value, mask, self._options.get("scaling"))
        return self._own(query, key, value, mask)

    def _own(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        function = _eager(self._module)
        if self._implementation != "eager":
            function = ALL_ATTENTION_FUNCTIONS[self._implementation]
        out: Tensor = function(self._module, query, key, value, mask, **self._options)[0]
        return out

    def weights(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None
    ) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        """The pattern `[row, head, query, key]`, and what attention gives for another one.

        Attention of one-hot values is the pattern itself, as this model computes it.

        Raises:
            EngineError: this family's attention is more than weights times values.
        """
        one_hot = torch.eye(key.shape[2], dtype=value.dtype, device=value.device)
        pattern = self._own(query, key, one_hot.expand(*value.shape[:2], -1, -1), mask)
        values = value.repeat_interleave(query.shape[1] // value.shape[1], dim=1)

        def attend(pattern: Tensor) -> Tensor:
            return torch.matmul(pattern, values).transpose(1, 2)

        pattern = pattern.transpose(1, 2)
        out = self._own(query, key, value, mask)
        apart = float((attend(pattern) - out).abs().max())
        allowed = _AGREEMENT.get(out.dtype, _LOOSE) * float(out.abs().max())
        if not apart <= allowed:
            raise EngineError(
                f"attention_weight of layer {self.layer}: the pattern times the values is not "
                f"what {type(self._module).__name__} gives (off by {apart:.2g})"
            )
        return pattern, attend


def _written_out(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scaling: float | None
) -> Tensor:
    """softmax(q kᵀ · scaling + mask) v, the queries of a key head together.

    What `sdpa` computes; of many short rows, several times as fast as its kernel on a CPU.
    """
    rows, n_heads, n_queries, width = query.shape
    n_kv, n_keys = key.shape[1], key.shape[2]
    folded = query.reshape(rows, n_kv, -1, width)
    scores = torch.matmul(folded, key.transpose(2, 3))
    scores = scores.mul_(width**-0.5 if scaling is None else scaling)
    by_head = scores.view(rows, n_kv, -1, n_queries, n_keys)
    if mask.shape[1] == 1:
        by_head += mask[:, :, None]
    else:
        by_head += mask.reshape(by_head.shape)
    out = torch.matmul(scores.softmax(-1), value)
    return out.view(rows, n_heads, n_queries, -1).transpose(1, 2)


Through = Callable[[Call], Tensor]
"""What attention gives `[row, pos, head, head_width]` for a call."""

_routes: list[tuple[Through, dict[int, int], dict[int, str | None], Counter[int], bool]] = []


@contextlib.contextmanager
def routing(
    model: nn.Module, anatomy: Anatomy, through: Through, layers: Sequence[int], *, masks: bool
) -> Iterator[None]:
    """Within: every layer's attention goes through `through`; afterwards all is as before.

    Args:
        model: a model of a family that uses transformers' attention functions.
        anatomy: of the model.
        through: what to do instead.
        layers: the layers that must call exactly once.
        masks: whether the model makes its masks; without, calls get None.

    Raises:
        EngineError: a layer that did not call once.
    """
    blocks = find_module(model, anatomy.blocks())
    layer_of = {id(m): i for i, block in enumerate(blocks.children()) for m in block.modules()}
    configs: dict[int, Any] = {
        id(m.config): m.config for m in model.modules() if hasattr(m, "config")
    }
    before = {key: config._attn_implementation_internal for key, config in configs.items()}
    calls: Counter[int] = Counter()
    _routes.append((through, layer_of, before, calls, masks))
    try:
        for config in configs.values():
            config._attn_implementation_internal = _NAME
        yield
    finally:
        _routes.pop()
        for key, config in configs.items():
            config._attn_implementation_internal = before[key]
    for layer in layers:
        if calls[layer] != 1:
            raise EngineError(
                f"attention of layer {layer} called transformers' attention function "
                f"{calls[layer]} times, expected once: its pattern cannot be changed"
            )


def _route(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **options: Any,
) -> tuple[Tensor, None]:
    through, layer_of, before, calls, _ = _routes[-1]
    layer = layer_of[id(module)]
    calls[layer] += 1
    implementation = before[id(module.config)] or "eager"
    call = Call(layer, module, implementation, (query, key, value), attention_mask, options)
    return through(call), None


def _route_mask(*args: Any, config: Any = None, **kwargs: Any) -> Any:
    _, _, before, _, masks = _routes[-1]
    if not masks:
        return None
    implementation = before.get(id(config)) or next(iter(before.values())) or "eager"
    return ALL_MASK_ATTENTION_FUNCTIONS[implementation](*args, config=config, **kwargs)


ALL_ATTENTION_FUNCTIONS.register(_NAME, _route)
ALL_MASK_ATTENTION_FUNCTIONS.register(_NAME, _route_mask)


def _eager(module: nn.Module) -> Callable[..., tuple[Tensor, Tensor]]:
    """The family's own attention, written out, in the file that its module is from."""
    try:
        found: Callable[..., tuple[Tensor, Tensor]] = sys.modules[
            type(module).__module__
        ].eager_attention_forward
    except AttributeError as error:
        name = type(module).__name__
        raise EngineError(f"attention_weight: {name} has no attention written out") from error
    return found


def fit_keys(source: Tensor, n_keys: int) -> Tensor:
    """A pattern's rows `[..., key]` for as many keys.

    Raises:
        EngineError: keys that would be cut off have weight.
    """
    if source.shape[-1] <= n_keys:
        return nn.functional.pad(source, (0, n_keys - source.shape[-1]))
    if source[..., n_keys:].any():
        raise EngineError(
            f"attention_weight: the source looks at {source.shape[-1]} keys, the run has {n_keys}"
        )
    return source[..., :n_keys]
