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
    "n_kv_heads": ("num_key_value_heads", "num_kv_heads"),
    "d_model": ("hidden_size", "n_embd", "d_model"),
    "d_head": ("head_dim",),
    "d_mlp": ("intermediate_size", "n_inner", "ffn_dim", "ffn_hidden_size"),
    "n_positions": ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len"),
    "vocab_size": ("vocab_size",),
}
_NEEDED = ("n_layers", "d_model", "vocab_size")


@dataclass(frozen=True)
class Rotary:
    """Rotary embeddings whose angles depend on the longest row that is computed.

    Attributes:
        kind: dynamic (angles of the longest row seen so far) or longrope (one of two sets).
        n_positions: rows up to this length have the angles of training.
    """

    kind: str
    n_positions: int


@dataclass(frozen=True)
class ModelFacts:
    """Shape of a model, read from its config alone.

    Attributes:
        n_heads: query heads; 0 where there is no attention.
        n_kv_heads: key and value heads.
        d_head: columns of a head; `n_heads · d_head` need not be `d_model`.
        d_mlp: neurons of one layer's MLP.
        n_positions: the longest input; None where there is no such limit.
        rotary: set where a row's angles depend on other rows.
    """

    model_type: str
    n_layers: int
    n_heads: int
    n_kv_heads: int
    d_model: int
    d_head: int
    d_mlp: int
    n_positions: int | None
    vocab_size: int
    n_params: int | None = None
    rotary: Rotary | None = None

    @property
    def family(self) -> Family | None:
        """Its row of the table; None for types that are not in it."""
        return BY_MODEL_TYPE.get(self.model_type)


def read_facts(config: Mapping[str, Any], source: str, n_params: int | None = None) -> ModelFacts:
    """Read a config.json.

    Raises:
        ModelError: a field that every language model has is not there.
    """
    model_type = config.get("model_type")
    if not isinstance(model_type, str):
        raise ModelError(f"{source}: model_type is missing")
    inner = config.get("text_config")
    family = BY_MODEL_TYPE.get(model_type)
    known = {
        **(family.defaults if family else {}),
        **{k: v for k, v in config.items() if v is not None},
        **(inner if isinstance(inner, dict) else {}),
    }
    values: dict[str, int] = {}
    for field, names in _NAMES.items():
        found = [known[name] for name in names if isinstance(known.get(name), int)]
        if found and (isinstance(found[0], bool) or found[0] < 1):
            raise ModelError(f"{source}: {field} is {found[0]}; expected 1 or more")
        if found:
            values[field] = found[0]
        elif field in _NEEDED:
            raise ModelError(f"{source}: none of {', '.join(names)} is given as a number")
    n_heads = values.setdefault("n_heads", 0)
    if model_type == "falcon" and not known.get("new_decoder_architecture", False):
        values["n_kv_heads"] = 1 if known.get("multi_query", True) else n_heads
    values.setdefault("n_kv_heads", n_heads)
    values.setdefault("d_head", values["d_model"] // n_heads if n_heads else 0)
    values.setdefault("d_mlp", 4 * values["d_model"])
    n_positions, rotary = _positions(known, values.pop("n_positions", None), source)
    return ModelFacts(
        model_type=model_type,
        n_positions=n_positions,
        n_params=n_params,
        rotary=rotary,
        **values,
    )


_SCALED = ("linear", "dynamic", "yarn", "llama3", "longrope")


def _positions(
    known: Mapping[str, Any], stated: int | None, source: str
) -> tuple[int | None, Rotary | None]:
    """The longest input under scaled rotary embeddings, and whether rows depend on each other.

    `max_position_embeddings` may be the length before scaling (always for linear and dynamic, and
    where yarn is switched on in a config) or after it. The length before it is also
    `original_max_position_embeddings`, as transformers fills it in. Scaling that differs between
    kinds of layers comes with the length after it.
    """
    scaling = known.get("rope_parameters") or known.get("rope_scaling")
    if stated is None or not isinstance(scaling, dict):
        return stated, None
    kind = scaling.get("rope_type", scaling.get("type"))
    if kind not in _SCALED:
        return stated, None
    trained = stated
    if kind not in ("linear", "dynamic"):
        name = "original_max_position_embeddings"
        trained = known.get(name) or scaling.get(name) or stated
    factor = scaling.get("factor", 1.0)
    for name, value in (("factor", factor), ("original_max_position_embeddings", trained)):
        if isinstance(value, bool) or not isinstance(value, int | float) or value <= 0:
            raise ModelError(f"{source}: {name} of the {kind} RoPE scaling is {value!r}")
    rotary = Rotary(kind, int(trained)) if kind in ("dynamic", "longrope") else None
    return max(stated, int(trained * factor)), rotary
