"""Functions of the caller's own."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from interv.engine.functions import BaseLambda, Lambda
from interv.engine.interventions import Intervention
from interv.errors import EngineError
from tests.samples import name_of, source_for

BASE = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
SOURCE = torch.tensor([[10.0, 20.0], [30.0, 40.0]])


def twice_and_source(base: Tensor, source: Tensor) -> Tensor:
    return base.mul_(2) + source


def squared(base: Tensor) -> Tensor:
    return base.mul_(base)


FORMULAS: list[tuple[Intervention, Tensor]] = [
    (Lambda(twice_and_source), torch.tensor([[12.0, 24.0], [36.0, 48.0]])),
    (BaseLambda(torch.Tensor.double), BASE),
    (BaseLambda(squared), torch.tensor([[1.0, 4.0], [9.0, 16.0]])),
]


@pytest.mark.parametrize(("intervention", "expected"), FORMULAS, ids=name_of)
def test_formula(intervention: Intervention, expected: Tensor) -> None:
    base, source = BASE.clone(), SOURCE.clone()
    torch.testing.assert_close(intervention.apply(base, source_for(intervention, source)), expected)
    assert torch.equal(base, BASE), "the base was written into"
    assert torch.equal(source, SOURCE), "the source was written into"


def test_a_function_is_itself_only() -> None:
    assert Lambda(twice_and_source) == Lambda(twice_and_source)
    assert Lambda(twice_and_source) != Lambda(torch.add)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: BaseLambda(lambda b: b[:1]).apply(BASE, None), r"\(1, 2\), the site has \(2, 2\)"),
        (lambda: Lambda(torch.equal).apply(BASE, BASE), "gave bool"),
    ],
)
def test_what_does_not_fit_is_an_error(make: Callable[[], object], message: str) -> None:
    with pytest.raises(EngineError, match=message):
        make()
