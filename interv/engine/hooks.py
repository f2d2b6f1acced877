"""Visiting a model's activations during one forward, and leaving it as it was found."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from interv.errors import EngineError
from interv.models.anatomy import Place

Visit = Callable[[Tensor, Callable[[], Tensor]], Tensor]
"""Gets what passes a place, and a way to the module's input; returns what goes on.

Writes into neither.
"""


@contextlib.contextmanager
def visiting(
    model: nn.Module, visits: Mapping[Place, Visit], *, grad: bool = False
) -> Iterator[None]:
    """Within: no gradients unless `grad`, no dropout, and each place passes through its visit.

    Afterwards the hooks are gone, the user's own are still there, and every module is in the
    mode in which it was; also after an exception.

    Raises:
        EngineError: the model has no such place, or one did not fire exactly once.
    """
    fired: Counter[Place] = Counter()

    def counted(place: Place, visit: Visit) -> Visit:
        def count(value: Tensor, given: Callable[[], Tensor]) -> Tensor:
            fired[place] += 1
            return visit(value, given)

        return count

    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.set_grad_enabled(grad))
        stack.enter_context(_evaluating(model))
        # What goes on into the stream is settled before what reads it gets a tensor of its own.
        for place, visit in sorted(visits.items(), key=lambda item: not item[0].shared):
            stack.enter_context(
                _hooked(find_module(model, place.path), place, counted(place, visit))
            )
        yield
    for place in visits:
        if fired[place] != 1:
            raise EngineError(f"{place}: fired {fired[place]} times, expected once")


def find_module(model: nn.Module, path: str) -> nn.Module:
    """The module at a path; an EngineError says how far the path goes."""
    module, walked = model, ""
    for name in path.split(".") if path else ():
        child = getattr(module, name, None) if not name.isdigit() else module._modules.get(name)
        if not isinstance(child, nn.Module):
            have = ", ".join(name for name, _ in module.named_children()) or "no modules"
            raise EngineError(f"no module '{path}': {walked or 'the model'} has {have}")
        module, walked = child, f"{walked}.{name}" if walked else name
    return module


def foreign_hooks(model: nn.Module) -> list[str]:
    """Names of modules that have hooks of somebody else's.

    Those that transformers leaves behind once it was asked for hidden states do nothing unasked.
    """
    return [
        name or "the model"
        for name, module in model.named_modules()
        for hook in (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
        if not getattr(hook, "__module__", "").startswith("transformers.")
    ]


@contextlib.contextmanager
def skipping(blocks: nn.Module, upto: int, *, in_tuple: bool) -> Iterator[None]:
    """Within: blocks before `upto` pass on what they get, in a tuple where they give tuples."""

    def passing(*args: Any, **kwargs: Any) -> Any:
        value = args[0] if args else kwargs["hidden_states"]
        return (value, None) if in_tuple else value

    with contextlib.ExitStack() as stack:
        for _, block in zip(range(upto), blocks.children(), strict=False):
            stack.enter_context(running(block, passing))
        yield


@contextlib.contextmanager
def running(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Within: the module runs `forward`; afterwards what it ran before.

    That is its class's method, or an attribute of its own, as wrappers of other libraries are
    (`accelerate` puts one on every module that it dispatches).
    """
    own = vars(module).get("forward")
    module.forward = forward
    try:
        yield
    finally:
        if own is None:
            del module.forward
        else:
            module.forward = own


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
def _hooked(module: nn.Module, place: Place, visit: Visit) -> Iterator[None]:
    """Pass one side of a module through a visit."""

    def on_output(_module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        first = output[0] if isinstance(output, tuple) else output
        if not isinstance(first, Tensor):
            raise EngineError(f"{place}: gives {type(first).__name__}, not a tensor")
        new = visit(first, lambda: module_input(place, args, kwargs)[1])
        return (new, *output[1:]) if isinstance(output, tuple) else new

    def on_input(_module: nn.Module, args: Any, kwargs: Any) -> Any:
        name, value = module_input(place, args, kwargs)
        new = visit(value, lambda: value)
        if place.shared:
            # The stream that goes round the module is this very tensor.
            value.copy_(new)
            return None
        if args:
            return (new, *args[1:]), kwargs
        return args, {**kwargs, name: new}

    if place.side == "output":
        handle = module.register_forward_hook(on_output, with_kwargs=True)
    else:
        handle = module.register_forward_pre_hook(on_input, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def module_input(
    place: Place, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[str, Tensor]:
    """A module's first input, and its name where it is not given by position."""
    name = "hidden_states" if "hidden_states" in kwargs else next(iter(kwargs), "")
    value = args[0] if args else kwargs.get(name)
    if not isinstance(value, Tensor):
        raise EngineError(f"{place}: gets {type(value).__name__}, not a tensor")
    return name, value
