"""Visiting a model's activations during one forward, and leaving it as it was found."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from interv.engine.runs import TOKEN_EMBEDDING, Place
from interv.errors import EngineError
from interv.models.families import Family, Side

Visit = Callable[[Tensor], Tensor]
"""Gets the activations that pass a place, returns those that go on; writes into neither."""


def place_name(place: Place) -> str:
    """A place in words."""
    component, layer = place
    return component if component == TOKEN_EMBEDDING else f"{component} of layer {layer}"


@contextlib.contextmanager
def visiting(model: nn.Module, family: Family, visits: Mapping[Place, Visit]) -> Iterator[None]:
    """Within: no gradients, no dropout, and each place passes through its visit.

    Afterwards the hooks are gone, the user's own are still there, and every module is in the
    mode in which it was; also after an exception.

    Raises:
        EngineError: the model has no such place, or one did not fire exactly once.
    """
    fired: Counter[Place] = Counter()

    def counted(place: Place, visit: Visit) -> Visit:
        def count(value: Tensor) -> Tensor:
            fired[place] += 1
            return visit(value)

        return count

    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        stack.enter_context(_evaluating(model))
        for place, visit in visits.items():
            module, side = find_module(model, family, place)
            stack.enter_context(_hooked(module, side, counted(place, visit)))
        yield
    for place in visits:
        if fired[place] != 1:
            raise EngineError(f"{place_name(place)}: fired {fired[place]} times, expected once")


def find_module(model: nn.Module, family: Family, place: Place) -> tuple[nn.Module, Side]:
    """The module and its side at which a place stands.

    Raises:
        EngineError: the model has no such place.
    """
    component, layer = place
    try:
        path, side = family.place(component, layer)
        return model.get_submodule(path), side
    except (KeyError, AttributeError) as error:
        raise EngineError(f"{place_name(place)}: this model has no such site") from error


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
def _hooked(module: nn.Module, side: Side, visit: Visit) -> Iterator[None]:
    """Pass one side of a module through a visit.

    A tuple's first element is meant; an input may come by position or as `hidden_states`.
    """

    def on_output(_module: nn.Module, _args: Any, output: Any) -> Any:
        if isinstance(output, tuple):
            return (visit(output[0]), *output[1:])
        return visit(output)

    def on_input(_module: nn.Module, args: Any, kwargs: Any) -> Any:
        if args:
            return (visit(args[0]), *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": visit(kwargs["hidden_states"])}

    if side == "output":
        handle = module.register_forward_hook(on_output)
    else:
        handle = module.register_forward_pre_hook(on_input, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()
