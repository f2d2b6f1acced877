"""TransformerLens' bridge: `run_with_cache` on the clean prompt, `run_with_hooks` for each cell."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge
from transformers import PreTrainedTokenizerFast

from tests.bench.cases import Case, Cell, Prompt
from tests.bench.peers import common

NAMES = {
    "block_output": "blocks.{}.hook_resid_post",
    "mlp_output": "blocks.{}.hook_mlp_out",
    "attention_output": "blocks.{}.hook_attn_out",
    "head_attention_value_output": "blocks.{}.attn.hook_z",
}

Hook = Callable[..., Tensor]


class TransformerLens:
    def __init__(self, case: Case, folder: Path) -> None:
        self._case = case
        model = common.load(folder, attn_implementation="eager")
        with tempfile.TemporaryDirectory() as scratch:
            # The bridge reads a tokenizer again from where it came from.
            common.tokenizer().save_pretrained(scratch)
            self._bridge = TransformerBridge.boot_transformers(
                str(folder),
                hf_model=model,
                tokenizer=PreTrainedTokenizerFast.from_pretrained(scratch),
                device="cpu",
            )
        self._names = {NAMES[c.component].format(i) for c in case.cells for i in c.layers}
        self._clean: Any = None

    def prepare(self, prompt: Prompt) -> None:
        _, self._clean = self._bridge.run_with_cache(
            torch.tensor([prompt.clean]), names_filter=lambda name: name in self._names
        )

    def values(self, prompt: Prompt, cells: Sequence[Cell]) -> list[float]:
        ids = common.corrupted_rows(self._case, prompt)
        shared: list[tuple[str, Hook]] = []
        if self._case.noise:
            noise = common.noise_of(self._case, prompt)

            def add(states: Tensor, **_: Any) -> Tensor:
                states = states.clone()
                states[:, slice(*prompt.subject)] += noise
                return states

            shared = [("hook_embed", add)]
        found = []
        for cell in cells:
            names = [NAMES[cell.component].format(i) for i in cell.layers]
            hooks = [(name, self._put(cell, name)) for name in names]
            logits = self._bridge.run_with_hooks(ids, fwd_hooks=[*shared, *hooks])
            found.append(common.value_of(self._case, prompt, logits[:, -1]))
        return found

    def _put(self, cell: Cell, name: str) -> Hook:
        # The hook's own name is another of the same point's, by which the cache has it not.
        at = slice(None) if cell.position is None else cell.position

        def put(states: Tensor, **_: Any) -> Tensor:
            states, clean = states.clone(), self._clean[name]
            if cell.head is None:
                states[:, at] = clean[:, at]
            else:
                states[:, at, cell.head] = clean[:, at, cell.head]
            return states

        return put


if __name__ == "__main__":
    common.main(TransformerLens, "transformer_lens")
