"""Edge attribution patching and the faithfulness of circuits, by a forward written out by hand.

Nodes and edges are those of Hanna et al. 2024 (EAP-IG, arXiv 2403.17806): embeddings, heads and
MLPs write into the residual stream; each head's queries, keys and values, each MLP and the logits
read it before the norm. Here every reader has a copy of the stream of its own, and so each of the
three heads that share a key head its own keys and values.

- Score of an edge (Syed et al. 2023, arXiv 2310.10348, equation 2): (what its sender writes in the
  corrupted run - in the clean one) · gradient of the logit difference at the receiver's copy in
  the clean run, summed over positions, the mean over pairs.
- In a circuit the copy of a receiver is the stream, plus the sum over edges that are not in it of
  (what the sender writes in the corrupted run - in this one).
- A circuit is the top of a ranking, as many edges as the share of all, rounded down, less what is
  not on a way from the input to the logits. Edges are ranked by what they help (minus the score),
  or by |score|.
- Faithfulness f = (m(C) - m(empty)) / (m(model) - m(empty)), by trapezoids over the share of edges:
  CPR is the area under f of the first ranking, CMD that under |1 - f| of the second (MIB, arXiv
  2504.13151, and its print_results.py); acc-AUC the mean over log k of the share of prompts whose
  answer is above the wrong one, of the first.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from tests.independent.model import Row, encode_all, load, single, spec

NAME = "ioi_circuit"
FRACTIONS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
LAYERS, HEADS, D_HEAD = 30, 9, 64
LISTED = 50

SENDERS = (
    "input",
    *(
        name
        for layer in range(LAYERS)
        for name in (*(f"a{layer}.h{h}" for h in range(HEADS)), f"m{layer}")
    ),
)
RECEIVERS = (
    *(
        name
        for layer in range(LAYERS)
        for name in (
            *(f"a{layer}.h{h}.q" for h in range(HEADS)),
            *(f"a{layer}.h{h}.{kind}" for kind in "kv" for h in range(HEADS)),
            f"m{layer}",
        )
    ),
    "logits",
)
PER_LAYER = 3 * HEADS + 1
RANKINGS = ("signed", "magnitude")

Read = Callable[[Tensor, slice], Tensor]
"""From the stream `[pair, pos, d]` and which receivers to their copies, `[receiver, pair, ...]`."""


@dataclass(frozen=True)
class Pairs:
    clean: Tensor
    corrupted: Tensor
    right: Tensor
    wrong: Tensor

    def difference(self, logits: Tensor) -> Tensor:
        """logit(right) - logit(wrong) of each pair."""
        rows = torch.arange(len(logits))
        return logits[rows, self.right] - logits[rows, self.wrong]


@cache
def pairs() -> Pairs:
    given = spec(NAME)["data"]["pairs"]
    return Pairs(
        encode_all([pair["clean"] for pair in given]),
        encode_all([pair["corrupted"] for pair in given]),
        torch.tensor([single(pair["answer"]) for pair in given]),
        torch.tensor([single(pair["wrong"]) for pair in given]),
    )


def exists() -> Tensor:
    """Whether a sender is computed before a receiver, `[sender, receiver]`."""
    before = [
        1 + layer * (HEADS + 1) + (HEADS if i == PER_LAYER - 1 else 0)
        for layer in range(LAYERS)
        for i in range(PER_LAYER)
    ]
    return torch.arange(len(SENDERS))[:, None] < torch.tensor([*before, len(SENDERS)])


def forward(ids: Tensor, read: Read, written: list[Tensor]) -> Tensor:
    """A Llama model by hand.

    Args:
        ids: `[pair, pos]`.
        read: gives receivers their copies of the stream.
        written: what each sender writes, `[pair, pos, d]`, is appended as it is computed.

    Returns:
        The last position's logits, `[pair, vocab]`.
    """
    model = load().get_submodule("model")
    stream = functional.embedding(ids, model.embed_tokens.weight)
    written.append(stream)
    for layer, block in enumerate(model.layers):
        first = layer * PER_LAYER
        attention, mlp = block.self_attn, block.mlp
        copies = _norm(read(stream, slice(first, first + PER_LAYER - 1)), block.input_layernorm)
        q, k, v = torch.split(copies, HEADS)
        z = _attend(
            _rotate(_project(q, attention.q_proj)),
            _rotate(_project(k, attention.k_proj)),
            _project(v, attention.v_proj),
        )
        by_head = attention.o_proj.weight.T.reshape(HEADS, D_HEAD, -1)
        heads = torch.einsum("hrpe,hed->hrpd", z, by_head)
        written += heads.unbind()
        stream = stream + heads.sum(0)
        [copy] = read(stream, slice(first + PER_LAYER - 1, first + PER_LAYER))
        x = _norm(copy, block.post_attention_layernorm)
        x = functional.silu(x @ mlp.gate_proj.weight.T) * (x @ mlp.up_proj.weight.T)
        written.append(x @ mlp.down_proj.weight.T)
        stream = stream + written[-1]
    [copy] = read(stream, slice(len(RECEIVERS) - 1, None))
    logits: Tensor = _norm(copy[:, -1], model.norm) @ load().get_submodule("lm_head").weight.T
    return logits


def _norm(x: Tensor, norm: Any) -> Tensor:
    """Root mean square norm (Zhang and Sennrich 2019)."""
    mean = x.pow(2).mean(-1, keepdim=True)
    scaled: Tensor = norm.weight * x * (mean + load().config.rms_norm_eps).rsqrt()
    return scaled


def _project(copies: Tensor, linear: Any) -> Tensor:
    """Each head of its own copy, `[head, pair, pos, d_head]`; some share a matrix."""
    by_head = linear.weight.unflatten(0, (-1, D_HEAD))
    by_head = by_head.repeat_interleave(len(copies) // len(by_head), 0)
    return torch.einsum("hrpd,hed->hrpe", copies, by_head)


def _rotate(x: Tensor) -> Tensor:
    """Rotary positions (Su et al. 2021), dimensions i and i + d/2 in pairs."""
    half = D_HEAD // 2
    base = load().config.rope_parameters["rope_theta"]
    frequencies = base ** (-torch.arange(half, dtype=torch.float64) / half)
    angles = torch.arange(x.shape[-2], dtype=torch.float64)[:, None] * frequencies
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


def _attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention."""
    scores = q @ k.transpose(-1, -2) / math.sqrt(D_HEAD)
    later = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
    return scores.masked_fill(later, -torch.inf).softmax(-1) @ v


def as_it_is(stream: Tensor, receivers: slice) -> Tensor:
    """All read the same."""
    return stream.expand(len(range(*receivers.indices(len(RECEIVERS)))), *stream.shape)


@cache
def outputs(side: str) -> Tensor:
    """What senders write in the clean or in the corrupted run, `[sender, pair, pos, d]`."""
    written: list[Tensor] = []
    with torch.no_grad():
        forward(getattr(pairs(), side), as_it_is, written)
    return torch.stack(written)


@cache
def scores() -> Tensor:
    """Of every edge, `[sender, receiver]`; 0 where there is none."""
    data = pairs()
    moved: list[Tensor] = []

    def read(stream: Tensor, receivers: slice) -> Tensor:
        copies = as_it_is(stream, receivers)
        moved.append(torch.zeros_like(copies, requires_grad=True))
        return copies + moved[-1]

    with torch.enable_grad():
        total = data.difference(forward(data.clean, read, [])).sum()
        gradients = torch.cat(torch.autograd.grad(total, moved))
    gap = outputs("corrupted") - outputs("clean")
    found = gap.flatten(1).double() @ gradients.flatten(1).double().T / len(data.clean)
    return found * exists()


def circuit(kept: Tensor) -> Tensor:
    """Logit differences of the circuit of these edges, bool `[sender, receiver]`, of each pair."""
    data, written = pairs(), list[Tensor]()
    dropped = (exists() & ~kept).float()

    def read(stream: Tensor, receivers: slice) -> Tensor:
        n = len(written)
        gap = outputs("corrupted")[:n] - torch.stack(written)
        return stream + torch.einsum("sv,srpd->vrpd", dropped[:n, receivers], gap)

    with torch.no_grad():
        return data.difference(forward(data.clean, read, written)).double()


def top(n: int, ranking: str = "magnitude") -> Tensor:
    """The first n edges of a ranking, bool `[sender, receiver]`."""
    size = -scores() if ranking == "signed" else scores().abs()
    size = size.masked_fill(~exists(), -torch.inf).flatten()
    kept = torch.zeros(len(size), dtype=torch.bool)
    kept[size.argsort(descending=True, stable=True)[:n]] = True
    return kept.reshape(exists().shape)


def connected(kept: Tensor) -> Tensor:
    """The edges that lie on a way from the input to the logits: walked up, and down again."""
    nodes = {**{name: i for i, name in enumerate(SENDERS)}, "logits": len(SENDERS)}
    node_of = [nodes.get(name, nodes.get(name.rpartition(".")[0])) for name in RECEIVERS]
    edges = [(s, node_of[r], s, r) for s, r in kept.nonzero().tolist()]
    # Nodes are in the order in which they are computed, and so are ways.
    fed = {0}
    for begin, end, _, _ in sorted(edges):
        fed |= {end} if begin in fed else set()
    heard = {len(SENDERS)}
    for begin, end, _, _ in sorted(edges, key=lambda edge: -edge[0]):
        heard |= {begin} if end in heard else set()
    found = torch.zeros_like(kept)
    for begin, end, s, r in edges:
        found[s, r] = begin in fed and end in heard and end in fed and begin in heard
    return found


def ends() -> tuple[float, float]:
    """Mean logit differences of the model and of the empty circuit, as the model has them."""
    data = pairs()
    with torch.no_grad():
        clean, corrupted = (
            float(data.difference(load()(ids, logits_to_keep=1).logits[:, -1]).double().mean())
            for ids in (data.clean, data.corrupted)
        )
    return clean, corrupted


def faithfulness(values: Tensor) -> float:
    full, empty = ends()
    return (float(values.mean()) - empty) / (full - empty)


def size_of(fraction: float) -> int:
    return int(fraction * int(exists().sum()))


def _area(values: Sequence[float], x: Sequence[float] = FRACTIONS) -> float:
    exact = (torch.tensor(some, dtype=torch.float64) for some in (values, x))
    return float(torch.trapezoid(*exact))


def edges(n: int = LISTED) -> list[Row]:
    """The largest scores."""
    found = [
        (float(scores()[s, r]), SENDERS[s], RECEIVERS[r]) for s, r in top(n).nonzero().tolist()
    ]
    return [
        {"source": source, "target": target, "value": score}
        for score, source, target in sorted(found, key=lambda edge: -abs(edge[0]))
    ]


def tables() -> dict[str, list[Row]]:
    curve: list[Row] = []
    f: dict[str, list[float]] = {}
    accuracy: dict[str, list[float]] = {}
    for ranking in RANKINGS:
        values = [circuit(connected(top(size_of(x), ranking))) for x in FRACTIONS]
        f[ranking] = [faithfulness(each) for each in values]
        accuracy[ranking] = [float((each > 0).double().mean()) for each in values]
        curve += [
            {"ranking": ranking, "units": size_of(x), "value": share}
            for x, share in zip(FRACTIONS, f[ranking], strict=True)
        ]
    logs = [math.log(x) for x in FRACTIONS]
    (clean, empty) = ends()
    chosen = circuit(connected(top(spec(NAME)["circuit"]["choose"]["top"])))
    numbers = {
        "CPR": _area(f["signed"]),
        "CMD": _area([abs(1 - x) for x in f["magnitude"]]),
        "acc-AUC": _area(accuracy["signed"], logs) / (logs[-1] - logs[0]),
        "largest_faithfulness": max(f["signed"]),
        "edges": float(exists().sum()),
        "clean": clean,
        "empty": empty,
        "circuit": float(chosen.mean()),
        "faithfulness": faithfulness(chosen),
    }
    return {
        NAME: curve,
        f"{NAME}_scores": [{"name": name, "value": value} for name, value in numbers.items()],
        f"{NAME}_edges": edges(),
    }
