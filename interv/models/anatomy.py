"""Where the components of one model stand: its family's table and its own shape. No torch."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

from interv.errors import EngineError, nearest
from interv.models.config import ModelFacts, read_facts
from interv.models.families import HEAD_PREFIX, Family, Reach, Side, Stand

_INDEXED = re.compile(r"\[(\d+)\]")


@dataclass(frozen=True)
class Place:
    """One side of one module, as its path from the model's root.

    Attributes:
        path, side: the module and its side.
        shared: the residual stream is the same tensor, and changes with it.
        pattern: not the module's output but its attention pattern.
    """

    path: str
    side: Side
    shared: bool = False
    pattern: bool = False

    def __str__(self) -> str:
        return f"{self.path or 'the model'}.{'weights' if self.pattern else self.side}"


@dataclass(frozen=True)
class Anatomy:
    """A family's table applied to one model; without either, modules by path only.

    Components given as a path (`transformer.h[3].mlp.output`, or with dots) are known for any
    model and have no layer.
    """

    family: Family | None = None
    facts: ModelFacts | None = None
    config: Mapping[str, Any] = field(default_factory=dict, hash=False)

    @property
    def n_layers(self) -> int:
        return self.facts.n_layers if self.facts else 0

    @property
    def reach(self) -> Reach:
        return self.family.reach if self.family else "nothing"

    @property
    def components(self) -> tuple[str, ...]:
        """Names of this model's components, those of a block first."""
        if self.family is None:
            return ()
        both = chain(self.family.components.items(), self.family.layerless.items())
        return tuple(name for name, stand in both if self._has(stand))

    def facts_of(self, component: str) -> ModelFacts | None:
        """The shape of the tower that a component belongs to; the model's where it has one."""
        blocks = self.family.blocks if self.family else ""
        if self.facts is None or isinstance(blocks, str):
            return self.facts
        prefix = next((prefix for prefix in blocks if component.startswith(prefix)), None)
        if prefix is None:
            return self.facts
        tower = {"vocab_size": 1, **self.config[f"{prefix}config"]}
        return read_facts({**tower, "model_type": self.facts.model_type}, f"{prefix}config")

    def has_layers(self, component: str) -> bool:
        """Whether a component stands in each block, not once in the model."""
        return self.family is not None and component in self.family.components

    def stand(self, component: str) -> Stand:
        """A component's row of the table.

        Raises:
            EngineError: this model has no such component; says which it has.
        """
        path = as_path(component)
        if path:
            return Stand(*path)
        if self.family is None:
            raise EngineError(
                f"'{component}': this model is of no known family; name a module's side, such as "
                "encoder.0.input or encoder.0.output"
            )
        stand = self.family.components.get(component) or self.family.layerless.get(component)
        if stand is None or not self._has(stand):
            have = self.components
            near = nearest(component, have)
            raise EngineError(
                f"{self.family.name} models have no component '{component}'"
                + (f" ({self.family.note})" if self.family.note else "")
                + (f"; did you mean '{near}'?" if near else "")
                + f"; they have {', '.join(have)}"
            )
        return stand

    def place(self, component: str, layer: int) -> Place:
        """Where a component of a layer stands (layer 0 for those without one).

        Raises:
            EngineError: there is no such component or layer.
        """
        stand = self.stand(component)
        if not self.has_layers(component):
            if layer != 0:
                raise EngineError(f"{component} stands once in the model: its layer is 0")
            return Place(stand.path, stand.side)
        facts = self.facts_of(component)
        n_layers = facts.n_layers if facts else 0
        if not 0 <= layer < n_layers:
            raise EngineError(f"{component}: no layer {layer}, there are {n_layers}")
        block = f"{self.blocks(component)}.{layer}"
        path = f"{block}.{stand.path}" if stand.path else block
        return Place(path, stand.side, stand.shared, stand.width == "pattern")

    def blocks(self, component: str = "block_output") -> str:
        """Path of the list of blocks that a component belongs to."""
        assert self.family is not None
        if isinstance(self.family.blocks, str):
            return self.family.blocks
        return next(p for prefix, p in self.family.blocks.items() if component.startswith(prefix))

    def layer_of(self, place: Place) -> int | None:
        """The block in which a place stands, -1 for the embeddings, `n_layers` for norm and head.

        None: elsewhere, and nobody knows before or after what.
        """
        if self.family is None or not isinstance(self.family.blocks, str):
            return None
        inside = re.match(re.escape(self.family.blocks) + r"\.(\d+)(?:\.|$)", place.path)
        if inside and int(inside[1]) < self.n_layers:
            return int(inside[1])
        known = {"token_embedding": -1, "final_norm": self.n_layers, "logits": self.n_layers}
        for name, layer in known.items():
            if name in self.components and self.place(name, 0) == place:
                return layer
        return None

    def n_units(self, component: str) -> int | None:
        """How many heads a component is divided into; None where it is not.

        Head components are always divided, and those of the same width too.
        """
        width, facts = self.stand(component).width, self.facts_of(component)
        if facts is None or width not in ("query", "key", "value", "pattern"):
            return None
        return facts.n_heads if width in ("query", "pattern") else facts.n_kv_heads

    def width(self, component: str) -> int | None:
        """How many columns a component has; None where the config does not say."""
        facts = self.facts_of(component)
        if facts is None or as_path(component):
            return None
        stand = self.stand(component)
        units = self.n_units(component)
        if stand.width == "pattern":
            return None
        if units is not None:
            return units * facts.d_head
        return {
            "d_model": facts.d_model,
            "d_mlp": facts.d_mlp,
            "vocab": facts.vocab_size,
        }[stand.width]

    def columns(
        self, component: str, heads: tuple[int, ...] | None, dims: tuple[int, ...] | None
    ) -> tuple[int, ...] | None:
        """Columns of a module's tensor that a site means; None for all of them.

        Args:
            component: its name.
            heads: some of its heads; None for all.
            dims: some of each head's columns, or of the component's where no heads are named.

        Raises:
            EngineError: no such heads or columns, or a component that is not divided.
        """
        stand, units, width = self.stand(component), self.n_units(component), self.width(component)
        if stand.width == "pattern" and dims is not None:
            raise EngineError(f"{component} has no dimensions: its columns are the keys' positions")
        if heads is not None:
            if units is None:
                raise EngineError(f"{component} is not divided into heads")
            _check(f"{component}: head", heads, units)
        if dims is not None and width is not None:
            whole = width // units if heads is not None and units else width
            _check(f"{component}: dimension", dims, whole)
        if stand.width == "pattern":
            return None
        if width is None or (not stand.fused and heads is None and dims is None):
            return dims
        facts = self.facts_of(component)
        assert facts is not None
        own = _own_columns(stand, facts, width)
        size = facts.d_head
        if heads is None:
            return tuple(own[d] for d in (range(width) if dims is None else dims))
        of_head = range(size) if dims is None else dims
        return tuple(own[h * size + d] for h in heads for d in of_head)

    def _has(self, stand: Stand) -> bool:
        if stand.needs is None or self.family is None:
            return True
        name, wanted = stand.needs
        return bool(self.config.get(name, self.family.defaults.get(name)) == wanted)


def _own_columns(stand: Stand, facts: ModelFacts, width: int) -> list[int]:
    """Columns of a component within its module's tensor."""
    if not stand.fused:
        return list(range(width))
    size, n_heads, n_kv = facts.d_head, facts.n_heads, facts.n_kv_heads
    which = ("query", "key", "value").index(stand.width)
    if stand.fused == "concat":
        before = (0, n_heads, n_heads + n_kv)[which] * size
        return list(range(before, before + width))
    # For each key head: its queries, its key, its value.
    group = n_heads // n_kv
    slots = (range(group), (group,), (group + 1,))[which]
    return [
        (g * (group + 2) + slot) * size + d
        for g in range(n_kv)
        for slot in slots
        for d in range(size)
    ]


def is_by_head(component: str) -> bool:
    """Whether a name means a component by head."""
    return component.startswith(HEAD_PREFIX) or component == "attention_weight"


def as_path(component: str) -> tuple[str, Side] | None:
    """Module path and side of a component given as one; None for a name.

    `h[3].mlp.output` and `h.3.mlp.output` are the same; `input` and `output` alone are the
    model's own.
    """
    path, _, side = _INDEXED.sub(r".\1", component).rpartition(".")
    if side not in ("input", "output"):
        return None
    return path, "input" if side == "input" else "output"


def _check(what: str, given: tuple[int, ...], upto: int) -> None:
    wrong = [i for i in given if not 0 <= i < upto]
    if wrong:
        raise EngineError(f"{what} {wrong[0]}: there are {upto}, counted from 0")
    if len(set(given)) != len(given):
        raise EngineError(f"{what} {next(i for i in given if given.count(i) > 1)} is there twice")
