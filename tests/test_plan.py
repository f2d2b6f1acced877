from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from interv.plan import Cell, estimate, make_packs, make_plan, max_tokens
from interv.plan.cells import window_layers
from interv.plan.cost import token_bytes
from interv.spec import load_spec
from interv.spec.run import RunSection
from tests.conftest import PROMPT, Result, SpecWriter

FACTS = [
    {"prompt": PROMPT, "subject": "The Space Needle", "answer": "Seattle"},
    {"prompt": "In downtown, the Old Bridge is", "subject": "Old Bridge", "answer": "Mostar"},
]


GRID = "grid=[{component: block_output, layers: 0-1, positions: 0-3}]"


def plan_of(path: Path, *overrides: str):
    return make_plan(load_spec(path, overrides))


@given(st.integers(1, 60), st.integers(1, 20), st.data())
def test_a_window_is_the_authors(n_layers: int, window: int, data: st.DataObject) -> None:
    centre = data.draw(st.integers(0, n_layers - 1))
    # experiments/causal_trace.py, trace_important_window.
    authors = range(max(0, centre - window // 2), min(n_layers, centre - (-window // 2)))
    assert window_layers(centre, window, n_layers) == tuple(authors)
    assert centre in authors


def test_a_window_of_ten_reaches_from_five_below_to_four_above() -> None:
    assert window_layers(17, 10, 48) == tuple(range(12, 22))


def test_the_grid_is_a_union_of_products(write_spec: SpecWriter) -> None:
    grid = [
        {"component": ["block_output", "mlp_input"], "layers": "0-1", "positions": [0, -1]},
        {"component": "block_output", "layers": [1, 2], "positions": "last"},
    ]
    plan = plan_of(write_spec(grid=grid))
    assert len(plan.labels) == 2 * 2 * 2 + 2
    # (block_output, layer 1, last position) is asked for twice and computed once.
    assert len(plan.cells) == 9


def test_ids_do_not_depend_on_the_order_of_prompts_or_grids(write_spec: SpecWriter) -> None:
    grids = [{"component": "block_output"}, {"component": "mlp_output", "window": 2}]
    one = plan_of(write_spec(data={"facts": FACTS}, grid=grids))
    other = plan_of(write_spec(data={"facts": FACTS[::-1]}, grid=grids[::-1]))
    assert {c.id for c in one.cells} == {c.id for c in other.cells}
    assert one.identity != other.identity


def test_a_grid_that_grows_keeps_its_ids(write_spec: SpecWriter) -> None:
    small = plan_of(write_spec(), "grid.layers=0-1")
    large = plan_of(write_spec())
    assert {c.id for c in small.cells if c.component == "block_output"} < {
        c.id for c in large.cells
    }


@pytest.mark.parametrize(
    "change",
    [
        "model.dtype=float64",
        "model.attn_implementation=eager",
        "corrupt.level=2.0",
        "corrupt.samples=4",
        "corrupt.draw_seed=1",
        "seed=1",
        "data.facts.0.answer=Mostar",
        "model.prepend_bos=true",
    ],
)
def test_what_changes_a_value_changes_every_id(write_spec: SpecWriter, change: str) -> None:
    path = write_spec()
    before, after = plan_of(path), plan_of(path, change)
    assert not {c.id for c in before.cells} & {c.id for c in after.cells}
    assert before.identity != after.identity


@pytest.mark.parametrize(
    "change",
    ["run.max_tokens=7", "run.threads=1", "figures.dpi=99", "name=other", "run.device=cpu"],
)
def test_what_changes_no_value_changes_no_id(write_spec: SpecWriter, change: str) -> None:
    path = write_spec()
    assert plan_of(path).identity == plan_of(path, change).identity


def test_sigma_depends_on_all_subjects(write_spec: SpecWriter) -> None:
    corrupt = {"type": "noise", "level": "3s"}
    one = plan_of(write_spec(data={"facts": FACTS[:1]}, corrupt=corrupt))
    two = plan_of(write_spec(data={"facts": FACTS}, corrupt=corrupt))
    assert not {c.id for c in one.cells} & {c.id for c in two.cells}


def test_positions_before_the_first_change_are_no_ops(write_spec: SpecWriter) -> None:
    plan = plan_of(write_spec(data={"facts": FACTS[1:]}, grid={"component": "block_output"}))
    prompt = plan.prompts[0]
    assert prompt.first_changed > 0
    cost = estimate(plan)
    assert cost.no_op_rows == prompt.first_changed * 3 * 3


def test_cost_counts_what_is_left(write_spec: SpecWriter) -> None:
    plan = plan_of(write_spec(), GRID)
    tokens, draws, cells = 6, 3, 8
    full = estimate(plan)
    assert (full.points, full.rows, full.done) == (cells, cells * draws, 0)
    reference = 3 * tokens * (cells * draws + 2 + draws)
    assert estimate(plan_of(write_spec(), GRID, "run.executor=reference")).block_tokens == reference
    assert full.block_tokens < 0.6 * reference
    assert full.naive_block_tokens == 3 * tokens * cells * (draws + 1)
    done = {c.id for c in plan.cells}
    assert estimate(plan, done).block_tokens == 0
    assert estimate(plan, done).done == cells


@given(st.integers(1, 200), st.sampled_from(["reference", "suffix"]))
def test_packs_hold_every_cell_once_and_keep_to_the_budget(
    gpt2_folder: Path, tmp_path_factory: pytest.TempPathFactory, budget: int, executor: str
) -> None:
    path = tmp_path_factory.getbasetemp() / "packs.yaml"
    document = {
        "kind": "trace",
        "model": {"path": str(gpt2_folder)},
        "data": {"facts": FACTS},
        "corrupt": {"type": "noise", "level": 1.0, "samples": 2},
        "grid": {"component": "block_output"},
        "run": {"max_tokens": budget},
    }
    path.write_text(json.dumps(document))
    plan = plan_of(path)
    packs = make_packs(plan, executor, budget)
    packed = [c for pack in packs for c in pack.cells]
    assert len(packed) == len(plan.cells)
    assert set(packed) == set(plan.cells)

    def tokens(cell: Cell) -> int:
        if executor == "suffix" and plan.width(cell) == 0:
            return 0
        first = cell.position if executor == "suffix" else 0
        return plan.draws * (plan.tokens(cell.prompt) - first)

    for pack in packs:
        assert {c.prompt for c in pack.cells} <= set(pack.prompts)
        assert len(pack.cells) == 1 or sum(map(tokens, pack.cells)) <= budget
        layers = [3 - plan.first_layer(c) if executor == "suffix" else 3 for c in pack.cells]
        work = sum(n * tokens(c) for n, c in zip(layers, pack.cells, strict=True))
        assert pack.block_tokens == work
        if len(pack.prompts) > 1:
            first = [c for c in plan.cells if c.prompt == pack.prompts[0]]
            assert sum(map(tokens, first)) < budget, "prompts that fill packs do not share them"
    assert packs == make_packs(plan_of(path), executor, budget)
    skipped = {c.id for c in plan.cells[::2]}
    left = make_packs(plan, executor, budget, elsewhere=skipped)
    assert {c.id for p in left for c in p.cells} == {c.id for c in plan.cells} - skipped
    one = make_packs(plan, executor, budget, prompts=[1])
    assert {c for p in one for c in p.cells} == {c for c in plan.cells if c.prompt == 1}


@pytest.mark.parametrize("executor", ["reference", "suffix"])
def test_small_prompts_share_packs_and_large_ones_do_not(
    write_spec: SpecWriter, executor: str
) -> None:
    plan = plan_of(write_spec(data={"facts": FACTS}))
    [*together] = make_packs(plan, executor, 10**6)
    assert [pack.prompts for pack in together] == [(0, 1)]
    assert {pack.prompts for pack in make_packs(plan, executor, 50)} == {(0,), (1,)}


@pytest.mark.parametrize(
    ("memory", "number"),
    [
        ("1GB", 10**9), ("1GiB", 2**30), ("512 MiB", 2**29), ("1.5KB", 1500), ("0.5 GiB", 2**29),
        (None, None),
    ],
)  # fmt: skip
def test_memory_is_read_as_bytes(memory: str | None, number: int | None) -> None:
    assert RunSection(memory=memory).memory_bytes == number


@pytest.mark.parametrize("memory", ["1", "1G", "-1GB", "GB", "1 TB", "1gb", "1.GB", "1e3MB"])
def test_memory_of_another_form_is_refused(memory: str) -> None:
    with pytest.raises(ValidationError, match="memory"):
        RunSection(memory=memory)


def test_memory_decides_the_tokens_of_a_forward(write_spec: SpecWriter) -> None:
    path = write_spec()
    plan = plan_of(path)
    token = token_bytes(plan.facts, "float32")

    def tokens(*overrides: str, gpu: int | None = None) -> int:
        return max_tokens(plan_of(path, *overrides), gpu)

    # Half of it is for the activations, and the tokens are a power of two.
    assert 10**6 // (2 * token) == 192
    assert tokens("run.memory=1MB") == 128
    assert tokens("run.memory=1MB", "model.dtype=float64") == 64
    assert tokens("run.memory=1KB") == 1
    assert tokens("run.max_tokens=7") == 7
    # No more than is of use, however much there is.
    assert tokens("run.memory=900GiB") == 1024
    assert tokens("run.memory=900GiB", gpu=1) == 32768
    # Else a quarter of what is free.
    assert tokens(gpu=8 * 100 * token) == 64
    assert 1 <= tokens() <= 1024


def test_a_plan_counts_the_packs_that_memory_allows(write_spec: SpecWriter) -> None:
    path = write_spec()
    few, many = (estimate(plan_of(path, f"run.memory={m}")) for m in ("1GiB", "1KB"))
    assert (few.forwards, many.forwards) == (1, few.points)
    assert few.block_tokens == many.block_tokens
    assert few.memory_bytes > many.memory_bytes


def test_plan_writes_nothing_and_counts_what_is_done(
    write_spec: SpecWriter, tmp_path: Path, cli: Callable[..., Result]
) -> None:
    path, outputs = write_spec(), tmp_path / "outputs"
    first = json.loads(cli("plan", path, "-o", outputs, "--json").out)
    assert not outputs.exists()
    assert (first["done"], first["done_here"]) == (0, 0)
    assert cli("trace", path, "grid.layers=0-1", "-o", outputs, "-q").code == 0
    grown = json.loads(cli("plan", path, "-o", outputs, "--json").out)
    assert grown["done_by_other_runs"] > 0
    assert grown["points"] == first["points"]
    text = cli("trace", path, "--plan", "-o", outputs).out
    assert "not in the earlier runs' grids" in text
    assert cli("trace", path, "-o", outputs, "-q").code == 0
    done = json.loads(cli("plan", path, "-o", outputs, "--json").out)
    assert done["done_here"] == done["points"]
    assert done["block_tokens"] == 0


def test_measure_times_a_pack(
    write_spec: SpecWriter, tmp_path: Path, cli: Callable[..., Result]
) -> None:
    result = json.loads(cli("plan", write_spec(), "--measure", "--json", "-o", tmp_path).out)
    assert result["seconds_to_go"] >= result["seconds_to_load"] > 0
