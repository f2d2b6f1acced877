"""Every component of every family, both executors, against plain hooks (`raw_swap`).

One test a family: all its swaps go into one call of each executor, so that rows of different
components, layers, prompts and lengths share forwards and walks.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache

import pytest
import torch
from torch import Tensor, nn

from interv.engine import (
    Edit,
    Executor,
    Inputs,
    ReferenceExecutor,
    Run,
    Site,
    SuffixExecutor,
    Vanilla,
    anatomy_of,
)
from tests import raw_swap, zoo

FAMILIES = tuple(name for name in zoo.CONFIGS if name not in zoo.VISION)

EXACT = 1e-9
"""Of the largest logit, in float64; 1e-14 is what it is."""

LOOSE = {
    # transformers computes attention scores in float32, whatever the model's numbers are.
    "gpt_neo": 2e-6,
    "gptj": 5e-7,
}
LOOSE_PATTERN = {
    # Where its attention is written out the softmax is float32; the oracle's is float64.
    "gemma2": 5e-7,
}

ABSENT = {
    # Its sub-layers' outputs are scaled before they are added: no module gives what is.
    "granite": {"attention_residual", "mlp_residual"},
    # That norm runs twice: on the patches, and on the pooled vector.
    "blip": {"vision_final_norm"},
}

AT = (-5, -4, -3, -2, -1)
BASE, SOURCE = tuple(zoo.ids(0)), tuple(zoo.ids(1))
SHORT, SHORT_SOURCE = tuple(zoo.ids(2, 5)), tuple(zoo.ids(3, 5))


def allowed(name: str, *, pattern: bool) -> float:
    return max(LOOSE.get(name, EXACT), LOOSE_PATTERN.get(name, EXACT) if pattern else 0)


@dataclass(frozen=True)
class Swap:
    """One swap; `positions` None: all of the prompt's."""

    component: str
    layer: int
    ids: tuple[int, ...]
    source: tuple[int, ...]
    positions: tuple[int, ...] | None
    heads: tuple[int, ...] | None = None

    def run(self) -> Run:
        site = Site(self.component, self.layer, self.positions, self.heads)
        return Run(self.ids, (Edit(site, Vanilla(), Run(self.source)),))

    def __str__(self) -> str:
        return f"{self.component} {self.layer} {self.positions} heads {self.heads}"


def swaps(name: str, component: str, number: int) -> Iterator[Swap]:
    """One position, several, two prompts each with its own, some heads, all positions.

    Layers go round, so that each component is swapped in the first, the middle and the last.
    """

    def layer(turn: int) -> int:
        return (number + turn) % zoo.LAYERS if raw_swap.has_layer(component) else 0

    yield Swap(component, layer(0), BASE, SOURCE, (3,))
    yield Swap(component, layer(1), BASE, SOURCE, (2, 5))
    yield Swap(component, layer(2), BASE, SOURCE, (6, 4))
    yield Swap(component, layer(2), SHORT, SHORT_SOURCE, (1, 4))
    yield Swap(component, layer(1), SHORT, SHORT_SOURCE, None)
    yield Swap(component, layer(0), BASE, SOURCE, None)
    count = raw_swap.head_count(name, component)
    if count:
        yield Swap(component, layer(1), BASE, SOURCE, (4,), (count - 1,))
        yield Swap(component, layer(2), SHORT, SHORT_SOURCE, (4, 2), (0,))
        yield Swap(component, layer(0), BASE, SOURCE, None, tuple(range(0, count, 2)))


def expected(
    name: str, model: nn.Module, wanted: Sequence[Swap]
) -> tuple[list[Tensor], dict[tuple[int, ...], Tensor]]:
    """The oracle's logits of each swap at `AT`, and those of the plain prompts."""

    @cache
    def source(component: str, layer: int, ids: tuple[int, ...]) -> Tensor:
        return raw_swap.capture(model, name, component, layer, ids)

    found = []
    for swap in wanted:
        logits = raw_swap.swapped_logits(
            model,
            name,
            swap.component,
            swap.layer,
            swap.ids,
            source(swap.component, swap.layer, swap.source),
            swap.positions or range(len(swap.ids)),
            heads=swap.heads,
        )
        found.append(logits[list(AT)])
    with torch.no_grad():
        plain = {ids: model(torch.tensor([ids])).logits[0, list(AT)] for ids in (BASE, SHORT)}
    return found, plain


@pytest.mark.parametrize("name", zoo.CONFIGS)
def test_the_anatomy_has_the_oracles_components(name: str) -> None:
    anatomy = anatomy_of(zoo.make(name))
    assert set(anatomy.components) == set(raw_swap.components(name)) - ABSENT.get(name, set())


@pytest.mark.parametrize("name", FAMILIES)
def test_every_component_of(name: str) -> None:
    model = zoo.make(name)
    anatomy = anatomy_of(model)
    wanted = [
        swap
        for number, component in enumerate(anatomy.components)
        for swap in swaps(name, component, number)
    ]
    oracle, plain = expected(name, model, wanted)
    executors: list[Executor] = [
        ReferenceExecutor(model, anatomy),
        SuffixExecutor(model, anatomy),
    ]
    runs = [*(swap.run() for swap in wanted), Run(BASE), Run(SHORT)]
    faults = []
    for executor in executors:
        got = executor.logits(runs, AT)
        rights = [*oracle, plain[BASE], plain[SHORT]]
        for logits, right, what in zip(got, rights, [*wanted, BASE, SHORT], strict=True):
            apart = float((logits - right).abs().max() / right.abs().max())
            pattern = isinstance(what, Swap) and what.component == "attention_weight"
            if not apart <= allowed(name, pattern=pattern):
                faults.append(f"{type(executor).__name__}: {what}: off by {apart:.1e}")
    for swap, right in zip(wanted, oracle, strict=True):
        if (right - plain[swap.ids]).abs().max() < 1e-5:
            faults.append(f"{swap}: has no effect, so that nothing is tested")
    assert not faults, "\n".join(faults)


@pytest.mark.parametrize("name", FAMILIES)
def test_states_of(name: str) -> None:
    """What is read at each component is what a plain hook sees there."""
    model = zoo.make(name)
    anatomy = anatomy_of(model)
    sites = [
        Site(component, number % zoo.LAYERS if raw_swap.has_layer(component) else 0)
        for number, component in enumerate(anatomy.components)
    ]
    reference = ReferenceExecutor(model, anatomy)
    suffix = SuffixExecutor(model, anatomy)
    faults = []
    for executor in (reference, suffix):
        for site, found in zip(sites, executor.states([Run(BASE), Run(SHORT)], sites), strict=True):
            for ids, got in zip((BASE, SHORT), found, strict=True):
                right = raw_swap.capture(model, name, site.component, site.layer, ids)
                if site.component == "attention_weight":
                    right = right.transpose(0, 1)
                right = right.flatten(1)
                near = allowed(name, pattern=site.component == "attention_weight")
                if not (got.shape == right.shape and close(got, right, near)):
                    faults.append(f"{type(executor).__name__}: {site}")
    assert not faults, "\n".join(faults)


def close(a: Tensor, b: Tensor, near: float = EXACT) -> bool:
    return bool((a - b).abs().max() <= near * b.abs().max())


@pytest.mark.parametrize("tower", ["text", "vision", "whole"])
def test_blip(tower: str) -> None:
    """Pixels and text go in by name; its towers' components have the tower before them."""
    model = zoo.make("blip")
    anatomy = anatomy_of(model)
    executor = ReferenceExecutor(model, anatomy)

    def inputs(variant: int, length: int = 7) -> Inputs:
        tensors = zoo.inputs("blip", variant, length)
        return Inputs(**{key: value[0] for key, value in tensors.items()})

    base, other, short = Run(inputs(0)), Run(inputs(1)), Run(inputs(2, 5))
    runs, oracle = [], []
    names = [
        component
        for component in anatomy.components
        if (component.partition("_")[0] if component not in raw_swap.UNPREFIXED else "whole")
        == tower
    ]
    assert names
    for number, component in enumerate(names):
        layer = number % zoo.LAYERS if raw_swap.has_layer(component) else 0
        source = raw_swap.capture(
            model, "blip", component, layer, zoo.ids(1), zoo.extras("blip", 1)
        )
        count = raw_swap.head_count("blip", component)
        for positions in ((3,), (1, 4), None):
            for heads in {None, (1,) if count else None}:
                site = Site(component, layer, positions, heads)
                runs.append(Run(base.ids, (Edit(site, Vanilla(), other),)))
                oracle.append(
                    raw_swap.swapped_logits(
                        model,
                        "blip",
                        component,
                        layer,
                        zoo.ids(0),
                        source,
                        positions or range(len(source)),
                        heads=heads,
                    )
                )
    got = executor.logits(runs)
    assert got.shape == (len(runs), 7, zoo.VOCAB)
    plain = executor.logits([base])[0]
    for logits, right, run in zip(got, oracle, runs, strict=True):
        assert close(logits, right), run.edits[0].site
        assert (right - plain).abs().max() > 1e-6, run.edits[0].site
    with torch.no_grad():
        right = model(**zoo.inputs("blip", 2, 5)).logits[0]
    assert close(executor.logits([short])[0], right)


WIDER: dict[str, dict[str, object]] = {
    "gpt2": {"n_embd": 256},
    "llama": {"hidden_size": 256, "intermediate_size": 512},
    "gemma2": {"hidden_size": 256, "intermediate_size": 512, "head_dim": 64},
    "gpt_oss": {"hidden_size": 256, "intermediate_size": 512, "head_dim": 64},
    "mixtral": {"hidden_size": 256, "intermediate_size": 512},
}


@pytest.mark.parametrize("name", WIDER)
def test_float32(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the numbers that people use, many rows at once: what batching rounds is that little."""
    monkeypatch.setitem(zoo.CONFIGS, name, {**zoo.CONFIGS[name], **WIDER[name]})
    model = zoo.make(name, torch.float32)
    anatomy = anatomy_of(model)
    wanted = [
        swap
        for number, component in enumerate(anatomy.components)
        for swap in swaps(name, component, number)
    ]
    runs = [swap.run() for swap in wanted]
    reference = ReferenceExecutor(model, anatomy).logits(runs, AT)
    suffix = SuffixExecutor(model, anatomy).logits(runs, AT)
    assert suffix.dtype == torch.float32
    apart = (suffix - reference).abs().amax((1, 2)) / reference.abs().max()
    likely = (suffix.softmax(-1) - reference.softmax(-1)).abs().amax((1, 2))
    worst = int(likely.argmax())
    assert apart.max() <= 1e-4, wanted[int(apart.argmax())]
    assert likely.max() <= 1e-5, wanted[worst]
