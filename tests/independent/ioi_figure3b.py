"""Path patching from each head to the logits: figure 3b of Wang et al. 2022 (arXiv 2211.00593).

Appendix B of the paper, receivers the logits: in the run on the clean prompt the sender has its
value of the counterfactual prompt at END, every other head its clean value at all positions, and
MLPs and norms are computed again. The effect is the relative change of the mean logit difference.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from tests.independent.model import (
    Change,
    Place,
    Row,
    encode_all,
    head_columns,
    place,
    run,
    single,
    spec,
)

NAME = "ioi_figure3b"
HEADS = "head_attention_value_output"
N_LAYERS, N_HEADS = 30, 9
ALL = [(layer, head) for layer in range(N_LAYERS) for head in range(N_HEADS)]


@torch.no_grad()
def cells(heads: Iterable[tuple[int, int]] = ALL) -> list[Row]:
    """Both metrics for each head, `(layer, head)`."""
    given = spec(NAME)["data"]["pairs"]
    # Prompts of one length go through the model together.
    lengths = [len(encode_all([pair["clean"]])[0]) for pair in given]
    groups = [
        _Group([pair for pair, n in zip(given, lengths, strict=True) if n == length])
        for length in sorted(set(lengths))
    ]
    clean = sum(group.difference(run(group.clean)[0]) for group in groups) / len(given)
    found: list[Row] = []
    for layer, head in heads:
        patched = sum(group.patched(layer, head) for group in groups) / len(given)
        # The metric `relative` is (LD - clean) / clean.
        for metric, value in (
            ("relative", (patched - clean) / clean),
            ("logit_difference", patched),
        ):
            found.append({"layer": layer, "head": head, "metric": metric, "value": value})
    return found


class _Group:
    """Pairs of one length; what their heads have in both runs."""

    def __init__(self, pairs: list[dict[str, str]]) -> None:
        self.clean = encode_all([pair["clean"] for pair in pairs])
        corrupted = encode_all([pair["corrupted"] for pair in pairs])
        self.right = torch.tensor([single(pair["answer"]) for pair in pairs])
        self.wrong = torch.tensor([single(pair["wrong"]) for pair in pairs])
        self.places = [place(HEADS, layer) for layer in range(N_LAYERS)]
        _, self.own = run(self.clean, keep=self.places)
        _, self.other = run(corrupted, keep=self.places)

    def difference(self, logits: Tensor) -> float:
        """The sum over pairs of logit(right) - logit(wrong)."""
        rows, wide = torch.arange(len(logits)), logits.double()
        return float((wide[rows, self.right] - wide[rows, self.wrong]).sum())

    def patched(self, layer: int, head: int) -> float:
        sender = place(HEADS, layer)

        def held(at: Place) -> Change:
            value = self.own[at].clone()
            if at == sender:
                columns = head_columns(head)
                value[:, -1, columns] = self.other[at][:, -1, columns]
            return lambda _computed: value

        logits, _ = run(self.clean, {at: held(at) for at in self.places})
        return self.difference(logits)


def tables() -> dict[str, list[Row]]:
    return {NAME: cells()}
