"""A family from a config alone: from two random layers, and the modules of all of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
import transformers
from torch import nn

from interv.engine.recognise import recognise
from interv.errors import ModelError
from interv.models.config import read_facts
from interv.models.families import Family


def from_config(config: Mapping[str, Any]) -> Family:
    """Return the family of a model that is not at hand.

    Two random layers of its kind are recognised; a copy of all layers without any numbers says
    which of their components are in every block (the first layers of DeepSeek are unlike others).

    Raises:
        ModelError: as `recognise` does, or the config is not one that transformers knows.
    """
    fields = dict(config)
    kind = fields.pop("model_type")
    auto = transformers.AutoModelForCausalLM
    try:
        full = transformers.AutoConfig.for_model(kind, **fields)
        two: dict[str, Any] = {"num_hidden_layers": 2}
        if "layer_types" in fields:
            two["layer_types"] = None
        small = transformers.AutoConfig.for_model(kind, **{**fields, **two})
        with torch.device("meta"):
            empty = auto.from_config(full, dtype=torch.float32)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = auto.from_config(small, dtype=torch.float32)
    except Exception as error:
        # What a strange config makes transformers raise can be anything; it is the cause.
        raise ModelError(f"models of type '{kind}' cannot be made: {error}") from error
    return _in_every_block(recognise(model.eval(), read_facts(small.to_dict(), str(kind))), empty)


def _in_every_block(family: Family, model: nn.Module) -> Family:
    """Return the family without the components whose module some block of a model lacks."""
    assert isinstance(family.blocks, str)
    blocks = [
        dict(block.named_modules()) for block in model.get_submodule(family.blocks).children()
    ]
    kept = {
        name: stand
        for name, stand in family.components.items()
        if all(stand.path in modules for modules in blocks)
    }
    return replace(family, components=kept)
