"""nnsight, a trace for each cell; the clean run's states are kept by a trace of its own."""

from __future__ import annotations

import abc
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from nnsight import TransformersModel
from torch import Tensor

from tests.bench.cases import Case, Cell, Prompt
from tests.bench.peers import common
from tests.bench.peers.hooks import where

Place = tuple[int, str]


class Nnsight(abc.ABC):
    """The model and the clean states; how the cells are traced is left to two final classes."""

    def __init__(self, case: Case, folder: Path) -> None:
        self.case = case
        self.model = TransformersModel(
            common.load(folder), tokenizer=common.tokenizer(), task="text-generation"
        )
        # In the order of the forward: a trace that asks for what has passed is an error.
        self.places: list[Place] = sorted(
            {(i, c.component) for c in case.cells for i in c.layers},
            key=lambda place: (place[0], place[1] == "block_output", place[1]),
        )
        self.clean: dict[Place, Tensor] = {}
        self.noise: Tensor | None = None

    def prepare(self, prompt: Prompt) -> None:
        self.noise = common.noise_of(self.case, prompt) if self.case.noise else None
        with self.model.trace(torch.tensor([prompt.clean]), logits_to_keep=1):
            kept = dict().save()  # noqa: C408  # nnsight adds `save` to objects, not to displays
            for place in self.places:
                kept[place] = self.states(place)
        self.clean = dict(kept)

    def states(self, place: Place) -> Any:
        """Within a trace: the activations `[row, position, width]` at a place."""
        layer, component = place
        block = self.model.model.layers[layer]
        if component == "block_output":
            return block.output
        if component == "mlp_output":
            return block.mlp.output
        if component == "attention_output":
            return block.self_attn.output[0]
        return block.self_attn.o_proj.input

    def patch(self, prompt: Prompt, cell: Cell) -> Any:
        """Within a trace: make a cell's edits; gives the logits `[draw, vocab]` at the end."""
        if self.noise is not None:
            self.model.model.embed_tokens.output[:, slice(*prompt.subject)] += self.noise
        at, columns = where(cell)
        for layer in cell.layers:
            clean = self.clean[layer, cell.component]
            self.states((layer, cell.component))[:, at, columns] = clean[:, at, columns]
        return self.model.output.logits[:, -1]

    @abc.abstractmethod
    def values(self, prompt: Prompt, cells: Sequence[Cell]) -> list[float]: ...


class Serial(Nnsight):
    def values(self, prompt: Prompt, cells: Sequence[Cell]) -> list[float]:
        ids = common.corrupted_rows(self.case, prompt)
        found = []
        for cell in cells:
            with self.model.trace(ids, logits_to_keep=1):
                logits = self.patch(prompt, cell).save()
            found.append(common.value_of(self.case, prompt, logits))
        return found


if __name__ == "__main__":
    common.main(Serial, "nnsight")
