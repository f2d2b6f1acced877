"""The Python interface: the same as the commands, and an engine on a model at hand."""

from __future__ import annotations

import copy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import pandas as pd
import pytest
import torch
import yaml
from torch import Tensor, nn

import interv
from interv.engine import (
    Edit,
    Executor,
    Inputs,
    ReferenceExecutor,
    Run,
    Site,
    SuffixExecutor,
    Vanilla,
    Zero,
)
from interv.errors import EngineError, IntervError, ModelError, SpecError, UsageError
from interv.plan import CollectPlan, Plan
from interv.runner.collect import Activations
from tests import zoo
from tests.conftest import PROMPT, Result

Cli = Callable[..., Result]
Kind = Literal["auto", "suffix", "reference"]


def trace(folder: Path) -> dict[str, Any]:
    return {
        "kind": "trace",
        "name": "mine",
        "model": {"path": str(folder)},
        "data": {
            "facts": [{"prompt": PROMPT, "subject": "The Space Needle", "answer": "Seattle"}],
            "keep": "all",
        },
        "corrupt": {"type": "noise", "level": 1.0, "samples": 2},
        "grid": {"component": "block_output", "layers": [0, 1]},
        "run": {"threads": 1},
    }


def collect(folder: Path) -> dict[str, Any]:
    return {
        "kind": "collect",
        "name": "states",
        "model": {"path": str(folder)},
        "data": {"prompts": [PROMPT, "Paris Rome"]},
        "grid": {"component": "block_output"},
        "positions": "last",
        "run": {"threads": 1},
    }


def file_of(spec: dict[str, Any], folder: Path) -> Path:
    path = folder / f"{spec['name']}.yaml"
    path.write_text(yaml.safe_dump(spec, sort_keys=False))
    return path


# Specs.


@pytest.mark.parametrize("make", [trace, collect])
def test_a_mapping_a_file_and_its_name_are_one_plan(
    make: Callable[[Path], dict[str, Any]], gpt2_folder: Path, tmp_path: Path
) -> None:
    spec = make(gpt2_folder)
    before = copy.deepcopy(spec)
    path = file_of(spec, tmp_path)
    plans = [interv.load(spec), interv.load(path), interv.load(str(path))]
    assert all(isinstance(plan, Plan if make is trace else CollectPlan) for plan in plans)
    assert len({plan.identity for plan in plans}) == 1 and plans[0].identity
    other = interv.load(spec, "grid.layers=2")
    assert other.identity != plans[0].identity
    assert other.identity == interv.load(path, "grid.layers=2").identity
    assert spec == before
    assert sorted(tmp_path.iterdir()) == [path], "loading wrote something"


def test_paths_of_a_mapping_are_from_here(
    gpt2_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("texts.jsonl").write_text('{"prompt": "Paris Rome"}\n')
    spec = {**collect(gpt2_folder), "data": {"file": "texts.jsonl"}}
    plan = interv.load(spec)
    assert isinstance(plan, CollectPlan)
    assert [text.text for text in plan.texts] == ["Paris Rome"]


@pytest.mark.parametrize(
    ("change", "overrides", "kind", "text"),
    [
        ({"kind": "tarce"}, (), SpecError, "mean 'trace'"),
        ({"kind": None}, (), SpecError, "'kind' is missing"),
        ({"grid": {"component": "blok_output"}}, (), SpecError, "mean 'block_output'"),
        ({"sede": 1}, (), SpecError, "unknown key 'sede'"),
        ({"model": {"path": "/nowhere"}}, (), SpecError, "neither a folder nor a file"),
        ({}, ("seed",), UsageError, "key=value"),
        ({}, ("seed=x",), SpecError, "command line:1:6"),
    ],
)
def test_what_is_wrong_with_a_mapping(
    change: dict[str, Any], overrides: tuple[str, ...], kind: type[IntervError], text: str,
    gpt2_folder: Path, tmp_path: Path,
) -> None:  # fmt: skip
    spec = {k: v for k, v in {**trace(gpt2_folder), **change}.items() if v is not None}
    for do in (interv.load, lambda *a: interv.run(*a, outputs=tmp_path / "outputs")):
        with pytest.raises(kind) as error:
            do(spec, *overrides)
        assert text in str(error.value)
        assert isinstance(error.value, IntervError)
    assert not (tmp_path / "outputs").exists()


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no such file"):
        interv.load(tmp_path / "nowhere.yaml")


def test_a_model_without_weights(gpt2_folder: Path, tmp_path: Path) -> None:
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((gpt2_folder / name).read_bytes())
    plan = interv.load(trace(tmp_path))
    assert plan.identity is None
    with pytest.raises(ModelError, match=r"has neither model\.safetensors nor"):
        interv.run(trace(tmp_path), outputs=tmp_path / "outputs")
    assert not (tmp_path / "outputs").exists()


# Runs.


def test_a_trace_gives_tables(gpt2_folder: Path, tmp_path: Path, cli: Cli) -> None:
    spec = trace(gpt2_folder)
    done = interv.run(spec, outputs=tmp_path / "outputs")
    assert isinstance(done, interv.Results)
    assert done.folder.parent == tmp_path / "outputs" / "mine"
    n_positions = len(done.results["pos"].unique())
    assert len(done.results) == len(done.summary) == 2 * n_positions
    assert list(done.prompts["traced"]) == [True]
    assert (done.verdicts, done.record["points"]) == ([], 2 * n_positions)
    # What the command made of the same file.
    result = cli("trace", file_of(spec, tmp_path), "-o", tmp_path / "theirs", "--quiet")
    theirs = Path(result.out.strip())
    assert theirs.name == done.folder.name
    for name in ("results.csv", "summary.csv", "prompts.csv"):
        assert (theirs / name).read_bytes() == (done.folder / name).read_bytes()
    saved = pd.read_csv(theirs / "results.csv", keep_default_na=False)
    assert list(saved["value"]) == pytest.approx(list(done.results["value"]))


def test_run_again_it_gives_the_same_without_the_model(
    gpt2_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = trace(gpt2_folder)
    one = interv.run(spec, outputs=tmp_path)

    def refuse(*_args: object) -> None:
        raise AssertionError("the model was loaded")

    monkeypatch.setattr("interv.runner.sweep.load_model", refuse)
    other = interv.run(spec, outputs=tmp_path)
    assert isinstance(one, interv.Results) and isinstance(other, interv.Results)
    for name in ("results", "summary", "prompts"):
        pd.testing.assert_frame_equal(getattr(one, name), getattr(other, name))
    assert (one.folder, one.record) == (other.folder, other.record)
    with pytest.raises(AssertionError, match="the model was loaded"):
        interv.run(spec, outputs=tmp_path, fresh=True)


def test_fresh_begins_again(gpt2_folder: Path, tmp_path: Path) -> None:
    spec = trace(gpt2_folder)
    one = interv.run(spec, outputs=tmp_path)
    other = interv.run(spec, outputs=tmp_path, fresh=True)
    assert isinstance(one, interv.Results) and isinstance(other, interv.Results)
    assert one.folder == other.folder
    assert one.folder.with_name(f"{one.folder.name}-old-1").is_dir()
    pd.testing.assert_frame_equal(one.results, other.results)


def test_overrides_are_those_of_the_command_line(gpt2_folder: Path, tmp_path: Path) -> None:
    done = interv.run(trace(gpt2_folder), "grid.layers=2", "metric=logit", outputs=tmp_path)
    assert isinstance(done, interv.Results)
    assert set(done.results["layer"]) == {2}
    assert set(done.results["metric"]) == {"logit"}


def test_a_missed_claim_is_a_verdict_not_an_error(gpt2_folder: Path, tmp_path: Path) -> None:
    claim = {"claim": "too much", "where": {"component": "block_output", "layer": 0, "pos": 0},
             "of": "clean", "between": [2, 3], "source": "none"}  # fmt: skip
    done = interv.run({**trace(gpt2_folder), "reference": [claim]}, outputs=tmp_path)
    assert isinstance(done, interv.Results)
    assert [(v.claim, v.holds, v.fails_run) for v in done.verdicts] == [("too much", False, True)]


def test_collected_states(gpt2_folder: Path, tmp_path: Path) -> None:
    spec = collect(gpt2_folder)
    one = interv.run(spec, outputs=tmp_path)
    assert isinstance(one, Activations)
    assert one.folder.parent == tmp_path / "states"
    assert one.names == [f"block_output.{layer}" for layer in range(3)]
    assert one.tensor("block_output", 2).shape == (2, 24)
    other = interv.run(file_of(spec, tmp_path), outputs=str(tmp_path))
    assert isinstance(other, Activations) and other == one
    pd.testing.assert_frame_equal(other.index, one.index)
    later = interv.run(spec, "data.limit=1", outputs=tmp_path)
    assert isinstance(later, Activations) and later.folder != one.folder
    assert len(later.index) == 1


def test_nothing_is_printed(
    gpt2_folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    interv.run(trace(gpt2_folder), outputs=tmp_path)
    interv.run(collect(gpt2_folder), outputs=tmp_path)
    assert capfd.readouterr() == ("", "")


def test_importing_is_light() -> None:
    code = (
        "import interv, sys; heavy = {'torch', 'transformers', 'pydantic', 'pandas', 'typer', "
        "'numpy', 'yaml'} & set(sys.modules); assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_loading_needs_no_torch(gpt2_folder: Path, tmp_path: Path) -> None:
    paths = [file_of(make(gpt2_folder), tmp_path) for make in (trace, collect)]
    code = (
        "import interv, sys\n"
        "for path in sys.argv[1:]: assert interv.load(path).identity\n"
        "heavy = {'torch', 'transformers', 'pandas', 'matplotlib'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code, *map(str, paths)], check=True)


# The engine on a model at hand.


class Net(nn.Module):
    """Somebody's own, with a `config` of its own as nanoGPT has it."""

    def __init__(self) -> None:
        super().__init__()
        self.config = {"width": 5}
        self.first, self.second = nn.Linear(4, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.second(torch.relu(self.first(x)))
        return out


def net() -> Net:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Net()


def runs(component: str = "block_output") -> list[Run]:
    source = Run(tuple(zoo.ids(1)))
    return [
        Run(tuple(zoo.ids(0)), (Edit(Site(component, layer, (3,)), Vanilla(), source),))
        for layer in range(zoo.LAYERS)
    ]


@pytest.mark.parametrize("name", ["gpt2", "llama", "falcon", "mamba", "bert", "stablelm"])
def test_suffix_is_chosen_and_gives_what_the_reference_gives(name: str) -> None:
    model = zoo.make(name)
    fast, slow = interv.executor(model), interv.executor(model, "reference")
    assert isinstance(fast, SuffixExecutor) and isinstance(slow, ReferenceExecutor)
    expected = slow.logits(runs(), at=(-1, 3))
    plain = slow.logits([Run(tuple(zoo.ids(0)))], at=(-1, 3))
    assert all((row - plain[0]).abs().max() > 1e-3 for row in expected)
    torch.testing.assert_close(fast.logits(runs(), at=(-1, 3)), expected, rtol=0, atol=1e-10)
    torch.testing.assert_close(
        interv.executor(model, max_tokens=8).logits(runs(), at=(-1, 3)), expected,
        rtol=0, atol=1e-10,
    )  # fmt: skip


def test_an_executor_gives_what_a_plain_hook_gives() -> None:
    model = zoo.make("gpt2")

    def zero(_module: nn.Module, _args: object, output: Tensor) -> Tensor:
        output = output.clone()
        output[:, 2] = 0
        return output

    handle = model.get_submodule("transformer.h.1.mlp").register_forward_hook(zero)
    with torch.no_grad():
        expected = model(torch.tensor([zoo.ids(0)])).logits[0, -1]
    handle.remove()
    run = Run(tuple(zoo.ids(0)), (Edit(Site("mlp_output", 1, (2,)), Zero()),))
    for kind in ("suffix", "reference"):
        found = interv.executor(model, kind).logits([run])[0, 0]  # type: ignore[arg-type]
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-11)


def test_any_module_has_the_reference() -> None:
    model = net()
    executor = interv.executor(model)
    assert isinstance(executor, ReferenceExecutor)
    x, y = torch.linspace(-1, 1, 4), torch.linspace(2, -1, 4)
    run = Run(Inputs(x), (Edit(Site("first.output"), Vanilla(), Run(Inputs(y))),))
    found = executor.logits([run, Run(Inputs(x))])
    with torch.no_grad():
        torch.testing.assert_close(found.reshape(2, -1), model(torch.stack([y, x])))


@pytest.mark.parametrize("model", [net, lambda: zoo.make("blip")], ids=["a net", "two towers"])
def test_suffix_where_there_is_no_one_sequence_of_blocks(model: Callable[[], nn.Module]) -> None:
    here = model()
    assert isinstance(interv.executor(here), ReferenceExecutor)
    with pytest.raises(EngineError, match="blocks in one plain sequence"):
        interv.executor(here, "suffix")


def test_a_users_hook_is_seen_to() -> None:
    model = zoo.make("gpt2")
    seen: list[int] = []

    def look(_module: nn.Module, _args: object, output: Tensor) -> None:
        seen.append(output.shape[1])

    handle = model.get_submodule("transformer.h.1.mlp").register_forward_hook(look)
    executor = interv.executor(model)
    assert isinstance(executor, ReferenceExecutor)
    found = executor.logits(runs())
    assert seen and set(seen) == {7}, "the hook saw every token of every forward"
    with pytest.raises(EngineError, match=r"transformer\.h\.1\.mlp has hooks of somebody else's"):
        interv.executor(model, "suffix")
    handle.remove()
    fast = interv.executor(model)
    assert isinstance(fast, SuffixExecutor)
    torch.testing.assert_close(fast.logits(runs()), found, rtol=0, atol=1e-10)


@pytest.mark.parametrize("kind", ["auto", "reference"])
def test_the_model_is_left_as_it_was_found(kind: Kind) -> None:
    model = zoo.make("llama").train()
    model.requires_grad_(True)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
    implementation = model.config._attn_implementation
    executor: Executor = interv.executor(model, kind)
    assert not executor.logits(runs()).requires_grad
    assert all(module.training for module in model.modules())
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert hooks == sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
    assert model.config._attn_implementation == implementation
    assert not any("forward" in vars(module) for module in model.modules())


def test_an_executor_that_there_is_not() -> None:
    with pytest.raises(UsageError, match="no executor 'refrence'; expected auto, suffix"):
        interv.executor(zoo.make("gpt2"), "refrence")  # type: ignore[arg-type]


def test_a_model_that_the_suffix_executor_does_not_fit_is_refused() -> None:
    """Its blocks look at more than what passes between them, so that a suffix is not enough."""
    model = zoo.make("gpt2")
    mlp = model.get_submodule("transformer.h.2.mlp")
    plain = mlp.forward

    def averaging(states: Tensor) -> Tensor:
        out: Tensor = plain(states) + states.mean(1, keepdim=True)
        return out

    mlp.forward = averaging  # type: ignore[method-assign]
    with pytest.raises(EngineError, match="not certified on this model"):
        interv.executor(model)
    assert isinstance(interv.executor(model, "reference"), ReferenceExecutor)


def test_a_place_that_is_not_there() -> None:
    executor = interv.executor(zoo.make("gpt2"))
    with pytest.raises(EngineError, match="did you mean 'block_output'"):
        executor.logits(runs("blok_output"))
