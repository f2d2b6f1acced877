"""What each step of a patch computes, on a loaded model."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from typing import Any

from torch import Tensor

from interv.engine import (
    EdgeGraph,
    LoadedModel,
    Run,
    Site,
    attributions,
    logit_attributions,
    logit_lens,
)
from interv.engine.memory import halving
from interv.engine.metrics import differentiable, read_everything
from interv.plan import Cell, Pack, PatchPlan
from interv.plan.grid import Spot
from interv.plan.patch import Patch
from interv.runner.certify import Sample, some_of
from interv.runner.circuit_runs import CircuitRuns
from interv.runner.journal import Record
from interv.runner.patch_runs import Ids, PatchRuns, answers_of, held_by, read_at
from interv.runner.recognised import recognised
from interv.runner.sweep import PackWorker, Step
from interv.task.encoder import continued
from interv.task.pairs import Pair


class Patcher(PackWorker[PatchPlan]):
    """A plan's patches, and what its gradients tell, on a loaded model."""

    def __init__(self, plan: PatchPlan, model: LoadedModel) -> None:
        super().__init__(plan, model)
        self.runs = PatchRuns(plan, self.reference, model.anatomy.n_layers)
        self._clean_logits: dict[int, Tensor] = {}
        if plan.spec.circuit:
            EdgeGraph(model.anatomy)  # refuses models without edges, before anything is computed

    @property
    def notes(self) -> dict[str, Any]:
        return {"attn_implementation": self.model.attn_implementation, **recognised(self.model)}

    @cached_property
    def circuits(self) -> CircuitRuns:
        return CircuitRuns(self.plan, self.model, self.reference, self.runs)

    def samples(self) -> list[Sample]:
        kinds: dict[str, list[Patch]] = defaultdict(list)
        indices = some_of(list(self.plan.pairs), 2)
        for cell in self.plan.cells:
            if isinstance(cell, Patch) and cell.prompt in indices and self.plan.width(cell):
                # Several components changed at once are one kind; what stands for them is long.
                names = sorted({spot.component for spot in cell.spots})
                ends = sorted({spot.component for spot in cell.receivers})
                path = f" to {' and '.join(ends) or 'the logits'}" if cell.freeze else ""
                kinds[f"{' and '.join(names[:3])}{path}"].append(cell)
        found = []
        for kind, cells in kinds.items():
            for cell in some_of(cells):
                pair = self.plan.pairs[cell.prompt]
                tail = pair.tails[0]
                run = self.runs.patched(cell, tail)[0]
                found.append(Sample(kind, run, tuple(read_at(pair, tail))))
        return found

    def baseline(self, step: Step) -> dict[str, Record]:
        """Values of some clean and corrupted prompts, and whether the model is right."""
        self.executor.forget()
        records = halving([self.plan.pairs[i] for i in step.payload], self._baselines)
        return dict(zip(step.ids, records, strict=True))

    def _baselines(self, pairs: Sequence[Pair]) -> list[Record]:
        clean = self._values(pairs, [pair.ids for pair in pairs])
        both = [pair for pair in pairs if pair.corrupted_ids is not None]
        corrupted = dict(
            zip(
                (pair.index for pair in both),
                self._values(both, [pair.corrupted_ids or () for pair in both]),
                strict=True,
            )
        )
        records: list[Record] = []
        for pair, values in zip(pairs, clean, strict=True):
            tops = {}
            for tail in dict.fromkeys(ids[:-1] for ids in pair.answer_ids):
                [logits] = self.executor.logits([Run(pair.run_ids(tail))], read_at(pair, tail))
                tops[tail] = tuple(logits.argmax(-1).tolist())
            # Answers may begin with the same token: they are compared whole.
            [each] = values["logits" if self.plan.few else "log_probabilities"]
            n = len(pair.answer_ids)
            best, wrong = max(each[:n]), max(each[n:], default=-float("inf"))
            record: Record = {
                "clean": values,
                "correct": any(tops[ids[:-1]] == ids for ids in pair.answer_ids),
                "preferred": best > wrong,
                "top": next(iter(tops.values()))[0],
            }
            if pair.index in corrupted:
                record["corrupted"] = corrupted[pair.index]
            records.append(record)
        return records

    def prepare(self, cells: Sequence[Cell]) -> None:
        self.executor.forget()
        patches = [cell for cell in cells if isinstance(cell, Patch)]
        pairs = [self.plan.pairs[i] for i in dict.fromkeys(cell.prompt for cell in cells)]
        bases = [Run(self.plan.base_ids(p, tail)) for p in pairs for tail in p.tails]
        held = sorted({name for cell in patches for name in held_by(cell)})
        n_layers = self.model.anatomy.n_layers
        sites = [Site(name, layer, (0,)) for name in held for layer in range(n_layers)]
        self.executor.states(bases, sites or [Site("block_input", 0, (0,))])
        sources = [
            run for pair in pairs for tail in pair.tails for run in self.runs.sources(pair, tail)
        ]
        wanted = sorted({(s.component, s.layer) for cell in patches for s in cell.spots})
        if sources and wanted:
            self.executor.states(sources, [Site(*at, (0,)) for at in wanted])

    def values(self, pack: Pack) -> dict[str, Record]:
        cells = [cell for cell in pack.cells if isinstance(cell, Patch)]
        by_tail: dict[tuple[int, ...], list[tuple[Patch, Ids]]] = defaultdict(list)
        for cell in cells:
            pair = self.plan.pairs[cell.prompt]
            for tail in pair.tails:
                by_tail[tuple(read_at(pair, tail))].append((cell, tail))
        found: dict[str, dict[Ids, Tensor]] = defaultdict(dict)
        tokens = self._columns(self.plan.pairs[cell.prompt] for cell in cells)
        n = self.plan.draws
        middles: set[Run] = set()
        for at, together in by_tail.items():
            runs = [run for cell, tail in together for run in self.runs.patched(cell, tail)]
            logits = self.executor.logits(runs, at, tokens)
            for i, (cell, tail) in enumerate(together):
                found[cell.id][tail] = logits[i * n : (i + 1) * n]
                if cell.receivers:
                    arriving = (e for run in runs[i * n : (i + 1) * n] for e in run.edits)
                    middles |= {edit.source for edit in arriving if edit.source is not None}
        if middles:
            # What was recorded on the way to a receiver nobody reads again.
            self.executor.forget(middles)
        return {cell.id: self._record(cell.prompt, found[cell.id], tokens) for cell in cells}

    def attribution(self, step: Step) -> dict[str, Record]:
        """First-order effects of some pairs' cells."""
        values = halving([self.plan.pairs[i] for i in step.payload], self._attributed)
        return {key: {"attribution": own} for key, own in zip(step.ids, values, strict=True)}

    def _attributed(self, pairs: Sequence[Pair]) -> list[list[float]]:
        spec = self.plan.spec.attribution
        cells = {p.index: self.plan.nodes_of(p.index) for p in pairs}
        keys = sorted({(s.component, s.layer) for c in cells.values() for p in c for s in p.spots})
        bases = [Run(self.plan.base_ids(pair)) for pair in pairs]
        inputs = spec.method == "integrated_inputs"
        wanted = [*keys, *([("token_embedding", 0)] if inputs else [])]
        targets = self.runs.targets(pairs, bases, dict.fromkeys(wanted))
        along = {"gradient": "point", "integrated_inputs": "inputs"}.get(spec.method, "activation")
        products = attributions(
            self.reference,
            bases,
            read_at(pairs[0], ()),
            differentiable(self.plan.metrics[0].of, [answers_of(pair) for pair in pairs]),
            targets,
            along=along,  # type: ignore[arg-type]
            steps=1 if along == "point" else spec.steps,
        )
        self.reference.forget()
        return [
            [
                sum(self._share(products[s.component, s.layer][row], s) for s in cell.spots)
                for cell in cells[pair.index]
            ]
            for row, pair in enumerate(pairs)
        ]

    def decompose(self, step: Step) -> dict[str, Record]:
        """Direct logit attributions and the logit lens of some clean prompts."""
        pairs = [self.plan.pairs[i] for i in step.payload]
        return dict(zip(step.ids, halving(pairs, self._decomposed), strict=True))

    def _decomposed(self, pairs: Sequence[Pair]) -> list[Record]:
        spec = self.plan.spec.decompose
        runs = [Run(pair.ids) for pair in pairs]
        positions = [pair.read for pair in pairs]
        right = [[pair.answer_ids[0][0]] for pair in pairs]
        wrong = [[ids[0] for ids in pair.wrong_ids] for pair in pairs]
        module, centred = self.model.module, spec.unembedding == "centred"
        records: list[Record] = [{} for _ in pairs]
        if spec.heads:
            parts, shares = logit_attributions(
                self.reference, module, runs, positions, right, wrong, centred=centred
            )
            names = [[part.component, part.layer, part.head] for part in parts]
            for i, record in enumerate(records):
                record |= {"parts": names, "direct": shares[:, i].tolist()}
        if spec.lens:
            lens = logit_lens(self.reference, module, runs, positions)
            for i, record in enumerate(records):
                values = lens[:, i].double()
                told = values[:, right[i][0]]
                if wrong[i] or centred:
                    told = told - (values[:, wrong[i]] if wrong[i] else values).mean(-1)
                record["lens"] = told.tolist()
        self.reference.forget()
        return records

    def edges(self, step: Step) -> dict[str, Record]:
        """Scores of every edge, the mean over some pairs."""
        return self.circuits.edges(step)

    def circuit(self, step: Step) -> dict[str, Record]:
        """Some pairs' values where only some edges are kept."""
        return self.circuits.circuit(step)

    def patterns(self, step: Step) -> dict[str, Record]:
        """Attention of chosen heads in the first clean prompt, `[head][query][key]`."""
        pair = self.plan.pairs[step.payload]
        found = []
        for layer, head in self.plan.spec.figures.patterns:
            [[state]] = self.reference.states(
                [Run(pair.ids)], [Site("attention_weight", layer, None, (head,))]
            )
            found.append(state.double().tolist())
        self.reference.forget()
        return {step.ids[0]: {"patterns": found}}

    def _share(self, product: Tensor, spot: Spot) -> float:
        """The sum over a spot's positions and columns, of its component's `[pos, width]`."""
        assert spot.positions is not None  # answers of attribution are single tokens
        picked = product[list(spot.positions)]
        units = self.model.anatomy.n_units(spot.component) if spot.heads is not None else None
        if spot.heads is not None and units:
            picked = picked.unflatten(-1, (units, -1))[:, list(spot.heads)]  # type: ignore[no-untyped-call]
        if spot.dims is not None:
            picked = picked[..., list(spot.dims)]
        return float(picked.sum())

    def _values(self, pairs: Sequence[Pair], prompts: Sequence[Ids]) -> list[Record]:
        """Records of prompts that nothing is done to, read as the cells are."""
        tokens = self._columns(pairs)
        by_tail: dict[tuple[int, ...], list[tuple[int, Ids]]] = defaultdict(list)
        for i, pair in enumerate(pairs):
            for tail in pair.tails:
                by_tail[tuple(read_at(pair, tail))].append((i, tail))
        found: dict[int, dict[Ids, Tensor]] = defaultdict(dict)
        for at, some in by_tail.items():
            runs = [Run(continued(prompts[i], tail, pairs[i].behind)) for i, tail in some]
            logits = self.executor.logits(runs, at, tokens)
            for (i, tail), row in zip(some, logits, strict=True):
                found[i][tail] = row[None]
        return [self._record(pair.index, found[i], tokens) for i, pair in enumerate(pairs)]

    def _columns(self, pairs: Iterable[Pair]) -> list[int] | None:
        """The tokens whose logits are all that is needed; None: the whole vocabulary."""
        if not self.plan.few:
            return None
        return sorted({ids[0] for pair in pairs for ids in pair.all_ids})

    def _record(
        self, prompt: int, logits: Mapping[Ids, Tensor], tokens: Sequence[int] | None
    ) -> Record:
        pair = self.plan.pairs[prompt]
        if tokens is not None:
            columns = [tokens.index(ids[0]) for ids in pair.all_ids]
            return {"logits": logits[()][:, 0, columns].double().tolist()}
        clean = self._clean(pair) if self.plan.diverges else None
        own = {m.of: self._own(m.of) for m in self.plan.metrics if not m.is_plain}
        return read_everything(logits, answers_of(pair), clean, own)

    def _own(self, name: str) -> Any:
        plugin = self.plan.loaded.plugin
        assert plugin is not None
        return plugin.metrics[name]

    def _clean(self, pair: Pair) -> Tensor:
        """The clean prompt's logits where the answer is read, `[vocab]`."""
        if pair.index not in self._clean_logits:
            at = read_at(pair, ())
            self._clean_logits[pair.index] = self.reference.logits([Run(pair.ids)], at)[0, 0]
        return self._clean_logits[pair.index]
