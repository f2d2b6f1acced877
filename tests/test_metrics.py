from __future__ import annotations

import math

import pytest
import torch

from interv.engine.metrics import predicts, read_answer


def test_one_token() -> None:
    logits = torch.tensor([[[1.0, 3.0, 2.0]], [[0.0, 0.0, 0.0]]])
    values = read_answer(logits, [2])
    z = math.exp(1) + math.exp(3) + math.exp(2)
    assert values["log_probability"] == pytest.approx([2 - math.log(z), -math.log(3)], abs=1e-15)
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
