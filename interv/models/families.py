"""Model families as data: where each component stands in a block.

A component is a module, relative to the block, and a side of it. `mlp_activation` is the
input of the down projection (the neurons), on gated MLPs too.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

Side = Literal["input", "output"]


@dataclass(frozen=True)
class Place:
    """One side of a module; `path` is relative to the block, empty for the block itself."""

    path: str
    side: Side


@dataclass(frozen=True)
class Family:
    """Paths of a family's modules, from the model's root."""

    name: str
    model_types: tuple[str, ...]
    token_embedding: str
    blocks: str
    components: Mapping[str, Place]

    def place(self, component: str, layer: int) -> tuple[str, Side]:
        """Path from the root, and side, of a component in a layer.

        `token_embedding` is the word embeddings' output, before positions are added; it has
        no layer of its own.

        Raises:
            KeyError: the family has no such component.
        """
        if component == "token_embedding":
            return self.token_embedding, "output"
        place = self.components[component]
        block = f"{self.blocks}.{layer}"
        return (f"{block}.{place.path}" if place.path else block), place.side


FAMILIES = (
    Family(
        name="GPT-2",
        model_types=("gpt2",),
        token_embedding="transformer.wte",
        blocks="transformer.h",
        components={
            "block_input": Place("", "input"),
            "block_output": Place("", "output"),
            "mlp_input": Place("mlp", "input"),
            "mlp_activation": Place("mlp.c_proj", "input"),
            "mlp_output": Place("mlp", "output"),
            "attention_input": Place("attn", "input"),
            "attention_output": Place("attn", "output"),
        },
    ),
    Family(
        name="Llama",
        model_types=("llama",),
        token_embedding="model.embed_tokens",
        blocks="model.layers",
        components={
            "block_input": Place("", "input"),
            "block_output": Place("", "output"),
            "mlp_input": Place("mlp", "input"),
            "mlp_activation": Place("mlp.down_proj", "input"),
            "mlp_output": Place("mlp", "output"),
            "attention_input": Place("self_attn", "input"),
            "attention_output": Place("self_attn", "output"),
        },
    ),
)

BY_MODEL_TYPE: dict[str, Family] = {t: f for f in FAMILIES for t in f.model_types}
