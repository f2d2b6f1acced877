"""What of a run must be computed: where it leaves its base, and what happens to it then."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor, nn

from interv.engine.interventions import Collect, Vanilla
from interv.engine.runs import Edit, Inputs, Run, read_positions
from interv.engine.sites import Sites
from interv.models.anatomy import Place

BY_POSITION = ("position_embeddings", "position_ids", "cache_position")
"""Arguments of a block that have a value for each position."""


def recording(kept: dict[str, Any]) -> Callable[..., None]:
    """A hook that keeps a block's arguments by position, of the first row."""

    def first(value: Any) -> Any:
        return tuple(map(first, value)) if isinstance(value, tuple) else value[0]

    def record(_module: nn.Module, _args: Any, kwargs: Mapping[str, Any]) -> None:
        for name in BY_POSITION:
            if kwargs.get(name) is not None:
                kept[name] = first(kwargs[name])

    return record


# At the last layer these reach no position but their own.
_LOCAL = {
    "block_output",
    "resid_mid",
    "mlp_input",
    "mlp_activation",
    "mlp_gate_activation",
    "mlp_output",
    "mlp_residual",
    "attention_output",
    "attention_residual",
    "attention_value_output",
    "head_attention_value_output",
    "query_output",
    "head_query_output",
    "attention_weight",
}


@dataclass(frozen=True)
class Length:
    """What blocks were given for runs of one length.

    Attributes:
        masks: of each layer `[head or 1, query, key]`, or None: all to the left is seen.
        given: of each layer the arguments that go by position, without the batch dimension.
    """

    masks: list[Tensor | None]
    given: list[dict[str, Any]]


@dataclass(frozen=True)
class Base:
    """What a base run leaves behind.

    Attributes:
        inputs: for each block its input `[pos, d_model]`; last, the last block's output.
        keys, values: for each block `[head, pos, head_width]`; empty where rows start at
            layers only.
    """

    inputs: list[Tensor]
    keys: list[Tensor]
    values: list[Tensor]


@dataclass(frozen=True)
class Row:
    """A run as the walk sees it.

    Attributes:
        layer: where it joins; the number of layers, where no block need run.
        position: its first token that differs from its base's.
        read: positions whose logits are computed, each once: those wanted, and what is needed.
        edits: what happens at which place.
    """

    run: Run
    base: Run
    layer: int
    position: int
    read: tuple[int, ...]
    edits: Mapping[Place, list[Edit]] = field(default_factory=dict)

    @property
    def n_tokens(self) -> int:
        return len(self.run) - self.position


class Rows:
    """Runs as rows of one model."""

    def __init__(self, sites: Sites) -> None:
        self._sites = sites
        self._anatomy = sites.anatomy

    def is_known(self, run: Run) -> bool:
        """Whether it is known of each edit where in the model it stands."""
        return all(self._layer(edit) is not None for edit in run.edits)

    def base_of(self, run: Run) -> Run:
        """The run with only its edits before the blocks."""
        edits = tuple(edit for edit in run.edits if self._layer(edit) == -1)
        return run if len(edits) == len(run.edits) else Run(run.ids, edits)

    def row(self, run: Run, at: Sequence[int] | None, *, states: bool = False) -> Row:
        """Where a run joins; the base itself, joining nowhere, where it changes nothing read.

        Args:
            run: the run.
            at: positions whose logits are wanted; None: all.
            states: whether its states are read too, at any position.
        """
        base = self.base_of(run)
        n_layers = self._anatomy.n_layers
        everywhere = tuple(range(len(run)))
        asked = read_positions(run, at)
        read = list(everywhere if asked is None else dict.fromkeys(asked))
        active: list[tuple[int, int]] = []
        needed: list[tuple[Edit, tuple[int, ...]]] = []
        for edit in run.edits:
            layer = self._layer(edit)
            if layer == -1 or isinstance(edit.intervention, Collect):
                continue
            assert layer is not None
            positions = edit.site.positions or everywhere
            seen = positions
            local = layer == n_layers - 1 and edit.site.component in _LOCAL
            if layer == n_layers or (local and not states):
                seen = tuple(p for p in positions if p in read)
            if not seen:
                continue
            if not edit.intervention.positionwise:
                # What is drawn or computed over several positions is not cut apart.
                seen = positions
                if layer == n_layers:
                    read += [p for p in positions if p not in read]
            needed.append((edit, seen))
            live = [p for p in seen if not self._is_hold(edit, p, base)]
            active += [(self._joins(edit), position) for position in live]
        if not active:
            return Row(base, base, n_layers, len(run), tuple(read))
        first_layer = min(layer for layer, _ in active)
        first = 0
        if self._anatomy.reach == "positions":
            first = min(position for _, position in active)
        edits: dict[Place, list[Edit]] = defaultdict(list)
        for edit, seen in needed:
            kept = tuple(p for p in seen if p >= first)
            if kept and self._joins(edit) >= first_layer:
                place = self._sites.place(edit.site)
                edits[place].append(_cut(edit, kept, edit.site.positions or everywhere))
        return Row(run, base, first_layer, first, tuple(read), edits)

    def _layer(self, edit: Edit) -> int | None:
        return self._sites.layer(self._sites.place(edit.site))

    def _joins(self, edit: Edit) -> int:
        """The layer at which a row with this edit must have joined.

        A block's output is the next block's input, so that the block itself need not run,
        unless rows start at layers only or the edit reads the block's input.
        """
        layer = self._layer(edit)
        assert layer is not None
        enters = (
            0 <= layer < self._anatomy.n_layers
            and self._anatomy.reach == "positions"
            and self._sites.place(edit.site) == self._anatomy.place("block_output", layer)
        )
        return layer + 1 if enters and not edit.intervention.reads_input else layer

    def _is_hold(self, edit: Edit, position: int, base: Run) -> bool:
        """Whether an edit writes what the base has there: it matters only after another edit.

        In a causal model source and base agree before the first token or edit in which they
        differ.
        """
        source = edit.source
        same = edit.read is None or edit.read == edit.site
        if not isinstance(edit.intervention, Vanilla) or source is None or not same:
            return False
        if source == base:
            return True
        if self._anatomy.family is None or not self._anatomy.family.causal:
            return False
        ids, others = base.ids, source.ids
        if isinstance(ids, Inputs) or isinstance(others, Inputs) or len(others) <= position:
            return False
        return others[: position + 1] == ids[: position + 1] and _until(source, position) == _until(
            base, position
        )


def _until(run: Run, position: int) -> list[Edit]:
    """A run's edits that touch positions up to this one."""
    return [e for e in run.edits if e.site.positions is None or min(e.site.positions) <= position]


def _cut(edit: Edit, kept: tuple[int, ...], positions: tuple[int, ...]) -> Edit:
    """An edit at some of its positions, reading where it read for them."""
    if kept == positions:
        return replace(edit, site=replace(edit.site, positions=kept))
    reads = edit.reads.positions or positions
    read = dict(zip(positions, reads, strict=True))
    source = replace(edit.reads, positions=tuple(read[p] for p in kept))
    site = replace(edit.site, positions=kept)
    return replace(edit, site=site, read=source if edit.source is not None else None)
