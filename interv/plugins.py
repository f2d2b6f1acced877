"""A user's own metrics and functions, in Python files named on the command line (`--plugin FILE`).

No spec names a file with code: only who types the command does. The files' hash is part of the
identity of what is computed with them.
"""

from __future__ import annotations

import hashlib
import inspect
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

from interv.errors import UsageError

_MARK = "_interv_metric"
_FUNCTION = "_interv_function"
_METRIC_ARGUMENTS = ("logits", "answers", "wrong")
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
    """What one file holds, or several together.

    Attributes:
        paths: the files, in the order in which they were named.
        sha256: of the file; of several the hash of theirs, whatever their order.
    """

    paths: tuple[Path, ...]
    sha256: str
    metrics: Mapping[str, Callable[..., Any]]
    functions: Mapping[str, Callable[..., Any]]

    def as_dict(self) -> dict[str, Any]:
        """Return what the run record keeps: the files' names, and their hash."""
        return {"files": [path.name for path in self.paths], "sha256": self.sha256}


def load_plugins(paths: Sequence[Path]) -> Plugin:
    """Run files, and collect the metrics and functions of all of them.

    Raises:
        UsageError: a file is not there, fails or has none, a metric cannot be called as metrics
            are, or two files have one name in common.
    """
    plugins = [load_plugin(path) for path in dict.fromkeys(paths)]
    if len(plugins) == 1:
        return plugins[0]
    metrics: dict[str, Callable[..., Any]] = {}
    functions: dict[str, Callable[..., Any]] = {}
    owners: dict[str, Path] = {}
    for plugin in plugins:
        for name in (*plugin.metrics, *plugin.functions):
            if name in owners:
                raise UsageError(
                    f"--plugin {plugin.paths[0]}: '{name}' is in {owners[name]} too; rename one"
                )
            owners[name] = plugin.paths[0]
        metrics |= plugin.metrics
        functions |= plugin.functions
    hashes = "".join(sorted(plugin.sha256 for plugin in plugins))
    whole = hashlib.sha256(hashes.encode()).hexdigest()
    return Plugin(tuple(owner.paths[0] for owner in plugins), whole, metrics, functions)


def takes(function: Callable[..., Any], n: int) -> str | None:
    """Return why a function cannot be called with `n` arguments by position; None where it can."""
    try:
        signature = inspect.signature(function)
    except ValueError:
        return None  # written in C: nothing says what it takes
    try:
        signature.bind(*range(n))
    except TypeError:
        return f"{function.__name__}{signature}"
    return None


def load_plugin(path: Path) -> Plugin:
    """Run a file and collect its metrics and functions.

    Raises:
        UsageError: it is not there, fails or has none, or a metric takes other arguments.
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
    for value in metrics.values():
        if wrong := takes(value, len(_METRIC_ARGUMENTS)):
            code = getattr(value, "__code__", None)
            line = f":{code.co_firstlineno}" if code else ""
            raise UsageError(
                f"--plugin {path}{line}: the metric {wrong} cannot be called as metrics are; "
                f"expected ({', '.join(_METRIC_ARGUMENTS)})"
            )
    return Plugin((path,), hashlib.sha256(source).hexdigest(), metrics, functions)
