from __future__ import annotations

import math

import pytest
import torch

from interv.engine.metrics import predicts, read_answer


# The terms of the sum are as precise as the logits, the sum itself is in float64.
@pytest.mark.parametrize(
    ("dtype", "close"), [(torch.float64, 1e-15), (torch.float32, 1e-7), (torch.bfloat16, 1e-7)]
)
def test_one_token(dtype: torch.dtype, close: float) -> None:
    logits = torch.tensor([[[1.0, 3.0, 2.0]], [[0.0, 0.0, 0.0]]], dtype=dtype)
    values = read_answer(logits, [2])
    z = math.exp(1) + math.exp(3) + math.exp(2)
    assert values["log_probability"] == pytest.approx([2 - math.log(z), -math.log(3)], abs=close)
    assert values["logit"] == [2.0, 0.0]
    assert values["rank"] == [1.0, 0.0]


def test_several_tokens_multiply_their_probabilities() -> None:
    logits = torch.randn(4, 2, 7, dtype=torch.float64)
    values = read_answer(logits, [3, 5])
    probabilities = logits.softmax(-1)
    product = probabilities[:, 0, 3] * probabilities[:, 1, 5]
    assert values["log_probability"] == pytest.approx(product.log().tolist())
    assert set(values) == {"log_probability"}


def test_all_tokens_must_be_the_top_ones() -> None:
    logits = torch.tensor([[0.0, 9.0], [9.0, 0.0]])
    assert predicts(logits, [1, 0])
    assert not predicts(logits, [1, 1])


def test_a_wide_vocabulary_and_large_logits_lose_nothing() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = 30 * torch.randn(3, 1, 50_000, generator=generator) + 500
    found = read_answer(logits, [17])["log_probability"]
    exact = logits.double().log_softmax(-1)[:, 0, 17].tolist()
    assert found == pytest.approx(exact, abs=1e-6)


def test_the_logits_are_left_alone() -> None:
    logits = torch.tensor([[[1.0, 3.0, 2.0]]])
    read_answer(logits, [1])
    assert logits.tolist() == [[[1.0, 3.0, 2.0]]]
