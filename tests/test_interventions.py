from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from interv.engine.interventions import (
    Addition,
    BaseLambda,
    Clamp,
    Collect,
    Constant,
    Intervention,
    Lambda,
    Mean,
    Noise,
    ProjectOut,
    Replace,
    Scale,
    Skip,
    Subtraction,
    Vanilla,
    Zero,
)
from interv.engine.runs import Edit, Run, Site
from interv.errors import EngineError

with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
    warnings.simplefilter("ignore")
    import pyvene

BASE = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
SOURCE = torch.tensor([[10.0, 20.0], [30.0, 40.0]])
VALUE = torch.tensor([7.0, -7.0])
VALUES = torch.tensor([[1.0, -2.0], [0.5, 3.0]])
LEANING = torch.tensor([3.0, 4.0])


def twice_and_source(base: Tensor, source: Tensor) -> Tensor:
    return base.mul_(2) + source


def squared(base: Tensor) -> Tensor:
    return base.mul_(base)


FORMULAS: list[tuple[Intervention, Tensor]] = [
    (Vanilla(), SOURCE),
    (Addition(), BASE + SOURCE),
    (Subtraction(), BASE - SOURCE),
    (Zero(), torch.zeros(2, 2)),
    (Collect(), BASE),
    (Skip(), SOURCE),
    (Scale(-1.5), torch.tensor([[-1.5, -3.0], [-4.5, -6.0]])),
    (Clamp(1.5, 3.5), torch.tensor([[1.5, 2.0], [3.0, 3.5]])),
    (Clamp(5.0, 5.0), torch.full((2, 2), 5.0)),
    (Clamp(2.5, float("inf")), torch.tensor([[2.5, 2.5], [3.0, 4.0]])),
    (Lambda(twice_and_source), torch.tensor([[12.0, 24.0], [36.0, 48.0]])),
    (BaseLambda(torch.Tensor.double), BASE),
    (BaseLambda(squared), torch.tensor([[1.0, 4.0], [9.0, 16.0]])),
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


def _name(value: object) -> str:
    return value.name if isinstance(value, Intervention) else ""


def _source(intervention: Intervention, source: Tensor) -> Tensor | None:
    return source if intervention.needs_source or intervention.reads_input else None


@pytest.mark.parametrize(("intervention", "expected"), FORMULAS, ids=_name)
def test_formula(intervention: Intervention, expected: Tensor) -> None:
    base, source = BASE.clone(), SOURCE.clone()
    result = intervention.apply(base, _source(intervention, source))
    torch.testing.assert_close(result, expected)
    assert torch.equal(base, BASE), "the base was written into"
    assert torch.equal(source, SOURCE), "the source was written into"


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize(("intervention", "expected"), FORMULAS, ids=_name)
def test_the_result_is_in_the_bases_numbers(
    intervention: Intervention, expected: Tensor, dtype: torch.dtype
) -> None:
    result = intervention.apply(BASE.to(dtype), _source(intervention, SOURCE.to(dtype)))
    assert result.dtype == dtype
    torch.testing.assert_close(result.float(), expected, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("intervention", [*(i for i, _ in FORMULAS), Noise(0.1, 3, 1)], ids=_name)
def test_leading_dimensions_are_rows_one_at_a_time(intervention: Intervention) -> None:
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(3, 4, 2, 2, generator=generator)
    source = torch.randn(3, 4, 2, 2, generator=generator)
    together = intervention.apply(base, _source(intervention, source))
    assert together.shape == base.shape
    for i in range(3):
        for j in range(4):
            alone = intervention.apply(base[i, j], _source(intervention, source[i, j]))
            torch.testing.assert_close(together[i, j], alone)


def test_one_source_for_many_rows() -> None:
    base = torch.randn(3, 2, 2, generator=torch.Generator().manual_seed(0))
    assert torch.equal(Vanilla().apply(base, SOURCE), SOURCE.expand(3, 2, 2))
    assert torch.equal(Addition().apply(base, SOURCE), base + SOURCE)


def test_noise_is_the_authors_draw() -> None:
    authors = np.random.RandomState(1).randn(10, 4, 8)
    base = torch.randn(4, 8)
    for draw in range(10):
        got = Noise(0.1, 1, draw).apply(base, None)
        expected = (base.double() + 0.1 * torch.from_numpy(authors[draw])).float()
        assert torch.equal(got, expected)


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (Vanilla(), pyvene.VanillaIntervention),
        (Addition(), pyvene.AdditionIntervention),
        (Subtraction(), pyvene.SubtractionIntervention),
        (Zero(), pyvene.ZeroIntervention),
        (Collect(), pyvene.CollectIntervention),
        (Skip(), pyvene.SkipIntervention),
    ],
    ids=_name,
)
def test_as_pyvene(ours: Intervention, theirs: Callable[..., Callable[..., Tensor]]) -> None:
    generator = torch.Generator().manual_seed(1)
    base, source = torch.randn(2, 3, 4, 6, generator=generator)
    given_ours = _source(ours, source)
    # pyvene writes into its base.
    expected = theirs(embed_dim=6)(base.clone(), given_ours)
    assert torch.equal(ours.apply(base, given_ours), expected)


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (Constant(Vanilla(), VALUE), pyvene.VanillaIntervention),
        (Replace(VALUE), pyvene.VanillaIntervention),
        (Constant(Addition(), VALUE), pyvene.AdditionIntervention),
        (Constant(Subtraction(), VALUE), pyvene.SubtractionIntervention),
    ],
    ids=_name,
)
def test_a_constant_as_pyvenes_source_representation(
    ours: Intervention, theirs: Callable[..., Callable[..., Tensor]]
) -> None:
    expected = theirs(embed_dim=2, source_representation=VALUE)(BASE.clone(), None)
    assert torch.equal(ours.apply(BASE, None), expected)


SHAPES = st.lists(st.integers(1, 4), max_size=2).flatmap(
    lambda leading: st.tuples(*map(st.just, leading), st.integers(1, 5), st.integers(1, 8))
)


@given(shape=SHAPES, seed=st.integers(0, 1000))
def test_identities(shape: tuple[int, ...], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    base = torch.randn(shape, generator=generator)
    value = torch.randn(shape[-2:], generator=generator)
    assert torch.equal(Vanilla().apply(base, base), base), "self-swap"
    # add(v) = subtract(−v), a constant source = the same at run time, zero = b · 0
    added = Addition().apply(base, value)
    assert torch.equal(added, Subtraction().apply(base, -value))
    assert torch.equal(added, Constant(Addition(), value).apply(base, None))
    assert torch.equal(
        Zero().apply(base, None), BaseLambda(lambda b: b * 0).apply(base, None).abs()
    )
    assert torch.equal(Scale(1.0).apply(base, None), base)
    assert torch.equal(Replace(value).apply(base, None), Vanilla().apply(base, value))


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


@pytest.mark.parametrize(("intervention", "_"), FORMULAS, ids=_name)
def test_an_intervention_is_part_of_a_run(intervention: Intervention, _: Tensor) -> None:
    source = Run((1,)) if intervention.needs_source else None
    edit = Edit(Site("block_output", 0, (0,)), intervention, source)
    run = Run((1, 2), (edit,))
    assert {run: 1}[Run((1, 2), (edit,))] == 1


def test_which_are_equal() -> None:
    assert Noise(0.1, 1, 2) == Noise(0.1, 1, 2) != Noise(0.1, 1, 3)
    assert Scale(2.0) == Scale(2.0) != Scale(3.0)
    assert Clamp(0.0, 1.0) == Clamp(0.0, 1.0) != Clamp(0.0, 2.0)
    assert len({Vanilla(), Vanilla(), Addition(), Skip(), Skip()}) == 3
    assert Lambda(twice_and_source) == Lambda(twice_and_source)
    assert Lambda(twice_and_source) != Lambda(torch.add)
    # Tensors are hashed by identity.
    mean = Mean(VALUE)
    assert mean == mean
    assert mean != Mean(VALUE)


def test_which_look_at_a_position_alone() -> None:
    """Where it is said of a class, leaving positions out changes nothing at the others."""
    generator = torch.Generator().manual_seed(2)
    base, source = torch.randn(2, 2, 2, generator=generator)
    for intervention, _ in FORMULAS:
        if not intervention.positionwise:
            continue
        whole = intervention.apply(base, _source(intervention, source))
        for position in (0, 1):
            one = slice(position, position + 1)
            alone = intervention.apply(base[one], _source(intervention, source[one]))
            torch.testing.assert_close(alone, whole[one])
    assert {type(i).name for i, _ in FORMULAS if not i.positionwise} == {
        "lambda",
        "base_lambda",
        "mean",
        "replace",
        "constant",
    }
    assert not Noise.positionwise
    narrow, wide = (Noise(1.0, 1, 1).apply(torch.zeros(n, 2), None) for n in (1, 2))
    assert not torch.equal(narrow, wide[:1])


THREE_WIDE = torch.ones(2, 3)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Vanilla().apply(BASE, THREE_WIDE), "vanilla: the source is 3 wide, the site 2"),
        (lambda: Addition().apply(BASE, torch.ones(2)), "no positions, the site 2"),
        (lambda: Addition().apply(BASE, BASE[:1]), "addition: the source has 1 positions, .* 2"),
        (lambda: Vanilla().apply(BASE, BASE.expand(3, 2, 2)), r"\(3, 2, 2\), the site \(2, 2\)"),
        (lambda: Vanilla().apply(BASE, None), "vanilla: there is no source"),
        (lambda: Skip().apply(BASE, None), "skip: there is no module's input"),
        (lambda: Skip().apply(BASE, THREE_WIDE), "the module's input is 3 wide, the site 2"),
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
        (lambda: Clamp(2.0, 1.0), "low is 2.0, which is not at most high, 1.0"),
        (lambda: Clamp(float("nan"), 1.0), "low is nan"),
        (lambda: Scale(float("inf")), "factor is inf"),
        (lambda: BaseLambda(lambda b: b[:1]).apply(BASE, None), r"\(1, 2\), the site has \(2, 2\)"),
        (lambda: Lambda(torch.equal).apply(BASE, BASE), "gave bool"),
    ],
)
def test_what_does_not_fit_is_an_error(make: Callable[[], object], message: str) -> None:
    with pytest.raises(EngineError, match=message):
        make()


def test_an_edit_has_a_source_exactly_when_it_needs_one() -> None:
    site = Site("block_output", 0, (0,))
    with pytest.raises(EngineError, match="needs a source"):
        Edit(site, Vanilla())
    with pytest.raises(EngineError, match="takes no source"):
        Edit(site, Zero(), Run((1,)))
