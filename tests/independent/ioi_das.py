"""Distributed alignment search (Geiger et al. 2023, arXiv 2303.02536) by a loop of our own.

In ioi_das_pairs.jsonl (`interv data configs/default_model/ioi_das.yaml --json`) each pair has a
base, a source, and the name that is right once the position of the indirect object is the
source's: base h and source s of a block's output at one token become h + (s - h) R Rᵀ, R of
orthonormal columns by torch's own parametrisation (products of Householder reflections, which at
the same rate of Adam go further in a step than the Q of a QR does), trained on cross entropy. IIA
is the share of held-out pairs whose top token is that name.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import orthogonal

from tests.independent.model import FOLDER, Row, encode_all, place, run, single, spec

NAME = "ioi_das"
SEEDS = (0, 1, 2)
SENTENCE = re.compile(r"When (\w+) and (\w+) went to the \w+, (\w+) gave an? \w+ to")
REPEATED = 9  # its token: When| A| and| B| went| to| the| place|,| C

Exchange = Callable[[Tensor, Tensor], Tensor]
"""Of base and source vectors `[pair, width]`."""


@dataclass(frozen=True)
class Pairs:
    """Of one split: token ids `[pair, pos]`, and the tokens that are right `[pair]`."""

    base: Tensor
    source: Tensor
    label: Tensor
    base_answer: Tensor
    source_answer: Tensor

    def __getitem__(self, rows: Tensor) -> Pairs:
        return replace(self, **{name: value[rows] for name, value in vars(self).items()})


@dataclass(frozen=True)
class Spot:
    """A block's output at one token."""

    layer: int
    position: int
    role: str

    def states(self, ids: Tensor) -> Tensor:
        at = place("block_output", self.layer)
        return run(ids, keep=[at])[1][at][:, self.position]

    def logits(self, base: Tensor, states: Tensor, exchange: Exchange) -> Tensor:
        """Of bases in which the spot's state is exchanged with sources' states."""

        def change(value: Tensor) -> Tensor:
            value = value.clone()
            value[:, self.position] = exchange(value[:, self.position], states)
            return value

        return run(base, {place("block_output", self.layer): change})[0]


SPOTS = (Spot(17, REPEATED, "repeated"), Spot(10, -1, "END"))


def indirect_object(text: str) -> tuple[int, str]:
    """The task's causal model: position and name of the one who is named once."""
    first, second, repeated = _names(text)
    return (1, second) if repeated == first else (0, first)


def _names(text: str) -> Sequence[str]:
    found = SENTENCE.fullmatch(text)
    if found is None:
        raise ValueError(f"another sentence: {text}")
    return found.groups()


@cache
def pairs(split: str) -> Pairs:
    """A split's pairs whose base and source the model itself answers rightly."""
    lines = (FOLDER / f"{NAME}_pairs.jsonl").read_text("utf-8").splitlines()
    given = [pair for pair in map(json.loads, lines) if pair["split"] == split]
    for pair in given:
        # The names of the base, the position of the source.
        position, _ = indirect_object(pair["source"])
        if pair["label"] != _names(pair["base"])[position]:
            raise ValueError(f"not the label: {pair}")
    found = Pairs(
        encode_all([pair["base"] for pair in given]),
        encode_all([pair["source"] for pair in given]),
        torch.tensor([single(pair["label"]) for pair in given]),
        torch.tensor([single(indirect_object(pair["base"])[1]) for pair in given]),
        torch.tensor([single(indirect_object(pair["source"])[1]) for pair in given]),
    )
    right = run(found.base)[0].argmax(-1) == found.base_answer
    right &= run(found.source)[0].argmax(-1) == found.source_answer
    return found[right.nonzero()[:, 0]]


@torch.no_grad()
def accuracy(spot: Spot, exchange: Exchange) -> float:
    """Interchange intervention accuracy on the held-out pairs."""
    test = pairs("test")
    logits = spot.logits(test.base, spot.states(test.source), exchange)
    return float((logits.argmax(-1) == test.label).double().mean())


def whole(_base: Tensor, source: Tensor) -> Tensor:
    """The whole vector exchanged: what no training is needed for."""
    return source


def trained(spot: Spot, seed: int) -> Exchange:
    """A subspace fitted with Adam, its rate falling linearly to 0; hyperparameters of the spec."""
    asked: dict[str, Any] = spec(NAME)["train"]
    torch.manual_seed(seed)
    with torch.no_grad():
        data = pairs("train")
        states = spot.states(data.source)
    basis = nn.Linear(spec(NAME)["intervention"]["rank"], states.shape[-1], bias=False)
    nn.init.orthogonal_(basis.weight)
    orthogonal(basis)  # in place

    def exchange(base: Tensor, source: Tensor) -> Tensor:
        return base + (source - base) @ basis.weight @ basis.weight.T

    optimizer = torch.optim.Adam(basis.parameters(), lr=asked["lr"])
    n, size = len(data.base), asked["batch"]
    steps = asked["epochs"] * -(-n // size)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    for _ in range(asked["epochs"]):
        for rows in torch.split(torch.randperm(n), size):
            logits = spot.logits(data.base[rows], states[rows], exchange)
            loss = nn.functional.cross_entropy(logits, data.label[rows])
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            optimizer.step()
            schedule.step()
    return exchange


@torch.no_grad()
def cells(spots: Sequence[Spot] = SPOTS) -> list[Row]:
    """IIA of the whole vector, which is exact: no training, no seed."""
    return [
        {"layer": s.layer, "role": s.role, "metric": "iia_full", "value": accuracy(s, whole)}
        for s in spots
    ]


def seeds() -> list[Row]:
    """IIA of a fit of each seed, in torch's own random numbers."""
    return [
        {"layer": s.layer, "role": s.role, "seed": i, "value": accuracy(s, trained(s, i))}
        for s in SPOTS
        for i in SEEDS
    ]


def tables() -> dict[str, list[Row]]:
    return {NAME: cells(), f"{NAME}_seeds": seeds()}
