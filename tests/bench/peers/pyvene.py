"""pyvene as in its tutorials: a configuration, a source run and a base run for each cell."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyvene
import torch
from torch import Tensor

from tests.bench.cases import Case, Cell, Prompt
from tests.bench.peers import common


class Noising(pyvene.ConstantSourceIntervention, pyvene.LocalistRepresentationIntervention):
    """The draws' noise, added to the first block's input at the subject, a draw for each row."""

    def __init__(self, noise: Tensor, **options: Any) -> None:
        super().__init__(**options)
        self.noise = noise

    def forward(self, base: Tensor, source: Any = None, subspaces: Any = None) -> Tensor:
        return base + self.noise.reshape(base.shape)


class Pyvene:
    def __init__(self, case: Case, folder: Path) -> None:
        self._case = case
        self._model = common.load(folder)

    def prepare(self, prompt: Prompt) -> None:
        """pyvene runs the source with each cell."""

    def values(self, prompt: Prompt, cells: Sequence[Cell]) -> list[float]:
        return [self._value(prompt, cell) for cell in cells]

    def _value(self, prompt: Prompt, cell: Cell) -> float:
        rows, n = self._case.draws, len(cell.layers)
        source = {"input_ids": torch.tensor([prompt.clean] * rows)}
        base = {"input_ids": common.corrupted_rows(self._case, prompt)}
        unit, index = ("pos", cell.position) if cell.head is None else ("h", cell.head)
        sites = [pyvene.RepresentationConfig(i, cell.component, unit, 1) for i in cell.layers]
        types: list[Any] = [pyvene.VanillaIntervention] * n
        at: list[Any] = [[[index]] * rows] * n
        where: Any = (at, at)
        sources: list[Any] = [source] * n
        if self._case.noise:
            noise = common.noise_of(self._case, prompt)
            subject = list(range(*prompt.subject))
            sites.insert(0, pyvene.RepresentationConfig(0, "block_input", "pos", len(subject)))
            types.insert(0, lambda **options: Noising(noise, **options))
            where, sources = ([None, *at], [[subject] * rows, *at]), [None, *sources]
        config = pyvene.IntervenableConfig(sites, intervention_types=types)
        wrapped = pyvene.IntervenableModel(config, self._model)
        wrapped.disable_model_gradients()
        _, out = wrapped(base, sources, {"sources->base": where})
        return common.value_of(self._case, prompt, out.logits[:, -1])


if __name__ == "__main__":
    common.main(Pyvene, "pyvene")
