"""Work under a limit of the address space, against the same work without one; run as a script.

`python -m tests.short_of_memory FOLDER` prints for each kind of work how often it was halved and
how far its numbers are from those of the whole, as JSON. A process of its own, for the limit and
for glibc's threshold, above which freed memory goes back to the system.
"""

from __future__ import annotations

import itertools
import json
import re
import resource
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

import interv
import interv.engine.memory
from interv.engine import (
    Edit,
    LowRankRotatedSpace,
    ReferenceExecutor,
    Run,
    Site,
    SuffixExecutor,
    Vanilla,
    anatomy_of,
    attributions,
)
from interv.engine.batch import BatchEdit, BatchRunner, Spot
from interv.engine.rotations import Rotation
from interv.plan import CollectPlan, PatchPlan
from interv.runner.collect import _shard
from interv.runner.patch import Patcher
from interv.runner.patch_steps import PATCH
from interv.runner.sweep import run_sweep
from interv.train.loop import backward
from tests.conftest import save_tokenizer

N, LENGTH = 16, 40
MARGINS = (48, 32, 22, 15, 10, 7, 5, 4, 3, 2, 1)  # MiB above what the process has
IDS = torch.randint(0, 20000, (N, LENGTH), generator=torch.Generator().manual_seed(0))
OTHERS = torch.cat([IDS[:, :2], IDS.flip(0)[:, 2:]], 1)
BASES = [Run(tuple(row)) for row in IDS.tolist()]
SOURCES = [Run(tuple(row)) for row in OTHERS.tolist()]


@contextmanager
def limited(mebibytes: int) -> Iterator[None]:
    status = Path("/proc/self/status").read_text()
    size = int(re.search(r"VmSize:\s+(\d+)", status)[1]) * 1024  # type: ignore[index]
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    resource.setrlimit(resource.RLIMIT_AS, (size, hard))
    plugs = []  # of the holes that earlier work has left
    try:
        for n_bytes in (1 << 20, 1 << 17):
            with suppress(RuntimeError):
                while True:
                    plugs.append(torch.empty(n_bytes, dtype=torch.uint8))
        resource.setrlimit(resource.RLIMIT_AS, (size + (mebibytes << 20), hard))
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (hard, hard))


halved = 0


def release(plain: Callable[[], None] = interv.engine.memory.release) -> None:
    global halved
    halved += 1
    plain()


def flat(found: Any) -> list[float]:
    """All numbers in some results, in order."""
    if isinstance(found, Tensor):
        return flat(found.tolist())
    if isinstance(found, dict):
        return flat([found[key] for key in sorted(found, key=str)])
    if isinstance(found, list | tuple):
        return [*itertools.chain.from_iterable(map(flat, found))]
    return [float(found)] if isinstance(found, int | float) else []


def compared(do: Callable[[], Any]) -> dict[str, float]:
    """What a piece of work gives under the first limit that makes it halve, and without one."""
    global halved
    right = flat(do())
    halved = 0
    for margin in MARGINS:
        with limited(margin):
            found = do()
        if halved:
            apart = max(abs(a - b) for a, b in zip(flat(found), right, strict=True))
            return {"halved": halved, "apart": apart / max(map(abs, right)), "margin": margin}
    return {"halved": 0, "apart": 0.0, "margin": MARGINS[-1]}


def gpt2(folder: Path) -> nn.Module:
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        n_layer=3, n_embd=64, n_head=4, vocab_size=20000, n_positions=64,
        bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    model = transformers.GPT2LMHeadModel(config).eval().requires_grad_(False)
    model.save_pretrained(folder)
    save_tokenizer(folder)
    return model


def bert() -> nn.Module:
    torch.manual_seed(0)
    config = transformers.BertConfig(
        num_hidden_layers=3, hidden_size=64, num_attention_heads=4, intermediate_size=256,
        vocab_size=20000, is_decoder=False,
    )  # fmt: skip
    return transformers.BertForMaskedLM(config).eval()


def swaps(layers: tuple[int, ...] = (0, 1, 2)) -> list[Run]:
    return [
        Run(base.ids, (Edit(Site("mlp_output", layer, (3,)), Vanilla(), source),))
        for base, source in zip(BASES, SOURCES, strict=True)
        for layer in layers
    ]


def engine(model: nn.Module, encoder: nn.Module) -> Iterator[tuple[str, Callable[[], Any]]]:
    anatomy = anatomy_of(model)

    def executors(name: str, make: Callable[[], Any]) -> Iterator[tuple[str, Callable[[], Any]]]:
        yield f"{name}: logits", lambda: make().logits(swaps(), tokens=[5, 6])
        sites = [Site("mlp_output", layer) for layer in range(3)]
        yield f"{name}: states", lambda: [s[0] for s in make().states(BASES + SOURCES, sites)]

    yield from executors("suffix", lambda: SuffixExecutor(model, anatomy, 10**6))
    yield from executors("reference", lambda: ReferenceExecutor(model, anatomy))
    yield from executors("layers", lambda: SuffixExecutor(encoder, anatomy_of(encoder), 10**6))

    def gradients() -> Any:
        executor = ReferenceExecutor(model, anatomy)
        targets = {("mlp_output", i): torch.zeros(4, LENGTH, 64) for i in range(3)}
        score = lambda logits: logits[:, 0, 5] - logits[:, 0, 6]  # noqa: E731
        return list(
            attributions(
                executor, BASES[:4], (-1,), score, targets, along="activation", steps=8
            ).values()
        )

    yield "gradients", gradients
    runner = BatchRunner(model, anatomy)
    spot = Spot(Site("block_output", 1), torch.full((N, 1), 5))
    read = torch.full((N,), LENGTH - 1)

    @torch.no_grad()
    def forwards() -> Any:
        [states] = runner.states(OTHERS, [spot])
        edits = [BatchEdit(spot, Vanilla(), states, torch.arange(N) % 2 == 0)]
        kept = runner.keep(IDS, 2, 5, [spot])
        logits = runner.logits(IDS, edits, read, kept)
        return logits[:, :50], runner.logits(IDS, edits, read)[:, :50]

    yield "forwards of training", forwards

    class Fit:
        """A rotated space under the loss of its counterfactual labels."""

        def __init__(self) -> None:
            self.modules = Rotation.seeded(64, 4, seed=1)
            self.swap = LowRankRotatedSpace(self.modules)

        def loss(self, pairs: Tensor) -> Tensor:
            with torch.no_grad():
                [states] = runner.states(OTHERS[pairs], [spot[pairs]])
            edits = [BatchEdit(spot[pairs], self.swap, states)]
            logits = runner.logits(IDS[pairs], edits, read[pairs])
            return nn.functional.cross_entropy(logits, IDS[pairs, 0], reduction="sum")

    def step() -> Any:
        fit = Fit()
        optimizer = torch.optim.SGD(fit.modules.parameters(), lr=1.0)
        halves = list(torch.arange(N).split(N // 2))
        loss = backward(fit, optimizer, halves)  # type: ignore[arg-type]
        return [loss, *(p.grad for p in fit.modules.parameters())]

    yield "a step of training", step


def runner(folder: Path) -> dict[str, dict[str, float]]:
    """Each kind of step of a patch, and a file of activations."""
    words = ["Seattle", "Paris", "Rome", "Berlin", "London", "Mostar"]
    pairs = [
        {"clean": f"The {a} {b} in", "corrupted": f"The {b} {c} in", "answer": c, "wrong": a}
        for a, b, c in itertools.permutations(words, 3)
    ]
    plan = interv.load(
        {
            "kind": "patch", "name": "short", "model": {"path": str(folder)},
            "data": {"pairs": pairs[:32], "keep": "all"}, "metric": "kl_divergence",
            "grid": {"component": "mlp_output"}, "intervention": "denoise",
            "run": {"threads": 1, "executor": "reference"},
        }
    )  # fmt: skip
    assert isinstance(plan, PatchPlan)
    graph = interv.load(
        {
            "kind": "patch", "name": "graph", "model": {"path": str(folder)},
            "data": {"pairs": pairs[:32], "keep": "all"}, "metric": "logit_difference",
            "grid": {"component": "mlp_output"}, "intervention": "denoise",
            "attribution": {"method": "gradient"}, "decompose": True,
            "circuit": {"method": "eap", "knockouts": 1}, "run": {"threads": 1},
        }
    )  # fmt: skip
    found: dict[str, dict[str, float]] = {}
    plain = Patcher.do

    def do(self: Patcher, step: Any) -> Any:
        if step.kind not in found:
            found[step.kind] = compared(lambda: plain(self, step))
        return plain(self, step)

    Patcher.do = do  # type: ignore[method-assign]
    for name, one in (("pack", plan), ("graph", graph)):
        (folder / name).mkdir()
        assert isinstance(one, PatchPlan)
        run_sweep(one, PATCH, folder / name, lambda *_: None, adopt=False)
    prompts = [" ".join([a, b, c] * 3) for a, b, c in itertools.permutations(words, 3)]
    made = interv.load(
        {
            "kind": "collect", "name": "states", "model": {"path": str(folder)},
            "data": {"prompts": prompts}, "grid": {"component": ["mlp_activation"]},
            "positions": "all",
        }
    )  # fmt: skip
    assert isinstance(made, CollectPlan)
    model = transformers.GPT2LMHeadModel.from_pretrained(folder).eval()
    executor = ReferenceExecutor(model, anatomy_of(model))
    found["collect"] = compared(lambda: _shard(made, executor, made.shards[0]))
    return found


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    for name, module in list(sys.modules.items()):
        if name.startswith("interv.") and getattr(module, "release", None) is not None:
            vars(module)["release"] = release
    model = gpt2(folder)
    found = {name: compared(do) for name, do in engine(model, bert())}
    print(json.dumps(found | runner(folder)))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
