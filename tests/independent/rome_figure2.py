"""Figure 2 of Meng et al. 2022 (arXiv 2202.05262): average effects by role over known facts.

Of a role with several tokens a fact's value is the mean over them, and facts count alike. The
authors' notebook (average_causal_effects.ipynb) pools the tokens of all facts instead, which gives
long prompts more weight in two of the six roles.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Collection, Iterator

import torch

from tests.independent.model import FOLDER, Row, spec
from tests.independent.tracing import WINDOWS, Tracer, knows, noise_level, read_fact, window

NAME = "rome_figure2"


def tracers(name: str) -> Iterator[Tracer]:
    """Of the facts of a spec that the model knows; the noise level is of all that are loaded."""
    asked = spec(name)
    lines = (FOLDER / asked["data"]["file"]).read_text("utf-8").splitlines()
    given = [json.loads(line) for line in lines[: asked["data"]["limit"]]]
    level = noise_level([fact["subject"] for fact in given])
    for fact in given:
        found = read_fact(fact["prompt"], fact["subject"], fact["attribute"])
        if knows(found):
            yield Tracer(found, level, asked["corrupt"]["samples"])


@torch.no_grad()
def cells(
    layers: Collection[int] | None = None,
    components: Collection[str] = tuple(WINDOWS),
) -> tuple[list[Row], list[Row]]:
    """Mean probability of the answer by component, layer and role; and the mean effects."""
    layers = layers or spec(NAME)["grid"][0]["layers"]
    values: dict[tuple[str, int, str], list[tuple[float, float]]] = defaultdict(list)
    for tracer in tracers(NAME):
        _, corrupted = tracer.baseline()
        roles = tracer.fact.roles()
        positions = sorted({position for role in roles.values() for position in role})
        for component in components:
            for layer in layers:
                found = tracer.restored(component, window(component, layer), positions)
                at = dict(zip(positions, found, strict=True))
                for role, of_role in roles.items():
                    if of_role:
                        value = sum(at[position] for position in of_role) / len(of_role)
                        values[component, layer, role].append((value, value - corrupted))
    tables: tuple[list[Row], list[Row]] = ([], [])
    for (component, layer, role), pairs in values.items():
        where: Row = {"component": component, "layer": layer, "role": role}
        for table, numbers in zip(tables, zip(*pairs, strict=True), strict=True):
            table.append({**where, "value": sum(numbers) / len(numbers)})
    return tables


def tables() -> dict[str, list[Row]]:
    values, effects = cells()
    return {NAME: values, f"{NAME}_effects": effects}
