"""Edges against models written out by hand, in which each reader has its own copy of the stream."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Literal

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from interv.engine import Edit, ReferenceExecutor, Run, Site, Zero, anatomy_of, edge_parts
from interv.engine.edges import (
    EdgeGraph,
    Method,
    Parts,
    Receiver,
    Sender,
    circuit_logits,
    edge_scores,
)
from interv.errors import EngineError
from interv.models.anatomy import Anatomy
from interv.models.config import read_facts
from tests import zoo

BY_HAND = ("gpt2", "llama", "gpt_neox")  # plain; grouped keys; parallel blocks
NORMED_AFTER = ("gemma2", "gemma3_text", "olmo2")
SUMS = tuple(name for name in zoo.CAUSAL if name not in (*NORMED_AFTER, "mamba", "granite"))
AT = (-1, 3)
EPS = 1e-4


def score(logits: Tensor) -> Tensor:
    """Not linear in the logits, and of both positions."""
    return logits[:, 0].log_softmax(-1)[:, 7] - logits[:, 1, 9] * logits[:, 1, 11]


# By hand.


@dataclass(frozen=True)
class ByHand:
    """A model of `LAYERS` layers; tensors begin with `[variant, pos]`, matrices are by head."""

    embed: Callable[[list[int]], Tensor]
    norms: Callable[[int, Tensor, int], Tensor]
    """Norm 1 or 2 of a layer."""
    qkv: Callable[[int], list[tuple[Tensor, Tensor]]]
    """Matrices `[head, d_model, d_head]` and biases `[head, d_head]` for q, k, v."""
    project: Callable[[int], tuple[Tensor, Tensor]]
    """Matrix `[head, d_head, d_model]` and bias."""
    mlp: Callable[[int, Tensor], Tensor]
    logits: Callable[[Tensor], Tensor]
    angles: Callable[[int], tuple[Tensor, Tensor]] | None
    """Cosines and sines `[pos, columns that are rotated]` for so many positions."""
    parallel: bool

    def senders(self) -> list[str]:
        names = ["input"]
        for layer in range(zoo.LAYERS):
            names += [f"a{layer}.h{head}" for head in range(4)] + [f"m{layer}"]
        return names

    def receivers(self) -> list[str]:
        names = []
        for layer in range(zoo.LAYERS):
            names += [f"a{layer}.h{head}.q" for head in range(4)]
            names += [f"a{layer}.h{head}.{kind}" for kind in "kv" for head in range(4)]
            names.append(f"m{layer}")
        return [*names, "logits"]

    def forward(
        self,
        ids: list[int],
        share: Tensor,
        gap: Callable[[int, Tensor], Tensor],
        moved: dict[int, Tensor] | None = None,
    ) -> tuple[Tensor, list[Tensor]]:
        """Logits `[variant, pos, vocab]` and what each sender writes.

        `share[variant, sender, receiver]` of a sender's `gap` (given its output) is added on the
        way to that receiver alone; `moved[sender]` to its output, wherever it goes.
        """
        written: list[Tensor] = []
        constant = torch.zeros(1)
        order = iter(range(share.shape[2]))

        def write(value: Tensor) -> None:
            more = (moved or {}).get(len(written))
            written.append(value if more is None else value + more)

        def read() -> Tensor:
            receiver = next(order)
            stream = torch.stack(written).sum(0) + constant
            for i, value in enumerate(written):
                stream = stream + share[:, i, receiver, None, None] * gap(i, value)
            return stream

        def mlp(layer: int) -> Tensor:
            return self.mlp(layer, self.norms(layer, read(), 2))

        write(self.embed(ids).expand(len(share), -1, -1))
        for layer in range(zoo.LAYERS):
            q, k, v = (
                torch.stack(
                    [
                        self.norms(layer, read(), 1) @ matrix + bias
                        for matrix, bias in zip(
                            *(x.repeat_interleave(4 // len(x), 0) for x in heads), strict=True
                        )
                    ]
                )
                for heads in self.qkv(layer)
            )
            heads = self.attend(q, k, v)
            weight, bias = self.project(layer)
            early = mlp(layer) if self.parallel else None
            for head in range(4):
                write(heads[head] @ weight[head])
            constant = constant + bias
            write(mlp(layer) if early is None else early)
        logits = self.logits(read())
        assert next(order, None) is None
        return logits, written

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Heads' values `[head, variant, pos, d_head]`."""
        q, k = self.rotate(q), self.rotate(k)
        length, width = q.shape[-2:]
        pattern = q @ k.transpose(-1, -2) / math.sqrt(width)
        future = torch.ones(length, length).triu(1).bool()
        return pattern.masked_fill(future, -math.inf).softmax(-1) @ v

    def rotate(self, x: Tensor) -> Tensor:
        if self.angles is None:
            return x
        cos, sin = self.angles(x.shape[-2])
        turned, rest = x[..., : cos.shape[-1]], x[..., cos.shape[-1] :]
        a, b = turned.chunk(2, -1)
        return torch.cat([turned * cos + torch.cat([-b, a], -1) * sin, rest], -1)

    def plain(self, ids: list[int]) -> tuple[Tensor, Tensor]:
        """Logits `[pos, vocab]` and what each sender writes `[sender, pos, d_model]`."""
        none = torch.zeros(1, len(self.senders()), len(self.receivers()), dtype=torch.float64)
        logits, written = self.forward(ids, none, lambda _, value: value)
        return logits[0], torch.stack(written)[:, 0]


def angles_of(rotary: nn.Module) -> Callable[[int], tuple[Tensor, Tensor]]:
    """The model's own, which takes them in float32."""

    def angles(length: int) -> tuple[Tensor, Tensor]:
        cos, sin = rotary(torch.zeros(1, dtype=torch.float64), torch.arange(length)[None])
        return cos[0], sin[0]

    return angles


def gpt2_by_hand(model: nn.Module) -> ByHand:
    w = dict(model.named_parameters())

    def norm(name: str, x: Tensor) -> Tensor:
        name = f"transformer.{name}"
        return functional.layer_norm(x, (48,), w[f"{name}.weight"], w[f"{name}.bias"], 1e-5)

    def mlp(layer: int, x: Tensor) -> Tensor:
        name = f"transformer.h.{layer}.mlp"
        x = x @ w[f"{name}.c_fc.weight"] + w[f"{name}.c_fc.bias"]
        x = functional.gelu(x, approximate="tanh")
        return x @ w[f"{name}.c_proj.weight"] + w[f"{name}.c_proj.bias"]

    def qkv(layer: int) -> list[tuple[Tensor, Tensor]]:
        name = f"transformer.h.{layer}.attn.c_attn"
        matrix = w[f"{name}.weight"].reshape(48, 3, 4, 12).permute(1, 2, 0, 3)
        bias = w[f"{name}.bias"].reshape(3, 4, 1, 12)
        return list(zip(matrix, bias, strict=True))

    def project(layer: int) -> tuple[Tensor, Tensor]:
        name = f"transformer.h.{layer}.attn.c_proj"
        return w[f"{name}.weight"].reshape(4, 12, 48), w[f"{name}.bias"]

    return ByHand(
        lambda ids: w["transformer.wte.weight"][ids] + w["transformer.wpe.weight"][: len(ids)],
        lambda layer, x, which: norm(f"h.{layer}.ln_{which}", x),
        qkv,
        project,
        mlp,
        lambda x: norm("ln_f", x) @ w["transformer.wte.weight"].T,
        angles=None,
        parallel=False,
    )


def llama_by_hand(model: nn.Module) -> ByHand:
    w = dict(model.named_parameters())

    def norm(name: str, x: Tensor) -> Tensor:
        return x / (x.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt() * w[f"model.{name}.weight"]

    def mlp(layer: int, x: Tensor) -> Tensor:
        gate, up, down = (
            w[f"model.layers.{layer}.mlp.{name}_proj.weight"].T for name in ("gate", "up", "down")
        )
        return (functional.silu(x @ gate) * (x @ up)) @ down

    def qkv(layer: int) -> list[tuple[Tensor, Tensor]]:
        name = f"model.layers.{layer}.self_attn"
        matrices = [w[f"{name}.{kind}_proj.weight"].reshape(-1, 12, 48).mT for kind in "qkv"]
        return [(m, torch.zeros(len(m), 1, 12)) for m in matrices]

    def project(layer: int) -> tuple[Tensor, Tensor]:
        matrix = w[f"model.layers.{layer}.self_attn.o_proj.weight"].T
        return matrix.reshape(4, 12, 48), torch.zeros(48)

    names = {1: "input_layernorm", 2: "post_attention_layernorm"}
    return ByHand(
        lambda ids: w["model.embed_tokens.weight"][ids],
        lambda layer, x, which: norm(f"layers.{layer}.{names[which]}", x),
        qkv,
        project,
        mlp,
        lambda x: norm("norm", x) @ w["lm_head.weight"].T,
        angles=angles_of(model.get_submodule("model.rotary_emb")),
        parallel=False,
    )


def neox_by_hand(model: nn.Module) -> ByHand:
    w = dict(model.named_parameters())

    def linear(name: str, x: Tensor) -> Tensor:
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    def norm(name: str, x: Tensor) -> Tensor:
        name = f"gpt_neox.{name}"
        return functional.layer_norm(x, (64,), w[f"{name}.weight"], w[f"{name}.bias"], 1e-5)

    def mlp(layer: int, x: Tensor) -> Tensor:
        name = f"gpt_neox.layers.{layer}.mlp.dense"
        return linear(f"{name}_4h_to_h", functional.gelu(linear(f"{name}_h_to_4h", x)))

    def qkv(layer: int) -> list[tuple[Tensor, Tensor]]:
        name = f"gpt_neox.layers.{layer}.attention.query_key_value"
        matrix = w[f"{name}.weight"].reshape(4, 3, 16, 64).permute(1, 0, 3, 2)
        bias = w[f"{name}.bias"].reshape(4, 3, 1, 16).transpose(0, 1)
        return list(zip(matrix, bias, strict=True))

    def project(layer: int) -> tuple[Tensor, Tensor]:
        name = f"gpt_neox.layers.{layer}.attention.dense"
        return w[f"{name}.weight"].T.reshape(4, 16, 64), w[f"{name}.bias"]

    names = {1: "input_layernorm", 2: "post_attention_layernorm"}
    return ByHand(
        lambda ids: w["gpt_neox.embed_in.weight"][ids],
        lambda layer, x, which: norm(f"layers.{layer}.{names[which]}", x),
        qkv,
        project,
        mlp,
        lambda x: norm("final_layer_norm", x) @ w["lm_head.weight"].T,
        angles=angles_of(model.get_submodule("gpt_neox.rotary_emb")),
        parallel=True,
    )


# Both ways.


@cache
def made(name: str) -> nn.Module:
    """A model that no test changes."""
    model = zoo.make(name)
    if name == "llama":
        # Its own norms take float32, of which no difference can be taken.
        for path, norm in list(model.named_modules()):
            if path.endswith("norm"):
                new = nn.RMSNorm(48, eps=1e-6, dtype=torch.float64).requires_grad_(False)
                new.weight.copy_(norm.weight)
                parent, _, child = path.rpartition(".")
                setattr(model.get_submodule(parent), child, new)
    return model


@cache
def by_hand(name: str) -> ByHand:
    makers = {"gpt2": gpt2_by_hand, "llama": llama_by_hand, "gpt_neox": neox_by_hand}
    return makers[name](made(name))


def runs(*variants: int) -> list[Run]:
    return [Run(tuple(zoo.ids(variant))) for variant in variants]


BASES, SOURCES = (0, 1), (2, 3)


def graph_of(model: nn.Module) -> EdgeGraph:
    return EdgeGraph(anatomy_of(model))


def parts_of(model: nn.Module) -> Parts:
    return Parts(ReferenceExecutor(model, anatomy_of(model)), model, graph_of(model))


def logits_of(model: nn.Module, keep: Tensor) -> Tensor:
    parts = parts_of(model)
    return circuit_logits(parts, runs(*BASES), parts.outputs(runs(*SOURCES)), keep, AT)


def scores_of(
    model: nn.Module,
    method: Method = "eap",
    steps: int = 5,
    quadrature: Literal["riemann", "midpoint"] = "riemann",
) -> Tensor:
    parts = parts_of(model)
    return edge_scores(
        parts,
        runs(*BASES),
        parts.outputs(runs(*SOURCES)),
        AT,
        score,
        method=method,
        steps=steps,
        quadrature=quadrature,
    )


def dropped_by_hand(name: str, dropped: Tensor) -> Tensor:
    """Logits `[run, len(AT), vocab]` where these edges `[sender, receiver]` carry the source's."""
    hand, found = by_hand(name), []
    for base, source in zip(BASES, SOURCES, strict=True):
        _, theirs = hand.plain(zoo.ids(source))
        logits, _ = hand.forward(
            zoo.ids(base), dropped[None].double(), lambda i, value, to=theirs: to[i] - value
        )
        found.append(logits[0, list(AT)])
    return torch.stack(found)


def derivatives(
    name: str, base: int, source: int, moved: Callable[[Tensor], dict[int, Tensor]]
) -> Tensor:
    """Of the score along every edge's gap, `[sender, receiver]`, with some senders moved.

    `moved` gets the gaps of all senders `[sender, pos, d_model]`.
    """
    hand = by_hand(name)
    gap = hand.plain(zoo.ids(source))[1] - hand.plain(zoo.ids(base))[1]
    share = torch.zeros(1, len(hand.senders()), len(hand.receivers()), dtype=torch.float64)
    share.requires_grad_()
    logits, _ = hand.forward(zoo.ids(base), share, lambda i, _: gap[i], moved(gap))
    (found,) = torch.autograd.grad(score(logits[:, list(AT)]).sum(), share)
    return found[0]


def mean_derivatives(name: str, shares: Sequence[float]) -> Tensor:
    """The mean over some shares of the input's way from the base to the source, `[run, ...]`."""
    return torch.stack(
        [
            torch.stack(
                [derivatives(name, *pair, lambda gap, x=x: {0: gap[0] * x}) for x in shares]
            ).mean(0)
            for pair in zip(BASES, SOURCES, strict=True)
        ]
    )


# The graph.


@pytest.mark.parametrize("name", BY_HAND)
def test_nodes_and_their_order(name: str) -> None:
    graph, hand = graph_of(made(name)), by_hand(name)
    assert [str(sender) for sender in graph.senders] == hand.senders()
    assert [str(receiver) for receiver in graph.receivers] == hand.receivers()
    assert graph.parallel == hand.parallel


def test_edges_go_forwards() -> None:
    for name, parallel in (("llama", False), ("gpt_neox", True)):
        graph = graph_of(made(name))
        for i, u in enumerate(graph.senders):
            for j, v in enumerate(graph.receivers):
                if u.kind == "input" or v.kind == "logits":
                    expected = True
                elif u.kind == "head" and v.kind == "mlp" and not parallel:
                    expected = u.layer <= v.layer
                else:
                    expected = u.layer < v.layer
                assert bool(graph.exists[i, j]) == expected, (name, str(u), str(v))


def test_gpt2_small_has_as_many_edges_as_published() -> None:
    """32,491 in the code of Hanna et al. 2024."""
    config = {"model_type": "gpt2", "n_layer": 12, "n_head": 12, "n_embd": 768, "vocab_size": 50257}
    facts = read_facts(config, "gpt2")
    assert int(EdgeGraph(Anatomy(facts.family, facts, config)).exists.sum()) == 32_491


def test_heads_of_one_key_head_have_keys_of_their_own() -> None:
    """So that edges are counted as in the code of Hanna et al.: 179,749 of Qwen2.5-0.5B."""
    receivers = graph_of(made("llama")).receivers
    assert Receiver("q", 0, 3) in receivers and Receiver("k", 0, 3) in receivers
    config = {"model_type": "qwen2", "num_hidden_layers": 24, "num_attention_heads": 14,
              "num_key_value_heads": 2, "hidden_size": 896, "vocab_size": 100}  # fmt: skip
    facts = read_facts(config, "qwen2")
    assert int(EdgeGraph(Anatomy(facts.family, facts, config)).exists.sum()) == 179_749


# Circuits.


@pytest.mark.parametrize("name", SUMS)
def test_all_edges_are_the_base_and_none_the_source(name: str) -> None:
    model = made(name)
    executor, exists = ReferenceExecutor(model, anatomy_of(model)), graph_of(model).exists
    base, source = (executor.logits(runs(*some), AT) for some in (BASES, SOURCES))
    assert (base - source).abs().max() > 0.1
    torch.testing.assert_close(logits_of(model, exists), base, rtol=0, atol=1e-9)
    # What is said of edges that are not there does not matter.
    torch.testing.assert_close(logits_of(model, torch.ones_like(exists)), base, rtol=0, atol=1e-9)
    torch.testing.assert_close(logits_of(model, ~exists), source, rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", BY_HAND)
def test_dropping_one_edge_into_each_receiver(name: str) -> None:
    model = made(name)
    graph = graph_of(model)
    plain = dropped_by_hand(name, torch.zeros_like(graph.exists))
    senders = set()
    for receiver in range(len(graph.receivers)):
        before = int(graph.exists[:, receiver].sum())
        sender = (5 * receiver + 3) % before
        dropped = torch.zeros_like(graph.exists)
        dropped[sender, receiver] = True
        expected = dropped_by_hand(name, dropped)
        assert (expected - plain).abs().max() > 1e-6
        torch.testing.assert_close(logits_of(model, ~dropped), expected, rtol=0, atol=1e-9)
        senders.add(graph.senders[sender].kind)
    assert senders == {"input", "head", "mlp"}


@pytest.mark.parametrize("name", BY_HAND)
@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_circuits_of_many_edges(name: str, share: float) -> None:
    exists = graph_of(made(name)).exists
    generator = torch.Generator().manual_seed(7)
    dropped = exists & (torch.rand(exists.shape, generator=generator) < share)
    expected = dropped_by_hand(name, dropped)
    torch.testing.assert_close(logits_of(made(name), ~dropped), expected, rtol=0, atol=1e-9)


# Scores.


@pytest.mark.parametrize("name", BY_HAND)
def test_every_score_is_a_central_difference(name: str) -> None:
    hand, graph, found = by_hand(name), graph_of(made(name)), scores_of(made(name))
    assert found.dtype == torch.float64
    edges = graph.exists.nonzero()
    share = torch.zeros(len(edges), *graph.exists.shape, dtype=torch.float64)
    share[torch.arange(len(edges)), edges[:, 0], edges[:, 1]] = EPS
    for row, (base, source) in enumerate(zip(BASES, SOURCES, strict=True)):
        gap = hand.plain(zoo.ids(source))[1] - hand.plain(zoo.ids(base))[1]
        up, down = (
            score(hand.forward(zoo.ids(base), sign * share, lambda i, _, g=gap: g[i])[0][:, AT])
            for sign in (1, -1)
        )
        expected = torch.zeros(graph.exists.shape, dtype=torch.float64)
        expected[graph.exists] = (up - down) / (2 * EPS)
        assert (expected[graph.exists].abs() > 1e-6).float().mean() > 0.9
        scale = float(expected.abs().max())
        torch.testing.assert_close(found[row], expected, rtol=1e-5, atol=1e-6 * scale)
        assert (found[row][~graph.exists] == 0).all()


@pytest.mark.parametrize("name", BY_HAND)
@pytest.mark.parametrize(
    ("quadrature", "steps", "shares"),
    [
        # From the source's end: its own input, and never the base's.
        ("riemann", 1, [1.0]),
        ("riemann", 4, [1.0, 0.75, 0.5, 0.25]),
        ("midpoint", 1, [0.5]),
        ("midpoint", 4, [0.875, 0.625, 0.375, 0.125]),
    ],
)
def test_integrated_over_the_inputs(
    name: str, quadrature: Literal["riemann", "midpoint"], steps: int, shares: list[float]
) -> None:
    found = scores_of(made(name), "eap_ig_inputs", steps, quadrature)
    torch.testing.assert_close(found, mean_derivatives(name, shares), rtol=1e-9, atol=1e-9)
    assert (found - scores_of(made(name))).abs().max() > 1e-2


@pytest.mark.parametrize("name", BY_HAND)
def test_edges_to_the_logits_are_direct_effects(name: str) -> None:
    """Into a score that is linear in the stream's end the estimate is the effect."""
    hand, found = by_hand(name), scores_of(made(name))[0, :, -1]
    written, other = (hand.plain(zoo.ids(variant))[1] for variant in (BASES[0], SOURCES[0]))
    # The biases of attention belong to no sender; they are what the logits read besides.
    bias = sum(hand.project(layer)[1] for layer in range(zoo.LAYERS))
    end = (written.sum(0) + bias).requires_grad_()
    logits = hand.logits(end)
    torch.testing.assert_close(logits, hand.plain(zoo.ids(BASES[0]))[0])
    (gradient,) = torch.autograd.grad(score(logits[None, list(AT)]).sum(), end)
    expected = ((other - written) * gradient).sum((1, 2))
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ["olmo", "falcon", "bloom", "opt", "mixtral", "gpt_oss", "cohere"])
def test_scores_of_other_families_by_small_steps(name: str) -> None:
    """Where a source hardly differs from the base, dropping an edge does what its score says."""
    model = zoo.make(name)
    parts, graph = parts_of(model), graph_of(model)
    base, source = runs(0), [Run((*zoo.ids(0)[:2], 98, *zoo.ids(0)[3:]))]
    embedding = model.get_submodule(anatomy_of(model).place("token_embedding", 0).path).weight
    assert isinstance(embedding, Tensor)
    near = embedding[zoo.ids(0)[2]]
    # Norms and angles in float32 set a limit to how small the step can be.
    embedding[98] = near + 1e-3 * torch.linspace(-1, 1, len(near), dtype=torch.float64).cos()
    carried = parts.outputs(source)
    scores = edge_scores(parts, base, carried, AT, score)[0]
    before = score(parts.executor.logits(base, AT))
    found, expected = [], []
    for receiver in range(len(graph.receivers)):
        sender = (5 * receiver + 3) % int(graph.exists[:, receiver].sum())
        keep = torch.ones_like(graph.exists)
        keep[sender, receiver] = False
        after = score(circuit_logits(parts, base, carried, keep, AT))
        found.append(scores[sender, receiver])
        expected.append((after - before)[0])
    error = torch.stack(found) - torch.stack(expected)
    assert error.norm() < 0.01 * torch.stack(expected).norm()


def test_batches_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    model = made("llama")
    keep = graph_of(model).exists.clone()
    keep[::3] = False
    together = scores_of(model), logits_of(model, keep)
    monkeypatch.setattr(edge_parts, "_MAX_TOKENS", 1)
    alone = scores_of(model), logits_of(model, keep)
    for one, other in zip(together, alone, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", ["gpt2", "gpt_neox"])
def test_low_precision(name: str) -> None:
    """In bfloat16 scores and circuits are near those of the same model in float64."""
    model = copy.deepcopy(made(name)).bfloat16()
    found, expected = scores_of(model), scores_of(made(name))
    assert found.dtype == torch.float64
    assert functional.cosine_similarity(found.flatten(), expected.flatten(), 0) > 0.98
    none = torch.zeros_like(graph_of(model).exists)
    source = ReferenceExecutor(model, anatomy_of(model)).logits(runs(*SOURCES), AT)
    torch.testing.assert_close(logits_of(model, none), source, rtol=0.1, atol=0.1)


# The model.


def state(model: nn.Module) -> list[object]:
    hooks = [
        (len(m._forward_hooks), len(m._forward_pre_hooks), m.training, "forward" in vars(m))
        for m in model.modules()
    ]
    return [
        hooks,
        [(p.requires_grad, p.grad is None) for p in model.parameters()],
        torch.cat([p.detach().flatten() for p in model.parameters()]).tolist(),
        torch.is_grad_enabled(),
    ]


@pytest.mark.parametrize("name", BY_HAND)
def test_the_model_is_left_as_it_was_found(name: str) -> None:
    model = zoo.make(name)
    expected = scores_of(model), logits_of(model, ~graph_of(model).exists)
    model.train().requires_grad_(True)
    before = state(model)
    found = scores_of(model), logits_of(model, ~graph_of(model).exists)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)
    assert state(model) == before
    with torch.no_grad():
        scores_of(model)
        assert not torch.is_grad_enabled()


def test_also_after_an_error() -> None:
    model = made("gpt2")
    before = state(model)

    def broken(_logits: Tensor) -> Tensor:
        raise ValueError("a fault of the caller's")

    parts = parts_of(model)
    carried = parts.outputs(runs(2))
    with pytest.raises(ValueError, match="a fault of the caller's"):
        edge_scores(parts, runs(0), carried, AT, broken)
    beyond = len(runs(0)[0].ids)
    with pytest.raises(EngineError, match="positions"):
        circuit_logits(parts, runs(0), carried, parts.graph.exists, [beyond])
    assert state(model) == before


class Adapted(nn.Module):
    """A projection with something added to it, as adapters do."""

    def __init__(self, plain: nn.Linear, curved: bool) -> None:
        super().__init__()
        self.plain, self.curved = plain, curved
        self.low = nn.Parameter(torch.linspace(-1, 1, plain.in_features, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        more = (x * self.low).sum(-1, keepdim=True)
        return self.plain(x) + 0.1 * (more.square() if self.curved else more)


@pytest.mark.parametrize("which", ["q_proj", "o_proj"])
def test_projections_of_another_kind(which: str) -> None:
    model = zoo.make("llama")
    attention = model.get_submodule("model.layers.1.self_attn")
    plain = attention.get_submodule(which)
    setattr(attention, which, Adapted(plain, curved=False).requires_grad_(False))
    executor = ReferenceExecutor(model, anatomy_of(model))
    torch.testing.assert_close(
        logits_of(model, ~graph_of(model).exists),
        executor.logits(runs(*SOURCES), AT),
        rtol=0,
        atol=1e-9,
    )
    setattr(attention, which, Adapted(plain, curved=True).requires_grad_(False))
    with pytest.raises(EngineError, match=r"layer 1.* is not linear"):
        logits_of(model, graph_of(model).exists)


# Errors.


@pytest.mark.parametrize(
    ("name", "message"),
    [
        *((name, "a norm follows the attention") for name in NORMED_AFTER),
        ("mamba", "have no attention_output"),
        ("bert", "the residual stream is what a norm gives"),
        ("blip", "have no block_input"),
    ],
)
def test_models_without_such_edges(name: str, message: str) -> None:
    with pytest.raises(EngineError, match=message):
        graph_of(made(name))


def test_a_stream_that_is_no_sum() -> None:
    """Granite multiplies what it adds; a block may be tampered with."""
    with pytest.raises(EngineError, match="granite models have no attention_residual"):
        graph_of(made("granite"))
    model = zoo.make("llama")
    model.model.layers[1].register_forward_hook(lambda _m, _args, output: 1.1 * output)
    with pytest.raises(EngineError, match="does not add what its attention and its MLP give"):
        scores_of(model)


RUN = runs(0)[0]


@pytest.mark.parametrize(
    ("bases", "message"),
    [
        ([], "no runs"),
        ([RUN, Run((5, 6))], "of one length"),
        ([Run(RUN.ids, (Edit(Site("mlp_output"), Zero()),))], "edits of their own"),
        ([RUN, RUN], r"edges carry \(16, 1, .* expected \(16, 2, "),
    ],
)
def test_runs_that_do_not_fit(bases: list[Run], message: str) -> None:
    parts = parts_of(made("gpt2"))
    carried = parts.outputs([RUN])
    with pytest.raises(EngineError, match=message):
        edge_scores(parts, bases, carried, AT, score)
    with pytest.raises(EngineError, match=message):
        circuit_logits(parts, bases, carried, parts.graph.exists, AT)


@pytest.mark.parametrize("kind", ["shape", "type"])
def test_edges_to_keep_that_do_not_fit(kind: Literal["shape", "type"]) -> None:
    exists = graph_of(made("gpt2")).exists
    with pytest.raises(EngineError, match="expected bool"):
        logits_of(made("gpt2"), exists[:, 1:] if kind == "shape" else exists.float())


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda logits: logits.sum(), "expected a number for each of 1 runs"),
        (lambda logits: logits[:, 0, 0].detach(), "cannot be differentiated"),
        (lambda logits: logits[:, 0, 0].detach().requires_grad_(), "no gradient comes back"),
        (lambda logits: logits[:, 0, 0] * torch.nan, "not finite"),
    ],
)
def test_scores_that_are_none(wrong: Callable[[Tensor], Tensor], message: str) -> None:
    parts = parts_of(made("gpt2"))
    with pytest.raises(EngineError, match=message):
        edge_scores(parts, runs(0), parts.outputs(runs(2)), AT, wrong)


def test_a_graph_of_another_model_and_other_arguments() -> None:
    model = made("gpt2")
    other = dict(zoo.CONFIGS["gpt2"]) | {"n_layer": 2}
    facts = read_facts(other, "gpt2")
    graph = EdgeGraph(Anatomy(facts.family, facts, other))
    with pytest.raises(EngineError, match="of another model"):
        Parts(ReferenceExecutor(model, anatomy_of(model)), model, graph)
    with pytest.raises(EngineError, match="steps: 0"):
        scores_of(model, "eap_ig_inputs", 0)
    with pytest.raises(EngineError, match="one of eap, eap_ig_inputs"):
        scores_of(model, "exact")  # type: ignore[arg-type]


def test_names() -> None:
    assert [str(Sender("input")), str(Sender("head", 3, 5)), str(Sender("mlp", 4))] == [
        "input",
        "a3.h5",
        "m4",
    ]
    assert [str(Receiver("q", 3, 5)), str(Receiver("mlp", 4)), str(Receiver("logits"))] == [
        "a3.h5.q",
        "m4",
        "logits",
    ]
