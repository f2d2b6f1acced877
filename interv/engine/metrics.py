"""What is read from the logits of a run, for given answers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from interv.errors import EngineError


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


@dataclass(frozen=True)
class Answers:
    """Token ids of the right answers, which are one event together, and of the wrong ones."""

    right: tuple[tuple[int, ...], ...]
    wrong: tuple[tuple[int, ...], ...]

    @property
    def all(self) -> tuple[tuple[int, ...], ...]:
        return (*self.right, *self.wrong)


def read_everything(
    logits: Mapping[tuple[int, ...], Tensor],
    answers: Answers,
    clean: Tensor | None,
    own: Mapping[str, Callable[..., Tensor]],
) -> dict[str, list[Any]]:
    """All that metrics are made of, for each run.

    Args:
        logits: by what was given of the answers (their tokens but the last): `[run, n, vocab]`,
            where position i predicts answer token i.
        answers: the answers.
        clean: the clean run's logits `[vocab]` where the first answer token is predicted;
            None where no divergence from it is wanted.
        own: metrics of a plug-in.

    Returns:
        `log_probabilities` `[run, answer]` of each answer whole, in nats; of single tokens also
        `logits`, and `rank` of the best right one (0: no token has a higher logit); `kl_divergence`
        of the clean run's prediction from this one's and `js_divergence` between them, in nats;
        and what is the user's own.

    Raises:
        EngineError: a metric of the user's own gives something else than a finite number a run.
    """
    whole = {tail: given.double() for tail, given in logits.items()}
    totals = {tail: given.logsumexp(-1) for tail, given in whole.items()}
    summed = [
        torch.stack(
            [whole[ids[:-1]][:, i, token] - totals[ids[:-1]][:, i] for i, token in enumerate(ids)]
        ).sum(0)
        for ids in answers.all
    ]
    first = next(iter(logits.values()))[:, 0]
    found: dict[str, list[Any]] = {"log_probabilities": torch.stack(summed, 1).tolist()}
    if clean is not None:
        here = next(iter(whole.values()))[:, 0].log_softmax(-1)
        reference = clean.double().log_softmax(-1)
        found["kl_divergence"] = _kl(reference, here).tolist()
        found["js_divergence"] = _js(reference, here).tolist()
    if all(len(ids) == 1 for ids in answers.all):
        tokens = [ids[0] for ids in answers.all]
        found["logits"] = first[:, tokens].double().tolist()
        best = first[:, tokens[: len(answers.right)]].amax(-1, keepdim=True)
        found["rank"] = (first > best).sum(-1).double().tolist()
    for name, function in own.items():
        right, wrong = ([ids[0] for ids in some] for some in (answers.right, answers.wrong))
        values = function(first, right, wrong)
        finite = isinstance(values, Tensor) and values.shape == first.shape[:1]
        if not (finite and bool(torch.isfinite(values).all())):
            got = tuple(values.shape) if isinstance(values, Tensor) else type(values).__name__
            raise EngineError(f"metric {name}: gives {got}, expected {len(first)} finite numbers")
        found[name] = values.double().tolist()
    return found


def _kl(p: Tensor, q: Tensor) -> Tensor:
    """KL(p ‖ q) of log-probabilities, over the last dimension."""
    return (p.exp() * (p - q)).sum(-1)


def _js(p: Tensor, q: Tensor) -> Tensor:
    middle = torch.logaddexp(p, q) - torch.tensor(2.0, dtype=torch.float64).log()
    return (_kl(p.expand_as(q), middle) + _kl(q, middle)) / 2


def differentiable(of: str, answers: Sequence[Answers]) -> Callable[[Tensor], Tensor]:
    """A metric of single-token answers as a function of logits, for gradients.

    Args:
        of: its name.
        answers: of each run.

    Returns:
        From logits `[run, 1, vocab]` to `[run]`.
    """

    def score(logits: Tensor) -> Tensor:
        values = logits[:, 0]
        if of in ("log_probability", "log_probability_difference", "cross_entropy"):
            values = values.log_softmax(-1)
        elif of in ("probability", "probability_difference"):
            values = values.softmax(-1)
        rows = []
        for row, given in zip(values, answers, strict=True):
            right = [ids[0] for ids in given.right]
            wrong = [ids[0] for ids in given.wrong]
            rows.append(combined(of, row[right], row[wrong]))
        return torch.stack(rows)

    return score


def combined(of: str, right: Any, wrong: Any) -> Any:
    """Return a metric from its values for each answer, along the last dimension of arrays.

    Several right answers are one event: its probability is the sum of theirs, its
    log-probability the logarithm of that sum, and its logit the logarithm of the sum of
    exponentials of their logits, so that logits and log-probabilities differ by the same number
    as for one answer. Several wrong ones are alternatives to it: of their logits and
    log-probabilities the mean counts, of their probabilities the sum.

    Args:
        of: one of `OF_ANSWERS`.
        right, wrong: tensors or arrays `[..., answer]`: logits, log-probabilities or, of the
            metrics of probabilities, probabilities.
    """
    if of == "probability":
        return right.sum(-1)
    if of == "probability_difference":
        return right.sum(-1) - wrong.sum(-1)
    together = _log_sum(right)
    if of == "cross_entropy":
        return -together
    return together - wrong.mean(-1) if of.endswith("_difference") else together


def _log_sum(values: Any) -> Any:
    """The logarithm of the sum of exponentials over the last dimension; of one value itself."""
    if values.shape[-1] == 1:
        return values[..., 0]
    if isinstance(values, Tensor):
        return values.logsumexp(-1)
    return np.logaddexp.reduce(values, axis=-1)
