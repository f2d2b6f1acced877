"""From a patch spec to its cells: pure, without torch.

A cell is one patch on one pair of prompts: sites that are changed together, or the path from a
sender to a receiver. Its rows are the prompts that resample ablation draws; else there is one.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from typing import Any

from interv.errors import Problem, SpecError
from interv.models import ModelFiles
from interv.models.cache import text_hash
from interv.plan.cells import Cell, Plan, digest
from interv.plan.checks import (
    check_rotary,
    check_tokens,
    located,
    predicts_masks,
    trained_hashes,
    unknown_components,
)
from interv.plan.claims import check_claims
from interv.plan.grid import Expander, Place, Spot
from interv.plan.groups import check_stand_ins, stand_ins, told_groups
from interv.plan.patch_checks import check_metrics, check_parts
from interv.plan.statistics import fewest_for_interval, unreachable
from interv.spec import LoadedSpec, PatchSpec
from interv.spec.metrics import MetricName, parse_metric
from interv.task.left_out import LeftOut, told_copies
from interv.task.pairs import Pair, read_pairs

_VERSION = 3  # of what a cell's id means; a change makes earlier results strangers


@dataclass(frozen=True, slots=True)
class Patch(Cell):
    """Sites changed together in the base run; or, with receivers, only on the way to these.

    Attributes:
        receivers: where the path ends; empty: at the logits, or no path at all.
        freeze: what stays as in the base run, of a path; None: it is no path.
    """

    spots: tuple[Spot, ...]
    receivers: tuple[Spot, ...] = ()
    freeze: tuple[str, ...] | None = None


@dataclass(frozen=True, slots=True)
class PatchLabel:
    """One line of the results: how the spec came to ask for a cell."""

    cell: Patch
    prompt: int
    place: Place


@dataclass(frozen=True)
class PatchPlan(Plan):
    """A patch's plan.

    Attributes:
        pairs: by index, in the data's order.
        left_out: pairs of unequal length, and copies of others.
        metrics: what the spec names, taken apart.
        drawn: for mean and resample, the pairs whose prompts stand in for each.
    """

    pairs: dict[int, Pair]
    left_out: tuple[LeftOut, ...]
    labels: tuple[PatchLabel, ...]
    metrics: tuple[MetricName, ...]
    drawn: dict[int, tuple[int, ...]]

    @property
    def swaps(self) -> bool:
        """Whether clean and corrupted runs exchange states (and no ablation is made)."""
        return self.spec.intervention.type in ("denoise", "noise")

    @property
    def relative_to(self) -> str:
        """The run whose value an effect is the difference from."""
        return "corrupted" if self.spec.intervention.type == "denoise" else "clean"

    @property
    def few(self) -> bool:
        """Whether the logits of the answers are all that the metrics need."""
        return not any(metric.needs_vocabulary for metric in self.metrics)

    @property
    def diverges(self) -> bool:
        """Whether a metric compares with all that the clean run predicts."""
        return any(metric.is_divergence for metric in self.metrics)

    @property
    def places(self) -> list[Place]:
        """Lines of summary.csv, each once, in the grid's order."""
        return list(dict.fromkeys(label.place for label in self.labels))

    @cached_property
    def by_prompt(self) -> dict[int, list[Patch]]:
        """Cells of each pair, in the grid's order."""
        found: dict[int, list[Patch]] = {index: [] for index in self.pairs}
        for cell in dict.fromkeys(label.cell for label in self.labels):
            found[cell.prompt].append(cell)
        return found

    def nodes_of(self, prompt: int) -> list[Patch]:
        """A pair's cells that are no paths."""
        return [cell for cell in self.by_prompt[prompt] if cell.freeze is None]

    @property
    def expected_cells(self) -> Sequence[Cell]:
        attribution = self.spec.attribution
        if attribution is None or attribution.verify == "all":
            return self.cells
        # Which places it will be is not known yet: as many.
        some = self.cells_of([p for p in self.places if not p.receiver][: attribution.verify])
        return [*some, *(c for c in self.cells if isinstance(c, Patch) and c.freeze is not None)]

    def base_ids(self, pair: Pair, tail: tuple[int, ...] = ()) -> tuple[int, ...]:
        """The prompt that is changed, with what is given of an answer."""
        if self.relative_to == "clean":
            return pair.run_ids(tail)
        assert pair.corrupted_ids is not None
        return pair.corrupted_run_ids(tail)

    def tokens(self, prompt: int) -> int:
        pair = self.pairs[prompt]
        return sum(len(pair.ids) + len(tail) for tail in pair.tails)

    def width(self, cell: Cell) -> int:
        assert isinstance(cell, Patch)
        pair = self.pairs[cell.prompt]
        first = min(spot.first for spot in cell.spots)
        if self.swaps:
            last = max(spot.last(len(pair.ids)) for spot in cell.spots)
            if last < pair.first_changed:
                return 0
            first = max(first, pair.first_changed)
        if self.reach != "positions":
            first = 0
        rows = 2 if cell.receivers else 1
        return rows * (self.tokens(cell.prompt) - len(pair.tails) * first)

    def first_layer(self, cell: Cell) -> int:
        assert isinstance(cell, Patch)
        return min(spot.layer + (spot.component == "block_output") for spot in cell.spots)

    def logits(self, prompt: int) -> int:
        assert self.facts is not None
        pair = self.pairs[prompt]
        if self.few:
            return len(pair.all_ids)
        return sum(len(tail) + 1 for tail in pair.tails) * self.facts.vocab_size

    def kept_tokens(self, cells: Iterable[Cell]) -> int:
        # Clean and corrupted once for their values, and once for their states.
        return sum(4 * self.tokens(p) for p in {cell.prompt for cell in cells})

    def naive_tokens(self, cell: Cell) -> int:
        assert isinstance(cell, Patch)
        # Source and patched run, and of a path to a receiver the one that is recorded.
        return self.tokens(cell.prompt) * (3 if cell.receivers else 2) * self.draws

    def labels_of(self, metrics: Sequence[str]) -> Iterator[dict[str, object]]:
        for place in self.places:
            for metric in metrics:
                columns = {k: "" if v is None else v for k, v in asdict(place).items()}
                yield {**columns, "metric": metric}

    @property
    def groups(self) -> str:
        """What prompts an ablation takes activations from, in words; empty without one."""
        return told_groups(list(self.pairs.values()), self.drawn) if self.drawn else ""

    @property
    def notes(self) -> list[str]:
        n, statistics = len(self.pairs), self.spec.statistics
        found = told_copies(self.left_out, n)
        fewest = fewest_for_interval(statistics.level)
        if self.pairs and n < fewest:
            level = f"{100 * statistics.level:g} %"
            found.append(f"no intervals: over {n} prompts, and {level} needs {fewest}")
        if self.pairs and statistics.test and (n_places := len(self.places)):
            told = unreachable(n, n_places, statistics.permutations, statistics.level)
            found += [told] if told else []
        return found

    def cells_of(self, places: Iterable[Place]) -> list[Patch]:
        """Cells of some lines of the results, in the plan's order."""
        wanted = set(places)
        return list(
            {label.cell.id: label.cell for label in self.labels if label.place in wanted}.values()
        )


PLACE_COLUMNS = tuple(field.name for field in fields(Place))


def make_patch_plan(loaded: LoadedSpec[PatchSpec], *, only_check: bool = False) -> PatchPlan:
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
    pairs: list[Pair] = []
    left_out: list[LeftOut] = []
    problems: list[Problem] = list(check_metrics(loaded))
    if files.tokenizer:
        pairs, left_out, more = read_pairs(loaded, files.tokenizer, masked=predicts_masks(files))
        problems += more
        if files.facts:
            lengths = [len(p.ids) + n for p in pairs for n in (0, *map(len, p.tails))]
            problems += check_rotary(loaded, lengths, files.facts)
        for pair in pairs if files.facts else ():
            assert files.facts is not None
            texts = (pair.ids, pair.corrupted_ids or (), *pair.all_ids)
            longest = len(pair.ids) + max(len(tail) for tail in pair.tails)
            if wrong := list(check_tokens(loaded, pair.index, longest, texts, files.facts)):
                problems += wrong
                break
    expander = Expander(loaded, files)
    # Each mistake once, with the first prompt that shows it.
    problems += check_parts(loaded, files, pairs)
    drawn = stand_ins(spec, pairs)
    problems += check_stand_ins(loaded, pairs, drawn)
    keys = _prompt_keys(loaded, files, pairs, drawn)
    labels: list[PatchLabel] = []
    if files.facts and (pairs or not files.tokenizer):
        expand = bool(spec.reference) or not only_check
        for pair in pairs:
            if expand or pair is pairs[0]:
                labels += _labels(expander, pair, keys[pair.index], several=len(pairs) > 1)
            else:
                expander.check_positions(pair)
            if expander.problems:
                break
        problems += expander.problems
    if problems:
        raise SpecError(problems)
    if only_check and not spec.reference:
        labels = []
    plan = PatchPlan(
        loaded=loaded,
        files=files,
        facts=files.facts,
        cells=tuple({label.cell.id: label.cell for label in labels}.values()),
        draws=spec.intervention.samples if spec.intervention.type == "resample" else 1,
        baselines={p: digest(key, "baseline") for p, key in keys.items()},
        identity=_identity(loaded, files, pairs, keys),
        unchecked=(*files.absent, *unknown_components(files)),
        pairs={p.index: p for p in pairs},
        left_out=tuple(left_out),
        labels=tuple(labels),
        metrics=tuple(parse_metric(name) for name in spec.metric),
        drawn=drawn,
    )
    if problems := list(check_claims(plan)):
        raise SpecError(problems)
    return plan


def _labels(expander: Expander, pair: Pair, key: str, *, several: bool) -> list[PatchLabel]:
    found: dict[tuple[str, Place], PatchLabel] = {}
    for place, spots, receivers, freeze in expander.of(pair, several=several):
        name = json.dumps([[asdict(s) for s in spots], [asdict(s) for s in receivers], freeze])
        cell = Patch(digest(key, name), pair.index, spots, receivers, freeze)
        found.setdefault((cell.id, place), PatchLabel(cell, pair.index, place))
    return list(found.values())


def _prompt_keys(
    loaded: LoadedSpec[PatchSpec],
    files: ModelFiles,
    pairs: Sequence[Pair],
    drawn: dict[int, tuple[int, ...]],
) -> dict[int, str]:
    """For each pair the hash of what all its cells have in common."""
    spec = loaded.spec
    model = {
        "identity": files.identity or files.label,
        "dtype": spec.model.dtype,
        "attn_implementation": spec.model.attn_implementation,
    }
    metrics = [parse_metric(name) for name in spec.metric]
    own = sorted({m.of for m in metrics if not m.is_plain})
    read = {
        "few": not any(m.needs_vocabulary for m in metrics),
        "diverges": any(m.is_divergence for m in metrics),
        "own": [own, loaded.plugin.sha256 if loaded.plugin and own else ""],
    }
    intervention = _intervention(spec)
    shared = text_hash(json.dumps([_VERSION, model, intervention, read], sort_keys=True))
    by_index = {p.index: p for p in pairs}
    over = spec.intervention.over
    keys = {}
    for p in pairs:
        others = [by_index[i].source(over) for i in drawn.get(p.index, ())]
        answers = [p.answer_ids, p.wrong_ids, p.read, p.behind]
        own_text = [p.ids, p.corrupted_ids, answers, others]
        keys[p.index] = text_hash(json.dumps([shared, own_text]))
    return keys


def _intervention(spec: PatchSpec) -> dict[str, Any]:
    """What decides an intervention."""
    given = spec.intervention.model_dump(exclude={"trained", "least"})
    if spec.intervention.trained is not None:
        given["trained"] = trained_hashes(spec.intervention.trained)
    return given


def _identity(
    loaded: LoadedSpec[PatchSpec],
    files: ModelFiles,
    pairs: Sequence[Pair],
    keys: dict[int, str],
) -> str | None:
    if files.identity is None or files.tokenizer is None:
        return None
    spec = loaded.spec
    asked = {"kind", "seed", "intervention", "grid", "paths", "attribution", "decompose"}
    dump = spec.model_dump(mode="json", include={*asked, "circuit", "metric"})
    dump["intervention"] = _intervention(spec)
    more = [spec.data.keep, spec.figures.patterns, loaded.plugin.sha256 if loaded.plugin else ""]
    # Spans change no value, but what the grid means by a name.
    prompts = [[keys[p.index], sorted(p.spans.items())] for p in pairs]
    return text_hash(json.dumps([dump, more, prompts], sort_keys=True))
