"""A low-rank adapter against its formula."""

from __future__ import annotations

import pytest
import torch

from interv.engine.adapters import Adapter, Lora
from interv.errors import EngineError
from tests.samples import BASE, WIDTH, numbers


def test_lora() -> None:
    down, up = numbers(WIDTH, 2), numbers(2, WIDTH, seed=1)
    result = Lora(Adapter(down, up, 3.0)).apply(BASE, None)
    torch.testing.assert_close(result, BASE + 1.5 * (BASE @ down) @ up)
    fresh = Lora(Adapter.seeded(WIDTH, 2, 3.0, seed=0))
    assert torch.equal(fresh.apply(BASE, None), BASE), "a new adapter does something"
    assert fresh.adapter.down.abs().max() <= WIDTH**-0.5
    assert fresh.adapter.down.abs().min() > 0


def test_what_does_not_fit_is_an_error() -> None:
    with pytest.raises(EngineError, match=r"up \(4, 2\)"):
        Adapter(torch.ones(4, 2), torch.ones(4, 2), 1.0)
