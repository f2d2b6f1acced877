"""Which pairs a circuit's edges are scored on, and which it is evaluated on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import NamedTuple

from interv.task.pairs import Pair


class Split(NamedTuple):
    """Indices of pairs."""

    scored: frozenset[int]
    evaluated: frozenset[int]


def split(pairs: Sequence[Pair], held_out: float, seed: int) -> Split:
    """Hold out a share of the pairs, which are distinct, drawn with the seed.

    Returns:
        Without a share to hold out, all pairs on both sides; a side may be empty where there are
        too few pairs.
    """
    everything = frozenset(pair.index for pair in pairs)
    if not held_out:
        return Split(everything, everything)
    drawn = sorted(pairs, key=lambda pair: _rank(seed, pair))
    out = frozenset(pair.index for pair in drawn[: round(held_out * len(drawn))])
    return Split(everything - out, out)


def _rank(seed: int, pair: Pair) -> str:
    content = [pair.ids, pair.corrupted_ids, pair.answer_ids, pair.wrong_ids, pair.read]
    return hashlib.sha256(f"{seed}|{json.dumps(content)}".encode()).hexdigest()
