"""What every plan of a sweep is made of.

A *cell* is one thing to compute on one prompt (a restoration, a patch, a path). A *label* is one
line of the results; labels that ask for the same thing (a position that has two roles,
overlapping grids) share a cell. A cell is computed once for each draw: those are the rows that
the executor batches.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from interv.models import ModelFacts, ModelFiles
from interv.models.families import Reach
from interv.spec import LoadedSpec


@dataclass(frozen=True, slots=True)
class Cell:
    """What is computed as one, on one prompt; `id` is the hash of all that decides its value."""

    id: str
    prompt: int


@dataclass(frozen=True)
class Plan(ABC):
    """All that a run will do, known before it starts.

    Attributes:
        cells: by prompt, in the grid's order, each once.
        draws: rows of one cell.
        baselines: for each prompt the id of its clean and corrupted values.
        identity: of the experiment; None while the weights are not at hand.
        unchecked: what could not be checked, and why.
    """

    loaded: LoadedSpec[Any]
    files: ModelFiles
    facts: ModelFacts | None
    cells: Sequence[Cell]
    draws: int
    baselines: dict[int, str]
    identity: str | None
    unchecked: tuple[str, ...]

    @property
    def spec(self) -> Any:
        return self.loaded.spec

    @property
    def reach(self) -> Reach:
        """Where the suffix executor can start a row of this model."""
        family = self.facts.family if self.facts else None
        return family.reach if family else "positions"

    @property
    def executor(self) -> Literal["reference", "suffix"]:
        """Who computes the cells: the suffix executor needs a plain model on one device."""
        if self.spec.run.executor == "auto":
            quantised = "quantization_config" in (self.files.config or {})
            return "reference" if self.spec.model.device_map or quantised else "suffix"
        chosen: Literal["reference", "suffix"] = self.spec.run.executor
        return chosen

    @property
    def headline(self) -> str:
        """How much it is, in a few words."""
        return f"{len(self.baselines):,} prompts, {len(self.cells):,} points of {self.draws:,} rows"

    @property
    def notes(self) -> list[str]:
        """What should be known of the data and of n before anything runs, a sentence each."""
        return []

    @property
    def prompt_indices(self) -> Iterable[int]:
        """The prompts, in the data's order."""
        return self.baselines

    @property
    def expected_cells(self) -> Sequence[Cell]:
        """Cells that will be computed, for the cost: all, unless a screen chooses among them."""
        return self.cells

    @abstractmethod
    def tokens(self, prompt: int) -> int:
        """Length of one row: the prompt and, but for their last tokens, its answers."""

    @abstractmethod
    def width(self, cell: Cell) -> int:
        """Tokens of one row of a cell that run through each block; 0: it changes nothing."""

    @abstractmethod
    def first_layer(self, cell: Cell) -> int:
        """The first block that a cell's rows run through."""

    @abstractmethod
    def logits(self, prompt: int) -> int:
        """Numbers that the head gives for one row."""

    @abstractmethod
    def kept_tokens(self, cells: Iterable[Cell]) -> int:
        """Tokens of the sources and bases of these cells, and of their prompts' baselines."""

    @abstractmethod
    def naive_tokens(self, cell: Cell) -> int:
        """Tokens of a cell where each runs by itself, with its sources, and nothing is kept."""

    @abstractmethod
    def labels_of(self, metrics: Sequence[str]) -> Iterator[dict[str, object]]:
        """The lines of summary.csv that the plan will have, as columns; repeated for prompts."""


def digest(key: str, name: str) -> str:
    """An id: of something named `name` under what `key` is the hash of."""
    return hashlib.sha256(f"{key}|{name}".encode()).hexdigest()[:16]


def window_layers(centre: int, window: int, n_layers: int) -> tuple[int, ...]:
    """Layers `[centre - window // 2, centre + ceil(window / 2))`, clipped to the model.

    The authors' code (`trace_important_window` in experiments/causal_trace.py); the paper's
    text says one layer later.
    """
    low, high = max(0, centre - window // 2), min(n_layers, centre - (-window // 2))
    return tuple(range(low, high))
