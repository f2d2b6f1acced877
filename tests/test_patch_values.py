"""The numbers that `interv patch` writes, against plain hooks on the bare model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import transformers
from torch import Tensor, nn

from interv.errors import EngineError, SpecError
from interv.plan import PatchPlan, make_patch_plan
from interv.report.patch_tables import results_table
from interv.runner.patch_steps import PATCH
from interv.runner.sweep import run_sweep
from interv.spec import load_spec
from tests import raw_paths

PAIRS = [
    {
        "clean": "The Space Needle is in downtown",
        "corrupted": "The Old Bridge is in downtown",
        "answer": "Seattle",
        "wrong": ["Mostar", "Paris"],
        "spans": {"thing": "Space Needle", "verb": "is"},
        "template": "downtown",
    },
    {
        "clean": "The Eiffel Tower is in Paris",
        "corrupted": "The Eiffel Needle is in Rome",
        "answer": ["Rome", "London"],
        "wrong": "Berlin",
        "spans": {"thing": "Eiffel Tower", "verb": "is@1"},
        "template": "downtown",
    },
    {
        "clean": "The Old Needle is located in",
        "corrupted": "The Space Tower is located in",
        "answer": "Mostar",
        "wrong": ["Rome", "London", "Seattle"],
        "spans": {"thing": "Old Needle", "verb": "is"},
        "template": "located",
    },
    {
        "clean": "The Eiffel Bridge is located of",
        "corrupted": "The Old Bridge is located of",
        "answer": "Paris",
        "wrong": "Berlin",
        "spans": {"thing": "Eiffel Bridge", "verb": "is"},
        "template": "located",
    },
]
# So that each has two others of its kind to draw.
MORE = [
    {
        **PAIRS[0],
        "clean": "The Old Tower is in downtown",
        "corrupted": "The Eiffel Bridge is in downtown",
        "spans": {"thing": "Old Tower", "verb": "is"},
    },
    {
        **PAIRS[2],
        "clean": "The Space Bridge is located in",
        "corrupted": "The Eiffel Needle is located in",
        "spans": {"thing": "Space Bridge", "verb": "is"},
    },
]


def ablation(kind: str, **options: Any) -> dict[str, Any]:
    """An intervention with the options that it reads; a mean may be over two pairs of a kind."""
    reads = {"mean": ("over",), "resample": ("over", "samples")}.get(kind, ())
    own = {name: value for name, value in options.items() if name in reads}
    return {"type": kind, **own, **({"least": 2} if kind == "mean" else {})}


HEAD, MLP, KEY = "head_attention_value_output", "mlp_output", "head_key_output"
N_LAYERS = 3


def plan_of(folder: Path, plugin: Path | None = None, **sections: Any) -> PatchPlan:
    spec = {
        "kind": "patch",
        "name": "test",
        "model": {"path": str(folder), "dtype": "float64"},
        "data": {"pairs": PAIRS},
        "intervention": "denoise",
        **sections,
    }
    return make_patch_plan(load_spec(spec, (), kind="patch", plugin=plugin))


def table_of(plan: PatchPlan, folder: Path) -> pd.DataFrame:
    """results.csv, computed."""
    folder.mkdir(parents=True, exist_ok=True)
    outcome = run_sweep(plan, PATCH, folder, lambda *_: None, adopt=False)
    return results_table(plan, outcome.journal)


def load(folder: Path) -> nn.Module:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    return model.eval()


Columns = slice | list[int]
Where = tuple[nn.Module, str, Columns]
"""A module, its side, and columns of it."""


def _part(model: nn.Module, component: str, layer: int, head: int | None) -> Where:
    family, config = model.config.model_type, model.config
    gpt2 = family == "gpt2"
    block = model.transformer.h[layer] if gpt2 else model.model.layers[layer]
    attention = block.attn if gpt2 else block.self_attn
    width = config.hidden_size // config.num_attention_heads
    columns = slice(None) if head is None else slice(head * width, (head + 1) * width)
    if component == HEAD:
        return (attention.c_proj if gpt2 else attention.o_proj), "in", columns
    if component == KEY and gpt2:
        assert head is not None
        start = config.n_embd + head * width
        return attention.c_attn, "out", slice(start, start + width)
    if component == KEY:
        return attention.k_proj, "out", columns
    if component == MLP:
        return block.mlp, "out", columns
    assert component == "block_output"
    return block, "out", columns


Write = tuple[Where, list[int], Tensor | float]
"""Where, at which positions, what instead: a whole side `[pos, width]`, or a constant."""


def forward(
    model: nn.Module, ids: Sequence[int], writes: Sequence[Write], reads: Sequence[Where] = ()
) -> tuple[Tensor, list[Tensor]]:
    """Logits `[pos, vocab]`, and sides that are read `[pos, width]`."""
    seen: dict[tuple[nn.Module, str], Tensor] = {}

    def visit(module: nn.Module, side: str, value: Tensor) -> Tensor:
        seen[module, side] = value[0].clone()
        value = value.clone()
        for (at, its_side, columns), positions, new in writes:
            if at is module and its_side == side:
                for p in positions:
                    value[0, p, columns] = new[p, columns] if isinstance(new, Tensor) else new
        return value

    sides = {(at, side) for (at, side, _), *_ in [*writes, *((read,) for read in reads)]}
    with ExitStack() as stack, torch.no_grad():
        for module, side in sides:
            if side == "in":

                def before(module: nn.Module, args: Any) -> Any:
                    return (visit(module, "in", args[0]), *args[1:])

                handle = module.register_forward_pre_hook(before)
            else:

                def after(module: nn.Module, _: Any, output: Any) -> Any:
                    if isinstance(output, tuple):
                        return (visit(module, "out", output[0]), *output[1:])
                    return visit(module, "out", output)

                handle = module.register_forward_hook(after)
            stack.callback(handle.remove)
        logits = model(torch.tensor([list(ids)]), use_cache=False).logits[0]
    return logits, [seen[at, side] for at, side, _ in reads]


# What a metric is, written out. `logits` are of the prompt and an answer's earlier tokens.


def by_hand(
    metric: str,
    forward_of: Callable[[tuple[int, ...]], Tensor],
    clean: Tensor,
    right: Sequence[tuple[int, ...]],
    wrong: Sequence[tuple[int, ...]],
    at: int,
) -> float:
    """A plain metric of a run.

    Args:
        forward_of: from a tail of tokens to the run's logits `[pos, vocab]`.
        clean: the clean run's logits `[vocab]` at the place.
        at: the position after which the answer begins.
    """

    def probability(answer: tuple[int, ...]) -> float:
        rows = forward_of(answer[:-1])
        chances = [
            float(np.exp(rows[at + i].numpy())[token] / np.exp(rows[at + i].numpy()).sum())
            for i, token in enumerate(answer)
        ]
        return float(np.prod(chances))

    here = forward_of(())[at].numpy()
    p, q = (np.exp(x) / np.exp(x).sum() for x in (clean.numpy(), here))
    first = [float(here[ids[0]]) for ids in right]
    others = [float(here[ids[0]]) for ids in wrong]
    # The best of the right answers; all of them are one event, whose odds add up.
    rank = min(sum(1 for value in here if value > one) for one in first)
    together = float(np.log(sum(np.exp(one) for one in first)))
    if metric.startswith("top_"):
        return float(rank < int(metric.removeprefix("top_")))
    if metric == "rank":
        return float(rank)
    if metric == "logit":
        return together
    if metric == "logit_difference":
        return together - sum(others) / len(others)
    if metric == "kl_divergence":
        return float((p * np.log(p / q)).sum())
    if metric == "js_divergence":
        m = (p + q) / 2
        return float((p * np.log(p / m)).sum() + (q * np.log(q / m)).sum()) / 2
    chosen, rest = [probability(ids) for ids in right], [probability(ids) for ids in wrong]
    if metric == "probability":
        return sum(chosen)
    if metric == "probability_difference":
        return sum(chosen) - sum(rest)
    if metric == "log_probability":
        return float(np.log(sum(chosen)))
    if metric == "cross_entropy":
        return float(-np.log(sum(chosen)))
    assert metric == "log_probability_difference"
    return float(np.log(sum(chosen)) - np.mean(np.log(rest)))


def close(value: float) -> Any:
    return pytest.approx(value, rel=1e-9, abs=1e-9)


# Paths.

# As {9.6, 9.9, 10.0} of Wang et al.: other heads in each layer, which no product of axes has.
JOINT = [
    {"component": "head_query_output", "layers": 1, "heads": 1},
    {"component": "head_query_output", "layers": 2, "heads": [0, 1]},
    {"component": "head_value_output", "layers": 2, "heads": 0},
]


PATHS = [
    {
        "senders": [
            {"component": HEAD, "positions": ["END", "whole"]},
            {"component": MLP, "positions": ["END", "whole"]},
        ],
        "receivers": "logits",
    },
    {
        "senders": [
            {"component": HEAD, "layers": [0, 1], "positions": "whole"},
            {"component": MLP, "layers": [0, 1], "positions": "END"},
        ],
        "receivers": [
            {"component": "head_query_output", "layers": 2, "positions": "END"},
            {"component": "head_key_output", "layers": [1, 2]},
            {"component": "head_value_output", "layers": 2, "positions": [0, 3, "END"]},
            {"component": "mlp_input", "layers": 2, "positions": ["verb", "END"], "name": "mlp"},
            {"component": "mlp_input", "layers": [1, 2]},
            {"component": "head_query_output", "layers": [1, 2], "heads": [1], "name": "queries"},
            {"component": "head_value_output", "layers": [2], "heads": [0, 1], "name": "values"},
            {"set": JOINT, "name": "joint"},
        ],
    },
]


def _ends(receiver: str) -> tuple[Any, list[int] | None]:
    """A receiver of PATHS as `raw_paths` has it, and its positions."""
    if receiver == "logits":
        return "logits", None
    if receiver == "mlp":
        return [("mlp", 2)], [3, 5]
    if receiver == "queries":
        return [("q", 1, 1), ("q", 2, 1)], None
    if receiver == "joint":
        return [("q", 1, 1), ("q", 2, 0), ("q", 2, 1), ("v", 2, 0)], None
    if receiver == "values":
        return [("v", 2, 0), ("v", 2, 1)], None
    layer, *head, part = receiver.split(".")
    if part == "mlp_input":
        return [("mlp", int(layer))], None
    positions = {"query": [5], "key": None, "value": [0, 3, 5]}[part]
    return [(part[0], int(layer), int(head[0]))], positions


@pytest.mark.parametrize("freeze", [["heads"], ["heads", "mlps"]])
@pytest.mark.parametrize("kind", ["denoise", "noise"])
def test_path_patching(model_folder: Path, tmp_path: Path, kind: str, freeze: list[str]) -> None:
    model = load(model_folder)
    family = model.config.model_type
    tables = []
    for executor in ("suffix", "reference"):
        plan = plan_of(
            model_folder,
            data={"pairs": PAIRS[:1]},
            intervention=kind,
            paths=[{**path, "freeze": freeze} for path in PATHS],
            metric="logit",
            run={"executor": executor},
        )
        tables.append(table_of(plan, tmp_path / executor))
    heads, groups = model.config.num_attention_heads, 2
    # Senders at END and whole, to the logits; then to each receiver of a later layer.
    to_logits = 2 * (N_LAYERS * heads + N_LAYERS)
    into_2 = (2 * heads + 2) * (heads + 2 * groups + 1 + 4)
    into_1 = (heads + 1) * groups + (2 * heads + 1)
    assert [len(table) for table in tables] == [to_logits + into_2 + into_1] * 2
    moved: dict[str, int] = dict.fromkeys(tables[0]["receiver"], 0)
    for row, again in zip(*(table.to_dict("records") for table in tables), strict=True):
        pair = plan.pairs[row["prompt_id"]]
        clean, corrupted = pair.ids, pair.corrupted_ids
        assert corrupted is not None
        base, source = (corrupted, clean) if kind == "denoise" else (clean, corrupted)
        is_head = row["component"] == HEAD
        sender = ("head", row["layer"], row["head"]) if is_head else ("mlp", row["layer"])
        receivers, positions = _ends(row["receiver"])
        logits = raw_paths.path_patch(
            model,
            family,
            base,
            source,
            sender,
            [5] if row["role"] == "END" else None,
            receivers,
            positions,
            "mlps" in freeze,
        )
        expected = close(_logit(logits[-1], pair))
        assert row["value"] == expected, row
        assert again["value"] == expected, row
        moved[row["receiver"]] += abs(row["effect"]) > 1e-6
    assert min(moved.values()) > 0, f"to one receiver nothing arrived: {moved}"


@pytest.mark.parametrize("executor", ["suffix", "reference"])
@pytest.mark.parametrize("kind", ["zero", "mean", "resample"])
def test_paths_of_ablated_senders(
    gpt2_folder: Path, tmp_path: Path, kind: str, executor: str
) -> None:
    """The direct path of a head that is ablated: to the logits alone, all else frozen."""
    plan = plan_of(
        gpt2_folder,
        intervention=ablation(kind, samples=1),
        paths={
            "senders": {"component": HEAD, "positions": "END"},
            "receivers": "logits",
            "freeze": ["heads", "mlps"],
        },
        metric="logit",
        run={"executor": executor},
    )
    table = table_of(plan, tmp_path)
    assert len(table) == 4 * 6
    model = load(gpt2_folder)
    stream = _part(model, "block_output", N_LAYERS - 1, None)
    for row in table.to_dict("records"):
        pair = plan.pairs[row["prompt_id"]]
        part = _part(model, HEAD, row["layer"], row["head"])
        _, [own, last] = forward(model, pair.ids, [], [part, stream])
        values = []
        for new in _replacements(model, plan, kind, "corrupted", row["prompt_id"], part):
            there = own[5] if new is None else new
            there = torch.zeros_like(own[5]) if isinstance(there, float) else there
            there = there[5] if there.dim() == 2 else there
            columns = part[2]
            change = (there - own[5])[columns] @ part[0].weight[columns]
            with torch.no_grad():
                logits = model.lm_head(model.transformer.ln_f(last[5] + change))
            values.append(_logit(logits, pair))
        assert row["value"] == close(float(np.mean(values))), row


# Sites.

GRID = [
    {"component": "block_output", "positions": ["whole", "thing", 3, -1]},
    {"component": MLP, "positions": "verb", "window": 2},
    {"component": HEAD, "positions": ["END", "whole"]},
    {"component": KEY, "positions": "thing"},
    {"component": MLP, "layers": 1, "positions": "END", "neurons": [0, 7]},
    {"component": HEAD, "layers": 1, "heads": 1, "positions": 4, "dims": "1-3", "name": "some"},
    {
        "set": [
            {"component": HEAD, "layers": [0, 2], "heads": [0, 1], "positions": ["thing", "END"]},
            {"component": MLP, "layers": 1, "positions": "verb"},
        ],
        "name": "together",
    },
]


def _cell(
    model: nn.Module, row: Mapping[str, Any], spans: Mapping[str, tuple[int, ...]]
) -> list[tuple[Where, list[int]]]:
    """What a row of GRID patches."""
    if row["set"] == "together":
        heads = [(HEAD, layer, head) for layer in (0, 2) for head in (0, 1)]
        parts = [(_part(model, *at), [1, 2, 5]) for at in heads]
        return [*parts, (_part(model, MLP, 1, None), [3])]
    positions = {"whole": list(range(6)), "-1": [5]}.get(row["role"])
    if positions is None:
        positions = [row["pos"]] if not pd.isna(row["pos"]) else list(spans[row["role"]])
    window = row["window"]
    layers = range(row["layer"] - window // 2, row["layer"] + (window + 1) // 2)
    head = None if pd.isna(row["head"]) else row["head"]
    found = []
    for layer in layers:
        if not 0 <= layer < N_LAYERS:
            continue
        module, side, columns = _part(model, row["component"], layer, head)
        if row["set"] == "some":
            assert isinstance(columns, slice)
            columns = [columns.start + i for i in (1, 2, 3)]
        if not pd.isna(row["neuron"]):
            columns = [row["neuron"]]
        found.append(((module, side, columns), positions))
    return found


def _replacements(
    model: nn.Module, plan: PatchPlan, kind: str, over: str, index: int, part: Where
) -> list[Tensor | float]:
    """What stands at a part instead, `[pos, width]`, for each draw."""

    def state(number: int, which: str) -> Tensor:
        other = plan.pairs[number]
        ids = other.ids if which == "clean" else other.corrupted_ids
        assert ids is not None
        return forward(model, ids, [], [part])[1][0]

    if kind == "zero":
        return [0.0]
    if kind in ("denoise", "noise"):
        return [state(index, "clean" if kind == "denoise" else "corrupted")]
    if kind == "resample":
        return [state(other, over) for other in plan.drawn[index]]
    group = [0, 1] if index in (0, 1) else [2, 3]
    return [(state(group[0], over) + state(group[1], over)) / 2]


@pytest.mark.parametrize(
    ("kind", "over"),
    [
        ("denoise", "corrupted"),
        ("noise", "corrupted"),
        ("zero", "corrupted"),
        ("mean", "corrupted"),
        ("mean", "clean"),
        ("resample", "corrupted"),
        ("resample", "clean"),
    ],
)
def test_patching_of_sites(model_folder: Path, tmp_path: Path, kind: str, over: str) -> None:
    model = load(model_folder)
    pairs = [*PAIRS, *MORE] if kind == "resample" else PAIRS
    tables = []
    for executor in ("suffix", "reference"):
        plan = plan_of(
            model_folder,
            data={"pairs": pairs},
            intervention=ablation(kind, over=over, samples=2),
            grid=GRID,
            run={"executor": executor},
        )
        tables.append(table_of(plan, tmp_path / executor))
    heads = model.config.num_attention_heads
    assert len(tables[0]) == len(pairs) * (3 * 4 + 3 + 3 * heads * 2 + 3 * 2 + 2 + 1 + 1)
    base_name = "corrupted" if kind == "denoise" else "clean"
    values: dict[tuple[int, str], float] = {}
    moved = 0
    for pair in plan.pairs.values():
        for name, ids in (("clean", pair.ids), ("corrupted", pair.corrupted_ids)):
            logits, _ = forward(model, ids or (), [])
            values[pair.index, name] = _difference(logits[-1], pair)
    for row, again in zip(*(table.to_dict("records") for table in tables), strict=True):
        index = row["prompt_id"]
        pair = plan.pairs[index]
        base = pair.corrupted_ids if kind == "denoise" else pair.ids
        assert base is not None
        cells = _cell(model, row, pair.spans)
        each = [_replacements(model, plan, kind, over, index, part) for part, _ in cells]
        draws = [
            _difference(
                forward(model, base, [(*c, n) for c, n in zip(cells, new, strict=True)])[0][-1],
                pair,
            )
            for new in zip(*each, strict=True)
        ]
        expected = np.mean(draws)
        for found in (row, again):
            assert found["value"] == close(expected), found
            assert found["clean"] == close(values[index, "clean"])
            assert found["corrupted"] == close(values[index, "corrupted"])
            assert found["effect"] == close(expected - values[index, base_name])
            assert found["relative_to"] == base_name
            assert found["draws"] == len(draws) == (2 if kind == "resample" else 1)
        if kind == "resample":
            assert row["sem"] == close(np.std(draws, ddof=1) / np.sqrt(2))
        moved += abs(row["effect"]) > 1e-6
    assert moved > len(tables[0]) / 2, "hardly any patch had an effect"


def _difference(logits: Tensor, pair: Any) -> float:
    wrong = [float(logits[ids[0]]) for ids in pair.wrong_ids]
    return _logit(logits, pair) - sum(wrong) / len(wrong)


def _logit(logits: Tensor, pair: Any) -> float:
    """Of several right answers together: their odds add up."""
    return float(np.log(sum(np.exp(float(logits[ids[0]])) for ids in pair.answer_ids)))


# Metrics. Two patches of whole layers, so that a forward by hand is short.

ALL = [
    "logit_difference",
    "logit",
    "log_probability",
    "probability",
    "log_probability_difference",
    "probability_difference",
    "cross_entropy",
    "rank",
    "kl_divergence",
    "js_divergence",
    "top_1",
    "top_100",
]
SPLIT = [m for m in ALL if m not in ("logit_difference", "logit", "rank", "top_1", "top_100")]
STREAM = [{"component": "block_output", "layers": [0, 1], "positions": [1, -1, "whole"]}]
SEVERAL = [
    {
        "clean": "The Space Needle is in downtown",
        "corrupted": "The Old Bridge is in downtown",
        "answer": ["Seattle Rome", "Paris"],
        "wrong": ["Mostar", "Seattle Mostar London"],
    },
    {
        "clean": "The Old Tower is in",
        "corrupted": "The Eiffel Tower is in",
        "answer": "Mostar",
        "wrong": ["Mostar Rome"],
    },
]


Seen = dict[tuple[Any, ...], Tensor]
"""Logits of forwards that were made for one metric, for the others."""


def _expected(
    model: nn.Module, plan: PatchPlan, row: Mapping[str, Any], metric: str, seen: Seen
) -> dict[str, float]:
    """A plain metric of the clean run, of the corrupted one, and of the patched one."""
    pair = plan.pairs[row["prompt_id"]]
    assert pair.corrupted_ids is not None
    prompts = {"clean": pair.ids, "corrupted": pair.corrupted_ids}
    part = _part(model, "block_output", row["layer"], None)
    n = len(pair.ids)

    def logits(run: str, tail: tuple[int, ...]) -> Tensor:
        # What is given of an answer is seen by the model too.
        where = {"whole": range(n + len(tail)), "prompt": range(n), "-1": [n - 1]}
        positions = list(where[row["role"]]) if row["role"] else [row["pos"]]
        place = (row["layer"], *positions) if run == "value" else ()
        key = (pair.index, run, tail, place)
        if key in seen:
            return seen[key]
        if run == "value":
            _, [source] = forward(model, pair.ids + tail, [], [part])
            made, _ = forward(model, prompts["corrupted"] + tail, [(part, positions, source)])
        else:
            made, _ = forward(model, prompts[run] + tail, [])
        return seen.setdefault(key, made)

    clean = logits("clean", ())[pair.read]
    answers = pair.answer_ids, pair.wrong_ids
    return {
        run: by_hand(metric, partial(logits, run), clean, *answers, pair.read)
        for run in ("clean", "corrupted", "value")
    }


def _check(model: nn.Module, plan: PatchPlan, table: pd.DataFrame) -> None:
    plain = {metric.name: metric for metric in plan.metrics}
    rows = table.to_dict("records")
    seen: Seen = {}
    found = [_expected(model, plan, row, plain[row["metric"]].of, seen) for row in rows]
    # Normalised ones divide by means over all prompts, each of which has as many rows.
    means = {}
    for name in plain:
        its = [values for values, row in zip(found, rows, strict=True) if row["metric"] == name]
        for run in ("clean", "corrupted"):
            means[name, run] = np.mean([values[run] for values in its])
    for row, values in zip(rows, found, strict=True):
        name = row["metric"]
        clean, corrupted = means[name, "clean"], means[name, "corrupted"]
        if name.startswith("recovery"):
            values = {k: (v - corrupted) / (clean - corrupted) for k, v in values.items()}
        elif name.startswith("relative"):
            values = {k: (v - corrupted) / corrupted for k, v in values.items()}
        for key, value in values.items():
            assert row[key] == close(value), (name, key, row)
        assert row["effect"] == close(values["value"] - values["corrupted"]), name


@pytest.mark.parametrize("executor", ["suffix", "reference"])
def test_every_metric(model_folder: Path, tmp_path: Path, executor: str) -> None:
    normalised = ["recovery", "recovery:probability", "relative", "relative:kl_divergence"]
    plan = plan_of(
        model_folder,
        grid=STREAM,
        metric=[*ALL, *normalised],
        run={"executor": executor},
    )
    table = table_of(plan, tmp_path)
    assert len(table) == 4 * 6 * 16
    _check(load(model_folder), plan, table)
    # The prediction has moved, and some patch restores it whole.
    moved = table[table["metric"] == "kl_divergence"]
    assert (moved["clean"].abs() < 1e-12).all()
    assert moved["corrupted"].min() > 0.01
    assert moved[(moved["role"] == "whole")]["value"].abs().max() < 1e-9
    assert set(table[table["metric"] == "top_100"]["value"]) == {0.0, 1.0}


@pytest.mark.parametrize("executor", ["suffix", "reference"])
def test_answers_of_several_tokens(model_folder: Path, tmp_path: Path, executor: str) -> None:
    """Each answer's earlier tokens are given, in a prompt of its own; `whole` takes them in."""
    plan = plan_of(
        model_folder,
        data={"pairs": SEVERAL},
        grid=[{**STREAM[0], "positions": [1, -1, "whole", "prompt"]}],
        metric=[*SPLIT, "recovery:log_probability_difference"],
        run={"executor": executor},
    )
    assert [len(ids) for ids in plan.pairs[0].all_ids] == [2, 1, 1, 3]
    table = table_of(plan, tmp_path)
    assert len(table) == 2 * 8 * 8
    _check(load(model_folder), plan, table)
    both = {
        name: table[(table["role"] == name) & (table["metric"] == "log_probability_difference")]
        for name in ("whole", "prompt")
    }
    gap = both["whole"]["value"].to_numpy() - both["prompt"]["value"].to_numpy()
    assert abs(gap).min() > 0.01


@pytest.mark.parametrize("executor", ["suffix", "reference"])
def test_whole_takes_in_the_answer_in_sets_and_paths(
    model_folder: Path, tmp_path: Path, executor: str
) -> None:
    """Every block's whole output is the clean run; paths are those of plain hooks."""
    model = load(model_folder)
    parts = {
        "grid": [{"set": [{"component": "block_output"}], "name": "all"}],
        "paths": [
            {
                "senders": {"component": HEAD, "layers": 0, "heads": 1, "positions": "whole"},
                "receivers": ["logits", {"component": "mlp_input", "layers": 2}],
            }
        ],
    }
    pair_of_two = {**SEVERAL[0], "answer": "Seattle Rome", "wrong": []}
    plan = plan_of(
        model_folder,
        data={"pairs": [pair_of_two]},
        metric="log_probability",
        run={"executor": executor},
        **parts,
    )
    pair = plan.pairs[0]
    [answer] = pair.answer_ids
    assert len(answer) == 2 and pair.corrupted_ids is not None
    tail, first = answer[:1], len(pair.ids) - 1
    ends = {"": None, "logits": "logits", "2.mlp_input": [("mlp", 2)]}
    rows = table_of(plan, tmp_path).to_dict("records")
    assert [row["receiver"] for row in rows] == list(ends)
    for row in rows:
        expected = row["clean"]
        if row["receiver"]:
            logits = raw_paths.path_patch(
                model,
                model.config.model_type,
                pair.corrupted_ids + tail,
                pair.ids + tail,
                ("head", 0, 1),
                None,
                ends[row["receiver"]],
                None,
                False,
            )
            given = logits.double().log_softmax(-1)
            expected = sum(float(given[first + k, token]) for k, token in enumerate(answer))
        assert row["value"] == close(expected), row


def test_a_mean_over_given_answers_is_refused(gpt2_folder: Path) -> None:
    grid = {"component": MLP, "positions": "whole"}
    with pytest.raises(SpecError, match=r"no mean at an answer's tokens[^$]*expected prompt"):
        plan_of(gpt2_folder, data={"pairs": SEVERAL}, intervention="mean", grid=grid)


def test_several_metrics_in_one_run_are_each_alone(gpt2_folder: Path, tmp_path: Path) -> None:
    names = [*ALL, "recovery", "relative:logit", "recovery:rank"]
    together = table_of(plan_of(gpt2_folder, grid=STREAM, metric=names), tmp_path / "all")
    for name in names:
        alone = table_of(plan_of(gpt2_folder, grid=STREAM, metric=name), tmp_path / name)
        same = together[together["metric"] == name].reset_index(drop=True)
        pd.testing.assert_frame_equal(same, alone, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("at", [2, -3, "verb"])
def test_an_answer_within_the_prompt(model_folder: Path, tmp_path: Path, at: int | str) -> None:
    plan = plan_of(
        model_folder, data={"pairs": PAIRS, "at": at}, grid=STREAM, metric=[*ALL, "recovery"]
    )
    assert {pair.read for pair in plan.pairs.values()} == {2 if at == 2 else 3}
    table = table_of(plan, tmp_path)
    _check(load(model_folder), plan, table)
    # The answer is read before what is changed.
    late = table[(table["role"] == "-1") & (table["metric"] != "recovery")]
    assert (late["effect"].abs() < 1e-12).all()


PLUGIN = """
import torch
import interv

@interv.metric
def margin(logits, answers, wrong):
    others = logits.clone()
    others[:, answers] = -torch.inf
    return logits[:, answers[0]] - others.amax(-1) + 10 * len(wrong)

@interv.metric
def shapeless(logits, answers, wrong):
    return logits[:, :2]

@interv.metric
def infinite(logits, answers, wrong):
    return logits[:, 0] / 0
"""


def test_a_metric_of_ones_own(model_folder: Path, tmp_path: Path) -> None:
    plugin = tmp_path / "own.py"
    plugin.write_text(PLUGIN)
    names = ["margin", "recovery:margin", "logit"]
    plan = plan_of(model_folder, plugin, grid=STREAM, metric=names)
    table = table_of(plan, tmp_path)
    model = load(model_folder)
    rows = table[table["metric"] == "margin"].to_dict("records")
    assert len(rows) == 24
    part_of = {layer: _part(model, "block_output", layer, None) for layer in (0, 1)}
    base = {}
    for row in rows:
        pair = plan.pairs[row["prompt_id"]]
        positions = {"whole": list(range(6)), "-1": [5]}.get(row["role"], [1])
        _, [source] = forward(model, pair.ids, [], [part_of[row["layer"]]])
        write = (part_of[row["layer"]], positions, source)
        values = {}
        for name, ids, writes in (
            ("clean", pair.ids, []),
            ("corrupted", pair.corrupted_ids, []),
            ("value", pair.corrupted_ids, [write]),
        ):
            logits = forward(model, ids or (), writes)[0][-1]
            right = [ids[0] for ids in pair.answer_ids]
            rest = max(float(v) for i, v in enumerate(logits) if i not in right)
            values[name] = float(logits[right[0]]) - rest + 10 * len(pair.wrong_ids)
            assert row[name] == close(values[name])
        base[row["prompt_id"]] = values["clean"], values["corrupted"]
    clean, corrupted = np.mean(list(base.values()), axis=0)
    recovery = table[table["metric"] == "recovery:margin"]["value"].to_numpy()
    plain = np.array([row["value"] for row in rows])
    np.testing.assert_allclose(recovery, (plain - corrupted) / (clean - corrupted), atol=1e-9)


@pytest.mark.parametrize(("name", "message"), [("shapeless", "(1, 2)"), ("infinite", "finite")])
def test_a_metric_that_gives_no_number_for_a_run(
    gpt2_folder: Path, tmp_path: Path, name: str, message: str
) -> None:
    plugin = tmp_path / "own.py"
    plugin.write_text(PLUGIN)
    plan = plan_of(gpt2_folder, plugin, grid=STREAM, metric=name)
    with pytest.raises(EngineError, match=f"metric {name}: gives .*") as found:
        table_of(plan, tmp_path)
    assert message in str(found.value)


@pytest.mark.parametrize("executor", ["suffix", "reference"])
def test_a_tail_is_patched_as_the_prompt_is(
    gpt2_folder: Path, tmp_path: Path, executor: str
) -> None:
    """Paths, where an answer's earlier tokens stand behind the prompt."""
    plan = plan_of(
        gpt2_folder,
        data={"pairs": [{**SEVERAL[0], "answer": SEVERAL[0]["answer"][0]}]},
        paths={
            "senders": {"component": HEAD, "layers": [0, 1], "positions": "prompt"},
            "receivers": [
                "logits",
                {"component": "mlp_input", "layers": 2, "positions": "prompt"},
            ],
        },
        metric="log_probability",
        run={"executor": executor},
    )
    table = table_of(plan, tmp_path)
    assert len(table) == 8
    model = load(gpt2_folder)
    pair = plan.pairs[0]
    assert pair.corrupted_ids is not None
    tail, last = pair.answer_ids[0][:-1], pair.answer_ids[0][-1]
    for row in table.to_dict("records"):
        receivers, _ = _ends(row["receiver"])
        logits = raw_paths.path_patch(
            model,
            "gpt2",
            pair.corrupted_ids + tail,
            pair.ids + tail,
            ("head", row["layer"], row["head"]),
            list(range(6)),
            receivers,
            None if receivers == "logits" else list(range(6)),
            freeze_mlps=False,
        ).log_softmax(-1)
        assert row["value"] == close(float(logits[-2, tail[0]] + logits[-1, last]))
