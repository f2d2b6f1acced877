"""What a plan is made of.

A *cell* is one restoration on one prompt: a component, layers, one position, and what is held
at its corrupted value. A *label* is one line of the results; labels that ask for the same
restoration (a position that has two roles, overlapping grids) share a cell. A cell is computed
once for each noise draw: those are the rows that the executor batches.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from interv.models import ModelFacts, ModelFiles
from interv.models.families import Reach
from interv.spec import LoadedSpec
from interv.spec.schema import TraceSpec
from interv.task import Prompt


@dataclass(frozen=True, slots=True)
class Cell:
    """One restoration on one prompt. `id` is the hash of everything that decides its value."""

    id: str
    prompt: int
    component: str
    layers: tuple[int, ...]
    position: int
    sever: str | None


@dataclass(frozen=True, slots=True)
class Label:
    """One line of the results: how the spec came to ask for a cell."""

    cell: Cell
    prompt: int
    layer: int
    window: int
    role: str


@dataclass(frozen=True)
class Plan:
    """All that a run will do, known before it starts.

    Attributes:
        prompts: by index (`Prompt.index`), in the data's order.
        cells: by prompt, in the grid's order, each once.
        draws: rows of one cell.
        draw_seeds: for each prompt the seed of its noise (empty under another prompt).
        baselines: for each prompt the id of its clean and corrupted values.
        identity: of the experiment; None while the weights are not at hand.
        unchecked: what could not be checked, and why.
    """

    loaded: LoadedSpec[TraceSpec]
    files: ModelFiles
    facts: ModelFacts | None
    prompts: dict[int, Prompt]
    cells: tuple[Cell, ...]
    labels: tuple[Label, ...]
    draws: int
    draw_seeds: dict[int, int]
    baselines: dict[int, str]
    identity: str | None
    unchecked: tuple[str, ...]

    @property
    def spec(self) -> TraceSpec:
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
        return self.spec.run.executor

    def tokens(self, prompt: int) -> int:
        """Length of one row: the prompt and, but for its last token, the answer."""
        found = self.prompts[prompt]
        return len(found.ids) + len(found.answer_ids) - 1

    def is_no_op(self, cell: Cell) -> bool:
        """Whether clean and corrupted run are the same at the cell's position."""
        return cell.position < self.prompts[cell.prompt].first_changed
