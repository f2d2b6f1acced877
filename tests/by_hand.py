"""Causal tracing with plain hooks, in the manner of the paper's protocol; knows nothing of interv.

A batch holds the clean row first and the corrupted ones after it; states are copied from row
0 into the others as the forward goes by.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

MODULES = {
    "gpt2": (
        "transformer.wte",
        "transformer.h.{}",
        {"mlp_output": ".mlp", "attention_output": ".attn"},
    ),
    "llama": (
        "model.embed_tokens",
        "model.layers.{}",
        {"mlp_output": ".mlp", "attention_output": ".self_attn"},
    ),
}


def module_name(model: nn.Module, component: str, layer: int) -> str:
    _, block, parts = MODULES[model.config.model_type]
    return block.format(layer) + parts.get(component, "")


def trace_cell(
    model: nn.Module,
    ids: Sequence[int],
    subject: tuple[int, int],
    noise: Tensor,
    restore: Sequence[tuple[int, str]],
    hold: Sequence[tuple[int, str]] = (),
    corrupted_ids: Sequence[int] | None = None,
) -> Tensor:
    """Logits `[draw, position, vocab]` of the corrupted rows.

    Args:
        noise: `[draw, n_subject, width]`, scaled; ignored with `corrupted_ids`.
        restore: (position, module) copied from the clean row.
        hold: (position, module) held at what a first pass, corrupted alone, had there.
    """
    draws = 1 if corrupted_ids is not None else len(noise)
    rows = [list(ids), *([list(corrupted_ids or ids)] * draws)]
    embedding = MODULES[model.config.model_type][0]
    recorded: dict[str, Tensor] = {}
    first_pass = bool(hold)

    def hook(name: str):
        def change(_module: nn.Module, _args: object, output: object) -> object:
            value = (output[0] if isinstance(output, tuple) else output).clone()
            if name == embedding and corrupted_ids is None:
                value[1:, subject[0] : subject[1]] += noise.to(value.dtype)
            if first_pass:
                recorded[name] = value.clone()
            else:
                for position, module in restore:
                    if module == name:
                        value[1:, position] = value[0, position]
                for position, module in hold:
                    if module == name:
                        value[1:, position] = recorded[name][1:, position]
            return (value, *output[1:]) if isinstance(output, tuple) else value

        return change

    names = {embedding, *(n for _, n in restore), *(n for _, n in hold)}
    handles = [model.get_submodule(n).register_forward_hook(hook(n)) for n in names]
    try:
        with torch.no_grad():
            if first_pass:
                model(torch.tensor(rows))
                first_pass = False
            return model(torch.tensor(rows)).logits[1:]
    finally:
        for handle in handles:
            handle.remove()


def draws(seed: int, samples: int, n_subject: int, width: int, level: float) -> Tensor:
    return level * torch.from_numpy(np.random.RandomState(seed).randn(samples, n_subject, width))
