"""Swaps in a basis against plain formulas, against pyvene, and their gradients."""

from __future__ import annotations

import copy
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from interv.engine.rotations import LowRankRotatedSpace, PCARotatedSpace, RotatedSpace, Rotation
from interv.errors import EngineError
from tests.samples import BASE, SOURCE, WIDTH, R, W, as_pyvene, numbers, orthonormal, pca, same_as


def test_rotated_space_swaps_coordinates_in_the_basis() -> None:
    rotated = BASE @ R
    rotated[..., [1, 4]] = (SOURCE @ R)[..., [1, 4]]
    result = RotatedSpace(Rotation(R), (1, 4)).apply(BASE, SOURCE)
    torch.testing.assert_close(result, rotated @ R.T)
    all_of_it = RotatedSpace(Rotation(R)).apply(BASE, SOURCE)
    torch.testing.assert_close(all_of_it, SOURCE)


def test_low_rank_rotated_space() -> None:
    result = LowRankRotatedSpace(Rotation(W)).apply(BASE, SOURCE)
    torch.testing.assert_close(result, BASE + (SOURCE @ W - BASE @ W) @ W.T)
    one = LowRankRotatedSpace(Rotation(W), (1,)).apply(BASE, SOURCE)
    torch.testing.assert_close(one, BASE + ((SOURCE - BASE) @ W[:, 1])[..., None] * W[:, 1])


@pytest.mark.parametrize("standardise", [False, True])
def test_principal_components(standardise: bool) -> None:
    activations = numbers(50, WIDTH, seed=7) @ numbers(WIDTH, WIDTH, seed=8) + 2
    fitted = PCARotatedSpace.fit(activations, standardise=standardise, dims=(0, 3))
    # Plainly: eigenvectors of the covariance, or of the correlation.
    covariance = torch.corrcoef(activations.T) if standardise else torch.cov(activations.T)
    _, vectors = torch.linalg.eigh(covariance.double())
    components = vectors.flip(1).T.float()
    std = activations.std(0) if standardise else torch.ones(WIDTH)
    mean = activations.mean(0)
    torch.testing.assert_close(fitted.mean, mean)
    signs = (fitted.components * components).sum(1, keepdim=True).sign()
    torch.testing.assert_close(fitted.components, signs * components, atol=1e-4, rtol=1e-4)
    latent, other = (((x - mean) / std) @ components.T for x in (BASE, SOURCE))
    latent[..., [0, 3]] = other[..., [0, 3]]
    expected = (latent @ components) * std + mean
    torch.testing.assert_close(fitted.apply(BASE, SOURCE), expected, atol=1e-4, rtol=1e-4)


def test_fewer_components_leave_the_rest_alone() -> None:
    few = pca(n_components=2)
    result = few.apply(BASE, SOURCE)
    inside = few.components.T @ few.components
    torch.testing.assert_close(result @ inside, SOURCE @ inside)
    torch.testing.assert_close(result - result @ inside, BASE - BASE @ inside)


def test_the_sign_of_a_component_does_not_depend_on_that_of_the_data() -> None:
    activations = numbers(20, WIDTH)
    one, other = PCARotatedSpace.fit(activations), PCARotatedSpace.fit(-activations)
    torch.testing.assert_close(one.components, other.components)
    assert (one.components.max(1).values > -one.components.min(1).values).all()


def test_a_constant_column_can_be_standardised() -> None:
    activations = numbers(9, 3)
    activations[:, 1] = 4
    assert PCARotatedSpace.fit(activations, standardise=True).scale[1] == 1


def test_rotated_space_as_pyvene() -> None:
    module = as_pyvene("RotatedSpace")
    module.set_interchange_dim(4)
    weight = module.rotate_layer.weight.detach()
    same_as(module, RotatedSpace(Rotation(weight), (0, 1, 2, 3)))


def test_low_rank_rotated_space_as_pyvene() -> None:
    module = as_pyvene("LowRankRotatedSpace", low_rank_dimension=2)
    weight = module.rotate_layer.weight.detach()
    same_as(module, LowRankRotatedSpace(Rotation(weight)))


def test_principal_components_as_pyvene() -> None:
    ours = pca(standardise=True, dims=(0, 1))
    module = as_pyvene(
        "PCARotatedSpace",
        pca=SimpleNamespace(components_=ours.components.numpy()),
        pca_mean=ours.mean.numpy(),
        pca_std=ours.scale.numpy(),
    )
    module.set_interchange_dim(2)
    same_as(module, ours)


def test_wide_numbers_are_not_rounded_to_the_parameters() -> None:
    base = BASE.double() + 1e6
    source = base + 1e-3 * SOURCE
    basis = R.double()
    expected = base + (source - base) @ basis[:, [1]] @ basis[:, [1]].T
    result = RotatedSpace(Rotation(R), (1,)).apply(base, source)
    torch.testing.assert_close(result, expected, atol=1e-8, rtol=0)


@given(dims=st.sets(st.integers(0, WIDTH - 1), min_size=1), seed=st.integers(0, 1000))
def test_other_coordinates_stay(dims: set[int], seed: int) -> None:
    rotation = Rotation.seeded(WIDTH, WIDTH, seed)
    chosen = tuple(sorted(dims))
    fitted = pca(dims=chosen)
    rest = [i for i in range(WIDTH) if i not in dims]
    for intervention, basis in [
        (RotatedSpace(rotation, chosen), rotation().detach()),
        (LowRankRotatedSpace(rotation, chosen), rotation().detach()),
        (
            PCARotatedSpace(fitted.components, fitted.mean, fitted.scale, chosen),
            fitted.components.T,
        ),
    ]:
        result = intervention.apply(BASE, SOURCE) @ basis
        torch.testing.assert_close(result[..., rest], (BASE @ basis)[..., rest], atol=1e-5, rtol=0)
        at = list(chosen)
        torch.testing.assert_close(result[..., at], (SOURCE @ basis)[..., at], atol=1e-5, rtol=0)


@pytest.mark.parametrize("shape", [(5, 5), (5, 2), (5, 1)])
def test_gradients_of_a_rotation_are_those_of_differences(shape: tuple[int, int]) -> None:
    rotation = Rotation(orthonormal(*shape).double())
    # Away from where the free parameter is orthonormal, too.
    for free in (rotation.free.detach(), numbers(*shape, seed=3).double()):

        def r(value: Tensor) -> Tensor:
            out: Tensor = torch.func.functional_call(rotation, {"free": value}, ())
            return out

        assert torch.autograd.gradcheck(r, free.clone().requires_grad_())


@pytest.mark.parametrize("rank", [3, 16])
def test_the_columns_stay_orthonormal_while_trained(rank: int) -> None:
    rotation = Rotation.seeded(16, rank, seed=0)
    target = orthonormal(16, rank, seed=1)[:, : rank // 2 + 1]
    base, source = numbers(20, 16, seed=2), numbers(20, 16, seed=3)
    wanted = base + (source - base) @ target @ target.T
    dims = tuple(range(target.shape[1]))
    intervention = LowRankRotatedSpace(rotation, dims)
    optimiser = torch.optim.Adam(intervention.parameters(), lr=0.05)
    losses = []
    for _ in range(50):
        optimiser.zero_grad()
        loss = (intervention.apply(base, source) - wanted).square().mean()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
        r = rotation().detach()
        torch.testing.assert_close(r.T @ r, torch.eye(rank), atol=1e-5, rtol=0)
    assert losses[-1] < losses[0] / 10, "it does not learn"


def test_a_rotation_starts_as_it_is_given() -> None:
    matrix = orthonormal(7, 3)
    torch.testing.assert_close(Rotation(matrix)(), matrix, atol=1e-6, rtol=0)
    torch.testing.assert_close(Rotation(-matrix)(), -matrix, atol=1e-6, rtol=0)


# A rotation's matrix is kept between calls where there are no gradients.


@pytest.mark.parametrize("how", ["step", "data", "load", "new data", "double"])
def test_a_change_of_a_rotation_is_seen(how: str) -> None:
    rotation, other = Rotation(orthonormal(5, 2)), orthonormal(5, 2, seed=1)
    with torch.no_grad():
        before = rotation()
        assert rotation() is before
        if how == "step":
            rotation.free.copy_(other)
        elif how == "data":
            rotation.free.data.copy_(other)
        elif how == "load":
            rotation.load_state_dict({"free": other})
        elif how == "new data":
            rotation.free.data = other
        else:
            other = orthonormal(5, 2).double()
            rotation.double()
        torch.testing.assert_close(rotation(), other, check_dtype=True)
    assert rotation().requires_grad


def test_a_rotation_is_copied_with_what_it_learnt() -> None:
    rotation = Rotation.seeded(5, 3, seed=0)
    with torch.inference_mode():
        rotation()
    twin = copy.deepcopy(rotation)
    with torch.no_grad():
        twin.free.mul_(-1)
    assert torch.equal(twin(), -rotation())
    assert set(rotation.state_dict()) == {"free"}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Rotation(torch.ones(2, 3)), r"not \(2, 3\)"),
        (lambda: Rotation(torch.ones(3)), r"not \(3,\)"),
        (lambda: Rotation(2 * R), "columns are not orthonormal: .* off by 3"),
        (lambda: Rotation(torch.full((2, 2), float("nan"))), "not orthonormal"),
        (lambda: Rotation.seeded(3, 4, seed=0), "rank 4 does not fit a width of 3"),
        (lambda: RotatedSpace(Rotation(W)), "6 by 2, not square"),
        (lambda: RotatedSpace(Rotation(R), (1, 6)), "dims 6 is not among the 6, from 0 to 5"),
        (lambda: LowRankRotatedSpace(Rotation(W), (-1,)), "dims -1 is not among the 2"),
        (lambda: LowRankRotatedSpace(Rotation(W), ()), r"dims \(\) are none"),
        (lambda: LowRankRotatedSpace(Rotation(W), (1, 1)), "twice"),
        (lambda: PCARotatedSpace.fit(torch.ones(1, 4)), r"\(1, 4\)"),
        (lambda: PCARotatedSpace.fit(numbers(4, 6), 4), "4 components of 4 .* 6 wide; at most 3"),
        (lambda: pca(dims=(9,)), "dims 9 is not among the 6"),
        (
            lambda: PCARotatedSpace(2 * R, torch.zeros(WIDTH), torch.ones(WIDTH)),
            "components are not orthonormal",
        ),
        (lambda: PCARotatedSpace(R, torch.zeros(3), torch.ones(WIDTH)), r"6 wide, .* \(3,\)"),
        (lambda: PCARotatedSpace(R, torch.zeros(WIDTH), torch.zeros(WIDTH)), "not above 0"),
    ],
)
def test_what_does_not_fit_is_an_error(make: Callable[[], object], message: str) -> None:
    with pytest.raises(EngineError, match=message):
        make()
