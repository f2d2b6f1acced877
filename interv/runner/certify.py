"""Certification: the fast executor against the reference, on rows of the plan itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from interv.engine import Edit, Executor, ReferenceExecutor, Run, Site, SuffixExecutor, Vanilla
from interv.errors import EngineError

_SPREADS = 10
# Of the largest |logit|. Models compute parts in float32 also where they are in float64; in 16
# bits two right orders of summation are some roundings apart.
_FLOOR = {torch.float16: 4e-3, torch.bfloat16: 3e-2}
_WIDE_FLOOR = 1e-5


@dataclass(frozen=True)
class Certificate:
    """How far two executors were apart on the logits of some rows, and how far they may be.

    Attributes:
        rows: how many were compared.
        difference: the largest, of any logit.
        allowed: ten times the reference's own spread between batch sizes, at least 1e-5 of
            the largest |logit| (in bfloat16 0.03, in float16 0.004).
        worst: what the row with the largest difference does.
    """

    rows: int
    difference: float
    allowed: float
    worst: str

    @property
    def holds(self) -> bool:
        return self.difference <= self.allowed

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def certify(
    fast: Executor, reference: Executor, runs: Mapping[str, Sequence[Run]], at: Sequence[int]
) -> Certificate:
    """Compare two executors.

    Args:
        fast: the executor to certify.
        reference: the executor to believe.
        runs: rows, by what they do: all the kinds that a plan has.
        at: positions that are read.
    """
    rows = [run for of_kind in runs.values() for run in of_kind]
    kinds = [kind for kind, of_kind in runs.items() for _ in of_kind]
    together = reference.logits(rows, at)
    alone = torch.cat([reference.logits([run], at) for run in rows])
    differences = (fast.logits(rows, at) - together).abs().flatten(1).amax(1)
    worst = int(differences.argmax())
    return Certificate(
        len(rows), float(differences[worst]), tolerance(together, alone), kinds[worst]
    )


def tolerance(together: Tensor, alone: Tensor) -> float:
    """How far apart the logits of rows may be, given those that they have alone."""
    spread = float((together - alone).abs().max())
    floor = _FLOOR.get(together.dtype, _WIDE_FLOOR) * float(together.abs().max())
    return max(_SPREADS * spread, floor)


def certify_model(fast: SuffixExecutor, reference: ReferenceExecutor) -> Certificate:
    """Compare two executors on a model, by swaps in every component of a few layers.

    Raises:
        EngineError: they differ.
    """
    anatomy = reference.sites.anatomy
    base, source = tuple(range(3, 9)), (3, 4, 9, 6, 7, 8)
    layers = sorted({0, anatomy.n_layers // 2, anatomy.n_layers - 1})
    runs = {
        name: [
            Run(base, (Edit(Site(name, layer, (2, 4)), Vanilla(), Run(source)),))
            for layer in (layers if anatomy.has_layers(name) else (0,))
        ]
        for name in anatomy.components
    }
    certificate = certify(fast, reference, runs, (-1,))
    if not certificate.holds:
        raise refuse(certificate)
    fast.forget()
    reference.forget()
    return certificate


def refuse(certificate: Certificate) -> EngineError:
    """The error of a certificate that does not hold."""
    return EngineError(
        f"the suffix executor is not certified on this model: {certificate.worst} differs from "
        f"the reference by {certificate.difference:.3g} in a logit, {certificate.allowed:.3g} "
        "allowed. Set run.on_uncertified=reference to go on, slowly; and please report it"
    )
