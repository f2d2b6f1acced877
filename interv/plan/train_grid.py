"""The axes of a train-das grid, expanded to fits' sites and checked."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from interv.errors import Problem, nearest
from interv.models.anatomy import Anatomy, as_path, is_by_head
from interv.models.families import LAYERLESS
from interv.plan.checks import unknown_component
from interv.spec import LoadedSpec, axes
from interv.spec.made import MlpSection
from interv.spec.patch import WHOLE
from interv.spec.schema import LAST
from interv.spec.train import TrainGrid, TrainSite, TrainSpec
from interv.task.exchanges import Exchange, position_of, span_names


@dataclass(frozen=True, slots=True)
class FitSite:
    """Where one intervention of a fit stands.

    Attributes:
        unit: a span, an index, or None: all positions.
        variables: indices of those that it exchanges.
    """

    component: str
    layer: int
    unit: str | int | None
    heads: tuple[int, ...] | None
    dims: tuple[int, ...] | None
    variables: tuple[int, ...]


_NO_POSITIONS = "vectors have no positions", "no position"
Expanded = tuple[str, int | None, int | None, str, tuple[FitSite, ...]]


class Expander:
    """Places of a grid; what is wrong with it goes to `problems`, each mistake once."""

    def __init__(
        self,
        loaded: LoadedSpec[TrainSpec],
        anatomy: Anatomy | None,
        exchanges: Sequence[Exchange],
        problems: list[Problem],
    ) -> None:
        self._loaded, self._anatomy, self._exchanges = loaded, anatomy, exchanges
        self._problems = problems
        self._told: set[str] = set()
        self._places: dict[Hashable, tuple[tuple[FitSite, ...], bool]] = {}
        self._vectors = isinstance(loaded.spec.model, MlpSection)
        self._all = tuple(range(len(loaded.spec.variables)))

    def of(self, i: int, grid: TrainGrid) -> Iterator[Expanded]:
        if self._anatomy is None:
            return
        if grid.set is not None:
            sites = [s for j, one in enumerate(grid.set) for s in self._site((i, "set", j), one)]
            if len(sites) == len(grid.set) and self._fit_together(("grid", i, "set"), grid, sites):
                yield "", None, None, "", tuple(sites)
            return
        singles = list(self._product(i, grid))
        if not grid.together:
            yield from singles
        elif singles:
            components = {single[0] for single in singles}
            component = components.pop() if len(components) == 1 else ""
            sites = [s for one in singles for s in one[4]]
            if self._fit_together(("grid", i), grid, sites):
                yield component, None, None, "", tuple(sites)

    def _fit_together(
        self, at: tuple[str | int, ...], grid: TrainGrid, sites: Sequence[FitSite]
    ) -> bool:
        """That the sites of one fit are different ones, for every variable, alike if linked."""
        before = len(self._problems)
        seen = {(replace(site, variables=()), v) for site in sites for v in site.variables}
        if len(seen) < sum(len(site.variables) for site in sites):
            self._tell(at, "a site is there twice", "each site once for each variable")
        names = self._loaded.spec.variables
        absent = [name for v, name in enumerate(names) if all(v != other for _, other in seen)]
        if absent:
            message = f"no site of variable '{absent[0]}'"
            self._tell(at, message, "a site of each variable, or one without `variable`: of all")
        widths = {self._width(site) for site in sites}
        if grid.linked and len(widths) > 1 and None not in widths:
            told = " and ".join(str(width) for width in sorted(w or 0 for w in widths))
            self._tell(at, f"linked sites that are {told} wide", "sites of one width")
        return len(self._problems) == before

    def _product(self, i: int, grid: TrainGrid) -> Iterator[Expanded]:
        for j, component in enumerate(grid.component or ()):
            if not self._known(("grid", i, "component", j), component):
                continue
            for layer in self._layers(i, grid, component):
                heads, dims = self._columns(("grid", i), component, grid.heads, grid.dims)
                for unit in self._units(i, grid):
                    pos = unit if isinstance(unit, int) else None
                    role = unit if isinstance(unit, str) else "" if unit is not None else WHOLE
                    if not self._exchanges:
                        role = ""
                    site = FitSite(component, layer, unit, heads, dims, self._all)
                    yield component, layer, pos, role, (site,)

    def _site(self, at: tuple[str | int, ...], site: TrainSite) -> Iterator[FitSite]:
        at = ("grid", *at)
        if not self._known((*at, "component"), site.component):
            return
        assert self._anatomy is not None
        if self._anatomy.has_layers(site.component) and site.layer >= self._anatomy.n_layers:
            message = f"layer {site.layer}: the model has {self._anatomy.n_layers} layers"
            self._tell((*at, "layer"), message, f"0 to {self._anatomy.n_layers - 1}")
            return
        unit = None if site.position == WHOLE else site.position
        if self._vectors and site.position is not None:
            self._tell((*at, "position"), *_NO_POSITIONS)
        self._check_unit((*at, "position"), unit)
        heads, dims = self._columns(at, site.component, site.heads, site.dims)
        names = self._loaded.spec.variables
        which = self._all if site.variable is None else (names.index(site.variable),)
        yield FitSite(site.component, site.layer, unit, heads, dims, which)

    def _known(self, at: tuple[str | int, ...], component: str) -> bool:
        assert self._anatomy is not None
        problem = unknown_component(self._loaded, at, component, self._anatomy)
        if component in ("attention_weight", "final_norm", "logits"):
            message = f"nothing is trained at {component}"
            problem = self._loaded.problem(at, message, "a component of a block")
        if problem is not None:
            self._problems.append(problem)
        return problem is None

    def _layers(self, i: int, grid: TrainGrid, component: str) -> list[int]:
        assert self._anatomy is not None
        if as_path(component) or component in LAYERLESS:
            return [0]
        try:
            return list(dict.fromkeys(axes.indices(grid.layers, self._anatomy.n_layers)))
        except axes.AxisError as error:
            message = f"layer {error}: the model has {self._anatomy.n_layers} layers"
            self._tell(("grid", i, "layers"), message, error.expected)
            return []

    def _columns(
        self, at: tuple[str | int, ...], component: str, heads: Any, dims: Any
    ) -> tuple[tuple[int, ...] | None, tuple[int, ...] | None]:
        assert self._anatomy is not None
        found_heads = found_dims = None
        if heads is not None:
            units = self._anatomy.n_units(component) if is_by_head(component) else None
            if not units:
                self._tell((*at, "heads"), f"{component} is not by head", "a head_... component")
            else:
                found_heads = self._indices((*at, "heads"), "head", heads, units)
        if dims is not None:
            width = self._anatomy.width(component)
            units = self._anatomy.n_units(component)
            if found_heads is not None and width and units:
                width //= units
            found_dims = self._indices((*at, "dims"), "column", dims, width or 1 << 20)
        return found_heads, found_dims

    def _indices(
        self, at: tuple[str | int, ...], what: str, value: Any, size: int
    ) -> tuple[int, ...] | None:
        try:
            return tuple(dict.fromkeys(axes.indices(value, size)))
        except axes.AxisError as error:
            self._tell(at, f"{what} {error}", error.expected)
            return None

    def _units(self, i: int, grid: TrainGrid) -> list[int | str | None]:
        if not self._exchanges:
            if self._vectors and axes.items(grid.positions) != [LAST]:
                self._tell(("grid", i, "positions"), *_NO_POSITIONS)
            return [None]
        found: list[int | str | None] = []
        length = min(len(exchange.base.ids) for exchange in self._exchanges)
        for item in axes.items(grid.positions):
            if item == WHOLE:
                found += [None] if self._check_unit(("grid", i, "positions"), None) else []
                continue
            try:
                numbers = axes.expand(item, length)
            except axes.AxisError as error:
                message = f"position {error}: the shortest prompt has {length} tokens"
                self._tell(("grid", i, "positions"), message, error.expected)
                continue
            if isinstance(item, int) and item < 0:
                numbers = [item]
            at = ("grid", i, "positions")
            units = [item] if numbers is None else numbers
            found += [unit for unit in units if self._check_unit(at, unit)]
        return list(dict.fromkeys(found))

    def _check_unit(self, at: tuple[str | int, ...], unit: int | str | None) -> bool:
        for exchange in self._exchanges:
            for said in (exchange.base, *exchange.sources):
                if unit is None and len(said.ids) != len(exchange.base.ids):
                    message = f"all positions of {exchange.base.text!r}, whose source has others"
                    self._tell(at, message, "a position, or prompts of one length")
                    return False
                try:
                    position_of(said, unit)
                except KeyError:
                    names = span_names(self._exchanges)
                    message = f"no span '{unit}' in {said.text!r}"
                    expected = f"an index, or one of: {', '.join(names)}"
                    self._tell(at, message, expected, nearest(unit, names))
                    return False
                except IndexError as error:
                    self._tell(at, f"{error}: {said.text!r}", "a position that every prompt has")
                    return False
        return True

    def check_place(self, i: int, place: Hashable, sites: Sequence[FitSite], linked: bool) -> None:
        """That results name a fit by its place: no other one is there."""
        if self._places.setdefault(place, (tuple(sites), linked)) != (tuple(sites), linked):
            message = "the same place as before, with other heads, columns or sites"
            self._tell(("grid", i), message, "a `name` for each, which results have as `set`")

    def check_by_head(self, sites: Sequence[FitSite]) -> None:
        """That there are heads to have a gate each."""
        for site in sites:
            if not is_by_head(site.component):
                message = f"by_head at {site.component}, which is not by head"
                self._tell(("intervention", "by_head"), message, "a head_... component")

    def check_dictionary(self, width: int, sites: Sequence[FitSite]) -> None:
        """That a given autoencoder is as wide as every site."""
        for site in sites:
            found = self._width(site)
            if found is not None and found != width:
                message = f"an autoencoder {width} wide, {site.component} is {found} wide"
                at = ("intervention", "dictionary", "path")
                self._tell(at, message, f"one that is {found} wide")

    def check_rank(self, i: int, sites: Sequence[FitSite], kind: str, rank: int | None) -> None:
        """That the dimensions of all variables fit into every site."""
        if rank is None or self._anatomy is None:
            return
        for site in sites:
            width = self._width(site)
            needed = rank if kind == "lora" else rank * len(site.variables)
            if width is not None and needed > width:
                message = f"rank {rank} for {len(site.variables)} variable(s): {needed} dimensions"
                expected = f"at most {width}, the width of {site.component}"
                self._tell(("intervention", "rank"), message, expected)

    def _width(self, site: FitSite) -> int | None:
        assert self._anatomy is not None
        if site.dims is not None:
            return len(site.dims) * (len(site.heads) if site.heads else 1)
        at = getattr(self._anatomy, "width_at", None)
        width = at(site.component, site.layer) if at else self._anatomy.width(site.component)
        units = self._anatomy.n_units(site.component)
        if site.heads is not None and width and units:
            return int(width) // units * len(site.heads)
        return None if width is None else int(width)

    def _tell(
        self, at: tuple[str | int, ...], message: str, expected: str, near: str | None = None
    ) -> None:
        if message not in self._told:
            self._told.add(message)
            self._problems.append(self._loaded.problem(at, message, expected, near))
