"""The model inside of what is wrapped around it."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from interv.errors import UsageError

_INSIDE = {
    "DataParallel": "module",
    "DistributedDataParallel": "module",
    "OptimizedModule": "_orig_mod",  # torch.compile
}
_REFUSED = {
    "FullyShardedDataParallel": "holds a shard of each weight; give the model as it was before",
    "ScriptModule": "is compiled by TorchScript, which runs no hooks; give the model it is made of",
    "PeftMixedModel": "mixes adapters; give what its `merge_and_unload()` returns",
}


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the model that a wrapper runs: the modules, hooks and paths that it has itself.

    Raises:
        UsageError: not a module, or wrapped such that the model inside computes something else.
    """
    if not isinstance(model, nn.Module):
        raise UsageError(f"a {type(model).__name__} is not a torch.nn.Module")
    while True:
        names = [kind.__name__ for kind in type(model).__mro__]
        for name in names:
            if name in _REFUSED:
                raise UsageError(f"a {name} {_REFUSED[name]}")
        inside = next((_INSIDE[name] for name in names if name in _INSIDE), None)
        if inside is not None and isinstance(getattr(model, inside, None), nn.Module):
            model = getattr(model, inside)
        elif "PeftModel" in names:
            model = _of_peft(model)
        else:
            break
    _check_inside(model)
    return model


def _of_peft(wrapper: Any) -> nn.Module:
    """The base model of a PeftModel, whose adapted layers are in it."""
    for name, config in wrapper.peft_config.items():
        if config.is_prompt_learning:
            raise UsageError(
                f"adapter '{name}' ({config.peft_type.value}) puts virtual tokens before the "
                "prompt, which the model inside does not see: it cannot be run without its wrapper"
            )
    found: nn.Module = wrapper.get_base_model()
    return found


def _check_inside(model: nn.Module) -> None:
    for name, module in model.named_modules():
        compiled = type(module).__name__ == "OptimizedModule"
        if compiled or getattr(module, "_compiled_call_impl", None) is not None:
            raise UsageError(
                f"{name or 'the model'} is compiled (torch.compile), and compiled code may pass "
                "hooks by; give the model as it was before"
            )
        if isinstance(module, torch.jit.ScriptModule):
            raise UsageError(f"{name or 'the model'}: a ScriptModule {_REFUSED['ScriptModule']}")
    away = next((name for name, p in model.named_parameters() if p.is_meta), None)
    if away is not None:
        raise UsageError(
            f"{away} holds no numbers (it is on the meta device, or offloaded by accelerate); load "
            "the model whole"
        )


def speaks(model: nn.Module) -> bool:
    """Return whether a `transformers` model gives logits over tokens at each position."""
    ask = getattr(model, "get_output_embeddings", None)
    try:
        return ask is not None and ask() is not None
    except NotImplementedError:
        return False
