"""What the peers share: the command line, the clock, the memory gauge, the model."""

from __future__ import annotations

import argparse
import gc
import json
import os
import resource
import sys
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import tokenizers
import torch
import transformers
from torch import Tensor

from tests.bench.cases import CASES, WIDTH, Case, Cell, Prompt, sample

THREADS = 2
WARM_UP = 2


class Peer(Protocol):
    """One way of computing a case's cells, its model loaded."""

    def prepare(self, prompt: Prompt) -> None:
        """Begin a prompt: forget the last one's states, compute what all its cells share."""
        ...

    def values(self, prompt: Prompt, cells: Sequence[Cell]) -> list[float]:
        """The value of each cell of that prompt."""
        ...


Make = Callable[[Case, Path], Peer]


def main(make: Make, package: str) -> None:
    """Run a case and print one line of JSON, the last on stdout."""
    parser = argparse.ArgumentParser()
    parser.add_argument("case", choices=CASES)
    parser.add_argument("--model", type=Path, default=None, help="folder of smollm2-135m")
    parser.add_argument("--sample", type=int, default=None, help="cells; all unless given")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rate", action="store_true", help="time a large matrix product too")
    args = parser.parse_args()
    torch.set_num_threads(THREADS)
    transformers.utils.logging.disable_progress_bar()
    case = CASES[args.case]
    cells = sample(case, args.sample, args.seed)
    with torch.no_grad():
        peer = make(case, args.model or model_folder())
        loaded = _reset_peak()
        _run(peer, case, cells[:WARM_UP])
        rates = [matmul_rate()] if args.rate else []
        times: list[float] = []
        values: dict[str, float] = {}
        for _ in range(args.rounds):
            preparing, computing, values = _run(peer, case, cells)
            begun = len({cell.prompt for cell in cells})
            times.append(
                preparing * len(case.prompts) / begun + computing * len(case.cells) / len(cells)
            )
        peak = _peak()
        if args.rate:
            rates.append(matmul_rate())
    result = {
        "seconds": times,
        "cells": len(cells),
        "peak_bytes": peak - loaded,
        "rate": max(rates, default=None),
        "versions": {name: version(name) for name in ("torch", "transformers", package)},
        "values": values,
    }
    print(flush=True)
    print(json.dumps(result), flush=True)


def _run(peer: Peer, case: Case, cells: Sequence[Cell]) -> tuple[float, float, dict[str, float]]:
    """Seconds that the prompts' beginnings took, seconds that the cells took, and the values."""
    everything = getattr(peer, "everything", None)
    if everything is not None:
        # A peer that computes cells of several prompts together.
        began = time.perf_counter()
        values = everything(case.prompts, cells)
        keys = [cell.key for cell in cells]
        return 0.0, time.perf_counter() - began, dict(zip(keys, values, strict=True))
    by_prompt: dict[int, list[Cell]] = {}
    for cell in cells:
        by_prompt.setdefault(cell.prompt, []).append(cell)
    preparing = computing = 0.0
    found: dict[str, float] = {}
    for index, some in by_prompt.items():
        prompt = case.prompts[index]
        began = time.perf_counter()
        peer.prepare(prompt)
        prepared = time.perf_counter()
        values = peer.values(prompt, some)
        computing += time.perf_counter() - prepared
        preparing += prepared - began
        found |= {cell.key: value for cell, value in zip(some, values, strict=True)}
    return preparing, computing, found


def model_folder() -> Path:
    """The default model's weights, as interv keeps them."""
    cache = Path(os.environ.get("INTERV_CACHE", "~/.cache/interv")).expanduser()
    folders = [path.parent for path in cache.glob("gguf/*-float32/model.safetensors")]
    if len(folders) != 1:
        sys.exit(f"{len(folders)} models in {cache}; name one with --model")
    return folders[0]


def load(folder: Path, **options: Any) -> Any:
    """The transformers model, every weight touched once."""
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, local_files_only=True, **options
    )
    model.eval().requires_grad_(False)
    model(torch.tensor([[0]]))
    return model


def tokenizer() -> transformers.PreTrainedTokenizerFast:
    """One that knows no word: some peers insist on one, the bench passes token ids."""
    empty = tokenizers.Tokenizer(tokenizers.models.WordLevel({"<pad>": 0}, "<pad>"))
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=empty, **dict.fromkeys(("pad_token", "bos_token", "eos_token"), "<pad>")
    )


def noise_of(case: Case, prompt: Prompt) -> Tensor:
    """Draws `[draw, n_subject, width]`, scaled, in float32."""
    assert case.noise is not None
    shape = (case.noise.draws, prompt.subject[1] - prompt.subject[0], WIDTH)
    draws = np.random.RandomState(case.noise.seed).randn(*shape)
    return torch.from_numpy(case.noise.level * draws).float()


def corrupted_rows(case: Case, prompt: Prompt) -> Tensor:
    """Token ids `[draw, position]` of the corrupted run."""
    return torch.tensor([prompt.corrupted or prompt.clean] * case.draws)


def value_of(case: Case, prompt: Prompt, logits: Tensor) -> float:
    """A cell's value, from the logits `[draw, vocab]` at the last position."""
    logs = logits.log_softmax(-1)[:, prompt.answer]
    return float(logs.exp().mean()) if case.noise else float(logs[0])


def matmul_rate() -> float:
    """Floating-point operations a second of a large float32 matrix product: the best of some."""
    a, b = torch.randn(2, 2048, 2048)
    times = []
    for _ in range(6):
        began = time.perf_counter()
        a @ b
        times.append(time.perf_counter() - began)
    return 2 * 2048**3 / min(times)


_CLEAR = Path("/proc/self/clear_refs")


def _reset_peak() -> int:
    """Bytes resident now; the peak is counted from here on, where the system allows it."""
    gc.collect()
    if not _CLEAR.exists():
        return _peak()
    _CLEAR.write_text("5")
    return _resident("VmRSS")


def _peak() -> int:
    if _CLEAR.exists():
        return _resident("VmHWM")
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _resident(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise KeyError(field)
