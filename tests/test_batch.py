"""Batched forwards: values as the reference's, gradients of a kept start as the whole's."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from interv.engine import Edit, Intervention, ReferenceExecutor, Run, Site, anatomy_of
from interv.engine.batch import BatchEdit, BatchRunner, Kept, Spot
from interv.engine.interventions import Vanilla
from interv.engine.rotations import LowRankRotatedSpace, Rotation
from interv.errors import EngineError
from tests import zoo
from tests.samples import swaps

WIDTH = 48
FAMILIES = [name for name in zoo.CAUSAL if name not in zoo.VISION] + ["bert"]
BASES = torch.tensor([zoo.ids(0, 9), zoo.ids(2, 9), zoo.ids(3, 9)])
SOURCES = torch.tensor([zoo.ids(1, 9), zoo.ids(0, 9), zoo.ids(1, 9)])


@cache
def runner(name: str) -> BatchRunner:
    model = zoo.make(name, torch.float64).requires_grad_(False)
    return BatchRunner(model, anatomy_of(model))


def spot(component: str, layer: int) -> Spot:
    return Spot(Site(component, layer), torch.tensor([[4, 6], [3, 5], [5, 4]]))


def edits_of(of: BatchRunner, intervention: Intervention, where: Spot) -> list[BatchEdit]:
    source = of.states(SOURCES, [where])[0] if intervention.needs_source else None
    return [BatchEdit(where, intervention, source)]


READ = torch.tensor([6, 7, 8])
LABELS = torch.tensor([3, 7, 9])


def kept_for(of: BatchRunner, edits: list[BatchEdit]) -> Kept:
    spots = [edit.spot for edit in edits]
    layer = of.first_layer(spots)
    assert layer is not None
    return of.keep(BASES, layer, 3, spots)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("component", ["block_output", "attention_output", "mlp_output"])
def test_values_are_those_of_the_reference(name: str, component: str) -> None:
    of = runner(name)
    if component not in of.anatomy.components:
        pytest.skip("no such component")
    reference = ReferenceExecutor(of.model, of.anatomy)
    for layer in (0, zoo.LAYERS - 1):
        where = spot(component, layer)
        edits = edits_of(of, Vanilla(), where)
        assert where.positions is not None
        runs = [
            Run(
                tuple(base.tolist()),
                (
                    Edit(
                        Site(component, layer, tuple(at.tolist())),
                        Vanilla(),
                        Run(tuple(source.tolist())),
                    ),
                ),
            )
            for base, source, at in zip(BASES, SOURCES, where.positions, strict=True)
        ]
        wanted = reference.logits(runs, None)[torch.arange(3), READ]
        plain = reference.logits([Run(tuple(b.tolist())) for b in BASES], None)
        assert not torch.allclose(wanted, plain[torch.arange(3), READ])
        torch.testing.assert_close(of.logits(BASES, edits, READ), wanted, rtol=0, atol=1e-9)
        kept = kept_for(of, edits)
        torch.testing.assert_close(of.logits(BASES, edits, READ, kept), wanted, rtol=0, atol=1e-9)


def gradients(
    of: BatchRunner, intervention: Intervention, edits: list[BatchEdit], kept: Kept | None
) -> list[Tensor]:
    for one in intervention.parameters():
        one.grad = None
    loss = nn.functional.cross_entropy(of.logits(BASES, edits, READ, kept), LABELS)
    loss.backward()
    return [one.grad for one in intervention.parameters() if one.grad is not None]


@pytest.mark.parametrize("name", ["gpt2", "llama", "mistral", "opt", "olmo2", "bert"])
@pytest.mark.parametrize("kind", [s for s in swaps(WIDTH) if s.parameters()], ids=lambda s: s.name)
def test_gradients_of_the_kept_start_are_the_whole_ones(name: str, kind: Intervention) -> None:
    of = runner(name)
    for component, layer in (("block_output", 0), ("mlp_output", 1), ("block_input", 2)):
        with torch.enable_grad():
            edits = edits_of(of, kind, spot(component, layer))
            whole = gradients(of, kind, edits, None)
            kept = gradients(of, kind, edits, kept_for(of, edits))
        assert whole and any(float(one.abs().max()) > 1e-9 for one in whole)
        for one, other in zip(whole, kept, strict=True):
            torch.testing.assert_close(other, one, rtol=1e-5, atol=1e-9)


def test_heads_and_dims_and_two_sites() -> None:
    of = runner("llama")
    reference = ReferenceExecutor(of.model, of.anatomy)
    rotation = LowRankRotatedSpace(Rotation.seeded(12, 2, 0))
    first = Spot(Site("head_attention_value_output", 0, None, (2,)), torch.full((3, 1), 4))
    second = Spot(Site("block_output", 1, None, None, (1, 5)), torch.full((3, 1), 6))
    one, other = of.states(SOURCES, [first, second])
    edits = [BatchEdit(first, rotation, one), BatchEdit(second, Vanilla(), other)]
    runs = []
    for base, source in zip(BASES, SOURCES, strict=True):
        of_source = Run(tuple(source.tolist()))
        both = (
            Edit(Site("head_attention_value_output", 0, (4,), (2,)), rotation, of_source),
            Edit(Site("block_output", 1, (6,), None, (1, 5)), Vanilla(), of_source),
        )
        runs.append(Run(tuple(base.tolist()), both))
    wanted = reference.logits(runs, (-1,))[:, 0]
    read = torch.full((3,), 8)
    kept = of.keep(BASES, 0, 4)
    for found in (of.logits(BASES, edits, read), of.logits(BASES, edits, read, kept)):
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-9)


def test_some_rows_of_what_is_kept() -> None:
    of = runner("gpt2")
    where = spot("block_output", 1)
    edits = edits_of(of, Vanilla(), where)
    kept = kept_for(of, edits)
    rows = torch.tensor([2, 0])
    some = [
        BatchEdit(where[rows], Vanilla(), e.source[rows]) for e in edits if e.source is not None
    ]
    found = of.logits(BASES[rows], some, READ[rows], kept[rows])
    wanted = of.logits(BASES, edits, READ, kept)[rows]
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-9)
    again = Kept.joined([kept[torch.tensor([0])], kept[torch.tensor([1, 2])]])
    torch.testing.assert_close(
        of.logits(BASES, edits, READ, again), of.logits(BASES, edits, READ), rtol=0, atol=1e-9
    )
    assert kept.n_bytes > 0


def test_the_model_is_left_alone_and_errors_are_errors() -> None:
    of = runner("gpt2")
    before = [p.clone() for p in of.model.parameters()]
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in of.model.modules()]
    where = spot("block_output", 1)
    nan = [BatchEdit(where, Vanilla(), torch.full((3, 2, WIDTH), torch.nan, dtype=torch.float64))]
    with pytest.raises(EngineError, match="not finite"):
        of.logits(BASES, nan, READ, kept_for(of, nan))
    with pytest.raises(EngineError, match="behind the blocks"):
        of.first_layer([Spot(Site("final_norm"))])
    assert [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in of.model.modules()] == hooks
    assert all(torch.equal(a, b) for a, b in zip(before, of.model.parameters(), strict=True))


def _saved(of: BatchRunner, edits: list[BatchEdit], kept: Kept | None) -> tuple[int, list[Tensor]]:
    """Bytes that the forward keeps for its backward, and the intervention's gradients."""
    seen: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        seen[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        logits = of.logits(BASES, edits, READ, kept)
    loss = nn.functional.cross_entropy(logits, LABELS)
    modules = [m for edit in edits for m in edit.intervention.modules().values()]
    gradients = torch.autograd.grad(loss, [p for m in modules for p in m.parameters()])
    return sum(seen.values()), list(gradients)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("from_kept", [True, False])
def test_checkpointing_keeps_less_for_the_same_gradients(name: str, from_kept: bool) -> None:
    plain = runner(name)
    sparing = BatchRunner(plain.model, plain.anatomy, checkpointing=True)
    width = plain.anatomy.width("block_output")
    assert width is not None
    swap = LowRankRotatedSpace(Rotation.seeded(width, 3, 0).double())
    edits = edits_of(plain, swap, spot("block_output", 0))
    kept = kept_for(plain, edits) if from_kept and plain.anatomy.reach != "nothing" else None
    before = {key: list(module._forward_hooks) for key, module in plain.model.named_modules()}
    much, wanted = _saved(plain, edits, kept)
    little, found = _saved(sparing, edits, kept)
    assert little < 0.7 * much
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)
    after = {key: list(module._forward_hooks) for key, module in plain.model.named_modules()}
    assert before == after
    assert not any("forward" in vars(module) for module in plain.model.modules())


@pytest.mark.parametrize("from_kept", [True, False])
def test_checkpointing_leaves_a_foreign_forward_in_place(from_kept: bool) -> None:
    plain = runner.__wrapped__("llama")
    swap = LowRankRotatedSpace(Rotation.seeded(WIDTH, 3, 0).double())
    edits = edits_of(plain, swap, spot("block_output", 0))
    kept = kept_for(plain, edits) if from_kept else None
    _, wanted = _saved(plain, edits, kept)
    calls: list[int] = []

    def wrapped(number: int, forward: Callable[..., Any]) -> Callable[..., Any]:
        def forward_of_another(*args: Any, **kwargs: Any) -> Any:
            calls.append(number)
            return forward(*args, **kwargs)

        return forward_of_another

    # As `accelerate.hooks.add_hook_to_module` does: an attribute of the module itself.
    blocks = list(plain.model.model.layers)
    for number, block in enumerate(blocks):
        block.forward = wrapped(number, block.forward)
    before = [vars(block)["forward"] for block in blocks]
    sparing = BatchRunner(plain.model, plain.anatomy, checkpointing=True)
    _, found = _saved(sparing, edits, kept)
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)
    assert [vars(block).get("forward") for block in blocks] == before
    last = len(blocks) - 1
    assert calls.count(last) == 2, "once forward, once in the backward pass"
