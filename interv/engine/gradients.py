"""What patching would do, estimated from gradients: every place from one backward pass.

Attribution patching (Nanda 2023, "Attribution patching: activation patching at industrial
scale"; Syed et al. 2023, arXiv 2310.10348) is the first-order estimate (target − base) · gradient.
A mean of gradients on the way from base to target (integrated gradients, Sundararajan et al. 2017,
arXiv 1703.01365) mends what is not linear: on the way of the inputs (EAP-IG: Hanna et al. 2024,
arXiv 2403.17806), or of the one activation itself (Marks et al. 2024, arXiv 2403.19647), where it
tends to the exact effect. Integrals are by the midpoint rule, at (k − ½) / steps for k = 1 ...
steps, whose error falls with the square of the steps; the papers' sums take k / steps.

Each place gets a zero that is added to its value: the gradient with respect to that zero is the
one with respect to the place, whatever other components are tapped before or after it, and the
model's parameters need none.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from interv.engine.hooks import Visit, visiting
from interv.engine.memory import halving
from interv.engine.reference import ReferenceExecutor, check_finite
from interv.engine.runs import Edit, Inputs, Run, Site
from interv.engine.sites import Todo, make_edits, unfold
from interv.errors import EngineError
from interv.models.anatomy import Place

Score = Callable[[Tensor], Tensor]
"""Logits `[run, len(at), vocab]` to one number for each run `[run]`, differentiable."""

Along = Literal["point", "inputs", "activation"]
"""Where gradients are taken: at the base; on the inputs' way to the target; on each place's own."""

Targets = Mapping[tuple[str, int], Tensor]
"""For (component, layer) what a patch would put there, `[run, pos, width]`."""

EMBEDDING = ("token_embedding", 0)

_MAX_TOKENS = 1024  # in one forward of several steps: all its activations are kept for the way back


def attributions(
    executor: ReferenceExecutor,
    runs: Sequence[Run],
    at: Sequence[int],
    score: Score,
    targets: Targets,
    *,
    along: Along = "point",
    steps: int = 1,
) -> dict[tuple[str, int], Tensor]:
    """First-order effects of patching each place.

    One forward and one backward for all places along "point", `steps` of them along "inputs",
    `steps` for each place along "activation" (several steps may share one). Gradients flow
    through the runs' own edits; sources are constants.

    Args:
        executor: of the model, which is left as it was found.
        runs: bases, of one length, all in one forward.
        at: positions whose logits the score gets, negative ones from the end.
        score: called with the logits of all runs, in their order.
        targets: the places, and what a patch would put there. Along "inputs" the token
            embedding is among them: the other components' gradients are those met on its way.
        along: where gradients are taken. Along "activation" the place alone is moved, in all
            its positions and columns, and what comes after it follows.
        steps: midpoints on the way; 1 and no other along "point".

    Returns:
        For each place (target − base) · mean gradient, elementwise `[run, pos, width]` in float64.
        Summed over a site's positions and columns it estimates what patching that site adds to
        the score.

    Raises:
        EngineError: a place that is not there or has no gradient (`attention_weight`), targets
            of another shape, a score that is no number for each run, anything not finite.
    """
    _check(runs, steps)
    if along == "point" and steps != 1:
        raise EngineError(f"steps: {steps} at one point; take along='inputs' or 'activation'")
    if along == "inputs" and EMBEDDING not in targets:
        raise EngineError("along='inputs' needs the token embedding among the targets")
    if not targets:
        return {}
    spots = {key: _Spot.at(executor, *key) for key in targets}
    places = {spot.place for spot in spots.values()}
    executor.need(executor.sites.wanted_by(runs))
    work = _Work(executor, runs, at, score)
    states: dict[Place, Tensor] = {}
    gradients: dict[Place, Tensor] = {}
    if along == "point":
        gradients = work.gradients(places, {}, (0.0,), states)
    else:
        states = work.states(places)
    gaps = {key: spots[key].gap(states, target) for key, target in targets.items()}
    if along == "inputs":
        way = {spots[EMBEDDING].place: spots[EMBEDDING].spread(gaps[EMBEDDING], states)}
        gradients = work.mean_gradients(places, way, steps)
    found = {}
    for key, spot in spots.items():
        if along == "activation":
            way = {spot.place: spot.spread(gaps[key], states)}
            gradients = work.mean_gradients({spot.place}, way, steps)
        found[key] = _finite(gaps[key] * spot.take(gradients[spot.place]), str(spot))
    return found


def integrated(
    executor: ReferenceExecutor,
    runs: Sequence[Run],
    at: Sequence[int],
    score: Score,
    site: Site,
    sources: Sequence[Tensor],
    *,
    steps: int,
) -> Tensor:
    """The integral of the gradient on one site's way from base to source, all else following.

    With enough steps the exact effect of patching the site.

    Args:
        executor, runs, at, score, steps: as of `attributions`.
        site: some positions, heads or dimensions of a component.
        sources: for each run what a patch would put there, `[n_positions, width]`, as
            `executor.states` gives it.

    Returns:
        `[run]`, float64.

    Raises:
        EngineError: as `attributions`.
    """
    _check(runs, steps)
    executor.sites.check_all(runs, [site])
    if len(sources) != len(runs):
        raise EngineError(f"{site.component}: {len(sources)} sources for {len(runs)} runs")
    spot = _Spot.at(executor, site.component, site.layer, site)
    executor.need(executor.sites.wanted_by(runs))
    work = _Work(executor, runs, at, score)
    states = work.states({spot.place})
    if len({source.shape for source in sources}) > 1:
        raise EngineError(f"{site.component}: sources of different shapes")
    gap = spot.gap(states, torch.stack(list(sources)))
    way = {spot.place: spot.spread(gap, states)}
    gradients = work.mean_gradients({spot.place}, way, steps)
    return _finite((gap * spot.take(gradients[spot.place])).sum((1, 2)), str(spot))


@dataclass(frozen=True)
class _Spot:
    """A place, and the positions and columns of its tensor that are meant; None: all."""

    name: str
    place: Place
    columns: Tensor | None
    positions: tuple[int, ...] | None

    def __str__(self) -> str:
        return self.name

    @classmethod
    def at(
        cls, executor: ReferenceExecutor, component: str, layer: int, site: Site | None = None
    ) -> _Spot:
        site = site or Site(component, layer)
        place = executor.sites.place(site)
        if place.pattern:
            raise EngineError(f"{component}: no gradients of patterns; patch them instead")
        return cls(
            f"{component} of layer {layer}", place, executor.sites.columns(site), site.positions
        )

    def take(self, whole: Tensor) -> Tensor:
        """Its part `[run, n_positions, width]` of its place's `[run, pos, ...]`."""
        if self.positions is not None:
            whole = whole[:, list(self.positions)]
        if self.columns is None:
            return whole
        if int(self.columns.max()) >= whole.shape[-1]:
            raise EngineError(f"{self}: dimension {int(self.columns.max())} of {whole.shape[-1]}")
        return whole[..., self.columns.to(whole.device)]

    def gap(self, states: Mapping[Place, Tensor], target: Tensor) -> Tensor:
        """Target less base, in float64."""
        base = self.take(states[self.place])
        if target.shape != base.shape:
            raise EngineError(
                f"{self}: the target has the shape {tuple(target.shape)}, the base "
                f"{tuple(base.shape)} (run, pos, width)"
            )
        return _finite(target.detach().to(base.device).double() - base.double(), str(self))

    def spread(self, gap: Tensor, states: Mapping[Place, Tensor]) -> Tensor:
        """A gap as its whole place's `[run, pos, ...]`, zero elsewhere."""
        state = states[self.place]
        whole = torch.zeros(state.shape, dtype=torch.float64, device=state.device)
        rows = torch.arange(len(whole), device=whole.device)[:, None, None]
        positions = torch.arange(whole.shape[1], device=whole.device)
        columns = torch.arange(whole.shape[2], device=whole.device)
        if self.positions is not None:
            positions = positions[list(self.positions)]
        if self.columns is not None:
            columns = columns[self.columns.to(whole.device)]
        whole[rows, positions[None, :, None], columns] = gap
        return whole


@dataclass(frozen=True)
class _Work:
    """Forwards and backwards of runs of one length, whose sources are kept already."""

    executor: ReferenceExecutor
    runs: Sequence[Run]
    at: Sequence[int]
    score: Score
    edits: dict[Place, list[tuple[int, Edit]]] = field(init=False)

    def __post_init__(self) -> None:
        edits: dict[Place, list[tuple[int, Edit]]] = defaultdict(list)
        for row, run in enumerate(self.runs):
            for edit in run.edits:
                place = self.executor.sites.place(edit.site)
                if place.pattern:
                    raise EngineError(
                        f"{edit.site.component}: no gradients through runs in which it is edited"
                    )
                edits[place].append((row, edit))
        object.__setattr__(self, "edits", dict(edits))

    def states(self, places: Collection[Place]) -> dict[Place, Tensor]:
        """The runs' own states `[run, pos, ...]`."""
        return self.executor.forward(self.runs, self.at, places)[1]

    def mean_gradients(
        self, places: Collection[Place], way: Mapping[Place, Tensor], steps: int
    ) -> dict[Place, Tensor]:
        """The mean of the score's gradients at the midpoints of a way, in float64.

        Args:
            places: where gradients are wanted, `[run, pos, ...]`.
            way: what is added to places at its end.
            steps: how many midpoints.
        """
        size = max(1, _MAX_TOKENS // (len(self.runs) * len(self.runs[0])))
        shares = [(k + 0.5) / steps for k in range(steps)]
        total: dict[Place, Tensor] = {}
        for begin in range(0, steps, size):
            parts = halving(
                shares[begin : begin + size], lambda some: [self.gradients(places, way, some)]
            )
            for place in parts[0]:
                gradient = torch.stack([part[place] for part in parts]).sum(0)
                total[place] = total[place] + gradient if place in total else gradient
        return {place: gradient / steps for place, gradient in total.items()}

    def gradients(
        self,
        places: Collection[Place],
        way: Mapping[Place, Tensor],
        shares: Sequence[float],
        states: dict[Place, Tensor] | None = None,
    ) -> dict[Place, Tensor]:
        """The sum over some shares of a way of the score's gradients, in float64.

        Every share of every run is a row of one forward.

        Args:
            places, way: as of `mean_gradients`.
            shares: of the way, each a point on it.
            states: filled with what passes the places, where given.
        """
        runs = [run for _ in shares for run in self.runs]
        zeros: dict[Place, Tensor] = {}

        def visit_at(place: Place) -> Visit:
            edits = [
                (part * len(self.runs) + row, edit)
                for part in range(len(shares))
                for row, edit in self.edits.get(place, ())
            ]

            def visit(value: Tensor, given: Callable[[], Tensor]) -> Tensor:
                rows, back = self._unfold(value, len(runs), place)
                if edits:
                    n = rows.shape[1]
                    rows = make_edits(
                        rows.flatten(0, 1),
                        [Todo(edit, row * n, n) for row, edit in edits],
                        self.executor.sites,
                        self.executor.source,
                        lambda: self._unfold(given(), len(runs), place)[0].flatten(0, 1),
                    ).reshape(rows.shape)
                if place not in places and place not in way:
                    return back(rows)
                if states is not None:
                    # A shared stream is written over.
                    states[place] = rows.detach().clone()
                shift = torch.zeros_like(rows)
                if place in way:
                    parts = torch.tensor(shares, dtype=torch.float64, device=rows.device)
                    end = way[place].to(rows.device)
                    shift = (parts[:, None, None, None] * end).flatten(0, 1).to(rows.dtype)
                if place in places:
                    zeros[place] = shift.requires_grad_()
                return back(rows + shift)

            return visit

        visited = {*places, *way, *self.edits}
        sites = self.executor.sites
        layers = [sites.layer(place) for place in visited]
        whole = any(layer is None or layer >= sites.anatomy.n_layers for layer in layers)
        visits = {place: visit_at(place) for place in sorted(visited, key=str)}
        with torch.inference_mode(False):
            with visiting(self.executor.model, visits, grad=True):
                logits = self.executor.call(runs, self.at, whole=whole)
            check_finite(logits.detach())
            with torch.enable_grad():
                total = self._total(logits)
            order = list(zeros)
            found = torch.autograd.grad(total, [zeros[place] for place in order], allow_unused=True)
        gradients = {}
        for place, gradient in zip(order, found, strict=True):
            if gradient is None:
                raise EngineError(f"{place}: no gradient comes back to it from the score")
            by_share = gradient.double().reshape(len(shares), len(self.runs), *gradient.shape[1:])
            gradients[place] = _finite(by_share.sum(0), str(place))
        return gradients

    def _total(self, logits: Tensor) -> Tensor:
        """The scores of all rows, summed: no row's depends on another's."""
        parts = logits.reshape(-1, len(self.runs), *logits.shape[1:])
        return torch.stack([self._scored(part) for part in parts]).sum()

    def _scored(self, logits: Tensor) -> Tensor:
        scores = self.score(logits)
        if scores.shape != (len(self.runs),):
            raise EngineError(
                f"the score gives the shape {tuple(scores.shape)}, expected a number for each of "
                f"{len(self.runs)} runs"
            )
        if not scores.requires_grad:
            raise EngineError("the score cannot be differentiated in the logits")
        _finite(scores.detach(), "the score")
        return scores

    def _unfold(
        self, value: Tensor, rows: int, place: Place
    ) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        return unfold(value, rows, place, maps=self.executor.sites.anatomy.family is None)


def _check(runs: Sequence[Run], steps: int) -> None:
    if not runs:
        raise EngineError("no runs to take gradients of")
    if any(isinstance(run.ids, Inputs) for run in runs):
        raise EngineError("gradients are of runs of tokens only")
    if len({len(run) for run in runs}) > 1:
        raise EngineError("gradients are of runs of one length")
    if steps < 1:
        raise EngineError(f"steps: {steps}, expected at least 1")


def _finite(value: Tensor, what: str) -> Tensor:
    if not torch.isfinite(value).all():
        raise EngineError(f"{what}: not finite, in its values or its gradient")
    return value
