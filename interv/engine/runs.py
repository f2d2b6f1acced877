"""What an executor is asked for: runs, as plain data.

A `Run` is one forward of one input with edits made in it. An edit's source is a run of its
own, which may have edits too: serial interventions (source → source → base), held sites and
path patching are nothing but nesting; several sources are several edits; linked sites share
one intervention. Runs are hashable; equal runs are the same run.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, final

import numpy as np
import torch
from torch import Tensor

from interv.engine.interventions import Intervention
from interv.errors import EngineError


@dataclass(frozen=True)
class Site:
    """Some units of a component.

    Attributes:
        component: a name, or the path of a module and its side (`encoder.0.output`).
        layer: the block; 0 for what stands once in the model, and for paths.
        positions: counted from 0 (the pixels of a feature map, row by row); None: all.
        heads: some of the component's heads; None: all.
        dims: columns: of each head where heads are named, else of the component; None: all.
    """

    component: str
    layer: int = 0
    positions: tuple[int, ...] | None = None
    heads: tuple[int, ...] | None = None
    dims: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.component, str):
            raise EngineError(f"a component is a name or a path, not {_kind(self.component)}")
        for name in ("positions", "heads", "dims"):
            given = getattr(self, name)
            if given is None:
                continue
            units = _integers(given, name)
            if len(set(units)) != len(units) or min(units, default=-1) < 0:
                raise EngineError(f"{name} {units}: at least one, each once, counted from 0")
            object.__setattr__(self, name, units)


@dataclass(frozen=True)
class Edit:
    """An intervention at a site.

    Attributes:
        source: the run whose activations it gets; None where it takes none.
        read: where in the source; None: at the same site.

    Raises:
        EngineError: the intervention needs a source and has none, or the other way round.
    """

    site: Site
    intervention: Intervention
    source: Run | None = None
    read: Site | None = None

    def __post_init__(self) -> None:
        for name, kind, may_miss in (
            ("site", Site, False),
            ("intervention", Intervention, False),
            ("source", Run, True),
            ("read", Site, True),
        ):
            value = getattr(self, name)
            if not isinstance(value, kind) and not (may_miss and value is None):
                raise EngineError(f"an edit's {name} is a {kind.__name__}, not {_kind(value)}")
        if self.intervention.needs_source != (self.source is not None):
            name = type(self.intervention).__name__
            needs = "needs a source" if self.intervention.needs_source else "takes no source"
            raise EngineError(f"{name} {needs}")
        if self.read is not None and self.source is None:
            raise EngineError("a place to read without a source to read from")

    @property
    def reads(self) -> Site:
        """Where the source is read."""
        return self.read or self.site


@final
class Inputs:
    """One row's inputs where they are not token ids: a tensor for each argument of `forward`.

    The tensors have no batch dimension. Equal inputs are those of equal names, shapes and bytes.
    """

    def __init__(self, *args: Tensor, **kwargs: Tensor) -> None:
        self.args, self.kwargs = args, kwargs
        for tensor in (*args, *kwargs.values()):
            if not isinstance(tensor, Tensor):
                raise EngineError(f"inputs are tensors, not {_kind(tensor)}")
        digest = hashlib.sha256()
        for name, tensor in [*enumerate(args), *sorted(kwargs.items())]:
            digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
            digest.update(
                tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data
            )
        self._digest = digest.digest()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Inputs) and self._digest == other._digest

    def __hash__(self) -> int:
        return hash(self._digest)


@dataclass(frozen=True)
class Run:
    """One row: token ids (or other inputs), and the edits made in order while it runs.

    Lists, arrays and tensors of one dimension are taken as the tuples that they list.

    Raises:
        EngineError: ids that are no whole numbers, or none; edits that are none.
    """

    ids: tuple[int, ...] | Inputs
    edits: tuple[Edit, ...] = ()
    _hash: int = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not isinstance(self.ids, Inputs):
            object.__setattr__(self, "ids", _integers(self.ids, "token ids"))
        if type(self.edits) is not tuple:
            if not isinstance(self.edits, list):
                raise EngineError(f"a run's edits are a tuple of Edit, not {_kind(self.edits)}")
            object.__setattr__(self, "edits", tuple(self.edits))
        for edit in self.edits:
            if not isinstance(edit, Edit):
                raise EngineError(f"a run's edits are a tuple of Edit, not of {_kind(edit)}")
        # Sources nest: without this, hashing a run would walk through all of them each time.
        object.__setattr__(self, "_hash", hash((self.ids, self.edits)))

    def __hash__(self) -> int:
        return self._hash

    def __len__(self) -> int:
        """How many tokens it has.

        Raises:
            EngineError: its inputs are not tokens.
        """
        if isinstance(self.ids, Inputs):
            raise EngineError("these inputs are not tokens: they have no length")
        return len(self.ids)

    def __bool__(self) -> bool:
        return True


def _kind(value: object) -> str:
    return f"the class {value.__name__}" if isinstance(value, type) else type(value).__name__


def _integers(given: Any, what: str) -> tuple[int, ...]:
    """Whole numbers as a tuple: most of them are one already."""
    if type(given) is tuple and all(type(item) is int for item in given):
        return given
    if isinstance(given, Tensor | np.ndarray):
        if given.ndim != 1:
            raise EngineError(f"{what}: one dimension, not the shape {tuple(given.shape)}")
        given = given.tolist()
    if isinstance(given, tuple | list | range):
        whole = [isinstance(i, int | np.integer) and not isinstance(i, bool) for i in given]
        if all(whole):
            return tuple(int(item) for item in given)
        wrong = given[whole.index(False)]
        raise EngineError(f"{what}: whole numbers, not {wrong!r} ({_kind(wrong)})")
    raise EngineError(f"{what}: a tuple of whole numbers, not {given!r} ({_kind(given)})")


def check_asked(
    runs: Sequence[Run],
    at: Sequence[int] | None = None,
    tokens: Sequence[int] | None = None,
    n_tokens: int | None = None,
) -> None:
    """Check what an executor is asked for, before it means something else.

    Args:
        runs, at, tokens: as `Executor.logits` has them.
        n_tokens: of the vocabulary, where that is known.

    Raises:
        EngineError: no sequence of runs, positions or tokens, or a token that is none.
    """
    if isinstance(runs, Run) or not isinstance(runs, Sequence):
        raise EngineError(f"runs are asked for in a list, not as {_kind(runs)}")
    for run in runs:
        if not isinstance(run, Run):
            raise EngineError(f"a list of Run is expected, not of {_kind(run)}")
    if at is not None:
        _integers(tuple(at) if isinstance(at, Iterable) else at, "at")
    if tokens is not None:
        wanted = _integers(tuple(tokens) if isinstance(tokens, Iterable) else tokens, "tokens")
        most = max(wanted, default=0) if n_tokens is None else n_tokens - 1
        if min(wanted, default=-1) < 0 or max(wanted) > most:
            among = "" if n_tokens is None else f", of a vocabulary of {n_tokens}"
            raise EngineError(f"tokens {list(wanted)}: at least one, each counted from 0{among}")


def read_positions(run: Run, at: Sequence[int] | None) -> tuple[int, ...] | None:
    """Positions of a run that are read, counted from 0; None: all that there is.

    Raises:
        EngineError: the run has no such position.
    """
    if at is None or isinstance(run.ids, Inputs):
        return None
    length = len(run)
    if any(not -length <= position < length for position in at):
        raise EngineError(f"positions {list(at)} of a run of {length} tokens")
    return tuple(position % length for position in at)


class Executor(Protocol):
    """Computes runs. All executors give the same values, within the last bits."""

    def logits(
        self,
        runs: Sequence[Run],
        at: Sequence[int] | None = (-1,),
        tokens: Sequence[int] | None = None,
    ) -> Tensor:
        """What the model gives for each run.

        Args:
            runs: in any order and of any length.
            at: positions, negative ones from each run's end; None: all (runs of one length).
            tokens: columns of the vocabulary that are wanted; None: all.

        Returns:
            `[run, len(at), vocab or len(tokens)]`; of a model whose inputs are not tokens, its
            whole output `[run, ...]`.

        Raises:
            EngineError: a site that does not exist, an edit that did not happen once, logits
                that are not finite.
        """
        ...

    def states(self, runs: Sequence[Run], sites: Sequence[Site]) -> list[list[Tensor]]:
        """Activations `[n_positions, width]` for each site and run, after the run's own edits.

        Of a pattern: `[n_queries, n_heads · n_keys]`.
        """
        ...

    def forget(self, runs: Collection[Run] | None = None) -> None:
        """Drop what is kept for further runs: of these, or of all."""
        ...
