"""A spec against its model's config and its prompts' tokens."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from interv.errors import ModelError, Problem, SpecError, nearest
from interv.models import DEFAULT_MODEL, ModelFacts, ModelFiles, locate
from interv.models.anatomy import Anatomy, as_path
from interv.models.cache import file_hash
from interv.models.families import LAYERLESS
from interv.models.known_faults import refuse_known_faults
from interv.spec import LoadedSpec, Spec, axes
from interv.spec.base import one_or_list
from interv.spec.schema import TraceGrid, TraceSpec
from interv.task import Prompt


def located(loaded: LoadedSpec[Any]) -> ModelFiles:
    """The files of a spec's model.

    Raises:
        SpecError: there can be none, or the installed versions compute it wrongly.
    """
    section = loaded.spec.model
    if section.name == DEFAULT_MODEL and section.revision is not None:
        message = f"{DEFAULT_MODEL} has one revision, that of its package"
        raise SpecError([loaded.problem(("model", "revision"), message, "no revision")])
    try:
        files = locate(section, loaded.spec.seed)
        refuse_known_faults(files.config or {}, section.attn_implementation)
        return files
    except ModelError as error:
        raise SpecError([model_problem(loaded, error)]) from None


def unread_layers(loaded: LoadedSpec[Any]) -> Iterator[Problem]:
    """Layers that are named for components which are in the model once, and so have none."""
    for i, grid in enumerate(loaded.spec.grid):
        sites: list[tuple[tuple[str | int, ...], Any]] = [(("grid", i), grid)]
        sites += [
            (("grid", i, "set", j), one) for j, one in enumerate(getattr(grid, "set", ()) or ())
        ]
        for at, site in sites:
            names = one_or_list(site.component or [])
            once = bool(names) and all(as_path(name) or name in LAYERLESS for name in names)
            fields = type(site).model_fields
            for field in {"layer", "layers"} & set(fields) if once else ():
                if getattr(site, field) == fields[field].default:
                    continue
                message = f"{field} of {' and '.join(names)}: nothing reads it"
                yield loaded.problem((*at, field), message, f"no {field}: each is there once")


def check_trained(loaded: LoadedSpec[Any]) -> Iterator[Problem]:
    """That the folder of a trained intervention holds one."""
    asked = loaded.spec.intervention
    if asked is None or asked.trained is None:
        return
    if not (Path(asked.trained) / "intervention.json").is_file():
        message = f"{asked.trained} has no intervention.json"
        expected = "a folder that `interv save` wrote, or fits/ID of a run of train-das"
        yield loaded.problem(("intervention", "trained"), message, expected)


def trained_hashes(folder: str) -> list[str]:
    """What decides a trained intervention: its files, wherever they are."""
    files = [Path(folder) / f"intervention.{kind}" for kind in ("json", "safetensors")]
    return [file_hash(path) for path in files if path.is_file()]


def check_text_model(loaded: LoadedSpec[Any], files: ModelFiles) -> Iterator[Problem]:
    """A model that needs more than text."""
    family = files.facts.family if files.facts else None
    if family and not isinstance(family.blocks, str):
        message = f"{family.name} models do not run on text alone ({family.note})"
        yield loaded.problem(("model",), message, "a language model")


def predicts_masks(files: ModelFiles) -> bool:
    """Whether a model is a masked language model."""
    family = files.facts.family if files.facts else None
    return family is not None and family.auto == "AutoModelForMaskedLM"


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


def unknown_component(
    loaded: LoadedSpec[Spec], at: tuple[str | int, ...], component: str, anatomy: Anatomy
) -> Problem | None:
    """A name that the model's family does not have."""
    family, have = anatomy.family, anatomy.components
    if family is None or as_path(component) or component in have:
        return None
    note = f" ({family.note})" if family.note else ""
    message = f"{family.name} models have no component '{component}'{note}"
    expected = f"a module's path and side, or one of: {', '.join(have)}"
    return loaded.problem(at, message, expected, nearest(component, have))


def check_tokens(
    loaded: LoadedSpec[Spec],
    prompt: int,
    length: int,
    texts: Iterable[Sequence[int]],
    facts: ModelFacts,
) -> Iterator[Problem]:
    """A prompt that the model cannot take: too long, or of another vocabulary."""
    if facts.n_positions is not None and length > facts.n_positions:
        message = f"prompt {prompt} has {length} tokens"
        yield loaded.problem(("data",), message, f"at most {facts.n_positions}, the model's")
    largest = max((token for ids in texts for token in ids), default=0)
    if largest >= facts.vocab_size:
        message = f"prompt {prompt} has token {largest}, the model {facts.vocab_size} tokens"
        yield loaded.problem(("model",), message, "the tokenizer of this model")


def check_rotary(
    loaded: LoadedSpec[Spec], lengths: Iterable[int], facts: ModelFacts
) -> Iterator[Problem]:
    """Runs whose rotary embeddings would depend on the other runs of the plan.

    Under dynamic scaling the angles are those of the longest run so far, under longrope those of
    the longest row of a batch: runs of several lengths would change each other.
    """
    found, rotary = sorted(set(lengths)), facts.rotary
    if rotary is None or not found or found[-1] <= rotary.n_positions:
        return
    if len(found) > 1 and (rotary.kind == "dynamic" or found[0] <= rotary.n_positions):
        message = (
            f"runs of {found[0]} to {found[-1]} tokens: beyond {rotary.n_positions} the model's "
            f"{rotary.kind} RoPE scaling depends on the longest of them"
        )
        expected = f"runs of one length, or of at most {rotary.n_positions} tokens"
        yield loaded.problem(("data",), message, expected)


def check_grid(
    loaded: LoadedSpec[TraceSpec],
    i: int,
    grid: TraceGrid,
    facts: ModelFacts | None,
    config: Mapping[str, Any],
) -> Iterator[Problem]:
    """Layers that the model has, components that its family has."""
    if facts is not None:
        anatomy = Anatomy(facts.family, facts, config)
        for j, component in enumerate([*grid.component, *([grid.sever] if grid.sever else [])]):
            if facts.family is not None and component not in anatomy.components:
                have = [name for name in anatomy.components if anatomy.has_layers(name)]
                note = f" ({facts.family.note})" if facts.family.note else ""
                message = f"{facts.family.name} models have no {component}{note}"
                near = nearest(component, have)
                at = ("grid", i, "component", j)
                yield loaded.problem(at, message, ", ".join(have), near)
    if grid.sever in grid.component:
        message = f"{grid.sever} is both restored and held at its corrupted value"
        yield loaded.problem(("grid", i, "sever"), message, "another component")
    if facts is not None and grid.window > facts.n_layers:
        message = f"a window of {grid.window} layers: the model has {facts.n_layers}"
        yield loaded.problem(("grid", i, "window"), message, f"at most {facts.n_layers}")
    for item in axes.items(grid.layers) if facts else ():
        assert facts is not None
        try:
            axes.expand(item, facts.n_layers)
        except axes.AxisError as error:
            message = f"layer {error}: the model has {facts.n_layers} layers"
            yield loaded.problem(("grid", i, "layers"), message, error.expected)


def check_prompts(
    loaded: LoadedSpec[TraceSpec], prompts: list[Prompt], facts: ModelFacts
) -> Iterator[Problem]:
    """Lengths that the model can take, positions that every prompt has."""
    yield from check_rotary(loaded, [len(prompt.run_ids) for prompt in prompts], facts)
    for prompt in prompts:
        length = len(prompt.run_ids)
        texts = (prompt.ids, prompt.answer_ids, prompt.subject_ids, prompt.corrupted_ids or ())
        yield from check_tokens(loaded, prompt.index, length, texts, facts)
        for i, grid in enumerate(loaded.spec.grid):
            for item in axes.items(grid.positions):
                try:
                    axes.expand(item, len(prompt.ids))
                except axes.AxisError as error:
                    message = f"position {error}: prompt {prompt.index} is {prompt.text!r}"
                    yield loaded.problem(("grid", i, "positions"), message, error.expected)


def check_metrics(loaded: LoadedSpec[TraceSpec], prompts: list[Prompt]) -> Iterator[Problem]:
    """Metrics that are defined for the answers at hand."""
    several = [p for p in prompts if len(p.answer_ids) > 1]
    for i, metric in enumerate(loaded.spec.metric):
        if metric in ("logit", "rank") and several:
            p = several[0]
            message = (
                f"{metric} needs an answer of one token; {p.answer!r} (prompt {p.index}) has "
                f"{len(p.answer_ids)}"
            )
            yield loaded.problem(("metric", i), message, "probability or log_probability")
