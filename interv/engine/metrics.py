"""What is read from the logits of a run, for a given answer."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def read_answer(logits: Tensor, answer_ids: Sequence[int]) -> dict[str, list[float]]:
    """Every metric of an answer, each a value for each run; computed in float64.

    Args:
        logits: `[run, n_answer, vocab]`, where position i predicts answer token i: the
            answer's earlier tokens were given (teacher forcing).
        answer_ids: the answer's tokens.

    Returns:
        `log_probability` of the whole answer in nats; for an answer of one token also its
        `logit` and its `rank` (0: no other token has a higher logit).
    """
    wide = logits.double()
    answer = torch.tensor(answer_ids, device=logits.device)
    index = answer.expand(len(wide), -1)[..., None]
    chosen = wide.gather(-1, index)[..., 0]
    total = (chosen - wide.logsumexp(-1)).sum(-1)
    values = {"log_probability": total.tolist()}
    if len(answer_ids) == 1:
        values["logit"] = chosen[:, 0].tolist()
        values["rank"] = (wide[:, 0] > chosen).sum(-1).double().tolist()
    return values


def predicts(logits: Tensor, answer_ids: Sequence[int]) -> bool:
    """Whether every answer token of one run, `[n_answer, vocab]`, is the top one."""
    return logits.argmax(-1).tolist() == list(answer_ids)
