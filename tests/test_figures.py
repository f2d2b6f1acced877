from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import get_args

import pytest
from matplotlib.figure import Figure

from interv.report.figures import draw
from interv.report.tables import prompts_table
from interv.spec.schema import Component
from tests import zoo
from tests.conftest import SpecWriter
from tests.test_tables import FACTS, tables


def names_and_sizes(path: Path) -> dict[str, int]:
    plan, journal, results, summary = tables(path)
    drawn = draw(plan, results, summary, prompts_table(plan, journal))
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
    drawn = [
        draw(plan, results, summary, prompts_table(plan, journal))
        for plan, journal, results, summary in (
            tables(write_spec(figures={"formats": ["png", "svg", "pdf"]})) for _ in range(2)
        )
    ]
    assert drawn[0] == drawn[1]


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> dict[str, Figure]:
    """Figures by the stems of their files, instead of files."""
    found: dict[str, Figure] = {}

    def keep(_section: object, stem: str, figure: Figure) -> Iterator[tuple[str, bytes]]:
        found[stem] = figure
        yield stem, b""

    monkeypatch.setattr("interv.report.figures.files_of", keep)
    return found


def limits(figure: Figure) -> tuple[float, float, str, str]:
    """The ends of a map's colours, the map's name, and beyond which ends there are values."""
    mesh = figure.axes[0].collections[0]
    low, high = mesh.get_clim()
    return low, high, mesh.get_cmap().name, mesh.colorbar.extend


def test_colours_reach_from_the_corrupted_value_to_the_clean_one(
    write_spec: SpecWriter, drawn: dict[str, Figure]
) -> None:
    """Not over the data's own range: a trace that restores next to nothing must look like it."""
    metrics = ["probability", "rank"]
    grid = [
        {"component": "block_output"},
        {"component": "block_output", "positions": "last_subject"},
    ]
    plan, journal, results, summary = tables(write_spec(metric=metrics, grid=grid))
    draw(plan, results, summary, prompts_table(plan, journal))
    for metric in metrics:
        rows = results[results["metric"] == metric]
        clean, corrupted = rows["clean"].iloc[0], rows["corrupted"].iloc[0]
        low, high, colours, extend = limits(drawn[f"trace_{metric}_block_output"])
        assert (low, high) == pytest.approx(sorted((clean, corrupted)))
        assert colours == ("Purples" if clean > corrupted else "Purples_r")
        values = rows[rows["role"] == ""]["value"]
        beyond = bool((values < low).any()), bool((values > high).any())
        names = {(True, True): "both", (True, False): "min", (False, True): "max"}
        assert extend == names.get(beyond, "neither")
        low, high, *_ = limits(drawn[f"average_{metric}_block_output"])
        assert (low, high) == pytest.approx(sorted((0, clean - corrupted)))


@pytest.mark.parametrize(("corrupted", "weak"), [(0.75, True), (0.3, False), (0.9, True)])
def test_a_weak_corruption_is_written_on_every_figure(
    write_spec: SpecWriter, drawn: dict[str, Figure], corrupted: float, weak: bool
) -> None:
    """0.79 and 0.75 are what Gemma 3 gave under noise 16 times too small."""
    grid = {"component": "block_output", "positions": ["all", "roles"]}
    path = write_spec(data={"facts": FACTS, "keep": "all"}, grid=grid)
    plan, journal, results, summary = tables(path)
    prompts = prompts_table(plan, journal).assign(p_clean=0.79, p_corrupted=corrupted)
    draw(plan, results, summary, prompts)
    assert {"trace_prompt0_block_output", "average_block_output", "lines"} <= set(drawn)
    titles = {figure.get_suptitle() for figure in drawn.values()}
    told = f"WEAK CORRUPTION: answer 0.79 clean, {corrupted} corrupted"
    assert titles == {told if weak else ""}


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
    plan, journal, results, summary = tables(path)
    [(_, png)] = draw(plan, results, summary, prompts_table(plan, journal))
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
