"""The reference executor: full forwards with hooks, to be read in one sitting and believed.

Runs of one length share a forward. A source is run once and its states are kept until
`forget`. Every edit must happen exactly once, or it is an error.
"""

from __future__ import annotations

import contextlib
import inspect
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from interv.engine.runs import TOKEN_EMBEDDING, Edit, Run, Site
from interv.errors import EngineError
from interv.models.families import Family, Side

_Place = tuple[str, int]  # component, layer


class ReferenceExecutor:
    """Runs a `transformers` causal language model; leaves it as it was found."""

    def __init__(self, model: nn.Module, family: Family) -> None:
        self._model = model
        self._family = family
        self._states: dict[tuple[Run, _Place], Tensor] = {}
        self._keeps = "logits_to_keep" in inspect.signature(model.forward).parameters

    def logits(self, runs: Sequence[Run], keep: int) -> Tensor:
        self._need_sources(runs)
        logits, _ = self._forward(runs, keep, ())
        return logits

    def states(self, runs: Sequence[Run], sites: Sequence[Site]) -> list[Tensor]:
        places = {(site.component, site.layer) for site in sites}
        self._need(dict.fromkeys(runs, places))
        return [
            torch.stack(
                [self._states[run, (s.component, s.layer)][list(s.positions)] for run in runs]
            )
            for s in sites
        ]

    def forget(self) -> None:
        self._states.clear()

    def _need_sources(self, runs: Sequence[Run]) -> None:
        wanted: dict[Run, set[_Place]] = defaultdict(set)
        for run in runs:
            for edit in run.edits:
                if edit.source is not None:
                    wanted[edit.source].add((edit.site.component, edit.site.layer))
        self._need(wanted)

    def _need(self, wanted: Mapping[Run, set[_Place]]) -> None:
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
            self._need_sources(together)
            places = sorted(set().union(*(missing[run] for run in together)))
            _, states = self._forward(together, 1, places)
            for place, state in states.items():
                for row, run in enumerate(together):
                    self._states[run, place] = state[row]

    def _forward(
        self, runs: Sequence[Run], keep: int, capture: Sequence[_Place]
    ) -> tuple[Tensor, dict[_Place, Tensor]]:
        """One forward; the logits, and the captured states `[run, position, width]`."""
        length = len(runs[0].ids)
        if any(len(run.ids) != length for run in runs):
            raise EngineError("runs of different length in one forward")
        edits: dict[_Place, list[tuple[int, Edit]]] = defaultdict(list)
        for row, run in enumerate(runs):
            for edit in run.edits:
                edits[edit.site.component, edit.site.layer].append((row, edit))
        captured: dict[_Place, Tensor] = {}
        fired: Counter[_Place] = Counter()

        def visit(place: _Place, value: Tensor) -> Tensor:
            fired[place] += 1
            if value.shape[:2] != (len(runs), length):
                raise EngineError(
                    f"{_name(place)}: shape {tuple(value.shape)}, expected "
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

        ids = torch.tensor([run.ids for run in runs], device=_device(self._model))
        options: dict[str, Any] = {"logits_to_keep": keep} if self._keeps else {}
        with contextlib.ExitStack() as stack:
            stack.enter_context(torch.no_grad())
            stack.enter_context(_evaluating(self._model))
            places = sorted({*edits, *capture})
            for place in places:
                module, side = self._module(place)
                stack.enter_context(_hooked(module, side, place, visit))
            logits: Tensor = self._model(input_ids=ids, use_cache=False, **options).logits
        for place in places:
            if fired[place] != 1:
                raise EngineError(f"{_name(place)}: fired {fired[place]} times, expected once")
        logits = logits[:, -keep:]
        if not torch.isfinite(logits).all():
            raise EngineError(
                f"the logits are not finite in {logits.dtype}; use a wider model.dtype"
            )
        return logits, captured

    def _module(self, place: _Place) -> tuple[nn.Module, Side]:
        component, layer = place
        try:
            path, side = self._family.place(component, layer)
            return self._model.get_submodule(path), side
        except (KeyError, AttributeError) as error:
            raise EngineError(f"{_name(place)}: this model has no such site") from error


def _name(place: _Place) -> str:
    component, layer = place
    return component if component == TOKEN_EMBEDDING else f"{component} of layer {layer}"


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


@contextlib.contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """No dropout; afterwards each module is in the mode in which it was."""
    training = [module for module in model.modules() if module.training]
    try:
        for module in training:
            module.training = False
        yield
    finally:
        for module in training:
            module.training = True


@contextlib.contextmanager
def _hooked(module: nn.Module, side: Side, place: _Place, visit: Any) -> Iterator[None]:
    """Pass one side of a module through `visit(place, value)`.

    A tuple's first element is meant; an input may come by position or as `hidden_states`.
    """

    def on_output(_module: nn.Module, _args: Any, output: Any) -> Any:
        if isinstance(output, tuple):
            return (visit(place, output[0]), *output[1:])
        return visit(place, output)

    def on_input(_module: nn.Module, args: Any, kwargs: Any) -> Any:
        if args:
            return (visit(place, args[0]), *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": visit(place, kwargs["hidden_states"])}

    if side == "output":
        handle = module.register_forward_hook(on_output)
    else:
        handle = module.register_forward_pre_hook(on_input, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()
