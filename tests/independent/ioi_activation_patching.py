"""Activation patching on IOI, as in TransformerLens' Exploratory_Analysis_Demo.

A component's clean state is put into the corrupted run; the metric is the mean logit difference
of the pairs, LD, and its recovery (LD - corrupted) / (clean - corrupted). The residual stream
before each block is patched by pyvene (Wu et al. 2024, arXiv 2403.07809), all else by plain hooks.
"""

from __future__ import annotations

import contextlib
import copy
import io
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from tests.independent.model import (
    Change,
    Row,
    encode_all,
    head_columns,
    load,
    place,
    run,
    single,
    spec,
    tokenizer,
)

NAME = "ioi_activation_patching"
COMPONENTS = ("block_input", "attention_output", "mlp_output")
HEADS = "head_attention_value_output"
N_LAYERS, N_HEADS = 30, 9


@dataclass(frozen=True)
class Pairs:
    """Prompts `[pair, pos]`, the answers' tokens, and the position of each role in each pair."""

    clean: Tensor
    corrupted: Tensor
    right: Tensor
    wrong: Tensor
    roles: dict[str, Tensor]

    def difference(self, logits: Tensor) -> float:
        """The mean of logit(right) - logit(wrong)."""
        rows = torch.arange(len(logits))
        wide = logits.double()
        return float((wide[rows, self.right] - wide[rows, self.wrong]).mean())


@cache
def pairs() -> Pairs:
    given = spec(NAME)["data"]["pairs"]
    clean, corrupted = (encode_all([p[side] for p in given]) for side in ("clean", "corrupted"))
    places = [
        [_position(ids.tolist(), pair["spans"][role]) for role in ("IO", "S1", "S2")]
        for ids, pair in zip(clean, given, strict=True)
    ]
    roles = dict(zip(("IO", "S1", "S2"), torch.tensor(places).T, strict=True))
    roles["END"] = torch.full((len(given),), clean.shape[1] - 1)
    right, wrong = (torch.tensor([single(p[a]) for p in given]) for a in ("answer", "wrong"))
    return Pairs(clean, corrupted, right, wrong, roles)


def _position(ids: Sequence[int], text: str) -> int:
    """`Mary@2`: the position of the second ` Mary`."""
    word, _, occurrence = text.partition("@")
    found = [i for i, token in enumerate(ids) if tokenizer().decode([token]).strip() == word]
    return found[int(occurrence) - 1]


@cache
def baselines() -> tuple[float, float]:
    """Mean logit differences of the clean and of the corrupted prompts."""
    data = pairs()
    return data.difference(run(data.clean)[0]), data.difference(run(data.corrupted)[0])


def by_hooks(component: str, layer: int, role: str) -> float:
    """Mean logit difference with a component's clean state at one position of each pair."""
    data, at = pairs(), place(component, layer)
    _, kept = run(data.clean, keep=[at])
    rows, positions = torch.arange(len(data.clean)), data.roles[role]

    def change(value: Tensor) -> Tensor:
        value = value.clone()
        value[rows, positions] = kept[at][rows, positions]
        return value

    return data.difference(run(data.corrupted, {at: change})[0])


def heads_by_hooks(layer: int, heads: Sequence[int] = range(N_HEADS)) -> list[float]:
    """The same with each head's clean values at all positions."""
    data, at = pairs(), place(HEADS, layer)
    _, kept = run(data.clean, keep=[at])

    def change_of(columns: slice) -> Change:
        def change(value: Tensor) -> Tensor:
            value = value.clone()
            value[..., columns] = kept[at][..., columns]
            return value

        return change

    return [
        data.difference(run(data.corrupted, {at: change_of(head_columns(head))})[0])
        for head in heads
    ]


def by_pyvene(component: str, layer: int, roles: Sequence[str]) -> list[float]:
    """As `by_hooks`, by pyvene's interchange of one position, for each of some roles."""
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        import pyvene

        config = pyvene.IntervenableConfig(
            [pyvene.RepresentationConfig(layer, component, "pos", 1)],
            intervention_types=pyvene.VanillaIntervention,
        )
        # It freezes what it wraps, and takes its hooks away.
        wrapped: Any = pyvene.IntervenableModel(config, model=copy.deepcopy(load()))
        wrapped.disable_model_gradients()
    data, found = pairs(), []
    for role in roles:
        units = [[[position] for position in data.roles[role].tolist()]]
        _, output = wrapped(
            {"input_ids": data.corrupted},
            [{"input_ids": data.clean}],
            {"sources->base": (units, units)},
        )
        found.append(data.difference(output.logits[:, -1]))
    return found


@torch.no_grad()
def cells(layers: Iterable[int] = range(N_LAYERS)) -> list[Row]:
    """Both metrics at each place."""
    found: list[Row] = []
    for layer in layers:
        for component in COMPONENTS:
            roles = list(pairs().roles)
            if component == "block_input":
                values = by_pyvene(component, layer, roles)
            else:
                values = [by_hooks(component, layer, role) for role in roles]
            for role, value in zip(roles, values, strict=True):
                found += _rows(
                    {"component": component, "layer": layer, "role": role, "head": ""}, value
                )
        for head, value in enumerate(heads_by_hooks(layer)):
            found += _rows(
                {"component": HEADS, "layer": layer, "role": "whole", "head": head}, value
            )
    return found


def _rows(where: Row, difference: float) -> list[Row]:
    clean, corrupted = baselines()
    recovery = (difference - corrupted) / (clean - corrupted)
    return [
        {**where, "metric": "recovery", "value": recovery},
        {**where, "metric": "logit_difference", "value": difference},
    ]


def tables() -> dict[str, list[Row]]:
    return {NAME: cells()}
