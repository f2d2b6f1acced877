"""Swaps and edits of latents against plain formulas, and against pyvene."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from interv.engine.constants import Mean
from interv.engine.dictionaries import (
    Autoencoder,
    EditLatents,
    JumpReLUAutoencoder,
    JumpReluDictionary,
    ReluDictionary,
)
from interv.engine.interventions import Addition, Clamp, Skip, Zero
from interv.errors import EngineError
from tests.samples import (
    BASE,
    SOURCE,
    WIDTH,
    R,
    as_pyvene,
    jump_dictionary,
    relu_dictionary,
    same_as,
)


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
            return torch.where(before > d.threshold, before, 0.0)

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


def test_a_latent_below_a_negative_threshold_only_is_off() -> None:
    zeros = torch.zeros(2)
    d = JumpReluDictionary(torch.eye(2), zeros, torch.eye(2), zeros, torch.tensor([-1.0, 1e9]))
    with torch.no_grad():
        found = d.encode(torch.tensor([[-0.5, 5.0], [-1.0, 5.0], [0.0, 0.0], [2.0, 1e10]]))
    assert found.tolist() == [[-0.5, 0], [0, 0], [0, 0], [2.0, 1e10]]


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


def test_other_latents_stay() -> None:
    # The decoder is the encoder's inverse: what is decoded is encoded to the same latents.
    d = ReluDictionary(R, torch.full((WIDTH,), 20.0), R.T, torch.zeros(WIDTH))
    with torch.no_grad():
        after = d.encode(Autoencoder(d, (1, 3)).apply(BASE, SOURCE))
        same = [0, 2, 4, 5]
        torch.testing.assert_close(after[..., same], d.encode(BASE)[..., same])
        torch.testing.assert_close(after[..., [1, 3]], d.encode(SOURCE)[..., [1, 3]])


def test_a_seeded_dictionary() -> None:
    d = ReluDictionary.seeded(WIDTH, 9, seed=0)
    assert torch.equal(d.encoder, d.decoder.T)
    torch.testing.assert_close(d.decoder.square().sum(1), torch.ones(9))


def test_autoencoder_as_pyvene() -> None:
    module = as_pyvene("Autoencoder", latent_dim=9)
    coder = module.autoencoder
    weights = (coder.encoder[0].weight.T, coder.encoder[0].bias)
    back = (coder.decoder[0].weight.T, coder.decoder[0].bias)
    module.set_interchange_dim([2, 5])
    same_as(module, Autoencoder(ReluDictionary(*weights, *back), (2, 5), error_term=False))


def test_jump_relu_autoencoder_as_pyvene() -> None:
    d = jump_dictionary()
    d.threshold.clamp_(min=0)  # below 0 pyvene takes the ReLU too
    module = as_pyvene("JumpReLUAutoencoder", low_rank_dimension=9)
    state = {"W_enc": d.encoder, "b_enc": d.encoder_bias, "threshold": d.threshold}
    state |= {"W_dec": d.decoder, "b_dec": d.decoder_bias}
    module.load_state_dict(state, strict=False)
    module.set_interchange_dim(9)
    same_as(module, JumpReLUAutoencoder(d, error_term=False))


@pytest.mark.parametrize(
    ("make", "message"),
    [
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
    ],
)
def test_what_does_not_fit_is_an_error(make: Callable[[], object], message: str) -> None:
    with pytest.raises(EngineError, match=message):
        make()
