"""`interv inspect` says what is there: against the real modules of a tiny model of each family."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from interv.models.support import counts
from tests import raw_swap, zoo
from tests.conftest import REPOSITORY, Result, tiny_config
from tests.test_imports import PROBE

Cli = Callable[..., Result]
LAYER = 1
# What cannot always be told from a model's modules alone.
NOT_RECOGNISED = {"attention_residual", "mlp_residual", "resid_mid"}


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """No test here waits for a hub."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def write_config(folder: Path, fields: object) -> Path:
    path = folder / "config.json"
    path.write_text(json.dumps(fields))
    return path


def seen_at(model: nn.Module, name: str, module: str, side: str) -> Tensor:
    """What passes one side of a module in a forward `[..., width]`."""
    seen: list[Tensor] = []

    def before(_module: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]) -> None:
        value = args[0] if args else kwargs.get("hidden_states", next(iter(kwargs.values()), None))
        assert isinstance(value, Tensor)
        seen.append(value.clone())

    def after(_module: nn.Module, _args: object, output: object) -> None:
        value = output[0] if isinstance(output, tuple) else output
        assert isinstance(value, Tensor)
        seen.append(value.clone())

    at = model.get_submodule(module.replace("{layer}", str(LAYER)))
    if side == "input":
        handle = at.register_forward_pre_hook(before, with_kwargs=True)
    else:
        handle = at.register_forward_hook(after)
    model(**zoo.inputs(name))
    handle.remove()
    assert len(seen) == 1
    return seen[0]


@pytest.mark.parametrize("name", zoo.CONFIGS)
def test_names_widths_heads_and_paths_are_those_of_the_modules(
    name: str, cli: Cli, tmp_path: Path
) -> None:
    path = write_config(tmp_path, zoo.config(name).to_dict())  # type: ignore[attr-defined]
    result = cli("inspect", path, "--json")
    assert result.code == 0, result.err
    document = json.loads(result.out)
    lines = {line["component"]: line for line in document["components"]}
    expected = set(raw_swap.components(name)) - {"vision_final_norm"}
    if name in zoo.RECOGNISED:
        assert expected - NOT_RECOGNISED <= set(lines) <= expected
    else:
        assert set(lines) == expected
    model = zoo.make(name)
    for component, line in lines.items():
        found = raw_swap.capture(model, name, component, LAYER, zoo.ids())
        if component == "attention_weight":
            assert line["side"] == "pattern"
            assert isinstance(model.get_submodule(line["module"].format(layer=LAYER)), nn.Module)
            shape = (None, len(found), None)
        elif "head_" in component:
            shape = (found.shape[1] * found.shape[2], found.shape[1], found.shape[2])
        else:
            shape = (found.shape[1], None, None)
        assert (line["width"], line["heads"], line["head_width"]) == shape, component
        if line["side"] == "pattern":
            continue
        there = seen_at(model, name, line["module"], line["side"])
        if there.shape[-1] == line["width"]:
            assert torch.equal(there.reshape(len(found), -1), found.flatten(1)), component
        else:
            # Queries, keys and values may be columns of one projection.
            assert re.search("(query|key|value)_output", component), component
            assert there.shape[-1] > line["width"], component


@pytest.mark.parametrize("name", ["gpt2", "llama", "falcon_mq", "gpt_neox", "qwen3", "bert"])
def test_a_config_as_people_write_it_says_the_same(name: str, cli: Cli, tmp_path: Path) -> None:
    short, full = tmp_path / "short.json", tmp_path / "full.json"
    short.write_text(json.dumps(zoo.CONFIGS[name]))
    full.write_text(json.dumps(zoo.config(name).to_dict()))  # type: ignore[attr-defined]
    one, other = (json.loads(cli("inspect", path, "--json").out) for path in (short, full))
    assert one["components"] == other["components"]
    assert one["shape"] == other["shape"]


def test_the_table_for_people(cli: Cli, tmp_path: Path) -> None:
    path = write_config(tmp_path, zoo.CONFIGS["llama"])
    result = cli("inspect", path)
    assert (result.code, result.err) == (0, "")
    first, fast, _, *table = result.out.splitlines()
    assert first == (
        f"{path} (Llama): 3 layers, width 48, 4 heads of 12, 2 for keys and values, "
        "80 neurons a layer, 100 tokens"
    )
    assert fast == "The suffix executor starts a row from its layer and position."
    rows = [re.split(r"\s{2,}", line.strip()) for line in table]
    assert rows[0] == ["component", "shape", "module"]
    assert ["head_key_output", "2 x 12", "model.layers.{layer}.self_attn.k_proj.output"] in rows
    assert [
        "attention_weight", "4 x queries x keys", "model.layers.{layer}.self_attn.pattern",
    ] in rows  # fmt: skip
    assert ["final_norm", "48", "model.norm.output"] in rows
    assert all(len(row) == 3 for row in rows)


@pytest.mark.parametrize(
    ("name", "texts"),
    [
        ("mamba", ("no heads", "no attention", "from its layer.")),
        ("bert", ("4 heads of 12", "what follows each norm", "from its layer.")),
        ("blip", ("pixels and text come from Python", "full forwards", "vision_head_key_output")),
        ("gptj", ("parallel blocks: no resid_mid", "from its layer.")),
        ("stablelm", ("not in the table", "from its layer and position.")),
    ],
)
def test_what_is_otherwise_than_elsewhere_is_said(
    name: str, texts: tuple[str, ...], cli: Cli, tmp_path: Path
) -> None:
    result = cli("inspect", write_config(tmp_path, zoo.config(name).to_dict()))  # type: ignore[attr-defined]
    assert result.code == 0, result.err
    for text in texts:
        assert text in result.out


def test_a_folder_by_its_name(
    gpt2_folder: Path, cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    document = json.loads(cli("inspect", gpt2_folder, "--json").out)
    assert (document["model"], document["family"]) == (gpt2_folder.name, "GPT-2")
    assert document["shape"]["n_layers"] == 3
    assert document["shape"]["n_params"] > 10_000
    write_config(tmp_path, tiny_config("llama"))
    monkeypatch.chdir(tmp_path)
    without_weights = json.loads(cli("inspect", "./", "--json").out)
    assert without_weights["family"] == "Llama"
    assert "n_params" not in without_weights["shape"]


@pytest.mark.model
def test_the_default_model_by_name_and_as_a_gguf_file(cli: Cli) -> None:
    from interv.models.locate import _default_file

    by_name = json.loads(cli("inspect", "smollm2-135m", "--json").out)
    by_file = json.loads(cli("inspect", _default_file(), "--json").out)
    assert by_name["model"] == "smollm2-135m"
    assert by_name | {"model": ""} == by_file | {"model": ""}
    lines = {line["component"]: line for line in by_name["components"]}
    assert lines["head_key_output"]["heads"] == 3
    assert lines["head_query_output"]["heads"] == 9
    assert lines["mlp_activation"]["width"] == 1536
    assert lines["logits"]["width"] == 49152


@pytest.mark.parametrize(
    ("model", "code", "texts"),
    [
        ((), 2, ("which model?", "--support")),
        (("",), 2, ("name is empty",)),
        (("smolm2-135m",), 2, ("unknown model 'smolm2-135m'", "did you mean 'smollm2-135m'?")),
        (("./confg.json",), 2, ("confg.json: No such file",)),
        (("./nowhere",), 2, ("nowhere is neither a folder nor a file",)),
        (("./gpt3",), 2, ("neither a folder", "did you mean 'gpt2'?")),
        (("./empty",), 2, ("has no config.json",)),
        (("./broken.json",), 2, ("broken.json: is not JSON", "line 1")),
        (("./list.json",), 2, ("list.json: is not a config.json",)),
        (("./nothing.json",), 2, ("model_type is missing",)),
        (("./shapeless.json",), 2, ("num_hidden_layers", "is given as a number")),
        (("./words.gguf",), 2, ("is not a GGUF file",)),
        (("./mystery.json",), 1, ("'mystery'",)),
        (("somebody/something",), 1, ("somebody/something", "not on this machine")),
    ],
    ids=lambda value: " ".join(map(str, value)) or "none" if isinstance(value, tuple) else "",
)
def test_what_is_wrong_is_said(
    model: tuple[str, ...], code: int, texts: tuple[str, ...], cli: Cli, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    for folder in ("gpt2", "empty"):
        (tmp_path / folder).mkdir()
    shape = {"hidden_size": 8, "num_hidden_layers": 1, "vocab_size": 9}
    for name, text in {
        "broken.json": "{",
        "list.json": "[]",
        "nothing.json": "{}",
        "shapeless.json": '{"model_type": "llama", "hidden_size": 8}',
        "words.gguf": "nothing of the kind",
        "mystery.json": json.dumps({"model_type": "mystery", **shape}),
    }.items():
        (tmp_path / name).write_text(text)
    result = cli("inspect", *model)
    assert result.code == code, result.err
    assert result.out == ""
    assert "Traceback" not in result.err
    for text in texts:
        assert text in result.err, result.err


def test_support_is_the_table_of_families(cli: Cli) -> None:
    from interv.models.families import FAMILIES

    document = json.loads(cli("inspect", "--support", "--json").out)
    assert list(document) == [family.name for family in FAMILIES]
    assert document["Llama"]["block_output"] == "positions"
    assert document["BERT"]["block_output"] == "layers"
    assert document["BLIP"]["vision_block_output"] == "nothing"
    assert "attention_weight" not in document["GPT-J"]
    assert "final_norm" not in document["BERT"]
    result = cli("inspect", "--support")
    assert (result.code, result.err) == (0, "")
    lines = result.out.splitlines()
    rows = {line.split()[-1]: line.split()[:-1] for line in lines[1 + len(FAMILIES) : -1]}
    marks = {"positions": "P", "layers": "L", "nothing": "R", None: "."}
    for component, cells in rows.items():
        assert cells == [marks[row.get(component)] for row in document.values()], component
    assert set(rows) == {name for row in document.values() for name in row}
    reaches = [reach for row in document.values() for reach in row.values()]
    assert lines[-1].startswith(
        f"{len(document)} families, {len(reaches)} pairs of family and component, "
        f"{reaches.count('positions')} of them from the changed position on"
    )


@pytest.mark.parametrize("name", ["gpt2", "falcon", "bert", "blip", None])
def test_known_families_need_no_torch(
    name: str | None, environment: dict[str, str], tmp_path: Path
) -> None:
    word = "--support"
    if name:
        word = str(write_config(tmp_path, zoo.CONFIGS[name]))
    done = subprocess.run(
        [sys.executable, "-c", PROBE, "inspect", word],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "HEAVY []" in done.stderr


def test_the_readme_counts_what_is_supported() -> None:
    families, pairs, fast = counts()
    readme = " ".join((REPOSITORY / "README.md").read_text("utf-8").split())
    assert f"for all {families} families of the table" in readme
    assert f"{pairs} pairs of family and component, {fast} of them" in readme
