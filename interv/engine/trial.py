"""Forwards of a few ordinary tokens, in which a model's blocks are looked at and edited."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from interv.engine.hooks import Visit, module_input, visiting
from interv.errors import EngineError
from interv.models.anatomy import Place
from interv.models.families import Stand

_LENGTH = 8

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
