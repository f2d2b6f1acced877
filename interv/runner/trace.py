"""Causal tracing on a loaded model: corrupted runs with clean states put back."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from interv.engine import Edit, Intervention, LoadedModel, Noise, Run, Site, Vanilla
from interv.engine.load import embedding_sigma
from interv.engine.metrics import predicts, read_answer
from interv.errors import IntervError
from interv.plan import Cell, ExecutorName, Pack, TracePlan
from interv.plan.trace import Restoration
from interv.runner.certify import Sample, some_of
from interv.runner.journal import Journal, Record
from interv.runner.recognised import recognised
from interv.runner.sweep import Kind, PackWorker, Step, pack_steps
from interv.runner.trained import swaps_of
from interv.spec.schema import NoiseCorruption
from interv.task import Prompt


class Tracer(PackWorker[TracePlan]):
    """A plan's cells as runs of a loaded model.

    Attributes:
        noise_level: the noise's standard deviation in the embeddings' units; None where the
            corrupted run is another prompt.
        sigma: the standard deviation that a level such as `3s` is a multiple of: that of what
            the embedding module gives, where the noise is added.
    """

    def __init__(self, plan: TracePlan, model: LoadedModel) -> None:
        super().__init__(plan, model)
        self.noise_level: float | None = None
        self.sigma: float | None = None
        self._swaps: Sequence[Intervention] = [Vanilla()]
        if plan.spec.intervention is not None:
            folder = Path(plan.spec.intervention.trained)
            self._swaps = swaps_of(folder, plan.files, model.module)
        corrupt = plan.spec.corrupt
        if isinstance(corrupt, NoiseCorruption):
            if corrupt.multiple is None:
                self.noise_level = float(corrupt.level)
            else:
                # The subjects of all facts loaded, each tokenised by itself, with repeats.
                subjects = [t for prompt in plan.prompts.values() for t in prompt.subject_ids]
                whole = corrupt.sigma_over == "vocabulary"
                self.sigma = embedding_sigma(model, None if whole else subjects)
                self.noise_level = corrupt.multiple * self.sigma

    @property
    def notes(self) -> dict[str, Any]:
        """What is known once the model is loaded, for the record."""
        return {
            "attn_implementation": self.model.attn_implementation,
            "sigma": self.sigma,
            "noise_level": self.noise_level,
            **recognised(self.model),
        }

    def samples(self) -> list[Sample]:
        kinds: dict[str, list[Restoration]] = {}
        prompts = some_of(list(self.plan.prompts), 2)
        for label in self.plan.labels:
            if label.prompt in prompts:
                held = f" with {label.cell.sever} held" if label.cell.sever else ""
                kinds.setdefault(f"{label.cell.component}{held}", []).append(label.cell)
        return [
            Sample(
                kind,
                self.restored(cell)[0],
                tuple(self.plan.prompts[cell.prompt].answer_positions),
            )
            for kind, cells in kinds.items()
            for cell in some_of(cells)
        ]

    def baseline(self, step: Step) -> dict[str, Record]:
        """Values of the clean run and of the corrupted ones, and whether clean is right."""
        prompt = self.plan.prompts[step.payload]
        # What an executor keeps of one prompt is of no use to the next.
        self.executor.forget()
        at = prompt.answer_positions
        clean = self.executor.logits([self._clean(prompt)], at)
        corrupted = self.executor.logits(self._corrupted(prompt), at)
        record = {
            "clean": read_answer(clean, prompt.answer_ids),
            "corrupted": read_answer(corrupted, prompt.answer_ids),
            "correct": predicts(clean[0], prompt.answer_ids),
            "top": int(clean[0, 0].argmax()),
        }
        return {step.ids[0]: record}

    def prepare(self, cells: Sequence[Cell]) -> None:
        restorations = [cell for cell in cells if isinstance(cell, Restoration)]
        self.executor.forget()
        clean = {(c.component, layer) for c in restorations for layer in c.layers}
        severed = {c.sever for c in restorations if c.sever}
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

    def values(self, pack: Pack) -> dict[str, Record]:
        n = self.plan.draws
        records: dict[str, Record] = {}
        by_place: dict[range, list[Restoration]] = {}
        for cell in pack.cells:
            assert isinstance(cell, Restoration)
            at = self.plan.prompts[cell.prompt].answer_positions
            by_place.setdefault(at, []).append(cell)
        for at, cells in by_place.items():
            runs = [run for cell in cells for run in self.restored(cell)]
            logits = self.executor.logits(runs, at)
            for i, cell in enumerate(cells):
                answer = self.plan.prompts[cell.prompt].answer_ids
                records[cell.id] = read_answer(logits[i * n : (i + 1) * n], answer)
        return {cell.id: records[cell.id] for cell in pack.cells}

    def _clean(self, prompt: Prompt) -> Run:
        return Run(prompt.run_ids)

    def _corrupted(self, prompt: Prompt) -> list[Run]:
        if prompt.corrupted_run_ids is not None and self.noise_level is None:
            return [Run(prompt.corrupted_run_ids)]
        assert self.noise_level is not None
        site = Site("token_embedding", 0, prompt.role("subject"))
        seed = self.plan.draw_seeds[prompt.index]
        return [
            Run(prompt.run_ids, (Edit(site, Noise(self.noise_level, seed, draw)),))
            for draw in range(self.plan.draws)
        ]

    def restored(self, cell: Restoration) -> list[Run]:
        """The corrupted runs with the cell's states from the clean run put back.

        Under `sever` the severed component stays at its value in the corrupted run, at the
        restored position and in every layer.
        """
        prompt = self.plan.prompts[cell.prompt]
        at = prompt.in_run((cell.position,))
        restored = [
            Edit(Site(cell.component, layer, at), swap, self._clean(prompt))
            for layer in cell.layers
            for swap in self._swaps
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


def wanted_prompts(plan: TracePlan, journal: Journal) -> list[int]:
    """Prompts that are traced, of those whose baseline is known."""
    known = {p: journal[key] for p, key in plan.baselines.items() if key in journal}
    every = plan.spec.data.keep == "all"
    return [p for p, record in known.items() if every or record["correct"]]


def _some_prompt(plan: TracePlan, journal: Journal) -> list[int]:
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


def trace_steps(
    plan: TracePlan, journal: Journal, executor: ExecutorName, tokens: int
) -> Iterator[Step]:
    """Clean and corrupted runs of every prompt; then the cells of those that are traced."""
    for index, key in plan.baselines.items():
        yield Step(f"clean and corrupted runs of prompt {index}", (key,), "baseline", index)
    wanted = _some_prompt(plan, journal)
    if not any(cell.prompt in set(wanted) for cell in plan.cells):
        raise IntervError(
            f"the grid selects no point in any of the {len(wanted)} prompts that are left "
            f"(data.keep: {plan.spec.data.keep}): choose grid.positions that they have"
        )
    yield from pack_steps(
        plan, journal, executor, tokens, wanted, names=lambda i: plan.prompts[i].subject_text
    )


TRACE = Kind(trace_steps, Tracer)
