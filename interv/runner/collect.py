"""Running `interv collect`: activations as safetensors, a file for each group of prompts.

A file is written whole or not at all, so that a run goes on where it was stopped.
"""

from __future__ import annotations

import csv
import io
import time
from collections.abc import Callable, Sequence
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
from interv.engine.memory import halving
from interv.errors import ResumeError, UsageError
from interv.models.anatomy import is_by_head
from interv.models.known_faults import avoided_faults
from interv.plan.collect import CollectPlan
from interv.runner import journal as journals
from interv.runner import record as records
from interv.storage import write_atomically

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
    # Quoted: a token may be a bare carriage return, which would end its line.
    index = index_table(plan).to_csv(index=False, quoting=csv.QUOTE_NONNUMERIC)
    write_atomically(folder / INDEX, index)
    todo = [
        i
        for i in range(len(plan.shards))
        if journal is None or shard_name(i) not in journal or not (folder / shard_name(i)).is_file()
    ]
    if not todo:
        return {}
    with records.settings(plan.spec.run) as threads:
        model = load_model(plan.files, plan.spec.model, plan.spec.seed, plan.spec.run.device)
        environment = records.environment(
            str(model.device), threads, "reference", 0, deterministic=plan.spec.run.deterministic
        )
        if journal is None:
            journal = journals.begin(path, environment, {}, {})
        elif changes := journals.difference(journal.environment, environment):
            raise ResumeError(f"{folder}: begun under other conditions ({'; '.join(changes)})")
        executor = ReferenceExecutor(model.module, model.anatomy)
        for i in todo:
            name, shard = shard_name(i), plan.shards[i]
            write_atomically(folder / name, save(_shard(plan, executor, shard)))
            journal.append({name: {"rows": [_rows(plan, shard)]}})
            progress(name, i + 1, len(plan.shards))
        return {
            "seconds": round(time.monotonic() - began, 1),
            "peak_memory_bytes": records.peak_memory(),
            "known_faults_avoided": avoided_faults(plan.files.config),
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


def _shard(
    plan: CollectPlan, executor: ReferenceExecutor, shard: Sequence[int]
) -> dict[str, Tensor]:
    """The tensors of a file, in halves where memory is short."""

    def some(prompts: Sequence[int]) -> list[dict[str, Tensor]]:
        try:
            return [_tensors(plan, executor, prompts)]
        finally:
            executor.forget()

    parts = halving(shard, some)
    if len(parts) == 1:
        return parts[0]
    names = dict.fromkeys(name for part in parts for name in part)
    return {name: torch.cat([part[name] for part in parts if name in part]) for name in names}


def _tensors(
    plan: CollectPlan, executor: ReferenceExecutor, shard: Sequence[int]
) -> dict[str, Tensor]:
    """`[row, width]`, of head components `[row, head, head_width]`; a pattern for each prompt."""
    texts = {text.index: text for text in plan.texts}
    runs = [Run(texts[index].ids) for index in shard]
    sites = [Site(wanted.component, wanted.layer, None, wanted.heads) for wanted in plan.wanted]
    found: dict[str, Tensor] = {}
    for wanted, site, states in zip(plan.wanted, sites, executor.states(runs, sites), strict=True):
        place = executor.sites.place(site)
        rows = [
            state[list(plan.positions[index])] for index, state in zip(shard, states, strict=True)
        ]
        heads = executor.sites.anatomy.n_units(wanted.component)
        heads = len(wanted.heads) if wanted.heads else heads
        by_head = is_by_head(wanted.component) and heads
        if by_head:
            rows = [row.unflatten(1, (heads, -1)) for row in rows]  # type: ignore[no-untyped-call]
        if place.pattern:
            # As many keys as the prompt has tokens: they do not stack.
            for index, row in zip(shard, rows, strict=True):
                found[f"{wanted.name}.prompt{index}"] = row.cpu().contiguous()
        else:
            found[wanted.name] = torch.cat(rows).cpu().contiguous()
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
        # As bytes, or a token that is a carriage return would become a new line.
        return pd.read_csv(
            io.BytesIO((self.folder / INDEX).read_bytes()),
            keep_default_na=False,
            dtype={"token": str},
        )

    @property
    def names(self) -> list[str]:
        """What there is: `component.layer`; of a pattern `component.layer.prompt0` and so on."""
        return sorted({name for path in self._files() for name in _names(path)})

    def tensor(self, component: str, layer: int = 0) -> Tensor:
        """`[row, width]` (by head `[row, head, head_width]`), rows as in the index.

        Raises:
            UsageError: it was not saved, or the run is not finished.
        """
        return torch.cat([self._read(path, f"{component}.{layer}") for path in self._files()])

    def pattern(self, prompt: int, layer: int = 0) -> Tensor:
        """Attention `[row, head, key]` of one prompt, rows as its lines in the index.

        Raises:
            UsageError: as `tensor`, or there is no such prompt.
        """
        files = self.index.loc[self.index["prompt"] == prompt, "file"]
        if files.empty:
            raise UsageError(f"{self.folder}: has no prompt {prompt}")
        return self._read(self.folder / files.iloc[0], f"attention_weight.{layer}.prompt{prompt}")

    def mean(self, component: str, layer: int = 0, *, per_position: bool = False) -> Mean:
        """Ablation by the mean over all rows, or over the prompts at each position.

        Raises:
            UsageError: as `tensor`, or prompts that differ in their positions.
        """
        states = self.tensor(component, layer).flatten(1)
        if not per_position:
            return Mean.of(states)
        positions = self.index.groupby("prompt", sort=False)["position"].agg(tuple)
        if positions.nunique() != 1:
            raise UsageError(f"{self.folder}: prompts of different positions have no mean by them")
        return Mean.of(states.reshape(len(positions), -1, states.shape[1]))

    def _files(self) -> list[Path]:
        return [self.folder / name for name in self.index["file"].drop_duplicates()]

    def _read(self, path: Path, name: str) -> Tensor:
        if name not in _names(path):
            raise UsageError(f"{self.folder}: no {name}; it has {', '.join(self.names)}")
        with safe_open(path, "pt") as file:
            tensor: Tensor = file.get_tensor(name)
        return tensor


def _names(path: Path) -> list[str]:
    if not path.is_file():
        raise UsageError(f"{path}: is missing; run the same `interv collect` again")
    with safe_open(path, "pt") as file:
        return list(file.keys())
