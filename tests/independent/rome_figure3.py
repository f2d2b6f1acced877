"""Figure 3 of Meng et al. 2022 (arXiv 2202.05262): a state restored, its later MLPs severed.

`trace_with_repatch` of the authors' causal_trace_frozen_mlp_attn.ipynb: the clean state is put
back at the last subject token, while that token's MLP (or attention) outputs stay, in every layer,
as a first corrupted run had them.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection

import torch

from tests.independent.model import Row, spec
from tests.independent.rome_figure2 import tracers

NAME = "rome_figure3"
SEVERED = (None, "mlp_output", "attention_output")


@torch.no_grad()
def cells(layers: Collection[int] | None = None) -> list[Row]:
    """Mean probability of the answer over facts, by layer and by what is severed."""
    layers = layers or spec(NAME)["grid"][0]["layers"]
    values: dict[tuple[str, int], list[float]] = defaultdict(list)
    for tracer in tracers(NAME):
        last_subject = tracer.fact.subject[1] - 1
        for severed in SEVERED:
            for layer in layers:
                [value] = tracer.restored("block_output", [layer], [last_subject], severed)
                values[severed or "", layer].append(value)
    return [
        {"severed": severed, "layer": layer, "value": sum(found) / len(found)}
        for (severed, layer), found in values.items()
    ]


def tables() -> dict[str, list[Row]]:
    return {NAME: cells()}
