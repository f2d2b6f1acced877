"""Training one fit: batches, schedules, early stopping, and a checkpoint after each epoch.

Which pairs are in which batch is a function of the seed and the epoch alone, and a checkpoint
holds all that a step depends on, so that a fit that was killed ends with the same numbers.
"""

from __future__ import annotations

import math
import pickle
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from interv.engine.memory import is_out_of_memory, out_of_memory, release
from interv.errors import EngineError, ResumeError
from interv.spec.train import TrainedType, Training
from interv.storage import replacing, writing

Progress = Callable[[str], None]
_WINDOWS = 4  # points of the loss curve in each epoch


class Trainee(Protocol):
    """What is trained: its parameters, its loss on some pairs, its accuracy on held-out ones.

    Attributes:
        sizes: of the groups of training pairs, numbered one after the other, that share forwards.
    """

    modules: nn.Module
    sizes: Sequence[int]

    def groups(self) -> Sequence[dict[str, Any]]:
        """Groups of parameters, as an optimiser takes them."""
        ...

    def loss(self, pairs: Tensor) -> Tensor:
        """The sum of the losses of these training pairs."""
        ...

    def accuracy(self) -> float:
        """Interchange intervention accuracy on the validation pairs."""
        ...

    def temper(self, value: float) -> None:
        """Set the temperature of its gates."""
        ...

    def changed(self) -> None:
        """Told after each step."""
        ...


@dataclass
class State:
    """How far a fit has come.

    Attributes:
        curve: points `{step, epoch, loss, iia, temperature, lr}`; iia None within an epoch.
        best: the best validation accuracy so far, at `best_epoch`.
    """

    epoch: int = 0
    step: int = 0
    best: float = -1.0
    best_epoch: int = -1
    curve: list[dict[str, Any]] = field(default_factory=list)
    stopped: bool = False


def train(
    trainee: Trainee,
    section: Training,
    options: TrainedType,
    seed: int,
    checkpoint: Path | None,
    tell: Progress,
) -> State:
    """Train until the epochs are over, or the validation accuracy gets no better.

    Args:
        trainee: holds the parameters, which are trained in place.
        section: how.
        options: of the intervention: temperatures.
        seed: of the order of the pairs.
        checkpoint: a file that is written after each epoch and read if it is there; None: none.
        tell: told how it goes.

    Raises:
        EngineError: the loss is no number any more.
        ResumeError: the checkpoint is damaged.
        StorageError: a checkpoint cannot be written.
    """
    groups = trainee.groups()
    parameters = [p for group in groups for p in group["params"]]
    kind = torch.optim.AdamW if section.optimizer == "adamw" else torch.optim.Adam
    optimizer = kind(groups, lr=section.lr, weight_decay=section.weight_decay)
    n_batches = sum(math.ceil(size / section.batch) for size in trainee.sizes)
    per_epoch = math.ceil(n_batches / section.accumulate)
    total = per_epoch * section.epochs
    tops = [group["lr"] for group in optimizer.param_groups]
    state, best = State(), None
    if checkpoint is not None and checkpoint.is_file():
        saved = _read(checkpoint)
        trainee.modules.load_state_dict(saved["modules"])
        optimizer.load_state_dict(saved["optimizer"])
        state, best = State(**saved["state"]), saved["best"]
        trainee.changed()
    while state.epoch < section.epochs and not state.stopped:
        generator = torch.Generator().manual_seed(seed * 1_000_003 + state.epoch)
        order = batches(trainee.sizes, section.batch, generator)
        window: list[float] = []
        for number in range(per_epoch):
            first = number * section.accumulate
            together = order[first : first + section.accumulate]
            factor = rate(section, state.step, total)
            for group, top in zip(optimizer.param_groups, tops, strict=True):
                group["lr"] = top * factor
            temperature = tempered(options, state.step, total)
            trainee.temper(temperature)
            value = backward(trainee, optimizer, together)
            if not math.isfinite(value):
                raise EngineError(
                    f"the loss is {value} at step {state.step + 1} (epoch {state.epoch + 1}): "
                    "lower train.lr, or set train.clip"
                )
            if section.clip is not None:
                nn.utils.clip_grad_norm_(parameters, section.clip)
            optimizer.step()
            trainee.changed()
            state.step += 1
            window.append(value)
            ends = (number + 1) * _WINDOWS // per_epoch > number * _WINDOWS // per_epoch
            if ends:
                state.curve.append(
                    {
                        "step": state.step,
                        "epoch": (number + 1) / per_epoch + state.epoch,
                        "loss": sum(window) / len(window),
                        "iia": None,
                        "temperature": temperature,
                        "lr": section.lr * factor,
                    }
                )
                mean = sum(window) / len(window)
                tell(f"epoch {state.epoch + 1}/{section.epochs}, loss {mean:.3g}")
                window = []
        accuracy = trainee.accuracy()
        state.curve[-1]["iia"] = accuracy
        tell(
            f"epoch {state.epoch + 1}/{section.epochs}, loss {state.curve[-1]['loss']:.3g}, "
            f"validation IIA {accuracy:.3f}"
        )
        if accuracy > state.best:
            state.best, state.best_epoch = accuracy, state.epoch
            if section.keep == "best":
                best = {k: v.detach().clone() for k, v in trainee.modules.state_dict().items()}
        state.epoch += 1
        waited = state.epoch - 1 - state.best_epoch
        state.stopped = section.patience is not None and waited >= section.patience
        if checkpoint is not None:
            save(checkpoint, trainee.modules, optimizer, state, best)
    if section.keep == "best" and best is not None:
        trainee.modules.load_state_dict(best)
        trainee.changed()
    return state


def backward(
    trainee: Trainee, optimizer: torch.optim.Optimizer, together: Sequence[Tensor]
) -> float:
    """Return the mean loss over the pairs of one step; parameters have its gradients afterwards.

    Where memory is short the step begins again with batches of half the size: a loss is a sum
    over pairs, so that the gradients are the same.

    Raises:
        OutOfMemoryError: a single pair does not fit.
    """
    n_pairs = sum(map(len, together))

    def tried(parts: Sequence[Tensor]) -> float:
        optimizer.zero_grad(set_to_none=True)
        total = 0.0
        for pairs in parts:
            loss = trainee.loss(pairs) / n_pairs
            loss.backward()  # type: ignore[no-untyped-call]
            total += float(loss.detach())
        return total

    parts = list(together)
    while True:
        try:
            return tried(parts)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            if all(len(pairs) <= 1 for pairs in parts):
                raise out_of_memory(error) from error
        release()
        parts = [half for pairs in parts for half in torch.split(pairs, math.ceil(len(pairs) / 2))]


def batches(sizes: Sequence[int], size: int, generator: torch.Generator) -> list[Tensor]:
    """Pairs in random order, each batch within one group, the batches in random order too."""
    found: list[Tensor] = []
    first = 0
    for n in sizes:
        found += torch.split(first + torch.randperm(n, generator=generator), size)
        first += n
    return [found[i] for i in torch.randperm(len(found), generator=generator).tolist()]


def _read(path: Path) -> dict[str, Any]:
    try:
        found: dict[str, Any] = torch.load(path, weights_only=True, map_location="cpu")
    except (OSError, EOFError, RuntimeError, pickle.UnpicklingError) as error:
        raise ResumeError(f"{path}: is damaged; delete it, and the fit begins again") from error
    return found


def save(
    path: Path,
    modules: nn.Module,
    optimizer: torch.optim.Optimizer,
    state: State,
    best: dict[str, Tensor] | None,
) -> None:
    """Write a checkpoint, whole or not at all.

    Raises:
        StorageError: it cannot be written.
    """
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as file:
            torch.save(
                {
                    "modules": modules.state_dict(),
                    "optimizer": optimizer.state_dict(),
                    "state": dict(vars(state)),
                    "best": best,
                },
                file,
            )


def rate(section: Training, step: int, total: int) -> float:
    """The learning rate's share of its top at a step, counted from 0."""
    warm = int(section.warmup * total)
    if step < warm:
        return (step + 1) / warm
    if section.schedule == "constant":
        return 1.0
    done = (step - warm) / max(1, total - warm)
    return 1 - done if section.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * done))


def tempered(options: TrainedType, step: int, total: int) -> float:
    """The temperature at a step: from first to last in equal steps, as in pyvene's notebook."""
    first, last = options.temperature
    return first + (last - first) * step / max(1, total - 1)
