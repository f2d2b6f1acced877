from __future__ import annotations

import numpy as np
import pytest
import torch

from interv.engine import (
    Addition,
    Collect,
    Edit,
    Intervention,
    Noise,
    Run,
    Site,
    Subtraction,
    Vanilla,
    Zero,
)
from interv.errors import EngineError

BASE = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
SOURCE = torch.tensor([[10.0, 20.0], [30.0, 40.0]])


@pytest.mark.parametrize(
    ("intervention", "expected"),
    [
        (Vanilla(), SOURCE),
        (Addition(), BASE + SOURCE),
        (Subtraction(), BASE - SOURCE),
        (Zero(), torch.zeros(2, 2)),
        (Collect(), BASE),
    ],
)
def test_formula(intervention: Intervention, expected: torch.Tensor) -> None:
    base, source = BASE.clone(), SOURCE.clone()
    given = source if intervention.needs_source else None
    assert torch.equal(intervention.apply(base, given), expected)
    assert torch.equal(base, BASE), "the base was written into"
    assert torch.equal(source, SOURCE), "the source was written into"


def test_noise_is_the_authors_draw() -> None:
    authors = np.random.RandomState(1).randn(10, 4, 8)
    base = torch.randn(4, 8)
    for draw in range(10):
        got = Noise(0.1, 1, draw).apply(base, None)
        expected = (base.double() + 0.1 * torch.from_numpy(authors[draw])).float()
        assert torch.equal(got, expected)


def test_an_edit_has_a_source_exactly_when_it_needs_one() -> None:
    site = Site("block_output", 0, (0,))
    with pytest.raises(EngineError, match="needs a source"):
        Edit(site, Vanilla())
    with pytest.raises(EngineError, match="takes no source"):
        Edit(site, Zero(), Run((1,)))
