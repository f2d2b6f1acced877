"""The reference executor: full forwards with hooks, to be read in one sitting and believed.

Runs of one length share a forward. A source is run once and its states are kept until
`forget`. Every edit must happen exactly once, or it is an error. Takes any module.
"""

from __future__ import annotations

import contextlib
import inspect
from collections import defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from interv.engine.attention import Call, fit_keys, routing
from interv.engine.hooks import Visit, find_module, skipping, visiting
from interv.engine.memory import halving
from interv.engine.runs import Edit, Inputs, Run, Site, check_asked, read_positions
from interv.engine.sites import Sites, Todo, applied, make_edits, unfold
from interv.errors import EngineError
from interv.models.anatomy import Anatomy, Place

_MAX_TOKENS = 4096  # in one forward of many sources
_OUTPUTS = ("logits", "last_hidden_state")


@dataclass(frozen=True)
class Start:
    """Blocks before `layer` are left out; it starts from `inputs` `[run, pos, d_model]`.

    `in_tuple`: blocks give tuples.
    """

    layer: int
    inputs: Tensor
    in_tuple: bool


class ReferenceExecutor:
    """Runs a module; leaves it as it was found.

    Args:
        model: a `transformers` language model, or any module.
        anatomy: where its components stand; without one, modules are named by path.
        batch_dim: dimension of the rows, of inputs that are not tokens.

    Attributes:
        model: the module.
        sites: of the model.
        kept: states of runs at places, `[pos, ...]`, until `forget`.
    """

    def __init__(
        self, model: nn.Module, anatomy: Anatomy | None = None, batch_dim: int = 0
    ) -> None:
        self.model = model
        self._batch_dim = batch_dim
        self.sites = Sites(anatomy or Anatomy())
        self.kept: dict[tuple[Run, Place], Tensor] = {}
        forward = inspect.signature(model.forward).parameters
        self._keeps, self._caches = "logits_to_keep" in forward, "use_cache" in forward

    def logits(
        self,
        runs: Sequence[Run],
        at: Sequence[int] | None = (-1,),
        tokens: Sequence[int] | None = None,
    ) -> Tensor:
        check_asked(runs, at, tokens, self.sites.n_tokens)
        self.need(self.sites.wanted_by(runs))
        check_lengths(runs, at)

        def of(some: Sequence[Run]) -> Tensor:
            logits, _ = self.forward(some, at)
            if at is not None and logits.dim() == 2 and not isinstance(some[0].ids, Inputs):
                raise EngineError(
                    f"{type(self.model).__name__} gives one output for a run, not one at each "
                    "position: ask for it with at=None"
                )
            return logits if tokens is None else logits[..., list(tokens)]

        found: dict[int, Tensor] = {}
        for together in by_shape(runs):
            found |= zip(together, halving([runs[i] for i in together], of), strict=True)
        return torch.stack([found[i] for i in range(len(runs))])

    def states(self, runs: Sequence[Run], sites: Sequence[Site]) -> list[list[Tensor]]:
        check_asked(runs)
        self.sites.check_all(runs, sites)
        self.need({run: {self.sites.place(site) for site in sites} for run in runs})
        return [[self.take(run, site).clone() for run in runs] for site in sites]

    def forget(self, runs: Collection[Run] | None = None) -> None:
        if runs is None:
            self.kept.clear()
            return
        for key in [key for key in self.kept if key[0] in runs]:
            del self.kept[key]

    def take(self, run: Run, site: Site) -> Tensor:
        """A kept state's part at a site, `[n_positions, width]`."""
        return self.sites.take(self.kept[run, self.sites.place(site)], site)

    def need(self, wanted: Mapping[Run, Collection[Place]]) -> None:
        """Keep the states of these runs at these places; each run's own sources first."""
        missing = {
            run: places
            for run, places in wanted.items()
            if any((run, place) not in self.kept for place in places)
        }
        runs = list(missing)
        for together in by_shape(runs):
            some = [runs[i] for i in together]
            self.need(self.sites.wanted_by(some))
            places = set().union(*(missing[run] for run in some))
            halving(some, partial(self._keep, places=places))

    def _keep(self, runs: Sequence[Run], places: Collection[Place]) -> Sequence[Run]:
        """Keep the states of runs of one shape, whose sources' are kept already."""
        _, states = self.forward(runs, (-1,), places)
        for place, state in states.items():
            self.kept.update({(run, place): one for run, one in zip(runs, state, strict=True)})
        return runs

    def forward(
        self,
        runs: Sequence[Run],
        at: Sequence[int] | None,
        capture: Collection[Place] = (),
        start: Start | None = None,
        inside: Callable[[Call], None] | None = None,
    ) -> tuple[Tensor, dict[Place, Tensor]]:
        """One forward of runs whose sources' states are kept already.

        Args:
            runs: of one length.
            at: positions whose logits are wanted; None: all, or the whole output.
            capture: places whose states are wanted, after the edits.
            start: where to begin, if not at the beginning.
            inside: shown each layer's attention.

        Returns:
            Logits `[run, position, vocab]`, and at each captured place `[run, pos, width]`; of
            a pattern `[run, query, head, key]`.

        Raises:
            EngineError: an edit that did not happen once, or logits that are not finite.
        """
        edits: dict[Place, list[tuple[int, Edit]]] = defaultdict(list)
        for row, run in enumerate(runs):
            for edit in run.edits:
                edits[self.sites.place(edit.site)].append((row, edit))
        captured: dict[Place, Tensor] = {}
        maps = self.sites.anatomy.family is None
        length = None if isinstance(runs[0].ids, Inputs) else len(runs[0])

        def opened(value: Tensor, place: Place) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
            return unfold(self._rows_first(value), len(runs), place, maps=maps, length=length)

        def visit_at(place: Place) -> Visit:
            def visit(value: Tensor, given: Callable[[], Tensor]) -> Tensor:
                rows, back = opened(value, place)
                if place in edits:
                    n = rows.shape[1]
                    todo = [Todo(edit, row * n, n) for row, edit in edits[place]]
                    flat = make_edits(
                        rows.flatten(0, 1), todo, self.sites, self.source, lambda: own(given)
                    )
                    rows = flat.reshape(rows.shape)
                    value = self._rows_back(back(rows), value)
                if place in capture:
                    # Some models go on to change it in place.
                    captured[place] = rows.clone()
                return value

            def own(given: Callable[[], Tensor]) -> Tensor:
                return opened(given(), place)[0].flatten(0, 1)

            return visit

        places = {*edits, *capture}
        visits = {p: visit_at(p) for p in sorted(places, key=str) if not p.pattern}
        patterns = {place for place in places if place.pattern}
        with contextlib.ExitStack() as stack:
            if start is not None:
                visits = stack.enter_context(self._starting(start, visits))
            stack.enter_context(visiting(self.model, visits))
            if patterns or inside:
                through = self._patterns(edits, capture, captured, inside)
                layers = range(start.layer if start else 0, self.sites.anatomy.n_layers)
                stack.enter_context(
                    routing(self.model, self.sites.anatomy, through, layers, masks=True)
                )
            layers_of = [self.sites.layer(place) for place in places]
            n_layers = self.sites.anatomy.n_layers
            whole = any(layer is None or layer >= n_layers for layer in layers_of)
            out = self.call(runs, at, whole=whole)
        check_finite(out)
        return out, captured

    def call(self, runs: Sequence[Run], at: Sequence[int] | None, *, whole: bool) -> Tensor:
        """The model's own forward of runs, whose edits are somebody else's to make.

        Args:
            runs: of one shape.
            at: positions whose logits are wanted; None: all.
            whole: whether what stands behind the blocks must see every position.
        """
        first = runs[0].ids
        if isinstance(first, Inputs):
            given = [run.ids for run in runs if isinstance(run.ids, Inputs)]
            args = [self._stacked(each) for each in zip(*(g.args for g in given), strict=True)]
            kwargs = {name: self._stacked([g.kwargs[name] for g in given]) for name in first.kwargs}
            out = self._rows_first(output_of(self.model(*args, **kwargs)))
            if not out.dim() or len(out) != len(runs):
                raise EngineError(
                    f"the model gives {tuple(out.shape)} for {len(runs)} runs, expected a row for "
                    "each, along dimension batch_dim"
                )
            return out
        positions = read_positions(runs[0], at)
        options: dict[str, Any] = {"use_cache": False} if self._caches else {}
        # Behind the blocks an edit counts positions from the first all the same.
        begin = min(positions) if positions and self._keeps and not whole else 0
        if self._keeps:
            options["logits_to_keep"] = len(first) - begin
        ids = torch.tensor([run.ids for run in runs], device=device_of(self.model))
        logits = output_of(self.model(input_ids=ids, **options))
        if logits.dim() == 2 and len(logits) == len(runs):
            return logits  # one output for a run: classes, say
        if logits.shape[1] != len(first) - begin:
            raise EngineError(f"logits of shape {tuple(logits.shape)} for {len(first)} tokens")
        return logits if positions is None else logits[:, [p - begin for p in positions]]

    @contextlib.contextmanager
    def _starting(self, start: Start, visits: dict[Place, Visit]) -> Any:
        anatomy = self.sites.anatomy
        if start.layer < anatomy.n_layers:
            entry = anatomy.place("block_input", start.layer)
        else:
            entry = anatomy.place("block_output", anatomy.n_layers - 1)
        then = visits.get(entry)

        def enter(_value: Tensor, given: Callable[[], Tensor]) -> Tensor:
            return then(start.inputs, given) if then else start.inputs

        blocks = find_module(self.model, anatomy.blocks())
        with skipping(blocks, start.layer, in_tuple=start.in_tuple):
            yield {**visits, entry: enter}

    def _patterns(
        self,
        edits: Mapping[Place, list[tuple[int, Edit]]],
        capture: Collection[Place],
        captured: dict[Place, Tensor],
        inside: Callable[[Call], None] | None,
    ) -> Callable[[Call], Tensor]:
        anatomy = self.sites.anatomy

        def through(call: Call) -> Tensor:
            if inside:
                inside(call)
            out = call.plain()
            if "attention_weight" not in anatomy.components:
                return out
            place = anatomy.place("attention_weight", call.layer)
            if place not in edits and place not in capture:
                return out
            pattern, attend = call.weights(call.query, call.key, call.value, call.mask)
            if place in edits:
                pattern = edit_pattern(pattern, edits[place], self.source)
                rows = sorted({row for row, _ in edits[place]})
                out = out.clone()
                out[rows] = attend(pattern)[rows]
            if place in capture:
                captured[place] = pattern.transpose(1, 2)
            return out

        return through

    def source(self, edit: Edit) -> Tensor:
        """An edit's source activations `[n_positions, width]`, which are kept already."""
        assert edit.source is not None
        return self.take(edit.source, edit.reads)

    def _stacked(self, rows: Sequence[Tensor]) -> Tensor:
        return torch.stack(list(rows), self._batch_dim).to(device_of(self.model))

    def _rows_first(self, value: Tensor) -> Tensor:
        batched = self._batch_dim and value.dim() > self._batch_dim
        return value.movedim(self._batch_dim, 0) if batched else value

    def _rows_back(self, value: Tensor, like: Tensor) -> Tensor:
        batched = self._batch_dim and like.dim() > self._batch_dim
        return value.movedim(0, self._batch_dim) if batched else value


def edit_pattern(
    pattern: Tensor,
    edits: Sequence[tuple[int, Edit]],
    source: Callable[[Edit], Tensor],
    first: Sequence[int] | None = None,
    lengths: Sequence[int] | None = None,
) -> Tensor:
    """A pattern `[row, head, query, key]` with edits made in order.

    Args:
        pattern: of some rows.
        edits: each with its row.
        source: an edit's source `[n_queries, n_heads · n_keys]`.
        first: position of each row's first query; None: 0.
        lengths: how many keys a row really has; None: all.
    """
    pattern = pattern.clone()
    for row, edit in edits:
        site = edit.site
        begin = first[row] if first else 0
        n_keys = lengths[row] if lengths else pattern.shape[-1]
        positions = range(begin, n_keys) if site.positions is None else site.positions
        queries = torch.tensor([p - begin for p in positions])
        heads = torch.tensor(range(pattern.shape[1]) if site.heads is None else site.heads)
        base = pattern[row][heads[None], queries[:, None], :n_keys]
        other: Tensor | None = None
        if edit.source is not None:
            other = source(edit).to(base.device)
            other = other.reshape(len(other), len(heads), -1)
            other = fit_keys(other, n_keys).flatten(1)
        new = applied(edit, base.flatten(1), other)
        pattern[row, heads[None], queries[:, None], :n_keys] = new.reshape(base.shape)
    return pattern


def check_lengths(runs: Sequence[Run], at: Sequence[int] | None) -> None:
    """Raise EngineError where all positions are wanted of runs that have not as many."""
    if at is None and len({_shape(run) for run in runs}) > 1:
        raise EngineError("at=None gives all positions: of runs of one length only")


def by_shape(runs: Sequence[Run]) -> list[list[int]]:
    """Indices of runs that can share a forward, a bounded number of tokens in each."""
    groups: dict[object, list[int]] = defaultdict(list)
    for i, run in enumerate(runs):
        groups[_shape(run)].append(i)
    return [
        group[i : i + size]
        for group in groups.values()
        for size in [max(1, _MAX_TOKENS // _tokens(runs[group[0]]))]
        for i in range(0, len(group), size)
    ]


def _shape(run: Run) -> object:
    if isinstance(run.ids, Inputs):
        tensors = [*enumerate(run.ids.args), *sorted(run.ids.kwargs.items())]
        return tuple((name, tensor.shape, tensor.dtype) for name, tensor in tensors)
    return len(run.ids)


def _tokens(run: Run) -> int:
    return 1 if isinstance(run.ids, Inputs) else max(1, len(run.ids))


def output_of(output: Any) -> Tensor:
    """Return the tensor in what a model gives, rows first.

    Of a contrastive model `[row, 1]`: how well a row's image and text go together.

    Raises:
        EngineError: there is none.
    """
    pairs = getattr(output, "logits_per_image", None)
    if isinstance(pairs, Tensor) and pairs.dim() == 2 and len(pairs) == pairs.shape[1]:
        # Every image against every text of the batch: a row's own are on the diagonal.
        return pairs.diagonal()[:, None]
    named = (getattr(output, name, None) for name in _OUTPUTS)
    found = next((value for value in named if value is not None), output)
    found = found[0] if isinstance(found, tuple) and found else found
    if not isinstance(found, Tensor):
        raise EngineError(
            f"the model gives {type(output).__name__}, which has none of {', '.join(_OUTPUTS)}: "
            "wrap it in a module that returns the tensor that is meant"
        )
    return found


def check_finite(logits: Tensor) -> None:
    """Raise EngineError where a logit is not a number."""
    # One number that is not finite makes the sum so; a mask of them all would cost as much as
    # the logits.
    total = logits.sum(dtype=torch.float32 if logits.dtype.itemsize < 4 else None)
    if not torch.isfinite(total):
        raise EngineError(f"the logits are not finite in {logits.dtype}; use a wider model.dtype")


def device_of(model: nn.Module) -> torch.device:
    """Return where a model's first parameters are and its inputs belong; without any, the CPU."""
    first = next(model.parameters(), None)
    return torch.device("cpu") if first is None else first.device
