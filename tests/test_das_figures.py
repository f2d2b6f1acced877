from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import pandas as pd
import pytest
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection, PathCollection, PolyCollection
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.text import Text

from interv.report import das_figures as figures
from interv.report.figures import STYLE
from tests.test_patch_figures import STRANGE, assert_readable, bytes_of, labels_of, meshes

CONTROLS = ["trained", "whole vector", "random subspace", "shuffled labels"]
METRICS = ["iia", "iia_full", "iia_random", "iia_shuffled"]
COLOURS = ["#0072b2", "#009e73", "#d55e00", "#cc79a7"]


@pytest.fixture(autouse=True)
def _as_a_report_draws() -> Iterator[None]:
    with rc_context(STYLE):
        yield


def grid(n_layers: int, n_rows: int, factor: float = 1.0) -> pd.DataFrame:
    n = n_layers * n_rows
    rows = [
        (r, la, factor * (r * n_layers + la) / n) for r in range(n_rows) for la in range(n_layers)
    ]
    return pd.DataFrame(rows, columns=["row", "layer", "mean"]).astype({"layer": "Int64"})


def facets_of(n_layers: int, n_rows: int, n: int = 4) -> list[tuple[str, pd.DataFrame]]:
    return [(CONTROLS[i], grid(n_layers, n_rows, 1 - 0.2 * i)) for i in range(n)]


def groups_of(
    means: list[float], metrics: list[str] = METRICS, labels: list[str] | None = None
) -> pd.DataFrame:
    """Of each metric a quarter of the one before; seeds 0.1 on both sides."""
    rows = []
    for i, mean in enumerate(means):
        for k, metric in enumerate(metrics):
            m = mean / 4**k
            label = f"block {i}" if labels is None else labels[i]
            rows.append((label, metric, m, m - 0.05, m + 0.05, [m - 0.1, m + 0.1]))
    columns = ["label", "metric", "mean", "ci_low", "ci_high", "seeds"]
    return pd.DataFrame(rows, columns=columns)


def fits_of(ends: list[float], seeds: int = 1, names: list[str] | None = None) -> pd.DataFrame:
    """Loss at every step, IIA at each second one; seed s has 10 - 2s steps and a loss s higher."""
    rows = []
    for i, end in enumerate(ends):
        for seed in range(seeds):
            steps = 10 - 2 * seed
            for step in range(steps):
                iia = end * (step + 1) / steps if step % 2 else np.nan
                name = f"fit {i}" if names is None else names[i]
                rows.append((name, seed, step, 2.0**-step + seed, iia))
    return pd.DataFrame(rows, columns=["fit", "seed", "step", "loss", "iia"])


def ranks_of(places: list[str], ranks: list[int]) -> pd.DataFrame:
    rows: list[tuple[str, str, float, float]] = []
    for i, place in enumerate(places):
        for rank in ranks:
            rows.append((place, "iia", rank, rank / (rank + i + 1)))
            rows.append((place, "iia_random", rank, 0.1 + 0.01 * i))
        rows.append((place, "iia_full", np.nan, 0.9))
    frame = pd.DataFrame(rows, columns=["place", "metric", "rank", "mean"])
    return frame.assign(ci_low=frame["mean"] - 0.02, ci_high=frame["mean"] + 0.03)


def strong(axes: Axes) -> list[Line2D]:
    """The lines of fits that have a colour, seeds left out."""
    return [line for line in axes.lines if line.get_linewidth() > 1]


def legend_of(axes: Axes) -> list[str]:
    legend = axes.get_legend()
    return [] if legend is None else [text.get_text() for text in legend.get_texts()]


def inches(axes: Axes) -> tuple[float, float]:
    box, dpi = axes.get_window_extent(), axes.figure.dpi
    return box.width / dpi, box.height / dpi


def test_maps_share_one_scale_from_0_to_1_and_one_bar() -> None:
    figure = figures.iia_maps(facets_of(3, 2), ["name", "last"], "gpt2")
    assert [mesh.get_clim() for mesh in meshes(figure)] == [(0.0, 1.0)] * 4
    *panels, bar = figure.axes
    assert [axes.get_title() for axes in panels] == CONTROLS
    assert bar.get_label() == "<colorbar>"
    assert bar.get_ylabel().replace("\n", " ") == "interchange intervention accuracy"
    np.testing.assert_allclose(
        np.asarray(meshes(figure)[1].get_array()), np.arange(6).reshape(2, 3) / 6 * 0.8
    )
    assert panels[0].yaxis_inverted(), "the first position is on top"
    assert panels[0].get_xlabel() == "layer of gpt2"


def test_few_layers_have_their_controls_beside_them_with_shared_labels() -> None:
    figure = figures.iia_maps(facets_of(3, 2), ["name", "last"], "gpt2")
    figure.draw_without_rendering()
    trained, *controls = figure.axes[:4]
    assert [labels_of(axes, "y") for axes in figure.axes[:4]] == [["name", "last"], [], [], []]
    assert [labels_of(axes, "x") for axes in figure.axes[:4]] == [["0", "1", "2"]] * 4
    for one in controls:
        assert one.get_position().y0 == trained.get_position().y0, "rows are in line"
        assert one.get_position().height == trained.get_position().height
        assert inches(one)[0] < 0.8 * inches(trained)[0], "what was trained is the largest"


def test_many_layers_have_their_controls_below_them() -> None:
    figure = figures.iia_maps(facets_of(30, 6), list("abcdef"), "gpt2")
    figure.draw_without_rendering()
    trained, *controls = figure.axes[:4]
    assert [labels_of(axes, "y") for axes in figure.axes[:4]] == [list("abcdef")] * 4
    assert [len(labels_of(axes, "x")) for axes in figure.axes[:4]] == [0, 0, 0, 30]
    for one in controls:
        assert one.get_position().x0 == trained.get_position().x0, "layers are in line"
        assert one.get_position().width == trained.get_position().width
        assert inches(one)[1] < 0.8 * inches(trained)[1], "what was trained is the largest"
    assert figure.axes[3].get_xlabel() == "layer of gpt2"


def test_few_squares_have_their_numbers_and_what_was_not_run_has_none() -> None:
    trained = grid(3, 1).drop(index=[0])
    trained.loc[1, "mean"] = np.nan
    figure = figures.iia_maps([("trained", trained), ("other", grid(3, 1))], ["last"], "gpt2")
    shown = [[text.get_text() for text in axes.texts] for axes in figure.axes[:2]]
    assert shown == [["0.67"], ["0.00", "0.33", "0.67"]]
    mask = np.ma.masked_invalid(meshes(figure)[0].get_array()).mask
    assert mask.tolist() == [[True, True, False]]
    dark, light = figure.axes[1].texts[0], figure.axes[1].texts[2]
    assert (dark.get_color(), light.get_color()) == ("white", "black")
    many = figures.iia_maps(facets_of(30, 6), list("abcdef"), "gpt2")
    assert not any(axes.texts for axes in many.axes[:4])


def test_two_values_for_one_square_are_refused() -> None:
    table = pd.concat([grid(3, 2), grid(1, 1)])
    with pytest.raises(ValueError, match="duplicate"):
        figures.iia_maps([("trained", table)], ["a", "b"], "gpt2")


@pytest.mark.parametrize(
    ("n", "shape"),
    [
        *((4, s) for s in [(30, 6), (3, 1), (12, 1), (1, 5), (1, 1), (12, 6), (6, 6), (48, 60)]),
        *((1, s) for s in [(30, 6), (3, 1), (1, 5)]),
        (2, (12, 30)),
    ],
)
def test_maps_of_any_size_are_readable(n: int, shape: tuple[int, int]) -> None:
    labels = [f"{i} token" for i in range(shape[1])]
    figure = figures.iia_maps(facets_of(*shape, n), labels, "smollm2-135m")
    assert len(meshes(figure)) == n
    assert_readable(figure)
    assert_inside_squares(figure, shape[0])


def assert_inside_squares(figure: Figure, n_layers: int) -> None:
    for axes in figure.axes:
        square = axes.get_window_extent().width / n_layers
        for text in axes.texts:
            assert text.get_window_extent().width < square, "a number wider than its square"


def test_bars_are_points_with_intervals_and_seeds() -> None:
    figure = figures.iia_bars(groups_of([0.8, 0.4]), 0.5)
    [axes] = figure.axes
    chance, *points = axes.lines
    assert chance.get_xdata() == [0.5, 0.5] and chance.get_linestyle() == "--"
    assert [line.get_xdata().tolist() for line in points] == [
        [0.8, 0.4], [0.2, 0.1], [0.05, 0.025], [0.0125, 0.00625]
    ]  # fmt: skip
    assert [to_hex(line.get_color()) for line in points] == COLOURS
    assert len({line.get_marker() for line in points}) == 4
    intervals = [c for c in axes.collections if isinstance(c, LineCollection)]
    ends = [path.vertices[:, 0].tolist() for path in intervals[0].get_paths()]
    np.testing.assert_allclose(ends, [[0.75, 0.85], [0.35, 0.45]])
    seeds = [c for c in axes.collections if isinstance(c, PathCollection)]
    assert len(seeds) == 8
    np.testing.assert_allclose(np.asarray(seeds[0].get_offsets())[:, 0], [0.7, 0.9])
    assert labels_of(axes, "y") == ["block 0", "block 1"]
    assert axes.yaxis_inverted(), "the first group is on top"
    heights = [line.get_ydata()[0] for line in points]
    assert heights == sorted(heights), "what was trained is above its controls"
    assert legend_of(axes) == ["chance", *CONTROLS]


def test_bars_without_chance_controls_or_intervals_are_drawn() -> None:
    frame = groups_of([0.9, 0.6], ["iia", "iia_full"]).assign(ci_low=np.nan, ci_high=np.nan)
    frame = frame.assign(seeds=[[0.9], [0.2], [], [0.1]]).drop(index=[3])
    figure = figures.iia_bars(frame, None)
    [axes] = figure.axes
    assert legend_of(axes) == CONTROLS[:2]
    full = axes.lines[1].get_xdata()
    assert full[0] == 0.225 and np.isnan(full[1]), "a control that was not run is no point"
    assert not [c for c in axes.collections if isinstance(c, PathCollection)], (
        "one seed is no spread"
    )
    bytes_of(figure, "png")


def test_bars_are_the_highest_in_the_order_of_the_table() -> None:
    means = [0.5, 0.9, float("nan"), *np.linspace(0.6, 0.8, 20).tolist()]
    figure = figures.iia_bars(groups_of(means), 0.5)
    [axes] = figure.axes
    kept = [f"block {i}" for i in range(len(means)) if i not in (0, 2, 3)]
    assert labels_of(axes, "y") == kept and len(kept) == figures.MAX_GROUPS
    assert axes.get_title() == "the 20 highest of 23"


def test_two_values_for_one_group_are_refused() -> None:
    with pytest.raises(ValueError, match="duplicate"):
        figures.iia_bars(pd.concat([groups_of([0.5]), groups_of([0.6])]), None)


@pytest.mark.parametrize("n", [1, 2, 20])
def test_any_number_of_bars_is_readable(n: int) -> None:
    labels = [f"attention_value_output {i} at END, low_rank_rotated_space 128" for i in range(n)]
    figure = figures.iia_bars(groups_of([0.9 - 0.02 * i for i in range(n)], labels=labels), 0.5)
    assert_readable(figure)
    assert_legend_is_on_the_page(figure)


def assert_legend_is_on_the_page(figure: Figure) -> None:
    for axes in figure.axes:
        if (legend := axes.get_legend()) is not None:
            box = legend.get_window_extent()
            assert box.x0 > axes.bbox.x1 - 1, "beside the axes"
            assert box.x1 <= figure.bbox.x1 and box.y0 >= 0 and box.y1 <= figure.bbox.y1


def test_one_fit_has_its_loss_above_its_iia_and_no_legend() -> None:
    figure = figures.learning_curves(fits_of([0.8]))
    loss, iia = figure.axes
    figure.draw_without_rendering()
    assert loss.get_position().y0 > iia.get_position().y1
    assert (loss.get_yscale(), loss.get_ylabel()) == ("log", "loss")
    assert (iia.get_ylabel(), iia.get_xlabel(), iia.get_ylim()) == (
        "held-out IIA", "step", (-0.02, 1.02)
    )  # fmt: skip
    [line] = loss.lines
    np.testing.assert_allclose(line.get_xydata(), [[s, 2.0**-s] for s in range(10)])
    [line] = iia.lines
    assert line.get_xdata().tolist() == [1, 3, 5, 7, 9], "only where it was measured"
    np.testing.assert_allclose(line.get_ydata(), [0.16, 0.32, 0.48, 0.64, 0.8])
    assert (loss.get_title(), legend_of(loss)) == ("fit 0", [])


def test_seeds_are_faint_and_their_mean_ends_with_the_first_of_them() -> None:
    figure = figures.learning_curves(fits_of([0.8, 0.9], seeds=2))
    loss, iia = figure.axes
    assert len(loss.lines) == 6, "of each fit two seeds and the mean"
    for mean in strong(loss):
        np.testing.assert_allclose(mean.get_xydata(), [[s, 2.0**-s + 0.5] for s in range(8)])
    faint = [line for line in loss.lines if line not in strong(loss)]
    assert sorted(len(line.get_xdata()) for line in faint) == [8, 8, 10, 10]
    assert all((line.get_alpha() or 1) < 0.5 for line in faint)
    assert legend_of(loss) == ["fit 0", "fit 1"] and legend_of(iia) == []


def test_a_loss_that_is_not_positive_has_a_linear_axis_and_nan_is_left_out() -> None:
    frame = fits_of([0.8])
    frame.loc[4, "loss"] = np.nan
    frame.loc[5, "loss"] = np.inf
    figure = figures.learning_curves(frame)
    assert figure.axes[0].get_yscale() == "log"
    assert figure.axes[0].lines[0].get_xdata().tolist() == [0, 1, 2, 3, 6, 7, 8, 9]
    frame.loc[9, "loss"] = 0.0
    assert figures.learning_curves(frame).axes[0].get_yscale() == "linear"


def test_the_temperature_has_a_panel_where_there_is_one() -> None:
    frame = fits_of([0.8])
    assert len(figures.learning_curves(frame.assign(temperature=np.nan)).axes) == 2
    figure = figures.learning_curves(frame.assign(temperature=50 * 0.5 ** frame["step"]))
    [_, iia, heat] = figure.axes
    assert heat.get_ylabel() == "temperature" and heat.get_yscale() == "log"
    assert heat.get_xlabel() == "step" and iia.get_xlabel() == ""
    np.testing.assert_allclose(heat.lines[0].get_ydata()[:2], [50, 25])
    assert_readable(figure)


def test_the_fits_that_end_highest_are_named_and_the_others_grey() -> None:
    ends = [0.1, *[0.5 + 0.01 * i for i in range(8)], 0.2, float("nan")]
    figure = figures.learning_curves(fits_of(ends))
    loss = figure.axes[0]
    assert legend_of(loss) == [*(f"fit {i}" for i in range(1, 9)), "3 more"]
    looks = [(to_hex(line.get_color()), line.get_linestyle()) for line in strong(loss)]
    assert len(looks) == len(set(looks)) == figures.MAX_FITS, "each is told from the others"
    grey = [line for line in loss.lines if line not in strong(loss)]
    assert {to_hex(line.get_color()) for line in grey} == {"#999999"} and len(grey) == 3
    assert loss.lines[:3] == grey, "under the ones with a name"
    assert_readable(figure)
    assert_legend_is_on_the_page(figure)


def test_fits_without_any_iia_are_drawn() -> None:
    figure = figures.learning_curves(fits_of([0.5, 0.6]).assign(iia=np.nan))
    assert len(figure.axes[0].lines) == 2
    bytes_of(figure, "png")


def test_two_values_for_one_step_are_refused() -> None:
    with pytest.raises(ValueError, match="duplicate"):
        figures.learning_curves(pd.concat([fits_of([0.5]), fits_of([0.5])]))


def test_ranks_are_on_a_log2_axis_with_dashed_controls() -> None:
    frame = ranks_of(["block 3", "block 4"], [1, 4, 16]).sample(frac=1, random_state=0)
    figure = figures.rank_curve(frame)
    [axes] = figure.axes
    figure.draw_without_rendering()
    assert axes.get_xscale() == "log" and labels_of(axes, "x") == ["1", "4", "16"]
    points = axes.transData.transform([(1, 0), (4, 0), (16, 0)])[:, 0]
    assert points[1] - points[0] == pytest.approx(points[2] - points[1])
    trained = [line for line in axes.lines if line.get_marker() == "o"]
    assert all(line.get_linestyle() == "-" for line in trained)
    found = {line.get_ydata()[0]: line.get_xydata().tolist() for line in trained}
    assert found[0.5] == [[1, 0.5], [4, 0.8], [16, 16 / 17]], "in the order of rank"
    assert len(found) == 2
    assert len([c for c in axes.collections if isinstance(c, PolyCollection)]) == 2, "intervals"
    random = [line for line in axes.lines if line.get_linestyle() == ":"]
    assert sorted(line.get_ydata().tolist() for line in random) == [[0.1] * 3, [0.11] * 3]
    levels = [line for line in axes.lines if line.get_linestyle() == "--"]
    assert [line.get_ydata() for line in levels] == [[0.9, 0.9]] * 2
    assert len(levels) == 2, "the whole vector has no rank"
    assert {to_hex(line.get_color()) for line in trained} == {
        to_hex(line.get_color()) for line in levels
    }
    keys = sorted(legend_of(axes))
    assert keys == ["block 3", "block 4", "random subspace", "whole vector"]
    assert axes.get_ylim() == (-0.02, 1.02)


def test_ranks_too_close_to_print_give_way_to_powers_of_two() -> None:
    figure = figures.rank_curve(ranks_of(["block 3"], [*range(1, 33), 576]))
    shown = labels_of(figure.axes[0], "x")
    assert [int(s) for s in shown] == sorted(int(s) for s in shown)
    assert {"1", "2", "4", "8", "16", "32", "576"} <= set(shown) and len(shown) < 12
    assert_readable(figure)


def test_two_values_for_one_rank_are_refused() -> None:
    frame = ranks_of(["block 3"], [1, 2])
    with pytest.raises(ValueError, match="duplicate"):
        figures.rank_curve(pd.concat([frame, frame]))


@pytest.mark.parametrize("n", [1, 4, 12])
@pytest.mark.parametrize("ranks", [[8], [1, 2, 4, 8], [1, 2, 3, 5, 8, 13, 64, 2048]])
def test_any_number_of_places_is_readable(n: int, ranks: list[int]) -> None:
    places = [f"attention_value_output {i} at END" for i in range(n)]
    figure = figures.rank_curve(ranks_of(places, ranks))
    assert_readable(figure)
    assert_legend_is_on_the_page(figure)
    [axes] = figure.axes
    left, right = axes.get_xlim()
    assert left < ranks[0] and ranks[-1] < right
    if n > figures.MAX_PLACES:
        assert "5 more" in legend_of(axes)
        grey = [line for line in axes.lines if to_hex(line.get_color()) == "#999999"]
        assert [line.get_linestyle() for line in grey] == ["-"] * 5, "no controls of the others"
        assert not {f"attention_value_output {i} at END" for i in range(7, 12)} & set(
            legend_of(axes)
        )


def drawings(names: list[str]) -> list[Callable[[], Figure]]:
    """One of each figure, with these for every label."""
    n = len(names)
    model = names[0]
    means = [0.9 - 0.1 * i for i in range(n)]
    return [
        lambda: figures.iia_maps([(name, grid(3, n)) for name in names], names, model),
        lambda: figures.iia_bars(groups_of(means, labels=names), 0.5),
        lambda: figures.learning_curves(fits_of(means, seeds=2, names=names)),
        lambda: figures.rank_curve(ranks_of(names, [1, 2, 4])),
    ]


@pytest.mark.parametrize("which", range(4))
def test_strange_labels_are_printed_as_they_are(which: int) -> None:
    figure = drawings(STRANGE)[which]()
    assert_readable(figure)
    assert len(bytes_of(figure, "png")) > 1000
    texts = [text.get_text() for text in figure.findobj(Text)]
    assert any(r"\$x_1\$" in text for text in texts)
    assert not any("\x00" in text for text in texts)


@pytest.mark.parametrize("kind", ["png", "svg", "pdf"])
def test_the_same_tables_draw_the_same_bytes(kind: str) -> None:
    for one, two in zip(drawings(["a", "b", "c"]), drawings(["a", "b", "c"]), strict=True):
        assert bytes_of(one(), kind) == bytes_of(two(), kind)
