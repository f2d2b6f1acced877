"""From a train-das spec to its plan: checked, and expanded to fits."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

from interv.errors import ModelError, Problem, SpecError, nearest
from interv.models import ModelFiles
from interv.models.cache import file_hash, text_hash
from interv.models.dictionaries import (
    TENSORS,
    THRESHOLD,
    DictionaryShape,
    read_dictionary_shape,
)
from interv.models.made import MlpShape, classes_of, made_files, made_identity, mlp_shape
from interv.plan.cells import digest
from interv.plan.checks import (
    check_rotary,
    check_text_model,
    check_tokens,
    located,
    predicts_masks,
    unread_layers,
)
from interv.plan.claims import check_claims
from interv.plan.train import (
    Fit,
    Place,
    TrainPlan,
    draw_splits,
    exchanged_names,
    fitted_anatomy,
    task_identity,
)
from interv.plan.train_grid import Expander
from interv.spec import LoadedSpec
from interv.spec.made import MlpSection, TransformerSection
from interv.spec.schema import ModelSection
from interv.spec.train import RANKED, UNTRAINED, TrainSpec, part_of
from interv.task.causal_builtin import causal_model
from interv.task.causal_model import CausalModel
from interv.task.causal_pairs import samples
from interv.task.causal_text import answers, render, usable
from interv.task.causal_values import CausalError
from interv.task.causal_vectors import input_width
from interv.task.exchanges import Exchange, Reader

_VERSION = 3  # of what a fit's id means


def make_train_plan(loaded: LoadedSpec[TrainSpec], *, only_check: bool = False) -> TrainPlan:
    """Check the spec against its causal model, its model's config and tokenizer; expand it.

    Args:
        loaded: the spec.
        only_check: make no more pairs than a check needs.

    Raises:
        SpecError: all that is wrong with it.
    """
    spec = loaded.spec
    causal = _causal(loaded)
    problems = [*_exchange_problems(loaded), *_unread(loaded, causal), *unread_layers(loaded)]
    files, shape = _files(loaded, causal)
    exchanges: list[Exchange] = []
    answer_ids: tuple[int, ...] = ()
    try:
        if causal.is_vector:
            if shape is None:
                raise CausalError("its inputs are vectors", "model: {kind: mlp}, or templates")
            # Pairs that cannot come twice are drawn when they are needed.
            every = (causal.is_finite or spec.data.held_out == "values") and not only_check
            draw_splits(causal, spec, None if every else _CHECKED)
        elif shape is not None:
            raise CausalError("its inputs are prompts, the model is an MLP", "vectors")
        elif files.tokenizer is not None:
            causal, exchanges, answer_ids = _prompts(loaded, causal, files, only_check=only_check)
    except CausalError as error:
        problems.append(_problem(loaded, error))
    except ModelError as error:
        problems.append(loaded.problem(("model",), str(error)))
    if files.facts and exchanges:
        longest = max(exchanges, key=lambda e: len(e.base.ids)).base
        problems += check_tokens(loaded, 0, len(longest.ids), [longest.ids], files.facts)
        said = {len(one.ids) for e in exchanges for one in (e.base, *e.sources)}
        problems += check_rotary(loaded, said, files.facts)
    key = _key(loaded, files)
    fits = list(_fits(loaded, files, shape, exchanges, key, problems))
    if problems:
        raise SpecError(problems)
    plan = TrainPlan(
        loaded=loaded,
        files=files,
        facts=files.facts,
        cells=tuple({fit.id: fit for fit in fits}.values()),
        draws=1,
        baselines={0: digest(key, "prompts")},
        identity=_identity(loaded, files, key, fits),
        unchecked=files.absent,
        causal=causal,
        exchanges=tuple(exchanges),
        answer_ids=answer_ids,
        shape=shape,
    )
    if problems := list(check_claims(plan)):
        raise SpecError(problems)
    return plan


def _problem(loaded: LoadedSpec[TrainSpec], error: CausalError) -> Problem:
    at = error.at
    if at[:1] in (("mixture",), ("held_out",)):
        return loaded.problem(("data", *at), error.message, error.expected, error.near)
    if at[:1] != ("variables",) or len(at) > 1:
        return loaded.problem(("causal_model", *at), error.message, error.expected, error.near)
    return loaded.problem(at, error.message, error.expected, error.near)


def _causal(loaded: LoadedSpec[TrainSpec]) -> CausalModel:
    spec = loaded.spec
    functions = loaded.plugin.functions if loaded.plugin else {}
    try:
        model = causal_model(spec.causal_model, spec.name, functions)
    except CausalError as error:
        raise SpecError([_problem(loaded, error)]) from None
    problems = [
        loaded.problem(
            ("variables", i),
            f"no variable '{name}' in the causal model",
            f"one of: {', '.join(model.variables)}",
            nearest(name, list(model.variables)),
        )
        for i, name in enumerate(spec.variables)
        if name not in model.variables
    ]
    if problems:
        raise SpecError(problems)
    return model


def _unread(loaded: LoadedSpec[TrainSpec], causal: CausalModel) -> Iterator[Problem]:
    """Options that this causal model, or a model made on the spot, leaves without effect."""
    spec = loaded.spec
    if not spec.data.same_template and len(causal.templates) < 2:
        message = "same_template: base and sources have no other template"
        yield loaded.problem(("data", "same_template"), message, "two templates, or more")
    if spec.data.mixture is not None and len(spec.variables) == 1:
        message = f"mixture: {spec.variables[0]} alone is exchanged"
        yield loaded.problem(("data", "mixture"), message, "several variables, or no mixture")
    if spec.data.among == "answers" and causal.is_vector:
        message = "among: a network of vectors gives nothing but answers"
        yield loaded.problem(("data", "among"), message, "prompts, or no among")
    if isinstance(spec.model, MlpSection) and spec.run.device not in ("auto", "cpu"):
        message = f"run.device: {spec.run.device} for an MLP, which is computed on the CPU"
        yield loaded.problem(("run", "device"), message, "cpu")


def _exchange_problems(loaded: LoadedSpec[TrainSpec]) -> Iterator[Problem]:
    """What is wrong with the parts of the mixture that a model is to learn."""
    spec = loaded.spec
    only, at = spec.train.exchange, ("train", "exchange")
    if only is None:
        return
    if not only:
        yield loaded.problem(at, "no part of the mixture", "one or more, or no exchange")
    possible = exchanged_names(spec)[1:] or list(spec.variables)
    for i, text in enumerate(only):
        if part_of(text, spec.variables) not in possible:
            message = f"'{text}' is no part of the mixture"
            near = nearest(text, possible)
            yield loaded.problem((*at, i), message, f"one of: {', '.join(possible)}", near)


def _files(
    loaded: LoadedSpec[TrainSpec], causal: CausalModel
) -> tuple[ModelFiles, MlpShape | None]:
    section = loaded.spec.model
    if isinstance(section, TransformerSection):
        return _transformer(loaded, section, causal), None
    if not isinstance(section, MlpSection):
        files = located(loaded)
        if problems := list(check_text_model(loaded, files)):
            raise SpecError(problems)
        return files, None
    if not causal.is_vector:
        message = "an MLP takes vectors, the causal model has prompts"
        raise SpecError([loaded.problem(("model",), message, "inputs that are vectors")])
    try:
        classes = classes_of(causal.variables[causal.output].values, causal.output)
        shape = mlp_shape(section, input_width(causal), len(classes))
    except ModelError as error:
        raise SpecError([loaded.problem(("model",), str(error))]) from None
    identity = made_identity(section, shape, loaded.spec.seed, task_identity(loaded))
    return ModelFiles("mlp", "config", facts=shape.anatomy.facts, identity=identity), shape


def _transformer(
    loaded: LoadedSpec[TrainSpec], section: TransformerSection, causal: CausalModel
) -> ModelFiles:
    """A small transformer's config and word-level tokenizer, from prompts of the task."""
    if causal.is_vector:
        problem = loaded.problem(("model",), "a transformer takes prompts", "templates")
        raise SpecError([problem])
    try:
        values, templates = samples(causal, _TEXTS, 0)
        texts = [filled.text for filled in render(causal, values, templates)]
        known = answers(causal)
        if known is None:
            raise CausalError("the values of the output cannot be listed", "few values")
        texts += list(known.values())
        return made_files(section, texts, loaded.spec.seed, task_identity(loaded))
    except CausalError as error:
        raise SpecError([_problem(loaded, error)]) from None
    except ModelError as error:
        raise SpecError([loaded.problem(("model",), str(error))]) from None


_CHECKED = 16  # pairs of a split that a check draws
_TEXTS = 8192  # prompts whose words a tokenizer is made of


def _prompts(
    loaded: LoadedSpec[TrainSpec], causal: CausalModel, files: ModelFiles, *, only_check: bool
) -> tuple[CausalModel, list[Exchange], tuple[int, ...]]:
    spec, tokenizer = loaded.spec, files.tokenizer
    assert tokenizer is not None and not isinstance(spec.model, MlpSection)

    def is_token(text: str) -> bool:
        ids = tokenizer.encode(text).ids
        return len(ids) == 1 and ids != (tokenizer.unk_id,)

    causal = usable(causal, is_token)
    made = isinstance(spec.model, TransformerSection)
    section = ModelSection(path=str(files.folder)) if made else spec.model
    assert isinstance(section, ModelSection)
    reader = Reader(causal, tokenizer, section, masked=predicts_masks(files))
    found: list[Exchange] = []
    for split, pairs in draw_splits(causal, spec, _CHECKED if only_check else None).items():
        found += reader.exchanges(pairs, split, len(found))
    ids = {e.label_id for e in found}
    ids |= {said.answer_id for e in found for said in (e.base, *e.sources)}
    if not any(exchange.changes for exchange in found):
        message = f"no pair whose label changes with {' or '.join(spec.variables)}"
        raise CausalError(message, "variables on the way to the output", at=("variables",))
    return causal, found, tuple(sorted(ids))


def _key(loaded: LoadedSpec[TrainSpec], files: ModelFiles) -> str:
    """The hash of what all fits have in common: model, causal model, data."""
    spec = loaded.spec
    include = {"seed", "causal_model", "variables", "data"}
    shared = [
        _VERSION,
        files.identity or files.label,
        files.tokenizer.identity if files.tokenizer else "",
        spec.model.model_dump(mode="json", exclude={"path", "tokenizer", "device_map"}),
        spec.model_dump(mode="json", include=include),
        loaded.plugin.sha256 if loaded.plugin else "",
    ]
    return text_hash(json.dumps(shared, sort_keys=True))


def _identity(
    loaded: LoadedSpec[TrainSpec], files: ModelFiles, key: str, fits: Sequence[Fit]
) -> str | None:
    if files.identity is None or files.absent:
        return None
    asked = loaded.spec.model_dump(mode="json", include={"controls", "metric"})
    return text_hash(json.dumps([key, asked, [fit.id for fit in fits]], sort_keys=True))


def _dictionary(
    loaded: LoadedSpec[TrainSpec], problems: list[Problem]
) -> tuple[str, DictionaryShape | None]:
    """The hash of an autoencoder's file, and what it holds."""
    path = Path(str(loaded.spec.intervention.dictionary.path))
    try:
        return file_hash(path), read_dictionary_shape(path)
    except (OSError, ModelError) as error:
        message = f"{path}: {error.strerror}" if isinstance(error, OSError) else str(error)
        tensors = ", ".join(TENSORS)
        expected = f"a safetensors file with {tensors}, and {THRESHOLD} of a JumpReLU autoencoder"
        at = ("intervention", "dictionary", "path")
        problems.append(loaded.problem(at, message, expected))
        return "", None


def _fits(
    loaded: LoadedSpec[TrainSpec],
    files: ModelFiles,
    shape: MlpShape | None,
    exchanges: Sequence[Exchange],
    key: str,
    problems: list[Problem],
) -> Iterator[Fit]:
    spec = loaded.spec
    expander = Expander(loaded, fitted_anatomy(files, shape), exchanges, problems)
    options = spec.intervention.model_dump(mode="json", exclude={"type", "rank"})
    given: DictionaryShape | None = None
    if spec.intervention.dictionary.path is not None:
        options["dictionary"]["path"], given = _dictionary(loaded, problems)
    # Of which controls a fit's record has results.
    controls = spec.controls.model_dump(mode="json", include={"full", "random"})
    training = spec.train.model_dump(mode="json", exclude={"seeds", "checkpointing"})
    for i, grid in enumerate(spec.grid):
        for component, layer, pos, role, sites in expander.of(i, grid):
            if spec.intervention.by_head:
                expander.check_by_head(sites)
            if given is not None and "autoencoder" in spec.intervention.type:
                expander.check_dictionary(given.width, sites)
            for kind in spec.intervention.type:
                ranks: Sequence[int | None] = spec.intervention.rank if kind in RANKED else [None]
                for rank in ranks:
                    expander.check_rank(i, sites, kind, rank)
                    place = Place(component, layer, pos, role, grid.name, kind, rank)
                    expander.check_place(i, place, sites, grid.linked)
                    name = [asdict(place), [asdict(s) for s in sites], grid.linked]
                    seeds = [spec.train.seeds[0]] if kind in UNTRAINED[:1] else spec.train.seeds
                    if spec.train.what == "model":
                        seeds = spec.train.seeds
                    for seed in seeds:
                        asked = [name, seed, options, training, controls]
                        told = json.dumps(asked, sort_keys=True)
                        yield Fit(digest(key, told), 0, place, sites, grid.linked, seed)
