"""What a plan costs, counted before anything is loaded."""

from __future__ import annotations

from collections.abc import Container
from dataclasses import asdict, dataclass
from typing import Any

import psutil

from interv.models import ModelFacts
from interv.plan.cells import Plan
from interv.plan.packs import make_packs

BYTES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}
_SHARE = 4  # of the memory that is free, what a run may take for its activations
_CPU_TOKENS = 1024  # wider forwards are no faster on a CPU, and lose more when killed
_GPU_TOKENS = 32768


@dataclass(frozen=True)
class Cost:
    """Counts of one plan.

    Attributes:
        points: cells of the grid, over all prompts; each is `draws` rows.
        no_op_rows: rows whose restored state is the same clean and corrupted.
        done: points that are in a journal already.
        block_tokens: (row, layer, token) triples still to compute, sources and bases included.
        naive_block_tokens: those of one full forward for each point, with the clean row in
            each as in the authors' code, nothing kept.
        forwards: forwards still to run, but for those of sources and baselines.
        memory_bytes: weights, and the largest forward's activations and logits; None where
            the number of parameters is not known.
    """

    prompts: int
    points: int
    rows: int
    no_op_rows: int
    done: int
    forwards: int
    block_tokens: int
    naive_block_tokens: int
    memory_bytes: int | None

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def estimate(plan: Plan, done: Container[str] = ()) -> Cost:
    """Count; `done` holds the ids of points that need not be computed again."""
    facts, draws = plan.facts, plan.draws
    layers = facts.n_layers if facts else 0
    tokens = max_tokens(plan) if facts else 0
    cells = plan.expected_cells
    packs = make_packs(plan, plan.executor, tokens, elsewhere=done, cells=cells)
    pending = [cell for pack in packs for cell in pack.cells]
    naive = sum(plan.naive_tokens(cell) for cell in cells)
    return Cost(
        prompts=len(plan.baselines),
        points=len(cells),
        rows=len(cells) * draws,
        no_op_rows=sum(plan.width(cell) == 0 for cell in cells) * draws,
        done=len(cells) - len(pending),
        forwards=len(packs),
        block_tokens=sum(p.block_tokens for p in packs) + layers * plan.kept_tokens(pending),
        naive_block_tokens=layers * naive,
        memory_bytes=_memory(plan, facts, tokens),
    )


def max_tokens(plan: Plan, free_gpu_bytes: int | None = None) -> int:
    """Tokens that go through a block together.

    As the spec has it, or as many as `run.memory`, or a quarter of the memory that is free,
    holds the activations of; no more than is of use.

    Args:
        plan: with a model whose shape is known.
        free_gpu_bytes: what is free on the GPU that computes; None: a CPU computes.
    """
    run = plan.spec.run
    if run.max_tokens is not None:
        return int(run.max_tokens)
    assert plan.facts is not None
    free = free_cpu_bytes() if free_gpu_bytes is None else free_gpu_bytes
    budget = run.memory_bytes if run.memory_bytes is not None else free // _SHARE
    most = _CPU_TOKENS if free_gpu_bytes is None else _GPU_TOKENS
    # Half for the activations, half for the logits and what is kept of sources and bases.
    fitting = budget // (2 * token_bytes(plan.facts, plan.spec.model.dtype))
    # A power of two: a little more or less free memory leaves the packs, and the bits, as they are.
    return int(min(most, 1 << max(0, fitting.bit_length() - 1)))


def token_bytes(facts: ModelFacts, dtype: str) -> int:
    """Bytes of one token's activations at the widest place of a block."""
    heads = 3 * (facts.n_heads + 2 * facts.n_kv_heads) * facts.d_head
    return (6 * facts.d_model + 3 * facts.d_mlp + heads) * BYTES[dtype]


def free_cpu_bytes() -> int:
    """Return the memory that this machine could give a process now, file caches included."""
    return int(psutil.virtual_memory().available)


def _memory(plan: Plan, facts: ModelFacts | None, tokens: int) -> int | None:
    if facts is None or facts.n_params is None or not plan.cells:
        return None
    size = BYTES[plan.spec.model.dtype]
    longest = max(plan.tokens(p) for p in plan.prompt_indices)
    activations = max(tokens, plan.draws * longest) * token_bytes(facts, plan.spec.model.dtype)
    # Logits once in the model's numbers, twice in float64 for the softmax.
    most = max(plan.logits(p) for p in plan.prompt_indices)
    logits = tokens // longest * most * (size + 16)
    states = 3 * facts.n_layers * longest * facts.d_model * size
    return facts.n_params * size + activations + logits + states
