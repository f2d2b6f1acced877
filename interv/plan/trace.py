"""From a trace spec to its cells: pure, without torch.

A cell is one restoration on one prompt: a component, layers, one position, and what is held at
its corrupted value; its rows are the noise draws.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from interv.errors import Problem, SpecError
from interv.models import ModelFacts, ModelFiles
from interv.models.cache import text_hash
from interv.plan.cells import Cell, Plan, digest, window_layers
from interv.plan.checks import (
    check_grid,
    check_metrics,
    check_prompts,
    check_trained,
    located,
    predicts_masks,
    trained_hashes,
    unknown_components,
)
from interv.plan.claims import check_claims
from interv.spec import LoadedSpec, axes
from interv.spec.schema import ROLES, NoiseCorruption, TraceGrid, TraceSpec
from interv.task import Prompt, read_prompts
from interv.task.left_out import LeftOut, told_copies

_VERSION = 3  # of what a cell's id means; a change makes earlier results strangers


@dataclass(frozen=True, slots=True)
class Restoration(Cell):
    """A component's clean state put back in some layers at one position."""

    component: str
    layers: tuple[int, ...]
    position: int
    sever: str | None


@dataclass(frozen=True, slots=True)
class Label:
    """One line of the results: how the spec came to ask for a cell."""

    cell: Restoration
    prompt: int
    layer: int
    window: int
    role: str


@dataclass(frozen=True)
class TracePlan(Plan):
    """A trace's plan.

    Attributes:
        prompts: by index (`Prompt.index`), in the data's order.
        left_out: copies of other prompts.
        draw_seeds: for each prompt the seed of its noise (empty under another prompt).
    """

    prompts: dict[int, Prompt]
    left_out: tuple[LeftOut, ...]
    labels: tuple[Label, ...]
    draw_seeds: dict[int, int]

    @property
    def notes(self) -> list[str]:
        return told_copies(self.left_out, len(self.prompts))

    def tokens(self, prompt: int) -> int:
        found = self.prompts[prompt]
        return len(found.ids) + len(found.answer_ids) - 1

    def width(self, cell: Cell) -> int:
        assert isinstance(cell, Restoration)
        if cell.position < self.prompts[cell.prompt].first_changed:
            return 0
        first = cell.position if self.reach == "positions" else 0
        return self.tokens(cell.prompt) - first

    def first_layer(self, cell: Cell) -> int:
        assert isinstance(cell, Restoration)
        # A block's output enters the next one.
        return cell.layers[0] + (cell.component == "block_output")

    def logits(self, prompt: int) -> int:
        assert self.facts is not None
        return len(self.prompts[prompt].answer_ids) * self.facts.vocab_size

    def kept_tokens(self, cells: Iterable[Cell]) -> int:
        found = [cell for cell in cells if isinstance(cell, Restoration)]
        severed = {cell.prompt for cell in found if cell.sever}
        # Clean once for its value and once for its states; corrupted likewise where it is held.
        return sum(
            self.tokens(p) * (2 + self.draws * (2 if p in severed else 1))
            for p in {cell.prompt for cell in found}
        )

    def naive_tokens(self, cell: Cell) -> int:
        # The clean row is in each forward, as in the authors' code.
        return self.tokens(cell.prompt) * (self.draws + 1)

    def labels_of(self, metrics: Sequence[str]) -> Iterator[dict[str, object]]:
        single = len(self.prompts) == 1
        for label in self.labels:
            cell = label.cell
            for metric in metrics:
                yield {
                    "component": cell.component,
                    "layer": label.layer,
                    "window": label.window,
                    "severed": cell.sever or "",
                    "pos": cell.position if single or not label.role else "",
                    "token": self.prompts[cell.prompt].tokens[cell.position] if single else "",
                    "role": label.role,
                    "metric": metric,
                }


def make_plan(loaded: LoadedSpec[TraceSpec], *, only_check: bool = False) -> TracePlan:
    """Check the spec against its model's config and tokenizer, and expand it.

    Args:
        loaded: the spec.
        only_check: leave out what only a run needs: the plan has no cells unless claims
            about them have to be checked.

    Raises:
        SpecError: all that is wrong with it.
    """
    spec = loaded.spec
    files = located(loaded)
    problems = [
        p
        for i, g in enumerate(spec.grid)
        for p in check_grid(loaded, i, g, files.facts, files.config or {})
    ]
    problems += check_trained(loaded)
    prompts: list[Prompt] = []
    copies: list[LeftOut] = []
    if files.tokenizer:
        prompts, copies, more = read_prompts(loaded, files.tokenizer, masked=predicts_masks(files))
        problems += more
        if files.facts:
            problems += check_prompts(loaded, prompts, files.facts)
        problems += check_metrics(loaded, prompts)
        problems += _check_places(loaded, prompts)
        problems += _check_average(loaded, prompts)
    if problems:
        raise SpecError(problems)
    noisy = isinstance(spec.corrupt, NoiseCorruption)
    seeds = {p.index: _draw_seed(spec, p) for p in prompts} if noisy else {}
    keys = _prompt_keys(loaded, files, prompts, seeds)
    expand = bool(spec.reference) or not only_check
    labels = _labels(loaded, prompts, keys, files.facts) if files.facts and expand else []
    plan = TracePlan(
        loaded=loaded,
        files=files,
        facts=files.facts,
        prompts={p.index: p for p in prompts},
        left_out=tuple(copies),
        cells=tuple({label.cell.id: label.cell for label in labels}.values()),
        labels=tuple(labels),
        draws=spec.corrupt.samples if isinstance(spec.corrupt, NoiseCorruption) else 1,
        draw_seeds=seeds,
        baselines={p: digest(key, "baseline") for p, key in keys.items()},
        identity=_identity(spec, files, list(keys.values())),
        unchecked=(*files.absent, *unknown_components(files)),
    )
    if problems := list(check_claims(plan)):
        raise SpecError(problems)
    return plan


def _check_places(loaded: LoadedSpec[TraceSpec], prompts: Sequence[Prompt]) -> Iterator[Problem]:
    """Refuse roles that no prompt has: they select nothing."""
    for i, grid in enumerate(loaded.spec.grid):
        for item in axes.items(grid.positions):
            if prompts and item in ROLES and not any(p.role(str(item)) for p in prompts):
                message = f"no prompt has a token that is '{item}': it selects no point"
                have = [role for role in ROLES if any(p.role(role) for p in prompts)]
                yield loaded.problem(
                    ("grid", i, "positions"), message, f"one of: {', '.join(have)}"
                )


def _check_average(loaded: LoadedSpec[TraceSpec], prompts: Sequence[Prompt]) -> Iterator[Problem]:
    """Refuse an average over tokens where there is nothing to pool."""
    if loaded.spec.average != "tokens" or not prompts:
        return
    several = any(
        role and count > 1
        for prompt in prompts
        for grid in loaded.spec.grid
        for role, count in Counter(r for _, r in _places(prompt, grid, several=True)).items()
    )
    expected = "several facts, and a role that some fact has several tokens of (middle_subject)"
    if len(prompts) < 2:
        yield loaded.problem(("average",), "average: tokens of one fact", expected)
    elif not several:
        message = "average: tokens, but no fact has several tokens of a role of the grid"
        yield loaded.problem(("average",), message, expected)


def _labels(
    loaded: LoadedSpec[TraceSpec], prompts: list[Prompt], keys: dict[int, str], facts: ModelFacts
) -> list[Label]:
    found: dict[tuple[object, ...], Label] = {}
    for prompt in prompts:
        for grid in loaded.spec.grid:
            layers = axes.indices(grid.layers, facts.n_layers)
            places = list(_places(prompt, grid, several=len(prompts) > 1))
            for component in grid.component:
                for layer in layers:
                    window = window_layers(layer, grid.window, facts.n_layers)
                    for position, role in places:
                        name = f"{component}|{window[0]}-{window[-1]}|{position}|{grid.sever}"
                        cell = Restoration(
                            digest(keys[prompt.index], name),
                            *(prompt.index, component, window, position, grid.sever),
                        )
                        label = Label(cell, prompt.index, layer, grid.window, role)
                        found.setdefault((cell.id, prompt.index, layer, grid.window, role), label)
    return list(found.values())


def _places(prompt: Prompt, grid: TraceGrid, *, several: bool) -> Iterator[tuple[int, str]]:
    """Positions that a grid asks for, each with the role under which it did.

    Over several prompts, which may differ in length, a position counted from the end is a
    role of its own: it is averaged as what it says.
    """
    for item in axes.items(grid.positions):
        indices = axes.expand(item, len(prompt.ids))
        if indices is not None:
            name = str(item) if several and isinstance(item, int) and item < 0 else ""
            yield from ((i, name) for i in indices)
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
    loaded: LoadedSpec[TraceSpec], files: ModelFiles, prompts: list[Prompt], seeds: dict[int, int]
) -> dict[int, str]:
    """For each prompt the hash of what all its cells have in common."""
    spec = loaded.spec
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
    decides = [_VERSION, model, corrupt]
    if spec.intervention is not None:
        decides.append(trained_hashes(spec.intervention.trained))
    shared = text_hash(json.dumps(decides, sort_keys=True))
    keys = {}
    for p in prompts:
        tokens = [p.ids, p.answer_ids, p.subject, p.corrupted_ids, p.read, p.behind]
        keys[p.index] = text_hash(json.dumps([shared, tokens, seeds.get(p.index)]))
    return keys


def _identity(spec: TraceSpec, files: ModelFiles, prompt_keys: list[str]) -> str | None:
    if files.identity is None or files.tokenizer is None:
        return None
    dump = spec.model_dump(mode="json", include={"kind", "seed", "grid", "metric", "average"})
    return text_hash(json.dumps([dump, spec.data.keep, prompt_keys], sort_keys=True))
