from __future__ import annotations

import struct
from pathlib import Path
from typing import get_args

import pytest

from interv.report.figures import draw
from interv.spec.schema import Component
from tests import zoo
from tests.conftest import SpecWriter
from tests.test_tables import FACTS, tables


def names_and_sizes(path: Path) -> dict[str, int]:
    plan, _, results, summary = tables(path)
    drawn = draw(plan, results, summary)
    assert len({name for name, _ in drawn}) == len(drawn), "a figure was drawn over another"
    return {name: len(content) for name, content in drawn}


def test_one_fact_has_a_map_for_each_component_and_a_panel(write_spec: SpecWriter) -> None:
    sizes = names_and_sizes(write_spec())
    stems = {"trace_block_output", "trace_mlp_output", "trace_panel"}
    assert set(sizes) == {f"{stem}.{kind}" for stem in stems for kind in ("png", "svg")}
    assert min(sizes.values()) > 2000


def test_two_windows_of_a_component_are_two_figures(write_spec: SpecWriter) -> None:
    grid = [{"component": "mlp_output"}, {"component": "mlp_output", "window": 2}]
    sizes = names_and_sizes(write_spec(grid=grid, figures={"formats": ["png"]}))
    assert set(sizes) == {
        "trace_mlp_output_window1.png", "trace_mlp_output_window2.png", "trace_panel.png"
    }  # fmt: skip


def test_roles_over_facts_have_averages_and_lines(write_spec: SpecWriter) -> None:
    grid = [
        {"component": "block_output", "positions": "roles"},
        {"component": "block_output", "positions": "roles", "sever": "mlp_output"},
    ]
    path = write_spec(
        data={"facts": FACTS, "keep": "all"},
        grid=grid,
        figures={"formats": ["png"]},
        metric=["probability", "rank"],
    )
    assert set(names_and_sizes(path)) == {
        f"{name}.png"
        for metric in ("probability", "rank")
        for name in (
            f"average_{metric}_block_output",
            f"average_{metric}_block_output_without_mlp_output",
            f"average_{metric}_panel",
            f"lines_{metric}",
        )
    }


def test_the_same_run_draws_the_same_bytes(write_spec: SpecWriter) -> None:
    plan, _, results, summary = tables(write_spec(figures={"formats": ["png", "svg", "pdf"]}))
    assert draw(plan, results, summary) == draw(plan, results, summary)


@pytest.mark.parametrize("n_layers", [2, 48])
def test_a_wide_model_and_a_long_prompt_stay_readable(
    write_spec: SpecWriter, gpt2_folder: Path, n_layers: int
) -> None:
    from tests.conftest import tiny_config

    model = {"config": {**tiny_config("gpt2"), "n_layer": n_layers}, "tokenizer": str(gpt2_folder)}
    prompt = "The Space Needle $x_1$ " + "is in downtown " * 16 + "in"
    fact = {"prompt": prompt, "subject": "Needle $x", "answer": "Seattle"}
    path = write_spec(
        model=model,
        data={"facts": [fact], "keep": "all"},
        grid={"component": "block_output"},
        figures={"formats": ["png"], "dpi": 100},
    )
    plan, _, results, summary = tables(path)
    [(_, png)] = draw(plan, results, summary)
    width, height = struct.unpack(">II", png[16:24])
    assert height > 14 * len(plan.prompts[0].tokens), "rows closer together than their letters"
    assert width > 5 * n_layers


def test_every_component_that_a_trace_may_name_is_drawn(
    write_spec: SpecWriter, gpt2_folder: Path
) -> None:
    from tests.conftest import tiny_config

    figures = {"formats": ["png"], "dpi": 30}
    components = [
        "block_input", "block_output", "resid_mid", "attention_input", "query_output",
        "key_output", "value_output", "attention_weight", "attention_value_output",
        "attention_output", "attention_residual", "mlp_input", "mlp_gate_activation",
        "mlp_activation", "mlp_output", "mlp_residual",
    ]  # fmt: skip
    mixers = ["mixer_input", "mixer_activation", "mixer_output"]
    assert {*components, *mixers} == set(get_args(Component))
    mamba = {**zoo.CONFIGS["mamba"], "vocab_size": 420}
    for config, names in ((tiny_config("llama"), components), (mamba, mixers)):
        model = {"config": config, "tokenizer": str(gpt2_folder)}
        grid = {"component": names, "layers": [0, 1], "positions": "last"}
        path = write_spec(model=model, grid=grid, figures=figures)
        drawn = names_and_sizes(path)
        assert {f"average_{name}.png" for name in names} <= set(drawn)
