"""A user's own metrics, in a Python file that is named on the command line (`--plugin FILE`).

No spec names a file with code: only who types the command does. The file's hash is part of the
identity of what is computed with it.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

from interv.errors import UsageError

_MARK = "_interv_metric"
_FUNCTION = "_interv_function"
F = TypeVar("F", bound=Callable[..., Any])


def metric(function: F) -> F:
    """Mark a function of a plug-in file as a metric, named as the function.

    It gets the logits `[run, vocab]` at the position where the answer is predicted, and the
    token ids of the answers and of the wrong answers (the first token of each); it gives a
    tensor `[run]`.
    """
    setattr(function, _MARK, True)
    return function


def function(function: F) -> F:
    """Mark a function of a plug-in file as one that a causal model's variable may name.

    It gets a numpy array `[n]` for each parent, and gives one of the variable's values.
    """
    setattr(function, _FUNCTION, True)
    return function


@dataclass(frozen=True)
class Plugin:
    """What a file holds."""

    path: Path
    sha256: str
    metrics: Mapping[str, Callable[..., Any]]
    functions: Mapping[str, Callable[..., Any]]


def load_plugin(path: Path) -> Plugin:
    """Run a file and collect its metrics.

    Raises:
        UsageError: it is not there, fails, or has none.
    """
    if not path.is_file():
        raise UsageError(f"--plugin {path}: is not a file")
    module = ModuleType(f"interv_plugin_{path.stem}")
    module.__file__ = str(path)
    # Dataclasses look their module up by its name.
    sys.modules[module.__name__] = module
    try:
        # Not by import: what is run is what is hashed, and no bytecode is left beside the file.
        source = path.read_bytes()
        exec(compile(source, str(path), "exec"), vars(module))
    except (Exception, SystemExit) as error:  # the user's own code may raise anything
        kind = type(error).__name__
        raise UsageError(f"--plugin {path}: cannot be run: {kind}: {error}") from error
    # `is True`: some objects, such as torch.ops, have any attribute that one asks for.
    metrics, functions = (
        {
            name: value
            for name, value in vars(module).items()
            if callable(value) and getattr(value, mark, None) is True
        }
        for mark in (_MARK, _FUNCTION)
    )
    if not metrics and not functions:
        raise UsageError(
            f"--plugin {path}: has no function marked @interv.metric or @interv.function"
        )
    return Plugin(path, hashlib.sha256(source).hexdigest(), metrics, functions)
