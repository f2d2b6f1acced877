from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from interv.engine.metrics import (
    Answers,
    combined,
    differentiable,
    predicts,
    read_answer,
    read_everything,
)


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


NAMES = [
    "logit",
    "logit_difference",
    "probability",
    "probability_difference",
    "log_probability",
    "log_probability_difference",
    "cross_entropy",
]


@pytest.mark.parametrize("name", NAMES)
def test_several_right_answers_are_one_event(name: str) -> None:
    """The model's own softmax, the right tokens' probabilities added up."""
    model = GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=16, n_head=2, vocab_size=50)).eval()
    with torch.no_grad():
        logits = 20 * model(torch.tensor([[1, 2, 3]])).logits[:, -1:].double()
    right, wrong = [7, 11, 30], [4, 5]
    p = logits[0, 0].softmax(-1)
    together, rest = float(p[right].sum()), p[wrong]
    normaliser = float(logits[0, 0].logsumexp(-1))
    wanted = {
        "probability": together,
        "probability_difference": together - float(rest.sum()),
        "log_probability": math.log(together),
        "cross_entropy": -math.log(together),
        "log_probability_difference": math.log(together) - float(rest.log().mean()),
        "logit": math.log(together) + normaliser,
        "logit_difference": math.log(together) - float(rest.log().mean()),
    }[name]
    answers = Answers(tuple((i,) for i in right), tuple((i,) for i in wrong))
    assert float(differentiable(name, [answers])(logits)) == pytest.approx(wanted)
    # The same from what a journal holds.
    found = read_everything({(): logits}, answers, None, {})
    stored = "logits" if name.startswith("logit") else "log_probabilities"
    values = np.array(found[stored])
    values = np.exp(values) if name.startswith("probability") else values
    assert combined(name, values[:, :3], values[:, 3:])[0] == pytest.approx(wanted)


def test_the_rank_of_several_right_answers_is_the_bests() -> None:
    logits = torch.tensor([[[0.0, 5.0, 4.0, 3.0, 2.0, 1.0]]])
    for right, rank in (((4, 2), 1), ((2, 4), 1), ((5,), 4), ((5, 1), 0)):
        answers = Answers(tuple((i,) for i in right), ((0,),))
        assert read_everything({(): logits}, answers, None, {})["rank"] == [rank]
