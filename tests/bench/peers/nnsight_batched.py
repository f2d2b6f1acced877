"""nnsight, many cells in one trace: an invoke for each, batched into one forward."""

from __future__ import annotations

from collections.abc import Sequence

from tests.bench.cases import Cell, Prompt
from tests.bench.peers import common
from tests.bench.peers.nnsight_serial import Nnsight

ROWS = 32
"""Rows in one forward."""


class Batched(Nnsight):
    def values(self, prompt: Prompt, cells: Sequence[Cell]) -> list[float]:
        ids = common.corrupted_rows(self.case, prompt)
        size = max(1, ROWS // self.case.draws)
        found = []
        for start in range(0, len(cells), size):
            with self.model.trace(logits_to_keep=1) as tracer:
                logits = list().save()  # noqa: C408  # nnsight adds `save` to objects
                for cell in cells[start : start + size]:
                    with tracer.invoke(ids):
                        logits.append(self.patch(prompt, cell))
            found += [common.value_of(self.case, prompt, of_cell) for of_cell in logits]
        return found


if __name__ == "__main__":
    common.main(Batched, "nnsight")
