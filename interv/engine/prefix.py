"""Layers of a `transformers` Cache: one records keys and values, one serves them again.

Unlike the stock ones they keep every position, on sliding-window layers too.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin


class Recording(CacheLayerMixin):  # type: ignore[misc]  # transformers is untyped here
    """Keeps the keys and values of one whole forward."""

    is_sliding = False

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor]:
        self.keys, self.values = key_states, value_states
        return key_states, value_states

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return query_length, 0

    def get_seq_length(self) -> int:
        return 0

    def get_max_length(self) -> int:
        return -1


class Prefix(Recording):
    """Serves each row the keys and values of its base before the walk's first position."""

    def __init__(self, keys: Tensor, values: Tensor, which: Tensor) -> None:
        super().__init__()
        self._before = (keys, values)
        self._which = which

    def update(
        self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor]:
        which = self._which[: len(key_states)]
        keys, values = (before.index_select(0, which) for before in self._before)
        return torch.cat([keys, key_states], dim=2), torch.cat([values, value_states], dim=2)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0

    def get_seq_length(self) -> int:
        return self._before[0].shape[2]
