"""`interv collect`: activations on disk are those that plain hooks see, and mistakes are told."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd
import pytest
import torch
import transformers
import yaml
from safetensors.torch import load_file
from torch import Tensor, nn

from interv.engine import Mean
from interv.errors import EngineError, UsageError
from interv.runner import collect as runner
from interv.runner.collect import Activations
from tests.conftest import Result, save_tokenizer, tiny_config

Cli = Callable[..., Result]
PROMPTS = [
    "The Space Needle is in downtown",
    "The Eiffel Tower is located in the city of",
    "Paris Rome Berlin",
]
WHOLE = {"spec.yaml", "resolved.yaml", "run.json", "index.csv", "journal.jsonl", ".lock"}


def write(folder: Path, path: Path, name: str = "collect.yaml", **sections: object) -> Path:
    """A small valid spec; keyword arguments replace its sections."""
    spec: dict[str, object] = {
        "kind": "collect",
        "model": {"path": str(path)},
        "data": {"prompts": PROMPTS},
        "grid": {"component": "block_output", "layers": [0, 2]},
        "positions": [0, -2, "last"],
        "run": {"threads": 1},
    }
    file = folder / name
    file.write_text(yaml.safe_dump(spec | sections, sort_keys=False))
    return file


def collected(cli: Cli, spec: Path, *arguments: object) -> Activations:
    result = cli("collect", spec, "-o", spec.parent / "outputs", "--quiet", *arguments)
    assert (result.code, result.err) == (0, "")
    return Activations(Path(result.out.strip()))


def load(folder: Path, dtype: torch.dtype = torch.float32) -> nn.Module:
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


def tokens(folder: Path, text: str) -> list[int]:
    from tokenizers import Tokenizer

    ids: list[int] = Tokenizer.from_file(str(folder / "tokenizer.json")).encode(text).ids
    return ids


def raw(model: nn.Module, ids: list[int], path: str, side: str) -> Tensor:
    """What passes one side of a module on one prompt `[pos, width]`."""
    kept: list[Tensor] = []

    def before(_module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
        kept.append((args or tuple(kwargs.values()))[0].clone())

    def after(_module: nn.Module, _args: object, output: Tensor | tuple[Tensor, ...]) -> None:
        kept.append((output[0] if isinstance(output, tuple) else output).clone())

    at = model.get_submodule(path)
    if side == "input":
        handle = at.register_forward_pre_hook(before, with_kwargs=True)
    else:
        handle = at.register_forward_hook(after)
    with torch.no_grad():
        model(torch.tensor([ids]))
    handle.remove()
    return kept[0].reshape(len(ids), -1)


# What is written.


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_every_value_is_what_a_plain_hook_sees(
    kind: str, request: pytest.FixtureRequest, cli: Cli, tmp_path: Path
) -> None:
    folder: Path = request.getfixturevalue(f"{kind}_folder")
    blocks = "transformer.h" if kind == "gpt2" else "model.layers"
    down = "mlp.c_proj" if kind == "gpt2" else "mlp.down_proj"
    project = "attn.c_proj" if kind == "gpt2" else "self_attn.o_proj"
    norm = "transformer.ln_f" if kind == "gpt2" else "model.norm"
    path = f"{blocks}[1].{down}.output"
    spec = write(
        tmp_path,
        folder,
        grid=[
            {"component": ["block_output", "mlp_activation"], "layers": "all"},
            {"component": "head_attention_value_output", "layers": "1-2"},
            {"component": "head_key_output", "layers": 1, "heads": [1, 0]},
            {"component": "head_query_output", "layers": 0, "heads": 1},
            {"component": ["final_norm", "logits", "token_embedding", path]},
        ],
    )  # fmt: skip
    saved = collected(cli, spec)
    n_heads, size = (2, 12) if kind == "gpt2" else (4, 6)
    places: dict[str, tuple[str, str]] = {
        "final_norm.0": (norm, "output"),
        "logits.0": ("lm_head", "output"),
        "token_embedding.0": ("transformer.wte" if kind == "gpt2" else "model.embed_tokens",
                              "output"),
        f"{path}.0": (f"{blocks}.1.{down}", "output"),
    }  # fmt: skip
    for layer in range(3):
        places[f"block_output.{layer}"] = (f"{blocks}.{layer}", "output")
        places[f"mlp_activation.{layer}"] = (f"{blocks}.{layer}.{down}", "input")
        if layer:
            name = f"head_attention_value_output.{layer}"
            places[name] = (f"{blocks}.{layer}.{project}", "input")
    special = {"head_key_output.1", "head_query_output.0"}
    assert set(saved.names) == {*places, *special}
    model = load(folder)
    rows = []
    for number, text in enumerate(PROMPTS):
        ids = tokens(folder, text)
        rows += [(number, p, ids[p]) for p in (0, len(ids) - 2, len(ids) - 1)]
    index = saved.index
    assert list(zip(index["prompt"], index["position"], index["token_id"], strict=True)) == rows
    for name, (module, side) in places.items():
        component, _, layer = name.rpartition(".")
        found = saved.tensor(component, int(layer))
        whole = [raw(model, tokens(folder, text), module, side) for text in PROMPTS]
        expected = torch.stack([whole[number][position] for number, position, _ in rows])
        if component.startswith("head_"):
            assert found.shape == (len(rows), n_heads, size)
        torch.testing.assert_close(found.flatten(1), expected, rtol=1e-5, atol=1e-6)
    for name, chosen in (("head_key_output.1", [1, 0]), ("head_query_output.0", [1])):
        word, layer_number = name.split(".")
        if kind == "gpt2":
            module, begin = f"{blocks}.{layer_number}.attn.c_attn", 24 * ("key" in name)
        else:
            module, begin = f"{blocks}.{layer_number}.self_attn.{word[5]}_proj", 0
        whole = [raw(model, tokens(folder, text), module, "output") for text in PROMPTS]
        columns = torch.tensor([[begin + h * size + d for d in range(size)] for h in chosen])
        expected = torch.stack([whole[number][position][columns] for number, position, _ in rows])
        found = saved.tensor(word, int(layer_number))
        assert found.shape == (len(rows), len(chosen), size)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("heads", [None, [1]])
def test_patterns_are_those_that_transformers_gives(
    heads: list[int] | None, gpt2_folder: Path, cli: Cli, tmp_path: Path
) -> None:
    grid: dict[str, object] = {"component": "attention_weight", "layers": [0, 2]}
    if heads:
        grid["heads"] = heads
    saved = collected(cli, write(tmp_path, gpt2_folder, grid=grid, positions=["last", 1]))
    eager = transformers.AutoModelForCausalLM.from_pretrained(
        gpt2_folder, attn_implementation="eager"
    ).eval()
    for number, text in enumerate(PROMPTS):
        ids = tokens(gpt2_folder, text)
        with torch.no_grad():
            theirs = eager(torch.tensor([ids]), output_attentions=True).attentions
        for layer in (0, 2):
            expected = theirs[layer][0].transpose(0, 1)[[len(ids) - 1, 1]]
            found = saved.pattern(number, layer)
            assert found.shape == (2, len(heads or (0, 1)), len(ids))
            torch.testing.assert_close(found, expected[:, heads or [0, 1]], rtol=1e-5, atol=1e-6)
    assert saved.names == sorted(
        f"attention_weight.{layer}.prompt{p}" for layer in (0, 2) for p in range(3)
    )
    with pytest.raises(UsageError, match="has no prompt 3"):
        saved.pattern(3)
    with pytest.raises(UsageError, match=r"no attention_weight\.1\.prompt0; it has"):
        saved.pattern(0, 1)


@pytest.mark.parametrize("name", ["float64", "float16", "bfloat16"])
def test_numbers_are_those_the_model_computes_in(
    name: str, llama_folder: Path, cli: Cli, tmp_path: Path
) -> None:
    dtype = getattr(torch, name)
    grid = {"component": ["block_output", "head_value_output"], "layers": 1}
    saved = collected(cli, write(tmp_path, llama_folder, grid=grid), f"model.dtype={name}")
    found = saved.tensor("block_output", 1)
    assert found.dtype == dtype
    model = load(llama_folder, dtype)
    ids = tokens(llama_folder, PROMPTS[0])
    expected = raw(model, ids, "model.layers.1", "output")[[0, -2, -1]]
    torch.testing.assert_close(found[:3], expected)
    assert saved.tensor("head_value_output", 1).dtype == dtype
    assert isinstance(saved.mean("block_output", 1), Mean)
    record = json.loads((saved.folder / "run.json").read_text())
    assert record["model"]["dtype"] == name


def test_what_the_folder_holds(gpt2_folder: Path, cli: Cli, tmp_path: Path) -> None:
    spec = write(tmp_path, gpt2_folder)
    result = cli("collect", spec, "-o", tmp_path / "outputs")
    folder = Path(result.out.splitlines()[-1])
    assert {p.name for p in folder.iterdir()} == {*WHOLE, "activations-00000.safetensors"}
    assert folder.parent == tmp_path / "outputs" / "collect"
    assert (folder / "spec.yaml").read_bytes() == spec.read_bytes()
    record = json.loads((folder / "run.json").read_text())
    assert (record["kind"], record["prompts"], record["rows"]) == ("collect", 3, 9)
    assert record["tensors"] == ["block_output.0", "block_output.2"]
    assert record["identity"].startswith(folder.name)
    assert len(record["sessions"]) == 1
    tensors = load_file(folder / "activations-00000.safetensors")
    assert {k: tuple(t.shape) for k, t in tensors.items()} == {
        "block_output.0": (9, 24),
        "block_output.2": (9, 24),
    }
    assert "9 rows of 2 tensors" in result.err
    # The resolved spec is the same run.
    again = cli("collect", folder / "resolved.yaml", "-o", tmp_path / "outputs")
    assert Path(again.out.strip()) == folder
    assert "nothing was left to compute" in again.err


def test_the_index_says_what_each_row_is(gpt2_folder: Path, cli: Cli, tmp_path: Path) -> None:
    # Tokens that a careless reader of CSV would take for something else.
    odd = ['He said "a, b"\nand NA, null\r\n1e5 \tnan', "None\r,\ra'\r\rb 1 "]
    spec = write(tmp_path, gpt2_folder, data={"prompts": odd}, positions="all")
    saved = collected(cli, spec)
    index = saved.index
    assert list(index.columns) == [
        "row", "file", "row_in_file", "prompt", "position", "token_id", "token",
    ]  # fmt: skip
    assert list(index["row"]) == list(range(len(index)))
    for number, text in enumerate(odd):
        rows = index[index["prompt"] == number]
        assert "".join(rows["token"]) == text
        assert list(rows["token_id"]) == tokens(gpt2_folder, text)
        assert list(rows["position"]) == list(range(len(rows)))
    assert len(saved.tensor("block_output", 0)) == len(index)


@pytest.mark.parametrize("suffix", ["jsonl", "json", "csv"])
def test_prompts_from_a_file(suffix: str, gpt2_folder: Path, cli: Cli, tmp_path: Path) -> None:
    frame = pd.DataFrame({"number": range(3), "sentence": PROMPTS})
    path = tmp_path / f"texts.{suffix}"
    if suffix == "csv":
        frame.to_csv(path, index=False)
    else:
        frame.to_json(path, orient="records", lines=suffix == "jsonl")
    data = {"file": path.name, "column": "sentence"}
    one = collected(cli, write(tmp_path, gpt2_folder, data=data))
    other = collected(cli, write(tmp_path, gpt2_folder))
    assert one.folder == other.folder, "the same prompts are the same run"
    limited = collected(cli, write(tmp_path, gpt2_folder, data=data | {"limit": 2}))
    assert limited.index["prompt"].nunique() == 2
    torch.testing.assert_close(limited.tensor("block_output", 2), one.tensor("block_output", 2)[:6])


def test_a_model_of_an_unknown_type(cli: Cli, tmp_path: Path) -> None:
    from tests import zoo

    model = tmp_path / "model"
    config = zoo.config("stablelm")
    config.vocab_size = 420  # type: ignore[attr-defined]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        transformers.AutoModelForCausalLM.from_config(config).save_pretrained(model)
    save_tokenizer(model)
    grid = [
        {"component": "head_key_output", "layers": 1, "heads": 1},
        {"component": ["final_norm", "block_output"], "layers": "all"},
    ]
    spec = write(tmp_path, model, grid=grid)
    result = cli("collect", spec, "--plan")
    assert "recognised once they are loaded" in result.out
    saved = collected(cli, spec)
    assert saved.names == [
        "block_output.0", "block_output.1", "block_output.2", "final_norm.0", "head_key_output.1",
    ]  # fmt: skip
    key = saved.tensor("head_key_output", 1)
    assert key.shape == (9, 1, 16)
    expected = raw(load(model), tokens(model, PROMPTS[0]), "model.layers.1.self_attn.k_proj",
                   "output")  # fmt: skip
    torch.testing.assert_close(key[:3, 0], expected[[0, -2, -1], 16:], rtol=1e-5, atol=1e-6)
    wrong = write(tmp_path, model, "wrong.yaml", grid={"component": "blok_output"})
    result = cli("collect", wrong, "-o", tmp_path / "outputs")
    assert result.code == 1
    assert "'blok_output'" in result.err and "did you mean 'block_output'?" in result.err
    assert "Traceback" not in result.err


@pytest.mark.parametrize(
    ("grid", "texts"),
    [
        ({"component": "transformer.h[0].mpl.output"}, ("no module 'transformer.h.0.mpl'", "mlp")),
        ({"component": "transformer.h[7].output"}, ("no module 'transformer.h.7'",)),
        ({"component": "transformer.h.output"}, ("fired 0 times",)),
    ],
)
def test_a_path_that_leads_nowhere(
    grid: dict[str, object], texts: tuple[str, ...], gpt2_folder: Path, cli: Cli, tmp_path: Path
) -> None:
    result = cli("collect", write(tmp_path, gpt2_folder, grid=grid), "-o", tmp_path / "outputs")
    assert result.code == EngineError.exit_code
    assert result.out == ""
    assert "Traceback" not in result.err
    for text in texts:
        assert text in result.err


# Going on.


@pytest.fixture
def shards(monkeypatch: pytest.MonkeyPatch) -> None:
    """A file for each prompt."""
    monkeypatch.setattr("interv.plan.collect._SHARD_TOKENS", 1)


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The shards that were computed, in their order."""
    done: list[tuple[int, ...]] = []
    really = runner._tensors

    def counting(plan: object, executor: object, shard: tuple[int, ...]) -> dict[str, Tensor]:
        done.append(shard)
        return really(plan, executor, shard)  # type: ignore[arg-type]

    monkeypatch.setattr(runner, "_tensors", counting)
    return done


GRID = [{"component": ["block_output", "head_query_output", "attention_weight"], "layers": 1}]


def test_files_of_a_few_prompts_are_one_table(
    gpt2_folder: Path, cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = collected(cli, write(tmp_path, gpt2_folder, name="one.yaml", grid=GRID))
    monkeypatch.setattr("interv.plan.collect._SHARD_TOKENS", 1)
    many = collected(cli, write(tmp_path, gpt2_folder, name="many.yaml", grid=GRID))
    names = sorted(p.name for p in many.folder.glob("*.safetensors"))
    assert names == [f"activations-{i:05d}.safetensors" for i in range(3)]
    assert list(many.index["file"].drop_duplicates()) == names
    assert list(many.index["row_in_file"]) == [0, 1, 2] * 3
    shared = ["row", "prompt", "position", "token_id", "token"]
    assert many.index[shared].equals(one.index[shared])
    assert many.names == one.names
    for component in ("block_output", "head_query_output"):
        torch.testing.assert_close(many.tensor(component, 1), one.tensor(component, 1))
    for prompt in range(3):
        torch.testing.assert_close(many.pattern(prompt, 1), one.pattern(prompt, 1))


@pytest.mark.usefixtures("shards")
def test_a_stopped_run_goes_on(
    gpt2_folder: Path, cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    computed: list[tuple[int, ...]],
) -> None:  # fmt: skip
    spec = write(tmp_path, gpt2_folder, grid=GRID)
    whole = collected(cli, spec, "-o", tmp_path / "whole")
    computed.clear()
    counting = runner._tensors

    def stopping(plan: object, executor: object, shard: tuple[int, ...]) -> dict[str, Tensor]:
        if shard == (2,):
            raise KeyboardInterrupt
        return counting(plan, executor, shard)  # type: ignore[arg-type]

    monkeypatch.setattr(runner, "_tensors", stopping)
    stopped = cli("collect", spec, "-o", tmp_path / "outputs")
    assert (stopped.code, stopped.out) == (130, "")
    assert "the same command goes on from there" in stopped.err
    monkeypatch.setattr(runner, "_tensors", counting)
    [folder] = (tmp_path / "outputs" / "collect").iterdir()
    assert computed == [(0,), (1,)]
    half = Activations(folder)
    with pytest.raises(UsageError, match=r"00002\.safetensors: is missing; run the same"):
        half.tensor("block_output", 1)
    with pytest.raises(UsageError, match=r"00002\.safetensors: is missing"):
        _ = half.names
    times = {p.name: p.stat().st_mtime_ns for p in folder.glob("*.safetensors")}
    again = collected(cli, spec)
    assert again.folder == folder
    assert computed == [(0,), (1,), (2,)]
    for name, time in times.items():
        assert (folder / name).stat().st_mtime_ns == time, "a finished file was written again"
    for path in whole.folder.glob("activations-*"):
        assert (folder / path.name).read_bytes() == path.read_bytes()
    assert (folder / "index.csv").read_bytes() == (whole.folder / "index.csv").read_bytes()
    assert len(json.loads((folder / "run.json").read_text())["sessions"]) == 1
    # And once more: nothing is done, nothing changes.
    before = {p.name: p.read_bytes() for p in folder.iterdir() if p.name != ".lock"}
    result = cli("collect", spec, "-o", tmp_path / "outputs")
    assert "nothing was left to compute" in result.err
    assert len(computed) == 3
    assert before == {p.name: p.read_bytes() for p in folder.iterdir() if p.name != ".lock"}


@pytest.mark.usefixtures("shards")
def test_a_file_that_was_lost_is_made_again(
    gpt2_folder: Path, cli: Cli, tmp_path: Path, computed: list[tuple[int, ...]]
) -> None:
    spec = write(tmp_path, gpt2_folder)
    saved = collected(cli, spec)
    before = saved.tensor("block_output", 2)
    (saved.folder / runner.shard_name(1)).unlink()
    computed.clear()
    again = collected(cli, spec)
    assert computed == [(1,)]
    assert torch.equal(again.tensor("block_output", 2), before)


def test_killed_before_its_record_was_written(
    gpt2_folder: Path, cli: Cli, tmp_path: Path, computed: list[tuple[int, ...]]
) -> None:
    spec = write(tmp_path, gpt2_folder)
    saved = collected(cli, spec)
    (saved.folder / "run.json").unlink()
    again = collected(cli, spec)
    assert len(computed) == 1
    assert json.loads((again.folder / "run.json").read_text())["rows"] == 9


def test_fresh_sets_the_earlier_run_aside(
    gpt2_folder: Path, cli: Cli, tmp_path: Path, computed: list[tuple[int, ...]]
) -> None:
    spec = write(tmp_path, gpt2_folder)
    first = collected(cli, spec)
    old = {p.name: p.read_bytes() for p in first.folder.iterdir() if p.name != ".lock"}
    result = cli("collect", spec, "-o", tmp_path / "outputs", "--fresh")
    assert result.code == 0
    assert "the earlier run is now" in result.err
    assert Path(result.out.strip()) == first.folder
    assert len(computed) == 2
    [aside] = first.folder.parent.glob("*-old-1")
    assert {p.name: p.read_bytes() for p in aside.iterdir()} == old


def test_another_machine_is_refused(gpt2_folder: Path, cli: Cli, tmp_path: Path) -> None:
    """Half a run under other conditions is not gone on with."""
    spec = write(tmp_path, gpt2_folder)
    saved = collected(cli, spec)
    journal = saved.folder / "journal.jsonl"
    head = journal.read_text().splitlines()[0].replace('"torch": "', '"torch": "0')
    journal.write_text(head + "\n")
    result = cli("collect", spec, "-o", tmp_path / "outputs")
    assert (result.code, result.out) == (1, "")
    assert "begun under other conditions (torch 0" in result.err


def test_what_is_another_run_and_what_is_not(gpt2_folder: Path, cli: Cli, tmp_path: Path) -> None:
    spec = write(tmp_path, gpt2_folder)
    first = collected(cli, spec).folder
    assert collected(cli, spec, "run.threads=1").folder == first
    for override in ("grid.layers=1", "positions=last", "model.dtype=float64", "data.limit=2",
                     "grid.component=mlp_output"):  # fmt: skip
        assert collected(cli, spec, override).folder != first, override


# What is shown.


def test_plan_writes_nothing_and_counts(gpt2_folder: Path, cli: Cli, tmp_path: Path) -> None:
    grid = [
        {"component": ["block_output", "mlp_activation"], "layers": [0, 1]},
        {"component": "head_query_output", "layers": 1, "heads": 0},
    ]
    spec = write(tmp_path, gpt2_folder, grid=grid)
    before = sorted(tmp_path.rglob("*"))
    shown = cli("collect", spec, "--plan")
    assert (shown.code, shown.err) == (0, "")
    assert shown.out == cli("plan", spec).out
    for text in ("collect on ", "3, 9 rows", "5: block_output, mlp_activation, head_query_output"):
        assert text in shown.out
    facts = json.loads(cli("collect", spec, "--plan", "--json").out)
    assert facts == json.loads(cli("plan", spec, "--json").out)
    assert facts["bytes"] == 9 * 4 * (2 * 24 + 2 * 96 + 12)
    assert (facts["prompts"], facts["rows"], facts["tensors"]) == (3, 9, 5)
    assert sorted(tmp_path.rglob("*")) == before
    # The estimate is the size of the tensors.
    saved = collected(cli, spec)
    tensors = load_file(saved.folder / "activations-00000.safetensors").values()
    assert sum(t.numel() * t.element_size() for t in tensors) == facts["bytes"]


def test_plan_of_patterns_knows_no_size(gpt2_folder: Path, cli: Cli, tmp_path: Path) -> None:
    spec = write(tmp_path, gpt2_folder, grid={"component": "attention_weight"})
    assert "on disk       not known" in cli("collect", spec, "--plan").out
    assert json.loads(cli("plan", spec, "--json").out)["bytes"] is None


def test_json_is_one_document(gpt2_folder: Path, cli: Cli, tmp_path: Path) -> None:
    spec = write(tmp_path, gpt2_folder)
    result = cli("collect", spec, "-o", tmp_path / "outputs", "--json")
    document = json.loads(result.out)
    assert Activations(Path(document["folder"])).names == ["block_output.0", "block_output.2"]
    assert (document["rows"], document["components"]) == (9, ["block_output"])
    assert document["not_checked"] == []


def test_validate_knows_the_kind(gpt2_folder: Path, cli: Cli, tmp_path: Path) -> None:
    spec = write(tmp_path, gpt2_folder)
    assert cli("validate", spec).code == 0
    result = cli("trace", spec)
    assert result.code == 2
    assert ":1:7: this is a spec of kind 'collect'" in result.err
    assert "interv collect" in result.err


# Reading.


def test_means(gpt2_folder: Path, cli: Cli, tmp_path: Path) -> None:
    grid = {"component": ["block_output", "head_query_output"], "layers": 1}
    saved = collected(cli, write(tmp_path, gpt2_folder, grid=grid, positions=[0, 1]))
    states = saved.tensor("block_output", 1)
    assert states.shape == (6, 24)
    torch.testing.assert_close(saved.mean("block_output", 1).value, states.mean(0))
    by_position = saved.mean("block_output", 1, per_position=True).value
    assert by_position.shape == (2, 24)
    for position in (0, 1):
        rows = saved.index["position"].to_numpy() == position
        torch.testing.assert_close(by_position[position], states[rows].mean(0))
    heads = saved.tensor("head_query_output", 1)
    assert heads.shape == (6, 2, 12)
    torch.testing.assert_close(saved.mean("head_query_output", 1).value, heads.flatten(1).mean(0))


def test_a_mean_is_an_ablation(gpt2_folder: Path, cli: Cli, tmp_path: Path) -> None:
    import interv
    from interv.engine import Edit, Run, Site

    grid = {"component": "mlp_output", "layers": 1}
    mean = collected(cli, write(tmp_path, gpt2_folder, grid=grid, positions="all")).mean(
        "mlp_output", 1
    )
    model = load(gpt2_folder)
    ids = tokens(gpt2_folder, PROMPTS[0])
    run = Run(tuple(ids), (Edit(Site("mlp_output", 1), mean),))
    found = interv.executor(model, "reference").logits([run])[0, 0]

    def ablate(_module: nn.Module, _args: object, output: Tensor) -> Tensor:
        return mean.value.expand_as(output)

    handle = model.get_submodule("transformer.h.1.mlp").register_forward_hook(ablate)
    with torch.no_grad():
        expected = model(torch.tensor([ids])).logits[0, -1]
    handle.remove()
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_what_cannot_be_read_is_said(gpt2_folder: Path, cli: Cli, tmp_path: Path) -> None:
    saved = collected(cli, write(tmp_path, gpt2_folder, positions="all"))
    with pytest.raises(UsageError, match=r"no block_output\.1; it has block_output\.0, block"):
        saved.tensor("block_output", 1)
    with pytest.raises(UsageError, match="no blok_output"):
        saved.mean("blok_output")
    with pytest.raises(UsageError, match="prompts of different positions"):
        saved.mean("block_output", 0, per_position=True)
    with pytest.raises(UsageError, match="is not a run folder of `interv collect`"):
        Activations(tmp_path)


# What a user may get wrong.

GOOD = """\
kind: collect
model:
  path: MODEL
data:
  prompts:
    - The Space Needle is in downtown
grid:
  - component: block_output
    layers: all
positions: last
"""
DATA = "  prompts:\n    - The Space Needle is in downtown\n"
LONG = " ".join(["downtown"] * 70)


@dataclass(frozen=True)
class Case:
    """`old` gives way to `new` in the good spec; where, and what the message says."""

    name: str
    old: str
    new: str
    at: tuple[int, int] | None
    texts: tuple[str, ...] = ()
    files: dict[str, str] = field(default_factory=dict)
    source: str = "spec.yaml"


CASES = [
    Case("unknown component", "block_output", "blok_output", (8, 16),
         ("GPT-2 models have no component 'blok_output'", "expected", "mean 'block_output'")),
    Case("unknown component in a list", "block_output", "[block_input, mlp_ouput]", (8, 30),
         ("'mlp_ouput'", "mean 'mlp_output'")),
    Case("component of another family", "block_output", "mlp_gate_activation", (8, 16),
         ("no component 'mlp_gate_activation'", "mean 'mlp_activation'")),
    Case("heads of what is not by head", "layers: all", "heads: [0]", (8, 16),
         ("block_output is not by head",)),
    Case("heads of a path", "block_output", "transformer.h[0].output\n    heads: [0]", (8, 16),
         ("transformer.h[0].output is not by head",)),
    Case("head out of range", "block_output", "head_query_output\n    heads: [0, 2]", (9, 12),
         ("head 2 is out of range for head_query_output", "expected 0 to 1")),
    Case("negative head", "block_output", "head_query_output\n    heads: -1", (9, 12),
         ("-1 is negative",)),
    Case("heads asked for twice", "layers: all", "layers: all\n  - {component: head_key_output, "
         "heads: 0}\n  - {component: head_key_output, layers: 1, heads: 1}", (11, 17),
         ("head_key_output of layer 1 is asked for twice", "one entry")),
    Case("layer out of range", "layers: all", "layers: [0, 3]", (9, 13),
         ("layer 3 is out of range", "has 3 layers", "0 to 2")),
    Case("negative layer", "layers: all", "layers: -1", (9, 13), ("-1 is negative", "expected")),
    Case("position out of range", "positions: last", "positions: [0, 40]", (10, 12),
         ("position 40 is out of range", "prompt 0 is 'The Space", "0 to ")),
    Case("position out of range from the end", "positions: last", "positions: -40", (10, 12),
         ("position -40 is out of range",)),
    Case("unknown position", "positions: last", "positions: lst", (10, 12), ("'lst'", "last")),
    Case("a role is no position", "positions: last", "positions: subject", (10, 12),
         ("'subject'",)),
    Case("missing data file", DATA, "  file: text.jsonl\n", (5, 9),
         ("is not a file", "mean 'texts.jsonl'"), {"texts.jsonl": "{}"}),
    Case("missing column", DATA, "  file: texts.jsonl\n", (1, 1),
         ("no column 'prompt'", "promt, n", "data.column", "mean 'promt'"),
         {"texts.jsonl": '{"promt": "a b", "n": 1}\n'}, "texts.jsonl"),
    Case("missing column of a second line", DATA, "  file: texts.jsonl\n", (2, 1),
         ("no column 'prompt'",), {"texts.jsonl": '{"prompt": "a b"}\n{"text": "c"}\n'},
         "texts.jsonl"),
    Case("a prompt that is no text", DATA, "  file: texts.jsonl\n", (2, 1),
         ("column 'prompt' is 3", "text"), {"texts.jsonl": '{"prompt": "a"}\n{"prompt": 3}\n'},
         "texts.jsonl"),
    Case("an empty prompt in a file", DATA, "  file: texts.csv\n", (3, 1),
         ("column 'prompt' is ''",), {"texts.csv": 'n,prompt\n1,a\n2,""\n'}, "texts.csv"),
    Case("broken JSONL", DATA, "  file: texts.jsonl\n", (2, 12), ("not JSON",),
         {"texts.jsonl": '{"prompt": "a b"}\n{"prompt": \n'}, "texts.jsonl"),
    Case("a file without records", DATA, "  file: texts.json\n", (1, 1), ("has no records",),
         {"texts.json": "[]"}, "texts.json"),
    Case("no prompts", DATA, "  prompts: []\n", (5, 12), ("data.prompts", "at least 1 item")),
    Case("an empty prompt", "The Space Needle is in downtown", "''", (6, 7),
         ("data.prompts.0", "at least 1 character")),
    Case("prompts and file", DATA, DATA + "  file: texts.jsonl\n", (5, 3),
         ("exactly one of prompts, file",), {"texts.jsonl": '{"prompt": "a"}\n'}),
    Case("neither prompts nor file", DATA, "  limit: 3\n", (5, 3), ("exactly one of prompts",)),
    Case("unknown key", "positions:", "postions:", (10, 1),
         ("unknown key 'postions'", "mean 'positions'")),
    Case("unknown key of the grid", "layers:", "layer:", (9, 5), ("'layer'", "mean 'layers'")),
    Case("unknown key of the data", "  prompts:", "  prompt:", (5, 3), ("mean 'prompts'",)),
    Case("a section of a trace", "positions: last", "metric: logit", (10, 1),
         ("unknown key 'metric'",)),
    Case("no grid", "grid:\n  - component: block_output\n    layers: all\n", "", (1, 1),
         ("'grid' is missing",)),
    Case("a longer prompt than the model takes", "The Space Needle is in downtown", LONG, None,
         ("prompt 0 has 71 tokens", "at most 64")),
]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_malformed(
    case: Case, tmp_path: Path, gpt2_folder: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name, text in case.files.items():
        (tmp_path / name).write_text(text)
    assert GOOD.count(case.old) == 1
    path = Path("spec.yaml")
    path.write_text(GOOD.replace(case.old, case.new).replace("MODEL", str(gpt2_folder)))
    before = sorted(tmp_path.rglob("*"))
    for command in (["collect", path], ["collect", path, "--plan"], ["plan", path],
                    ["validate", path]):  # fmt: skip
        result = cli(*command)
        assert result.code == 2, result
        assert result.out == ""
        assert "Traceback" not in result.err
        for text in case.texts:
            assert text in result.err, result.err
        if case.at:
            line, column = case.at
            assert f"{case.source}:{line}:{column}: " in result.err, result.err
    assert sorted(tmp_path.rglob("*")) == before


def test_all_problems_are_told_at_once(gpt2_folder: Path, cli: Cli, tmp_path: Path) -> None:
    grid = [{"component": ["a", "b"]}, {"component": "logits", "layers": 9}]
    spec = write(tmp_path, gpt2_folder, grid=grid, positions=99)
    result = cli("validate", spec, "--json")
    [report] = json.loads(result.out)
    messages = [problem["message"] for problem in report["problems"]]
    assert messages[0] == "layers of logits: nothing reads it"
    assert len(messages) == 4 + len(PROMPTS)
    assert all(problem["line"] and problem["column"] for problem in report["problems"])


def test_a_tokenizer_of_another_model(cli: Cli, tmp_path: Path, gpt2_folder: Path) -> None:
    config = {"model_type": "gpt2", "n_layer": 1, "n_head": 1, "n_embd": 8, "vocab_size": 5}
    model = {"config": config, "tokenizer": str(gpt2_folder)}
    result = cli("collect", write(tmp_path, gpt2_folder, model=model), "-o", tmp_path / "outputs")
    assert result.code == 2
    assert "the model 5 tokens" in result.err and "the tokenizer of this model" in result.err


def test_a_model_that_does_not_run_on_text(cli: Cli, tmp_path: Path, gpt2_folder: Path) -> None:
    from tests import zoo

    model = {"config": zoo.CONFIGS["blip"], "tokenizer": str(gpt2_folder)}
    spec = write(
        tmp_path, gpt2_folder, model=model, grid={"component": "text_block_output"}, positions=0
    )
    result = cli("collect", spec, "-o", tmp_path / "outputs")
    assert (result.code, result.out) == (2, "")
    assert "BLIP models do not run on text alone" in result.err


def test_a_random_model_from_its_config(cli: Cli, tmp_path: Path, gpt2_folder: Path) -> None:
    config = tiny_config("gpt2") | {"n_layer": 4}
    model = {"config": config, "tokenizer": str(gpt2_folder)}
    spec = write(tmp_path, gpt2_folder, model=model)
    one, other = collected(cli, spec), collected(cli, spec, "seed=1")
    assert one.folder != other.folder
    assert not torch.equal(one.tensor("block_output", 2), other.tensor("block_output", 2))


def test_a_folder_that_cannot_be_written(gpt2_folder: Path, cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    result = cli("collect", write(tmp_path, gpt2_folder), "-o", tmp_path / "file")
    assert (result.code, result.out) == (1, "")
    assert "Traceback" not in result.err


@pytest.mark.model
def test_the_example_on_the_default_model(cli: Cli, tmp_path: Path) -> None:
    from tests.conftest import CONFIGS

    result = cli("collect", CONFIGS / "collect.yaml", "-o", tmp_path, "--quiet")
    assert (result.code, result.err) == (0, "")
    saved = Activations(Path(result.out.strip()))
    assert list(saved.index["token"]) == [" city", " of"] * 3
    assert saved.tensor("block_output", 29).shape == (6, 576)
    assert saved.tensor("mlp_activation", 14).shape == (6, 1536)
    assert saved.tensor("head_attention_value_output", 23).shape == (6, 3, 64)
    assert saved.tensor("final_norm").shape == (6, 576)
    assert saved.mean("final_norm", per_position=True).value.shape == (2, 576)
