"""Figure 1 e, f, g of Meng et al. 2022 (arXiv 2202.05262): every layer and token of one fact."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from tests.independent.model import Row, spec
from tests.independent.tracing import N_LAYERS, WINDOWS, Tracer, noise_level, read_fact, window

NAME = "rome_figure1"


def tracer() -> Tracer:
    asked = spec(NAME)
    [fact] = asked["data"]["facts"]
    return Tracer(read_fact(**fact), noise_level([fact["subject"]]), asked["corrupt"]["samples"])


@torch.no_grad()
def cells(layers: Iterable[int] = range(N_LAYERS)) -> list[Row]:
    """Mean probability of the answer for each component, layer (of a window its centre), token."""
    of_fact = tracer()
    positions = range(len(of_fact.fact.ids))
    return [
        {"component": component, "layer": layer, "pos": position, "value": value}
        for component in WINDOWS
        for layer in layers
        for position, value in zip(
            positions,
            of_fact.restored(component, window(component, layer), positions),
            strict=True,
        )
    ]


@torch.no_grad()
def baselines() -> list[Row]:
    """The two numbers above the figure: clean and corrupted."""
    clean, corrupted = tracer().baseline()
    return [{"run": "clean", "value": clean}, {"run": "corrupted", "value": corrupted}]


def tables() -> dict[str, list[Row]]:
    return {NAME: cells(), f"{NAME}_baselines": baselines()}
