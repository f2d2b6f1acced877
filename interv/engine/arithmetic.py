"""Arithmetic by which what a model's names suggest is believed, or left out.

Each check is of every block: what holds in some of them only does not hold.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from interv.engine.trial import BLOCK_INPUT, BLOCK_OUTPUT, Trial
from interv.models.families import Stand

_ROUNDINGS = 16
"""How many roundings of its terms a sum of three may be off by."""


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


def is_parallel(trial: Trial, stream: Stream) -> bool:
    """Whether what the MLP gives does not depend on its block's attention."""
    if stream.attention is None or stream.mlp is None:
        return False
    [found] = trial.again({stream.attention.output: torch.zeros_like}, [stream.mlp.output])
    plain = trial.at(stream.mlp.output) or []
    return all(same_to_rounding(new[0], old) for new, old in zip(found, plain, strict=True))


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
