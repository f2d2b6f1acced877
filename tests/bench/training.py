"""Time of a training step (forward, loss, backward, Adam) of one direction, against pyvene.

The default model, 16 pairs of 16 tokens, a low-rank rotation of rank 1 at the output of a block.
Sources and what stands before the site are computed once by interv, as `interv train-das` does
for a data set, and in each step by pyvene, as its notebooks do. Ours and theirs by turns.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import io
import statistics
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from interv.engine import LoadedModel, LowRankRotatedSpace, Site, load_model
from interv.engine.batch import BatchEdit, BatchRunner, Spot
from interv.engine.rotations import Rotation
from interv.models import locate
from interv.spec.schema import ModelSection
from tests.bench.peers.common import THREADS

with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
    warnings.simplefilter("ignore")
    import pyvene

PLACES = ((8, 9), (15, 9), (22, 15), (8, 1), (22, 1))
"""(layer, position)"""
ROWS = TOKENS = 16
WANTED = {(8, 9): 4, (15, 9): 5, (22, 15): 10, (8, 1): 2, (22, 1): 4}

Step = Callable[[], float]


def ours(model: LoadedModel, data: list[Tensor], layer: int, position: int, start: Tensor) -> Step:
    base, source, labels = data
    runner = BatchRunner(model.module, model.anatomy)
    swap = LowRankRotatedSpace(Rotation(start))
    spot = Spot(Site("block_output", layer), torch.full((ROWS, 1), position))
    [states] = runner.states(source, [spot])
    kept = runner.keep(base, layer + 1, position)
    optimizer = torch.optim.Adam(swap.parameters(), 1e-3)
    read = torch.full((ROWS,), TOKENS - 1)

    def step() -> float:
        optimizer.zero_grad()
        logits = runner.logits(base, [BatchEdit(spot, swap, states)], read, kept, finite=False)
        loss = nn.functional.cross_entropy(logits, labels)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        return float(loss.detach())

    return step


def theirs(model: LoadedModel, data: list[Tensor], layer: int, position: int, start: Tensor) -> Any:
    base, source, labels = data
    config = pyvene.IntervenableConfig(
        {
            "layer": layer,
            "component": "block_output",
            "intervention_type": pyvene.LowRankRotatedSpaceIntervention,
            "low_rank_dimension": 1,
        }
    )
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        wrapped = pyvene.IntervenableModel(config, model=copy.deepcopy(model.module))
    wrapped.set_device("cpu")
    wrapped.disable_model_gradients()
    [intervention] = wrapped.interventions.values()
    with torch.no_grad():
        intervention.rotate_layer.weight = start.clone()
    optimizer = torch.optim.Adam(intervention.parameters(), 1e-3)

    def step() -> float:
        optimizer.zero_grad()
        _, out = wrapped({"input_ids": base}, [{"input_ids": source}], {"sources->base": position})
        loss = nn.functional.cross_entropy(out.logits[:, -1], labels)
        loss.backward()
        optimizer.step()
        return float(loss.detach())

    return step


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.training", description=__doc__)
    parser.add_argument("--steps", type=int, default=12)
    steps = parser.parse_args().steps
    torch.set_num_threads(THREADS)
    section = ModelSection(name="smollm2-135m")
    model = load_model(locate(section, 0), section, 0, "cpu")
    generator = torch.Generator().manual_seed(0)
    data = [torch.randint(5, 40_000, (ROWS, TOKENS), generator=generator) for _ in range(2)]
    data.append(torch.randint(5, 40_000, (ROWS,), generator=generator))
    table = Table("layer", "position", "interv, ms", "pyvene, ms", "ratio", "wanted")
    for layer, position in PLACES:
        start = Rotation.seeded(model.module.config.hidden_size, 1, 0)().detach()
        both = [make(model, data, layer, position, start) for make in (ours, theirs)]
        losses = [step() for step in both]  # the first is slower, and the same
        if abs(losses[0] - losses[1]) > 1e-3:
            raise SystemExit(f"layer {layer}, position {position}: losses {losses} differ")
        seconds: list[list[float]] = [[], []]
        for _ in range(steps):
            for times, step in zip(seconds, both, strict=True):
                began = time.perf_counter()
                step()
                times.append(time.perf_counter() - began)
        own, other = (statistics.median(times) for times in seconds)
        table.add_row(
            str(layer),
            str(position),
            f"{1000 * own:.0f}",
            f"{1000 * other:.0f}",
            f"{other / own:.1f}",
            str(WANTED[layer, position]),
        )
    Console().print(table)


if __name__ == "__main__":
    main()
