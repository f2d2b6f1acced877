"""What a model's config.json says, under the same names for every family."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from interv.errors import ModelError
from interv.models.families import BY_MODEL_TYPE, Family

_NAMES: dict[str, tuple[str, ...]] = {
    "n_layers": ("num_hidden_layers", "n_layer", "num_layers", "n_layers"),
    "n_heads": ("num_attention_heads", "n_head", "num_heads", "n_heads"),
    "d_model": ("hidden_size", "n_embd", "d_model"),
    "n_positions": ("max_position_embeddings", "n_positions", "n_ctx"),
    "vocab_size": ("vocab_size",),
}


@dataclass(frozen=True)
class ModelFacts:
    """Shape of a model, read from its config alone."""

    model_type: str
    n_layers: int
    n_heads: int
    d_model: int
    n_positions: int
    vocab_size: int
    d_mlp: int
    n_params: int | None = None

    @property
    def family(self) -> Family:
        """Where this model's components stand.

        Raises:
            ModelError: the model is of a family that is not known.
        """
        try:
            return BY_MODEL_TYPE[self.model_type]
        except KeyError:
            known = ", ".join(sorted(BY_MODEL_TYPE))
            raise ModelError(
                f"models of type '{self.model_type}' are not known; known types: {known}"
            ) from None


def read_facts(config: Mapping[str, Any], source: str, n_params: int | None = None) -> ModelFacts:
    """Read a config.json.

    Raises:
        ModelError: a field that every language model has is not there.
    """
    values: dict[str, int] = {}
    for field, names in _NAMES.items():
        found = [config[name] for name in names if isinstance(config.get(name), int)]
        if not found:
            raise ModelError(f"{source}: none of {', '.join(names)} is given as a number")
        if isinstance(found[0], bool) or found[0] < 1:
            raise ModelError(f"{source}: {field} is {found[0]}; expected 1 or more")
        values[field] = found[0]
    model_type = config.get("model_type")
    if not isinstance(model_type, str):
        raise ModelError(f"{source}: model_type is missing")
    widths = [config[n] for n in ("intermediate_size", "n_inner") if config.get(n)]
    d_mlp = widths[0] if widths else 4 * values["d_model"]
    return ModelFacts(model_type=model_type, d_mlp=d_mlp, n_params=n_params, **values)
