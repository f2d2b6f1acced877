"""Each type against a plain formula, against pyvene's where that is right, and its gradients."""

from __future__ import annotations

import contextlib
import copy
import io
import warnings
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from interv.engine.interventions import (
    Addition,
    Clamp,
    Constant,
    Intervention,
    Mean,
    Skip,
    Vanilla,
    Zero,
)
from interv.engine.runs import Edit, Run, Site
from interv.engine.trainable import (
    BY_NAME,
    Adapter,
    Autoencoder,
    Boundary,
    BoundlessRotatedSpace,
    EditLatents,
    JumpReLUAutoencoder,
    JumpReluDictionary,
    Lora,
    LowRankRotatedSpace,
    Mask,
    PCARotatedSpace,
    ReluDictionary,
    RotatedSpace,
    Rotation,
    SigmoidMask,
    SigmoidMaskRotatedSpace,
)
from interv.errors import EngineError

with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
    warnings.simplefilter("ignore")
    import pyvene

WIDTH = 6


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def orthonormal(width: int, rank: int, seed: int = 0) -> Tensor:
    """Made otherwise than the module does: the left singular vectors of random numbers."""
    return torch.linalg.svd(numbers(width, rank, seed=seed), full_matrices=False)[0]


BASE, SOURCE = numbers(2, 3, WIDTH, seed=1), numbers(2, 3, WIDTH, seed=2)
R = orthonormal(WIDTH, WIDTH)
W = orthonormal(WIDTH, 2)
MASK = numbers(WIDTH, seed=3)


def relu_dictionary(n: int = 9, width: int = WIDTH) -> ReluDictionary:
    tensors = [numbers(width, n), numbers(n, seed=1), numbers(n, width, seed=2)]
    return ReluDictionary(*tensors, numbers(width, seed=3))


def jump_dictionary(n: int = 9, width: int = WIDTH) -> JumpReluDictionary:
    tensors = [numbers(width, n), numbers(n, seed=1), numbers(n, width, seed=2)]
    return JumpReluDictionary(*tensors, numbers(width, seed=3), numbers(n, seed=4))


def pca(width: int = WIDTH, **options: Any) -> PCARotatedSpace:
    activations = numbers(40, width, seed=5) * torch.arange(1, width + 1) + 3
    return PCARotatedSpace.fit(activations, **options)


def of_sources(width: int = WIDTH) -> list[Intervention]:
    """All that swap, of sites of a width."""
    square = Rotation.seeded(width, width, seed=0)
    relu, jump = relu_dictionary(width=width), jump_dictionary(width=width)
    return [
        RotatedSpace(square),
        RotatedSpace(square, (width - 1,)),
        LowRankRotatedSpace(Rotation.seeded(width, (width + 1) // 2, seed=1)),
        LowRankRotatedSpace(square, (0,)),
        BoundlessRotatedSpace(square, Boundary(width, temperature=2.0)),
        SigmoidMask(Mask(width, start=numbers(width), temperature=0.5)),
        SigmoidMaskRotatedSpace(square, Mask(width, start=numbers(width), temperature=1.0)),
        pca(width),
        pca(width, standardise=True, dims=(0,)),
        Autoencoder(relu),
        Autoencoder(relu, (2, 5)),
        JumpReLUAutoencoder(jump),
        JumpReLUAutoencoder(jump, (2, 5)),
    ]


def of_base(width: int = WIDTH) -> list[Intervention]:
    adapter = Adapter(numbers(width, 2), numbers(2, width, seed=1), 3.0)
    return [Lora(adapter), EditLatents(relu_dictionary(width=width), Clamp(1.0, 2.0), (0, 4))]


EVERY = [*of_sources(), *of_base()]


def source_for(intervention: Intervention) -> Tensor | None:
    return SOURCE if intervention.needs_source else None


def _name(value: object) -> str:
    return value.name if isinstance(value, Intervention) else ""


# Against the formula, written plainly.


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


def test_autoencoder_swaps_latents() -> None:
    d = relu_dictionary()
    with torch.no_grad():

        def encode(x: Tensor) -> Tensor:
            return ((x - d.decoder_bias) @ d.encoder + d.encoder_bias).clamp(min=0)

        latents, others = encode(BASE), encode(SOURCE)
        rebuilt = latents @ d.decoder + d.decoder_bias
        latents[..., [2, 5]] = others[..., [2, 5]]
        swapped = latents @ d.decoder + d.decoder_bias
        bare = Autoencoder(d, (2, 5), error_term=False).apply(BASE, SOURCE)
        torch.testing.assert_close(bare, swapped)
        kept = Autoencoder(d, (2, 5)).apply(BASE, SOURCE)
        torch.testing.assert_close(kept, swapped + BASE - rebuilt, atol=1e-5, rtol=1e-5)


def test_jump_relu_autoencoder_swaps_latents() -> None:
    d = jump_dictionary()
    with torch.no_grad():

        def encode(x: Tensor) -> Tensor:
            before = x @ d.encoder + d.encoder_bias
            return torch.where((before > d.threshold) & (before > 0), before, 0.0)

        latents, others = encode(BASE), encode(SOURCE)
        relu = (BASE @ d.encoder + d.encoder_bias).clamp(min=0)
        assert not torch.equal(latents, relu), "the threshold does nothing"
        rebuilt = latents @ d.decoder + d.decoder_bias
        latents[..., [2, 5]] = others[..., [2, 5]]
        swapped = latents @ d.decoder + d.decoder_bias
        bare = JumpReLUAutoencoder(d, (2, 5), error_term=False).apply(BASE, SOURCE)
        torch.testing.assert_close(bare, swapped)
        kept = JumpReLUAutoencoder(d, (2, 5)).apply(BASE, SOURCE)
        torch.testing.assert_close(kept, swapped + BASE - rebuilt, atol=1e-5, rtol=1e-5)


def test_latents_are_edited() -> None:
    d = relu_dictionary()
    with torch.no_grad():
        latents = d.encode(BASE)
        change = torch.zeros_like(latents)
        change[..., 4] = 5 - latents[..., 4]
        steered = EditLatents(d, Clamp(5.0, 5.0), (4,)).apply(BASE, None)
        torch.testing.assert_close(steered, BASE + change @ d.decoder)
        none = EditLatents(d, Zero(), error_term=False).apply(BASE, None)
        torch.testing.assert_close(none, d.decoder_bias.expand_as(BASE))


def test_lora() -> None:
    down, up = numbers(WIDTH, 2), numbers(2, WIDTH, seed=1)
    result = Lora(Adapter(down, up, 3.0)).apply(BASE, None)
    torch.testing.assert_close(result, BASE + 1.5 * (BASE @ down) @ up)
    fresh = Lora(Adapter.seeded(WIDTH, 2, 3.0, seed=0))
    assert torch.equal(fresh.apply(BASE, None), BASE), "a new adapter does something"
    assert fresh.adapter.down.abs().max() <= WIDTH**-0.5
    assert fresh.adapter.down.abs().min() > 0


# Against pyvene. It writes into its base, and takes (batch, width) for some.


def theirs(kind: Callable[..., Any], **options: object) -> Any:
    # Its classes draw from torch's own generator.
    with torch.random.fork_rng():
        return kind(embed_dim=WIDTH, **options)


FLAT_BASE, FLAT_SOURCE = BASE.reshape(-1, WIDTH), SOURCE.reshape(-1, WIDTH)


def same_as(module: Any, ours: Intervention) -> None:
    with torch.no_grad():
        expected = module(FLAT_BASE.clone(), FLAT_SOURCE.clone())
        torch.testing.assert_close(ours.apply(FLAT_BASE, FLAT_SOURCE), expected, atol=1e-5, rtol=0)


def test_rotated_space_as_pyvene() -> None:
    module = theirs(pyvene.RotatedSpaceIntervention)
    module.set_interchange_dim(4)
    weight = module.rotate_layer.weight.detach()
    same_as(module, RotatedSpace(Rotation(weight), (0, 1, 2, 3)))


def test_low_rank_rotated_space_as_pyvene() -> None:
    module = theirs(pyvene.LowRankRotatedSpaceIntervention, low_rank_dimension=2)
    weight = module.rotate_layer.weight.detach()
    same_as(module, LowRankRotatedSpace(Rotation(weight)))


@pytest.mark.parametrize("boundary", [0.5, 0.2, 1.3])
def test_boundless_rotated_space_as_pyvene(boundary: float) -> None:
    module = theirs(pyvene.BoundlessRotatedSpaceIntervention)
    weight = module.rotate_layer.weight.detach()
    if boundary == 0.5:
        same_as(module, BoundlessRotatedSpace(Rotation(weight), Boundary(WIDTH)))
    module.set_intervention_boundaries(boundary)
    module.set_temperature(torch.tensor(0.8))
    gate = Boundary(WIDTH, boundary=boundary, temperature=0.8)
    same_as(module, BoundlessRotatedSpace(Rotation(weight), gate))


@pytest.mark.filterwarnings("ignore:To copy construct from a tensor")
def test_sigmoid_masks_as_pyvene() -> None:
    module = theirs(pyvene.SigmoidMaskIntervention)
    same_as(module, SigmoidMask(Mask(WIDTH)))
    turned = theirs(pyvene.SigmoidMaskRotatedSpaceIntervention)
    weight = turned.rotate_layer.weight.detach()
    mask = Mask(WIDTH, start=100.0, temperature=50.0)
    same_as(turned, SigmoidMaskRotatedSpace(Rotation(weight), mask))
    module.mask.data = turned.masks.data = MASK
    mask = Mask(WIDTH, start=MASK, temperature=0.01)
    same_as(module, SigmoidMask(mask))
    mask.set_temperature(50.0)
    same_as(turned, SigmoidMaskRotatedSpace(Rotation(weight), mask))


def test_principal_components_as_pyvene() -> None:
    ours = pca(standardise=True, dims=(0, 1))
    module = theirs(
        pyvene.PCARotatedSpaceIntervention,
        pca=SimpleNamespace(components_=ours.components.numpy()),
        pca_mean=ours.mean.numpy(),
        pca_std=ours.scale.numpy(),
    )
    module.set_interchange_dim(2)
    same_as(module, ours)


def test_autoencoder_as_pyvene() -> None:
    module = theirs(pyvene.AutoencoderIntervention, latent_dim=9)
    coder = module.autoencoder
    weights = (coder.encoder[0].weight.T, coder.encoder[0].bias)
    back = (coder.decoder[0].weight.T, coder.decoder[0].bias)
    module.set_interchange_dim([2, 5])
    same_as(module, Autoencoder(ReluDictionary(*weights, *back), (2, 5), error_term=False))


def test_jump_relu_autoencoder_as_pyvene() -> None:
    d = jump_dictionary()
    module = theirs(pyvene.JumpReLUAutoencoderIntervention, low_rank_dimension=9)
    state = {"W_enc": d.encoder, "b_enc": d.encoder_bias, "threshold": d.threshold}
    state |= {"W_dec": d.decoder, "b_dec": d.decoder_bias}
    module.load_state_dict(state, strict=False)
    module.set_interchange_dim(9)
    same_as(module, JumpReLUAutoencoder(d, error_term=False))


# What holds for all.


@given(
    leading=st.lists(st.integers(1, 3), max_size=2),
    n=st.integers(1, 4),
    width=st.integers(2, 7),
    seed=st.integers(0, 1000),
)
def test_a_self_swap_is_the_identity(leading: list[int], n: int, width: int, seed: int) -> None:
    base = numbers(*leading, n, width, seed=seed)
    for intervention in of_sources(width):
        # To the last bit, whatever the basis.
        assert torch.equal(intervention.apply(base, base.clone()), base), intervention.name


@pytest.mark.parametrize("intervention", EVERY, ids=_name)
def test_leading_dimensions_are_rows_one_at_a_time(intervention: Intervention) -> None:
    base, source = numbers(2, 3, 4, WIDTH, seed=4), numbers(2, 3, 4, WIDTH, seed=5)
    wanted = intervention.needs_source
    with torch.no_grad():
        together = intervention.apply(base, source if wanted else None)
        assert together.shape == base.shape
        for i in range(2):
            for j in range(3):
                alone = intervention.apply(base[i, j], source[i, j] if wanted else None)
                torch.testing.assert_close(together[i, j], alone)
                # And so are positions.
                one = intervention.apply(base[i, j, :1], source[i, j, :1] if wanted else None)
                torch.testing.assert_close(together[i, j, :1], one)


@pytest.mark.parametrize("intervention", EVERY, ids=_name)
def test_arguments_are_left_alone(intervention: Intervention) -> None:
    base, source = BASE.clone(), SOURCE.clone()
    before = [p.clone() for p in intervention.parameters()]
    result = intervention.apply(base, source if intervention.needs_source else None)
    assert not torch.allclose(result, BASE), "it does nothing"
    result.detach().zero_()
    assert torch.equal(base, BASE)
    assert torch.equal(source, SOURCE)
    assert all(map(torch.equal, before, intervention.parameters()))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("intervention", EVERY, ids=_name)
def test_the_result_is_in_the_bases_numbers(intervention: Intervention, dtype: torch.dtype) -> None:
    base, source = BASE.to(dtype), SOURCE.to(dtype)
    result = intervention.apply(base, source if intervention.needs_source else None)
    assert result.dtype == dtype
    # Computed in float32, and rounded once.
    wide = intervention.apply(base.float(), source.float() if intervention.needs_source else None)
    torch.testing.assert_close(result.float(), wide.to(dtype).float(), rtol=1e-5, atol=2e-5)


def test_wide_numbers_are_not_rounded_to_the_parameters() -> None:
    base = BASE.double() + 1e6
    source = base + 1e-3 * SOURCE
    basis = R.double()
    expected = base + (source - base) @ basis[:, [1]] @ basis[:, [1]].T
    result = RotatedSpace(Rotation(R), (1,)).apply(base, source)
    torch.testing.assert_close(result, expected, atol=1e-8, rtol=0)


@pytest.mark.parametrize("intervention", EVERY, ids=_name)
def test_an_intervention_is_part_of_a_run(intervention: Intervention) -> None:
    source = Run((1,)) if intervention.needs_source else None
    run = Run((1, 2), (Edit(Site("block_output", 0, (0,)), intervention, source),))
    again = Run((1, 2), (Edit(Site("block_output", 0, (0,)), intervention, source),))
    assert {run: 1}[again] == 1
    assert run not in {Run((1, 2), (Edit(Site("block_output", 0, (0,)), Clamp(0.0, 1.0)),))}


@pytest.mark.parametrize("intervention", EVERY, ids=_name)
def test_a_wrong_width_is_an_error(intervention: Intervention) -> None:
    base = numbers(2, WIDTH + 1)
    with pytest.raises(EngineError, match=f"{intervention.name}: .* {WIDTH} wide, the site 7"):
        intervention.apply(base, base if intervention.needs_source else None)


def test_every_type_has_a_name() -> None:
    assert BY_NAME.keys() == {
        "vanilla", "addition", "subtraction", "zero", "collect", "noise", "skip",
        "rotated_space", "low_rank_rotated_space", "boundless_rotated_space",
        "sigmoid_mask", "sigmoid_mask_rotated_space", "pca_rotated_space",
        "autoencoder", "jump_relu_autoencoder", "edit_latents", "lambda", "base_lambda",
        "lora", "mean", "replace", "constant", "scale", "project_out", "clamp",
    }  # fmt: skip

    def final(kind: type[Intervention]) -> set[type[Intervention]]:
        below = kind.__subclasses__()
        return set().union(*map(final, below)) if below else {kind}

    ours = {kind for kind in final(Intervention) if kind.__module__.startswith("interv.")}
    assert set(BY_NAME.values()) == ours


def test_nothing_draws_from_torchs_own_generator() -> None:
    before = torch.random.get_rng_state()
    one, two = Rotation.seeded(5, 3, seed=7), Rotation.seeded(5, 3, seed=7)
    assert torch.equal(one(), two())
    assert not torch.allclose(one(), Rotation.seeded(5, 3, seed=8)())
    Adapter.seeded(5, 3, 1.0, seed=0)
    ReluDictionary.seeded(5, 9, seed=0)
    Boundary(5)
    Mask(5)
    Rotation(orthonormal(5, 3))
    of_sources()
    assert torch.equal(torch.random.get_rng_state(), before)


def test_parameters_are_those_of_all_that_is_held() -> None:
    rotation, gate = Rotation(R), Boundary(WIDTH)
    boundless = BoundlessRotatedSpace(rotation, gate)
    assert boundless.modules() == {"rotation": rotation, "boundary": gate}
    assert boundless.parameters() == [rotation.free, gate.boundary]
    assert Constant(boundless, torch.ones(WIDTH)).parameters() == boundless.parameters()
    assert set(Constant(boundless, torch.ones(WIDTH)).modules()) == {
        "edit.rotation",
        "edit.boundary",
    }
    assert Vanilla().parameters() == []
    # Linked: one module in two interventions.
    other = RotatedSpace(rotation, (0,))
    assert other.parameters()[0] is boundless.parameters()[0]
    # A threshold has no gradient, so it is no parameter.
    assert len(JumpReLUAutoencoder(jump_dictionary()).parameters()) == 4


# Subsets touch nothing else.


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


def test_other_latents_stay() -> None:
    # The decoder is the encoder's inverse: what is decoded is encoded to the same latents.
    d = ReluDictionary(R, torch.full((WIDTH,), 20.0), R.T, torch.zeros(WIDTH))
    with torch.no_grad():
        after = d.encode(Autoencoder(d, (1, 3)).apply(BASE, SOURCE))
        same = [0, 2, 4, 5]
        torch.testing.assert_close(after[..., same], d.encode(BASE)[..., same])
        torch.testing.assert_close(after[..., [1, 3]], d.encode(SOURCE)[..., [1, 3]])


# Gradients, and what stays true while they are followed.


def loss_of(activations: Tensor) -> Tensor:
    return (activations * numbers(WIDTH, seed=9)).tanh().sum()


def gradients(loss: Tensor, of: Sequence[Tensor]) -> tuple[Tensor, ...]:
    return torch.autograd.grad(loss, of)


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


@pytest.mark.parametrize("shape", [(5, 5), (5, 2), (5, 1)])
def test_gradients_of_a_rotation_are_those_of_differences(shape: tuple[int, int]) -> None:
    rotation = Rotation(orthonormal(*shape).double())
    # Away from where the free parameter is orthonormal, too.
    for free in (rotation.free.detach(), numbers(*shape, seed=3).double()):

        def r(value: Tensor) -> Tensor:
            out: Tensor = torch.func.functional_call(rotation, {"free": value}, ())
            return out

        assert torch.autograd.gradcheck(r, free.clone().requires_grad_())


@pytest.mark.parametrize("intervention", EVERY, ids=_name)
def test_every_parameter_has_a_gradient(intervention: Intervention) -> None:
    if not intervention.parameters():
        assert isinstance(intervention, PCARotatedSpace)
        return
    loss = loss_of(intervention.apply(BASE, source_for(intervention)))
    for name, module in intervention.modules().items():
        for key, parameter in module.named_parameters():
            [gradient] = torch.autograd.grad(loss, parameter, retain_graph=True, allow_unused=True)
            # With the error term, what is decoded is a difference: the bias cancels.
            if key != "decoder_bias":
                assert gradient is not None, f"{name}.{key}"
                assert torch.isfinite(gradient).all()
                # A full swap is the source, whatever the basis.
                if not (isinstance(intervention, RotatedSpace) and intervention.dims is None):
                    assert gradient.abs().max() > 1e-6, f"{name}.{key}"


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


# A rotation's matrix is kept between calls where there are no gradients.


def test_a_rotation_starts_as_it_is_given() -> None:
    matrix = orthonormal(7, 3)
    torch.testing.assert_close(Rotation(matrix)(), matrix, atol=1e-6, rtol=0)
    torch.testing.assert_close(Rotation(-matrix)(), -matrix, atol=1e-6, rtol=0)


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
        (lambda: BoundlessRotatedSpace(Rotation(R), Boundary(4)), "4 gates .* of rank 6"),
        (lambda: SigmoidMaskRotatedSpace(Rotation(W), Mask(6)), "6 gates .* of rank 2"),
        (lambda: Boundary(4, temperature=0.0), "above 0, not 0.0"),
        (lambda: Mask(4).set_temperature(float("nan")), "above 0, not nan"),
        (lambda: Mask(4).set_temperature(torch.ones(4)), "a temperature is a finite number"),
        (lambda: Mask(4, start=torch.ones(3)), r"\(3,\) where the width is 4"),
        (lambda: PCARotatedSpace.fit(torch.ones(1, 4)), r"\(1, 4\)"),
        (lambda: PCARotatedSpace.fit(numbers(4, 6), 4), "4 components of 4 .* 6 wide; at most 3"),
        (lambda: pca(dims=(9,)), "dims 9 is not among the 6"),
        (
            lambda: PCARotatedSpace(2 * R, torch.zeros(WIDTH), torch.ones(WIDTH)),
            "components are not orthonormal",
        ),
        (lambda: PCARotatedSpace(R, torch.zeros(3), torch.ones(WIDTH)), r"6 wide, .* \(3,\)"),
        (lambda: PCARotatedSpace(R, torch.zeros(WIDTH), torch.zeros(WIDTH)), "not above 0"),
        (lambda: Autoencoder(relu_dictionary(), (9,)), "latents 9 is not among the 9"),
        (lambda: JumpReLUAutoencoder(jump_dictionary(), ()), "are none"),
        (
            lambda: ReluDictionary(
                torch.ones(6, 9), torch.ones(9), torch.ones(6, 9), torch.ones(6)
            ),
            r"decoder has the shape \(6, 9\), expected \(9, 6\)",
        ),
        (
            lambda: JumpReluDictionary(
                torch.ones(2, 3), torch.ones(3), torch.ones(3, 2), torch.ones(2), torch.ones(2)
            ),
            r"threshold has the shape \(2,\), expected \(3,\)",
        ),
        (lambda: EditLatents(relu_dictionary(), Addition()), "addition needs more"),
        (lambda: EditLatents(relu_dictionary(), Skip()), "skip needs more"),
        (
            lambda: EditLatents(relu_dictionary(), Mean(torch.ones(2)), (1,)).apply(BASE, None),
            "mean: the value is 2 wide, the site 1",
        ),
        (lambda: Adapter(torch.ones(4, 2), torch.ones(4, 2), 1.0), r"up \(4, 2\)"),
    ],
)
def test_what_does_not_fit_is_an_error(make: Callable[[], object], message: str) -> None:
    with pytest.raises(EngineError, match=message):
        make()
