"""The plain types against their formulas, and against pyvene."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from interv.engine.constants import Constant, Replace
from interv.engine.functions import BaseLambda
from interv.engine.interventions import (
    Addition,
    Clamp,
    Collect,
    Intervention,
    Noise,
    Scale,
    Skip,
    Subtraction,
    Vanilla,
    Zero,
)
from interv.engine.runs import Edit, Run, Site
from interv.errors import EngineError
from tests.samples import name_of, pyvene, source_for

BASE = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
SOURCE = torch.tensor([[10.0, 20.0], [30.0, 40.0]])
THREE_WIDE = torch.ones(2, 3)
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
]


@pytest.mark.parametrize(("intervention", "expected"), FORMULAS, ids=name_of)
def test_formula(intervention: Intervention, expected: Tensor) -> None:
    base, source = BASE.clone(), SOURCE.clone()
    torch.testing.assert_close(intervention.apply(base, source_for(intervention, source)), expected)
    assert torch.equal(base, BASE), "the base was written into"
    assert torch.equal(source, SOURCE), "the source was written into"


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
    ids=name_of,
)
def test_as_pyvene(ours: Intervention, theirs: Callable[..., Callable[..., Tensor]]) -> None:
    generator = torch.Generator().manual_seed(1)
    base, source = torch.randn(2, 3, 4, 6, generator=generator)
    given_ours = source_for(ours, source)
    # pyvene writes into its base.
    expected = theirs(embed_dim=6)(base.clone(), given_ours)
    assert torch.equal(ours.apply(base, given_ours), expected)


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


def test_which_are_equal() -> None:
    assert Noise(0.1, 1, 2) == Noise(0.1, 1, 2) != Noise(0.1, 1, 3)
    assert Scale(2.0) == Scale(2.0) != Scale(3.0)
    assert Clamp(0.0, 1.0) == Clamp(0.0, 1.0) != Clamp(0.0, 2.0)
    assert len({Vanilla(), Vanilla(), Addition(), Skip(), Skip()}) == 3


def test_an_edit_has_a_source_exactly_when_it_needs_one() -> None:
    site = Site("block_output", 0, (0,))
    with pytest.raises(EngineError, match="needs a source"):
        Edit(site, Vanilla())
    with pytest.raises(EngineError, match="takes no source"):
        Edit(site, Zero(), Run((1,)))


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
        (lambda: Clamp(2.0, 1.0), "low is 2.0, which is not at most high, 1.0"),
        (lambda: Clamp(float("nan"), 1.0), "low is nan"),
        (lambda: Scale(float("inf")), "factor is inf"),
    ],
)
def test_what_does_not_fit_is_an_error(make: Callable[[], object], message: str) -> None:
    with pytest.raises(EngineError, match=message):
        make()
