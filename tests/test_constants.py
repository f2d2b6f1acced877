"""Saved activations and directions against formulas, and against pyvene."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from interv.engine.constants import Constant, Mean, ProjectOut, Replace
from interv.engine.interventions import Addition, Intervention, Subtraction, Vanilla, Zero
from interv.errors import EngineError
from tests.samples import name_of, pyvene, source_for

BASE = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
SOURCE = torch.tensor([[10.0, 20.0], [30.0, 40.0]])
VALUE = torch.tensor([7.0, -7.0])
VALUES = torch.tensor([[1.0, -2.0], [0.5, 3.0]])
LEANING = torch.tensor([3.0, 4.0])
THREE_WIDE = torch.ones(2, 3)
FORMULAS: list[tuple[Intervention, Tensor]] = [
    (Mean(VALUE), torch.tensor([[7.0, -7.0], [7.0, -7.0]])),
    (Mean(VALUES), VALUES),
    (Replace(VALUE), torch.tensor([[7.0, -7.0], [7.0, -7.0]])),
    (Replace(VALUES), VALUES),
    (Constant(Addition(), VALUE), torch.tensor([[8.0, -5.0], [10.0, -3.0]])),
    (Constant(Vanilla(), VALUES), VALUES),
    # (1, 2) · (3, 4) / 5 = 2.2 and (3, 4) · (3, 4) / 5 = 5
    (ProjectOut(LEANING), torch.tensor([[1 - 2.2 * 0.6, 2 - 2.2 * 0.8], [0.0, 0.0]])),
    (ProjectOut(torch.stack([LEANING, VALUE])), torch.zeros(2, 2)),
]


@pytest.mark.parametrize(("intervention", "expected"), FORMULAS, ids=name_of)
def test_formula(intervention: Intervention, expected: Tensor) -> None:
    base, source = BASE.clone(), SOURCE.clone()
    torch.testing.assert_close(intervention.apply(base, source_for(intervention, source)), expected)
    assert torch.equal(base, BASE), "the base was written into"
    assert torch.equal(source, SOURCE), "the source was written into"


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (Constant(Vanilla(), VALUE), pyvene.VanillaIntervention),
        (Replace(VALUE), pyvene.VanillaIntervention),
        (Constant(Addition(), VALUE), pyvene.AdditionIntervention),
        (Constant(Subtraction(), VALUE), pyvene.SubtractionIntervention),
    ],
    ids=name_of,
)
def test_a_constant_as_pyvenes_source_representation(
    ours: Intervention, theirs: Callable[..., Callable[..., Tensor]]
) -> None:
    expected = theirs(embed_dim=2, source_representation=VALUE)(BASE.clone(), None)
    assert torch.equal(ours.apply(BASE, None), expected)


@given(n=st.integers(1, 3), seed=st.integers(0, 1000))
def test_what_is_projected_out_is_gone_and_the_rest_stays(n: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    directions = 100 * torch.randn(n, 8, generator=generator)
    base = torch.randn(4, 8, generator=generator)
    result = ProjectOut(directions).apply(base, None)
    torch.testing.assert_close(result @ directions.T / 100, torch.zeros(4, n), atol=2e-5, rtol=0)
    # Plainly: the rest of a least-squares fit of the base by the directions.
    fit = torch.linalg.lstsq(directions.T.double(), base.T.double()).solution
    expected = base - (directions.T.double() @ fit).T.float()
    torch.testing.assert_close(result, expected, atol=1e-5, rtol=1e-5)


def test_directions_that_depend_on_each_other_span_less() -> None:
    both = ProjectOut(torch.stack([LEANING, -2 * LEANING]))
    assert both.basis.shape == (2, 1)
    torch.testing.assert_close(both.apply(BASE, None), ProjectOut(LEANING).apply(BASE, None))


def test_a_short_direction_counts_as_much_as_a_long_one() -> None:
    both = ProjectOut(torch.stack([1e6 * LEANING, 1e-6 * VALUE]))
    torch.testing.assert_close(both.apply(BASE, None), torch.zeros(2, 2))


def test_a_mean_of_activations() -> None:
    rows = torch.tensor([[1.0, 2.0], [3.0, 6.0]])
    assert torch.equal(Mean.of(rows).value, torch.tensor([2.0, 4.0]))
    by_position = Mean.of(torch.stack([BASE, SOURCE]))
    assert torch.equal(by_position.apply(BASE, None), (BASE + SOURCE) / 2)


def test_a_tensor_is_hashed_by_identity() -> None:
    mean = Mean(VALUE)
    assert mean == mean
    assert mean != Mean(VALUE)


def test_values_are_copied() -> None:
    value = VALUE.clone()
    edits = [Mean(value), Replace(value), Constant(Vanilla(), value)]
    value.zero_()
    for edit in edits:
        assert torch.equal(edit.apply(BASE, None), VALUE.expand(2, 2))


def test_a_gradient_reaches_a_constant() -> None:
    value = VALUE.clone().requires_grad_()
    Constant(Addition(), value).apply(BASE, None).sum().backward()
    assert value.grad is not None
    assert torch.equal(value.grad, torch.tensor([2.0, 2.0]))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Mean(THREE_WIDE[0]).apply(BASE, None), "mean: the value is 3 wide, the site 2"),
        (lambda: Replace(THREE_WIDE).apply(BASE, None), "replace: .* 3 wide, the site 2"),
        (lambda: Replace(torch.ones(3, 2)).apply(BASE, None), "3 positions, the site 2"),
        (lambda: Constant(Addition(), THREE_WIDE[0]).apply(BASE, None), "3 wide, the site 2"),
        (lambda: Constant(Zero(), VALUE), "zero takes no source"),
        (lambda: ProjectOut(THREE_WIDE).apply(BASE, None), "direction is 3 wide, the site 2"),
        (lambda: ProjectOut(torch.zeros(2)), "a direction is zero"),
        (lambda: Mean(torch.tensor([1.0, float("nan")])), "not finite"),
        (lambda: Mean(torch.tensor([1, 2])), "int64"),
        (lambda: Replace(torch.ones(1, 1, 2)), r"\(1, 1, 2\)"),
        (lambda: Mean.of(torch.ones(0, 2)), r"\(0, 2\)"),
    ],
)
def test_what_does_not_fit_is_an_error(make: Callable[[], object], message: str) -> None:
    with pytest.raises(EngineError, match=message):
        make()
