"""What holds for every type."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from interv.engine.adapters import Adapter
from interv.engine.constants import Constant
from interv.engine.dictionaries import JumpReLUAutoencoder, ReluDictionary
from interv.engine.interventions import Clamp, Intervention, Noise, Vanilla
from interv.engine.masks import Boundary, BoundlessRotatedSpace, Mask
from interv.engine.registry import BY_NAME
from interv.engine.rotations import PCARotatedSpace, RotatedSpace, Rotation
from interv.engine.runs import Edit, Run, Site
from interv.errors import EngineError
from tests.samples import (
    BASE,
    EVERY,
    HELD,
    SOURCE,
    WIDTH,
    R,
    jump_dictionary,
    loss_of,
    name_of,
    numbers,
    orthonormal,
    source_for,
    swaps,
)


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
    assert {type(i) for i in EVERY} == ours, "a type has no sample"


@settings(max_examples=30)
@given(
    leading=st.lists(st.integers(1, 3), max_size=2),
    n=st.integers(1, 4),
    width=st.integers(2, 7),
    seed=st.integers(0, 1000),
)
def test_a_self_swap_is_the_identity(leading: list[int], n: int, width: int, seed: int) -> None:
    base = numbers(*leading, n, width, seed=seed)
    for intervention in swaps(width):
        # To the last bit, whatever the basis.
        assert torch.equal(intervention.apply(base, base.clone()), base), intervention.name


@pytest.mark.parametrize("intervention", EVERY, ids=name_of)
def test_leading_dimensions_are_rows_one_at_a_time(intervention: Intervention) -> None:
    base, source = numbers(2, 3, 3, WIDTH, seed=4), numbers(2, 3, 3, WIDTH, seed=5)
    with torch.no_grad():
        together = intervention.apply(base, source_for(intervention, source))
        assert together.shape == base.shape
        for i in range(2):
            for j in range(3):
                alone = intervention.apply(base[i, j], source_for(intervention, source[i, j]))
                torch.testing.assert_close(together[i, j], alone)


@pytest.mark.parametrize("intervention", [i for i in EVERY if i.positionwise], ids=name_of)
def test_positions_can_be_left_out(intervention: Intervention) -> None:
    whole = intervention.apply(BASE, source_for(intervention, SOURCE))
    for position in range(3):
        one = slice(position, position + 1)
        alone = intervention.apply(BASE[:, one], source_for(intervention, SOURCE[:, one]))
        torch.testing.assert_close(alone, whole[:, one])


def test_which_are_not_positionwise() -> None:
    assert {name for name, kind in BY_NAME.items() if not kind.positionwise} == {
        "lambda", "base_lambda", "mean", "replace", "constant", "noise", "edit_latents",
    }  # fmt: skip
    narrow, wide = (Noise(1.0, 1, 1).apply(torch.zeros(n, 2), None) for n in (1, 2))
    assert not torch.equal(narrow, wide[:1])


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("intervention", EVERY, ids=name_of)
def test_the_result_is_in_the_bases_numbers(intervention: Intervention, dtype: torch.dtype) -> None:
    base, source = BASE.to(dtype), SOURCE.to(dtype)
    result = intervention.apply(base, source_for(intervention, source))
    assert result.dtype == dtype
    # Computed in float32, and rounded once.
    wide = intervention.apply(base.float(), source_for(intervention, source.float()))
    torch.testing.assert_close(result.float(), wide.to(dtype).float(), rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("intervention", EVERY, ids=name_of)
def test_an_intervention_is_part_of_a_run(intervention: Intervention) -> None:
    source = Run((1,)) if intervention.needs_source else None
    run = Run((1, 2), (Edit(Site("block_output", 0, (0,)), intervention, source),))
    again = Run((1, 2), (Edit(Site("block_output", 0, (0,)), intervention, source),))
    assert {run: 1}[again] == 1
    assert run not in {Run((1, 2), (Edit(Site("block_output", 0, (0,)), Clamp(0.0, 1.0)),))}


@pytest.mark.parametrize("intervention", HELD, ids=name_of)
def test_arguments_are_left_alone(intervention: Intervention) -> None:
    base, source = BASE.clone(), SOURCE.clone()
    before = [p.clone() for p in intervention.parameters()]
    result = intervention.apply(base, source if intervention.needs_source else None)
    assert not torch.allclose(result, BASE), "it does nothing"
    result.detach().zero_()
    assert torch.equal(base, BASE)
    assert torch.equal(source, SOURCE)
    assert all(map(torch.equal, before, intervention.parameters()))


@pytest.mark.parametrize("intervention", HELD, ids=name_of)
def test_a_wrong_width_is_an_error(intervention: Intervention) -> None:
    base = numbers(2, WIDTH + 1)
    with pytest.raises(EngineError, match=f"{intervention.name}: .* {WIDTH} wide, the site 7"):
        intervention.apply(base, base if intervention.needs_source else None)


@pytest.mark.parametrize("intervention", HELD, ids=name_of)
def test_every_parameter_has_a_gradient(intervention: Intervention) -> None:
    if not intervention.parameters():
        assert isinstance(intervention, PCARotatedSpace)
        return
    loss = loss_of(intervention.apply(BASE, source_for(intervention, SOURCE)))
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
    swaps()
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
