"""Running a trace: baselines, then packs, each journalled whole before the next."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from interv.engine import (
    Edit,
    Executor,
    LoadedModel,
    Noise,
    ReferenceExecutor,
    Run,
    Site,
    SuffixExecutor,
    Vanilla,
)
from interv.engine.hooks import foreign_hooks
from interv.engine.load import load_model, token_embeddings
from interv.engine.metrics import predicts, read_answer
from interv.errors import EngineError, IntervError, ResumeError
from interv.plan import Cell, ExecutorName, Pack, Plan, make_packs, max_tokens
from interv.runner import journal as journals
from interv.runner import record as records
from interv.runner.certify import Certificate, certify, refuse
from interv.runner.journal import Journal, Record
from interv.spec.schema import NoiseCorruption
from interv.task import Prompt

Progress = Callable[[str, int, int], None]
"""Told the prompt at work, the points done and the points in all."""


@dataclass
class Tracer:
    """A plan's cells as runs of a loaded model.

    Attributes:
        noise_level: the noise's standard deviation in the embeddings' units; None where the
            corrupted run is another prompt.
        sigma: the standard deviation that a level such as `3s` is a multiple of.
    """

    plan: Plan
    model: LoadedModel
    executor: Executor = field(init=False)
    reference: Executor = field(init=False)
    noise_level: float | None = field(init=False, default=None)
    sigma: float | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        self.executor = self.reference = ReferenceExecutor(self.model.module, self.model.anatomy)
        corrupt = self.plan.spec.corrupt
        if isinstance(corrupt, NoiseCorruption):
            if corrupt.multiple is None:
                self.noise_level = float(corrupt.level)
            else:
                self.sigma = embedding_sigma(self.plan, self.model, corrupt.sigma_over)
                self.noise_level = corrupt.multiple * self.sigma

    @property
    def notes(self) -> dict[str, Any]:
        """What is known once the model is loaded, for the record."""
        return {
            "attn_implementation": self.model.attn_implementation,
            "sigma": self.sigma,
            "noise_level": self.noise_level,
        }

    def baseline(self, prompt: Prompt) -> Record:
        """Values of the clean run and of the corrupted ones, and whether clean is right."""
        # What an executor keeps of one prompt is of no use to the next.
        self.executor.forget()
        at = answer_positions(prompt)
        clean = self.executor.logits([self._clean(prompt)], at)
        corrupted = self.executor.logits(self._corrupted(prompt), at)
        return {
            "clean": read_answer(clean, prompt.answer_ids),
            "corrupted": read_answer(corrupted, prompt.answer_ids),
            "correct": predicts(clean[0], prompt.answer_ids),
            "top": int(clean[0, 0].argmax()),
        }

    def prepare(self, cells: Sequence[Cell]) -> None:
        """Keep the states that these cells read, and no others.

        The same forwards whichever cells are left to do, so that a resumed run reads the
        same bits.
        """
        self.executor.forget()
        clean = {(c.component, layer) for c in cells for layer in c.layers}
        severed = {c.sever for c in cells if c.sever}
        prompts = [self.plan.prompts[i] for i in dict.fromkeys(c.prompt for c in cells)]
        runs = [self._clean(prompt) for prompt in prompts]
        self.executor.states(runs, [Site(*at, (0,)) for at in sorted(clean)])
        held = [
            Site(component, layer, (0,))
            for component in sorted(severed)
            for layer in range(self.plan.facts.n_layers if self.plan.facts else 0)
        ]
        # Several prompts' corrupted runs share forwards: which, must not depend on what is left.
        if held or len(prompts) > 1:
            corrupted = [run for prompt in prompts for run in self._corrupted(prompt)]
            self.executor.states(corrupted, held or [Site("block_input", 0, (0,))])

    def pack(self, pack: Pack) -> dict[str, Record]:
        """Values of every cell of a pack."""
        n = self.plan.draws
        records: dict[str, Record] = {}
        by_answer: dict[int, list[Cell]] = {}
        for cell in pack.cells:
            n_answer = len(self.plan.prompts[cell.prompt].answer_ids)
            by_answer.setdefault(n_answer, []).append(cell)
        for n_answer, cells in by_answer.items():
            runs = [run for cell in cells for run in self.restored(cell)]
            logits = self.executor.logits(runs, range(-n_answer, 0))
            for i, cell in enumerate(cells):
                answer = self.plan.prompts[cell.prompt].answer_ids
                records[cell.id] = read_answer(logits[i * n : (i + 1) * n], answer)
        return {cell.id: records[cell.id] for cell in pack.cells}

    def _tail(self, prompt: Prompt) -> tuple[int, ...]:
        return prompt.answer_ids[:-1]

    def _clean(self, prompt: Prompt) -> Run:
        return Run(prompt.ids + self._tail(prompt))

    def _corrupted(self, prompt: Prompt) -> list[Run]:
        if prompt.corrupted_ids is not None and self.noise_level is None:
            return [Run(prompt.corrupted_ids + self._tail(prompt))]
        assert self.noise_level is not None
        site = Site("token_embedding", 0, prompt.role("subject"))
        seed = self.plan.draw_seeds[prompt.index]
        return [
            Run(prompt.ids + self._tail(prompt), (Edit(site, Noise(self.noise_level, seed, draw)),))
            for draw in range(self.plan.draws)
        ]

    def restored(self, cell: Cell) -> list[Run]:
        """The corrupted runs with the cell's states from the clean run put back.

        Under `sever` the severed component stays at its value in the corrupted run, at the
        restored position and in every layer.
        """
        prompt = self.plan.prompts[cell.prompt]
        at = (cell.position,)
        restored = [
            Edit(Site(cell.component, layer, at), Vanilla(), self._clean(prompt))
            for layer in cell.layers
        ]
        runs = []
        for corrupted in self._corrupted(prompt):
            held: list[Edit] = []
            if cell.sever is not None:
                assert self.plan.facts is not None
                held = [
                    Edit(Site(cell.sever, layer, at), Vanilla(), corrupted)
                    for layer in range(self.plan.facts.n_layers)
                ]
            runs.append(Run(corrupted.ids, (*corrupted.edits, *restored, *held)))
        return runs


def answer_positions(prompt: Prompt) -> range:
    """Where the answer's tokens are predicted, from a run's end."""
    return range(-len(prompt.answer_ids), 0)


def embedding_sigma(plan: Plan, model: LoadedModel, over: str) -> float:
    """Standard deviation of embedding entries: one scalar, as `collect_embedding_std` has it.

    Over the tokens of all subjects loaded, each tokenised by itself, with repeats, or over the
    whole vocabulary.
    """
    weight = token_embeddings(model)
    if over == "subjects":
        tokens = [t for prompt in plan.prompts.values() for t in prompt.subject_ids]
        weight = weight[torch.tensor(tokens, device=weight.device)]
    return float(weight.double().std())


@dataclass(frozen=True)
class Outcome:
    """A finished run: its journal, and what this session adds to the record (empty: nothing)."""

    journal: Journal
    record: dict[str, Any]


def run_trace(plan: Plan, folder: Path, progress: Progress, *, adopt: bool = True) -> Outcome:
    """Compute what is not in the folder's journal yet. The caller holds the folder's lock.

    Args:
        plan: what to compute.
        folder: the run folder.
        progress: told how far it is.
        adopt: take over what runs of other grids computed under the same conditions.

    Raises:
        ResumeError: the journal was begun under other versions, device or threads, or is
            damaged.
        ModelError, EngineError, StorageError: as their docstrings say; the journal keeps
            what was finished.
    """
    began = time.monotonic()
    path = folder / journals.JOURNAL
    journal = journals.read(path, repair=True)
    threads = records.threads(plan.spec.run.threads)
    if journal and _pending(plan, journal) == 0:
        _some_prompt(plan, journal)
        return Outcome(journal, {})
    if plan.spec.run.deterministic:
        records.be_deterministic()
    model = load_model(plan.files, plan.spec.model, plan.spec.seed, plan.spec.run.device)
    tracer = Tracer(plan, model)
    # What memory was free when the run began decides the packs of all of it.
    tokens = int(journal.environment["max_tokens"]) if journal else 0
    if not tokens or plan.spec.run.max_tokens:
        tokens = max_tokens(plan, free_gpu_bytes(model.device))
    progress("certifying", 0, 0)
    executor, certificate = choose_executor(tracer, tokens)
    environment = records.environment(
        str(model.device), threads, executor, tokens, deterministic=plan.spec.run.deterministic
    )
    if journal is None:
        wanted = {cell.id for cell in plan.cells} | set(plan.baselines.values())
        found = journals.find_elsewhere(folder, wanted, environment) if adopt else {}
        journal = journals.begin(path, environment, tracer.notes, found)
    elif changes := journals.difference(journal.environment, environment):
        raise ResumeError(
            f"{folder}: begun under other conditions ({'; '.join(changes)}): going on would mix "
            "results. Restore them, or begin again with --fresh (what is there is set aside)"
        )
    _go(plan, tracer, journal, executor, tokens, progress)
    return Outcome(
        journal,
        {
            "seconds": round(time.monotonic() - began, 1),
            "peak_memory_bytes": records.peak_memory(),
            "certificate": certificate.as_dict() if certificate else None,
        },
    )


def wanted_prompts(plan: Plan, journal: Journal) -> list[int]:
    """Prompts that are traced, of those whose baseline is known."""
    known = {p: journal[key] for p, key in plan.baselines.items() if key in journal}
    every = plan.spec.data.keep == "all"
    return [p for p, record in known.items() if every or record["correct"]]


def _pending(plan: Plan, journal: Journal) -> int:
    """Cells and baselines still to do."""
    unknown = sum(key not in journal for key in plan.baselines.values())
    wanted = set(wanted_prompts(plan, journal))
    return unknown + sum(c.prompt in wanted and c.id not in journal for c in plan.cells)


def choose_executor(tracer: Tracer, tokens: int) -> tuple[ExecutorName, Certificate | None]:
    """Give the tracer the plan's executor, the fast one only once it is certified.

    Raises:
        EngineError: the fast executor differs from the reference, and the spec does not say
            to go on with that.
    """
    plan, model = tracer.plan, tracer.model
    if plan.executor == "reference" or plan.facts is None:
        return "reference", None
    if hooked := foreign_hooks(model.module):
        # They would see some positions only.
        if plan.spec.run.executor == "suffix":
            raise EngineError(f"{hooked[0]} has hooks: run.executor=reference keeps them right")
        return "reference", None
    fast = SuffixExecutor(model.module, model.anatomy, tokens)
    kinds: dict[str, list[Cell]] = {}
    prompt = next(iter(plan.prompts))
    for cell in plan.cells:
        if cell.prompt == prompt:
            held = f" with {cell.sever} held" if cell.sever else ""
            kinds.setdefault(f"{cell.component}{held}", []).append(cell)
    runs = {
        kind: [tracer.restored(cells[i])[0] for i in sorted({0, len(cells) // 2, len(cells) - 1})]
        for kind, cells in kinds.items()
    }
    at = answer_positions(plan.prompts[prompt])
    certificate = certify(fast, tracer.reference, runs, at)
    tracer.reference.forget()
    if certificate.holds:
        tracer.executor = fast
        return "suffix", certificate
    if plan.spec.run.on_uncertified == "reference":
        return "reference", certificate
    raise refuse(certificate)


def _go(
    plan: Plan,
    tracer: Tracer,
    journal: Journal,
    executor: ExecutorName,
    tokens: int,
    progress: Progress,
) -> None:
    for index, prompt in plan.prompts.items():
        progress(f"clean and corrupted runs of prompt {index}", 0, 0)
        if plan.baselines[index] not in journal:
            journal.append({plan.baselines[index]: tracer.baseline(prompt)})
    packs = make_packs(plan, executor, tokens, _some_prompt(plan, journal), journal.adopted)
    total = sum(len(pack.cells) for pack in packs)
    done = 0
    for prompts, group in itertools.groupby(packs, key=lambda pack: pack.prompts):
        together = list(group)
        cells = [cell for pack in together for cell in pack.cells]
        if any(cell.id not in journal for cell in cells):
            tracer.prepare(cells)
        for pack in together:
            if any(cell.id not in journal for cell in pack.cells):
                journal.append(tracer.pack(pack))
            done += len(pack.cells)
            progress(plan.prompts[prompts[0]].subject_text, done, total)


def _some_prompt(plan: Plan, journal: Journal) -> list[int]:
    """The prompts that are traced; an error where there are none, which says why."""
    wanted = wanted_prompts(plan, journal)
    if wanted:
        return wanted
    tokenizer = plan.files.tokenizer
    assert tokenizer is not None
    lines = [
        f"  {p.text!r}: expected {p.answer!r}, the model says "
        f"{tokenizer.decode(journal[plan.baselines[i]]['top'])!r}"
        for i, p in list(plan.prompts.items())[:5]
    ]
    raise IntervError(
        "no prompt is left: the model's top answer is wrong for each (data.keep: correct)\n"
        + "\n".join(lines)
        + "\nSet data.keep=all to trace them all the same"
    )


def free_gpu_bytes(device: torch.device) -> int | None:
    """Memory that is free on the device, if that is a GPU."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else None


def measure(plan: Plan) -> tuple[float, float]:
    """Load the model and time the largest pack.

    Returns:
        Seconds to load, and seconds for one (row, layer, token).
    """
    began = time.monotonic()
    records.threads(plan.spec.run.threads)
    model = load_model(plan.files, plan.spec.model, plan.spec.seed, plan.spec.run.device)
    tracer = Tracer(plan, model)
    tokens = max_tokens(plan, free_gpu_bytes(model.device))
    executor, _ = choose_executor(tracer, tokens)
    loaded = time.monotonic() - began
    pack = max(make_packs(plan, executor, tokens), key=lambda pack: pack.block_tokens)
    tracer.prepare(pack.cells)
    tracer.pack(pack)  # the first call is slower
    began = time.monotonic()
    tracer.pack(pack)
    return loaded, (time.monotonic() - began) / max(1, pack.block_tokens)
