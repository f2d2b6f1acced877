"""`interv train-das` under attack: what crashed, what was left out, what was told wrongly."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from interv.engine.adapters import Adapter
from interv.engine.batch import BatchRunner
from interv.engine.dictionaries import ReluDictionary
from interv.engine.masks import Boundary, Mask
from interv.engine.rotations import Rotation
from interv.errors import ResumeError, UsageError
from interv.keep import read
from interv.plan import make_train_plan
from interv.runner.train import load
from interv.spec import load_spec
from interv.spec.causal import CausalSection
from interv.task.causal import build
from interv.task.causal_pairs import interchanges
from interv.task.exchanges import Exchange, Said
from interv.train.data import groups_of
from interv.train.fit import Intervening, prepare
from interv.train.loop import State, _read, train
from interv.train.loop import save as save_checkpoint
from interv.train.parts import FitPart
from tests.conftest import Result
from tests.test_das import SPEC, run_of, units, write

CHOOSING: dict[str, Any] = {
    "kind": "train-das",
    "name": "choosing",
    "model": {
        "kind": "transformer",
        "config": {
            "model_type": "llama",
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "intermediate_size": 64,
            "max_position_embeddings": 64,
        },
        "train": {"steps": 20, "examples": 500, "min_accuracy": 0},
    },
    "causal_model": {
        "variables": {
            "a": ["red", "blue", "green"],
            "b": ["red", "blue", "green"],
            "first": [True, False],
            "word": {"table": {"true": "one", "false": "two"}, "of": "first"},
            "chosen": "a if first else b",
        },
        "output": "chosen",
        "templates": [
            "x {a} y {b} get {word} :",
            "we see now {a} then {b} so take {word} :",
        ],
    },
    "variables": "first",
    "data": {
        "train": 40,
        "validation": 10,
        "test": 20,
        "min_accuracy": 0,
        "keep": "all",
        "same_template": False,
    },
    "intervention": {"type": "low_rank_rotated_space", "rank": 2},
    "grid": {"component": "block_output", "layers": 0, "positions": "word"},
    "train": {"epochs": 1, "batch": 16, "lr": 0.01},
    "controls": {"shuffled": False},
    "figures": {"formats": ["png"], "dpi": 40},
    "run": {"threads": 1},
}
TYPES = [
    "rotated_space",
    "low_rank_rotated_space",
    "boundless_rotated_space",
    "sigmoid_mask",
    "sigmoid_mask_rotated_space",
    "autoencoder",
    "lora",
]
SITES = {
    "one": {"component": "block_output", "layers": 0, "positions": "word"},
    "heads": {
        "component": "head_attention_value_output",
        "layers": 1,
        "positions": "END",
        "heads": [1, 3],
        "dims": "2-6",
    },
    "linked": {
        "component": "block_output",
        "layers": [0, 1],
        "positions": ["word", "END"],
        "together": True,
        "linked": True,
        "name": "all",
    },
    "whole": {"component": "mlp_activation", "layers": 1, "positions": "whole"},
}
RANDOM = {"kind": "mlp", "hidden": [8, 8], "weights": "random"}
ANY = {"min_accuracy": 0, "keep": "all", "train": 300, "validation": 50, "test": 90}


# Gradients: every type against a full model that knows nothing of interv


def turned(rotation: Rotation) -> Tensor:
    q, r = torch.linalg.qr(rotation.free)
    turned: Tensor = q * torch.sign(torch.diagonal(r))
    return turned


def by_hand(made: Any, b: Tensor, s: Tensor) -> Any:
    """What an intervention makes of base and source, from its parameters alone."""
    if made.name in ("rotated_space", "low_rank_rotated_space"):
        basis = turned(made.rotation)[:, list(made.dims)]
        return b - b @ basis @ basis.T + s @ basis @ basis.T
    if made.name == "autoencoder":
        of = made.dictionary

        def encode(x: Tensor) -> Tensor:
            return torch.relu((x - of.decoder_bias) @ of.encoder + of.encoder_bias)

        return b + (encode(s) - encode(b)) @ of.decoder
    if made.name == "lora":
        of = made.adapter
        return b + of.alpha / of.down.shape[1] * (b @ of.down) @ of.up
    if made.name == "boundless_rotated_space":
        of = made.boundary
        at = torch.arange(of.width)
        gate = torch.sigmoid(at / of.temperature) * torch.sigmoid(
            (of.boundary * of.width - at) / of.temperature
        )
    else:
        gate = torch.sigmoid(made.mask.mask / made.mask.temperature)
    if made.name == "sigmoid_mask":
        return (1 - gate) * b + gate * s
    basis = turned(made.rotation)
    return ((1 - gate) * (b @ basis) + gate * (s @ basis)) @ basis.T


def hooked(model: Any, part: FitPart, act: Callable[[Tensor], Tensor]) -> Any:
    """A hook on what stands at a part's component, `[1, pos, width]`."""
    block = model.model.layers[part.site.layer]
    if part.site.component == "block_output":

        def after(_module: Any, _args: Any, out: Any) -> Any:
            return (act(out[0]), *out[1:]) if isinstance(out, tuple) else act(out)

        return block.register_forward_hook(after)
    module = block.mlp.down_proj if "mlp" in part.site.component else block.self_attn.o_proj
    return module.register_forward_pre_hook(lambda _module, args: (act(args[0]), *args[1:]))


def at(part: FitPart, said: Said, width: int) -> tuple[list[int], list[int]]:
    """Positions and columns of a part."""
    unit, heads = part.site.unit, part.site.heads
    positions = list(range(len(said.ids)))
    if isinstance(unit, str):
        positions = [said.spans[unit][-1]]
    if heads is None:
        return positions, list(range(width))
    assert part.site.dims is not None
    return positions, [h * width // 4 + c for h in heads for c in part.site.dims]


def full_model(model: Any, parts: list[FitPart], names: list[str], exchange: Exchange) -> Tensor:
    """Logits after a base whose sites have the source's parts, a full forward each."""
    edits = []
    for part in parts:
        if names[part.variable] not in exchange.exchanged:
            continue
        source = exchange.sources[part.variable]
        seen: list[Tensor] = []

        def look(value: Tensor, seen: list[Tensor] = seen) -> Tensor:
            seen.append(value[0])
            return value

        handle = hooked(model, part, look)
        with torch.no_grad():
            model(torch.tensor([source.ids]))
        handle.remove()
        positions, columns = at(part, source, seen[0].shape[-1])
        edits.append((part, seen[0][positions][:, columns]))
    handles = []
    for part, state in edits:

        def act(value: Tensor, part: FitPart = part, state: Tensor = state) -> Tensor:
            positions, columns = at(part, exchange.base, value.shape[-1])
            rows = value[0].clone()
            some = rows[positions]
            some[:, columns] = by_hand(part.intervention, some[:, columns], state)
            rows[positions] = some
            return rows[None]

        handles.append(hooked(model, part, act))
    logits: Tensor = model(torch.tensor([exchange.base.ids])).logits[0, -1]
    for handle in handles:
        handle.remove()
    return logits


@pytest.mark.parametrize("several", [False, True], ids=["one variable", "two variables"])
@pytest.mark.parametrize("where", SITES)
def test_gradients_are_a_full_models(where: str, several: bool, tmp_path: Path) -> None:
    data = {**CHOOSING["data"], "same_template": where == "whole"}
    if several:
        data["mixture"] = {"first": 1, "a": 1, "a+first": 2}
    path = write(
        tmp_path,
        **{
            **CHOOSING,
            "variables": ["first", "a"] if several else "first",
            "data": data,
            "intervention": {"type": TYPES, "rank": 2, "dictionary": {"latents": 30}},
            "grid": SITES[where],
        },
    )
    plan = make_train_plan(load_spec(path, kind="train-das"))
    loaded = load(plan)
    model = loaded.module.double()
    runner = BatchRunner(model, loaded.anatomy)
    pairs = [e for e in plan.exchanges if e.split == "train"]
    budgets = {2**30: (True, True), 1: (False, False)}
    for fit, budget in itertools.product(plan.fits, budgets):
        split = prepare(runner, groups_of(plan, "train"), fit, budget)
        assert all(prepared.keeps == budgets[budget] for prepared in split.groups)
        trainee = Intervening(plan.spec, fit, runner, split, split, None, 0)
        trainee.modules.double()
        generator = torch.Generator().manual_seed(0)
        for module in trainee.modules.children():
            assert isinstance(module, Rotation | Boundary | Mask | ReluDictionary | Adapter)
            if isinstance(module, Mask):
                module.mask.data.normal_(generator=generator)
            if isinstance(module, Adapter):
                module.up.data.normal_(generator=generator)
        trainee.temper(1.5)
        found = trainee.loss(torch.arange(len(split)))
        parameters = list(trainee.modules.parameters())
        gradients = torch.autograd.grad(found, parameters)
        wanted = torch.zeros(())
        for exchange in pairs:
            logits = full_model(model, trainee.parts, plan.spec.variables, exchange)
            label = torch.tensor(exchange.label_id)
            wanted = wanted + nn.functional.cross_entropy(logits, label)
        assert float(found.detach()) == pytest.approx(float(wanted.detach()), rel=1e-7)
        for one, other in zip(gradients, torch.autograd.grad(wanted, parameters), strict=True):
            assert float(one.abs().max()) > 0, fit.type
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5 * float(other.abs().max()))


def test_the_loss_of_boundless_das_has_the_sum_of_its_boundaries(tmp_path: Path) -> None:
    # As in pyvene's Boundless_DAS notebook: cross-entropy, a mean over the batch, plus
    # 1.0 * intervention_boundaries.sum().
    options = {"type": "boundless_rotated_space", "penalty": 1.0}
    path = write(tmp_path, **{**CHOOSING, "variables": ["first", "a"], "intervention": options})
    plan = make_train_plan(load_spec(path, kind="train-das"))
    loaded = load(plan)
    model = loaded.module.double()
    runner = BatchRunner(model, loaded.anatomy)
    [fit] = plan.fits
    split = prepare(runner, groups_of(plan, "train"), fit, 2**30)
    trainee = Intervening(plan.spec, fit, runner, split, split, None, 0)
    trainee.modules.double()
    boundaries = [part.intervention.boundary for part in trainee.parts]
    for boundary, value in zip(boundaries, (0.3, 0.7), strict=True):
        boundary.boundary.data.fill_(value)
    trainee.temper(1.5)
    parameters = list(trainee.modules.parameters())
    found = trainee.loss(torch.arange(len(split))) / len(split)
    wanted = sum((boundary.boundary for boundary in boundaries), torch.zeros(()))
    pairs = [e for e in plan.exchanges if e.split == "train"]
    for exchange in pairs:
        logits = full_model(model, trainee.parts, plan.spec.variables, exchange)
        label = torch.tensor(exchange.label_id)
        wanted = wanted + nn.functional.cross_entropy(logits, label) / len(pairs)
    assert float(found.detach()) == pytest.approx(float(wanted.detach()), rel=1e-7)
    gradients = torch.autograd.grad(found, parameters)
    for one, other in zip(gradients, torch.autograd.grad(wanted, parameters), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-9)


def test_labels_and_positions_of_two_templates(tmp_path: Path) -> None:
    path = write(tmp_path, **{**CHOOSING, "variables": ["first", "a"]})
    plan = make_train_plan(load_spec(path, kind="train-das"))

    def meant(said: Said) -> tuple[str, str, bool]:
        words = said.text.split(" ")
        short = words[0] == "x"
        a, b, which = (1, 3, 5) if short else (3, 5, 8)
        assert said.spans["word"] == (which,)
        return words[a], words[b], words[which] == "one"

    assert {len(e.base.ids) != len(e.sources[0].ids) for e in plan.exchanges} == {True, False}
    for exchange in plan.exchanges:
        a, b, first = meant(exchange.base)
        assert exchange.base.answer == f" {a if first else b}"
        if "first" in exchange.exchanged:
            _, _, first = meant(exchange.sources[0])
        if "a" in exchange.exchanged:
            a, _, _ = meant(exchange.sources[1])
        assert exchange.label == f" {a if first else b}"


# What crashed, or was left out in silence


def test_types_are_compared_at_one_site(tmp_path: Path, cli: Callable[..., Result]) -> None:
    kinds = ["rotated_space", "sigmoid_mask", "lora"]
    grid = [
        {"component": "block_output", "layers": 0},
        {"component": "block_output", "layers": 0, "together": True, "name": "whole"},
    ]
    path = write(tmp_path, variables="WX", intervention={"type": kinds, "rank": [1, 2]}, grid=grid)
    done = cli("train-das", path, "-o", tmp_path / "out")
    frame = pd.read_csv(run_of(done) / "figures" / "iia.csv")
    labels = frame.loc[frame["metric"] == "iia", "label"]
    assert len(labels) == len(set(labels)) == 10
    assert "whole rank 2, lora" in set(labels)
    assert "sigmoid mask" in done.err


@pytest.mark.parametrize("mixture", [{"YZ+WX": 1, "WX": 1}, {" WX + YZ ": 1, "WX": 1}])
def test_a_part_of_the_mixture_in_any_order(
    mixture: dict[str, float], tmp_path: Path, cli: Callable[..., Result]
) -> None:
    path = write(tmp_path, data={**SPEC["data"], "mixture": mixture})
    folder = run_of(cli("train-das", path, "-o", tmp_path / "out", "-q"))
    results = pd.read_csv(folder / "results.csv")
    counts = results[results["metric"] == "iia"].set_index("exchanged")["n"]
    assert counts.to_dict() == {"any": 200, "WX+YZ": 100, "WX": 100}


def test_an_mlp_in_float64(tmp_path: Path, cli: Callable[..., Result]) -> None:
    path = write(tmp_path, model={**SPEC["model"], "dtype": "float64"})
    run_of(cli("train-das", path, "-o", tmp_path / "out", "-q"))


def test_a_batch_without_a_pair_that_is_taught(tmp_path: Path, cli: Callable[..., Result]) -> None:
    path = write(
        tmp_path,
        model=RANDOM,
        data={**ANY, "train": 20},
        intervention="vanilla",
        grid={"name": "units", "set": units("0-3", "4-7")},
        train={"what": "model", "epochs": 1, "batch": 1, "exchange": ["YZ + WX"]},
    )
    run_of(cli("train-das", path, "-o", tmp_path / "out", "-q"))


def bad() -> Iterator[tuple[dict[str, Any], str]]:
    """Changes of a spec that are mistakes, and what is said."""
    site = {"component": "block_output", "layer": 0}
    model = {"what": "model"}
    for key in ("lr", "clip", "weight_decay", "task_weight"):
        yield {"train": {key: float("inf")}}, f"train.{key}: got inf"
    yield {"train": {"lr": 1e38}}, "at most 1e30"
    yield {"intervention": {"type": "lora", "alpha": float("inf")}}, "got inf"
    yield {"intervention": {"type": "sigmoid_mask", "penalty": float("inf")}}, "got inf"
    mask = {"type": "sigmoid_mask", "temperature": [float("inf"), 1]}
    yield {"intervention": mask}, "temperature.0: got inf"
    yield {"data": {"mixture": {"WX": float("inf")}}}, "data.mixture.WX: got inf"
    yield {"data": {"mixture": {"WX+WX": 1}}}, "'WX+WX' is there twice"
    yield {"data": {"test": 10**12}}, "data.test: 1000000000000 pairs"
    twice = [{"component": "block_output", "layers": 0, "dims": d} for d in ("0-3", "4-7")]
    yield {"grid": twice, "variables": "WX"}, "the same place as before"
    yield {"grid": {"name": "s", "set": [site, site]}}, "a site is there twice"
    yield {"grid": {"name": "s", "set": [{**site, "variable": "WX"}]}}, "no site of variable 'YZ'"
    yield {"grid": {**SPEC["grid"], "positions": [3]}}, "vectors have no positions"
    yield {"grid": {"name": "s", "set": [{**site, "position": 1}]}}, "vectors have no positions"
    yield {"intervention": {"type": "sigmoid_mask", "by_head": True}}, "which is not by head"
    wide = {"component": "block_output", "together": True, "linked": True, "name": "s"}
    unequal = {**RANDOM, "hidden": [8, 16]}
    yield {"model": unequal, "grid": wide}, "linked sites that are 8 and 16 wide"
    yield {"train": {"exchange": ["WX"]}}, "what: model"
    yield {"intervention": "vanilla", "train": {**model, "exchange": ["WXX"]}}, "'WXX' is no part"
    yield {"intervention": "vanilla", "train": {**model, "exchange": []}}, "no part of the mixture"
    path = {"type": "autoencoder", "dictionary": {"path": "none.safetensors"}}
    yield {"intervention": path, "train": None}, "No such file"


@pytest.mark.parametrize(("changes", "message"), list(bad()))
def test_mistakes_have_a_place(
    changes: dict[str, Any], message: str, tmp_path: Path, cli: Callable[..., Result]
) -> None:
    done = cli("train-das", write(tmp_path, **changes), "-o", tmp_path / "out", "-q")
    assert done.code == 2, done.err
    assert message in done.err
    assert "das.yaml:" in done.err


def test_all_positions_of_prompts_of_two_lengths(
    tmp_path: Path, cli: Callable[..., Result]
) -> None:
    path = write(tmp_path, **{**CHOOSING, "grid": SITES["whole"]})
    done = cli("train-das", path, "-o", tmp_path / "out", "-q")
    assert done.code == 2
    assert "whose source has others" in done.err


FEW = {
    "variables": {
        "a": ["red", "blue", "green"],
        "b": ["one", "two"],
        "same": {"table": {"red": "x", "blue": "y", "green": "z"}, "of": "a"},
    },
    "output": "same",
    "templates": ["{b} of {a} is", "{b} and {a} is"],
}


def test_no_test_pair_is_a_training_pair(tmp_path: Path, cli: Callable[..., Result]) -> None:
    # 3 x 2 values, the label another one: 6 * 4 = 24 pairs in each of 2 templates.
    data = {**CHOOSING["data"], "train": 100, "validation": 12, "test": 50, "changed": 1}
    data["same_template"] = True
    grid = {**CHOOSING["grid"], "positions": "END"}
    path = write(
        tmp_path, **{**CHOOSING, "causal_model": FEW, "variables": "a", "data": data, "grid": grid}
    )
    told = cli("plan", path, "-o", tmp_path / "out")
    # 48 pairs, dealt as 100 : 12 : 50.
    assert "100 train, 3 validation, 15 test" in told.out
    assert "test: 15 of 50 pairs: there are 48 distinct ones, each in one split" in told.out
    done = cli("train-das", path, "-o", tmp_path / "out")
    folder = run_of(done)
    assert "test: 15 of 50 pairs" in done.err
    prompts = pd.read_csv(folder / "prompts.csv", keep_default_na=False)
    assert (prompts["source_a"] != "").all()
    pairs = {
        split: some[["base", "source_a"]].agg(tuple, axis=1).tolist()
        for split, some in prompts.groupby("split")
    }
    assert {split: len(set(some)) for split, some in pairs.items()} == {
        "train": 30, "validation": 3, "test": 15
    }  # fmt: skip
    assert len({pair for some in pairs.values() for pair in some}) == 30 + 3 + 15 == 48
    often = pd.Series(pairs["train"]).value_counts()
    assert set(often) == {100 // 30, 100 // 30 + 1}
    results = pd.read_csv(folder / "results.csv")
    assert set(results["n"]) == {15}
    record = json.loads((folder / "run.json").read_text())
    assert record["test_pairs_seen_in_training"] == 0
    assert record["distinct_pairs"] == {"train": 30, "validation": 3, "test": 15}


@pytest.mark.parametrize("held_out", ["pairs", "values"])
def test_finite_vectors_are_split_too(
    held_out: str, tmp_path: Path, cli: Callable[..., Result]
) -> None:
    vector = {"vector": 2, "entities": 7}
    causal = {"variables": {"w": vector, "x": vector, "same": "w == x"}, "output": "same"}
    path = write(
        tmp_path,
        model={"kind": "mlp", "hidden": [8], "weights": "random"},
        causal_model=causal,
        variables="w",
        data={**ANY, "train": 900, "held_out": held_out},
    )
    plan = make_train_plan(load_spec(path, kind="train-das"))

    def seen(split: str) -> set[tuple[int, ...]]:
        made = plan.vectors[split]
        [source] = made.sources
        columns = (made.base["w"], made.base["x"], source["w"], source["x"])
        return set(zip(*(column.tolist() for column in columns), strict=True))

    train, validation, test = map(seen, ("train", "validation", "test"))
    assert not train & test and not train & validation and not validation & test
    assert len(test) == len(plan.vectors["test"]) and len(plan.vectors["train"]) == 900
    if held_out == "values":
        values = [{v for pair in some for v in (pair[0], pair[2])} for some in (train, test)]
        assert not values[0] & values[1]
    folder = run_of(cli("train-das", path, "-o", tmp_path / "out", "-q"))
    record = json.loads((folder / "run.json").read_text())
    assert record["test_pairs_seen_in_training"] == 0
    distinct = {"train": len(train), "validation": len(validation), "test": len(test)}
    assert record["distinct_pairs"] == distinct


def test_values_that_are_held_out(tmp_path: Path, cli: Callable[..., Result]) -> None:
    words = ["red", "blue", "green", "black", "white", "pink", "brown", "gray"]
    causal = {
        "variables": {"a": words, "b": ["one", "two"], "o": "a"},
        "output": "o",
        "templates": ["{b} of {a} is"],
    }
    data = {**CHOOSING["data"], "held_out": "values", "changed": 1, "same_template": True}
    changes = {"causal_model": causal, "variables": "a", "data": data}
    changes["grid"] = {**CHOOSING["grid"], "positions": "END"}
    plan = make_train_plan(load_spec(write(tmp_path, **{**CHOOSING, **changes})))
    found: dict[str, set[str]] = {}
    for pair in plan.exchanges:
        both = (pair.base, *pair.sources)
        found.setdefault(pair.split, set()).update(said.text.split(" ")[2] for said in both)
    assert sum(map(len, found.values())) == len(set().union(*found.values())) == 8
    assert all(len(values) >= 2 for values in found.values())
    few = {**causal, "variables": {**causal["variables"], "a": words[:5]}}
    done = cli("validate", write(tmp_path, **{**CHOOSING, **changes, "causal_model": few}))
    assert done.code == 2
    assert "'a' has 5 values, which held_out: values deals to train, validation, test" in done.err


def test_too_few_pairs_for_three_splits(tmp_path: Path, cli: Callable[..., Result]) -> None:
    causal = {
        "variables": {"a": ["red", "blue"], "o": "a"},
        "output": "o",
        "templates": ["{a} is"],
    }
    data = {**CHOOSING["data"], "changed": 1, "same_template": True}
    changes = {"causal_model": causal, "variables": "a", "data": data}
    done = cli("validate", write(tmp_path, **{**CHOOSING, **changes}))
    assert done.code == 2
    assert "2 distinct pairs whose label changes, with a exchanged: too few" in done.err


# Fits that other runs have


def test_a_grid_that_grows_keeps_its_fits_and_their_controls(
    tmp_path: Path, cli: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(layers: list[int], **controls: bool) -> Path:
        grid = {"component": "block_output", "layers": layers}
        path = write(tmp_path, model=RANDOM, data=ANY, grid=grid, controls=controls)
        return run_of(cli("train-das", path, "-o", tmp_path / "out", "-q"))

    small = run([0], full=False, random=False)
    [fit] = (small / "fits").iterdir()
    trained: list[Any] = []

    def told(trainee: Any, *rest: Any) -> Any:
        trained.append(trainee)
        return train(trainee, *rest)

    monkeypatch.setattr("interv.runner.train.train", told)
    large = run([0, 1], full=False, random=False)
    assert len(trained) == 2, "a fit of the other layer, and its shuffled control"
    assert len(list((large / "fits").iterdir())) == 2
    for name in ("intervention.json", "intervention.safetensors"):
        assert (large / "fits" / fit.name / name).read_bytes() == (fit / name).read_bytes()
    assert cli("save", large, tmp_path / "kept", "--fit", fit.name).code == 0
    # A fit that was evaluated without a control is not one that was evaluated with it.
    whole = pd.read_csv(run([0, 1], full=True, random=True) / "results.csv")
    for metric in ("iia", "iia_full", "iia_random", "iia_shuffled"):
        assert set(whole.loc[whole["metric"] == metric, "layer"]) == {0, 1}, metric


def test_fits_whose_weights_are_gone_are_trained_again(
    tmp_path: Path, cli: Callable[..., Result]
) -> None:
    def run(layers: list[int]) -> Path:
        grid = {"component": "block_output", "layers": layers}
        path = write(tmp_path, model=RANDOM, data=ANY, grid=grid, controls={"shuffled": False})
        return run_of(cli("train-das", path, "-o", tmp_path / "out", "-q"))

    [fit] = (run([0]) / "fits").iterdir()
    weights = (fit / "intervention.safetensors").read_bytes()
    for file in fit.iterdir():
        file.unlink()
    fit.rmdir()
    again = run([0, 1]) / "fits" / fit.name
    assert (again / "intervention.safetensors").read_bytes() == weights


def test_a_dictionary_is_what_is_in_its_file(tmp_path: Path, cli: Callable[..., Result]) -> None:
    def save(seed: int) -> None:
        state = ReluDictionary.seeded(8, 20, seed).state_dict()
        save_file({k: v.contiguous() for k, v in state.items()}, tmp_path / "dict.safetensors")

    dictionary = {"path": "dict.safetensors"}  # beside the spec
    asked = {"type": "autoencoder", "dictionary": dictionary}
    path = write(tmp_path, intervention=asked, train=None)
    folders = set()
    for seed in (0, 1, 0):
        save(seed)
        folders.add(run_of(cli("train-das", path, "-o", tmp_path / "out", "-q")))
    assert len(folders) == 2
    save_file(
        {
            "encoder": torch.zeros(3),
            "encoder_bias": torch.zeros(20),
            "decoder": torch.zeros(20, 8),
            "decoder_bias": torch.zeros(8),
        },
        tmp_path / "dict.safetensors",
    )
    done = cli("train-das", path, "-o", tmp_path / "out", "-q")
    assert done.code == 2
    assert "encoder has the shape (3,)" in done.err


def test_what_is_saved_is_no_whole_state(tmp_path: Path, cli: Callable[..., Result]) -> None:
    kinds = {"type": ["vanilla", "low_rank_rotated_space"], "rank": 1}
    grid = {"name": "units", "set": units("0-3", "4-7")}
    folder = run_of(
        cli(
            "train-das",
            write(tmp_path, intervention=kinds, grid=grid),
            *("-o", tmp_path / "out", "-q"),
        )
    )
    results = pd.read_csv(folder / "results.csv").query("metric == 'iia' and exchanged == 'any'")
    assert results.set_index("type")["value"]["vanilla"] == results["value"].max() == 1
    assert cli("save", folder, tmp_path / "kept").code == 0
    names = {part.intervention.name for part in read(tmp_path / "kept").parts}
    assert names == {"low_rank_rotated_space"}


def test_pyvene_s_files_of_a_run_with_a_plug_in(tmp_path: Path, cli: Callable[..., Result]) -> None:
    plugin = tmp_path / "plug.py"
    plugin.write_text(
        "import interv\n\n\n@interv.function\ndef is_one(word):\n    return word == 'one'\n"
    )
    causal = CHOOSING["causal_model"]
    variables = {
        **causal["variables"],
        "word": ["one", "two"],
        "first": {"function": "is_one", "of": "word"},
    }
    path = write(tmp_path, **{**CHOOSING, "causal_model": {**causal, "variables": variables}})
    folder = run_of(cli("train-das", path, "-o", tmp_path / "out", "-q", "--plugin", plugin))
    kept = tmp_path / "kept"
    done = cli("save", folder, kept, "--pyvene", "--plugin", plugin)
    assert done.code == 0, done.err
    assert list(kept.glob("intkey_*.bin"))


@pytest.mark.parametrize("left", [0, 100, 1000])
def test_a_damaged_checkpoint(left: int, tmp_path: Path) -> None:
    module = nn.Linear(8, 8)
    path = tmp_path / "fit.checkpoint"
    save_checkpoint(path, module, torch.optim.Adam(module.parameters()), State(), None)
    path.write_bytes(path.read_bytes()[:left])
    with pytest.raises(ResumeError, match="damaged; delete it"):
        _read(path)


# Folders from elsewhere


def test_json_that_is_too_deep(tmp_path: Path) -> None:
    (tmp_path / "intervention.json").write_text("[" * 100_000)
    with pytest.raises(UsageError, match="not JSON"):
        read(tmp_path)


def test_what_is_loaded_does_not_steer_the_terminal(
    tmp_path: Path, cli: Callable[..., Result]
) -> None:
    folder = run_of(cli("train-das", write(tmp_path), "-o", tmp_path / "out", "-q"))
    [fit] = (folder / "fits").glob("*/intervention.json")
    told = json.loads(fit.read_text())
    told["parts"][0]["variable"] = "\x1b[2J"
    told["about"]["name"] = "\x1b]0;owned\x07"
    fit.write_text(json.dumps(told))
    done = cli("load", fit.parent)
    assert done.code == 0
    assert "\x1b" not in done.out


# Pairs


def test_a_rare_label_is_balanced() -> None:
    section = CausalSection.model_validate(
        {
            "variables": {"a": list(range(50)), "rare": "1 if a == 7 else 0", "out": "rare + 0"},
            "output": "out",
            "templates": ["{a} is"],
        }
    )
    made = interchanges(build(section, "rare"), ("rare",), 400, 0, balance=True)
    assert sorted(made.label.tolist()) == [0] * 200 + [1] * 200
    never = CausalSection.model_validate(
        {
            "variables": {"a": [0, 1], "same": "0 * a", "out": "same + 3"},
            "output": "out",
            "templates": ["{a} is"],
        }
    )
    few = interchanges(build(never, "never"), ("same",), 40, 0, balance=True)
    assert set(few.label.tolist()) == {3}
