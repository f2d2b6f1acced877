"""What is true of any right implementation of interventions, by the engine's executors.

The parts of the list that compare with plain hooks are in `test_matrix.py`, `test_reference.py`
and `test_suffix.py`; those of interventions by themselves in `test_interventions.py` and
`test_registry.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor, nn

from interv.engine import (
    Addition,
    BaseLambda,
    Collect,
    Constant,
    Edit,
    Executor,
    Intervention,
    Lambda,
    ReferenceExecutor,
    Replace,
    Run,
    Site,
    Subtraction,
    SuffixExecutor,
    Vanilla,
    Zero,
    anatomy_of,
)
from tests import raw_swap, zoo

CLOSE = 1e-10  # in float64
NEAR = 1e-5  # GPT-J and GPT-Neo attend in float32 whatever the model's numbers
BASE, SOURCE, THIRD = (tuple(zoo.ids(i)) for i in range(3))
ALL = tuple(range(len(BASE)))
SITES = [
    Site("block_input", 1, (2, 5)),
    Site("block_output", 2, (6,)),
    Site("mlp_output", 0),
    Site("mlp_activation", 1, (4,), None, (1, 3, 8)),
    Site("attention_input", 1, (1, 3, 6)),
    Site("attention_output", 2, (3, 6)),
    Site("head_attention_value_output", 1, (3, 4), (0, 3)),
    Site("head_query_output", 1, (5,), (2,)),
    Site("head_key_output", 1, (1, 3), (1,)),  # what all keys get alike, the softmax takes out
    Site("head_value_output", 0, (2,), (0, 1), (0, 5)),
    Site("resid_mid", 1, (5,)),
    Site("final_norm", 0, (6,)),
]
"""Sites whose effect reaches the last position, in every sort of place; (6,) is the last one."""


@pytest.fixture(params=["reference", "suffix"])
def make_executor(request: pytest.FixtureRequest) -> Callable[[nn.Module], Executor]:
    def make(model: nn.Module) -> Executor:
        if request.param == "reference":
            return ReferenceExecutor(model, anatomy_of(model))
        return SuffixExecutor(model, anatomy_of(model), 256)

    return make


@pytest.fixture(params=["gpt2", "llama"])
def executor(
    request: pytest.FixtureRequest, make_executor: Callable[[nn.Module], Executor]
) -> Executor:
    return make_executor(zoo.make(request.param))


def once(site: Site, intervention: Intervention, source: Run | None = None) -> Run:
    return Run(BASE, (Edit(site, intervention, source),))


def same(executor: Executor, runs: Sequence[Run], others: Sequence[Run]) -> None:
    """Two lists of runs give the same, and not what no intervention gives."""
    found, wanted = executor.logits(runs, None), executor.logits(others, None)
    assert float((found - wanted).abs().max()) <= CLOSE
    [plain] = executor.logits([Run(BASE)], None)
    effects = (wanted - plain).abs().amax((1, 2))
    assert float(effects.min()) > 1e-4, "an intervention does nothing"


def vector(executor: Executor, site: Site, n: int | None = None) -> Tensor:
    """A vector as wide as the site, or one for each of its positions."""
    [[state]] = executor.states([Run(BASE)], [site])
    generator = torch.Generator().manual_seed(0)
    shape = (state.shape[1],) if n is None else tuple(state.shape)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def test_zero_is_a_function_that_gives_zero(executor: Executor) -> None:
    same(
        executor,
        [once(site, Zero()) for site in SITES],
        [once(site, BaseLambda(lambda b: b * 0)) for site in SITES],
    )


def test_adding_is_subtracting_the_opposite(executor: Executor) -> None:
    vectors = [vector(executor, site) for site in SITES]
    pairs = list(zip(SITES, vectors, strict=True))
    same(
        executor,
        [once(site, Constant(Addition(), v)) for site, v in pairs],
        [once(site, Constant(Subtraction(), -v)) for site, v in pairs],
    )


@pytest.mark.parametrize("kind", [Vanilla(), Addition(), Subtraction(), Lambda(torch.maximum)])
def test_a_constant_source_is_the_same_source_at_run_time(
    executor: Executor, kind: Intervention
) -> None:
    states = [found[0] for found in executor.states([Run(SOURCE)], SITES)]
    same(
        executor,
        [once(s, Constant(kind, v)) for s, v in zip(SITES, states, strict=True)],
        [once(s, kind, Run(SOURCE)) for s in SITES],
    )


def test_a_saved_state_is_its_run(executor: Executor) -> None:
    states = [found[0] for found in executor.states([Run(SOURCE)], SITES)]
    same(
        executor,
        [once(s, Replace(v)) for s, v in zip(SITES, states, strict=True)],
        [once(s, Vanilla(), Run(SOURCE)) for s in SITES],
    )


@pytest.mark.parametrize("name", ["gpt2", "llama", "olmo2", "bloom", "gpt_neox", "mamba", "bert"])
def test_what_is_collected_is_what_a_hook_sees(
    make_executor: Callable[[nn.Module], Executor], name: str
) -> None:
    """Every component, the layers in the middle, patterns apart (their hooks are of another
    sort); and collecting changes nothing."""
    model = zoo.make(name)
    executor = make_executor(model)
    components = [c for c in raw_swap.components(name) if c != "attention_weight"]
    sites = [Site(c, 1 if raw_swap.has_layer(c) else 0) for c in components]
    states = executor.states([Run(BASE)], sites)
    for site, [state] in zip(sites, states, strict=True):
        rows = raw_swap.capture(model, name, site.component, site.layer, BASE)
        assert float((state - rows.flatten(1)).abs().max()) <= CLOSE, site
    collecting = Run(BASE, tuple(Edit(site, Collect()) for site in sites))
    with torch.no_grad():
        plain = model(input_ids=torch.tensor([BASE])).logits
    assert float((executor.logits([collecting], None) - plain).abs().max()) <= CLOSE


def test_two_hops_have_their_effect_from_the_last_position_on(executor: Executor) -> None:
    """Third → source at an early position, source → base at a late one: what stands before
    that in the base is as it was."""
    hop = Run(SOURCE, (Edit(Site("block_output", 0, (1,)), Vanilla(), Run(THIRD)),))
    for place in (6, 4):
        run = once(Site("block_output", 1, (place,)), Vanilla(), hop)
        direct = once(Site("block_output", 1, (place,)), Vanilla(), Run(SOURCE))
        two, one, plain = executor.logits([run, direct, Run(BASE)], None)
        assert float((two - plain)[:place].abs().max()) <= CLOSE
        assert float((two - plain)[place].abs().max()) > 1e-4
        assert float((two - one)[place].abs().max()) > 1e-4, "the first hop does nothing"
        assert float((two - one)[:place].abs().max()) <= CLOSE
        # The source's state, as the first hop left it, put there as a number.
        [[state]] = executor.states([hop], [Site("block_output", 1, (place,))])
        same(executor, [once(Site("block_output", 1, (place,)), Replace(state))], [run])


FUSED = ["gpt2", "gpt_neox", "phi3", "falcon", "falcon_mq", "falcon_alibi", "bloom"]


@pytest.mark.parametrize("name", FUSED)
def test_heads_of_a_fused_projection_come_apart_and_together(
    make_executor: Callable[[nn.Module], Executor], name: str
) -> None:
    """Gathered and put back, nothing changes; the columns of all heads are the projection's,
    each once; put back in another order, a head has what the other had."""
    model = zoo.make(name)
    anatomy = anatomy_of(model)
    executor = make_executor(model)
    words = ("head_query_output", "head_key_output", "head_value_output")
    own = [Site(word, 1) for word in words]
    [path] = {anatomy.place(word, 1).path for word in words}
    [fused] = executor.states([Run(BASE)], [Site(f"{path}.output")])[0]
    states = [found[0] for found in executor.states([Run(BASE)], own)]
    columns = [anatomy.columns(word, None, None) or () for word in words]
    assert sorted(c for some in columns for c in some) == list(range(fused.shape[1]))
    for state, some in zip(states, columns, strict=True):
        assert torch.equal(state, fused[:, list(some)])
    back = tuple(Edit(s, Replace(v)) for s, v in zip(own, states, strict=True))
    [found], [plain] = (executor.logits(runs, None) for runs in ([Run(BASE, back)], [Run(BASE)]))
    assert float((found - plain).abs().max()) <= CLOSE
    for word in words:
        count = anatomy.n_units(word) or 0
        order = tuple(reversed(range(count)))
        turned = Edit(Site(word, 1), Vanilla(), Run(SOURCE), Site(word, 1, None, order))
        [[state]] = executor.states([Run(BASE, (turned,))], [Site(word, 1)])
        rows = raw_swap.capture(model, name, word, 1, SOURCE)
        assert float((state - rows[:, list(order)].flatten(1)).abs().max()) <= CLOSE
        wanted = raw_swap.swapped_logits(model, name, word, 1, BASE, rows[:, list(order)], ALL)
        [found] = executor.logits([Run(BASE, (turned,))], None)
        assert float((found - wanted).abs().max()) <= CLOSE
        assert float((found - plain).abs().max()) > 1e-4


def test_all_positions_of_some_heads_are_those_heads(executor: Executor) -> None:
    sites = [site for site in SITES if site.component.startswith("head_")]
    same(
        executor,
        [
            once(Site(s.component, s.layer, ALL, s.heads, s.dims), Vanilla(), Run(SOURCE))
            for s in sites
        ],
        [
            once(Site(s.component, s.layer, None, s.heads, s.dims), Vanilla(), Run(SOURCE))
            for s in sites
        ],
    )


def prompts_of_many_lengths() -> list[Run]:
    """Runs of 5 to 12 tokens: plain, with one edit, with several."""
    runs = []
    for i, length in enumerate((5, 12, 7, 9, 7, 5)):
        ids, other = (tuple(zoo.ids(k, length=length)) for k in (i, i + 6))
        edits = tuple(
            Edit(Site(component, layer, at), Vanilla(), Run(other))
            for component, layer, at in (
                ("block_output", 0, (length - 3,)),
                ("mlp_output", 1, (1, length - 1)),
                ("attention_weight", 2, (length - 1,)),
            )[: i % 4]
        )
        runs.append(Run(ids, edits))
    return runs


@pytest.mark.parametrize("name", ["gpt2", "llama", "mistral", "gemma2", "falcon", "mamba"])
def test_prompts_of_several_lengths_are_as_each_by_itself(
    make_executor: Callable[[nn.Module], Executor], name: str
) -> None:
    """There is no padding to get wrong: sides, masks, position ids."""
    model = zoo.make(name)
    has = anatomy_of(model).components
    runs = [
        Run(run.ids, tuple(edit for edit in run.edits if edit.site.component in has))
        for run in prompts_of_many_lengths()
    ]
    together = make_executor(model).logits(runs, (-1, -4))
    for run, found in zip(runs, together, strict=True):
        [alone] = make_executor(model).logits([run], (-1, -4))
        # transformers takes Gemma 2's softmax in float32, whatever the model's dtype.
        close = 5e-6 if name == "gemma2" else CLOSE
        assert float((found - alone).abs().max()) <= close
        if not run.edits:
            with torch.no_grad():
                plain = model(input_ids=torch.tensor([run.ids])).logits[0, [-1, -4]]
            assert float((found - plain).abs().max()) <= CLOSE


def test_the_order_of_prompts_does_not_matter(executor: Executor) -> None:
    runs = prompts_of_many_lengths()
    order = [4, 2, 0, 5, 3, 1]
    first = executor.logits(runs)
    executor.forget()
    turned = executor.logits([runs[i] for i in order])
    assert float((turned - first[order]).abs().max()) <= CLOSE
    # Nor whether a run is there twice, or what has been asked before.
    again = executor.logits([runs[3], runs[3], runs[1]])
    assert float((again - first[[3, 3, 1]]).abs().max()) <= CLOSE


@pytest.mark.parametrize("name", ["llama", "gptj", "gpt_neo", "bloom", "falcon", "mamba", "bert"])
def test_what_is_held_before_the_first_change_changes_nothing(
    make_executor: Callable[[nn.Module], Executor], name: str
) -> None:
    """As in path patching and severing: components held at what they are anyway, in layers
    before and after the one that is changed."""
    executor = make_executor(zoo.make(name))
    held = "mixer_output" if name == "mamba" else "attention_output"
    change = Edit(Site("block_output", 1, (3,)), Vanilla(), Run(SOURCE))
    early = Edit(Site(held, 0, (3,)), Vanilla(), Run(BASE))
    late = Edit(Site(held, 2, (4,)), Vanilla(), Run(BASE))
    both, only, early_only, plain = executor.logits(
        [Run(BASE, (early, change)), Run(BASE, (change,)), Run(BASE, (early,)), Run(BASE)], None
    )
    assert float((both - only).abs().max()) <= NEAR
    assert float((only - plain).abs().max()) > 1e-3
    assert float((early_only - plain).abs().max()) <= NEAR
    # Held behind the change it does something, whether the early one is there or not.
    one, other = executor.logits(
        [Run(BASE, (early, change, late)), Run(BASE, (change, late))], None
    )
    assert float((one - other).abs().max()) <= NEAR
    assert float((one - only).abs().max()) > 1e-3
