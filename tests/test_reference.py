"""The reference executor against plain hooks written here, independently of the engine."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from torch import Tensor, nn

from interv.engine import (
    Addition,
    Collect,
    Edit,
    Noise,
    ReferenceExecutor,
    Run,
    Site,
    Subtraction,
    Vanilla,
    Zero,
)
from interv.errors import EngineError
from interv.models.families import BY_MODEL_TYPE

IDS = (5, 9, 17, 3, 40, 8)
OTHER = (5, 9, 21, 3, 40, 8)
COMPONENTS = tuple(BY_MODEL_TYPE["gpt2"].components)

# Where each component stands, written out again by hand: (path in the block, side).
HAND = {
    "gpt2": {
        "block_input": ("", "in"),
        "block_output": ("", "out"),
        "mlp_input": ("ln_2", "out"),
        "mlp_activation": ("mlp.act", "out"),
        "mlp_output": ("mlp.dropout", "out"),
        "attention_input": ("ln_1", "out"),
        "attention_output": ("attn.resid_dropout", "out"),
    },
    "llama": {
        "block_input": ("", "in"),
        "block_output": ("", "out"),
        "mlp_input": ("post_attention_layernorm", "out"),
        "mlp_activation": ("mlp.down_proj", "in"),
        "mlp_output": ("mlp.down_proj", "out"),
        "attention_input": ("input_layernorm", "out"),
        "attention_output": ("self_attn.o_proj", "out"),
    },
}


@pytest.fixture
def model(model_folder: Path) -> nn.Module:
    loaded = transformers.AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float64)
    return loaded.eval()


@pytest.fixture
def executor(model: nn.Module) -> ReferenceExecutor:
    return ReferenceExecutor(model, BY_MODEL_TYPE[model.config.model_type])


def forward(model: nn.Module, ids: tuple[int, ...]) -> Tensor:
    with torch.no_grad():
        return model(torch.tensor([ids])).logits


def by_hand(
    model: nn.Module,
    component: str,
    layer: int,
    ids: tuple[int, ...],
    change: Callable[[Tensor], None],
) -> Tensor:
    """Logits of `ids` with `change` made in place to a clone of the component `[1, pos, width]`."""
    kind = model.config.model_type
    blocks = model.transformer.h if kind == "gpt2" else model.model.layers
    path, side = HAND[kind][component]
    module = blocks[layer].get_submodule(path) if path else blocks[layer]

    def after(_module: nn.Module, _args: object, output: object) -> object:
        value = (output[0] if isinstance(output, tuple) else output).clone()
        change(value)
        return (value, *output[1:]) if isinstance(output, tuple) else value

    def before(_module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        value = args[0].clone()
        change(value)
        return (value, *args[1:])

    hook = (
        module.register_forward_hook(after)
        if side == "out"
        else module.register_forward_pre_hook(before)
    )
    try:
        return forward(model, ids)
    finally:
        hook.remove()


def grab(model: nn.Module, component: str, layer: int, ids: tuple[int, ...]) -> Tensor:
    kept: list[Tensor] = []
    by_hand(model, component, layer, ids, lambda value: kept.append(value.clone()))
    return kept[0][0]


def close(a: Tensor, b: Tensor) -> None:
    assert (a - b).abs().max() <= 1e-12 * b.abs().max()


def test_no_intervention_is_a_plain_forward(model: nn.Module, executor: ReferenceExecutor) -> None:
    close(executor.logits([Run(IDS)], len(IDS)), forward(model, IDS))


@pytest.mark.parametrize("component", COMPONENTS)
@pytest.mark.parametrize("layer", [0, 2])
def test_a_swap_is_the_swap_by_hand(
    model: nn.Module, executor: ReferenceExecutor, component: str, layer: int
) -> None:
    source = grab(model, component, layer, OTHER)

    def change(value: Tensor) -> None:
        value[0, [2, 4]] = source[[2, 4]]

    expected = by_hand(model, component, layer, IDS, change)
    edit = Edit(Site(component, layer, (2, 4)), Vanilla(), Run(OTHER))
    got = executor.logits([Run(IDS, (edit,))], len(IDS))
    assert (expected - forward(model, IDS)).abs().max() > 1e-3, "the swap had no effect"
    close(got, expected)


@pytest.mark.parametrize("component", COMPONENTS)
def test_collect_is_the_raw_hook_output(
    model: nn.Module, executor: ReferenceExecutor, component: str
) -> None:
    [got] = executor.states([Run(IDS)], [Site(component, 1, (4, 0, 2))])
    close(got[0], grab(model, component, 1, IDS)[[4, 0, 2]])


@pytest.mark.parametrize("component", COMPONENTS)
def test_each_type_does_what_its_formula_says(
    model: nn.Module, executor: ReferenceExecutor, component: str
) -> None:
    source = grab(model, component, 1, OTHER)
    noise = Noise(0.5, 7, 2)
    changes: dict[object, Callable[[Tensor], Tensor]] = {
        Zero(): lambda b: b * 0,
        Collect(): lambda b: b,
        Addition(): lambda b: b + source[[1, 3]],
        Subtraction(): lambda b: b - source[[1, 3]],
        noise: lambda b: noise.apply(b, None),
    }
    for intervention, formula in changes.items():

        def change(value: Tensor, formula: Callable[[Tensor], Tensor] = formula) -> None:
            value[0, [1, 3]] = formula(value[0, [1, 3]])

        run = Run(OTHER) if intervention.needs_source else None
        edit = Edit(Site(component, 1, (1, 3)), intervention, run)
        got = executor.logits([Run(IDS, (edit,))], len(IDS))
        close(got, by_hand(model, component, 1, IDS, change))


@pytest.mark.parametrize("component", COMPONENTS)
def test_a_self_swap_changes_nothing(
    model: nn.Module, executor: ReferenceExecutor, component: str
) -> None:
    edit = Edit(Site(component, 1, (0, 1, 2, 3, 4, 5)), Vanilla(), Run(IDS))
    close(executor.logits([Run(IDS, (edit,))], 1), forward(model, IDS)[:, -1:])


def test_rows_in_one_forward_do_not_meet(model: nn.Module, executor: ReferenceExecutor) -> None:
    runs = [Run(IDS, (Edit(Site("mlp_output", 1, (p,)), Vanilla(), Run(OTHER)),)) for p in range(6)]
    runs += [Run(IDS), Run(OTHER), Run(IDS, (Edit(Site("token_embedding", 0, (1,)), Zero()),))]
    together = executor.logits(runs, 2)
    executor.forget()
    for row, run in enumerate(runs):
        alone = executor.logits([run], 2)
        assert torch.allclose(together[row], alone[0], rtol=0, atol=1e-12)
    close(together[6:7], forward(model, IDS)[:, -2:])


def test_a_source_may_itself_be_edited(model: nn.Module, executor: ReferenceExecutor) -> None:
    """Serial: OTHER's block_output 0 goes into IDS, whose block_output 1 then goes into a third."""
    third = (1, 2, 3, 4, 5, 6)
    first = grab(model, "block_output", 0, OTHER)
    kept: list[Tensor] = []
    kind = model.config.model_type
    blocks = model.transformer.h if kind == "gpt2" else model.model.layers

    def keep(_module: nn.Module, _args: object, output: object) -> None:
        kept.append((output[0] if isinstance(output, tuple) else output).clone())

    hook = blocks[1].register_forward_hook(keep)
    by_hand(model, "block_output", 0, IDS, lambda v: v[0, 2].copy_(first[2]))
    hook.remove()
    second = kept[0].reshape(len(IDS), -1)
    expected = by_hand(model, "block_output", 1, third, lambda v: v[0, 5].copy_(second[5]))
    inner = Run(IDS, (Edit(Site("block_output", 0, (2,)), Vanilla(), Run(OTHER)),))
    outer = Run(third, (Edit(Site("block_output", 1, (5,)), Vanilla(), inner),))
    close(executor.logits([outer], 6), expected)


def test_edits_at_one_site_happen_in_order(executor: ReferenceExecutor) -> None:
    site = Site("block_output", 1, (3,))
    edits = (Edit(site, Zero()), Edit(site, Addition(), Run(OTHER)))
    swap = (Edit(site, Vanilla(), Run(OTHER)),)
    close(executor.logits([Run(IDS, edits)], 1), executor.logits([Run(IDS, swap)], 1))


def test_a_site_that_does_not_fire_is_an_error(model: nn.Module) -> None:
    family = BY_MODEL_TYPE[model.config.model_type]

    class Skipping(nn.Module):
        """Passes the second block by, as a model with early exit would."""

        def __init__(self) -> None:
            super().__init__()
            self.inner = model
            self.config = model.config

        def forward(self, input_ids: Tensor, use_cache: bool) -> object:
            return self.inner(input_ids, use_cache=use_cache)

        def get_submodule(self, target: str) -> nn.Module:
            return nn.Identity() if ".1" in target else self.inner.get_submodule(target)

    executor = ReferenceExecutor(Skipping(), family)
    with pytest.raises(EngineError, match="block_output of layer 1: fired 0 times"):
        executor.logits([Run(IDS, (Edit(Site("block_output", 1, (0,)), Zero()),))], 1)


@pytest.mark.parametrize(
    ("site", "message"),
    [
        (Site("block_ouput", 0, (0,)), "no such site"),
        (Site("block_output", 99, (0,)), "block_output of layer 99: this model has no such site"),
    ],
)
def test_a_site_that_is_not_there_is_an_error(
    executor: ReferenceExecutor, site: Site, message: str
) -> None:
    with pytest.raises(EngineError, match=message):
        executor.logits([Run(IDS, (Edit(site, Zero()),))], 1)


def test_runs_of_different_length_do_not_share_a_forward(executor: ReferenceExecutor) -> None:
    with pytest.raises(EngineError, match="different length"):
        executor.logits([Run(IDS), Run(IDS[:-1])], 1)


def test_numbers_that_are_not_finite_are_an_error(
    model: nn.Module, executor: ReferenceExecutor
) -> None:
    with torch.no_grad():
        model.get_output_embeddings().weight[3] = float("inf")
    with pytest.raises(EngineError, match="not finite"):
        executor.logits([Run(IDS)], 1)


def snapshot(model: nn.Module) -> dict[str, object]:
    return {
        "parameters": {
            n: (p.clone(), p.requires_grad, p.grad) for n, p in model.named_parameters()
        },
        "buffers": {n: b.clone() for n, b in model.named_buffers()},
        "training": {n: m.training for n, m in model.named_modules()},
        "hooks": {
            n: (list(m._forward_hooks), list(m._forward_pre_hooks))
            for n, m in model.named_modules()
        },
        "grad": torch.is_grad_enabled(),
    }


def same(a: dict[str, object], b: dict[str, object]) -> None:
    assert a["training"] == b["training"]
    assert a["hooks"] == b["hooks"]
    assert a["grad"] == b["grad"]
    for name, (value, needs, gradient) in a["parameters"].items():
        other = b["parameters"][name]
        assert torch.equal(value, other[0])
        assert (needs, gradient) == other[1:]
    for name, value in a["buffers"].items():
        assert torch.equal(value, b["buffers"][name])


@pytest.mark.parametrize("fails", [False, True])
def test_the_model_is_left_as_it_was_found(
    model: nn.Module, executor: ReferenceExecutor, fails: bool
) -> None:
    model.train()
    model.lm_head.eval()
    calls: list[int] = []
    mine = model.lm_head.register_forward_hook(lambda *_: calls.append(1))
    before = snapshot(model)
    edit = Edit(Site("block_output", 1, (2,)), Vanilla(), Run(OTHER))
    if fails:
        bad = Edit(Site("block_output", 1, (77,)), Zero())
        with pytest.raises(IndexError):
            executor.logits([Run(IDS, (edit, bad))], 1)
    else:
        executor.logits([Run(IDS, (edit,))], 1)
    same(before, snapshot(model))
    assert calls, "the user's hook did not run"
    mine.remove()


def test_dropout_is_off_while_it_runs(gpt2_folder: Path) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(gpt2_folder)
    model.train()
    executor = ReferenceExecutor(model, BY_MODEL_TYPE["gpt2"])
    assert torch.equal(executor.logits([Run(IDS)], 1), executor.logits([Run(IDS)], 1))
