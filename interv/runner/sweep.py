"""Running a plan of any sweep: step after step, each journalled whole before the next.

What there is to do is a pure function of the plan and of what the journal holds already, so that
a run that was stopped takes the same steps as one that was left alone.
"""

from __future__ import annotations

import itertools
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch

from interv.engine import Executor, LoadedModel, ReferenceExecutor, SuffixExecutor
from interv.engine.hooks import foreign_hooks
from interv.engine.load import load_model
from interv.engine.memory import halving
from interv.errors import EngineError, ResumeError
from interv.models.known_faults import avoided_faults
from interv.plan import Cell, ExecutorName, Pack, Plan, make_packs, max_tokens
from interv.runner import journal as journals
from interv.runner import record as records
from interv.runner.certify import Certificate, Sample, certify, refuse, wide_executors
from interv.runner.journal import Journal, Record

Progress = Callable[[str, int, int], None]
"""Told the prompt at work, the points done and the points in all."""

P = TypeVar("P", bound=Plan)


@dataclass(frozen=True)
class Step:
    """Something to compute and to journal whole.

    Attributes:
        what: as people are told.
        ids: of the records that come of it.
        kind: the worker's method that does it.
        payload: what it is done to.
        done, total: points that are there afterwards, and in all; 0: not counted.
    """

    what: str
    ids: tuple[str, ...]
    kind: str
    payload: Any
    done: int = 0
    total: int = 0


class Worker(ABC, Generic[P]):
    """A plan's steps on a loaded model: each kind of step is a method of that name.

    Attributes:
        executor: computes the rows; the reference until the fast one is certified.
        reference: computes everything else.
        folder: of the run, for what is no record.
        journal: of the run.
        tell: told how a long step goes.
    """

    plan: P
    model: LoadedModel
    executor: Executor
    reference: ReferenceExecutor

    def __init__(self, plan: P, model: LoadedModel) -> None:
        self.plan, self.model = plan, model
        self.reference = ReferenceExecutor(model.module, model.anatomy)
        self.executor = self.reference
        self.folder = Path()
        self.journal: Journal | None = None
        self.tell: Callable[[str], None] = _nobody

    @property
    @abstractmethod
    def notes(self) -> dict[str, Any]:
        """What is known once the model is loaded, for the record."""

    @abstractmethod
    def tokens(self) -> int:
        """Tokens that go through a block together; 0 where that is no question."""

    @abstractmethod
    def choose(self, tokens: int) -> tuple[ExecutorName, Certificate | None]:
        """Who computes, the fast way only once it is certified.

        Raises:
            EngineError: it differs from the reference, and the spec does not say to go on.
        """

    def wanted(self) -> set[str]:
        """Ids of records that other runs may have."""
        return {cell.id for cell in self.plan.cells} | set(self.plan.baselines.values())

    def takes_over(self, key: str, folder: Path) -> bool:
        """Take over what belongs to another run's record; False: it must be computed again."""
        return True

    def do(self, step: Step) -> dict[str, Record]:
        """The records of a step."""
        found: dict[str, Record] = getattr(self, step.kind)(step)
        return found


class PackWorker(Worker[P]):
    """A worker whose plan's cells are rows, computed in packs."""

    def __init__(self, plan: P, model: LoadedModel) -> None:
        super().__init__(plan, model)
        self._prepared: object = None

    @abstractmethod
    def samples(self) -> list[Sample]:
        """Rows of each kind that the plan has, of its first prompt and its last."""

    @abstractmethod
    def prepare(self, cells: Sequence[Cell]) -> None:
        """Keep the states that these cells read, and no others.

        The same forwards whichever cells are left to do, so that a resumed run reads the
        same bits.
        """

    @abstractmethod
    def values(self, pack: Pack) -> dict[str, Record]:
        """Values of every cell of a pack."""

    def tokens(self) -> int:
        return max_tokens(self.plan, free_gpu_bytes(self.model.device))

    def choose(self, tokens: int) -> tuple[ExecutorName, Certificate | None]:
        return choose_executor(self, tokens)

    def pack(self, step: Step) -> dict[str, Record]:
        """A step of cells that are computed together."""
        pack, together = step.payload
        if self._prepared is not together:
            self.prepare(together)
            self._prepared = together
        # The states are kept; what is read of them needs memory too.
        records = halving(
            pack.cells, lambda cells: self.values(replace(pack, cells=tuple(cells))).items()
        )
        return dict(records)

    def do(self, step: Step) -> dict[str, Record]:
        if step.kind != "pack":
            self._prepared = None
        return super().do(step)


def _nobody(_text: str) -> None:
    pass


def load(plan: Plan) -> LoadedModel:
    """The model of a plan."""
    return load_model(plan.files, plan.spec.model, plan.spec.seed, plan.spec.run.device)


def pack_steps(
    plan: Plan,
    journal: Journal,
    executor: ExecutorName,
    tokens: int,
    prompts: Sequence[int],
    cells: Iterable[Cell] | None = None,
    names: Callable[[int], str] = str,
) -> Iterator[Step]:
    """The packs of some prompts' cells; those that share states follow each other."""
    packs = make_packs(plan, executor, tokens, prompts, journal.adopted, cells)
    total = sum(len(pack.cells) for pack in packs)
    done = 0
    for group, some in itertools.groupby(packs, key=lambda pack: pack.prompts):
        together = list(some)
        cells_there = [cell for pack in together for cell in pack.cells]
        for pack in together:
            done += len(pack.cells)
            ids = tuple(cell.id for cell in pack.cells)
            yield Step(names(group[0]), ids, "pack", (pack, cells_there), done, total)


@dataclass(frozen=True)
class Kind(Generic[P]):
    """How plans of one kind are run.

    Attributes:
        steps: what there is to do, in order, given what is done.
        worker: who does it.
        load: the plan's model.
    """

    steps: Callable[[P, Journal, ExecutorName, int], Iterator[Step]]
    worker: Callable[[P, LoadedModel], Worker[P]]
    load: Callable[[P], LoadedModel] = load


@dataclass(frozen=True)
class Outcome:
    """A finished run: its journal, and what this session adds to the record (empty: nothing)."""

    journal: Journal
    record: dict[str, Any]


def run_sweep(
    plan: P, kind: Kind[P], folder: Path, progress: Progress, *, adopt: bool = True
) -> Outcome:
    """Compute what is not in the folder's journal yet. The caller holds the folder's lock.

    Args:
        plan: what to compute.
        kind: how.
        folder: the run folder.
        progress: told how far it is.
        adopt: take over what runs of other grids computed under the same conditions.

    Raises:
        ResumeError: the journal was begun under other versions, device or threads, or is
            damaged.
        ModelError, EngineError, StorageError: as their docstrings say; the journal keeps
            what was finished.
    """
    journal = journals.read(folder / journals.JOURNAL, repair=True)
    if journal and not is_pending(plan, kind, journal):
        return Outcome(journal, {})
    with records.settings(plan.spec.run) as threads:
        return _swept(plan, kind, folder, progress, journal, threads, adopt=adopt)


def _swept(
    plan: P,
    kind: Kind[P],
    folder: Path,
    progress: Progress,
    journal: Journal | None,
    threads: int,
    *,
    adopt: bool,
) -> Outcome:
    began = time.monotonic()
    model = kind.load(plan)
    worker = kind.worker(plan, model)
    worker.folder = folder
    # What memory was free when the run began decides the packs of all of it.
    tokens = int(journal.environment["max_tokens"]) if journal else 0
    if not tokens or plan.spec.run.max_tokens:
        tokens = worker.tokens()
    progress("certifying", 0, 0)
    executor, certificate = worker.choose(tokens)
    environment = records.environment(
        str(model.device), threads, executor, tokens, deterministic=plan.spec.run.deterministic
    )
    if journal is None:
        there = journals.find_elsewhere(folder, worker.wanted(), environment) if adopt else {}
        found = {key: record for key, (record, at) in there.items() if worker.takes_over(key, at)}
        path = folder / journals.JOURNAL
        journal = journals.begin(path, environment, worker.notes, found)
    elif changes := journals.difference(journal.environment, environment):
        raise ResumeError(
            f"{folder}: begun under other conditions ({'; '.join(changes)}): going on would mix "
            "results. Restore them, or begin again with --fresh (what is there is set aside)"
        )
    worker.journal = journal
    for step in kind.steps(plan, journal, executor, tokens):
        progress(step.what, 0, 0) if not step.total else None
        if any(key not in journal for key in step.ids):
            worker.tell = _telling(progress, step)
            journal.append(worker.do(step))
        if step.total:
            progress(step.what, step.done, step.total)
    return Outcome(
        journal,
        {
            "seconds": round(time.monotonic() - began, 1),
            "peak_memory_bytes": records.peak_memory(),
            "known_faults_avoided": avoided_faults(plan.files.config),
            "certificate": certificate.as_dict() if certificate else None,
        },
    )


def _telling(progress: Progress, step: Step) -> Callable[[str], None]:
    return lambda text: progress(f"{step.what}: {text}", max(0, step.done - 1), step.total)


def is_pending(plan: P, kind: Kind[P], journal: Journal) -> bool:
    """Whether any step is left to do."""
    environment = journal.environment
    executor, tokens = environment["executor"], int(environment["max_tokens"])
    return any(
        key not in journal
        for step in kind.steps(plan, journal, executor, tokens)
        for key in step.ids
    )


def choose_executor(
    worker: PackWorker[Any], tokens: int
) -> tuple[ExecutorName, Certificate | None]:
    """Give the worker the plan's executor, the fast one only once it is certified.

    Raises:
        EngineError: the fast executor differs from the reference, and the spec does not say
            to go on with that.
    """
    plan, model = worker.plan, worker.model
    if plan.executor == "reference" or plan.facts is None:
        return "reference", None
    if hooked := foreign_hooks(model.module):
        # They would see some positions only.
        if plan.spec.run.executor == "suffix":
            raise EngineError(f"{hooked[0]} has hooks: run.executor=reference keeps them right")
        return "reference", None
    fast = SuffixExecutor(model.module, model.anatomy, tokens)
    samples = worker.samples()
    if not samples:
        worker.executor = fast
        return "suffix", None
    wide = wide_executors(model.module, model.anatomy, tokens)
    certificate = certify(fast, worker.reference, samples, wide)
    worker.reference.forget()
    if certificate.holds:
        worker.executor = fast
        return "suffix", certificate
    if plan.spec.run.on_uncertified == "reference":
        return "reference", certificate
    raise refuse(certificate)


def free_gpu_bytes(device: torch.device) -> int | None:
    """Memory that is free on the device, if that is a GPU."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else None


def measure(plan: P, kind: Kind[P]) -> tuple[float, float]:
    """Load the model and time the largest pack.

    Returns:
        Seconds to load, and seconds for one (row, layer, token).
    """
    with records.settings(plan.spec.run):
        return _measured(plan, kind)


def _measured(plan: P, kind: Kind[P]) -> tuple[float, float]:
    began = time.monotonic()
    worker = kind.worker(plan, kind.load(plan))
    tokens = worker.tokens()
    executor, _ = worker.choose(tokens)
    loaded = time.monotonic() - began
    pack = max(make_packs(plan, executor, tokens), key=lambda pack: pack.block_tokens)
    assert isinstance(worker, PackWorker)
    worker.prepare(pack.cells)
    worker.values(pack)  # the first call is slower
    began = time.monotonic()
    worker.values(pack)
    return loaded, (time.monotonic() - began) / max(1, pack.block_tokens)
