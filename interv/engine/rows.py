"""What of a run must be computed: where it leaves its base, and what happens to it then."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from interv.engine.interventions import Collect, Vanilla
from interv.engine.runs import Edit, Inputs, Run, Site, read_positions
from interv.engine.sites import Sites
from interv.models.anatomy import Place

BY_POSITION = ("position_embeddings", "position_ids", "cache_position")
"""Arguments of a block that have a value for each position."""

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
        read: positions whose logits are wanted.
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

    def base_of(self, run: Run) -> Run:
        """The run with only its edits before the blocks."""
        edits = tuple(edit for edit in run.edits if self._layer(edit.site) is None)
        return run if len(edits) == len(run.edits) else Run(run.ids, edits)

    def _layer(self, site: Site) -> int | None:
        return self._anatomy.layer_of(site.component, site.layer)

    def row(self, run: Run, at: Sequence[int] | None) -> Row:
        """Where a run joins; the base itself, joining nowhere, where it changes nothing read."""
        base = self.base_of(run)
        n_layers = self._anatomy.n_layers
        read = read_positions(run, at)
        everywhere = tuple(range(len(run)))
        read = everywhere if read is None else read
        own = [edit for edit in run.edits if self._layer(edit.site) is not None]
        active: list[tuple[int, int]] = []
        for edit in own:
            layer = self._joins(edit)
            positions = edit.site.positions or everywhere
            if isinstance(edit.intervention, Collect):
                self._sites.place(edit.site)
                continue
            after = self._layer(edit.site) == n_layers
            local = after or (edit.site.component in _LOCAL and edit.site.layer == n_layers - 1)
            live = [
                p
                for p in positions
                if not (local and at is not None and p not in read)
                and not self._is_hold(edit, p, base)
            ]
            if live and not edit.intervention.positionwise:
                # What is drawn or computed over several positions is not cut apart.
                live = list(positions)
            active += [(layer, position) for position in live]
        if not active:
            return Row(base, base, n_layers, len(run), read)
        first_layer = min(layer for layer, _ in active)
        first = 0
        if self._anatomy.reach == "positions":
            first = min(position for _, position in active)
        edits: dict[Place, list[Edit]] = defaultdict(list)
        for edit in own:
            kept = tuple(p for p in edit.site.positions or everywhere if p >= first)
            if not kept or self._joins(edit) < first_layer:
                continue
            cut = replace(edit.site, positions=kept)
            read_at = edit.read
            if edit.read is not None and len(kept) < len(edit.site.positions or everywhere):
                where = edit.site.positions or everywhere
                reads = edit.read.positions or everywhere
                read_at = replace(
                    edit.read,
                    positions=tuple(r for p, r in zip(where, reads, strict=True) if p >= first),
                )
            edits[self._sites.place(edit.site)].append(replace(edit, site=cut, read=read_at))
        return Row(run, base, first_layer, first, read, edits)

    def _joins(self, edit: Edit) -> int:
        """The layer at which a row with this edit must have joined.

        A block's output is the next block's input, so that the block itself need not run,
        unless rows start at layers only or the edit reads the block's input.
        """
        layer = self._layer(edit.site)
        assert layer is not None
        self._sites.place(edit.site)
        enters = edit.site.component == "block_output" and self._anatomy.reach == "positions"
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
        if others[: position + 1] != ids[: position + 1]:
            return False
        different = set(source.edits) ^ set(base.edits)
        return all(e.site.positions and position < min(e.site.positions) for e in different)
