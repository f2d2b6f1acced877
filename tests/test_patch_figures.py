from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

import numpy as np
import pandas as pd
import pytest
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection, QuadMesh
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch, PathPatch
from matplotlib.text import Text

from interv.report import patch_figures as figures
from interv.report.figures import STYLE

BLUE, RED = "#2166ac", "#b2182b"
STRANGE = ["$x_1$", "a\nb", "\x00", "", "né{", "100%", "\\frac", "_" * 80]


@pytest.fixture(autouse=True)
def _as_a_report_draws() -> Iterator[None]:
    with rc_context(STYLE):
        yield


def by_position(n_layers: int, n_rows: int) -> pd.DataFrame:
    rows = [(r, la, 0.1 * r - 0.05 * la) for r in range(n_rows) for la in range(n_layers)]
    return pd.DataFrame(rows, columns=["row", "layer", "mean"]).astype({"layer": "Int64"})


def by_head(n_layers: int, n_heads: int, factor: float = 1.0) -> pd.DataFrame:
    rows = [(la, h, factor * (la - h)) for la in range(n_layers) for h in range(n_heads)]
    table = pd.DataFrame(rows, columns=["layer", "head", "mean"])
    return table.astype({"layer": "Int64", "head": "Int64"})


def effects(means: list[float]) -> pd.DataFrame:
    mean = np.array(means)
    labels = [f"9.{i}" for i in range(len(means))]
    return pd.DataFrame({"label": labels, "mean": mean, "ci_low": mean - 1, "ci_high": mean + 2})


def curve_of(fractions: list[float]) -> pd.DataFrame:
    parts = []
    for ranking, mean in (("signed", 2 * np.sqrt(fractions)), ("magnitude", np.sqrt(fractions))):
        columns = {"fraction": fractions, "mean": mean, "ci_low": mean - 0.1, "ci_high": mean + 0.1}
        parts.append(pd.DataFrame(columns).assign(ranking=ranking))
    return pd.concat(parts)


AREAS = {"CPR": 0.9, "CMD": 0.1, "sizes_above_1": 0.0}


def some_circuit(n_layers: int, n_heads: int) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Every head and MLP, joined to the input, the logits and some of each other."""
    nodes: list[dict[str, Any]] = [{"name": "logits", "kind": "logits", "layer": n_layers}]
    for la in range(n_layers):
        nodes += [{"name": f"a{la}.h{h}", "kind": "head", "layer": la} for h in range(n_heads)]
        nodes.append({"name": f"m{la}", "kind": "mlp", "layer": la})
    nodes.append({"name": "input", "kind": "input", "layer": 0})
    ends = [("input", n["name"]) for n in nodes if n["kind"] in ("head", "mlp")]
    ends += [(name, "logits") for _, name in ends]
    ends += [(f"a{la}.h0", f"m{lb}") for la in range(n_layers) for lb in range(la, n_layers)]
    scores = [(-1) ** i * (1.0 + i) for i in range(len(ends))]
    edges = [{"source": s, "target": t, "score": v} for (s, t), v in zip(ends, scores, strict=True)]
    return nodes, edges


def meshes(figure: Figure) -> list[QuadMesh]:
    """Heat maps, colour bars left out."""
    panels = [axes for axes in figure.axes if axes.get_label() != "<colorbar>"]
    return [c for axes in panels for c in axes.collections if isinstance(c, QuadMesh)]


def labels_of(axes: Axes, which: str) -> list[str]:
    axis = axes.xaxis if which == "x" else axes.yaxis
    return [label.get_text() for label in axis.get_ticklabels()]


def bytes_of(figure: Figure, kind: str) -> bytes:
    buffer = io.BytesIO()
    dates: dict[str, Any] = {"svg": {"Date": None}, "pdf": {"CreationDate": None}, "png": {}}
    figure.savefig(buffer, format=kind, dpi=40, metadata=dates[kind])
    return buffer.getvalue()


def assert_readable(figure: Figure) -> None:
    """Every text is on the page, and no two labels of one axis are over one another."""
    figure.draw_without_rendering()
    page = figure.bbox.padded(1.0)
    for text in figure.findobj(Text):
        if text.get_text().strip() and text.get_visible() and text.axes is not None:
            box = text.get_window_extent()
            inside = page.x0 <= box.x0 and box.x1 <= page.x1
            inside = inside and page.y0 <= box.y0 and box.y1 <= page.y1
            assert inside or not _drawn(text), f"{text.get_text()!r} leaves the page"
    titles = [a.title.get_window_extent() for a in figure.axes if a.get_title()]
    assert not any(one.overlaps(two) for i, one in enumerate(titles) for two in titles[:i])
    for axes in figure.axes:
        for axis, low, high in ((axes.xaxis, "x0", "x1"), (axes.yaxis, "y0", "y1")):
            boxes = [t.get_window_extent() for t in axis.get_ticklabels() if t.get_text()]
            boxes.sort(key=lambda box: float(getattr(box, low)))
            for one, two in pairwise(boxes):
                assert getattr(one, high) <= getattr(two, low) + 1, "labels over one another"


def _drawn(text: Text) -> bool:
    """Whether a text is in a picture: ticks outside an axis' limits are not."""
    axes = text.axes
    assert axes is not None
    ticks = [*axes.xaxis.get_ticklabels(), *axes.yaxis.get_ticklabels()]
    if text not in ticks:
        return bool(axes.axison)
    x, y = text.get_position()
    (left, right), (low, high) = sorted(axes.get_xlim()), sorted(axes.get_ylim())
    return left <= x <= right if text in axes.xaxis.get_ticklabels() else low <= y <= high


def test_positions_by_layers_are_centred_at_zero_and_labelled() -> None:
    labels = ["0 When", "1 John", "2 and"]
    figure = figures.layer_by_position(by_position(4, 3), labels, "gpt2", "block output", "effect")
    [mesh] = meshes(figure)
    assert mesh.get_clim() == (-0.2, 0.2)
    np.testing.assert_allclose(
        np.asarray(mesh.get_array()), [[0.1 * r - 0.05 * la for la in range(4)] for r in range(3)]
    )
    axes = figure.axes[0]
    assert labels_of(axes, "y") == labels and labels_of(axes, "x") == ["0", "1", "2", "3"]
    assert axes.yaxis_inverted(), "the first position is on top"
    assert (axes.get_title(), axes.get_xlabel()) == ("block output", "layer of gpt2")
    assert figure.axes[1].get_ylabel() == "effect"


def test_places_without_a_value_are_empty_and_not_zero() -> None:
    table = by_position(4, 3).drop(index=[5]).query("layer != 2")
    table.loc[0, "mean"] = np.nan
    figure = figures.layer_by_position(table, ["a", "b", "c", "d"], "gpt2", "", "effect")
    values = np.ma.masked_invalid(meshes(figure)[0].get_array())
    assert values.mask.tolist() == [
        [True, False, False], [False, True, False], [False, False, False], [True, True, True]
    ]  # fmt: skip
    assert labels_of(figure.axes[0], "x") == ["0", "1", "3"], "layers that are there, by number"


def test_two_values_for_one_square_are_refused() -> None:
    table = pd.concat([by_position(3, 2), by_position(1, 1)])
    with pytest.raises(ValueError, match="duplicate"):
        figures.layer_by_position(table, ["a", "b"], "gpt2", "", "effect")


def test_zero_everywhere_is_drawn() -> None:
    figure = figures.layer_by_head([("", by_head(2, 2, factor=0.0))], "gpt2", "effect")
    low, high = meshes(figure)[0].get_clim()
    assert low == -high < 0
    bytes_of(figure, "png")


@pytest.mark.parametrize(("n_layers", "n_rows"), [(2, 1), (30, 16), (48, 60), (96, 300)])
def test_maps_of_any_size_are_readable(n_layers: int, n_rows: int) -> None:
    labels = [f"{i} token" for i in range(n_rows)]
    table = by_position(n_layers, n_rows)
    figure = figures.layer_by_position(table, labels, "gpt2-xl", "attention output → a9.h9.q", "e")
    assert_readable(figure)
    shown = labels_of(figure.axes[0], "y")
    assert shown == labels if n_rows <= 60 else len(shown) >= 100


def test_facets_of_heads_share_their_colours() -> None:
    facets = [("at IO", by_head(3, 4)), ("at END", by_head(3, 4, factor=-2.0))]
    figure = figures.layer_by_head(facets, "gpt2", "effect")
    one, two = meshes(figure)
    assert one.get_clim() == two.get_clim() == (-6.0, 6.0)
    assert np.asarray(one.get_array())[2, 0] == 2, "layers are rows, heads columns"
    assert [axes.get_title() for axes in figure.axes[:2]] == ["at IO", "at END"]
    assert labels_of(figure.axes[0], "y") == ["0", "1", "2"]
    assert labels_of(figure.axes[1], "y") == []
    assert [labels_of(axes, "x") for axes in figure.axes[:2]] == [["0", "1", "2", "3"]] * 2
    below, above = (one.cmap(one.norm(value)) for value in (-6.0, 6.0))
    assert below[0] > below[2] and above[2] > above[0], "red below zero, blue above"


def test_heads_of_facets_with_different_layers_are_aligned() -> None:
    late = by_head(6, 2).query("layer >= 4")
    whole = pd.DataFrame({"layer": [5], "head": [None], "mean": [99.0]}).astype(late.dtypes)
    facets = [("a", by_head(2, 3)), ("b", pd.concat([late, whole]))]
    figure = figures.layer_by_head(facets, "m", "effect")
    arrays = [np.ma.masked_invalid(mesh.get_array()) for mesh in meshes(figure)]
    assert [array.shape for array in arrays] == [(4, 3), (4, 3)]
    assert arrays[0].mask[2:].all() and arrays[1].mask[:2].all() and arrays[1].mask[:, 2].all()
    assert labels_of(figure.axes[0], "y") == ["0", "1", "4", "5"]
    assert meshes(figure)[0].get_clim() == (-5.0, 5.0), "a row without a head has no square"


@pytest.mark.parametrize(
    ("n", "shape"), [(1, (12, 12)), (2, (48, 25)), (5, (30, 9)), (12, (12, 12)), (1, (2, 1))]
)
def test_any_number_of_facets_is_readable(n: int, shape: tuple[int, int]) -> None:
    facets = [(f"attention value output → a9.h9.q {i}", by_head(*shape)) for i in range(n)]
    figure = figures.layer_by_head(facets, "smollm2-135m", "effect on logit difference")
    assert len(meshes(figure)) == n
    assert_readable(figure)


def test_bars_are_the_largest_in_order_with_their_intervals() -> None:
    frame = effects([1.0, -3.0, float("nan"), 0.5, 2.0])
    frame.loc[4, ["ci_low", "ci_high"]] = np.nan
    figure = figures.bars(frame, "effect", top=3)
    [axes] = figure.axes
    assert labels_of(axes, "y") == ["9.1", "9.4", "9.0"]
    assert axes.yaxis_inverted(), "the largest is on top"
    assert [bar.get_width() for bar in axes.patches] == [-3.0, 2.0, 1.0]
    assert [to_hex(bar.get_facecolor()) for bar in axes.patches] == [RED, BLUE, BLUE]
    [intervals] = [c for c in axes.collections if isinstance(c, LineCollection)]
    ends = [path.vertices[:, 0].tolist() for path in intervals.get_paths()]
    assert ends[0] == [-4.0, -1.0] and ends[2] == [0.0, 3.0]
    assert np.isnan(ends[1]).all()


def test_bars_with_the_same_label_stay_apart() -> None:
    frame = pd.concat([effects([1.0, 2.0]), effects([3.0])])
    figure = figures.bars(frame, "effect")
    assert labels_of(figure.axes[0], "y") == ["9.0", "9.1", "9.0"]
    assert [bar.get_width() for bar in figure.axes[0].patches] == [3.0, 2.0, 1.0]


@pytest.mark.parametrize("n", [1, 3, 200])
def test_any_number_of_bars_is_readable(n: int) -> None:
    frame = effects([float(n - i) for i in range(n)])
    frame["label"] = [f"mlp_output {i} neuron 1295 at 14 → a9.h9.q" for i in range(n)]
    figure = figures.bars(frame, "effect on logit difference (value − corrupted)", top=200)
    assert len(figure.axes[0].patches) == n
    assert_readable(figure)


def test_lines_have_a_band_for_each_series_and_a_legend_for_several() -> None:
    x = [2, 0, 1]
    one = pd.DataFrame({"series": "lens", "x": x, "mean": [4.0, 0.0, 2.0]})
    one = one.assign(ci_low=one["mean"] - 1, ci_high=one["mean"] + 1)
    figure = figures.lines(one, "layers of gpt2 before", "logit difference")
    [axes] = figure.axes
    line = axes.lines[-1]
    assert line.get_xydata().tolist() == [[0, 0], [1, 2], [2, 4]], "in the order of x"
    assert len(axes.collections) == 1 and axes.get_legend() is None
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("layers of gpt2 before", "logit difference")
    two = figures.lines(pd.concat([one, one.assign(series="$other")]), "x", "y")
    assert len(two.axes[0].collections) == 2
    assert [t.get_text() for t in two.axes[0].get_legend().get_texts()] == ["lens", r"\$other"]
    assert_readable(two)


def test_patterns_show_every_token_on_one_scale() -> None:
    weights = np.array([[1.0, 0.0], [0.25, 0.75]])
    panels = [("head 9.6", weights), ("head 9.9", weights.T)]
    figure = figures.pattern(panels, [" When", " "])
    one, two = meshes(figure)
    assert one.get_clim() == two.get_clim() == (0.0, 1.0)
    assert np.asarray(one.get_array()).tolist() == weights.tolist()
    assert labels_of(figure.axes[0], "y") == labels_of(figure.axes[0], "x") == ["When", "␣"]
    assert labels_of(figure.axes[1], "x") == ["When", "␣"]
    assert figure.axes[0].yaxis_inverted(), "the first query is on top"


@pytest.mark.parametrize(("n", "n_tokens"), [(1, 3), (7, 16), (2, 60), (1, 400)])
def test_patterns_of_any_size_are_readable(n: int, n_tokens: int) -> None:
    weights = np.tri(n_tokens) / np.arange(1, n_tokens + 1)[:, None]
    tokens = [f" token{i}" for i in range(n_tokens)]
    figure = figures.pattern([(f"head 9.{i}", weights) for i in range(n)], tokens)
    assert len(meshes(figure)) == n
    assert_readable(figure)
    box = figure.axes[0].get_window_extent()
    assert 0.8 < box.width / box.height < 1.25, "squares"


def test_the_curve_has_a_log_axis_and_tells_its_areas() -> None:
    fractions = [0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0]
    figure = figures.curve(
        curve_of(fractions), {"CPR": 1.9512, "CMD": 0.0449, "sizes_above_1": 3}, "share of edges"
    )
    [axes] = figure.axes
    assert axes.get_xscale() == "log"
    figure.draw_without_rendering()
    assert labels_of(axes, "x") == ["0.001", "0.01", "0.1", "1"]
    assert "CPR 1.95" in axes.get_title() and "CMD 0.0449" in axes.get_title()
    assert axes.get_xlabel() == "share of edges"
    assert "above 1 at 3 sizes" in axes.get_title()
    helps, size = [one for one in axes.lines if one.get_marker() == "o"]
    assert size.get_xydata().tolist() == [[x, float(np.sqrt(x))] for x in fractions]
    assert [helps.get_label(), size.get_label()] == ["by what edges help", "by magnitude"]
    level = [one.get_ydata()[0] for one in axes.lines if one not in (helps, size)]
    assert sorted(level) == [0, 1]
    assert_readable(figure)


def test_a_curve_from_nothing_and_one_within_a_decade_are_drawn() -> None:
    figure = figures.curve(curve_of([0.0, 0.01, 0.1, 1.0]), AREAS, "share of nodes")
    figure.draw_without_rendering()
    assert labels_of(figure.axes[0], "x") == ["0", "0.01", "0.1", "1"]
    assert figure.axes[0].transData.transform((0, 0))[0] > figure.axes[0].bbox.x0
    figure = figures.curve(curve_of([0.2, 0.5]), AREAS, "share of nodes")
    figure.draw_without_rendering()
    assert labels_of(figure.axes[0], "x") == ["0.2", "0.5"]


def test_scatter_names_the_largest_and_tells_the_correlation() -> None:
    exact = np.array([5.0, -4.0, *np.linspace(-0.1, 0.1, 50), np.nan])
    labels = ["9.6", "10.7", *(f"0.{i}" for i in range(50)), "gone"]
    frame = pd.DataFrame({"exact": exact, "attribution": exact * 0.5, "label": labels})
    figure = figures.scatter(frame, 0.98765)
    [axes] = figure.axes
    assert axes.get_title() == "rank correlation 0.988, 52 places"
    assert len(axes.collections[0].get_offsets()) == 52
    assert {"9.6", "10.7"} <= {text.get_text() for text in axes.texts}
    assert "gone" not in {text.get_text() for text in axes.texts}
    assert axes.get_xlim() == axes.get_ylim()
    np.testing.assert_allclose(axes.collections[0].get_offsets()[0], [5.0, 2.5])
    assert_readable(figure)


def test_scatter_of_equal_values_is_drawn() -> None:
    frame = pd.DataFrame({"exact": [0.0, 0.0], "attribution": [0.0, 0.0], "label": ["a", "b"]})
    figure = figures.scatter(frame, None)
    assert "not defined" in figure.axes[0].get_title()
    bytes_of(figure, "png")


def test_a_circuit_rises_from_the_input_to_the_logits() -> None:
    nodes, edges = some_circuit(2, 2)
    figure = figures.circuit(nodes, edges, "gpt2")
    [axes] = figure.axes
    height = {text.get_text(): text.get_position()[1] for text in axes.texts}
    assert set(height) == {"input", "0.0", "0.1", "m0", "1.0", "1.1", "m1", "logits"}
    order = [height[n] for n in ("input", "0.0", "m0", "1.0", "m1", "logits")]
    assert order == sorted(set(order)), "each in its row"
    assert height["0.0"] == height["0.1"]
    assert axes.get_title() == f"circuit in gpt2: {len(nodes)} nodes, {len(edges)} edges"
    lines = [p for p in axes.patches if isinstance(p, PathPatch)]
    assert len(lines) == len(edges)
    # Drawn in the order of |score|, the largest over the others.
    by_size = sorted(edges, key=lambda edge: abs(edge["score"]))
    widths = [line.get_linewidth() for line in lines]
    assert widths == sorted(widths) and widths[0] < widths[-1]
    colours = [to_hex(line.get_edgecolor()) for line in lines]
    assert colours == [BLUE if edge["score"] > 0 else RED for edge in by_size]


@pytest.mark.parametrize(("n_layers", "n_heads"), [(1, 1), (12, 4), (30, 1), (2, 30)])
def test_nodes_of_a_circuit_are_apart_and_nothing_is_cut(n_layers: int, n_heads: int) -> None:
    nodes, edges = some_circuit(n_layers, n_heads)
    figure = figures.circuit(nodes, edges, "gpt2")
    assert_readable(figure)
    [axes] = figure.axes
    boxes = [p.get_window_extent() for p in axes.patches if isinstance(p, FancyBboxPatch)]
    assert len(boxes) == len(nodes)
    for i, one in enumerate(boxes):
        assert not any(one.overlaps(two) for two in boxes[:i])
    for text, box in zip(axes.texts, boxes, strict=True):
        inner = text.get_window_extent()
        assert box.x0 <= inner.x0 and inner.x1 <= box.x1 and box.y0 <= inner.y0 + 1
    for patch in axes.patches:
        extent = patch.get_path().get_extents(patch.get_transform())
        assert axes.bbox.x0 <= extent.x0 and extent.x1 <= axes.bbox.x1


def test_edges_of_no_score_are_drawn() -> None:
    nodes, edges = some_circuit(1, 1)
    figure = figures.circuit(nodes, [{**edge, "score": 0.0} for edge in edges], "gpt2")
    bytes_of(figure, "png")


def drawings(names: list[str]) -> list[Callable[[], Figure]]:
    """One of each figure, with these for every label."""
    n = len(names)
    frame = effects([float(i - 2) for i in range(n)]).assign(label=names)
    points = frame.assign(exact=frame["mean"], attribution=frame["mean"] * 0.9)
    series = pd.concat([frame.assign(series=name, x=range(n)) for name in names])
    nodes, edges = some_circuit(2, 2)
    model, bar = names[0], names[0]
    return [
        lambda: figures.layer_by_position(by_position(3, n), names, model, model, bar),
        lambda: figures.layer_by_head([(name, by_head(3, 3)) for name in names], model, bar),
        lambda: figures.bars(frame, bar),
        lambda: figures.lines(series, model, bar),
        lambda: figures.pattern([(name, np.tri(n) / n) for name in names], names),
        lambda: figures.curve(curve_of([0.01, 0.1, 1.0]), AREAS, model),
        lambda: figures.scatter(points, 0.5),
        lambda: figures.circuit(nodes, edges, model),
    ]


@pytest.mark.parametrize("which", range(8))
def test_strange_tokens_are_printed_as_they_are(which: int) -> None:
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
