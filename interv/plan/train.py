"""The plan of a train-das spec: its places, fits and pairs. Pure, without torch."""

from __future__ import annotations

import functools
import json
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

from interv.models import ModelFiles
from interv.models.anatomy import Anatomy
from interv.models.cache import text_hash
from interv.models.made import MlpShape
from interv.plan.cells import Cell, Plan
from interv.plan.train_grid import FitSite
from interv.spec import LoadedSpec
from interv.spec.train import TrainSpec, part_of
from interv.task.causal_draws import Interchanges
from interv.task.causal_model import CausalModel
from interv.task.causal_splits import pair_keys, splits
from interv.task.exchanges import Exchange

SPLITS = ("train", "validation", "test")


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
        return fitted_anatomy(self.files, self.shape)

    @property
    def places(self) -> list[Place]:
        return list(dict.fromkeys(fit.place for fit in self.fits))

    @property
    def shuffled(self) -> list[Fit]:
        """The fits that are trained once more on shuffled labels."""
        if not self.spec.controls.shuffled or self.spec.train.what == "model":
            return []
        first = self.spec.train.seeds[0]
        trains = self.spec.intervention.trains
        return [f for f in self.fits if f.seed == first and trains(f.type)]

    def size(self, split: str) -> int:
        """Pairs that were asked for."""
        return int(getattr(self.spec.data, split))

    @functools.cached_property
    def vectors(self) -> Mapping[str, Interchanges]:
        """Every split's pairs, of a model of vectors."""
        return draw_splits(self.causal, self.spec)

    @functools.cached_property
    def pairs(self) -> Mapping[str, Sequence[Hashable]]:
        """Of every split what tells its pairs apart; empty where no tokenizer is at hand."""
        if not self.causal.is_finite:  # each is another
            return {split: [(split, i) for i in range(self.size(split))] for split in SPLITS}
        if self.causal.is_vector:
            return {s: pair_keys(self.causal, some) for s, some in self.vectors.items()}
        found: dict[str, list[Hashable]] = {split: [] for split in SPLITS}
        for e in self.exchanges:
            exchanged = [name in e.exchanged for name in self.spec.variables]
            sources = [s.text if on else None for s, on in zip(e.sources, exchanged, strict=True)]
            found[e.split].append((e.base.text, *sources))
        return found

    @property
    def shortages(self) -> list[str]:
        """Which splits have fewer pairs than were asked for, and why."""
        distinct = len({key for keys in self.pairs.values() for key in keys})
        return [
            f"{split}: {len(keys):,} of {self.size(split):,} pairs: there are {distinct:,} "
            "distinct ones, each in one split"
            for split, keys in self.pairs.items()
            if 0 < len(keys) < self.size(split)
        ]

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
    return ["any", *(part_of(text, spec.variables) for text in mixture)]


def how_drawn(spec: TrainSpec) -> dict[str, Any]:
    """What of a spec says how pairs are drawn."""
    data = spec.data
    return {
        "mixture": data.mixture,
        "changed": data.changed,
        "balance": data.balance,
        "same_template": data.same_template,
    }


def split_seed(spec: TrainSpec, split: str) -> int:
    """The seed of a split's draws."""
    return spec.seed * len(SPLITS) + SPLITS.index(split)


def draw_splits(
    causal: CausalModel, spec: TrainSpec, most: int | None = None
) -> dict[str, Interchanges]:
    """Every split's pairs, none in two of them.

    Args:
        most: no more pairs of a split than these.

    Raises:
        CausalError: there are too few.
    """
    sizes = {split: int(getattr(spec.data, split)) for split in SPLITS}
    return splits(
        causal,
        spec.variables,
        {split: n if most is None else min(n, most) for split, n in sizes.items()},
        {split: split_seed(spec, split) for split in SPLITS},
        held_out=spec.data.held_out,
        **how_drawn(spec),
    )


def vectors_of(plan: TrainPlan, split: str) -> Interchanges:
    """The interchanges of a model of vectors, for one split."""
    return plan.vectors[split]


def task_identity(loaded: LoadedSpec[TrainSpec]) -> str:
    """The hash of a causal model's declaration, and of the plug-in file that it may use."""
    declared = loaded.spec.causal_model.model_dump(mode="json")
    return text_hash(json.dumps([declared, loaded.plugin.sha256 if loaded.plugin else ""]))


def fitted_anatomy(files: ModelFiles, shape: MlpShape | None) -> Anatomy | None:
    """Where the components of a plan's model stand."""
    if shape is not None:
        return shape.anatomy
    facts = files.facts
    return Anatomy(facts.family, facts, files.config or {}) if facts else None
