"""From a trace spec to its cells: pure, without torch.

A *cell* is one restoration on one prompt: a component, layers, one position, and what is held
at its corrupted value. A *label* is one line of the results; labels that ask for the same
restoration (a position that has two roles, overlapping grids) share a cell. A cell is computed
once for each noise draw: those are the rows that the executor batches.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass

from interv.errors import ModelError, Problem, SpecError, nearest
from interv.models import ModelFacts, ModelFiles, locate
from interv.models.cache import text_hash
from interv.spec import LoadedSpec, axes
from interv.spec.schema import ROLES, NoiseCorruption, TraceGrid, TraceSpec
from interv.task import Prompt, read_prompts

_VERSION = 1  # of what a cell's id means; a change makes earlier results strangers


@dataclass(frozen=True, slots=True)
class Cell:
    """One restoration on one prompt. `id` is the hash of everything that decides its value."""

    id: str
    prompt: int
    component: str
    layers: tuple[int, ...]
    position: int
    sever: str | None


@dataclass(frozen=True, slots=True)
class Label:
    """One line of the results: how the spec came to ask for a cell."""

    cell: Cell
    layer: int
    window: int
    role: str


@dataclass(frozen=True)
class Plan:
    """All that a run will do, known before it starts.

    Attributes:
        prompts: by index (`Prompt.index`), in the data's order.
        cells: by prompt, in the grid's order, each once.
        draws: rows of one cell.
        draw_seeds: for each prompt the seed of its noise (empty under another prompt).
        baselines: for each prompt the id of its clean and corrupted values.
        identity: of the experiment; None while the weights are not at hand.
        unchecked: what could not be checked, and why.
    """

    loaded: LoadedSpec
    files: ModelFiles
    facts: ModelFacts | None
    prompts: dict[int, Prompt]
    cells: tuple[Cell, ...]
    labels: tuple[Label, ...]
    draws: int
    draw_seeds: dict[int, int]
    baselines: dict[int, str]
    identity: str | None
    unchecked: tuple[str, ...]

    @property
    def spec(self) -> TraceSpec:
        return self.loaded.spec

    def tokens(self, prompt: int) -> int:
        """Length of one row: the prompt and, but for its last token, the answer."""
        found = self.prompts[prompt]
        return len(found.ids) + len(found.answer_ids) - 1

    def is_no_op(self, cell: Cell) -> bool:
        """Whether clean and corrupted run are the same at the cell's position."""
        return cell.position < self.prompts[cell.prompt].first_changed


def make_plan(loaded: LoadedSpec) -> Plan:
    """Check the spec against its model's config and tokenizer, and expand it.

    Raises:
        SpecError: all that is wrong with it.
    """
    spec = loaded.spec
    try:
        files = locate(spec.model, spec.seed)
        family = files.facts.family if files.facts else None
    except ModelError as error:
        raise SpecError([loaded.problem(("model",), str(error))]) from None
    problems: list[Problem] = []
    for i, grid in enumerate(spec.grid):
        problems += _check_grid(loaded, i, grid, files.facts)
        for j, component in enumerate([*grid.component, *([grid.sever] if grid.sever else [])]):
            if family and component not in family.components:
                at = ("grid", i, "component", j)
                have = list(family.components)
                message = f"{family.name} models have no {component}"
                problems.append(
                    loaded.problem(at, message, ", ".join(have), nearest(component, have))
                )
    prompts: list[Prompt] = []
    if files.tokenizer:
        prompts, more = read_prompts(loaded, files.tokenizer)
        problems += more
        if files.facts:
            problems += _check_prompts(loaded, prompts, files.facts)
        problems += _check_metrics(loaded, prompts)
    if problems:
        raise SpecError(problems)
    by_index = {p.index: p for p in prompts}
    seeds = {p.index: _draw_seed(spec, p) for p in prompts}
    if not isinstance(spec.corrupt, NoiseCorruption):
        seeds = {}
    keys = _prompt_keys(spec, files, prompts, seeds)
    labels = _labels(loaded, prompts, keys, files.facts) if files.facts else []
    return Plan(
        loaded=loaded,
        files=files,
        facts=files.facts,
        prompts=by_index,
        cells=tuple({label.cell.id: label.cell for label in labels}.values()),
        labels=tuple(labels),
        draws=spec.corrupt.samples if isinstance(spec.corrupt, NoiseCorruption) else 1,
        draw_seeds=seeds,
        baselines={p: _digest(key, "baseline") for p, key in keys.items()},
        identity=_identity(spec, files, list(keys.values())),
        unchecked=files.absent,
    )


def window_layers(centre: int, window: int, n_layers: int) -> tuple[int, ...]:
    """Layers `[centre - window // 2, centre + ceil(window / 2))`, clipped to the model.

    The authors' code (`trace_important_window` in experiments/causal_trace.py); the paper's
    text says one layer later.
    """
    low, high = max(0, centre - window // 2), min(n_layers, centre - (-window // 2))
    return tuple(range(low, high))


def _check_grid(
    loaded: LoadedSpec, i: int, grid: TraceGrid, facts: ModelFacts | None
) -> Iterator[Problem]:
    if grid.sever in grid.component:
        message = f"{grid.sever} is both restored and held at its corrupted value"
        yield loaded.problem(("grid", i, "sever"), message, "another component")
    for item in axes.items(grid.layers) if facts else ():
        assert facts is not None
        try:
            axes.expand(item, facts.n_layers)
        except axes.AxisError as error:
            message = f"layer {error}: the model has {facts.n_layers} layers"
            yield loaded.problem(("grid", i, "layers"), message, error.expected)


def _check_prompts(
    loaded: LoadedSpec, prompts: list[Prompt], facts: ModelFacts
) -> Iterator[Problem]:
    for prompt in prompts:
        length = len(prompt.ids) + len(prompt.answer_ids) - 1
        if length > facts.n_positions:
            message = f"prompt {prompt.index} has {length} tokens"
            yield loaded.problem(("data",), message, f"at most {facts.n_positions}, the model's")
        for i, grid in enumerate(loaded.spec.grid):
            for item in axes.items(grid.positions):
                try:
                    axes.expand(item, len(prompt.ids))
                except axes.AxisError as error:
                    message = f"position {error}: prompt {prompt.index} is {prompt.text!r}"
                    yield loaded.problem(("grid", i, "positions"), message, error.expected)


def _check_metrics(loaded: LoadedSpec, prompts: list[Prompt]) -> Iterator[Problem]:
    several = [p for p in prompts if len(p.answer_ids) > 1]
    for i, metric in enumerate(loaded.spec.metric):
        if metric in ("logit", "rank") and several:
            p = several[0]
            message = (
                f"{metric} needs an answer of one token; {p.answer!r} (prompt {p.index}) has "
                f"{len(p.answer_ids)}"
            )
            yield loaded.problem(("metric", i), message, "probability or log_probability")


def _labels(
    loaded: LoadedSpec, prompts: list[Prompt], keys: dict[int, str], facts: ModelFacts
) -> list[Label]:
    found: dict[tuple[object, ...], Label] = {}
    for prompt in prompts:
        for grid in loaded.spec.grid:
            layers = [
                layer
                for item in axes.items(grid.layers)
                for layer in axes.expand(item, facts.n_layers) or ()
            ]
            places = list(_places(prompt, grid))
            for component in grid.component:
                for layer in layers:
                    window = window_layers(layer, grid.window, facts.n_layers)
                    for position, role in places:
                        name = f"{component}|{window[0]}-{window[-1]}|{position}|{grid.sever}"
                        cell_id = _digest(keys[prompt.index], name)
                        cell = Cell(cell_id, prompt.index, component, window, position, grid.sever)
                        label = Label(cell, layer, grid.window, role)
                        found.setdefault((cell_id, layer, grid.window, role), label)
    return list(found.values())


def _places(prompt: Prompt, grid: TraceGrid) -> Iterator[tuple[int, str]]:
    """Positions that a grid asks for, each with the role under which it did."""
    for item in axes.items(grid.positions):
        indices = axes.expand(item, len(prompt.ids))
        if indices is not None:
            yield from ((i, "") for i in indices)
            continue
        for role in ROLES if item == "roles" else (str(item),):
            yield from ((i, role) for i in prompt.role(role))


def _draw_seed(spec: TraceSpec, prompt: Prompt) -> int:
    """Seed of a prompt's noise: the same for all its cells, whatever the order of prompts."""
    if isinstance(spec.corrupt, NoiseCorruption) and spec.corrupt.draw_seed is not None:
        return spec.corrupt.draw_seed
    digest = hashlib.sha256(json.dumps([spec.seed, prompt.ids]).encode()).digest()
    return int.from_bytes(digest[:4], "big")


def _prompt_keys(
    spec: TraceSpec, files: ModelFiles, prompts: list[Prompt], seeds: dict[int, int]
) -> dict[int, str]:
    """For each prompt the hash of what all its cells have in common."""
    corrupt = spec.corrupt.model_dump(exclude={"draw_seed"})
    if isinstance(spec.corrupt, NoiseCorruption) and spec.corrupt.multiple is not None:
        # The standard deviation, and so every value, depends on all the subjects loaded.
        corrupt["subjects"] = [
            p.subject_ids for p in prompts if spec.corrupt.sigma_over == "subjects"
        ]
    model = {
        "identity": files.identity or files.label,
        "dtype": spec.model.dtype,
        "attn_implementation": spec.model.attn_implementation,
    }
    shared = text_hash(json.dumps([_VERSION, model, corrupt], sort_keys=True))
    return {
        p.index: text_hash(
            json.dumps(
                [shared, p.ids, p.answer_ids, p.subject, p.corrupted_ids, seeds.get(p.index)]
            )
        )
        for p in prompts
    }


def _identity(spec: TraceSpec, files: ModelFiles, prompt_keys: list[str]) -> str | None:
    if files.identity is None or files.tokenizer is None:
        return None
    dump = spec.model_dump(mode="json", include={"kind", "seed", "grid", "metric"})
    return text_hash(json.dumps([dump, spec.data.keep, prompt_keys], sort_keys=True))


def _digest(key: str, name: str) -> str:
    return hashlib.sha256(f"{key}|{name}".encode()).hexdigest()[:16]
