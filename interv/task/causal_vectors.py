"""Entities as vectors, and inputs of vector models as one array."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from interv.task.causal_model import CausalModel
from interv.task.causal_values import Array, CausalError

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def vectors(
    ids: Array,
    width: int,
    seed: int,
    distribution: Literal["uniform", "normal"] = "uniform",
) -> NDArray[np.float32]:
    """Random vectors `[..., width]`, one for each id: equal ids have equal vectors.

    Args:
        ids: `[...]` int64.
        distribution: uniform in [-1, 1), as pyvene's equality tasks, or standard normal.
    """
    start = _mixed(ids.astype(np.uint64) ^ _mixed(np.array([seed], dtype=np.uint64)))
    numbers = np.arange(1, 2 * width + 1, dtype=np.uint64) * _GOLDEN

    def draw(at: slice) -> NDArray[np.float64]:
        # 53 random bits.
        bits = _mixed(start[..., None] + numbers[at]) >> np.uint64(11)
        return bits.astype(np.float64) / 2.0**53

    first = draw(slice(width))
    if distribution == "uniform":
        return (2 * first - 1).astype(np.float32)
    # Box and Muller; 1 - u is never 0.
    radius = np.sqrt(-2 * np.log(1 - first))
    normal = radius * np.cos(2 * np.pi * draw(slice(width, None)))
    return np.asarray(normal, dtype=np.float32)


def _mixed(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Steele, Lea and Flood's splitmix64 (OOPSLA 2014): each input bit moves every output bit."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed: NDArray[np.uint64] = values ^ (values >> np.uint64(31))
    return mixed


def input_width(model: CausalModel) -> int:
    """How many numbers `encode` gives: a vector's width, and one for a number."""
    return sum(model.variables[name].width or 1 for name in model.inputs)


def encode(model: CausalModel, values: Mapping[str, Array], seed: int = 0) -> NDArray[np.float32]:
    """The inputs side by side, in the order of their declaration, `[n, input_width]`.

    Args:
        values: of every input, `[n]`, as in `Interchanges.base`.
        seed: of the vectors.

    Raises:
        CausalError: the model has prompts.
    """
    if not model.is_vector:
        raise CausalError(f"{model.name} has prompts, not vectors", "inputs without templates")
    columns = []
    for name in model.inputs:
        variable = model.variables[name]
        if variable.kind == "entity":
            columns.append(vectors(values[name], variable.width, seed, variable.distribution))
        else:
            columns.append(values[name].astype(np.float32)[:, None])
    return np.concatenate(columns, axis=1)
