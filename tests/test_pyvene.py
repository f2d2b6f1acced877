"""Against pyvene itself: the same cells, probabilities to 1e-5.

pyvene removes hooks and freezes what it wraps, so it gets a copy of the model.
"""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from torch import nn

from interv.engine import load_model
from interv.models import locate
from interv.spec.schema import ModelSection
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
