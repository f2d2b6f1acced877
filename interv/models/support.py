"""What can be intervened on: of one model, and of every family of the table. No torch."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from interv.models.anatomy import Anatomy
from interv.models.config import ModelFacts
from interv.models.families import FAMILIES, HEAD_PREFIX, LAYERLESS, Family, Reach

FAST: dict[Reach, str] = {
    "positions": "from its layer and position",
    "layers": "from its layer",
    "nothing": "nowhere: the reference executor runs full forwards",
}
"""Where the suffix executor starts a row, in words."""


@dataclass(frozen=True)
class ComponentFacts:
    """One line of `interv inspect`.

    Attributes:
        module: its path, `{layer}` for the number of the block.
        side: of the module, or the attention pattern inside it.
        width: columns; None where it depends on the input.
        heads, head_width: how the columns are divided; None where they are not.
    """

    component: str
    module: str
    side: str
    width: int | None
    heads: int | None
    head_width: int | None
    fast: str

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def component_facts(anatomy: Anatomy) -> list[ComponentFacts]:
    """Every component of a model."""
    found = []
    for name in anatomy.components:
        place = anatomy.place(name, 0)
        pattern = anatomy.stand(name).width == "pattern"
        # With several towers, the prefix is not the name's first word.
        heads = anatomy.n_units(name) if pattern or HEAD_PREFIX in name else None
        width = anatomy.width(name)
        path = place.path
        if anatomy.has_layers(name):
            blocks = anatomy.blocks(name)
            path = f"{blocks}.{{layer}}{path.removeprefix(f'{blocks}.0')}"
        found.append(
            ComponentFacts(
                name,
                path,
                "pattern" if pattern else place.side,
                width,
                heads,
                width // heads if width and heads else None,
                FAST[anatomy.reach],
            )
        )
    return found


def support() -> dict[str, dict[str, Reach]]:
    """For each family what it has: the component, and how far the suffix executor reaches."""
    return {family.name: dict.fromkeys(_every(family), family.reach) for family in FAMILIES}


def counts() -> tuple[int, int, int]:
    """How many families, pairs of family and component, and pairs that start at a position."""
    table = support()
    pairs = [reach for row in table.values() for reach in row.values()]
    return len(table), len(pairs), pairs.count("positions")


def _every(family: Family) -> list[str]:
    return [*family.components, *(name for name in LAYERLESS if name in family.layerless)]


def shape_of(facts: ModelFacts) -> dict[str, Any]:
    """A model's shape, for people."""
    return {key: value for key, value in asdict(facts).items() if value is not None}
