"""What an executor is asked for: runs, as plain data.

A `Run` is one forward of one token sequence with edits made in it. An edit's source is a run
of its own, which may have edits too: serial interventions (source → source → base), held sites
and path patching are nothing but nesting. Runs are hashable; equal runs are the same run.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from interv.engine.interventions import Intervention
from interv.errors import EngineError

TOKEN_EMBEDDING = "token_embedding"


@dataclass(frozen=True)
class Site:
    """A component in a layer (0 for `token_embedding`) at some positions, counted from 0."""

    component: str
    layer: int
    positions: tuple[int, ...]


@dataclass(frozen=True)
class Edit:
    """An intervention at a site; the source's activations come from the same site of `source`.

    Raises:
        EngineError: the intervention needs a source and has none, or the other way round.
    """

    site: Site
    intervention: Intervention
    source: Run | None = None

    def __post_init__(self) -> None:
        if self.intervention.needs_source != (self.source is not None):
            name = type(self.intervention).__name__
            needs = "needs a source" if self.intervention.needs_source else "takes no source"
            raise EngineError(f"{name} {needs}")


@dataclass(frozen=True)
class Run:
    """One row: token ids, and the edits made in order while it runs."""

    ids: tuple[int, ...]
    edits: tuple[Edit, ...] = ()


class Executor(Protocol):
    """Computes runs. All executors give the same values, within the last bits."""

    def logits(self, runs: Sequence[Run], keep: int) -> Tensor:
        """Logits `[run, keep, vocab]` at the last `keep` positions of runs of one length."""
        ...

    def states(self, runs: Sequence[Run], sites: Sequence[Site]) -> list[Tensor]:
        """Activations `[run, n_positions, width]` at each site, after the runs' own edits."""
        ...

    def forget(self) -> None:
        """Drop the sources' states that are kept for further runs."""
        ...
