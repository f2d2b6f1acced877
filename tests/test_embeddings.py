"""Where noise goes in, and what its level is a multiple of, in every family of the table.

A family may scale its embeddings within the module (Gemma), behind it (Granite), or put a norm or
positions behind it (BLOOM, BERT, OPT). Noise is added to what the module gives, so that is what
sigma is of; plain hooks see both here.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from interv.engine import Edit, Noise, ReferenceExecutor, Run, Site, SuffixExecutor, anatomy_of
from interv.engine.load import LoadedModel, embedding_sigma
from tests import raw_swap, zoo
from tests.test_matrix import allowed

SUBJECTS = [zoo.ids(0, 3), zoo.ids(1, 4), zoo.ids(0, 3)]  # one of them twice, as in a data set
ROOT = math.sqrt(48)
SCALED = {"gemma": ROOT, "gemma2": ROOT, "gemma3_text": ROOT}
"""What the embedding module multiplies its weights by; all other families of the zoo by 1."""


def loaded(name: str) -> LoadedModel:
    model = zoo.make(name)
    return LoadedModel(model, anatomy_of(model), torch.device("cpu"), "sdpa")


def hooked(name: str, model: LoadedModel, ids: list[int]) -> Tensor:
    """What the embedding module gives on a text, `[pos, width]`, by a plain hook."""
    return raw_swap.capture(model.module, name, "token_embedding", 0, ids)


@pytest.mark.parametrize("name", zoo.CONFIGS)
def test_sigma_is_the_deviation_of_what_the_embedding_module_gives(name: str) -> None:
    model = loaded(name)
    tokens = [token for ids in SUBJECTS for token in ids]
    seen = torch.cat([hooked(name, model, ids) for ids in SUBJECTS])
    assert embedding_sigma(model, tokens) == pytest.approx(float(seen.std()), rel=1e-12)
    path = model.anatomy.place("token_embedding", 0).path
    weight = model.module.get_submodule(path).weight
    scale = SCALED.get(name, 1.0)
    assert embedding_sigma(model, tokens) == pytest.approx(scale * float(weight[tokens].std()))
    assert embedding_sigma(model) == pytest.approx(scale * float(weight.std()), rel=1e-6)


@pytest.mark.parametrize("name", [name for name in zoo.CONFIGS if name not in zoo.VISION])
def test_noise_of_three_sigma_is_what_a_hook_would_add(name: str) -> None:
    model = loaded(name)
    level = 3 * embedding_sigma(model, SUBJECTS[0])
    ids, subject = zoo.ids(2), (1, 2, 3)
    clean = hooked(name, model, ids)
    noise = np.random.RandomState(7).randn(2, len(subject), clean.shape[1])
    runs, oracle = [], []
    for draw in range(2):
        edit = Edit(Site("token_embedding", 0, subject), Noise(level, 7, draw))
        runs.append(Run(tuple(ids), (edit,)))
        noisy = clean.clone()
        noisy[list(subject)] += level * torch.from_numpy(noise[draw])
        oracle.append(
            raw_swap.swapped_logits(
                model.module, name, "token_embedding", 0, ids, noisy, range(len(ids))
            )[-1]
        )
    right = torch.stack(oracle)
    for executor in (ReferenceExecutor, SuffixExecutor):
        got = executor(model.module, model.anatomy).logits(runs)[:, 0]
        assert (got - right).abs().max() <= allowed(name, pattern=False) * right.abs().max()
    with torch.no_grad():
        plain = model.module(**zoo.inputs(name, 2)).logits[0, -1]
    # A corruption that is far too weak leaves the answers as they are.
    assert ((right - plain).abs().amax(1) > 0.05 * plain.abs().max()).all()


def test_sigma_of_a_vocabulary_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """The vocabularies of real models are embedded some tokens at a time."""
    model = loaded("gemma2")
    whole = embedding_sigma(model)
    monkeypatch.setattr("interv.engine.load._EMBEDDED_TOGETHER", 7)
    assert embedding_sigma(model) == pytest.approx(whole, rel=1e-12)
