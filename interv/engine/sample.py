"""A family from a config alone: from two random layers, and the modules of all of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
import transformers
from torch import nn

from interv.engine.pretrained import auto_class
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
    try:
        full = transformers.AutoConfig.for_model(kind, **fields)
        auto = auto_class(read_facts(full.to_dict(), str(kind)))
        small = transformers.AutoConfig.for_model(kind, **_shortened(fields))
        with torch.device("meta"):
            empty = auto.from_config(full, dtype=torch.float32)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = auto.from_config(small, dtype=torch.float32)
    except ModelError:
        raise
    except Exception as error:
        # What a strange config makes transformers raise can be anything; it is the cause.
        raise ModelError(f"models of type '{kind}' cannot be made: {error}") from error
    return _in_every_block(recognise(model.eval(), read_facts(small.to_dict(), str(kind))), empty)


def _shortened(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return a config of two layers, and of one in a tower that sees or hears."""
    short = _of_two_layers(fields)
    for name, part in fields.items():
        if isinstance(part, dict) and name == "text_config":
            short[name] = _of_two_layers(part)
        elif isinstance(part, dict) and name in ("vision_config", "audio_config"):
            layers = [key for key in ("num_hidden_layers", "depth") if key in part]
            short[name] = {**part, **dict.fromkeys(layers or ["num_hidden_layers"], 1)}
    return short


def _of_two_layers(fields: Mapping[str, Any]) -> dict[str, Any]:
    # A list of layer types is as long as the model; families without one know no such field.
    types = {"layer_types": None} if "layer_types" in fields else {}
    return {**fields, "num_hidden_layers": 2, **types}


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
