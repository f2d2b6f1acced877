"""What `interv collect` will save: pure, and without torch."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from interv.errors import Problem, SpecError
from interv.models import ModelFacts, ModelFiles
from interv.models.anatomy import Anatomy, as_path, is_by_head
from interv.models.cache import text_hash
from interv.models.families import LAYERLESS
from interv.plan.checks import (
    check_rotary,
    check_text_model,
    check_tokens,
    located,
    unknown_component,
    unknown_components,
    unread_layers,
)
from interv.plan.cost import BYTES
from interv.spec import LoadedSpec, axes
from interv.spec.collect import CollectSpec
from interv.spec.schema import CLS, LAST, MASK
from interv.task.texts import Text, read_texts

_VERSION = 1


@dataclass(frozen=True)
class Wanted:
    """A component in a layer, whole or some of its heads; `name` is its tensor's."""

    component: str
    layer: int
    heads: tuple[int, ...] | None

    @property
    def name(self) -> str:
        return f"{self.component}.{self.layer}"


@dataclass(frozen=True)
class CollectPlan:
    """All that is saved.

    Attributes:
        texts: the prompts.
        positions: of each prompt, by its index.
        wanted: what is saved at each of these positions.
        shards: prompts that go into one file, by index.
    """

    loaded: LoadedSpec[CollectSpec]
    files: ModelFiles
    facts: ModelFacts | None
    texts: tuple[Text, ...]
    positions: dict[int, tuple[int, ...]]
    wanted: tuple[Wanted, ...]
    shards: tuple[tuple[int, ...], ...]
    identity: str | None
    unchecked: tuple[str, ...]

    @property
    def spec(self) -> CollectSpec:
        return self.loaded.spec

    @property
    def n_rows(self) -> int:
        return sum(map(len, self.positions.values()))

    @property
    def n_bytes(self) -> int | None:
        """Size of the tensors; None where a width is not known before the run."""
        if self.facts is None or self.facts.family is None:
            return None
        anatomy = Anatomy(self.facts.family, self.facts, self.files.config or {})
        total = 0
        for wanted in self.wanted:
            width = anatomy.width(wanted.component)
            if width is None:
                return None
            units = anatomy.n_units(wanted.component)
            width = width // units * len(wanted.heads) if wanted.heads and units else width
            total += self.n_rows * width * BYTES[self.spec.model.dtype]
        return total


_SHARD_TOKENS = 16384


def make_collect_plan(loaded: LoadedSpec[CollectSpec]) -> CollectPlan:
    """Check the spec against its model's config and tokenizer, and expand it.

    Raises:
        SpecError: all that is wrong with it.
    """
    files = located(loaded)
    problems = [*check_text_model(loaded, files), *unread_layers(loaded)]
    wanted = _wanted(loaded, files, problems)
    texts: list[Text] = []
    if files.tokenizer:
        texts, more = read_texts(loaded, files.tokenizer)
        problems += more
    if files.facts:
        problems += check_rotary(loaded, [len(text.ids) for text in texts], files.facts)
    for text in texts if files.facts else ():
        assert files.facts is not None
        problems += check_tokens(loaded, text.index, len(text.ids), [text.ids], files.facts)
    positions = {t.index: _positions(loaded, t, problems) for t in texts}
    if problems:
        raise SpecError(problems)
    return CollectPlan(
        loaded,
        files,
        files.facts,
        tuple(texts),
        positions,
        tuple(wanted),
        tuple(_shards(texts)),
        _identity(loaded, files, texts),
        (*files.absent, *unknown_components(files)),
    )


def _wanted(
    loaded: LoadedSpec[CollectSpec], files: ModelFiles, problems: list[Problem]
) -> list[Wanted]:
    facts = files.facts
    if facts is None:
        return []
    anatomy = Anatomy(facts.family, facts, files.config or {})
    found: dict[str, Wanted] = {}
    for i, grid in enumerate(loaded.spec.grid):
        try:
            layers = axes.indices(grid.layers, facts.n_layers)
        except axes.AxisError as error:
            message = f"layer {error}: the model has {facts.n_layers} layers"
            problems.append(loaded.problem(("grid", i, "layers"), message, error.expected))
            continue
        for j, component in enumerate(grid.component):
            at = ("grid", i, "component", j)
            problem = unknown_component(loaded, at, component, anatomy)
            if problem is None and grid.heads is not None and not is_by_head(component):
                problem = loaded.problem(
                    at, f"{component} is not by head", "a head_... component, or no heads here"
                )
            if problem is not None:
                problems.append(problem)
                continue
            try:
                heads = _heads(component, grid.heads, anatomy)
            except axes.AxisError as error:
                message = f"head {error} for {component}"
                problems.append(loaded.problem(("grid", i, "heads"), message, error.expected))
                continue
            once = as_path(component) or component in LAYERLESS
            for layer in [0] if once else layers:
                wanted = Wanted(component, layer, heads)
                # Both would be one tensor.
                if found.setdefault(wanted.name, wanted) != wanted:
                    message = f"{component} of layer {layer} is asked for twice, with other heads"
                    problems.append(loaded.problem(at, message, "one entry with all its heads"))
    return list(found.values())


def _heads(component: str, wanted: Any, anatomy: Anatomy) -> tuple[int, ...] | None:
    if wanted is None:
        return None
    assert anatomy.facts is not None
    # A model of an unknown type is looked at once it is loaded.
    units = anatomy.n_units(component) if anatomy.family else anatomy.facts.n_heads
    return tuple(dict.fromkeys(axes.indices(wanted, units or 0)))


def _positions(
    loaded: LoadedSpec[CollectSpec], text: Text, problems: list[Problem]
) -> tuple[int, ...]:
    found: list[int] = []
    for item in axes.items(loaded.spec.positions):
        name = LAST if item == "last" else item
        if name in (MASK, CLS) and name not in text.marks:
            message = f"prompt {text.index} has no {name}: {text.text!r}"
            problems.append(loaded.problem(("positions",), message, "other positions"))
            continue
        try:
            found += text.marks.get(str(name)) or axes.expand(name, len(text.ids)) or ()
        except axes.AxisError as error:
            message = f"position {error}: prompt {text.index} is {text.text!r}"
            problems.append(loaded.problem(("positions",), message, error.expected))
    return tuple(dict.fromkeys(found))


def _shards(texts: list[Text]) -> list[tuple[int, ...]]:
    shards: list[list[int]] = []
    tokens = _SHARD_TOKENS
    for text in texts:
        if tokens + len(text.ids) > _SHARD_TOKENS:
            shards.append([])
            tokens = 0
        shards[-1].append(text.index)
        tokens += len(text.ids)
    return [tuple(shard) for shard in shards]


def _identity(loaded: LoadedSpec[CollectSpec], files: ModelFiles, texts: list[Text]) -> str | None:
    if files.identity is None or files.tokenizer is None:
        return None
    spec = loaded.spec
    dump = spec.model_dump(mode="json", include={"kind", "seed", "grid", "positions"})
    model = [files.identity, spec.model.dtype, spec.model.attn_implementation]
    return text_hash(json.dumps([_VERSION, dump, model, [t.ids for t in texts]]))
