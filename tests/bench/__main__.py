"""`make bench`: the same cells by interv and by its peers, on the default model.

One process, two threads, the peers in turn, several rounds; interv runs every cell, slow peers
a seeded sample of cells, scaled to all. A peer's source states are its own affair: pyvene and
the authors' code run the clean prompt with every cell, plain hooks keep it.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import yaml
from rich.console import Console
from rich.table import Table

from interv.engine import LoadedModel, ReferenceExecutor, SuffixExecutor, load_model
from interv.plan import Cell, Plan, make_packs, make_plan
from interv.run.trace import Tracer
from interv.spec import load_spec
from tests.by_hand import module_name, trace_cell
from tests.test_pyvene import pyvene_probability

ROUNDS = 3
SAMPLE = 8
THREADS = 2
OUTPUT = Path("outputs/bench")
NAMES = "When John and Mary went to the store, {} gave a bottle of milk to"

SPECS = {
    "residual sweep, one name swapped": {
        "data": {
            "facts": [
                {
                    "prompt": NAMES.format("Mary"),
                    "subject": "Mary",
                    "occurrence": 2,
                    "answer": "John",
                    "corrupted_subject": "John",
                }
            ]
        },
        "corrupt": {"type": "prompt"},
        "grid": [{"component": "block_output"}],
    },
    "ROME trace, 4 draws": {
        "data": {
            "facts": [
                {
                    "prompt": "The Eiffel Tower is located in the city of",
                    "subject": "The Eiffel Tower",
                    "answer": "Paris",
                }
            ]
        },
        "corrupt": {"type": "noise", "level": 0.366, "samples": 4, "draw_seed": 1},
        "grid": [
            {"component": "block_output"},
            {"component": ["mlp_output", "attention_output"], "window": 10},
        ],
    },
}

Way = Callable[[list[Cell]], dict[str, float]]


def probabilities(plan: Plan, model: LoadedModel, name: str) -> Way:
    """All cells by one of interv's executors."""

    def way(cells: list[Cell]) -> dict[str, float]:
        tracer = Tracer(plan, model)
        if name == "suffix":
            assert plan.facts is not None
            tracer.executor = SuffixExecutor(model.module, model.family, plan.facts.n_layers)
        else:
            tracer.executor = ReferenceExecutor(model.module, model.family)
        tracer.prepare(plan.prompts[0], cells)
        found = {}
        others = {cell.id for cell in plan.cells} - {cell.id for cell in cells}
        for pack in make_packs(plan, name, others):
            for key, record in tracer.pack(pack).items():
                found[key] = float(np.exp(record["log_probability"]).mean())
        return found

    return way


def noise_of(plan: Plan, model: LoadedModel) -> torch.Tensor | None:
    corrupt = plan.spec.corrupt
    if corrupt.type == "prompt":
        return None
    first, end = plan.prompts[0].subject
    draws = np.random.RandomState(plan.draw_seeds[0]).randn(
        corrupt.samples, end - first, model.module.config.hidden_size
    )
    return corrupt.level * torch.from_numpy(draws)


def authors_way(plan: Plan, model: LoadedModel) -> Way:
    """Clean and corrupted rows in each forward, all logits, as in causal_trace.py."""
    prompt, noise = plan.prompts[0], noise_of(plan, model)

    def way(cells: list[Cell]) -> dict[str, float]:
        found = {}
        for cell in cells:
            names = [module_name(model.module, cell.component, i) for i in cell.layers]
            logits = trace_cell(
                model.module,
                prompt.ids,
                prompt.subject,
                noise,
                [(cell.position, name) for name in names],
                corrupted_ids=prompt.corrupted_ids,
            )
            found[cell.id] = float(logits[:, -1].softmax(-1)[:, prompt.answer_ids[0]].mean())
        return found

    return way


def hooks_way(plan: Plan, model: LoadedModel) -> Way:
    """One forward for each cell of the corrupted prompt, the clean states kept: plain hooks."""
    prompt = plan.prompts[0]

    def way(cells: list[Cell]) -> dict[str, float]:
        module, found = model.module, {}
        blocks = module.model.layers
        clean: dict[int, torch.Tensor] = {}

        def keep(layer: int) -> Callable[..., None]:
            return lambda _m, _a, out: clean.__setitem__(layer, out)

        handles = [b.register_forward_hook(keep(i)) for i, b in enumerate(blocks)]
        with torch.no_grad():
            module(torch.tensor([prompt.ids]))
            for handle in handles:
                handle.remove()
            for cell in cells:

                def swap(_m: object, _a: object, out: torch.Tensor, cell: Cell = cell) -> object:
                    out = out.clone()
                    out[:, cell.position] = clean[cell.layers[0]][:, cell.position]
                    return out

                handle = blocks[cell.layers[0]].register_forward_hook(swap)
                logits = module(torch.tensor([prompt.corrupted_ids]), logits_to_keep=1).logits
                handle.remove()
                found[cell.id] = float(logits[0, -1].softmax(-1)[prompt.answer_ids[0]])
        return found

    return way


def pyvene_way(plan: Plan, model: LoadedModel) -> Way:
    """pyvene's, on its copy of the model: one run for each cell and draw."""
    prompt, noise = plan.prompts[0], noise_of(plan, model)

    def way(cells: list[Cell]) -> dict[str, float]:
        return {
            cell.id: pyvene_probability(
                model.module,
                prompt.ids,
                prompt.answer_ids[0],
                prompt.subject,
                noise,
                cell.component,
                range(cell.layers[0], cell.layers[-1] + 1),
                cell.position,
                prompt.corrupted_ids,
            )
            for cell in cells
        }

    return way


def matmul_rate() -> float:
    """Floating-point operations a second of a large matrix product."""
    a = torch.randn(2048, 2048)
    times = []
    for _ in range(5):
        began = time.perf_counter()
        a @ a
        times.append(time.perf_counter() - began)
    return 2 * 2048**3 / min(times)


def main() -> None:
    torch.set_num_threads(THREADS)
    OUTPUT.mkdir(parents=True, exist_ok=True)
    rows = []
    for title, sections in SPECS.items():
        path = OUTPUT / "spec.yaml"
        path.write_text(yaml.safe_dump({"kind": "trace", "model": "smollm2-135m", **sections}))
        plan = make_plan(load_spec(path))
        spec = plan.spec
        model = load_model(plan.files, spec.model, spec.seed, "cpu")
        copy = load_model(plan.files, spec.model, spec.seed, "cpu")
        ways: dict[str, Way] = {
            "interv": probabilities(plan, model, "suffix"),
            "interv, reference": probabilities(plan, model, "reference"),
        }
        if spec.corrupt.type == "prompt":
            ways["plain hooks"] = hooks_way(plan, model)
        else:
            ways["the authors' way"] = authors_way(plan, model)
        ways["pyvene"] = pyvene_way(plan, copy)
        cells = list(plan.cells)
        sample = random.Random(0).sample(cells, SAMPLE)
        larger = random.Random(1).sample(cells, 8 * SAMPLE) + sample
        seconds: dict[str, list[float]] = {name: [] for name in ways}
        values: dict[str, dict[str, float]] = {}
        for _ in range(ROUNDS):
            for name, way in ways.items():
                some = {"interv": cells, "interv, reference": larger}.get(name, sample)
                began = time.perf_counter()
                values[name] = way(some)
                scale = len(cells) / len(some)
                seconds[name].append((time.perf_counter() - began) * scale)
        block = sum(p.numel() for p in model.module.model.layers[0].parameters())
        flops = 2 * block * sum(p.block_tokens for p in make_packs(plan, "suffix"))
        ours = statistics.median(seconds["interv"])
        for name in ways:
            known = values["interv, reference"]
            shared = known.keys() & values[name].keys()
            rows.append(
                {
                    "work": f"{title}: {len(cells)} cells",
                    "by": name,
                    "times interv": statistics.median(seconds[name]) / ours,
                    "largest difference": max(
                        abs(values[name][key] - known[key]) for key in shared
                    ),
                    "of the arithmetic limit": flops / matmul_rate() / ours
                    if name == "interv"
                    else float("nan"),
                    "seconds": statistics.median(seconds[name]),
                }
            )
    frame = pd.DataFrame(rows)
    frame.to_csv(OUTPUT / "bench.csv", index=False)
    table = Table(title=f"median of {ROUNDS} rounds, {THREADS} CPU threads, smollm2-135m")
    for column in frame.columns[:-1]:
        table.add_column(column)
    for row in frame.itertuples(index=False):
        limit = "" if np.isnan(row[4]) else f"{row[4]:.0%}"
        table.add_row(row[0], row[1], f"{row[2]:.1f}", f"{row[3]:.0e}", limit)
    Console(width=110).print(table)


if __name__ == "__main__":
    main()
