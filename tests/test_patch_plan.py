from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from interv.errors import SpecError
from interv.plan import PatchPlan, estimate, make_packs, make_patch_plan
from interv.plan.cells import window_layers
from interv.plan.grid import Spot
from interv.spec import load_spec
from interv.spec.metrics import parse_metric
from tests.conftest import PROMPT, Result, SpecWriter, tiny_config

OTHER = "The Old Bridge is in downtown"
PAIRS: list[dict[str, Any]] = [
    {
        "clean": PROMPT,
        "corrupted": OTHER,
        "answer": "Seattle",
        "wrong": "Mostar",
        "spans": {"place": "Space Needle", "verb": "is"},
    },
    {
        "clean": "Now " + PROMPT,
        "corrupted": "Now " + OTHER,
        "answer": "Paris",
        "wrong": "Rome",
        "spans": {"place": "Space Needle", "verb": "is"},
    },
]
ONE = {"pairs": PAIRS[:1]}
BOTH = {"pairs": PAIRS}
N = 6
"""Tokens of the first prompt."""


def patch_spec(write_spec: SpecWriter, **sections: object) -> Path:
    base: dict[str, object] = {
        "kind": "patch",
        "corrupt": None,
        "data": ONE,
        "grid": {"component": "block_output"},
    }
    return write_spec(**{**base, **sections})


def plan_of(path: Path, *overrides: str, only_check: bool = False) -> PatchPlan:
    return make_patch_plan(load_spec(path, overrides), only_check=only_check)


def planned(write_spec: SpecWriter, *grids: dict[str, Any], **sections: object) -> PatchPlan:
    return plan_of(patch_spec(write_spec, grid=list(grids), **sections))


def spots_of(plan: PatchPlan) -> list[tuple[Spot, ...]]:
    return [label.cell.spots for label in plan.labels]


def ids(plan: PatchPlan) -> set[str]:
    return {cell.id for cell in plan.cells}


# --- the axes


def test_layers_and_positions_are_a_product(write_spec: SpecWriter) -> None:
    plan = planned(write_spec, {"component": "block_output", "layers": "1-2", "positions": "all"})
    assert spots_of(plan) == [
        (Spot("block_output", layer, (position,)),) for layer in (1, 2) for position in range(N)
    ]
    assert [(p.layer, p.pos, p.role) for p in plan.places[:2]] == [(1, 0, ""), (1, 1, "")]


@pytest.mark.parametrize("window", [1, 2, 3])
def test_a_window_is_patched_together(write_spec: SpecWriter, window: int) -> None:
    grid = {"component": "mlp_output", "window": window, "positions": 2}
    plan = planned(write_spec, grid)
    assert [[s.layer for s in spots] for spots in spots_of(plan)] == [
        list(window_layers(layer, window, 3)) for layer in range(3)
    ]
    assert {(p.window, p.pos) for p in plan.places} == {(window, 2)}


def test_positions_of_one_prompt(write_spec: SpecWriter) -> None:
    positions = [0, -1, "2-3", "whole", "place", "END"]
    plan = planned(write_spec, {"component": "block_output", "layers": 0, "positions": positions})
    assert [
        (spots[0].positions, p.pos, p.role)
        for spots, p in zip(spots_of(plan), plan.places, strict=True)
    ] == [
        ((0,), 0, ""),
        ((5,), 5, ""),
        ((2,), 2, ""),
        ((3,), 3, ""),
        (tuple(range(N)), None, "whole"),
        ((1, 2), None, "place"),
        ((5,), None, "END"),
    ]
    # The last position is asked for twice, and computed once.
    assert len(plan.cells) == len(plan.labels) - 1


def test_spans_are_all_of_them_in_order(write_spec: SpecWriter) -> None:
    plan = planned(write_spec, {"component": "block_output", "layers": 0, "positions": "spans"})
    assert [p.role for p in plan.places] == ["place", "verb", "END"]
    assert [s[0].positions for s in spots_of(plan)] == [(1, 2), (3,), (5,)]


def test_positions_of_prompts_of_several_lengths(write_spec: SpecWriter) -> None:
    positions = [-1, 0, "place", "whole"]
    grid = {"component": "block_output", "layers": 0, "positions": positions}
    plan = planned(write_spec, grid, data=BOTH)
    long = len(plan.pairs[1].ids)
    shift = long - N
    assert shift > 0
    # Counted from the end it is a role: one line for both prompts.
    assert [(p.pos, p.role) for p in plan.places] == [
        (None, "-1"),
        (0, ""),
        (None, "place"),
        (None, "whole"),
    ]
    found = {(x.prompt, x.place.role): x.cell.spots[0].positions for x in plan.labels}
    assert (found[0, "-1"], found[1, "-1"]) == ((N - 1,), (long - 1,))
    assert (found[0, "place"], found[1, "place"]) == ((1, 2), (1 + shift, 2 + shift))
    assert found[1, "whole"] == tuple(range(long))


def test_heads_are_those_of_the_component(write_spec: SpecWriter, llama_folder: Path) -> None:
    model = {"path": str(llama_folder)}

    def heads(component: str, **more: object) -> list[tuple[int, ...] | None]:
        grid = {"component": component, "layers": 0, "positions": -1, **more}
        return [spots[0].heads for spots in spots_of(planned(write_spec, grid, model=model))]

    queries = [(h,) for h in range(4)]
    assert heads("head_query_output") == heads("head_attention_value_output") == queries
    assert heads("attention_weight") == queries
    # Llama's grouped queries share keys and values.
    assert heads("head_key_output") == heads("head_value_output") == queries[:2]
    assert heads("head_query_output", heads=[3, 1, 3]) == [(3,), (1,)]
    assert heads("query_output") == [None]


def test_neurons_one_by_one_and_dims_together(write_spec: SpecWriter) -> None:
    where = {"layers": 0, "positions": -1}
    neurons = planned(write_spec, {"component": "mlp_activation", "neurons": "7-9", **where})
    assert [s[0].dims for s in spots_of(neurons)] == [(7,), (8,), (9,)]
    assert [p.neuron for p in neurons.places] == [7, 8, 9]
    every = planned(write_spec, {"component": "mlp_activation", "neurons": "all", **where})
    assert len(every.cells) == 4 * 24
    dims = planned(write_spec, {"component": "block_output", "dims": ["0-2", 5], **where})
    assert [s[0].dims for s in spots_of(dims)] == [(0, 1, 2, 5)]
    [spots] = spots_of(
        planned(
            write_spec,
            {"component": "head_query_output", "heads": 1, "dims": "0-11", **where},
        )
    )
    assert (spots[0].heads, spots[0].dims) == ((1,), tuple(range(12)))


def test_a_set_is_one_cell(write_spec: SpecWriter) -> None:
    sites = [
        {"component": "head_attention_value_output", "layers": [0, 2], "heads": [0, 1]},
        {"component": "mlp_output", "layers": 1, "positions": ["verb", -1]},
    ]
    plan = planned(write_spec, {"set": sites, "name": "several things"})
    whole = tuple(range(N))
    assert spots_of(plan) == [
        (
            Spot("head_attention_value_output", 0, whole, (0, 1)),
            Spot("head_attention_value_output", 2, whole, (0, 1)),
            Spot("mlp_output", 1, (3, 5)),
        )
    ]
    [place] = plan.places
    assert (place.component, place.set, place.layer) == ("several", "several things", None)


def test_what_has_no_layer_is_there_once(write_spec: SpecWriter) -> None:
    plan = planned(write_spec, {"component": ["token_embedding", "final_norm"], "positions": 0})
    assert [(s[0].component, s[0].layer) for s in spots_of(plan)] == [
        ("token_embedding", 0),
        ("final_norm", 0),
    ]


def paths(write_spec: SpecWriter, path: dict[str, Any], **sections: object) -> PatchPlan:
    return plan_of(patch_spec(write_spec, grid=None, paths=path, **sections))


HEADS = {"component": "head_attention_value_output", "positions": "END"}


def test_paths_to_the_logits(write_spec: SpecWriter) -> None:
    plan = paths(write_spec, {"senders": HEADS, "receivers": "logits"})
    assert len(plan.cells) == 3 * 2
    for cell in plan.labels:
        assert (cell.cell.receivers, cell.cell.freeze) == ((), ("heads",))
        assert cell.place.receiver == "logits"
    mlps = {"senders": {"component": "mlp_output"}, "receivers": "logits", "freeze": "mlps"}
    assert {label.cell.freeze for label in paths(write_spec, mlps).labels} == {("mlps",)}


def test_paths_end_in_later_layers_only(write_spec: SpecWriter) -> None:
    receiver = {"component": "head_key_output", "layers": "all", "heads": 1}
    plan = paths(write_spec, {"senders": HEADS, "receivers": receiver})
    found = {(p.layer, p.head, p.receiver) for p in plan.places}
    assert found == {
        (sender, head, f"{layer}.1.key")
        for layer in range(3)
        for sender in range(layer)
        for head in range(2)
    }
    assert {label.cell.receivers for label in plan.labels} == {
        (Spot("head_key_output", layer, tuple(range(N)), (1,)),) for layer in (1, 2)
    }


def test_a_heads_own_mlp_hears_it_where_blocks_are_serial(
    write_spec: SpecWriter, gpt2_folder: Path
) -> None:
    receiver = {"component": "mlp_input", "layers": "all", "positions": "END"}
    plan = paths(write_spec, {"senders": HEADS, "receivers": receiver})
    pairs = {(p.layer, p.receiver) for p in plan.places}
    assert pairs == {(s, f"{r}.mlp_input") for r in range(3) for s in range(r + 1)}
    mlps = paths(write_spec, {"senders": {"component": "mlp_output"}, "receivers": receiver})
    assert {(p.layer, p.receiver) for p in mlps.places} == {
        (s, f"{r}.mlp_input") for r in range(3) for s in range(r)
    }
    for parallel in (True, False):
        config = {
            "model_type": "gpt_neox",
            "num_hidden_layers": 3,
            "num_attention_heads": 2,
            "hidden_size": 24,
            "intermediate_size": 48,
            "vocab_size": 420,
            "max_position_embeddings": 64,
            "use_parallel_residual": parallel,
        }
        model = {"config": config, "tokenizer": str(gpt2_folder)}
        plan = paths(write_spec, {"senders": HEADS, "receivers": receiver}, model=model)
        own = {p.layer for p in plan.places if p.receiver == f"{p.layer}.mlp_input"}
        assert own == (set() if parallel else {0, 1, 2})


def test_a_named_receiver_is_all_of_it_at_once(write_spec: SpecWriter) -> None:
    receiver = {
        "component": "head_query_output",
        "layers": [1, 2],
        "heads": [0, 1],
        "name": "movers",
    }
    plan = paths(
        write_spec,
        {"senders": HEADS, "receivers": ["logits", receiver], "freeze": ["heads", "mlps"]},
    )
    whole = tuple(range(N))
    there = {label.cell.receivers for label in plan.labels if label.place.receiver == "movers"}
    assert there == {tuple(Spot("head_query_output", k, whole, (0, 1)) for k in (1, 2))}
    # From layers 0 and 1, since one of its heads is in layer 2; all three go to the logits.
    assert [p.receiver for p in plan.places].count("movers") == 2 * 2
    assert [p.receiver for p in plan.places].count("logits") == 3 * 2
    assert {cell.freeze for cell in {label.cell for label in plan.labels}} == {("heads", "mlps")}


def test_key_receivers_of_grouped_queries(write_spec: SpecWriter, llama_folder: Path) -> None:
    receiver = {"component": "head_key_output", "layers": 2}
    plan = paths(
        write_spec,
        {"senders": {**HEADS, "layers": 0}, "receivers": receiver},
        model={"path": str(llama_folder)},
    )
    assert {p.receiver for p in plan.places} == {"2.0.key", "2.1.key"}
    assert {p.head for p in plan.places} == {0, 1, 2, 3}


AXIS = st.one_of(
    st.just("all"),
    st.lists(st.integers(0, 2), min_size=1, max_size=3),
    st.tuples(st.integers(0, 2), st.integers(0, 2)).map(lambda t: f"{min(t)}-{max(t)}"),
)
POSITIONS = st.lists(
    st.one_of(
        st.integers(-N, N - 1), st.sampled_from(["all", "whole", "spans", "place", "END", "1-4"])
    ),
    min_size=1,
    max_size=3,
)
COMPONENTS = st.sampled_from(
    [
        "block_input",
        "block_output",
        "mlp_activation",
        "query_output",
        "head_query_output",
        "head_key_output",
        "attention_weight",
        "token_embedding",
    ]
)


@given(st.data())
def test_every_spot_is_in_the_model(llama_folder: Path, data: st.DataObject) -> None:
    component = data.draw(COMPONENTS)
    grid: dict[str, Any] = {
        "component": component,
        "window": data.draw(st.integers(1, 3)),
        "positions": data.draw(POSITIONS),
    }
    if component != "token_embedding":
        grid["layers"] = data.draw(AXIS)
    limit = {"mlp_activation": 40, "head_query_output": 6, "block_output": 24}.get(component)
    if limit and data.draw(st.booleans()):
        grid[data.draw(st.sampled_from(["neurons", "dims"]))] = data.draw(
            st.lists(st.integers(0, limit - 1), min_size=1, max_size=3)
        )
    spec = {"kind": "patch", "model": {"path": str(llama_folder)}, "data": BOTH, "grid": grid}
    plan = make_patch_plan(load_spec(spec))
    n_heads = {"head_query_output": 4, "attention_weight": 4, "head_key_output": 2}
    assert plan.labels
    for label in plan.labels:
        length = len(plan.pairs[label.prompt].ids)
        assert len({spot.layer for spot in label.cell.spots}) == len(label.cell.spots)
        for spot in label.cell.spots:
            assert 0 <= spot.layer < (1 if component == "token_embedding" else 3)
            assert spot.positions and set(spot.positions) <= set(range(length))
            assert (spot.heads is None) == (component not in n_heads)
            assert set(spot.heads or ()) <= set(range(n_heads.get(component, 0)))
            assert spot.dims is None or set(spot.dims) <= set(range(limit or 0))
        tokens = plan.tokens(label.prompt)
        assert 0 <= plan.width(label.cell) <= tokens
        assert 0 <= plan.first_layer(label.cell) <= 3
    # A cell is of one prompt; a line of the results is one cell of each.
    lines = [(label.prompt, label.place) for label in plan.labels]
    assert len(set(lines)) == len(lines)
    packs = make_packs(plan, "suffix", 50)
    assert sorted(c.id for pack in packs for c in pack.cells) == sorted(ids(plan))


# --- ids and identity


def alike(n: int) -> list[dict[str, Any]]:
    """Different pairs of one group."""
    first, second = ("Space", "Old", "Eiffel"), ("Needle", "Bridge", "Tower")
    things = [f"{a} {b}" for a in first for b in second]
    return [
        {
            **PAIRS[0],
            "clean": f"The {thing} is in downtown",
            "corrupted": f"The {other} is in downtown",
            "spans": {"place": thing, "verb": "is"},
        }
        for thing, other in zip(things, things[4:] + things[:4], strict=True)
    ][:n]


DRAWN = {"intervention": {"type": "resample", "samples": 2}, "data": {"pairs": alike(3)}}


@pytest.mark.parametrize(
    "change",
    [
        "model.dtype=float64",
        "model.attn_implementation=eager",
        "model.prepend_bos=true",
        "intervention.type=noise",
        "intervention=zero",
        "data.pairs.0.answer=Rome",
        "data.pairs.0.wrong=Rome",
        "data.pairs.0.corrupted=The Old Tower is in downtown",
        "data.at=-2",
        "metric=probability",
        "metric=[logit_difference, kl_divergence]",
    ],
)
def test_what_changes_a_value_changes_every_id(write_spec: SpecWriter, change: str) -> None:
    path = patch_spec(write_spec)
    before, after = plan_of(path), plan_of(path, change)
    assert not ids(before) & ids(after)
    assert not set(before.baselines.values()) & set(after.baselines.values())
    assert before.identity != after.identity


def test_metrics_of_the_same_logits_share_ids(write_spec: SpecWriter) -> None:
    path = patch_spec(write_spec)
    few = [plan_of(path, f"metric={m}") for m in ("logit", "recovery", "[relative, logit]")]
    assert all(plan.few and ids(plan) == ids(plan_of(path)) for plan in few)
    whole = [plan_of(path, f"metric={m}") for m in ("rank", "probability", "recovery:top_5")]
    assert all(not plan.few and ids(plan) == ids(whole[0]) for plan in whole)


@pytest.mark.parametrize(
    "change",
    [
        "run.max_tokens=7",
        "run.executor=reference",
        "run.device=cpu",
        "figures.dpi=99",
        "figures.top=3",
        "statistics.test=true",
        "statistics.level=0.9",
        "name=other",
        "data.unequal=leave_out",
    ],
)
def test_what_changes_no_value_changes_no_id(write_spec: SpecWriter, change: str) -> None:
    path = patch_spec(write_spec)
    before, after = plan_of(path), plan_of(path, change)
    assert before.identity == after.identity is not None
    assert ids(before) == ids(after)


def test_what_a_span_is_decides_the_experiment_but_no_other_value(write_spec: SpecWriter) -> None:
    path = patch_spec(write_spec, grid={"component": "block_output", "positions": ["place", "END"]})
    before, after = plan_of(path), plan_of(path, "data.pairs.0.spans.place=Needle")
    assert len(ids(before) & ids(after)) == 3
    assert before.identity != after.identity


def test_a_grid_that_grows_keeps_its_ids(write_spec: SpecWriter) -> None:
    path = patch_spec(write_spec)
    small, large = plan_of(path, "grid.layers=0-1", "grid.positions=[0, END]"), plan_of(path)
    assert ids(small) < ids(large)
    assert small.identity != large.identity
    more = plan_of(patch_spec(write_spec, data=BOTH))
    assert ids(large) < ids(more)


def test_paths_and_patches_of_a_site_are_different_cells(write_spec: SpecWriter) -> None:
    path = patch_spec(write_spec, grid=HEADS, paths={"senders": HEADS, "receivers": "logits"})
    both = plan_of(path)
    assert len(both.cells) == len(both.places) == 12
    frozen = plan_of(path, "paths.freeze=[heads, mlps]")
    assert len(ids(both) & ids(frozen)) == 6


def test_the_company_that_is_averaged_or_drawn_is_in_the_ids(write_spec: SpecWriter) -> None:
    for ablation in ({"type": "mean", "least": 2}, {"type": "resample", "samples": 1}):
        path = patch_spec(write_spec, intervention=ablation, data={"pairs": alike(2)})
        before = plan_of(path)
        after = plan_of(path, "data.pairs.1.corrupted=The Old Needle is in downtown")
        assert not ids(before) & ids(after)
    ablation = {"type": "mean", "least": 2}
    before = plan_of(patch_spec(write_spec, intervention=ablation, data={"pairs": alike(2)}))
    others = [*alike(2), *({**p, "clean": f"Now {p['clean']}", "corrupted": f"Now {p['corrupted']}"}
                           for p in alike(2))]  # fmt: skip
    longer = plan_of(patch_spec(write_spec, intervention=ablation, data={"pairs": others}))
    # A prompt of another length is nobody's company.
    assert ids(before) < ids(longer)
    # What refuses a mean changes none.
    assert ids(before) == ids(plan_of(longer.loaded.path, "data.pairs=" + str(alike(2))))


def test_what_resample_draws(write_spec: SpecWriter) -> None:
    path = patch_spec(write_spec, intervention="resample", data={"pairs": alike(6)})
    plan = plan_of(path)
    assert plan.draws == 3
    for prompt, drawn in plan.drawn.items():
        sources = {plan.pairs[i].corrupted_ids for i in drawn}
        own = {plan.pairs[prompt].ids, plan.pairs[prompt].corrupted_ids}
        assert len(sources) == len(drawn) == 3 and prompt not in drawn and not sources & own
    assert plan_of(path).drawn == plan.drawn
    assert plan_of(path, "seed=1").drawn != plan.drawn


def test_resample_never_draws_a_prompt_twice(write_spec: SpecWriter) -> None:
    path = patch_spec(write_spec, intervention="resample", data={"pairs": alike(4)})
    assert {len(drawn) for drawn in plan_of(path, "intervention.samples=2").drawn.values()} == {2}
    with pytest.raises(SpecError) as caught:
        plan_of(path, "intervention.samples=4")
    assert "fewer than 4 other prompts are like it" in str(caught.value)
    assert "intervention.samples=3" in str(caught.value)


def test_resample_draws_neither_of_a_pairs_own_prompts(write_spec: SpecWriter) -> None:
    """Pairs that exchange the same two prompts have nothing else to draw."""
    one = alike(1)[0]
    turned = {**one, "clean": one["corrupted"], "corrupted": one["clean"],
              "spans": {"place": "Old Bridge", "verb": "is"}}  # fmt: skip
    path = patch_spec(write_spec, intervention="resample", data={"pairs": [one, turned]})
    with pytest.raises(SpecError, match=r"pair 0 has 0 \(6 tokens, place 1-2, verb 3\)"):
        plan_of(path, "intervention.samples=1")


def test_a_mean_over_one_prompt_is_refused(write_spec: SpecWriter) -> None:
    """It is the prompt itself: an effect of 0, or of the pair's own counterfactual."""
    for over in ("clean", "corrupted"):
        ablation = {"type": "mean", "over": over}
        path = patch_spec(write_spec, intervention=ablation, data={"pairs": alike(6)})
        assert {len(drawn) for drawn in plan_of(path).drawn.values()} == {6}
        apart = [{**pair, "template": f"t{i}"} for i, pair in enumerate(alike(6))]
        path = patch_spec(write_spec, intervention=ablation, data={"pairs": apart})
        with pytest.raises(SpecError) as caught:
            plan_of(path)
        assert "mean: for 6 of 6 pairs fewer than 5 prompts are like it" in str(caught.value)
        assert "pair 0 has 1 (t0, 6 tokens, place 1-2, verb 3)" in str(caught.value)
        with pytest.raises(SpecError):
            plan_of(path, "intervention.least=2")


def test_prompts_whose_spans_are_elsewhere_are_not_averaged(write_spec: SpecWriter) -> None:
    pairs = alike(5)
    elsewhere = {**pairs[0], "spans": {**pairs[0]["spans"], "place": "Space"}}
    path = patch_spec(write_spec, intervention="mean", data={"pairs": [elsewhere, *pairs[1:]]})
    with pytest.raises(SpecError, match=r"for 5 of 5 pairs .* pair 0 has 1"):
        plan_of(path)


def test_least_is_of_a_mean_alone(write_spec: SpecWriter) -> None:
    for kind in ("zero", "denoise", "resample"):
        path = patch_spec(write_spec, intervention={"type": kind, "least": 3})
        with pytest.raises(SpecError, match=r"least: nothing that is asked for reads it"):
            plan_of(path)


def test_the_groups_of_a_mean_are_printed(
    write_spec: SpecWriter, cli: Callable[..., Result]
) -> None:
    pairs = [{**pair, "template": "ab"[i // 5]} for i, pair in enumerate(alike(9))]
    path = patch_spec(write_spec, intervention={"type": "mean", "least": 4}, data={"pairs": pairs})
    told = cli("plan", path).out
    assert "and           mean over 2 groups of prompts that are alike" in told
    assert "4 to 5 for each pair" in told
    told = "group a, 6 tokens, place 1-2, verb 3; activations from [0, 1, 2, 3, 4]"
    assert told in cli("data", path, "--show", 1).out


def test_a_test_that_cannot_be_significant_is_said_before_the_run(
    write_spec: SpecWriter, cli: Callable[..., Result]
) -> None:
    path = patch_spec(write_spec, data={"pairs": alike(8)}, statistics={"test": True})
    # 2 x 2^-8 x 18 places.
    told = "over 8 prompts and 18 places p_holm is at least 0.14"
    assert told in cli("plan", path).out
    assert "no intervals" not in cli("plan", path).out
    few = cli("plan", path, "data.pairs=" + str(alike(4))).out
    assert "no intervals: over 4 prompts, and 95 % needs 5" in few
    assert "p_holm" not in cli("plan", path, "statistics.test=false").out


def test_what_is_frozen_is_a_set(write_spec: SpecWriter) -> None:
    path = {"senders": HEADS, "receivers": "logits", "freeze": ["heads", "mlps"]}
    turned = {**path, "freeze": ["mlps", "heads", "mlps"]}
    assert ids(paths(write_spec, path)) == ids(paths(write_spec, turned))
    none = paths(write_spec, {**path, "freeze": []})
    assert not ids(none) & ids(paths(write_spec, path))
    # Nothing frozen is still a path.
    assert {label.cell.freeze for label in none.labels} == {()}


# --- cost


def test_cost_counts_what_is_left(write_spec: SpecWriter) -> None:
    path = patch_spec(write_spec)
    plan = plan_of(path)
    cost = estimate(plan)
    cells = 3 * N
    assert (cost.prompts, cost.points, cost.rows) == (1, cells, cells)
    # The first token is the same in both prompts: its states are, too.
    assert cost.no_op_rows == 3
    reference = estimate(plan_of(path, "run.executor=reference"))
    assert reference.block_tokens == 3 * N * (cells + 4)
    assert cost.block_tokens < 0.7 * reference.block_tokens
    assert cost.naive_block_tokens == 3 * N * 2 * cells
    assert estimate(plan, ids(plan)).block_tokens == 0
    # An ablation changes every position.
    assert estimate(plan_of(path, "intervention=zero")).no_op_rows == 0
    drawn = estimate(plan_of(patch_spec(write_spec, **DRAWN)))
    assert drawn.rows == 2 * drawn.points


def test_cost_of_a_screen_is_that_of_what_is_verified(write_spec: SpecWriter) -> None:
    path = patch_spec(write_spec, attribution={"verify": 4})
    assert estimate(plan_of(path)).points == 4
    assert estimate(plan_of(path, "attribution.verify=all")).points == 3 * N


def test_answers_of_several_tokens_cost_more(write_spec: SpecWriter) -> None:
    pair = {**PAIRS[0], "answer": "Seattle Rome"}
    path = patch_spec(write_spec, data={"pairs": [pair]}, metric="log_probability_difference")
    plan = plan_of(path)
    assert plan.tokens(0) == N + 1 + N
    assert plan.logits(0) == 3 * 420


def test_a_plan_that_is_only_checked_has_no_cells_without_claims(write_spec: SpecWriter) -> None:
    path = patch_spec(write_spec, data=BOTH)
    assert plan_of(path, only_check=True).cells == ()
    claim = {"claim": "c", "source": "s", "between": [0, 1], "where": {"layer": 1, "pos": 0}}
    with_claim = patch_spec(write_spec, data=BOTH, reference=[claim])
    assert len(plan_of(with_claim, only_check=True).cells) == len(plan_of(with_claim).cells) > 0


def test_a_model_without_a_tokenizer_is_checked_as_far_as_it_goes(write_spec: SpecWriter) -> None:
    plan = plan_of(patch_spec(write_spec, model={"config": tiny_config("gpt2")}))
    assert (plan.pairs, plan.cells, plan.identity) == ({}, (), None)
    assert any("tokenizer" in reason for reason in plan.unchecked)


def test_metric_names() -> None:
    assert parse_metric("recovery:probability").of == "probability"
    assert parse_metric("relative").of == "logit_difference"
    assert parse_metric("top_5").top == 5
    assert parse_metric("top_0").top is None
    assert not parse_metric("recovery:recovery").is_plain
    assert not parse_metric("recovery:").is_plain


# --- what a user may get wrong

GOOD = f"""\
kind: patch
model:
  path: MODEL
data:
  pairs:
    - clean: {PROMPT}
      corrupted: {OTHER}
      answer: Seattle
      wrong: Mostar
      spans: {{place: Space Needle}}
    - clean: Now {PROMPT}
      corrupted: Now {OTHER}
      answer: Paris
      wrong: Rome
      spans: {{place: Space Needle}}
grid:
  - component: block_output
    layers: all
metric: logit_difference
"""
GRID = GOOD[GOOD.index("grid:") : GOOD.index("metric:")]
SENDERS = "senders: {component: head_attention_value_output, layers: 1}"
SET = "  - name: s\n    set:\n      - component: block_output\n        "


@dataclass(frozen=True)
class Case:
    """`old` gives way to `new`; `at` is line and column, `texts` are in the one message."""

    name: str
    old: str
    new: str
    at: tuple[int, int]
    texts: tuple[str, ...] = field(default=())


def wide(text: str) -> str:
    return GRID + text


CASES = [
    Case(
        "unequal pairs",
        f"corrupted: {OTHER}",
        "corrupted: The Bridge is in downtown",
        (7, 18),
        ("pair 0: the clean prompt has 6 tokens, the corrupted one 5", "as many", "leave_out"),
    ),
    Case(
        "answer equal to wrong",
        "wrong: Mostar",
        "wrong: Seattle",
        (9, 14),
        ("the wrong answer ' Seattle' is the right one too", "expected another answer"),
    ),
    Case(
        "unknown span in the grid",
        "layers: all",
        "positions: plce",
        (18, 16),
        ("pair 0 has no span 'plce'", "whole, prompt, spans, place, END", "mean 'place'"),
    ),
    Case(
        "unknown component",
        "block_output",
        "block_ouput",
        (17, 16),
        ("no component 'block_ouput'", "expected", "mean 'block_output'"),
    ),
    Case(
        "unknown component in a list",
        "block_output",
        "[mlp_output, mlp_inptu]",
        (17, 29),
        ("'mlp_inptu'", "mean 'mlp_input'"),
    ),
    Case(
        "unknown component in a set",
        GRID,
        "grid:\n" + SET.replace("block_output", "blck_output") + "layers: 0\n",
        (19, 20),
        ("'blck_output'", "mean 'block_output'"),
    ),
    Case(
        "unknown metric",
        "metric: logit_difference",
        "metric: logit_diference",
        (19, 9),
        ("'logit_diference' is not known", "--plugin FILE", "mean 'logit_difference'"),
    ),
    Case(
        "unknown normalised metric",
        "metric: logit_difference",
        "metric: recovery:log_probabilty",
        (19, 9),
        ("mean 'recovery:log_probability'",),
    ),
    Case(
        "metric twice",
        "metric: logit_difference",
        "metric: [logit, logit]",
        (1, 1),
        ("metric logit is there twice",),
    ),
    Case("layer out of range", "layers: all", "layers: 3", (18, 13), ("has 3 layers", "0 to 2")),
    Case("window too wide", "layers: all", "window: 4", (18, 13), ("a window of 4", "at most 3")),
    Case(
        "position out of range",
        "layers: all",
        "positions: 40",
        (18, 16),
        ("40 is out of range", "pair 0", "0 to 5"),
    ),
    Case(
        "position that the first prompt lacks",
        "layers: all",
        "positions: 6",
        (18, 16),
        ("6 is out of range", "pair 0"),
    ),
    Case(
        "head out of range",
        "component: block_output",
        "component: head_query_output\n    heads: 2",
        (18, 12),
        ("head 2 is out of range for head_query_output", "0 to 1"),
    ),
    Case(
        "heads of what has none",
        "layers: all",
        "heads: 1",
        (18, 12),
        ("block_output is not by head", "head_... component"),
    ),
    Case(
        "dimension out of range",
        "layers: all",
        "dims: [0, 24]",
        (18, 11),
        ("dimension 24 is out of range", "0 to 23"),
    ),
    Case(
        "neuron out of range",
        "component: block_output",
        "component: mlp_activation\n    neurons: 96",
        (18, 14),
        ("96 is out of range", "0 to 95"),
    ),
    Case(
        "dimension of one head",
        "component: block_output",
        "component: head_query_output\n    dims: 12",
        (18, 11),
        ("dimension 12", "0 to 11"),
    ),
    Case(
        "dimensions of a pattern",
        "component: block_output",
        "component: attention_weight\n    dims: 1",
        (18, 11),
        ("has no dimensions", "no dims"),
    ),
    Case(
        "a sender after its receiver",
        GRID,
        f"paths:\n  {SENDERS}\n  receivers:\n    component: head_key_output\n    layers: 1\n",
        (17, 12),
        ("the sender comes after its receiver 1.0.key", "layers before"),
    ),
    Case(
        "a receiver that nobody reaches",
        GRID,
        f"paths:\n  {SENDERS}\n  receivers:\n"
        "    - logits\n    - {component: mlp_input, layers: 0}\n",
        (20, 7),
        ("the receiver 0.mlp_input comes before every sender", "layers after"),
    ),
    Case(
        "what sends nothing",
        GRID,
        "paths:\n  senders: {component: block_output}\n  receivers: logits\n",
        (17, 12),
        ("block_output sends nothing", "mlp_output"),
    ),
    Case(
        "receiver out of range",
        GRID,
        f"paths:\n  {SENDERS}\n  receivers:\n"
        "    component: head_key_output\n    layers: 2\n    heads: 2\n",
        (21, 12),
        ("head 2",),
    ),
    Case(
        "a joint receiver out of range",
        GRID,
        f"paths:\n  {SENDERS}\n  receivers:\n    name: movers\n    set:\n"
        "      - {component: head_query_output, layers: 2, heads: [0, 1]}\n"
        "      - {component: head_query_output, layers: 2, heads: 5}\n",
        (22, 58),
        ("head 5",),
    ),
    Case(
        "centring that changes nothing",
        GRID,
        "decompose: {unembedding: centred}\n",
        (16, 26),
        ("changes no difference of logits", "without a wrong answer"),
    ),
    Case(
        "a joint receiver without a name",
        GRID,
        f"paths:\n  {SENDERS}\n  receivers:\n"
        "    set: [{component: head_query_output, layers: 2}]\n",
        (19, 5),
        ("a set without a name", "name: and a word"),
    ),
    Case(
        "a joint receiver with an axis of its own",
        GRID,
        f"paths:\n  {SENDERS}\n  receivers:\n    name: movers\n    layers: 2\n"
        "    set: [{component: head_query_output, layers: 2}]\n",
        (20, 5),
        ("receivers.layers: nothing that is asked for reads it", "only with no set"),
    ),
    Case(
        "a receiver without layers",
        GRID,
        f"paths:\n  {SENDERS}\n  receivers:\n    component: mlp_input\n",
        (19, 5),
        ("a receiver without component and layers", "a set of sites"),
    ),
    Case(
        "points of a method that has none",
        GRID,
        "circuit: {method: eap, steps: 5}\n",
        (16, 24),
        ("circuit.steps: nothing that is asked for reads it", "method: eap_ig_inputs"),
    ),
    Case(
        "nothing that could be held out",
        GRID,
        "circuit: {held_out: 0.1}\n",
        (16, 21),
        ("held_out: 0.1 of the distinct pairs is none", "more distinct pairs"),
    ),
    Case(
        "attribution of a pattern",
        GRID,
        "grid: {component: attention_weight}\nattribution: {}\n",
        (16, 19),
        ("attribution reaches no attention_weight", "module's output"),
    ),
    Case(
        "attribution of a pattern in a set",
        GRID,
        "attribution: {}\ngrid:\n"
        + SET.replace("block_output", "attention_weight")
        + "layers: 0\n",
        (20, 20),
        ("attribution reaches no attention_weight",),
    ),
    Case(
        "attribution without a grid",
        GRID,
        "attribution: {}\ndecompose: true\n",
        (1, 1),
        ("attribution without a grid",),
    ),
    Case(
        "attribution of a metric without gradient",
        "metric: logit_difference",
        "attribution: {}\nmetric: rank",
        (20, 9),
        ("needs the gradient", "first one of"),
    ),
    Case(
        "no wrong answers",
        "      wrong: Rome\n",
        "",
        (18, 9),
        ("needs a wrong answer; pair 1 has none", "expected wrong:"),
    ),
    Case(
        "several tokens",
        "answer: Paris",
        "answer: Paris Rome",
        (19, 9),
        ("answers of one token; ' Paris Rome' (pair 1) has 2", "log_probability"),
    ),
    Case("nothing asked for", GRID, "", (1, 1), ("nothing is asked for", "decompose or circuit")),
    Case(
        "claim about no place",
        "metric:",
        "reference:\n  - {claim: c, source: s, "
        "between: [0, 1], where: {layer: 1, pos: 40}}\nmetric:",
        (20, 51),
        ("about no place",),
    ),
    Case(
        "claim about no column",
        "metric:",
        "reference:\n  - {claim: c, source: s, between: [0, 1], where: {layr: 1}}\nmetric:",
        (20, 58),
        ("no column 'layr'", "'layer'"),
    ),
    Case(
        "resample alone",
        "metric:",
        "intervention: resample\nmetric:",
        (19, 15),
        ("resample: for 2 of 2 pairs fewer than 3 other prompts", "more pairs of each template"),
    ),
    Case(
        "two patches of one line",
        GRID,
        wide("  - component: block_output\n    dims: 0-3\n"),
        (19, 5),
        ("two different patches", "component block_output, layer 0", "a name:"),
    ),
    Case(
        "two sets of one name",
        GRID,
        "grid:\n" + SET + "layers: 0\n" + SET + "layers: 1\n",
        (21, 5),
        ("two different patches", "set s"),
    ),
    Case(
        "a set without a name",
        GRID,
        "grid:\n  - set:\n      - component: block_output\n",
        (17, 5),
        ("a set without a name",),
    ),
    Case(
        "a pattern out of range",
        "metric:",
        "figures: {patterns: [[0, 2]]}\nmetric:",
        (19, 22),
        ("no head [0, 2]", "2 heads"),
    ),
    Case(
        "a recovery without corrupted prompts",
        f"      corrupted: Now {OTHER}\n",
        "",
        (11, 7),
        ("pair 1: this pair has no corrupted prompt",),
    ),
    Case(
        "the answer is read nowhere",
        "  pairs:",
        "  at: plcae\n  pairs:",
        (5, 7),
        ("pair 0: no span 'plcae'", "place, END", "mean 'place'"),
    ),
    Case(
        "unknown receiver",
        GRID,
        f"paths:\n  {SENDERS}\n  receivers: [logits, logit]\n",
        (18, 23),
        ("'logit' is not known here", "mean 'logits'"),
    ),
    Case(
        "unknown component of a receiver",
        GRID,
        f"paths:\n  {SENDERS}\n  receivers:\n    component: head_qery_output\n    layers: 2\n",
        (19, 16),
        ("'head_qery_output' is not known", "mean 'head_query_output'"),
    ),
    Case(
        "unknown freeze",
        GRID,
        f"paths:\n  {SENDERS}\n  receivers: logits\n  freeze: head\n",
        (19, 11),
        ("'head' is not known", "mean 'heads'"),
    ),
    Case(
        "places below zero",
        "metric:",
        "attribution: {verify: -3}\nmetric:",
        (19, 23),
        ("-3 is no number of places", "0 or more, or all"),
    ),
    Case(
        "unknown intervention",
        "metric:",
        "intervention: denoize\nmetric:",
        (19, 15),
        ("'denoize' is not known", "mean 'denoise'"),
    ),
    Case("answers that are no text", "answer: Seattle", "answer: 3", (8, 15), ("got 3",)),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_malformed(
    case: Case, tmp_path: Path, gpt2_folder: Path, cli: Callable[..., Result]
) -> None:
    assert GOOD.count(case.old) >= 1
    path = tmp_path / "spec.yaml"
    path.write_text(GOOD.replace(case.old, case.new, 1).replace("MODEL", str(gpt2_folder)))
    for only_check in (False, True):
        with pytest.raises(SpecError) as caught:
            plan_of(path, only_check=only_check)
        assert len(caught.value.problems) == 1, str(caught.value)
        [problem] = caught.value.problems
        for text in case.texts:
            assert text in str(problem), str(problem)
        assert problem.mark is not None
        assert (problem.mark.line, problem.mark.column) == case.at, str(problem)
    result = cli("patch", path, "--plan")
    assert (result.code, result.out) == (2, "")
    assert f"spec.yaml:{case.at[0]}:{case.at[1]}: " in result.err
    assert "Traceback" not in result.err


def test_the_good_spec_is_good(tmp_path: Path, gpt2_folder: Path) -> None:
    path = tmp_path / "spec.yaml"
    path.write_text(GOOD.replace("MODEL", str(gpt2_folder)))
    assert len(plan_of(path).cells) == 3 * (6 + len(plan_of(path).pairs[1].ids))


def test_a_later_prompt_may_lack_a_place(write_spec: SpecWriter) -> None:
    lacking = {**alike(1)[0], "answer": "Rome", "spans": {}}
    cases = [
        ({"pairs": PAIRS[::-1]}, N, "6 is out of range: pair 1"),
        ({"pairs": [PAIRS[0], lacking]}, "place", "pair 1 has no span 'place'"),
    ]
    for data, positions, message in cases:
        part = {"component": "head_query_output", "layers": 2, "positions": positions}
        sections: list[dict[str, Any]] = [
            {"grid": part},
            {"grid": {"set": [part], "name": "s"}},
            {"grid": None, "paths": {"senders": {**HEADS, "layers": 0}, "receivers": part}},
            {
                "grid": None,
                "paths": {"senders": {**HEADS, "positions": positions}, "receivers": "logits"},
            },
        ]
        for section in sections:
            path = patch_spec(write_spec, data=data, **section)
            for only_check in (False, True):
                with pytest.raises(SpecError, match=message) as caught:
                    plan_of(path, only_check=only_check)
                assert len(caught.value.problems) == 1


def test_tokens_that_the_model_does_not_have_are_told_once(
    write_spec: SpecWriter, gpt2_folder: Path
) -> None:
    config = {**tiny_config("gpt2"), "vocab_size": 100}
    model = {"config": config, "tokenizer": str(gpt2_folder)}
    with pytest.raises(SpecError, match="the model 100 tokens") as caught:
        plan_of(patch_spec(write_spec, model=model, data=BOTH))
    assert len(caught.value.problems) == 1


def test_a_trace_spec_is_not_patched(write_spec: SpecWriter, cli: Callable[..., Result]) -> None:
    path = write_spec()
    result = cli("patch", path)
    assert result.code == 2
    assert f"{path}:1:7: this is a spec of kind 'trace'" in result.err
    assert f"type `interv trace {path}`" in result.err
