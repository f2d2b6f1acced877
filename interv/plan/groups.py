"""Which prompts stand in for a pair under mean and resample ablation."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence

from interv.errors import Problem
from interv.spec import LoadedSpec, PatchSpec
from interv.task.pairs import Ids, Pair

Drawn = Mapping[int, tuple[int, ...]]
_ALIKE = "the same template, token length and positions of spans"


def stand_ins(spec: PatchSpec, pairs: Sequence[Pair]) -> dict[int, tuple[int, ...]]:
    """Return for each pair the pairs whose prompts its ablation takes activations from.

    Each prompt counts once. Of `mean` they are all of the pair's group, itself among them; of
    `resample` as many others as there are `samples`, or all where there are fewer, drawn with
    the seed and without repeating: neither the pair's clean prompt nor its counterfactual.
    Empty under any other intervention.
    """
    kind, over = spec.intervention.type, spec.intervention.over
    if kind not in ("mean", "resample"):
        return {}
    groups: dict[str, dict[Ids, int]] = {}
    for pair in pairs:
        groups.setdefault(pair.group, {}).setdefault(pair.source(over), pair.index)
    if kind == "mean":
        return {pair.index: tuple(groups[pair.group].values()) for pair in pairs}
    drawn = {}
    for pair in pairs:
        own = (pair.ids, pair.corrupted_ids)
        others = [i for ids, i in groups[pair.group].items() if ids not in own]
        ranked = sorted(others, key=lambda i: _rank(spec.seed, pair.index, i))
        drawn[pair.index] = tuple(ranked[: spec.intervention.samples])
    return drawn


def _rank(seed: int, pair: int, other: int) -> str:
    return hashlib.sha256(f"{seed}|{pair}|{other}".encode()).hexdigest()


def check_stand_ins(
    loaded: LoadedSpec[PatchSpec], pairs: Sequence[Pair], drawn: Drawn
) -> Iterator[Problem]:
    """Refuse ablations that have too few prompts to take activations from.

    The mean of one prompt is that prompt, and of few it is mostly that prompt.
    """
    asked = loaded.spec.intervention
    few = [pair for pair in pairs if len(drawn.get(pair.index, ())) < asked.fewest]
    if not drawn or not few:
        return
    first = min(few, key=lambda pair: len(drawn[pair.index]))
    have, need = len(drawn[first.index]), asked.fewest
    others = "other " if asked.type == "resample" else ""
    message = (
        f"{asked.type}: for {len(few)} of {len(pairs)} pairs fewer than {need} {others}prompts "
        f"are like it ({_ALIKE}): pair {first.index} has {have} ({first.group})"
    )
    key = "samples" if asked.type == "resample" else "least"
    expected = f"more pairs of each template, fewer templates, or intervention.{key}={have}"
    if have < (2 if asked.type == "mean" else 1):
        expected = "more pairs of each template, or fewer templates"
    yield loaded.problem(("intervention",), message, expected)


def told_groups(pairs: Sequence[Pair], drawn: Drawn) -> str:
    """Say how many groups there are, and over how many prompts."""
    sizes = {pair.group: len(drawn[pair.index]) for pair in pairs}
    low, high = min(sizes.values()), max(sizes.values())
    span = f"{low}" if low == high else f"{low} to {high}"
    groups = f"{len(sizes)} group{'' if len(sizes) == 1 else 's'}"
    return f"{groups} of prompts that are alike ({_ALIKE}): {span} for each pair"
