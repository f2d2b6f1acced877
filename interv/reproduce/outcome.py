"""What became of each spec."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from interv.report.claims import Verdict

Status = Literal["reproduced", "missed", "failed", "not run"]
"""`missed`: a claim that fails; `failed`: an error; `not run`: its weights are not here."""


@dataclass(frozen=True)
class Outcome:
    """One spec, run or not.

    Attributes:
        kind, name: of the spec; empty where it cannot be read.
        reason: why it failed, or was not run.
        checked: what of it was checked where it was not run, in words.
        claims: how many its reference has.
        verdicts: of a spec that was run.
        folder: of its run.
        seconds: that this took.
        exit_code: that the spec's own command would have had.
    """

    spec: Path
    kind: str
    name: str
    model: str
    status: Status
    reason: str = ""
    checked: str = ""
    claims: int = 0
    verdicts: tuple[Verdict, ...] = ()
    folder: Path | None = None
    seconds: float = 0.0
    exit_code: int = 0

    @property
    def label(self) -> str:
        """A short name: its folder's and its own."""
        return f"{self.spec.absolute().parent.name}/{self.spec.stem}"

    @property
    def command(self) -> str:
        """What runs this spec alone."""
        return shlex.join(["interv", self.kind or "validate", str(self.spec)])

    def as_dict(self) -> dict[str, Any]:
        """The outcome as plain data."""
        return {
            "spec": str(self.spec),
            "kind": self.kind,
            "name": self.name,
            "model": self.model,
            "status": self.status,
            "reason": self.reason,
            "checked": self.checked,
            "claims": self.claims,
            "command": self.command,
            "folder": str(self.folder) if self.folder else None,
            "seconds": round(self.seconds, 1),
            "verdicts": [verdict.as_dict() for verdict in self.verdicts],
        }


def exit_code(outcomes: list[Outcome]) -> int:
    """Of the whole: 2 where a spec is wrong, else 1 where a claim was missed or a run failed."""
    return max((outcome.exit_code for outcome in outcomes), default=0)
