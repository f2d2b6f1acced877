"""Certification: the fast executor against the reference, on rows of the plan itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from interv.engine.runs import Executor, Run
from interv.errors import EngineError

_SPREADS = 10
_FLOOR = 1e-5  # of the largest |logit|, in float32


@dataclass(frozen=True)
class Certificate:
    """How far two executors were apart on the logits of some rows, and how far they may be.

    Attributes:
        rows: how many were compared.
        difference: the largest, of any logit.
        allowed: ten times the reference's own spread between batch sizes, at least 1e-5 of
            the largest |logit|.
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
    fast: Executor, reference: Executor, runs: Mapping[str, Sequence[Run]], keep: int
) -> Certificate:
    """Compare two executors.

    Args:
        fast: the executor to certify.
        reference: the executor to believe.
        runs: rows of one length, by what they do: all the kinds that a plan has.
        keep: how many of the last positions are read.
    """
    rows = [run for of_kind in runs.values() for run in of_kind]
    kinds = [kind for kind, of_kind in runs.items() for _ in of_kind]
    together = reference.logits(rows, keep)
    alone = torch.cat([reference.logits([run], keep) for run in rows])
    differences = (fast.logits(rows, keep) - together).abs().flatten(1).amax(1)
    spread = float((together - alone).abs().max())
    floor = _FLOOR * float(together.abs().max())
    worst = int(differences.argmax())
    return Certificate(
        len(rows), float(differences[worst]), max(_SPREADS * spread, floor), kinds[worst]
    )


def refuse(certificate: Certificate) -> EngineError:
    """The error of a certificate that does not hold."""
    return EngineError(
        f"the suffix executor is not certified on this model: {certificate.worst} differs from "
        f"the reference by {certificate.difference:.3g} in a logit, {certificate.allowed:.3g} "
        "allowed. Set run.on_uncertified=reference to go on, slowly; and please report it"
    )
