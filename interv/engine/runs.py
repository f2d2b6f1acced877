"""What an executor is asked for: runs, as plain data.

A `Run` is one forward of one token sequence with edits made in it. An edit's source is a run
of its own, which may have edits too: serial interventions (source → source → base), held sites
and path patching are nothing but nesting. Runs are hashable; equal runs are the same run.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from interv.engine.interventions import Intervention
from interv.errors import EngineError

TOKEN_EMBEDDING = "token_embedding"

Place = tuple[str, int]
"""A component and its layer."""


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


def sources_of(runs: Iterable[Run]) -> dict[Run, set[Place]]:
    """The runs that these read from, and the places at which they do."""
    wanted: dict[Run, set[Place]] = defaultdict(set)
    for run in runs:
        for edit in run.edits:
            if edit.source is not None:
                wanted[edit.source].add((edit.site.component, edit.site.layer))
    return wanted


def at_sites(
    states: Mapping[tuple[Run, Place], Tensor], runs: Sequence[Run], sites: Sequence[Site]
) -> list[Tensor]:
    """Kept states `[run, n_positions, width]` at each site."""
    return [
        torch.stack([states[run, (s.component, s.layer)][list(s.positions)] for run in runs])
        for s in sites
    ]


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
