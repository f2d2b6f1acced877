"""Causal tracing (Meng et al. 2022, arXiv 2202.05262, section 2.1) with plain hooks.

After the authors' `experiments/causal_trace.py`: row 0 of a batch is clean, the others have noise
on the embeddings of the subject, and clean states are copied from row 0 into the others as the
forward goes by. Here the corrupted rows of several positions stand in one batch.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from tests.independent.model import Change, Place, encode, load, place, run, single, tokenizer

EMBEDDING: Place = ("model.embed_tokens", "out")
N_LAYERS = 30
WINDOWS = {"block_output": 1, "mlp_output": 10, "attention_output": 10}
"""Layers restored together, by component, as in figures 1 and 2."""


@dataclass(frozen=True)
class Fact:
    """A prompt, where its subject stands `[first, end)`, and the token that answers it."""

    ids: tuple[int, ...]
    subject: tuple[int, int]
    answer: int

    def roles(self) -> dict[str, range]:
        """The rows of figure 2 and the positions that each is about, perhaps none."""
        first, end = self.subject
        last = len(self.ids) - 1
        return {
            "first_subject": range(first, first + 1),
            "middle_subject": range(first + 1, end - 1),
            "last_subject": range(end - 1, end),
            "first_subsequent": range(end, min(end, last) + 1),
            "further": range(end + 1, last),
            "last": range(last, last + 1),
        }


def read_fact(prompt: str, subject: str, answer: str) -> Fact:
    ids = encode(prompt)
    start = prompt.index(subject)
    # A token's text begins with its space, which belongs to no word.
    ends = np.cumsum([len(tokenizer().decode([i])) for i in ids])
    inside = [
        i for i, end in enumerate(ends)
        if end > start and (ends[i - 1] if i else 0) < start + len(subject)
        and prompt[max(ends[i - 1] if i else 0, start) : min(end, start + len(subject))].strip()
    ]  # fmt: skip
    return Fact(tuple(ids), (inside[0], inside[-1] + 1), single(answer))


def noise_level(subjects: Sequence[str]) -> float:
    """Three standard deviations of the embeddings of all subjects: `collect_embedding_std`."""
    tokens = [token for subject in subjects for token in encode(subject)]
    embeddings = load().get_submodule("model.embed_tokens").weight[tokens]
    return 3 * float(embeddings.double().std())


def window(component: str, layer: int) -> range:
    """`trace_important_window`: from l - w // 2 up to, and without, l + ceil(w / 2)."""
    size = WINDOWS[component]
    return range(max(0, layer - size // 2), min(N_LAYERS, layer - (-size // 2)))


def knows(fact: Fact) -> bool:
    """Whether the clean prompt's top token is the answer."""
    logits, _ = run(torch.tensor([fact.ids]))
    return int(logits[0].argmax()) == fact.answer


@dataclass(frozen=True)
class Tracer:
    """One fact under the authors' noise: RandomState(1), made anew for each forward."""

    fact: Fact
    level: float
    samples: int

    def baseline(self) -> tuple[float, float]:
        """Probability of the answer in the clean run, and its mean over the corrupted ones."""
        logits, _ = run(self._ids(1), {EMBEDDING: self._corrupt(1)})
        answer = logits.double().softmax(-1)[:, self.fact.answer]
        return float(answer[0]), float(answer[1:].mean())

    def restored(
        self,
        component: str,
        layers: Collection[int],
        positions: Sequence[int],
        sever: str | None = None,
    ) -> list[float]:
        """Mean probability over the draws, for each position at which states are put back.

        Args:
            component: whose clean state is put back.
            layers: in which, all at once.
            positions: each by itself.
            sever: held at its corrupted value at that position in every layer
                (`trace_with_repatch`, figure 3).
        """
        n = len(positions)
        corrupt: dict[Place, Change] = {EMBEDDING: self._corrupt(n)}
        held = [place(sever, layer) for layer in range(N_LAYERS)] if sever else []
        _, recorded = run(self._ids(n), corrupt, held) if held else (None, {})

        def put_back(value: Tensor) -> Tensor:
            value = value.clone()
            for rows, position in self._rows(positions):
                value[rows, position] = value[0, position]
            return value

        def hold(at: Place) -> Change:
            def change(value: Tensor) -> Tensor:
                value = value.clone()
                for rows, position in self._rows(positions):
                    value[rows, position] = recorded[at][rows, position]
                return value

            return change

        changes = {**corrupt, **{place(component, layer): put_back for layer in layers}}
        changes |= {at: hold(at) for at in held}
        logits, _ = run(self._ids(n), changes)
        answer = logits[1:].double().softmax(-1)[:, self.fact.answer]
        return [float(mean) for mean in answer.reshape(n, self.samples).mean(1)]

    def _ids(self, copies: int) -> Tensor:
        return torch.tensor([self.fact.ids] * (1 + copies * self.samples))

    def _rows(self, positions: Sequence[int]) -> list[tuple[slice, int]]:
        """The corrupted rows that belong to each position."""
        n = self.samples
        return [(slice(1 + i * n, 1 + (i + 1) * n), p) for i, p in enumerate(positions)]

    def _corrupt(self, copies: int) -> Change:
        first, end = self.fact.subject

        def change(value: Tensor) -> Tensor:
            value = value.clone()
            draw = np.random.RandomState(1).randn(self.samples, end - first, value.shape[-1])
            value[1:, first:end] += self.level * torch.from_numpy(draw).repeat(copies, 1, 1)
            return value

        return change
