"""From a train-das spec to its fits: pure, without torch."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

from interv.errors import ModelError, Problem, SpecError, nearest
from interv.models import ModelFiles
from interv.models.anatomy import Anatomy, as_path, is_by_head
from interv.models.cache import text_hash
from interv.models.families import LAYERLESS
from interv.models.made import MlpShape, classes_of, made_files, made_identity, mlp_shape
from interv.plan.cells import Cell, Plan, digest
from interv.plan.checks import check_text_model, check_tokens, located, unknown_component
from interv.plan.claims import check_claims
from interv.spec import LoadedSpec, axes
from interv.spec.made import MlpSection, TransformerSection
from interv.spec.patch import WHOLE
from interv.spec.schema import ModelSection
from interv.spec.train import RANKED, UNTRAINED, TrainGrid, TrainSite, TrainSpec
from interv.task.causal_builtin import causal_model
from interv.task.causal_model import CausalModel
from interv.task.causal_pairs import interchanges, samples
from interv.task.causal_text import answers, render, usable
from interv.task.causal_values import CausalError
from interv.task.causal_vectors import input_width
from interv.task.exchanges import Exchange, Reader, position_of, span_names

_VERSION = 1  # of what a fit's id means
SPLITS = ("train", "validation", "test")


@dataclass(frozen=True, slots=True)
class FitSite:
    """Where one intervention of a fit stands.

    Attributes:
        unit: a span, an index, or None: all positions.
        variables: indices of those that it exchanges.
    """

    component: str
    layer: int
    unit: str | int | None
    heads: tuple[int, ...] | None
    dims: tuple[int, ...] | None
    variables: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Place:
    """One line of the summary, without what is measured there.

    Attributes:
        layer, pos, role: of a fit of one site; else None and empty.
        set: the name of a fit of several sites.
        rank: of each variable; None where the type has none.
    """

    component: str
    layer: int | None
    pos: int | None
    role: str
    set: str
    type: str
    rank: int | None


@dataclass(frozen=True, slots=True)
class Fit(Cell):
    """An intervention that is trained, with one seed."""

    place: Place
    sites: tuple[FitSite, ...]
    linked: bool
    seed: int

    @property
    def type(self) -> str:
        return self.place.type

    @property
    def rank(self) -> int:
        return self.place.rank or 1


@dataclass(frozen=True)
class TrainPlan(Plan):
    """All fits, and the data that they share.

    Attributes:
        causal: the causal model, its words single tokens of the model.
        exchanges: of a model of prompts, all splits; a model of vectors draws its own.
        answer_ids: the tokens that are answers.
        shape: of an MLP that is made on the spot.
    """

    causal: CausalModel
    exchanges: tuple[Exchange, ...]
    answer_ids: tuple[int, ...]
    shape: MlpShape | None

    @property
    def executor(self) -> Literal["reference", "suffix"]:
        # Of a model that is trained itself nothing can be kept.
        whole = self.spec.train.what == "model" or self.spec.run.executor == "reference"
        return "reference" if whole else "suffix"

    @property
    def headline(self) -> str:
        more = f", {len(self.shuffled):,} on shuffled labels" if self.shuffled else ""
        return f"{len(self.fits):,} fits{more}"

    @property
    def fits(self) -> Sequence[Fit]:
        return [cell for cell in self.cells if isinstance(cell, Fit)]

    @property
    def anatomy(self) -> Anatomy | None:
        """Where the components stand, as far as the config says."""
        return _anatomy(self.files, self.shape)

    @property
    def places(self) -> list[Place]:
        return list(dict.fromkeys(fit.place for fit in self.fits))

    @property
    def shuffled(self) -> list[Fit]:
        """The fits that are trained once more on shuffled labels."""
        if not self.spec.controls.shuffled or self.spec.train.what == "model":
            return []
        first = self.spec.train.seeds[0]
        return [f for f in self.fits if f.seed == first and f.type not in UNTRAINED]

    def size(self, split: str) -> int:
        """Pairs that were asked for."""
        return int(getattr(self.spec.data, split))

    def tokens(self, prompt: int) -> int:
        if self.causal.is_vector:
            return 1
        return max(len(exchange.base.ids) for exchange in self.exchanges)

    def width(self, cell: Cell) -> int:
        return self.tokens(0)

    def first_layer(self, cell: Cell) -> int:
        assert isinstance(cell, Fit)
        return min(site.layer for site in cell.sites)

    def logits(self, prompt: int) -> int:
        assert self.facts is not None
        return self.facts.vocab_size

    def kept_tokens(self, cells: Iterable[Cell]) -> int:
        return sum(self.size(split) for split in SPLITS) * self.tokens(0) * 2

    def naive_tokens(self, cell: Cell) -> int:
        # A full forward of base and of each source, and their way back, for each pair and epoch.
        n = 1 + len(self.spec.variables)
        return self.size("train") * self.tokens(0) * n * 2 * int(self.spec.train.epochs)

    def labels_of(self, metrics: Sequence[str]) -> Iterator[dict[str, object]]:
        for place in self.places:
            for metric in (*METRICS, TASK):
                for exchanged in exchanged_names(self.spec):
                    columns = {k: "" if v is None else v for k, v in asdict(place).items()}
                    yield {**columns, "exchanged": exchanged, "metric": metric}


METRICS = ("iia", "iia_full", "iia_random", "iia_shuffled")
TASK = "task_accuracy"
"""Of a model that was trained itself, on the bases alone."""
PLACE_COLUMNS = tuple(field.name for field in fields(Place))


def exchanged_names(spec: TrainSpec) -> list[str]:
    """What may be exchanged in a pair, as a column says it; `any`: all pairs."""
    if len(spec.variables) == 1:
        return ["any"]
    mixture = spec.data.mixture or [*spec.variables, "+".join(spec.variables)]
    return ["any", *mixture]


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
    problems: list[Problem] = []
    files, shape = _files(loaded, causal)
    exchanges: list[Exchange] = []
    answer_ids: tuple[int, ...] = ()
    try:
        if causal.is_vector:
            if shape is None:
                raise CausalError("its inputs are vectors", "model: {kind: mlp}, or templates")
            interchanges(causal, spec.variables, 4, spec.seed, **_how(spec))
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


def _how(spec: TrainSpec) -> dict[str, Any]:
    data = spec.data
    return {
        "mixture": data.mixture,
        "changed": data.changed,
        "balance": data.balance,
        "same_template": data.same_template,
    }


def split_seed(spec: TrainSpec, split: str) -> int:
    """The seed of a split's pairs: splits share none but by chance."""
    return spec.seed * len(SPLITS) + SPLITS.index(split)


def vectors_of(plan: TrainPlan, split: str) -> Any:
    """The interchanges of a model of vectors, for one split."""
    spec = plan.spec
    return interchanges(
        plan.causal, spec.variables, plan.size(split), split_seed(spec, split), **_how(spec)
    )


def _problem(loaded: LoadedSpec[TrainSpec], error: CausalError) -> Problem:
    at = error.at
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


_TEXTS = 8192  # prompts whose words a tokenizer is made of


def task_identity(loaded: LoadedSpec[TrainSpec]) -> str:
    """The hash of a causal model's declaration, and of the plug-in file that it may use."""
    declared = loaded.spec.causal_model.model_dump(mode="json")
    return text_hash(json.dumps([declared, loaded.plugin.sha256 if loaded.plugin else ""]))


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
    reader = Reader(causal, tokenizer, section)
    found: list[Exchange] = []
    for split in SPLITS:
        n = int(getattr(spec.data, split))
        pairs = interchanges(
            causal,
            spec.variables,
            min(n, 16) if only_check else n,
            split_seed(spec, split),
            **_how(spec),
        )
        found += reader.exchanges(pairs, split, len(found))
    ids = {e.label_id for e in found}
    ids |= {said.answer_id for e in found for said in (e.base, *e.sources)}
    if not any(exchange.changes for exchange in found):
        message = f"no pair whose label changes with {' or '.join(spec.variables)}"
        raise CausalError(message, "variables on the way to the output", at=("variables",))
    return causal, found, tuple(sorted(ids))


def _anatomy(files: ModelFiles, shape: MlpShape | None) -> Anatomy | None:
    if shape is not None:
        return shape.anatomy
    facts = files.facts
    return Anatomy(facts.family, facts, files.config or {}) if facts else None


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


def _fits(
    loaded: LoadedSpec[TrainSpec],
    files: ModelFiles,
    shape: MlpShape | None,
    exchanges: Sequence[Exchange],
    key: str,
    problems: list[Problem],
) -> Iterator[Fit]:
    spec = loaded.spec
    expander = _Expander(loaded, _anatomy(files, shape), exchanges, problems)
    options = spec.intervention.model_dump(mode="json", exclude={"type", "rank"})
    training = spec.train.model_dump(mode="json", exclude={"seeds"})
    for i, grid in enumerate(spec.grid):
        for component, layer, pos, role, sites in expander.of(i, grid):
            for kind in spec.intervention.type:
                ranks: Sequence[int | None] = spec.intervention.rank if kind in RANKED else [None]
                for rank in ranks:
                    expander.check_rank(i, sites, kind, rank)
                    place = Place(component, layer, pos, role, grid.name, kind, rank)
                    name = [asdict(place), [asdict(s) for s in sites], grid.linked]
                    seeds = [spec.train.seeds[0]] if kind in UNTRAINED[:1] else spec.train.seeds
                    if spec.train.what == "model":
                        seeds = spec.train.seeds
                    for seed in seeds:
                        told = json.dumps([name, seed, options, training], sort_keys=True)
                        yield Fit(digest(key, told), 0, place, sites, grid.linked, seed)


Expanded = tuple[str, int | None, int | None, str, tuple[FitSite, ...]]


class _Expander:
    """Places of a grid; what is wrong with it goes to `problems`, each mistake once."""

    def __init__(
        self,
        loaded: LoadedSpec[TrainSpec],
        anatomy: Anatomy | None,
        exchanges: Sequence[Exchange],
        problems: list[Problem],
    ) -> None:
        self._loaded, self._anatomy, self._exchanges = loaded, anatomy, exchanges
        self._problems = problems
        self._told: set[str] = set()
        self._all = tuple(range(len(loaded.spec.variables)))

    def of(self, i: int, grid: TrainGrid) -> Iterator[Expanded]:
        if self._anatomy is None:
            return
        if grid.set is not None:
            sites = [s for j, one in enumerate(grid.set) for s in self._site((i, "set", j), one)]
            if sites:
                yield "", None, None, "", tuple(sites)
            return
        singles = list(self._product(i, grid))
        if not grid.together:
            yield from singles
        elif singles:
            components = {single[0] for single in singles}
            component = components.pop() if len(components) == 1 else ""
            yield component, None, None, "", tuple(s for one in singles for s in one[4])

    def _product(self, i: int, grid: TrainGrid) -> Iterator[Expanded]:
        for j, component in enumerate(grid.component or ()):
            if not self._known(("grid", i, "component", j), component):
                continue
            for layer in self._layers(i, grid, component):
                heads, dims = self._columns(("grid", i), component, grid.heads, grid.dims)
                for unit in self._units(i, grid):
                    pos = unit if isinstance(unit, int) else None
                    role = unit if isinstance(unit, str) else "" if unit is not None else WHOLE
                    if not self._exchanges:
                        role = ""
                    site = FitSite(component, layer, unit, heads, dims, self._all)
                    yield component, layer, pos, role, (site,)

    def _site(self, at: tuple[str | int, ...], site: TrainSite) -> Iterator[FitSite]:
        at = ("grid", *at)
        if not self._known((*at, "component"), site.component):
            return
        assert self._anatomy is not None
        if self._anatomy.has_layers(site.component) and site.layer >= self._anatomy.n_layers:
            message = f"layer {site.layer}: the model has {self._anatomy.n_layers} layers"
            self._tell((*at, "layer"), message, f"0 to {self._anatomy.n_layers - 1}")
            return
        unit = None if site.position == WHOLE else site.position
        self._check_unit((*at, "position"), unit)
        heads, dims = self._columns(at, site.component, site.heads, site.dims)
        names = self._loaded.spec.variables
        which = self._all if site.variable is None else (names.index(site.variable),)
        yield FitSite(site.component, site.layer, unit, heads, dims, which)

    def _known(self, at: tuple[str | int, ...], component: str) -> bool:
        assert self._anatomy is not None
        problem = unknown_component(self._loaded, at, component, self._anatomy)
        if component in ("attention_weight", "final_norm", "logits"):
            message = f"nothing is trained at {component}"
            problem = self._loaded.problem(at, message, "a component of a block")
        if problem is not None:
            self._problems.append(problem)
        return problem is None

    def _layers(self, i: int, grid: TrainGrid, component: str) -> list[int]:
        assert self._anatomy is not None
        if as_path(component) or component in LAYERLESS:
            return [0]
        try:
            return list(dict.fromkeys(axes.indices(grid.layers, self._anatomy.n_layers)))
        except axes.AxisError as error:
            message = f"layer {error}: the model has {self._anatomy.n_layers} layers"
            self._tell(("grid", i, "layers"), message, error.expected)
            return []

    def _columns(
        self, at: tuple[str | int, ...], component: str, heads: Any, dims: Any
    ) -> tuple[tuple[int, ...] | None, tuple[int, ...] | None]:
        assert self._anatomy is not None
        found_heads = found_dims = None
        if heads is not None:
            units = self._anatomy.n_units(component) if is_by_head(component) else None
            if not units:
                self._tell((*at, "heads"), f"{component} is not by head", "a head_... component")
            else:
                found_heads = self._indices((*at, "heads"), "head", heads, units)
        if dims is not None:
            width = self._anatomy.width(component)
            units = self._anatomy.n_units(component)
            if found_heads is not None and width and units:
                width //= units
            found_dims = self._indices((*at, "dims"), "column", dims, width or 1 << 20)
        return found_heads, found_dims

    def _indices(
        self, at: tuple[str | int, ...], what: str, value: Any, size: int
    ) -> tuple[int, ...] | None:
        try:
            return tuple(dict.fromkeys(axes.indices(value, size)))
        except axes.AxisError as error:
            self._tell(at, f"{what} {error}", error.expected)
            return None

    def _units(self, i: int, grid: TrainGrid) -> list[int | str | None]:
        if not self._exchanges:
            return [None]  # vectors have no positions
        found: list[int | str | None] = []
        length = min(len(exchange.base.ids) for exchange in self._exchanges)
        for item in axes.items(grid.positions):
            if item == WHOLE:
                found.append(None)
                continue
            try:
                numbers = axes.expand(item, length)
            except axes.AxisError as error:
                message = f"position {error}: the shortest prompt has {length} tokens"
                self._tell(("grid", i, "positions"), message, error.expected)
                continue
            if isinstance(item, int) and item < 0:
                numbers = [item]
            at = ("grid", i, "positions")
            units = [item] if numbers is None else numbers
            found += [unit for unit in units if self._check_unit(at, unit)]
        return list(dict.fromkeys(found))

    def _check_unit(self, at: tuple[str | int, ...], unit: int | str | None) -> bool:
        for exchange in self._exchanges:
            for said in (exchange.base, *exchange.sources):
                try:
                    position_of(said, unit)
                except KeyError:
                    names = span_names(self._exchanges)
                    message = f"no span '{unit}' in {said.text!r}"
                    expected = f"an index, or one of: {', '.join(names)}"
                    self._tell(at, message, expected, nearest(unit, names))
                    return False
                except IndexError as error:
                    self._tell(at, f"{error}: {said.text!r}", "a position that every prompt has")
                    return False
        return True

    def check_rank(self, i: int, sites: Sequence[FitSite], kind: str, rank: int | None) -> None:
        """That the dimensions of all variables fit into every site."""
        if rank is None or self._anatomy is None:
            return
        for site in sites:
            width = self._width(site)
            needed = rank if kind == "lora" else rank * len(site.variables)
            if width is not None and needed > width:
                message = f"rank {rank} for {len(site.variables)} variable(s): {needed} dimensions"
                expected = f"at most {width}, the width of {site.component}"
                self._tell(("intervention", "rank"), message, expected)

    def _width(self, site: FitSite) -> int | None:
        assert self._anatomy is not None
        if site.dims is not None:
            return len(site.dims) * (len(site.heads) if site.heads else 1)
        at = getattr(self._anatomy, "width_at", None)
        width = at(site.component, site.layer) if at else self._anatomy.width(site.component)
        units = self._anatomy.n_units(site.component)
        if site.heads is not None and width and units:
            return int(width) // units * len(site.heads)
        return None if width is None else int(width)

    def _tell(
        self, at: tuple[str | int, ...], message: str, expected: str, near: str | None = None
    ) -> None:
        if message not in self._told:
            self._told.add(message)
            self._problems.append(self._loaded.problem(at, message, expected, near))
