"""A family from a config alone: from two random layers, and the modules of all of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import transformers

from interv.engine.recognise import in_every_block, recognise
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
        small = transformers.AutoConfig.for_model(
            kind, **{**fields, "num_hidden_layers": 2, "layer_types": None}
        )
        with torch.device("meta"):
            empty = auto.from_config(full, dtype=torch.float32)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = auto.from_config(small, dtype=torch.float32)
    except Exception as error:
        # What a strange config makes transformers raise can be anything; it is the cause.
        raise ModelError(f"models of type '{kind}' cannot be made: {error}") from error
    return in_every_block(recognise(model.eval(), read_facts(small.to_dict(), str(kind))), empty)
