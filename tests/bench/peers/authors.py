"""As in the ROME authors' `trace_with_patch`: the clean row and the noisy ones in each forward.

States are copied from row 0 into the others as the forward goes by; the logits are those of
all positions.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from tests.bench.cases import Case, Cell, Prompt
from tests.bench.peers import common
from tests.bench.peers.hooks import changing, noised, where


class Authors:
    def __init__(self, case: Case, folder: Path) -> None:
        self._case = case
        self._model = common.load(folder)

    def prepare(self, prompt: Prompt) -> None:
        """Nothing is kept."""

    def values(self, prompt: Prompt, cells: Sequence[Cell]) -> list[float]:
        ids = torch.tensor([prompt.clean] * (1 + self._case.draws))
        noise = common.noise_of(self._case, prompt)
        found = []
        for cell in cells:
            at, columns = where(cell)

            def restore(states: Tensor, at: slice = at, columns: slice = columns) -> Tensor:
                states = states.clone()
                states[1:, at, columns] = states[0, at, columns]
                return states

            with contextlib.ExitStack() as stack:
                stack.enter_context(noised(self._model, noise, prompt.subject))
                for layer in cell.layers:
                    stack.enter_context(changing(self._model, cell.component, layer, restore))
                logits = self._model(ids).logits
            found.append(common.value_of(self._case, prompt, logits[1:, -1]))
        return found


if __name__ == "__main__":
    common.main(Authors, "torch")
