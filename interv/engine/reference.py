"""The reference executor: full forwards with hooks, to be read in one sitting and believed.

Runs of one length share a forward. A source is run once and its states are kept until
`forget`. Every edit must happen exactly once, or it is an error.
"""

from __future__ import annotations

import inspect
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from interv.engine.hooks import Visit, place_name, visiting
from interv.engine.runs import Edit, Place, Run, Site, at_sites, sources_of
from interv.errors import EngineError
from interv.models.families import Family


class ReferenceExecutor:
    """Runs a `transformers` causal language model; leaves it as it was found."""

    def __init__(self, model: nn.Module, family: Family) -> None:
        self._model = model
        self._family = family
        self._states: dict[tuple[Run, Place], Tensor] = {}
        self._keeps = "logits_to_keep" in inspect.signature(model.forward).parameters

    def logits(self, runs: Sequence[Run], keep: int) -> Tensor:
        self._need(sources_of(runs))
        logits, _ = self.forward(runs, keep)
        return logits

    def states(self, runs: Sequence[Run], sites: Sequence[Site]) -> list[Tensor]:
        places = {(site.component, site.layer) for site in sites}
        self._need(dict.fromkeys(runs, places))
        return at_sites(self._states, runs, sites)

    def forget(self) -> None:
        self._states.clear()

    def _need(self, wanted: Mapping[Run, set[Place]]) -> None:
        """Keep the states of these runs at these places; each run's own sources first."""
        missing = {
            run: places
            for run, places in wanted.items()
            if any((run, place) not in self._states for place in places)
        }
        by_length: dict[int, list[Run]] = defaultdict(list)
        for run in missing:
            by_length[len(run.ids)].append(run)
        for together in by_length.values():
            self._need(sources_of(together))
            places = sorted(set().union(*(missing[run] for run in together)))
            _, states = self.forward(together, 1, places)
            for place, state in states.items():
                for row, run in enumerate(together):
                    self._states[run, place] = state[row]

    def forward(
        self,
        runs: Sequence[Run],
        keep: int,
        capture: Sequence[Place] = (),
        **options: Any,
    ) -> tuple[Tensor, dict[Place, Tensor]]:
        """One forward of runs whose sources' states are kept already.

        Args:
            runs: of one length.
            keep: how many of the last positions' logits are wanted.
            capture: places whose states are wanted, after the edits.
            options: for the model.

        Returns:
            Logits `[run, keep, vocab]`, and at each captured place `[run, position, width]`.

        Raises:
            EngineError: an edit that did not happen once, or logits that are not finite.
        """
        length = len(runs[0].ids)
        if any(len(run.ids) != length for run in runs):
            raise EngineError("runs of different length in one forward")
        edits: dict[Place, list[tuple[int, Edit]]] = defaultdict(list)
        for row, run in enumerate(runs):
            for edit in run.edits:
                edits[edit.site.component, edit.site.layer].append((row, edit))
        captured: dict[Place, Tensor] = {}

        def visit_at(place: Place) -> Visit:
            def visit(value: Tensor) -> Tensor:
                if value.shape[:2] != (len(runs), length):
                    raise EngineError(
                        f"{place_name(place)}: shape {tuple(value.shape)}, expected "
                        f"({len(runs)}, {length}, width)"
                    )
                if place in edits:
                    # The module's own tensor may be used elsewhere: never write into it.
                    value = value.clone()
                    for row, edit in edits[place]:
                        at = torch.tensor(edit.site.positions, device=value.device)
                        source = None
                        if edit.source is not None:
                            source = self._states[edit.source, place][at].to(value.device)
                        value[row, at] = edit.intervention.apply(value[row, at], source)
                if place in capture:
                    captured[place] = value.detach()
                return value

            return visit

        ids = torch.tensor([run.ids for run in runs], device=device_of(self._model))
        options = {"use_cache": False, **options}
        if self._keeps:
            options["logits_to_keep"] = keep
        places = sorted({*edits, *capture})
        with visiting(self._model, self._family, {place: visit_at(place) for place in places}):
            logits: Tensor = self._model(input_ids=ids, **options).logits
        logits = logits[:, -keep:]
        check_finite(logits)
        return logits, captured


def check_finite(logits: Tensor) -> None:
    """Raise EngineError where a logit is not a number."""
    if not torch.isfinite(logits).all():
        raise EngineError(f"the logits are not finite in {logits.dtype}; use a wider model.dtype")


def device_of(model: nn.Module) -> torch.device:
    """Where a model's first parameters are, and its inputs belong."""
    return next(model.parameters()).device
