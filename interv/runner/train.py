"""Running a train-das plan: the model on the task, then fit after fit, each with its controls."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from interv.engine import LoadedModel
from interv.engine.batch import BatchRunner
from interv.engine.load import load_model
from interv.engine.wide import in_float64
from interv.errors import EngineError
from interv.keep import Part, Trained, write
from interv.plan import ExecutorName
from interv.plan.cells import digest
from interv.plan.cost import free_cpu_bytes
from interv.plan.train import SPLITS, Fit, TrainPlan, task_identity
from interv.runner import sweep
from interv.runner.certify import Certificate, Measured, free_bytes, judged, refuse
from interv.runner.journal import Journal, Record
from interv.runner.sweep import Kind, Step, Worker, free_gpu_bytes
from interv.spec.made import MlpSection, TransformerSection
from interv.spec.schema import ModelSection
from interv.storage import copied, writing
from interv.train.data import Group, groups_of
from interv.train.fit import (
    Interchanging,
    Intervening,
    Split,
    hits,
    interchanged,
    prepare,
    right,
)
from interv.train.loop import State, train
from interv.train.made import make_mlp, make_transformer
from interv.train.parts import FitPart

FITS = "fits"
_SHARE = 4  # of the memory that is free, what may be kept of the pairs
_RANDOM = 104_651
_CERTIFIED = 8  # pairs


def train_steps(
    plan: TrainPlan, _journal: Journal, _executor: ExecutorName, _tokens: int
) -> Iterator[Step]:
    """The model on the task; each fit; those with controls of their own."""
    yield Step("the model on the task", (plan.baselines[0],), "prompts", None)
    fits, shuffled = plan.fits, plan.shuffled
    total = len(fits) + len(shuffled)
    for i, fit in enumerate(fits, start=1):
        yield Step(described(fit), (fit.id,), "fit", fit, i, total)
    for i, fit in enumerate(shuffled, start=len(fits) + 1):
        what = f"{described(fit)}, shuffled labels"
        yield Step(what, (shuffled_id(fit),), "shuffled", fit, i, total)


def described(fit: Fit) -> str:
    """A fit in a few words."""
    place = fit.place
    at = place.set or ".".join(
        str(part) for part in (place.component, place.layer, place.role or place.pos) if part != ""
    )
    rank = f" rank {place.rank}" if place.rank else ""
    return f"{place.type}{rank} at {at}, seed {fit.seed}"


def shuffled_id(fit: Fit) -> str:
    """The id of a fit's control."""
    return digest(fit.id, "shuffled")


class TrainWorker(Worker[TrainPlan]):
    """Trains a plan's fits, one after the other."""

    def __init__(self, plan: TrainPlan, model: LoadedModel) -> None:
        super().__init__(plan, model)
        asked, where = plan.spec.train.autocast, model.device.type
        if asked is not None and where != "cuda":
            raise EngineError(f"train.autocast: {asked} is for CUDA; this is {where}")
        self.runner = BatchRunner(
            model.module, model.anatomy, checkpointing=plan.spec.train.checkpointing
        )
        self._all: dict[str, list[Group]] = {}
        self._used: dict[str, list[Group]] = {}
        self._splits: tuple[Any, dict[str, Split]] | None = None
        among = plan.answer_ids if plan.spec.data.among == "answers" else ()
        self._among = torch.tensor(among) if among else None

    @property
    def notes(self) -> dict[str, Any]:
        return {"attn_implementation": self.model.attn_implementation}

    def wanted(self) -> set[str]:
        return super().wanted() | {shuffled_id(fit) for fit in self.plan.shuffled}

    def takes_over(self, key: str, folder: Path) -> bool:
        """A fit is its record and its weights."""
        if all(key != fit.id for fit in self.plan.fits):
            return True
        return copied(folder / FITS / key, self.folder / FITS / key)

    def tokens(self) -> int:
        return 0

    def choose(self, tokens: int) -> tuple[ExecutorName, Certificate | None]:
        """Compare the short way with the whole model, on a few pairs of each kind of fit.

        Raises:
            EngineError: they differ.
        """
        asked = self.plan.spec.run.executor
        trained = self.plan.spec.train.what == "model"
        if asked == "reference" or trained or self.model.anatomy.reach == "nothing":
            self.runner.whole = True
            return "reference", None
        kinds = {(fit.type, fit.sites[0].component): fit for fit in self.plan.fits}
        worst: Certificate | None = None
        for (kind, component), fit in kinds.items():
            found = self._certified(fit, f"{kind} at {component}")
            if worst is None or found.excess > worst.excess:
                worst = found
        if worst is not None and not worst.holds:
            if self.plan.spec.run.on_uncertified != "reference":
                raise refuse(worst)
            self.runner.whole = True
            return "reference", worst
        return "suffix", worst

    def _certified(self, fit: Fit, what: str) -> Certificate:
        group = max(self._groups("train"), key=len)
        # Principal components want more activations than there are components.
        n = max(_CERTIFIED, fit.rank * len(self.plan.spec.variables) + 1)
        some = group.take(torch.arange(min(len(group), n)))

        def wide() -> Measured:
            model = self.model.module
            copied = in_float64(model, free_bytes(model))
            return self._measured(fit, some, BatchRunner(copied, self.model.anatomy))

        return judged([what] * len(some), self._measured(fit, some, self.runner), wide)

    @torch.no_grad()
    def _measured(self, fit: Fit, some: Group, runner: BatchRunner) -> Measured:
        """Logits of a fit as it begins: the short way and by the whole model."""
        split = prepare(runner, [some], fit, self._budget)
        parts = Intervening(self.plan.spec, fit, runner, split, split, self._among, fit.seed).parts
        [prepared] = split.groups

        def whole(rows: Tensor) -> Tensor:
            read = None if some.read is None else some.read[rows]
            return runner.logits(some.base[rows], prepared.edits(parts, rows), read)

        rows = torch.arange(len(some))
        return Measured(
            list(prepared.logits(rows, prepared.edits(parts, rows))),
            list(whole(rows)),
            lambda: [whole(rows[i : i + 1])[0] for i in range(len(rows))],
        )

    def prompts(self, step: Step) -> dict[str, Record]:
        """Which pairs the model answers rightly, as bits; its accuracy on the bases."""
        used: dict[str, str] = {}
        counts: dict[str, list[int]] = {}
        n_right = n_bases = 0
        for split in SPLITS:
            groups = self._groups(split)
            total = sum(len(group) for group in groups)
            keep = torch.ones(total, dtype=torch.bool)
            for group in groups:
                base = self._right(group, group.base, group.own, group.read)
                n_right, n_bases = n_right + int(base.sum()), n_bases + len(group)
                ok = base
                for variable, source in enumerate(group.sources):
                    read = None
                    if group.read is not None:
                        read = torch.tensor([e.sources[variable].read for e in group.said])
                    own = self._right(group, source, group.source_own[:, variable], read)
                    ok = ok & (own | ~group.exchanged[:, variable])
                if self.plan.spec.data.keep == "correct":
                    keep[group.index] = ok
            used[split] = to_bits(keep)
            counts[split] = [int(keep.sum()), total]
        accuracy = n_right / n_bases
        data = self.plan.spec.data
        if accuracy < data.min_accuracy:
            raise EngineError(
                f"{self.plan.files.label} answers {accuracy:.1%} of {n_bases} prompts rightly, "
                f"below data.min_accuracy {data.min_accuracy:.0%}: it cannot do this task. Change "
                "the templates or the model, or lower data.min_accuracy"
            )
        for split, (kept, total) in counts.items():
            if not kept:
                raise EngineError(
                    f"none of {total} {split} pairs has base and sources that the model answers "
                    "rightly: more pairs, or data.keep: all"
                )
        return {step.ids[0]: {"accuracy": accuracy, "n": n_bases, "used": used, "counts": counts}}

    @torch.no_grad()
    def _right(self, group: Group, inputs: Tensor, labels: Tensor, read: Tensor | None) -> Tensor:
        found = []
        for rows in group.rows():
            at = None if read is None else read[rows]
            logits = self.runner.logits(inputs[rows], (), at)
            found.append(right(logits, labels[rows], self._among))
        return torch.cat(found)

    def fit(self, step: Step) -> dict[str, Record]:
        """Train one fit, evaluate it with its controls, keep its weights."""
        fit: Fit = step.payload
        if self.plan.spec.train.what == "model":
            return {fit.id: self._trained_model(fit)}
        splits = self._prepared_splits(fit)
        trainee = self._trainee(fit, splits)
        checkpoint = self.folder / FITS / f"{fit.id}.checkpoint"
        state = self._train(trainee, fit, checkpoint)
        record: Record = {"iia": self._hits(splits["test"], trainee.parts), "curve": state.curve}
        controls = self.plan.spec.controls
        if controls.full:
            record["iia_full"] = self._full(splits["test"])
        if controls.random and fit.type != "vanilla":
            record["iia_random"] = self._hits(splits["test"], trainee.random(fit.seed + _RANDOM))
        self._write(fit, trainee.parts, record)
        checkpoint.unlink(missing_ok=True)
        return {fit.id: record}

    def shuffled(self, step: Step) -> dict[str, Record]:
        """Train a fit on labels that belong to other pairs; evaluate it on the right ones."""
        fit: Fit = step.payload
        splits = self._prepared_splits(fit)
        labels = torch.cat([prepared.group.label for prepared in splits["train"].groups])
        order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(fit.seed + 1))
        trainee = self._trainee(fit, splits, labels[order])
        checkpoint = self.folder / FITS / f"{step.ids[0]}.checkpoint"
        self._train(trainee, fit, checkpoint)
        record = {"iia_shuffled": self._hits(splits["test"], trainee.parts)}
        checkpoint.unlink(missing_ok=True)
        return {step.ids[0]: record}

    def _trainee(
        self, fit: Fit, splits: Mapping[str, Split], labels: Tensor | None = None
    ) -> Intervening:
        return Intervening(
            self.plan.spec,
            fit,
            self.runner,
            splits["train"],
            splits["validation"],
            self._among,
            fit.seed,
            labels,
        )

    def _train(self, trainee: Intervening, fit: Fit, checkpoint: Path) -> State:
        spec = self.plan.spec
        if not spec.intervention.trains(fit.type):
            return State()
        return train(
            trainee,
            spec.train,
            spec.intervention,
            fit.seed,
            checkpoint,
            self.tell,
        )

    def _trained_model(self, fit: Fit) -> Record:
        """Train a copy of the model itself; IIA and task accuracy of it."""
        spec = self.plan.spec
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(fit.seed)
            module = copy.deepcopy(self.model.module)
        runner = BatchRunner(
            module, self.model.anatomy, whole=True, checkpointing=spec.train.checkpointing
        )
        groups = {split: self._kept_groups(split) for split in SPLITS}
        trainee = Interchanging(
            spec, fit, runner, groups["train"], groups["validation"], self._among
        )
        checkpoint = self.folder / FITS / f"{fit.id}.checkpoint"
        state = train(trainee, spec.train, spec.intervention, fit.seed, checkpoint, self.tell)
        module.requires_grad_(False)
        task, swapped = [], []
        with torch.no_grad():
            for group in groups["test"]:
                for rows in group.rows():
                    some = group.take(rows)
                    plain = runner.logits(some.base, (), some.read)
                    task.append(right(plain, some.own, self._among))
                    swap = interchanged(runner, fit, some)
                    swapped.append(right(swap, some.label, self._among))
        path = self.folder / FITS / fit.id / "model.safetensors"
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            tensors = {k: v.contiguous().clone() for k, v in module.state_dict().items()}
            save_file(tensors, path)
        checkpoint.unlink(missing_ok=True)
        order = torch.cat([group.index for group in groups["test"]])
        return {
            "iia": _text(torch.cat(swapped), order),
            "task_accuracy": _text(torch.cat(task), order),
            "curve": state.curve,
        }

    def _hits(self, split: Split, parts: Sequence[FitPart]) -> str:
        found = hits(split, lambda prepared, rows: prepared.edits(parts, rows), self._among)
        return _text(found, torch.cat([prepared.group.index for prepared in split.groups]))

    def _full(self, split: Split) -> str:
        """Of pairs in which one variable is exchanged: of several the whole is not one state."""
        found = hits(split, lambda prepared, rows: prepared.whole(rows), self._among)
        order = torch.cat([prepared.group.index for prepared in split.groups])
        single = torch.cat([prepared.group.exchanged.sum(1) == 1 for prepared in split.groups])
        return _text(found, order, single)

    def _write(self, fit: Fit, parts: Sequence[FitPart], record: Record) -> None:
        """The trained intervention, as `interv load` reads it."""
        names = self.plan.spec.variables
        spots = {site: self._splits_of(fit).spots[site].site for site in fit.sites}
        kept = tuple(
            Part(spots[part.site], part.site.unit, names[part.variable], part.intervention)
            for part in parts
        )
        told = {k: v for k, v in record.items() if k.startswith("iia")}
        about = {
            "kind": "train-das",
            "name": self.plan.spec.name,
            "model": self.plan.files.label,
            "weights": self.plan.files.identity,
            "dtype": self.plan.spec.model.dtype,
            "causal_model": self.plan.causal.name,
            "fit": fit.id,
            "seed": fit.seed,
            "results": {k: _share(v) for k, v in told.items()},
        }
        write(self.folder / FITS / fit.id, Trained(kept, about))

    def _splits_of(self, fit: Fit) -> Any:
        return self._prepared_splits(fit)["test"].groups[0]

    def _prepared_splits(self, fit: Fit) -> dict[str, Split]:
        """Every split under a fit's sites; those of the last sites are kept."""
        if self._splits is None or self._splits[0] != fit.sites:
            self._splits = None
            made = {
                split: prepare(self.runner, self._kept_groups(split), fit, self._budget // 3)
                for split in SPLITS
            }
            self._splits = fit.sites, made
        return self._splits[1]

    def _groups(self, split: str) -> list[Group]:
        if split not in self._all:
            self._all[split] = groups_of(self.plan, split)
        return self._all[split]

    def _kept_groups(self, split: str) -> list[Group]:
        """The pairs that are used."""
        if split not in self._used:
            used = from_bits(self.record_of_prompts["used"][split])
            found = [group.take(used[group.index].nonzero()[:, 0]) for group in self._groups(split)]
            self._used[split] = [group for group in found if len(group)]
        return self._used[split]

    @property
    def record_of_prompts(self) -> Record:
        assert self.journal is not None
        return self.journal[self.plan.baselines[0]]

    @property
    def _budget(self) -> int:
        wanted = self.plan.spec.run.memory_bytes
        if wanted is not None:
            return int(wanted)
        free = free_gpu_bytes(self.model.device)
        return (free_cpu_bytes() if free is None else free) // _SHARE


def _text(found: Tensor, order: Tensor, counted: Tensor | None = None) -> str:
    """Pairs in their order, a character each: 1 right, 0 wrong, - not counted."""
    marks = ["1" if one else "0" for one in found.tolist()]
    if counted is not None:
        marks = [m if on else "-" for m, on in zip(marks, counted.tolist(), strict=True)]
    by_index = sorted(zip(order.tolist(), marks, strict=True))
    return "".join(mark for _, mark in by_index)


def _share(marks: str) -> float | None:
    counted = len(marks) - marks.count("-")
    return marks.count("1") / counted if counted else None


def to_bits(keep: Tensor) -> str:
    """Bits as text: their number, and hexadecimal digits."""
    bits = "".join("1" if one else "0" for one in keep.tolist())
    return f"{len(bits)}:{int('1' + bits, 2):x}"


def from_bits(text: str) -> Tensor:
    """The bits of `to_bits`."""
    _, _, digits = text.partition(":")
    return torch.tensor([bit == "1" for bit in bin(int(digits, 16))[3:]])


def load(plan: TrainPlan) -> LoadedModel:
    """The plan's model: made on the spot, or loaded."""
    section, seed = plan.spec.model, plan.spec.seed
    if isinstance(section, TransformerSection):
        small = make_transformer(section, plan.files, plan.causal, seed)
        path = ModelSection(path=str(small.files.folder), dtype=section.dtype)
        return load_model(small.files, path, seed, plan.spec.run.device)
    if not isinstance(section, MlpSection):
        return sweep.load(plan)
    made = make_mlp(section, plan.causal, seed, task_identity(plan.loaded))
    device = next(made.module.parameters()).device
    return LoadedModel(made.module, made.anatomy, device, "none")


TRAIN = Kind(train_steps, TrainWorker, load)
