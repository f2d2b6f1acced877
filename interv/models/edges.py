"""Whether a model's residual stream is a sum of its heads and MLPs, so that there are edges."""

from __future__ import annotations

from typing import Final

from interv.models.anatomy import Anatomy

_NEEDED: Final = (
    "block_input",
    "block_output",
    "attention_output",
    "attention_residual",
    "head_attention_value_output",
    "head_query_output",
    "head_key_output",
    "head_value_output",
    "mlp_output",
    "mlp_residual",
)


def why_no_edges(anatomy: Anatomy) -> str:
    """Return why edges between a model's components are not to be had; empty where they are."""
    whose = f"{anatomy.family.name} models" if anatomy.family else "this model"
    missing = [name for name in _NEEDED if name not in anatomy.components]
    if anatomy.facts is None or missing:
        return f"{whose} have no {', '.join(missing or ['layers'])}"
    for part in ("attention", "mlp"):
        if anatomy.stand(f"{part}_residual") != anatomy.stand(f"{part}_output"):
            return (
                f"in {whose} a norm follows the {part}: what goes into the residual stream is no "
                "sum of what the components give"
            )
    if "resid_mid" in anatomy.components and anatomy.stand("resid_mid").side == "output":
        return f"in {whose} the residual stream is what a norm gives"
    return ""
