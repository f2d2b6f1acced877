"""The suffix executor against the reference, on random runs of random small models."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from interv.engine import (
    Addition,
    Collect,
    Edit,
    Noise,
    ReferenceExecutor,
    Run,
    Site,
    Subtraction,
    SuffixExecutor,
    Vanilla,
    Zero,
)
from interv.errors import EngineError
from interv.models.families import BY_MODEL_TYPE
from tests.test_reference import COMPONENTS, IDS, OTHER, same, snapshot

N_LAYERS = 3
TOKENS = st.integers(1, 60)


def both(folder: Path, dtype: torch.dtype = torch.float64, attention: str = "sdpa"):
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, attn_implementation=attention
    ).eval()
    family = BY_MODEL_TYPE[model.config.model_type]
    return model, ReferenceExecutor(model, family), SuffixExecutor(model, family, N_LAYERS)


@pytest.fixture(scope="module", params=["gpt2", "llama"])
def executors(request: pytest.FixtureRequest):
    return both(request.getfixturevalue(f"{request.param}_folder"))


def agree(executors, runs: list[Run], keep: int) -> None:
    """Logits at the last positions, of all at once and in any order, are the reference's."""
    _, reference, suffix = executors
    reference.forget()
    suffix.forget()
    got = suffix.logits(runs, keep)
    expected = torch.cat([reference.logits([run], keep) for run in runs])
    assert got.shape == expected.shape
    assert (got - expected).abs().max() <= 1e-11 * expected.abs().max()


@st.composite
def sites(draw: st.DrawFn, length: int) -> Site:
    positions = draw(st.lists(st.integers(0, length - 1), min_size=1, max_size=3, unique=True))
    return Site(
        draw(st.sampled_from(COMPONENTS)), draw(st.integers(0, N_LAYERS - 1)), tuple(positions)
    )


@st.composite
def a_run(draw: st.DrawFn, depth: int = 2) -> Run:
    """A run with noise on the embeddings, perhaps, and edits whose sources are such runs."""
    length = draw(st.integers(2, 9))
    start = draw(st.sampled_from([(5, 9, 17, 3, 40, 8, 2, 2, 7), (5, 9, 21, 3, 40, 8, 2, 2, 7)]))
    ids = start[:length]
    edits: list[Edit] = []
    if draw(st.booleans()):
        at = tuple(draw(st.sets(st.integers(0, length - 1), min_size=1, max_size=2)))
        edits.append(Edit(Site("token_embedding", 0, at), Noise(0.5, 3, draw(st.integers(0, 1)))))
    for _ in range(draw(st.integers(0, 3))):
        site = draw(sites(length))
        kind = draw(
            st.sampled_from([Vanilla, Vanilla, Addition, Subtraction, Zero, Collect, Noise])
        )
        if kind in (Vanilla, Addition, Subtraction):
            kept = [r for r in (draw(a_run(depth - 1)),) if depth > 0 and len(r.ids) >= length]
            base = Run(ids, tuple(e for e in edits if e.site.component == "token_embedding"))
            source = draw(st.sampled_from([base, Run(ids), *kept]))
            edits.append(Edit(site, kind(), source))
        else:
            edits.append(Edit(site, Noise(0.3, 1, 0) if kind is Noise else kind()))
    return Run(ids, tuple(edits))


@settings(max_examples=50)
@given(st.lists(a_run(), min_size=1, max_size=6), st.integers(1, 2))
def test_random_runs(executors, runs: list[Run], keep: int) -> None:
    agree(executors, runs, keep)


@pytest.mark.parametrize("component", COMPONENTS)
@pytest.mark.parametrize("layer", range(N_LAYERS))
def test_a_sweep_over_positions(executors, component: str, layer: int) -> None:
    runs = [
        Run(IDS, (Edit(Site(component, layer, (p,)), Vanilla(), Run(OTHER)),))
        for p in range(len(IDS))
    ]
    agree(executors, runs, 1)
    agree(executors, runs, len(IDS))


def test_noise_windows_and_held_places(executors) -> None:
    noisy = [
        Run(IDS, (Edit(Site("token_embedding", 0, (1, 2)), Noise(1.0, 1, d)),)) for d in (0, 1)
    ]
    runs = []
    for base in noisy:
        for p in range(len(IDS)):
            window = tuple(Edit(Site("mlp_output", i, (p,)), Vanilla(), Run(IDS)) for i in (0, 1))
            restored = Edit(Site("block_output", 1, (p,)), Vanilla(), Run(IDS))
            held = tuple(
                Edit(Site("mlp_output", i, (p,)), Vanilla(), base) for i in range(N_LAYERS)
            )
            runs += [Run(IDS, (*base.edits, *window)), Run(IDS, (*base.edits, restored, *held))]
    agree(executors, [*runs, *noisy], 1)


def test_path_patching_by_nested_runs(executors) -> None:
    """A sender is patched, everything else held; the receiver reads what it then gets."""
    held = tuple(
        Edit(Site("attention_output", i, tuple(range(6))), Vanilla(), Run(IDS)) for i in (0, 1, 2)
    )
    sender = Edit(Site("mlp_output", 0, (2,)), Vanilla(), Run(OTHER))
    middle = Run(IDS, (sender, *held))
    runs = [
        Run(IDS, (Edit(Site(receiver, 2, (5,)), Vanilla(), middle),))
        for receiver in ("mlp_input", "attention_input", "block_output", "block_input")
    ]
    agree(executors, runs, 1)


def test_prompts_of_different_length_walk_together(executors) -> None:
    runs = [
        Run(IDS[:n], (Edit(Site("block_output", 0, (n - 2,)), Vanilla(), Run(OTHER[:n])),))
        for n in (3, 6, 4)
    ]
    agree(executors, runs, 2)


def test_a_draw_over_several_positions_is_not_cut_apart(executors) -> None:
    for component in ("mlp_output", "block_output"):
        noise = Edit(Site(component, N_LAYERS - 1, (1, 5)), Noise(1.0, 1, 0))
        swap = Edit(Site("block_output", 1, (4,)), Vanilla(), Run(OTHER))
        agree(executors, [Run(IDS, (noise,)), Run(IDS, (swap, noise))], 1)


def test_what_changes_nothing_is_the_base_itself(executors) -> None:
    _, _, suffix = executors
    suffix.forget()
    before = Edit(Site("block_output", 1, (1,)), Vanilla(), Run(OTHER))
    last = Edit(Site("mlp_output", N_LAYERS - 1, (2,)), Vanilla(), Run(OTHER))
    base, *others = suffix.logits([Run(IDS), Run(IDS, (before,)), Run(IDS, (last,))], 1)
    for other in others:
        assert torch.equal(base, other), "a row was computed that could not change"


def test_no_more_is_computed_than_the_rows_need(executors) -> None:
    model, _, suffix = executors
    suffix.forget()
    runs = [
        Run(IDS, (Edit(Site("block_output", i, (p,)), Vanilla(), Run(OTHER)),))
        for i in range(N_LAYERS)
        for p in (3, 4, 5)
    ]
    suffix.logits(runs[:1], 1)
    seen: list[tuple[int, ...]] = []
    blocks = model.transformer.h if hasattr(model, "transformer") else model.model.layers

    def see(_module: nn.Module, args: tuple[torch.Tensor, ...], _output: object) -> None:
        seen.append(tuple(args[0].shape[:2]))

    handles = [block.register_forward_hook(see) for block in blocks]
    suffix.logits(runs, 1)
    for handle in handles:
        handle.remove()
    # Block 0 is passed by; block 1 has the three rows of layer 0, block 2 also those of layer 1.
    assert [shape for shape in seen if shape[0] > 1] == [(3, 3), (6, 3)]


@pytest.mark.parametrize("fails", [False, True])
def test_the_model_is_left_as_it_was_found(gpt2_folder: Path, fails: bool) -> None:
    model, _, suffix = both(gpt2_folder)
    model.train()
    mine = model.lm_head.register_forward_hook(lambda *_: None)
    before, attributes = snapshot(model), {n: set(vars(m)) for n, m in model.named_modules()}
    runs = [Run(IDS, (Edit(Site("block_output", 1, (3,)), Vanilla(), Run(OTHER)),))]
    if fails:
        runs.append(Run(IDS, (Edit(Site("mlp_output", 1, (99,)), Zero()),)))
        with pytest.raises((IndexError, EngineError)):
            suffix.logits(runs, 1)
    else:
        suffix.logits(runs, 1)
    same(before, snapshot(model))
    assert attributes == {n: set(vars(m)) for n, m in model.named_modules()}
    mine.remove()


def test_float32_within_the_last_bits(model_folder: Path) -> None:
    _, reference, suffix = both(model_folder, torch.float32)
    runs = [
        Run(IDS, (Edit(Site(c, 1, (p,)), Vanilla(), Run(OTHER)),))
        for c in COMPONENTS
        for p in range(6)
    ]
    expected = reference.logits(runs, 1)
    assert (suffix.logits(runs, 1) - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_eager_attention(model_folder: Path) -> None:
    executors = both(model_folder, attention="eager")
    runs = [
        Run(IDS, (Edit(Site("block_output", 0, (p,)), Vanilla(), Run(OTHER)),)) for p in range(6)
    ]
    agree(executors, runs, 2)


def test_blocks_that_are_no_plain_sequence_are_refused(gpt2_folder: Path) -> None:
    model, _, suffix = both(gpt2_folder)

    class Scaled(nn.Module):
        def __init__(self, block: nn.Module) -> None:
            super().__init__()
            self.block = block

        def forward(self, hidden: torch.Tensor, *args: object, **kwargs: object) -> torch.Tensor:
            return self.block(hidden, *args, **kwargs)

    # Something happens between two blocks.
    handle = model.transformer.h[1].register_forward_pre_hook(lambda _m, a: (a[0] * 1.1, *a[1:]))
    run = Run(IDS, (Edit(Site("block_output", 0, (2,)), Vanilla(), Run(OTHER)),))
    with pytest.raises(EngineError, match="block 1 does not start from what block 0 gives"):
        suffix.logits([run], 1)
    handle.remove()
