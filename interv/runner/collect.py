"""Running `interv collect`: activations as safetensors, a file for each group of prompts.

A file is written whole or not at all, so that a run goes on where it was stopped.
"""

from __future__ import annotations

import io
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from interv.engine import Mean, ReferenceExecutor, Run, Site, load_model
from interv.errors import ResumeError, UsageError
from interv.plan.collect import CollectPlan
from interv.runner import journal as journals
from interv.runner import record as records
from interv.runner.folder import write_atomically

INDEX = "index.csv"
_COLUMNS = ("row", "file", "row_in_file", "prompt", "position", "token_id", "token")


def run_collect(
    plan: CollectPlan, folder: Path, progress: Callable[[str, int, int], None]
) -> dict[str, Any]:
    """Save what is not in the folder yet. The caller holds the folder's lock.

    Returns:
        What this session adds to the record; empty where nothing was left to do.

    Raises:
        ResumeError: begun under other versions, device or threads.
        ModelError, EngineError, StorageError: as their docstrings say.
    """
    began = time.monotonic()
    path = folder / journals.JOURNAL
    journal = journals.read(path, repair=True)
    write_atomically(folder / INDEX, index_table(plan).to_csv(index=False))
    if journal and all(shard_name(i) in journal for i in range(len(plan.shards))):
        return {}
    run = plan.spec.run
    threads = records.threads(run.threads)
    if run.deterministic:
        records.be_deterministic()
    model = load_model(plan.files, plan.spec.model, plan.spec.seed, run.device)
    environment = records.environment(
        str(model.device), threads, "reference", 0, deterministic=run.deterministic
    )
    if journal is None:
        journal = journals.begin(path, environment, {}, {})
    elif changes := journals.difference(journal.environment, environment):
        raise ResumeError(f"{folder}: begun under other conditions ({'; '.join(changes)})")
    executor = ReferenceExecutor(model.module, model.anatomy)
    for i, shard in enumerate(plan.shards):
        name = shard_name(i)
        if name not in journal:
            tensors = _tensors(plan, executor, shard)
            write_atomically(folder / name, save(tensors))
            journal.append({name: {"rows": [_rows(plan, shard)]}})
        progress(name, i + 1, len(plan.shards))
    return {
        "seconds": round(time.monotonic() - began, 1),
        "peak_memory_bytes": records.peak_memory(),
    }


def shard_name(number: int) -> str:
    """Name of a file of activations."""
    return f"activations-{number:05d}.safetensors"


def index_table(plan: CollectPlan) -> pd.DataFrame:
    """A line for each row of the tensors: which prompt's, at which position."""
    texts = {text.index: text for text in plan.texts}
    lines: list[tuple[object, ...]] = []
    for i, shard in enumerate(plan.shards):
        here = 0
        for index in shard:
            for position in plan.positions[index]:
                text = texts[index]
                token = text.ids[position], text.tokens[position]
                lines.append((len(lines), shard_name(i), here, index, position, *token))
                here += 1
    return pd.DataFrame(lines, columns=list(_COLUMNS))


def _rows(plan: CollectPlan, shard: tuple[int, ...]) -> int:
    return sum(len(plan.positions[index]) for index in shard)


def _tensors(
    plan: CollectPlan, executor: ReferenceExecutor, shard: tuple[int, ...]
) -> dict[str, Tensor]:
    """`[row, width]`, of head components `[row, head, head_width]`; a pattern for each prompt."""
    texts = {text.index: text for text in plan.texts}
    runs = [Run(texts[index].ids) for index in shard]
    found: dict[str, Tensor] = {}
    for wanted in plan.wanted:
        site = Site(wanted.component, wanted.layer, None, wanted.heads)
        place = executor.sites.place(site)
        [states] = executor.states(runs, [site])
        rows = [
            state[list(plan.positions[index])] for index, state in zip(shard, states, strict=True)
        ]
        heads = executor.sites.anatomy.n_units(wanted.component)
        heads = len(wanted.heads) if wanted.heads else heads
        by_head = plan.is_by_head(wanted.component) and heads
        if by_head:
            rows = [row.unflatten(1, (heads, -1)) for row in rows]  # type: ignore[no-untyped-call]
        if place.pattern:
            # As many keys as the prompt has tokens: they do not stack.
            for index, row in zip(shard, rows, strict=True):
                found[f"{wanted.name}.prompt{index}"] = row.cpu().contiguous()
        else:
            found[wanted.name] = torch.cat(rows).cpu().contiguous()
    executor.forget()
    return found


@dataclass(frozen=True)
class Activations:
    """What a run of `interv collect` saved.

    Attributes:
        folder: the run folder.
    """

    folder: Path

    def __post_init__(self) -> None:
        if not (self.folder / INDEX).is_file():
            raise UsageError(f"{self.folder}: is not a run folder of `interv collect`")

    @cached_property
    def index(self) -> pd.DataFrame:
        """A line for each row: `prompt`, `position`, `token_id`, `token`."""
        return pd.read_csv(
            io.StringIO((self.folder / INDEX).read_text("utf-8")),
            keep_default_na=False,
            dtype={"token": str},
        )

    @property
    def names(self) -> list[str]:
        """What there is: `component.layer`."""
        with safe_open(self._files()[0], "pt") as file:
            return sorted(file.keys())

    def tensor(self, component: str, layer: int = 0) -> Tensor:
        """`[row, width]` (by head `[row, head, head_width]`), rows as in the index.

        Raises:
            UsageError: it was not saved, or the run is not finished.
        """
        name = f"{component}.{layer}"
        parts = []
        for path in self._files():
            if not path.is_file():
                raise UsageError(f"{path}: is missing; run the same `interv collect` again")
            with safe_open(path, "pt") as file:
                if name not in file.keys():  # noqa: SIM118 - not a mapping
                    raise UsageError(f"{self.folder}: no {name}; it has {', '.join(self.names)}")
                parts.append(file.get_tensor(name))
        return torch.cat(parts)

    def mean(self, component: str, layer: int = 0, *, per_position: bool = False) -> Mean:
        """Ablation by the mean over all rows, or over the prompts at each position.

        Raises:
            UsageError: as `tensor`, or prompts that differ in their positions.
        """
        states = self.tensor(component, layer).flatten(1)
        if not per_position:
            return Mean(states.mean(0))
        positions = self.index.groupby("prompt", sort=False)["position"].agg(tuple)
        if positions.nunique() != 1:
            raise UsageError(f"{self.folder}: prompts of different positions have no mean by them")
        return Mean(states.reshape(len(positions), -1, states.shape[1]).mean(0))

    def _files(self) -> list[Path]:
        return [self.folder / name for name in self.index["file"].drop_duplicates()]
