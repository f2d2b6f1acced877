"""Against pyvene itself: the same cells, probabilities to 1e-5.

pyvene removes hooks and freezes what it wraps, so it gets a copy of the model.
"""

from __future__ import annotations

import contextlib
import io
import random
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from torch import nn

from interv.engine import Edit, Run, Site, SuffixExecutor, Vanilla, anatomy_of, load_model
from interv.models import locate
from interv.spec.schema import ModelSection
from tests import zoo
from tests.conftest import PROMPT, Result, make_model

with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
    warnings.simplefilter("ignore")
    import pyvene

SEED = 1


class Noising(pyvene.ConstantSourceIntervention, pyvene.LocalistRepresentationIntervention):
    """The noise of the authors' draw, added to the first block's input at the subject."""

    def __init__(self, noise: torch.Tensor, **options: object) -> None:
        super().__init__(**options)
        self.noise = noise

    def forward(
        self, base: torch.Tensor, source: object = None, subspaces: object = None
    ) -> torch.Tensor:
        return base + self.noise.to(base.dtype).reshape(base.shape)


def pyvene_probability(
    model: nn.Module,
    ids: tuple[int, ...],
    answer: int,
    subject: tuple[int, int],
    noise: torch.Tensor | None,
    component: str,
    layers: range,
    position: int,
    corrupted_ids: tuple[int, ...] | None = None,
) -> float:
    """Mean probability over the draws, one pyvene run for each; without noise, over one run."""
    source = {"input_ids": torch.tensor([ids])}
    base = {"input_ids": torch.tensor([corrupted_ids or ids])}
    n = len(layers)
    if noise is None:
        config = pyvene.IntervenableConfig(
            [pyvene.RepresentationConfig(i, component, "pos", 1) for i in layers],
            intervention_types=[pyvene.VanillaIntervention] * n,
        )
        wrapped = pyvene.IntervenableModel(config, model)
        wrapped.disable_model_gradients()
        at = {"sources->base": ([[[position]]] * n, [[[position]]] * n)}
        with torch.no_grad():
            _, out = wrapped(base, [source] * n, at)
        return float(out.logits[0, -1].softmax(-1)[answer])
    where = list(range(*subject))
    found = []
    for draw in noise:
        config = pyvene.IntervenableConfig(
            [
                pyvene.RepresentationConfig(0, "block_input", "pos", len(where)),
                *(pyvene.RepresentationConfig(i, component, "pos", 1) for i in layers),
            ],
            intervention_types=[
                lambda draw=draw, **options: Noising(draw, **options),
                *([pyvene.VanillaIntervention] * len(layers)),
            ],
        )
        wrapped = pyvene.IntervenableModel(config, model)
        wrapped.disable_model_gradients()
        with torch.no_grad():
            _, out = wrapped(
                base,
                [None] + [source] * n,
                {
                    "sources->base": (
                        [None] + [[[position]]] * n,
                        [[where]] + [[[position]]] * n,
                    )
                },
            )
        found.append(float(out.logits[0, -1].softmax(-1)[answer]))
    return float(np.mean(found))


def compare(
    spec: dict[str, object],
    model: nn.Module,
    cli: Callable[..., Result],
    tmp_path: Path,
    cells: list[tuple[str, int, int, int]],
) -> None:
    from interv.plan import make_plan
    from interv.spec import load_spec

    path = tmp_path / "spec.yaml"
    path.write_text(yaml.safe_dump(spec))
    result = cli("trace", path, "-o", tmp_path / "outputs")
    assert result.code == 0, result.err
    table = pd.read_csv(Path(result.out.strip()) / "results.csv", keep_default_na=False)
    plan = make_plan(load_spec(path))
    prompt = plan.prompts[0]
    corrupt = plan.spec.corrupt
    n = prompt.subject[1] - prompt.subject[0]
    width = plan.facts.d_model
    noise = corrupt.level * torch.from_numpy(
        np.random.RandomState(SEED).randn(corrupt.samples, n, width)
    )
    seen = set()
    for component, window, layer, position in cells:
        row = table[
            (table["component"] == component)
            & (table["layer"] == layer)
            & (table["pos"] == position)
        ].iloc[0]
        layers = range(
            max(0, layer - window // 2), min(plan.facts.n_layers, layer - (-window // 2))
        )
        theirs = pyvene_probability(
            model,
            prompt.ids,
            prompt.answer_ids[0],
            prompt.subject,
            noise,
            component,
            layers,
            position,
        )
        assert row["value"] == pytest.approx(theirs, abs=1e-5), (component, layer, position)
        seen.add(round(theirs, 7))
    assert len(seen) > len(cells) // 2, "the cells hardly differ"


def test_tiny_gpt2(cli: Callable[..., Result], tmp_path: Path) -> None:
    folder = make_model("gpt2", tmp_path / "model", seed=3)
    section = ModelSection(path=str(folder))
    copy = load_model(locate(section, 0), section, 0, "cpu").module
    spec = {
        "kind": "trace",
        "model": {"path": str(folder)},
        "data": {
            "facts": [{"prompt": PROMPT, "subject": "The Space Needle", "answer": "Seattle"}],
            "keep": "all",
        },
        "corrupt": {"type": "noise", "level": 0.4, "samples": 2, "draw_seed": SEED},
        "grid": [
            {"component": "block_output"},
            {"component": ["mlp_output", "attention_output"], "window": 2},
        ],
    }
    windows = {"block_output": 1, "mlp_output": 2, "attention_output": 2}
    cells = [(c, w, i, p) for c, w in windows.items() for i in range(3) for p in (0, 2, 5)]
    compare(spec, copy, cli, tmp_path, cells)


@pytest.mark.model
def test_the_default_model(cli: Callable[..., Result], tmp_path: Path) -> None:
    section = ModelSection(name="smollm2-135m")
    copy = load_model(locate(section, 0), section, 0, "cpu").module
    layers, positions = [2, 14, 25], [2, 6, 9]
    spec = {
        "kind": "trace",
        "model": "smollm2-135m",
        "data": {
            "facts": [
                {
                    "prompt": "The Eiffel Tower is located in the city of",
                    "subject": "The Eiffel Tower",
                    "answer": "Paris",
                }
            ]
        },
        "corrupt": {"type": "noise", "level": 0.366, "samples": 2, "draw_seed": SEED},
        "grid": [{"component": "block_output", "layers": layers, "positions": positions}],
    }
    cells = [("block_output", 1, i, p) for i in layers for p in positions]
    compare(spec, copy, cli, tmp_path, cells)


PYVENES = {"mlp_gate_activation": "mlp_activation"}
"""pyvene's name of a component where it is another: on gated MLPs its `mlp_activation` is the
gate's activation, without the other factor."""

LLAMA_COMPONENTS = (
    "block_input",
    "block_output",
    "attention_input",
    "attention_output",
    "attention_value_output",
    "query_output",
    "key_output",
    "value_output",
    "head_attention_value_output",
    "head_query_output",
    "head_key_output",
    "head_value_output",
    "mlp_input",
    "mlp_gate_activation",
    "mlp_output",
)
"""All that pyvene 0.1.8 has for Llama: heads of keys and values too, though not on Qwen 2 or
OLMo. Left out is what it has no name for: `attention_weight`, `resid_mid`, the neurons
(`mlp_activation`) and the residuals, which on Llama are the outputs."""

GPT2_COMPONENTS = (
    *(name for name in LLAMA_COMPONENTS if name != "mlp_gate_activation"),
    "mlp_activation",
)
"""Without `attention_weight`: pyvene has the name, but its hook is on a module that never runs,
so that the swap changes nothing (`test_faults.py`, the sixth)."""


@dataclass(frozen=True)
class Point:
    """A swap of one site of `base` from `source`, both token ids."""

    base: tuple[int, ...]
    source: tuple[int, ...]
    component: str
    layer: int
    positions: tuple[int, ...]
    heads: tuple[int, ...] | None


def random_points(
    components: Sequence[str],
    n: int,
    pairs: Sequence[tuple[tuple[int, ...], tuple[int, ...]]],
    n_layers: int,
    units: Callable[[str], int | None],
) -> list[Point]:
    """Seeded points over all the components, each with one to three positions and heads."""
    chance = random.Random(0)

    def some(upto: int) -> tuple[int, ...]:
        return tuple(sorted(chance.sample(range(upto), min(upto, chance.choice([1, 1, 2, 3])))))

    points = []
    for i in range(n):
        base, source = pairs[i % len(pairs)]
        component = components[i % len(components)]
        count = units(component)
        heads = some(count) if component.startswith("head_") and count else None
        positions = some(min(len(base), len(source)))
        points.append(Point(base, source, component, chance.randrange(n_layers), positions, heads))
    return points


def pyvene_last_logits(model: nn.Module, point: Point) -> torch.Tensor:
    """Logits `[vocab]` of the last position."""
    unit = "pos" if point.heads is None else "h.pos"
    config = pyvene.IntervenableConfig(
        [
            pyvene.RepresentationConfig(
                point.layer,
                PYVENES.get(point.component, point.component),
                unit,
                len(point.positions),
            )
        ],
        intervention_types=[pyvene.VanillaIntervention],
    )
    wrapped = pyvene.IntervenableModel(config, model)
    wrapped.disable_model_gradients()
    positions = [list(point.positions)]
    at = [positions] if point.heads is None else [[[list(point.heads)], positions]]
    with torch.no_grad():
        _, out = wrapped(
            {"input_ids": torch.tensor([point.base])},
            [{"input_ids": torch.tensor([point.source])}],
            {"sources->base": (at, at)},
        )
    logits: torch.Tensor = out.logits[0, -1]
    return logits


def compare_points(model: nn.Module, copy: nn.Module, points: Sequence[Point], abs: float) -> None:
    """All points in one call of the suffix executor, against pyvene's one by one."""
    executor = SuffixExecutor(model, anatomy_of(model))
    runs = [
        Run(
            point.base,
            (
                Edit(
                    Site(point.component, point.layer, point.positions, point.heads),
                    Vanilla(),
                    Run(point.source),
                ),
            ),
        )
        for point in points
    ]
    ours = executor.logits(runs)[:, 0].double().softmax(-1)
    plain = executor.logits([Run(point.base) for point in points])[:, 0].double().softmax(-1)
    for i, point in enumerate(points):
        theirs = pyvene_last_logits(copy, point).double().softmax(-1)
        assert float((ours[i] - theirs).abs().max()) <= abs, point
    moved = (ours - plain).abs().amax(1)
    assert int((moved > 10 * abs).sum()) > 0.7 * len(points), "the swaps hardly do anything"


@pytest.mark.parametrize(("kind", "components"), [("llama", LLAMA_COMPONENTS),
                                                  ("gpt2", GPT2_COMPONENTS)])  # fmt: skip
def test_every_component_of_a_tiny_model(kind: str, components: tuple[str, ...]) -> None:
    """In float64; GPT-2's queries, keys and values share one projection, Llama's heads keys."""
    model, copy = zoo.make(kind), zoo.make(kind)
    pairs = [
        (tuple(zoo.ids(0)), tuple(zoo.ids(1))),
        (tuple(zoo.ids(2, length=9)), tuple(zoo.ids(3))),
    ]
    units = anatomy_of(model).n_units
    points = random_points(components, 4 * len(components), pairs, zoo.LAYERS, units)
    compare_points(model, copy, points, abs=1e-12)


@pytest.mark.model
def test_fifty_points_of_the_default_model() -> None:
    section = ModelSection(name="smollm2-135m")
    files = locate(section, 0)
    model, copy = (load_model(files, section, 0, "cpu").module for _ in range(2))
    assert files.tokenizer is not None
    places = ("The Eiffel Tower", "The Colosseum"), ("The Space Needle", "The Brandenburg Gate")
    pairs = [
        tuple(
            tuple(files.tokenizer.encode(f"{place} is located in the city of").ids) for place in p
        )
        for p in places
    ]
    units = anatomy_of(model).n_units
    assert (units("head_query_output"), units("head_key_output")) == (9, 3)
    points = random_points(LLAMA_COMPONENTS, 50, pairs, 30, units)
    compare_points(model, copy, points, abs=1e-5)
