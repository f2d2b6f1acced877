"""pyvene's names and numbers: components, types, files, rotations."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from interv.engine.interventions import (
    Addition,
    Collect,
    Skip,
    Subtraction,
    Vanilla,
    Zero,
)
from interv.models.anatomy import Anatomy
from interv.models.families import HEAD_PREFIX, Side

CONFIG = "config.json"
OURS = "interv"

REPRESENTATION = (
    "layer",
    "component",
    "unit",
    "max_number_of_units",
    "low_rank_dimension",
    "intervention_type",
    "intervention",
    "subspace_partition",
    "group_key",
    "intervention_link_key",
    "moe_key",
    "source_representation",
    "hidden_source_representation",
    "latent_dim",
)
"""Fields of pyvene's RepresentationConfig, saved as a list in this order."""

STREAM = ("block_input", "block_output", "mlp_input", "mlp_activation", "mlp_output")
ATTENTION = ("attention_input", "attention_output", "attention_value_output")
PROJECTED = ("query_output", "key_output", "value_output")
HEADS = tuple(HEAD_PREFIX + name for name in ("attention_value_output", *PROJECTED))
PLAIN = STREAM + ATTENTION + PROJECTED
COMPONENTS: Mapping[str, tuple[str, ...]] = {
    "gpt2": PLAIN + HEADS,
    "gpt_neo": PLAIN + HEADS,
    "gpt_neox": STREAM + ATTENTION,
    "llama": PLAIN + HEADS,
    "mistral": PLAIN + HEADS,
    # Of these it has head components too, which crash or are wrong.
    "gemma": PLAIN,
    "gemma2": PLAIN,
    "olmo": PLAIN,
    "qwen2": PLAIN,
}
"""pyvene's names that work, by model type; not `attention_weight`, which never fires."""

LOCALIST: Mapping[str, type[Vanilla | Addition | Subtraction | Zero | Skip | Collect]] = {
    "VanillaIntervention": Vanilla,
    "AdditionIntervention": Addition,
    "SubtractionIntervention": Subtraction,
    "ZeroIntervention": Zero,
    "SkipIntervention": Skip,
    "CollectIntervention": Collect,
}
"""Those without tensors: done at each position and head by itself, to chosen columns."""

ROTATE = "rotate_layer.parametrizations.weight."
WRITES_INTO = "pyvene writes into the tensor itself, which other modules may read"


class Keys:
    """pyvene's names of representations, one after the other (`_get_representation_key`)."""

    def __init__(self) -> None:
        self._seen: dict[str, int] = {}

    def next(self, row: Mapping[str, Any]) -> str:
        """The name of a representation; like ones are numbered."""
        unit, component = row["unit"].replace(".", "_"), row["component"]
        if "." in component:
            start = f"comp_{component.replace('.', '_')}"
        else:
            start = f"layer_{row['layer']}_comp_{component}"
        key = f"{start}_unit_{unit}_nunit_{row['max_number_of_units']}"
        number = self._seen[key] = self._seen.get(key, -1) + 1
        return f"{key}#{number}"


def path_name(anatomy: Anatomy, path: str, side: Side) -> tuple[str, int] | None:
    """The component and layer whose place a module's side is, whole; None where none is."""
    for component in anatomy.components:
        if anatomy.stand(component).fused or component.startswith(HEAD_PREFIX):
            continue
        layers = range(anatomy.n_layers if anatomy.has_layers(component) else 1)
        for layer in layers:
            place = anatomy.place(component, layer)
            if (place.path, place.side, place.pattern) == (path, side, False):
                return component, layer
    return None


def orthogonal(original: Tensor, base: Tensor) -> Tensor:
    """R `[width, rank]` as torch's orthogonal parametrization computes it (pyvene's layers).

    `torch.nn.utils.parametrizations._Orthogonal.forward`: the matrix exponential where R is
    square, a product of Householder reflections where it is tall; then from `base`
    `[width, width]`.
    """
    wide = original.double()
    if wide.shape[0] == wide.shape[1]:
        lower = wide.tril()
        turn = torch.matrix_exp(lower - lower.T)
    else:
        reflections = wide.tril(-1)
        scales = 2 / (1 + reflections.square().sum(0))
        # torch cuts the diagonal's signs to whole numbers. Weight decay makes 0 of them, and so
        # of R, in pyvene too; the rotation is then refused, as it is none.
        turn = torch.linalg.householder_product(reflections, scales) * original.diagonal().int()
    return (base.double() @ turn).float()


def parametrized(matrix: Tensor) -> dict[str, Tensor]:
    """The state from which `orthogonal` gives `matrix`, `[width, rank]`."""
    width, rank = matrix.shape
    full, _ = torch.linalg.qr(matrix.double(), mode="complete")
    base = torch.cat([matrix.double(), full[:, rank:]], 1).float()
    return {ROTATE + "original": -torch.eye(width, rank), ROTATE + "0.base": base}
