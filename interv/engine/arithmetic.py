"""Arithmetic by which what a model's names suggest is believed, or left out.

Each check is of every block: what holds in some of them only does not hold. Forwards are of a few
ordinary tokens, in the numbers that the model computes in.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from interv.engine.hooks import Visit, module_input, visiting
from interv.errors import EngineError
from interv.models.anatomy import Place
from interv.models.families import Stand

_LENGTH = 8
_ROUNDINGS = 16
"""How many roundings of its terms a sum of three may be off by."""

BLOCK_INPUT, BLOCK_OUTPUT = Stand("", "input"), Stand("")


def ordinary_tokens(model: nn.Module, vocab_size: int) -> tuple[int, ...]:
    """Return tokens from the middle of the vocabulary, none of which the config names.

    The first tokens of a vocabulary are special ones and bytes, the last ones placeholders: on them
    a model may be ill-conditioned.
    """
    config = model.config.to_dict()  # type: ignore[operator,union-attr]
    named: set[int] = set()
    for name, value in config.items():
        if name.endswith(("_token_id", "_token_index")):
            named |= set(value) if isinstance(value, list) else {value}
    found = [t for t in range(vocab_size // 3, vocab_size) if t not in named]
    step = max(1, len(found) // (2 * _LENGTH))
    return tuple(found[i * step % len(found)] for i in range(_LENGTH))


class Trial:
    """What passes the blocks of a model in one forward, and further forwards of the same tokens.

    Attributes:
        ids: the tokens.
        logits: of that forward, `[pos, vocab]`.
    """

    def __init__(
        self,
        model: nn.Module,
        blocks: str,
        n_layers: int,
        ids: Sequence[int],
        stands: Iterable[Stand],
        places: Iterable[Place],
    ) -> None:
        """Run the model once.

        Args:
            model: is left as it was found.
            blocks: path of its blocks.
            n_layers: how many there are.
            ids: tokens.
            stands: what is kept of each block.
            places: what is kept besides.
        """
        self.model, self.blocks, self.n_layers, self.ids = model, blocks, n_layers, tuple(ids)
        self._seen: dict[Place, list[Tensor]] = defaultdict(list)
        wanted = {self.place(stand, layer) for stand in stands for layer in range(n_layers)}
        wanted |= set(places)
        modules = dict(model.named_modules())
        handles = [self._watch(modules[p.path], p) for p in wanted if p.path in modules]
        try:
            self.logits = self.forward({})[0]
        finally:
            for handle in handles:
                handle.remove()

    def _watch(self, module: nn.Module, place: Place) -> Any:
        def on_output(_module: nn.Module, _args: Any, _kwargs: Any, output: Any) -> None:
            first = output[0] if isinstance(output, tuple) else output
            if isinstance(first, Tensor):
                self._seen[place].append(first.clone())

        def on_input(_module: nn.Module, args: Any, kwargs: Any) -> None:
            try:
                _, value = module_input(place, args, kwargs)
            except EngineError:
                return  # what gets no tensor is no component
            self._seen[place].append(value.clone())

        if place.side == "input":
            return module.register_forward_pre_hook(on_input, with_kwargs=True)
        return module.register_forward_hook(on_output, with_kwargs=True)

    def place(self, stand: Stand, layer: int) -> Place:
        path = f"{self.blocks}.{layer}"
        return Place(f"{path}.{stand.path}" if stand.path else path, stand.side, stand.shared)

    def at(self, stand: Stand) -> list[Tensor] | None:
        """Return what passed in each block, `[token, width]`; None where not once in each."""
        seen = [self._seen.get(self.place(stand, layer), []) for layer in range(self.n_layers)]
        if not all(len(values) == 1 for values in seen):
            return None
        found = [values[0].reshape(-1, values[0].shape[-1]) for values in seen if values[0].dim()]
        alike = len(found) == self.n_layers and len({value.shape for value in found}) == 1
        return found if alike and len(found[0]) == len(self.ids) else None

    def once(self, place: Place) -> Tensor | None:
        """Return what passed a place, `[token, width]`; None where not once."""
        seen = self._seen.get(place, [])
        return seen[0].reshape(-1, seen[0].shape[-1]) if len(seen) == 1 and seen[0].dim() else None

    def has(self, stand: Stand, width: int) -> bool:
        """Whether something of this width passes once in each block."""
        found = self.at(stand)
        return found is not None and found[0].shape[-1] == width

    def forward(
        self, visits: Mapping[Place, Visit], rows: int = 1, ids: Sequence[int] | None = None
    ) -> Tensor:
        """Return the logits `[row, pos, vocab]` of the same tokens (unless others) in each row."""
        device = next(self.model.parameters()).device
        tokens = torch.tensor([self.ids if ids is None else ids] * rows, device=device)
        with visiting(self.model, visits):
            logits: Tensor = self.model(input_ids=tokens).logits
        return logits

    def again(
        self,
        edits: Mapping[Stand, Callable[[Tensor], Tensor]],
        reads: Sequence[Stand],
        rows: int = 1,
    ) -> list[list[Tensor]]:
        """Run again with edits in every block, each of which gets its input of before.

        Args:
            edits: what goes on instead of what passes, `[row, ...]`.
            reads: what is returned.
            rows: how many.

        Returns:
            For each of `reads` and each block `[row, token, width]`, after the edits.
        """
        seen: dict[Place, Tensor] = {}
        visits: dict[Place, Visit] = {}
        starts = self.at(BLOCK_INPUT)
        assert starts is not None

        def visit_at(place: Place, stand: Stand, layer: int) -> Visit:
            def visit(value: Tensor, _given: Callable[[], Tensor]) -> Tensor:
                if stand == BLOCK_INPUT:
                    value = starts[layer].expand(rows, -1, -1).reshape(value.shape).clone()
                if stand in edits:
                    value = edits[stand](value)
                seen[place] = value.clone()
                return value

            return visit

        wanted = dict.fromkeys([BLOCK_INPUT, *edits, *reads])
        for layer in range(self.n_layers):
            for stand in wanted:
                place = self.place(stand, layer)
                visits[place] = visit_at(place, stand, layer)
        self.forward(visits, rows)
        return [
            [
                seen[self.place(stand, layer)].reshape(rows, len(self.ids), -1)
                for layer in range(self.n_layers)
            ]
            for stand in reads
        ]


@dataclass(frozen=True)
class Branch:
    """A sub-layer of every block.

    Attributes:
        output: where its own output stands.
        residual: where what is added to the stream stands, up to the factors.
        factors: by which that is multiplied first, of each block.
    """

    output: Stand
    residual: Stand
    factors: tuple[float, ...]

    @property
    def is_plain(self) -> bool:
        return set(self.factors) == {1.0}


@dataclass(frozen=True)
class Stream:
    """How the residual stream goes through every block, as far as it adds up.

    Attributes:
        middle: the norm whose input is the stream between attention and MLP.
    """

    attention: Branch | None = None
    mlp: Branch | None = None
    middle: str | None = None


def find_stream(
    trial: Trial, attention: Sequence[Stand], mlp: Sequence[Stand], norms: Sequence[str]
) -> Stream:
    """Find what is added to the stream: block_output − block_input = attention + MLP.

    Args:
        trial: of the model.
        attention, mlp: where the sub-layers' outputs may stand, the most likely first.
        norms: modules of a block that may follow a sub-layer, or read the stream before one.
    """
    before, after = trial.at(BLOCK_INPUT), trial.at(BLOCK_OUTPUT)
    assert before is not None
    assert after is not None
    ways = list(_residuals(trial, attention, norms)), list(_residuals(trial, mlp, norms))
    for norm in norms:
        between = trial.at(Stand(norm, "input"))
        if between is None or between[0].shape != before[0].shape or _same(between, before):
            continue
        first = next(_made_of(trial, before, between, [(way,) for way in ways[0]]), (None,))
        second = next(_made_of(trial, between, after, [(way,) for way in ways[1]]), (None,))
        if second[0] is not None:
            middle = norm if _is_stream(trial, norm, second[0]) else None
            return Stream(first[0], second[0], middle)
        if first[0] is not None:
            return Stream(first[0])
    both = [(one, other) for one in ways[0] for other in ways[1]]
    found = next(_made_of(trial, before, after, both), None)
    return Stream(found[0], found[1]) if found else Stream()


def _residuals(
    trial: Trial, outputs: Sequence[Stand], norms: Sequence[str]
) -> Iterator[tuple[Stand, Stand]]:
    """Outputs, each with what may be added of it: itself, or what a norm makes of it."""
    for output in outputs:
        given = trial.at(output)
        if given is None:
            continue
        yield output, output
        for norm in norms:
            read = trial.at(Stand(norm, "input"))
            if read is not None and trial.at(Stand(norm)) is not None and _same(read, given):
                yield output, Stand(norm)


def _made_of(
    trial: Trial,
    before: Sequence[Tensor],
    after: Sequence[Tensor],
    ways: Sequence[tuple[tuple[Stand, Stand], ...]],
) -> Iterator[tuple[Branch, ...]]:
    """Yield the ways of adding some residuals to `before` that give `after` in every block."""
    for free in (False, True):
        for way in ways:
            terms = [trial.at(residual) for _, residual in way]
            factors = []
            for layer, (start, end) in enumerate(zip(before, after, strict=True)):
                of_layer = [term[layer] for term in terms if term is not None]
                if any(term.shape != start.shape for term in of_layer):
                    break
                found = factors_of(end - start, of_layer, (start, end), free=free)
                if found is None:
                    break
                factors.append(found)
            else:
                by_term = list(zip(*factors, strict=True))
                yield tuple(Branch(*ends, by_term[i]) for i, ends in enumerate(way))


def factors_of(
    total: Tensor, terms: Sequence[Tensor], besides: Sequence[Tensor] = (), *, free: bool = True
) -> tuple[float, ...] | None:
    """Return the factors with which terms sum to a total, to rounding; None where none do.

    Args:
        total: the sum, `[token, width]`.
        terms: its terms.
        besides: what the total is a difference of, whose roundings are in it.
        free: any factors; else each is 1.
    """
    wide = [term.double().cpu() for term in terms]
    wanted = total.double().cpu()
    factors = torch.ones(len(wide), dtype=torch.float64)
    if free:
        columns = torch.stack([term.flatten() for term in wide], 1)
        factors = torch.linalg.lstsq(columns, wanted.flatten()[:, None], driver="gelsd").solution[
            :, 0
        ]
    parts = [factor * term for factor, term in zip(factors, wide, strict=True)]
    size = sum((t.double().cpu().abs() for t in besides), wanted.abs())
    size = sum((part.abs() for part in parts), size)
    eps = max(torch.finfo(total.dtype).eps, torch.finfo(torch.float32).eps)
    off = (wanted - torch.stack(parts).sum(0)).abs()
    return tuple(factors.tolist()) if bool((off <= _ROUNDINGS * eps * size).all()) else None


def same_to_rounding(one: Tensor, other: Tensor) -> bool:
    """Whether tensors differ by no more than the order in which a mixture's experts are summed."""
    eps = max(torch.finfo(one.dtype).eps, torch.finfo(torch.float32).eps)
    return bool((one - other).abs().max() <= _ROUNDINGS / 2 * eps * other.abs().max())


def _same(one: Sequence[Tensor], other: Sequence[Tensor]) -> bool:
    return all(a.shape == b.shape and torch.equal(a, b) for a, b in zip(one, other, strict=True))


def _is_stream(trial: Trial, norm: str, mlp: Branch) -> bool:
    """Whether what is written where a norm reads goes on as the stream, beside the MLP's own."""
    middle = Stand(norm, "input", shared=True)

    def shifted(value: Tensor) -> Tensor:
        return value + value.std() * torch.linspace(-1, 1, value.shape[-1]).to(value)

    found = trial.again({middle: shifted}, (middle, BLOCK_OUTPUT, mlp.residual))
    return all(
        factors_of(after - between, [factor * added], (after, between), free=False) is not None
        for factor, between, after, added in zip(mlp.factors, *found, strict=True)
    )


def gates(trial: Trial, activation: Stand, neurons: Stand) -> bool:
    """Whether the neurons are an activation, column by column, times something else."""
    given, after = trial.at(activation), trial.at(neurons)
    if given is None or after is None or given[0].shape != after[0].shape or _same(given, after):
        return False
    odd = torch.arange(given[0].shape[-1]) % 2

    def halved(value: Tensor) -> Tensor:
        return value * odd.to(value)

    [found] = trial.again({activation: halved}, [neurons])
    return all(
        factors_of(new[0], [plain * odd.to(plain)], (plain,), free=False) is not None
        for new, plain in zip(found, after, strict=True)
    )


def divides(
    trial: Trial, part: Stand, units: int, projected: Stand, n_heads: int, *, alone: bool
) -> bool:
    """Whether a projection's columns are `units` heads, one after the other, and feed such heads.

    What one of its heads is shifted by arrives in the columns of the heads that it belongs to.

    Args:
        trial: of the model.
        part: the projection's output.
        units: how many heads it has; each is of `n_heads / units` heads of the other.
        projected: the input of the output projection.
        n_heads: how many heads that has.
        alone: nowhere else; otherwise mostly there (norms over all heads mix a little).
    """
    tried = sorted({0, 1 % units, units - 1})

    def shifted(value: Tensor) -> Tensor:
        rows = value.reshape(len(tried) + 1, len(trial.ids), units, -1).clone()
        for row, unit in enumerate(tried, start=1):
            size = rows[row, :, unit].shape[-1]
            # Another shift at each token: the same one at all may change nothing.
            wave = torch.sin(torch.arange(len(trial.ids) * size).reshape(-1, size).double() + 1)
            rows[row, :, unit] += rows.std() * wave.to(rows)
        return rows.reshape(value.shape)

    [found] = trial.again({part: shifted}, [projected], len(tried) + 1)
    group = n_heads // units
    return all(arrives_by_head(of_layer, tried, group, alone=alone) for of_layer in found)


def arrives_by_head(moved: Tensor, units: Sequence[int], group: int, *, alone: bool) -> bool:
    """Whether shifts of single units arrive in the columns of their heads.

    Args:
        moved: `[row, token, head · width]`: without a shift, then with each unit's.
        units: the units, each of `group` heads.
        group: as many heads share a unit.
        alone: nowhere else; otherwise mostly there (norms over all heads mix a little).
    """
    change = (moved[1:] - moved[:1]).abs().amax(1)
    n_heads = (max(units) + 1) * group
    by_head = change.reshape(len(change), -1, change.shape[-1] // n_heads).amax(2).cpu()
    for unit, heads in zip(units, by_head, strict=True):
        own = torch.zeros(n_heads, dtype=torch.bool)
        own[unit * group : (unit + 1) * group] = True
        most = float(heads[~own].max()) if (~own).any() else 0.0
        if not most < float(heads[own].min()) * (1e-3 if alone else 1):
            return False
    return True
