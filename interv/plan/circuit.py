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
    """Hold out a share of the distinct pairs, drawn with the seed; copies stay together.

    Returns:
        Without a share to hold out, all pairs on both sides; a side may be empty where there are
        too few distinct pairs.
    """
    by_content: dict[str, list[int]] = {}
    for pair in pairs:
        content = [pair.ids, pair.corrupted_ids, pair.answer_ids, pair.wrong_ids, pair.read]
        by_content.setdefault(json.dumps(content), []).append(pair.index)
    everything = frozenset(pair.index for pair in pairs)
    if not held_out:
        return Split(everything, everything)
    drawn = sorted(by_content, key=lambda c: hashlib.sha256(f"{seed}|{c}".encode()).hexdigest())
    out = {i for content in drawn[: round(held_out * len(drawn))] for i in by_content[content]}
    return Split(everything - out, frozenset(out))
