"""The axes of a patch's grid and paths, expanded for one pair of prompts."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from interv.errors import Problem, nearest
from interv.models import ModelFiles
from interv.models.anatomy import Anatomy, as_path, is_by_head
from interv.models.families import LAYERLESS
from interv.plan.cells import window_layers
from interv.plan.checks import unknown_component
from interv.spec import LoadedSpec, PatchSpec, axes
from interv.spec.patch import (
    PROMPT,
    SPANS,
    WHOLE,
    PatchGrid,
    PathGrid,
    Receiver,
    ReceiverSite,
    SiteText,
)
from interv.task.pairs import Pair

At = tuple[str | int, ...]
Freeze = tuple[str, ...] | None


@dataclass(frozen=True, slots=True)
class Spot:
    """Units of a component in one layer: a site, before there is an engine.

    Attributes:
        positions: of the prompt; None: all that the model sees, what is given of an answer too.
    """

    component: str
    layer: int
    positions: tuple[int, ...] | None
    heads: tuple[int, ...] | None = None
    dims: tuple[int, ...] | None = None

    @property
    def first(self) -> int:
        return min(self.positions or (0,))

    def last(self, length: int) -> int:
        """The last position that it changes, itself or through attention before the blocks."""
        if self.positions is None or self.component == "token_embedding":
            return length
        return max(self.positions)


@dataclass(frozen=True, slots=True)
class Place:
    """One line of the summary: None and empty where an axis is not there.

    Attributes:
        layer: the centre of a window.
        head, neuron: the one that is changed.
        set: the name of sites that are changed together.
        receiver: where a path ends.
        pos, role: an index, or what the positions were asked for as.
    """

    component: str
    layer: int | None
    window: int
    head: int | None
    neuron: int | None
    set: str
    receiver: str
    pos: int | None
    role: str


Point = tuple[Place, tuple[Spot, ...], tuple[Spot, ...], Freeze]


class _BadAxisError(Exception):
    def __init__(self, problem: Problem) -> None:
        super().__init__(problem.message)
        self.problem = problem


@dataclass
class Expander:
    """A spec's grid and paths on a model; what is wrong with them is collected."""

    loaded: LoadedSpec[PatchSpec]
    files: ModelFiles
    problems: list[Problem] = field(default_factory=list)

    def of(self, pair: Pair, *, several: bool) -> Iterator[Point]:
        """Every point of the grid and of the paths on one pair."""
        spec = self.loaded.spec
        parts: list[tuple[At, Any]] = [(("grid", i), grid) for i, grid in enumerate(spec.grid)]
        parts += [(("paths", i), path) for i, path in enumerate(spec.paths)]
        lines: dict[Place, Point] = {}
        for at, part in parts:
            try:
                for point in self._points(pair, part, at, several=several):
                    if lines.setdefault(point[0], point) != point:
                        raise self._bad(at, *_alike(point[0]))
                    yield point
            except _BadAxisError as bad:
                self.problems.append(bad.problem)

    def check_positions(self, pair: Pair) -> None:
        """Whether a pair has every position that is asked for: what differs between pairs."""
        spec = self.loaded.spec
        asked: list[tuple[At, PatchGrid | SiteText | ReceiverSite]] = []
        for i, grid in enumerate(spec.grid):
            asked += [(("grid", i), grid)] if grid.set is None else []
            asked += [(("grid", i, "set", j), site) for j, site in enumerate(grid.set or ())]
        for i, path in enumerate(spec.paths):
            asked += [(("paths", i, "senders", j), one) for j, one in enumerate(path.senders)]
            for j, receiver in enumerate(path.receivers):
                if isinstance(receiver, Receiver):
                    asked += _sites(receiver, ("paths", i, "receivers", j))
        for at, part in asked:
            try:
                list(self._places(pair, part.positions, at, several=True))
            except _BadAxisError as bad:
                self.problems.append(bad.problem)

    def _points(
        self, pair: Pair, part: PatchGrid | PathGrid, at: At, *, several: bool
    ) -> Iterator[Point]:
        if isinstance(part, PathGrid):
            yield from self._paths(pair, part, at, several=several)
        elif part.set is not None:
            yield self._set(pair, part, at)
        else:
            yield from self._product(pair, part, at, several=several)

    def _product(self, pair: Pair, grid: PatchGrid, at: At, *, several: bool) -> Iterator[Point]:
        places = list(self._places(pair, grid.positions, at, several=several))
        for j, component in enumerate(grid.component or ()):
            self._known(component, (*at, "component", j))
            layers = self._layers(component, grid.layers, at)
            most = self._anatomy.n_layers
            if grid.window > most:
                message = f"a window of {grid.window} layers: the model has {most}"
                raise self._bad((*at, "window"), message, f"at most {most}")
            dims = self._columns(component, grid.dims, at, "dims")
            units: Sequence[int | None] = [None]
            if grid.neurons is not None:
                units = self._columns(component, grid.neurons, at, "neurons") or [None]
            for layer, (positions, pos, role), head, unit in itertools.product(
                layers, places, self._heads(component, grid.heads, at), units
            ):
                n_layers = self._n_layers(component)
                window = window_layers(layer, grid.window, n_layers)
                columns = (unit,) if unit is not None else dims
                heads = None if head is None else (head,)
                spots = tuple(Spot(component, k, positions, heads, columns) for k in window)
                yield (
                    Place(component, layer, grid.window, head, unit, grid.name, "", pos, role),
                    spots,
                    (),
                    None,
                )

    def _set(self, pair: Pair, grid: PatchGrid, at: At) -> Point:
        spots: dict[Spot, None] = {}
        for i, site in enumerate(grid.set or ()):
            spots |= dict.fromkeys(self._spots(pair, site, (*at, "set", i)))
        names = list(dict.fromkeys(spot.component for spot in spots))
        component = names[0] if len(names) == 1 else "several"
        return (
            Place(component, None, 1, None, None, grid.name, "", None, ""),
            tuple(spots),
            (),
            None,
        )

    def _spots(self, pair: Pair, site: SiteText | ReceiverSite, at: At) -> Iterator[Spot]:
        """A site's units, all together: one spot a layer."""
        self._known(site.component, (*at, "component"))
        found = [places for places, _, _ in self._places(pair, site.positions, at, several=False)]
        positions = None
        if None not in found:
            positions = tuple(sorted({p for places in found for p in places or ()}))
        heads = None
        if site.heads is not None:
            heads = tuple(h for h in self._heads(site.component, site.heads, at) if h is not None)
        dims = None
        if isinstance(site, SiteText):
            dims = self._columns(site.component, site.dims, at, "dims")
        for layer in self._layers(site.component, site.layers, at):
            yield Spot(site.component, layer, positions, heads, dims)

    def _paths(self, pair: Pair, path: PathGrid, at: At, *, several: bool) -> Iterator[Point]:
        receivers = list(self._receivers(pair, path, at))
        freeze = tuple(sorted(set(path.freeze)))
        heard: set[int] = set()
        for i, sender in enumerate(path.senders):
            here = (*at, "senders", i)
            reached = False
            for place, spots, _, _ in self._product(pair, sender, here, several=several):
                for j, name, spots_there in receivers:
                    after = [s for s in spots_there if self._precedes(spots[0], s)]
                    # One that comes before its sender does not hear of it.
                    if spots_there and not after:
                        continue
                    reached = True
                    heard.add(j)
                    yield replace(place, receiver=name), spots, spots_there, freeze
            if not reached:
                first = receivers[0][1]
                message = f"the sender comes after its receiver {first}"
                raise self._bad(here, message, "senders in layers before the receiver's")
        for j, name in {j: name for j, name, _ in receivers}.items():
            if j not in heard:
                message = f"the receiver {name} comes before every sender"
                expected = "receivers in layers after a sender's"
                raise self._bad((*at, "receivers", j), message, expected)

    def _receivers(
        self, pair: Pair, path: PathGrid, at: At
    ) -> Iterator[tuple[int, str, tuple[Spot, ...]]]:
        """Each with its place in the spec and its name in the results."""
        for i, receiver in enumerate(path.receivers):
            here = (*at, "receivers", i)
            if isinstance(receiver, str):
                yield i, receiver, ()
                continue
            sites = _sites(receiver, here)
            spots = tuple(
                dict.fromkeys(spot for at, site in sites for spot in self._spots(pair, site, at))
            )
            if receiver.name:
                yield i, receiver.name, spots
                continue
            [(_, site)] = sites
            short = site.component.removeprefix("head_").removesuffix("_output")
            for spot in spots:
                if not is_by_head(spot.component):
                    yield i, f"{spot.layer}.{short}", (spot,)
                    continue
                given = site.heads if site.heads is not None else "all"
                for head in self._heads(spot.component, given, here):
                    assert head is not None
                    yield i, f"{spot.layer}.{head}.{short}", (replace(spot, heads=(head,)),)

    def _places(
        self, pair: Pair, value: axes.AxisValue, at: At, *, several: bool
    ) -> Iterator[tuple[tuple[int, ...] | None, int | None, str]]:
        """Positions, the one index that they are, and the role under which they were asked for.

        Positions are None for all that the model sees, what is given of an answer included.
        """
        for item in axes.items(value):
            try:
                indices = axes.expand(item, len(pair.ids))
            except axes.AxisError as error:
                message = f"position {error}: pair {pair.index} is {pair.text!r}"
                raise self._bad((*at, "positions"), message, error.expected) from None
            if indices is not None:
                # Counted from the end, over prompts of several lengths, it is a role.
                named = several and isinstance(item, int) and item < 0
                for i in indices:
                    yield (i,), None if named else i, str(item) if named else ""
            elif item in (WHOLE, PROMPT):
                answers = item == WHOLE and any(pair.tails)
                if answers and self.loaded.spec.intervention.type == "mean":
                    message = "prompts have no mean at an answer's tokens, which whole takes in"
                    raise self._bad((*at, "positions"), message, PROMPT, PROMPT)
                yield None if answers else tuple(range(len(pair.ids))), None, str(item)
            elif item == SPANS:
                for name in sorted(pair.spans, key=lambda n: pair.spans[n]):
                    yield pair.spans[name], None, name
            elif item in pair.spans:
                yield pair.spans[str(item)], None, str(item)
            else:
                have = [WHOLE, PROMPT, SPANS, *pair.spans]
                message = f"pair {pair.index} has no span '{item}'"
                near = nearest(item, have)
                raise self._bad((*at, "positions"), message, f"one of: {', '.join(have)}", near)

    @property
    def _anatomy(self) -> Anatomy:
        facts = self.files.facts
        assert facts is not None
        return Anatomy(facts.family, facts, self.files.config or {})

    def _n_layers(self, component: str) -> int:
        once = as_path(component) or component in LAYERLESS
        return 1 if once else self._anatomy.n_layers

    def _known(self, component: str, at: At) -> None:
        if problem := unknown_component(self.loaded, at, component, self._anatomy):
            raise _BadAxisError(problem)

    def _layers(self, component: str, value: axes.AxisValue, at: At) -> list[int]:
        if as_path(component) or component in LAYERLESS:
            return [0]
        n_layers = self._anatomy.n_layers
        try:
            return list(dict.fromkeys(axes.indices(value, n_layers)))
        except axes.AxisError as error:
            message = f"layer {error}: the model has {n_layers} layers"
            raise self._bad((*at, "layers"), message, error.expected) from None

    def _heads(self, component: str, value: Any, at: At) -> Sequence[int | None]:
        anatomy = self._anatomy
        if not is_by_head(component):
            if value is None:
                return [None]
            expected = "a head_... component, or no heads here"
            raise self._bad((*at, "heads"), f"{component} is not by head", expected)
        assert anatomy.facts is not None
        # A model of an unknown type is looked at once it is loaded.
        units = anatomy.n_units(component) if anatomy.family else anatomy.facts.n_heads
        try:
            return list(dict.fromkeys(axes.indices("all" if value is None else value, units or 0)))
        except axes.AxisError as error:
            message = f"head {error} for {component}"
            raise self._bad((*at, "heads"), message, error.expected) from None

    def _columns(self, component: str, value: Any, at: At, name: str) -> tuple[int, ...] | None:
        if value is None:
            return None
        anatomy = self._anatomy
        if component == "attention_weight":
            message = "attention_weight has no dimensions: its columns are the keys' positions"
            raise self._bad((*at, name), message, f"another component, or no {name}")
        width = anatomy.width(component) if anatomy.family and not as_path(component) else None
        if width is not None and is_by_head(component):
            width //= anatomy.n_units(component) or 1
        if width is None and "all" in axes.items(value):
            message = f"the width of {component} is not known"
            raise self._bad((*at, name), message, "indices, or a range")
        try:
            return tuple(dict.fromkeys(axes.indices(value, width or 1 << 31)))
        except axes.AxisError as error:
            message = f"dimension {error} for {component}"
            raise self._bad((*at, name), message, error.expected) from None

    def _bad(
        self, at: At, message: str, expected: str | None = None, near: str | None = None
    ) -> _BadAxisError:
        return _BadAxisError(self.loaded.problem(at, message, expected, near))

    def _precedes(self, sender: Spot, receiver: Spot) -> bool:
        """Whether a receiver reads the stream after the sender has written to it."""
        into_mlp = receiver.component == "mlp_input" and sender.component != "mlp_output"
        # The MLP of a parallel block reads what its attention reads.
        parallel = "resid_mid" not in self._anatomy.components
        return sender.layer < receiver.layer + (into_mlp and not parallel)


def _sites(receiver: Receiver, at: At) -> list[tuple[At, ReceiverSite]]:
    """A receiver's sites, each with its place in the spec."""
    if receiver.set is None:
        return [(at, site) for site in receiver.sites]
    return [((*at, "set", k), site) for k, site in enumerate(receiver.set)]


def _alike(place: Place) -> tuple[str, str]:
    """What is wrong with two patches that the results could not tell apart."""
    shown = {
        "component": place.component,
        "set": place.set,
        "layer": place.layer,
        "head": place.head,
        "receiver": place.receiver,
    }
    told = ", ".join(f"{key} {value}" for key, value in shown.items() if value not in ("", None))
    message = f"two different patches are one line of the results ({told})"
    return message, "a name: of its own for each"
