"""What is read from the logits of a run, for a given answer."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def read_answer(logits: Tensor, answer_ids: Sequence[int]) -> dict[str, list[float]]:
    """Every metric of an answer, each a value for each run; summed in float64.

    Args:
        logits: `[run, n_answer, vocab]`, where position i predicts answer token i: the
            answer's earlier tokens were given (teacher forcing).
        answer_ids: the answer's tokens.

    Returns:
        `log_probability` of the whole answer in nats; for an answer of one token also its
        `logit` and its `rank` (0: no other token has a higher logit).
    """
    answer = torch.tensor(answer_ids, device=logits.device)
    index = answer.expand(len(logits), -1)[..., None]
    chosen = logits.gather(-1, index)[..., 0].double()
    # Summed in float64, the terms as precise as the logits are: a copy of all of them in
    # float64 would double the memory and the time.
    wide = logits if logits.dtype == torch.float64 else logits.float()
    largest = wide.amax(-1, keepdim=True)
    total = (wide - largest).exp_().sum(-1, dtype=torch.float64)
    total = (chosen - largest[..., 0].double() - total.log()).sum(-1)
    values = {"log_probability": total.tolist()}
    if len(answer_ids) == 1:
        values["logit"] = chosen[:, 0].tolist()
        values["rank"] = (
            (logits[:, 0] > logits[:, 0].gather(-1, index[:, 0])).sum(-1).double().tolist()
        )
    return values


def predicts(logits: Tensor, answer_ids: Sequence[int]) -> bool:
    """Whether every answer token of one run, `[n_answer, vocab]`, is the top one."""
    return logits.argmax(-1).tolist() == list(answer_ids)
