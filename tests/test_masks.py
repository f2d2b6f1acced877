"""Gated swaps against plain formulas, against pyvene, and their gradients."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from interv.engine.interventions import Intervention
from interv.engine.masks import (
    Boundary,
    BoundlessRotatedSpace,
    Mask,
    SigmoidMask,
    SigmoidMaskRotatedSpace,
)
from interv.engine.rotations import LowRankRotatedSpace, Rotation
from interv.errors import EngineError
from tests.samples import BASE, MASK, SOURCE, WIDTH, R, W, as_pyvene, gradients, loss_of, same_as


def test_boundless_rotated_space() -> None:
    module = Boundary(WIDTH, boundary=0.4, temperature=1.5)
    i = torch.arange(WIDTH)
    m = 1 / (1 + torch.exp(-i / 1.5)) / (1 + torch.exp(-(0.4 * WIDTH - i) / 1.5))
    torch.testing.assert_close(module(), m)
    result = BoundlessRotatedSpace(Rotation(R), module).apply(BASE, SOURCE)
    torch.testing.assert_close(result, ((1 - m) * (BASE @ R) + m * (SOURCE @ R)) @ R.T)


def test_a_cold_boundary_swaps_the_first_coordinates() -> None:
    module = Boundary(WIDTH, boundary=0.6)
    module.set_temperature(torch.tensor(0.01, requires_grad=True))
    assert not module.temperature.requires_grad
    expected = torch.tensor([0.5, 1.0, 1.0, 1.0, 0.0, 0.0])
    torch.testing.assert_close(module(), expected)


def test_sigmoid_masks() -> None:
    m = 1 / (1 + torch.exp(-MASK / 0.7))
    mask = Mask(WIDTH, start=MASK, temperature=0.7)
    result = SigmoidMask(mask).apply(BASE, SOURCE)
    torch.testing.assert_close(result, (1 - m) * BASE + m * SOURCE)
    turned = SigmoidMaskRotatedSpace(Rotation(R), mask).apply(BASE, SOURCE)
    torch.testing.assert_close(turned, ((1 - m) * (BASE @ R) + m * (SOURCE @ R)) @ R.T)


@pytest.mark.parametrize("boundary", [0.5, 0.2, 1.3])
def test_boundless_rotated_space_as_pyvene(boundary: float) -> None:
    module = as_pyvene("BoundlessRotatedSpace")
    weight = module.rotate_layer.weight.detach()
    if boundary == 0.5:
        same_as(module, BoundlessRotatedSpace(Rotation(weight), Boundary(WIDTH)))
    module.set_intervention_boundaries(boundary)
    module.set_temperature(torch.tensor(0.8))
    gate = Boundary(WIDTH, boundary=boundary, temperature=0.8)
    same_as(module, BoundlessRotatedSpace(Rotation(weight), gate))


@pytest.mark.filterwarnings("ignore:To copy construct from a tensor")
def test_sigmoid_masks_as_pyvene() -> None:
    module = as_pyvene("SigmoidMask")
    same_as(module, SigmoidMask(Mask(WIDTH)))
    turned = as_pyvene("SigmoidMaskRotatedSpace")
    weight = turned.rotate_layer.weight.detach()
    mask = Mask(WIDTH, start=100.0, temperature=50.0)
    same_as(turned, SigmoidMaskRotatedSpace(Rotation(weight), mask))
    module.mask.data = turned.masks.data = MASK
    mask = Mask(WIDTH, start=MASK, temperature=0.01)
    same_as(module, SigmoidMask(mask))
    mask.set_temperature(50.0)
    same_as(turned, SigmoidMaskRotatedSpace(Rotation(weight), mask))


def tangent(gradient: Tensor, at: Tensor) -> Tensor:
    """The part of it along which the columns of `at` stay orthonormal."""
    inner = at.T @ gradient
    return gradient - at @ (inner + inner.T) / 2


def plain_low_rank(r: Tensor, base: Tensor, source: Tensor) -> Tensor:
    return base + (source @ r - base @ r) @ r.T


def plain_boundless(r: Tensor, beta: Tensor, base: Tensor, source: Tensor) -> Tensor:
    i = torch.arange(WIDTH)
    m = torch.sigmoid(i / 1.5) * torch.sigmoid((beta * WIDTH - i) / 1.5)
    return ((1 - m) * (base @ r) + m * (source @ r)) @ r.T


def plain_mask(r: Tensor, mask: Tensor, base: Tensor, source: Tensor) -> Tensor:
    m = torch.sigmoid(mask / 0.7)
    return ((1 - m) * (base @ r) + m * (source @ r)) @ r.T


@pytest.mark.parametrize("kind", ["low_rank", "boundless", "mask"])
def test_gradients_are_those_of_a_plain_implementation(kind: str) -> None:
    base, source = BASE.clone().requires_grad_(), SOURCE.clone().requires_grad_()
    start = W if kind == "low_rank" else R
    rotation, r = Rotation(start), start.clone().requires_grad_()
    if kind == "low_rank":
        ours: Intervention = LowRankRotatedSpace(rotation)
        plain = plain_low_rank(r, base, source)
        others: list[tuple[Tensor, Tensor]] = []
    elif kind == "boundless":
        boundary, beta = Boundary(WIDTH, boundary=0.4, temperature=1.5), torch.tensor(0.4)
        ours = BoundlessRotatedSpace(rotation, boundary)
        plain = plain_boundless(r, beta.requires_grad_(), base, source)
        others = [(boundary.boundary, beta)]
    else:
        mask, values = Mask(WIDTH, start=MASK, temperature=0.7), MASK.clone().requires_grad_()
        ours = SigmoidMaskRotatedSpace(rotation, mask)
        plain = plain_mask(r, values, base, source)
        others = [(mask.mask, values)]
    got = gradients(
        loss_of(ours.apply(base, source)), [rotation.free, base, source, *(o for o, _ in others)]
    )
    want = gradients(loss_of(plain), [r, base, source, *(p for _, p in others)])
    assert tangent(want[0], start).abs().max() > 1e-3, "nothing is tested"
    torch.testing.assert_close(
        tangent(got[0], start), tangent(want[0], start), atol=1e-5, rtol=1e-4
    )
    for mine, theirs in zip(got[1:], want[1:], strict=True):
        assert theirs.abs().max() > 1e-3, "nothing is tested"
        torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-4)


def test_gradients_of_the_plain_mask() -> None:
    mask, values = Mask(WIDTH, start=MASK, temperature=0.7), MASK.clone().requires_grad_()
    m = torch.sigmoid(values / 0.7)
    [got] = gradients(loss_of(SigmoidMask(mask).apply(BASE, SOURCE)), [mask.mask])
    [want] = gradients(loss_of((1 - m) * BASE + m * SOURCE), [values])
    torch.testing.assert_close(got, want)


def test_a_boundary_and_a_mask_learn() -> None:
    """They find the coordinates in which base and source are to be swapped."""
    wanted = BASE.clone()
    wanted[..., :2] = SOURCE[..., :2]
    masked = SigmoidMask(Mask(WIDTH, temperature=1.0))
    optimiser = torch.optim.Adam(masked.parameters(), lr=0.3)
    for _ in range(60):
        optimiser.zero_grad()
        (masked.apply(BASE, SOURCE) - wanted).square().mean().backward()
        optimiser.step()
    assert (masked.mask() > 0.5).tolist() == [True, True, False, False, False, False]
    bounded = BoundlessRotatedSpace(
        Rotation(torch.eye(WIDTH)), Boundary(WIDTH, boundary=0.9, temperature=0.5)
    )
    optimiser = torch.optim.Adam([bounded.boundary.boundary], lr=0.02)
    for _ in range(60):
        optimiser.zero_grad()
        (bounded.apply(BASE, SOURCE) - wanted).square().mean().backward()
        optimiser.step()
    assert 1 < bounded.boundary.boundary.item() * WIDTH < 2.5


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: BoundlessRotatedSpace(Rotation(R), Boundary(4)), "4 gates .* of rank 6"),
        (lambda: SigmoidMaskRotatedSpace(Rotation(W), Mask(6)), "6 gates .* of rank 2"),
        (lambda: Boundary(4, temperature=0.0), "above 0, not 0.0"),
        (lambda: Mask(4).set_temperature(float("nan")), "above 0, not nan"),
        (lambda: Mask(4).set_temperature(torch.ones(4)), "a temperature is a finite number"),
        (lambda: Mask(4, start=torch.ones(3)), r"\(3,\) where the width is 4"),
    ],
)
def test_what_does_not_fit_is_an_error(make: Callable[[], object], message: str) -> None:
    with pytest.raises(EngineError, match=message):
        make()
