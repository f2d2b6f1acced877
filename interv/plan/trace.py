"""From a trace spec to its cells: pure, without torch."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator

from interv.errors import ModelError, Problem, SpecError
from interv.models import ModelFacts, ModelFiles, locate
from interv.models.cache import text_hash
from interv.plan.cells import Cell, Label, Plan
from interv.plan.checks import check_grid, check_metrics, check_prompts
from interv.plan.claims import check_claims
from interv.spec import LoadedSpec, Spec, axes
from interv.spec.schema import ROLES, NoiseCorruption, TraceGrid, TraceSpec
from interv.task import Prompt, read_prompts

_VERSION = 1  # of what a cell's id means; a change makes earlier results strangers


def make_plan(loaded: LoadedSpec[TraceSpec], *, only_check: bool = False) -> Plan:
    """Check the spec against its model's config and tokenizer, and expand it.

    Args:
        loaded: the spec.
        only_check: leave out what only a run needs: the plan has no cells unless claims
            about them have to be checked.

    Raises:
        SpecError: all that is wrong with it.
    """
    spec = loaded.spec
    try:
        files = locate(spec.model, spec.seed)
    except ModelError as error:
        raise SpecError([model_problem(loaded, error)]) from None
    problems = [
        p
        for i, g in enumerate(spec.grid)
        for p in check_grid(loaded, i, g, files.facts, files.config or {})
    ]
    prompts: list[Prompt] = []
    if files.tokenizer:
        prompts, more = read_prompts(loaded, files.tokenizer)
        problems += more
        if files.facts:
            problems += check_prompts(loaded, prompts, files.facts)
        problems += check_metrics(loaded, prompts)
    if problems:
        raise SpecError(problems)
    noisy = isinstance(spec.corrupt, NoiseCorruption)
    seeds = {p.index: _draw_seed(spec, p) for p in prompts} if noisy else {}
    keys = _prompt_keys(spec, files, prompts, seeds)
    expand = bool(spec.reference) or not only_check
    labels = _labels(loaded, prompts, keys, files.facts) if files.facts and expand else []
    if problems := list(check_claims(loaded, prompts, labels)):
        raise SpecError(problems)
    return Plan(
        loaded=loaded,
        files=files,
        facts=files.facts,
        prompts={p.index: p for p in prompts},
        cells=tuple({label.cell.id: label.cell for label in labels}.values()),
        labels=tuple(labels),
        draws=spec.corrupt.samples if isinstance(spec.corrupt, NoiseCorruption) else 1,
        draw_seeds=seeds,
        baselines={p: _digest(key, "baseline") for p, key in keys.items()},
        identity=_identity(spec, files, list(keys.values())),
        unchecked=(*files.absent, *unknown_components(files)),
    )


def model_problem(loaded: LoadedSpec[Spec], error: ModelError) -> Problem:
    """What is wrong with a spec's model, at the field that the message begins with."""
    field = re.match(r"model\.(\w+):", str(error))
    return loaded.problem(("model", field[1]) if field else ("model",), str(error))


def unknown_components(files: ModelFiles) -> list[str]:
    """What cannot be checked of a model whose type is not in the table."""
    if files.facts is None or files.facts.family is not None:
        return []
    kind = files.facts.model_type
    return [f"components: models of type '{kind}' are recognised once they are loaded"]


def window_layers(centre: int, window: int, n_layers: int) -> tuple[int, ...]:
    """Layers `[centre - window // 2, centre + ceil(window / 2))`, clipped to the model.

    The authors' code (`trace_important_window` in experiments/causal_trace.py); the paper's
    text says one layer later.
    """
    low, high = max(0, centre - window // 2), min(n_layers, centre - (-window // 2))
    return tuple(range(low, high))


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
                        cell_id = _digest(keys[prompt.index], name)
                        cell = Cell(cell_id, prompt.index, component, window, position, grid.sever)
                        label = Label(cell, prompt.index, layer, grid.window, role)
                        found.setdefault((cell_id, prompt.index, layer, grid.window, role), label)
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
