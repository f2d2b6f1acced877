"""The reference executor against plain hooks, formulas and `raw_swap`, apart from the engine."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator
from functools import cache
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

from interv.engine import (
    Addition,
    BaseLambda,
    BoundlessRotatedSpace,
    Clamp,
    Collect,
    Constant,
    Edit,
    Executor,
    Inputs,
    Intervention,
    Lambda,
    LowRankRotatedSpace,
    Mean,
    Noise,
    ProjectOut,
    ReferenceExecutor,
    Replace,
    RotatedSpace,
    Run,
    Scale,
    SigmoidMask,
    SigmoidMaskRotatedSpace,
    Site,
    Skip,
    Subtraction,
    SuffixExecutor,
    Vanilla,
    Zero,
    anatomy_of,
)
from interv.engine.masks import Boundary, Mask
from interv.engine.rotations import Rotation
from interv.errors import EngineError
from tests import raw_swap, zoo

IDS = (5, 9, 17, 3, 40, 8)
OTHER = (5, 9, 21, 3, 40, 8)
THIRD = (11, 2, 33, 4, 57, 6)
N = len(IDS)


@cache
def made(name: str) -> nn.Module:
    """A model that no test changes."""
    return zoo.make(name)


def reference(name: str) -> ReferenceExecutor:
    return ReferenceExecutor(made(name), anatomy_of(made(name)))


@pytest.fixture(params=["gpt2", "llama"])
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def model(name: str) -> nn.Module:
    return made(name)


@pytest.fixture
def executor(name: str) -> ReferenceExecutor:
    return reference(name)


EXECUTORS: dict[str, Callable[..., Executor]] = {
    "reference": ReferenceExecutor,
    "suffix": SuffixExecutor,
}


@pytest.fixture(params=EXECUTORS)
def either(request: pytest.FixtureRequest, name: str) -> Executor:
    """One executor and then the other."""
    return EXECUTORS[request.param](made(name), anatomy_of(made(name)))


def forward(model: nn.Module, ids: tuple[int, ...] = IDS) -> Tensor:
    """Logits `[pos, vocab]`."""
    with torch.no_grad():
        logits: Tensor = model(torch.tensor([ids])).logits[0]
    return logits


def close(a: Tensor, b: Tensor, near: float = 1e-12) -> None:
    assert a.shape == b.shape
    assert float((a - b).abs().max()) <= near * float(b.abs().max())


def apart(a: Tensor, b: Tensor) -> None:
    far = float((a - b).abs().max() / b.abs().max())
    assert far > 1e-3, "no effect: nothing is tested"


def one(executor: Executor, *edits: Edit, ids: tuple[int, ...] = IDS) -> Tensor:
    """Logits `[pos, vocab]` of one run."""
    return executor.logits([Run(ids, edits)], None)[0]


def swap(site: Site, source: tuple[int, ...] = OTHER, read: Site | None = None) -> Edit:
    return Edit(site, Vanilla(), Run(source), read)


def by_hand(
    model: nn.Module,
    path: str,
    side: str,
    change: Callable[[Tensor], Tensor | None],
    ids: tuple[int, ...] = IDS,
) -> Tensor:
    """Logits of one forward; `change` gets a clone of `[1, pos, width]`, which it may return."""

    def after(_module: nn.Module, _args: object, output: object) -> object:
        first = output[0] if isinstance(output, tuple) else output
        assert isinstance(first, Tensor)
        new = change(first.clone())
        if new is None:
            return None
        return (new, *output[1:]) if isinstance(output, tuple) else new

    def before(_module: nn.Module, args: tuple[Tensor, ...]) -> object:
        new = change(args[0].clone())
        return None if new is None else (new, *args[1:])

    module = model.get_submodule(path)
    handle = (
        module.register_forward_hook(after)
        if side == "output"
        else module.register_forward_pre_hook(before)
    )
    try:
        return forward(model, ids)
    finally:
        handle.remove()


BLOCKS = {"gpt2": "transformer.h", "llama": "model.layers"}


# Forwards without edits.


def test_no_intervention_is_a_plain_forward(model: nn.Module, either: Executor) -> None:
    logits = either.logits([Run(IDS)], None)
    assert logits.shape == (1, N, zoo.VOCAB)
    close(logits[0], forward(model))


@pytest.mark.parametrize("at", [(-1,), (0,), (-2, 1), (5, -6, 3), (2, 2), (-1, N - 1)])
def test_at_counts_from_both_ends(model: nn.Module, either: Executor, at: tuple[int, ...]) -> None:
    edit = swap(Site("mlp_output", 1, (1,)))
    runs = [Run(IDS), Run(IDS, (edit,)), Run(OTHER)]
    got = either.logits(runs, at)
    assert got.shape == (3, len(at), zoo.VOCAB)
    close(got, either.logits(runs, None)[:, list(at)])
    close(got[0], forward(model)[list(at)])


@pytest.mark.parametrize("at", [(6,), (-7,), (0, 99)])
def test_at_where_there_is_nothing_is_an_error(either: Executor, at: tuple[int, ...]) -> None:
    with pytest.raises(EngineError, match=r"positions .* of a run of 6 tokens"):
        either.logits([Run(IDS)], at)


def test_tokens_are_columns_of_the_logits(model: nn.Module, either: Executor) -> None:
    got = either.logits([Run(IDS), Run(OTHER)], (-1, 2), (7, 0, 99))
    assert got.shape == (2, 2, 3)
    close(got[0], forward(model)[[-1, 2]][:, [7, 0, 99]])
    close(got[1], forward(model, OTHER)[[-1, 2]][:, [7, 0, 99]])


def test_runs_of_any_length_in_any_order(model: nn.Module, either: Executor) -> None:
    prompts = [IDS, IDS[:2], OTHER, IDS[:4], THIRD[:2], (3,)]
    runs = [Run(ids, (Edit(Site("mlp_output", 1, (0,)), Scale(1.0)),)) for ids in prompts]
    got = either.logits(runs)
    assert got.shape == (len(runs), 1, zoo.VOCAB)
    for logits, ids in zip(got, prompts, strict=True):
        close(logits[0], forward(model, ids)[-1])


def test_all_positions_of_runs_of_different_length_is_an_error(either: Executor) -> None:
    with pytest.raises(EngineError, match="length"):
        either.logits([Run(IDS), Run(IDS[:3])], None)


# What is read.


@pytest.mark.parametrize("family", ["gpt2", "llama", "bloom", "olmo2", "phi3", "mamba", "bert"])
def test_collect_is_the_raw_hook_output(family: str) -> None:
    executor = reference(family)
    for component in executor.sites.anatomy.components:
        layer = 1 if raw_swap.has_layer(component) else 0
        right = raw_swap.capture(made(family), family, component, layer, IDS)
        if component == "attention_weight":
            right = right.transpose(0, 1)
        [[got]] = executor.states([Run(IDS)], [Site(component, layer, (4, 0, 2))])
        close(got, right.flatten(1)[[4, 0, 2]])
        [[got]] = executor.states([Run(IDS)], [Site(component, layer)])
        close(got, right.flatten(1))
        if raw_swap.head_count(family, component):
            [[got]] = executor.states([Run(IDS)], [Site(component, layer, (1,), (1,))])
            close(got, right[[1], 1])
            if component != "attention_weight":
                [[got]] = executor.states([Run(IDS)], [Site(component, layer, (1,), (1,), (3, 0))])
                close(got, right[[1], 1][:, [3, 0]])


def test_states_are_by_site_and_by_run(either: Executor) -> None:
    sites = [Site("mlp_output", 0, (1, 2)), Site("block_output", 2)]
    found = either.states([Run(IDS), Run(OTHER), Run(IDS[:3])], sites)
    assert [[tuple(state.shape) for state in of_site] for of_site in found] == [
        [(2, 48), (2, 48), (2, 48)],
        [(6, 48), (6, 48), (3, 48)],
    ]
    close(found[0][0], found[0][2])  # the same tokens so far


def test_states_are_those_after_the_runs_own_edits(name: str, either: Executor) -> None:
    site = Site("mlp_output", 1, (2,))
    run = Run(IDS, (swap(site),))
    source = raw_swap.capture(made(name), name, "mlp_output", 1, OTHER)
    plain = raw_swap.capture(made(name), name, "mlp_output", 1, IDS)
    [[got]] = either.states([run], [Site("mlp_output", 1)])
    close(got[2], source[2])
    close(got[[0, 1, 3, 4, 5]], plain[[0, 1, 3, 4, 5]])
    [middle], [after] = either.states([run], [Site("resid_mid", 1), Site("block_output", 1)])
    close(after[2], middle[2] + source[2])


# What is done.


def formulas(width: int, source: Tensor, given: Tensor) -> list[tuple[Intervention, Callable]]:
    """Each type, and what it makes of the base `[2, width]`, written out."""
    numbers = torch.Generator().manual_seed(3)
    value = torch.randn(width, generator=numbers, dtype=torch.float64)
    values = torch.randn(2, width, generator=numbers, dtype=torch.float64)
    noise = Noise(0.5, 7, 2)
    return [
        (Vanilla(), lambda _b: source),
        (Zero(), lambda b: b * 0),
        (Collect(), lambda b: b),
        (Addition(), lambda b: b + source),
        (Subtraction(), lambda b: b - source),
        (Scale(-2.0), lambda b: -2 * b),
        (Clamp(-0.1, 0.2), lambda b: torch.minimum(torch.maximum(b, b * 0 - 0.1), b * 0 + 0.2)),
        (Mean(value), lambda _b: value.expand(2, -1)),
        (Replace(values), lambda _b: values),
        (Constant(Addition(), values), lambda b: b + values),
        (ProjectOut(value), lambda b: b - torch.outer(b @ value, value) / (value @ value)),
        (Lambda(lambda b, s: 2 * b - s), lambda b: 2 * b - source),
        (BaseLambda(lambda b: b.flip(-2)), lambda b: b[[1, 0]]),
        (noise, lambda b: noise.apply(b, None)),
        (Skip(), lambda _b: given),
    ]


@pytest.mark.parametrize(
    "component",
    ["block_output", "mlp_output", "attention_output", "mlp_activation", "resid_mid", "mlp_input"],
)
def test_each_type_does_what_its_formula_says(
    name: str, model: nn.Module, either: Executor, component: str
) -> None:
    def seen(which: str, ids: tuple[int, ...] = IDS) -> Tensor:
        return raw_swap.capture(model, name, which, 1, ids)[[1, 3]]

    base, source = seen(component), seen(component, OTHER)
    # A module's input; what is itself an input is passed on by a skip.
    inputs = {"block_output": "block_input", "mlp_output": "mlp_input"}
    given = seen(inputs.get(component, component))
    if component == "attention_output":
        given = seen("attention_input")
    for intervention, formula in formulas(base.shape[1], source, given):
        new = raw_swap.capture(model, name, component, 1, IDS).clone()
        new[[1, 3]] = formula(base)
        right = raw_swap.swapped_logits(model, name, component, 1, IDS, new, (1, 3))
        run = Run(OTHER) if intervention.needs_source else None
        got = one(either, Edit(Site(component, 1, (1, 3)), intervention, run))
        close(got, right)


def test_every_type_that_takes_a_source_leaves_a_run_its_own(either: Executor) -> None:
    """A self-swap is the identity, in rotated spaces and behind masks too."""
    plain = one(either)
    edits = 0
    for component, width in (("block_output", 48), ("mlp_output", 48), ("head_query_output", 12)):
        rotation = Rotation.seeded(width, width, 0).double()
        types = [
            Vanilla(),
            Lambda(lambda _b, s: s),
            RotatedSpace(rotation, (0, 3, 5)),
            LowRankRotatedSpace(Rotation.seeded(width, 4, 1).double()),
            BoundlessRotatedSpace(rotation, Boundary(width)),
            SigmoidMask(Mask(width)),
            SigmoidMaskRotatedSpace(rotation, Mask(width)),
        ]
        heads = (1,) if component.startswith("head") else None
        for intervention, positions in itertools.product(types, ((1, 4), None)):
            for layer in (0, 2):
                edit = Edit(Site(component, layer, positions, heads), intervention, Run(IDS))
                close(one(either, edit), plain, 1e-6)
                edits += 1
    assert edits == 3 * 7 * 2 * 2


def test_edits_at_one_site_happen_in_order(either: Executor) -> None:
    site = Site("block_output", 1, (3,))
    swapped = one(either, swap(site))
    apart(swapped, one(either))
    close(one(either, Edit(site, Zero()), Edit(site, Addition(), Run(OTHER))), swapped)
    close(one(either, swap(site), Edit(site, Scale(3.0)), Edit(site, Scale(1 / 3))), swapped)
    close(one(either, Edit(site, Scale(5.0)), swap(site)), swapped)
    close(one(either, swap(site), Edit(site, Zero())), one(either, Edit(site, Zero())))


def test_a_skip_takes_its_turn_too(either: Executor) -> None:
    site = Site("block_output", 1, (3,))
    skipped = one(either, Edit(site, Skip()))
    apart(skipped, one(either, Edit(site, Zero())))
    close(one(either, Edit(site, Zero()), Edit(site, Skip())), skipped)
    close(one(either, Edit(site, Skip()), Edit(site, Zero())), one(either, Edit(site, Zero())))


def test_the_same_edit_twice_happens_twice(either: Executor) -> None:
    for component in ("block_output", "token_embedding", "mlp_output"):
        layer = 0 if component == "token_embedding" else 1
        site = Site(component, layer, (3,))
        twice = one(either, Edit(site, Scale(2.0)), Edit(site, Scale(2.0)))
        close(twice, one(either, Edit(site, Scale(4.0))))
        apart(twice, one(either, Edit(site, Scale(2.0))))


def test_rows_in_one_forward_do_not_meet(model: nn.Module, either: Executor) -> None:
    runs = [Run(IDS, (swap(Site("mlp_output", 1, (p,))),)) for p in range(N)]
    runs += [Run(IDS), Run(OTHER), Run(IDS, (Edit(Site("token_embedding", 0, (1,)), Zero()),))]
    runs += [Run(IDS, (Edit(Site("mlp_output", 1, (p,)), Zero()),)) for p in range(N)]
    together = either.logits(runs, (-2, -1))
    either.forget()
    for row, run in enumerate(runs):
        close(together[row], either.logits([run], (-2, -1))[0])
        either.forget()
    close(together[6], forward(model)[-2:])


def test_a_source_may_itself_be_edited(name: str, model: nn.Module, either: Executor) -> None:
    """Serial: OTHER's block_output 0 goes into IDS, whose block_output 1 then goes into THIRD."""
    block = BLOCKS[name]
    first = raw_swap.capture(model, name, "block_output", 0, OTHER)
    kept: list[Tensor] = []

    def put(position: int, row: Tensor) -> Callable[[Tensor], Tensor]:
        def change(value: Tensor) -> Tensor:
            value[0, position] = row
            return value

        return change

    def keep(_module: nn.Module, _args: object, output: object) -> None:
        value = output[0] if isinstance(output, tuple) else output
        assert isinstance(value, Tensor)
        kept.append(value.reshape(N, -1).clone())

    hook = model.get_submodule(f"{block}.1").register_forward_hook(keep)
    by_hand(model, f"{block}.0", "output", put(2, first[2]))
    hook.remove()
    right = by_hand(model, f"{block}.1", "output", put(5, kept[0][5]), THIRD)
    inner = Run(IDS, (swap(Site("block_output", 0, (2,))),))
    outer = Edit(Site("block_output", 1, (5,)), Vanilla(), inner)
    close(one(either, outer, ids=THIRD), right)
    apart(right, forward(model, THIRD))


def test_sources_of_sources(either: Executor) -> None:
    """A hold against what came before it: serial edits end where they began."""
    site = Site("block_output", 0, (2,))
    moved = Run(IDS, (swap(site),))
    back = Edit(site, Vanilla(), Run(IDS))
    close(one(either, swap(site), back), one(either))
    # The middle of a chain reads at an earlier layer than its own edit changed.
    for read, right in (("mlp_output", one(either)), ("token_embedding", one(either))):
        layer = 0
        same = Edit(Site(read, layer, (2,)), Vanilla(), moved)
        close(one(either, same), right)


def test_read_takes_from_another_place(name: str, model: nn.Module, either: Executor) -> None:
    cases = [
        (Site("block_output", 1, (2,)), Site("block_output", 0, (4,))),
        (Site("block_output", 0, (5, 1)), Site("block_output", 2, (0, 3))),
        (Site("mlp_output", 2, (5,)), Site("attention_output", 0, (1,))),
        (Site("block_output", 1), Site("resid_mid", 2)),
        (Site("block_input", 0, (1, 2)), Site("final_norm", 0, (5, 0))),
    ]
    for site, read in cases:
        source = raw_swap.capture(model, name, read.component, read.layer, OTHER)
        right = raw_swap.swapped_logits(
            model,
            name,
            site.component,
            site.layer,
            IDS,
            source,
            site.positions or range(N),
            source_positions=read.positions or range(N),
        )
        apart(right, forward(model))
        close(one(either, swap(site, OTHER, read)), right)


def test_read_may_lie_beyond_the_base(name: str, model: nn.Module, either: Executor) -> None:
    longer = (*OTHER, 50, 61, 72)
    source = raw_swap.capture(model, name, "mlp_output", 1, longer)
    right = raw_swap.swapped_logits(
        model, name, "mlp_output", 1, IDS, source, (1, 3), source_positions=(8, 6)
    )
    edit = swap(Site("mlp_output", 1, (1, 3)), longer, Site("mlp_output", 1, (8, 6)))
    close(one(either, edit), right)


def test_read_may_be_of_other_heads(name: str, model: nn.Module, either: Executor) -> None:
    source = raw_swap.capture(model, name, "head_query_output", 1, OTHER)
    turned = source[:, [2, 3, 0, 1]]
    right = raw_swap.swapped_logits(
        model, name, "head_query_output", 1, IDS, turned, (4,), heads=[0]
    )
    site, read = Site("head_query_output", 1, (4,), (0,)), Site("head_query_output", 1, (4,), (2,))
    close(one(either, swap(site, OTHER, read)), right)


# Heads, dims, subspaces.


def test_a_subspace_is_columns(name: str, model: nn.Module, either: Executor) -> None:
    """Of the partition [[0, 6], [6, 24]] part 0 is dimensions 0 to 5, part 1 the next 18."""
    base = raw_swap.capture(model, name, "mlp_output", 1, IDS)
    source = raw_swap.capture(model, name, "mlp_output", 1, OTHER)
    for begin, end in ([0, 6], [6, 24]):
        mixed = base.clone()
        mixed[:, begin:end] = source[:, begin:end]
        right = raw_swap.swapped_logits(model, name, "mlp_output", 1, IDS, mixed, (2, 4))
        site = Site("mlp_output", 1, (2, 4), None, tuple(range(begin, end)))
        apart(right, forward(model))
        close(one(either, swap(site)), right)


@pytest.mark.parametrize("family", ["gpt2", "llama", "phi3", "gpt_neox", "bloom", "falcon"])
@pytest.mark.parametrize("part", ["query", "key", "value", "attention_value"])
def test_dims_of_heads_are_columns_of_each_head(family: str, part: str) -> None:
    """Fused projections too, whose columns stand among the others'."""
    component, model = f"head_{part}_output", made(family)
    base = raw_swap.capture(model, family, component, 1, IDS)
    source = raw_swap.capture(model, family, component, 1, OTHER)
    heads, dims = (1, 0), (7, 2, 3)
    mixed = base.clone()
    for head in heads:
        mixed[:, head, list(dims)] = source[:, head, list(dims)]
    right = raw_swap.swapped_logits(model, family, component, 1, IDS, mixed, (3, 5))
    apart(right, forward(model))
    for executor in (reference(family), SuffixExecutor(model, anatomy_of(model))):
        close(one(executor, swap(Site(component, 1, (3, 5), heads, dims))), right)
        # The same of the component as a whole, which counts columns head after head.
        whole = component.removeprefix("head_")
        width = base.shape[2]
        flat = tuple(h * width + d for h in heads for d in dims)
        close(one(executor, swap(Site(whole, 1, (3, 5), None, flat))), right)
        close(one(executor, swap(Site(whole, 1, (3, 5), heads, dims))), right)


def test_parts_make_the_whole(either: Executor) -> None:
    """All positions and no positions, all heads and no heads, all dims and no dims: the same."""
    every = tuple(range(N))
    for component, heads, dims in (
        ("block_output", None, tuple(range(48))),
        ("head_query_output", (0, 1, 2, 3), tuple(range(12))),
        ("head_key_output", (0, 1), None),
        ("attention_weight", (0, 1, 2, 3), None),
    ):
        whole = one(either, swap(Site(component, 1)))
        apart(whole, one(either))
        if component != "head_key_output":
            close(one(either, swap(Site(component, 1, None, heads, dims))), whole)
        close(one(either, swap(Site(component, 1, every))), whole)
        each = [swap(Site(component, 1, (p,))) for p in reversed(every)]
        close(one(either, *each), whole)


# Attention patterns.


@pytest.mark.parametrize("head", [0, 3])
def test_a_head_without_its_pattern_gives_nothing(
    name: str, model: nn.Module, either: Executor, head: int
) -> None:
    zeroed = one(either, Edit(Site("attention_weight", 1, None, (head,)), Zero()))
    given = raw_swap.capture(model, name, "head_attention_value_output", 1, IDS).clone()
    given[:, head] = 0
    right = raw_swap.swapped_logits(
        model, name, "head_attention_value_output", 1, IDS, given, range(N), heads=[head]
    )
    apart(right, forward(model))
    close(zeroed, right)


def test_a_pattern_may_be_put_on_one_key(name: str, model: nn.Module, either: Executor) -> None:
    """Each query of two heads looks at position 0 alone."""

    def first(pattern: Tensor) -> Tensor:
        new = torch.zeros_like(pattern).unflatten(-1, (2, N))
        new[..., 0] = 1
        return new.flatten(-2)

    edit = Edit(Site("attention_weight", 2, (3, 5), (1, 2)), BaseLambda(first))
    own = raw_swap.capture(model, name, "head_attention_value_output", 2, IDS).clone()
    value = raw_swap.capture(model, name, "head_value_output", 2, IDS)
    share = own.shape[1] // value.shape[1]
    for head in (1, 2):
        own[[3, 5], head] = value[0, head // share]
    right = raw_swap.swapped_logits(
        model, name, "head_attention_value_output", 2, IDS, own, (3, 5), heads=(1, 2)
    )
    apart(right, forward(model))
    close(one(either, edit), right)


def test_patterns_sum_to_one_and_look_left(executor: ReferenceExecutor) -> None:
    [[pattern]] = executor.states([Run(IDS)], [Site("attention_weight", 0)])
    pattern = pattern.reshape(N, 4, N)
    close(pattern.sum(-1), torch.ones(N, 4, dtype=torch.float64))
    assert not pattern.transpose(0, 1).triu(1).any()


def test_a_shorter_sources_pattern_leaves_the_other_keys_alone(either: Executor) -> None:
    short = OTHER[:3]
    edit = swap(Site("attention_weight", 0, (2,)), short)
    close(one(either, edit), one(either, swap(Site("attention_weight", 0, (2,)), OTHER)))
    # The last query of a longer one looks at keys that are not there.
    beyond = swap(Site("attention_weight", 0, (2,)), THIRD, Site("attention_weight", 0, (5,)))
    with pytest.raises(EngineError, match="the source looks at 6 keys, the run has 3"):
        one(either, beyond, ids=short)


@pytest.mark.parametrize("family", ["gpt_neo", "gptj", "falcon", "bloom", "mamba"])
def test_patterns_are_refused_where_they_cannot_be_changed(family: str) -> None:
    with pytest.raises(EngineError, match="models have no component 'attention_weight'"):
        one(reference(family), Edit(Site("attention_weight", 0, (1,)), Zero()))


@pytest.mark.parametrize(
    ("site", "message"),
    [
        (Site("attention_weight", 1, (2,), None, (0,)), "attention_weight has no dimensions"),
        (Site("attention_weight", 1, (2,), (4,)), "attention_weight: head 4: there are 4"),
        (Site("attention_weight", 1, (6,)), "attention_weight: position 6 of 6"),
        (Site("attention_weight", 3, (2,)), "attention_weight: no layer 3, there are 3"),
    ],
)
def test_a_pattern_that_is_not_there_is_an_error(
    either: Executor, site: Site, message: str
) -> None:
    with pytest.raises(EngineError, match=message):
        one(either, Edit(site, Zero()))
    with pytest.raises(EngineError, match=message):
        either.states([Run(IDS)], [site])


# The stream between attention and MLP; what follows the blocks.


def test_resid_mid_is_the_stream_itself(name: str, model: nn.Module, either: Executor) -> None:
    """Not only what the MLP's norm reads: what goes round the MLP changes too."""

    def state(component: str, ids: tuple[int, ...] = IDS) -> Tensor:
        return raw_swap.capture(model, name, component, 1, ids)

    middle = state("block_input") + state("attention_output")
    [[got]] = either.states([Run(IDS)], [Site("resid_mid", 1)])
    close(got, middle)
    run = Run(IDS, (swap(Site("resid_mid", 1, (3,))),))
    [out], [mlp] = either.states([run], [Site("block_output", 1), Site("mlp_output", 1)])
    source = state("block_input", OTHER) + state("attention_output", OTHER)
    close(out[3], source[3] + mlp[3])
    close(mlp[3], state("mlp_output", OTHER)[3])
    # All of it: the block's output is then the source's.
    everywhere = one(either, swap(Site("resid_mid", 1)))
    close(everywhere, one(either, swap(Site("block_output", 1))))


@pytest.mark.parametrize("family", ["llama", "olmo2", "gpt2"])
def test_resid_mid_and_what_reads_it_in_any_order(family: str) -> None:
    """In OLMo 2 the MLP itself reads the stream: two components at one module."""
    model, executor = made(family), reference(family)
    path = {"olmo2": "mlp", "llama": "post_attention_layernorm", "gpt2": "ln_2"}[family]
    blocks = "transformer.h" if family == "gpt2" else "model.layers"
    reader = Site(f"{blocks}[1].{path}.input", 0, (2,))
    middle = Site("resid_mid", 1, (3,))
    both = [Edit(middle, Scale(2.0)), Edit(reader, Zero())]
    rows = [Run(IDS, tuple(both)), Run(IDS, tuple(both[::-1]))]
    rows += [Run(IDS, (edit,)) for edit in both]
    source = raw_swap.capture(model, family, "resid_mid", 1, IDS) * 2
    moved = raw_swap.swapped_logits(model, family, "resid_mid", 1, IDS, source, (3,))

    def without(value: Tensor) -> Tensor:
        value[0, 2] = 0
        return value

    unread = by_hand(model, f"{blocks}.1.{path}", "input", without)
    for each in (executor, SuffixExecutor(model, executor.sites.anatomy)):
        together = each.logits(rows, None)
        close(together[2], moved)
        close(together[3], unread)
        close(together[0], together[1])
        # The reader changes position 2, which the middle's change, further right, leaves alone.
        close(together[0][2], unread[2])
        apart(together[0][3], unread[3])
        apart(together[0][3], moved[3])


@pytest.mark.parametrize("component", ["final_norm", "logits"])
def test_what_follows_the_blocks(model: nn.Module, either: Executor, component: str) -> None:
    at_last = Site(component, 0, (N - 1,))
    right = forward(model, IDS).clone()
    right[-1] = forward(model, OTHER)[-1]
    close(one(either, swap(at_last)), right)
    close(either.logits([Run(IDS, (swap(at_last),))], (-1,))[0], right[-1:])
    # Positions that are not looked at may be edited too.
    for positions in ((N - 1, 2), (2, N - 1), (2, 3), None):
        right = forward(model, IDS).clone()
        places = list(positions or range(N))
        right[places] = forward(model, OTHER)[places]
        run = Run(IDS, (swap(Site(component, 0, positions)),))
        for at in (None, (-1,), (2,), (-1, 2), (0, 3)):
            got = either.logits([run, Run(OTHER)], at)
            close(got[0], right if at is None else right[list(at)])
            if at is not None:
                got = either.logits([run], at, (4, 90))
                close(got[0], right[list(at)][:, [4, 90]])


@pytest.mark.parametrize("component", ["final_norm", "logits"])
def test_what_is_drawn_after_the_blocks(either: Executor, component: str) -> None:
    """Over several positions, of which one is looked at."""
    edit = Edit(Site(component, 0, (2, N - 1)), Noise(1.0, 3, 1))
    whole = one(either, edit)
    apart(whole, one(either))
    close(either.logits([Run(IDS, (edit,))], (-1,))[0], whole[-1:])


def test_columns_of_the_logits(model: nn.Module, either: Executor) -> None:
    edit = Edit(Site("logits", 0, (N - 1,), None, (7, 90)), Zero())
    right = forward(model).clone()
    right[-1, [7, 90]] = 0
    close(one(either, edit), right)
    close(either.logits([Run(IDS, (edit,))], (-1,), (90, 4))[0], right[-1:, [90, 4]])


# Modules by path.


@pytest.mark.parametrize("side", ["input", "output"])
@pytest.mark.parametrize("path", ["mlp", "attn.c_proj", "ln_2", ""])
def test_a_path_is_the_side_of_a_module(side: str, path: str) -> None:
    model = made("gpt2")
    module = f"transformer.h.1.{path}".rstrip(".")
    written = f"transformer.h[1].{path}".rstrip(".")

    def change(value: Tensor) -> Tensor:
        value[0, [1, 4]] = value[0, [1, 4]].clamp(min=0.1)
        return value

    right = by_hand(model, module, side, change)
    apart(right, forward(model))
    clamp = Clamp(0.1, float("inf"))
    for executor in (reference("gpt2"), SuffixExecutor(model, anatomy_of(model))):
        for component in (f"{module}.{side}", f"{written}.{side}"):
            close(one(executor, Edit(Site(component, 0, (1, 4)), clamp)), right)


@pytest.mark.parametrize("path", ["lm_head", "transformer.ln_f", "transformer.wpe"])
@pytest.mark.parametrize("side", ["input", "output"])
def test_paths_outside_the_blocks(path: str, side: str) -> None:
    """Before them or after, whatever positions are looked at."""
    if (path, side) == ("transformer.wpe", "input"):
        return  # numbers of positions, no activations
    model = made("gpt2")

    def change(value: Tensor) -> Tensor:
        value = value[:1].clone()
        value[0, [1, 5]] = value[0, [1, 5]].clamp(min=0.1)
        return value

    right = by_hand(model, path, side, change)
    apart(right[[1, 5]], forward(model)[[1, 5]])
    clamp = Clamp(0.1, float("inf"))
    for executor in (reference("gpt2"), SuffixExecutor(model, anatomy_of(model))):
        edit = Edit(Site(f"{path}.{side}", 0, (1, 5)), clamp)
        close(one(executor, edit), right)
        close(executor.logits([Run(IDS, (edit,)), Run(IDS)], (-1,))[0], right[-1:])
        alone = Edit(Site(f"{path}.{side}", 0, (0,)), clamp)
        whole = one(executor, alone)
        close(executor.logits([Run(IDS, (alone,))], (-1,))[0], whole[-1:])
        if "lm_head" in path or "ln_f" in path:
            close(whole[-1:], forward(model)[-1:])
        [[state]] = executor.states([Run(IDS)], [Site(f"{path}.{side}")])
        assert len(state) == N


def test_a_path_that_leads_nowhere_says_how_far_it_goes(either: Executor, name: str) -> None:
    block = BLOCKS[name]
    with pytest.raises(EngineError, match=rf"no module '{block}.1.mpl': {block}.1 has .*mlp"):
        one(either, Edit(Site(f"{block}[1].mpl.output", 0, (1,)), Zero()))
    with pytest.raises(EngineError, match=f"no module '{block}.7': {block} has 0, 1, 2"):
        one(either, Edit(Site(f"{block}.7.output", 0, (1,)), Zero()))


# Any module.


def mlp() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3)
        )


def rows(n: int, *shape: int) -> list[Tensor]:
    numbers = torch.Generator().manual_seed(1)
    return [torch.randn(*shape, generator=numbers) for _ in range(n)]


def test_an_mlp() -> None:
    model, (x, y, z) = mlp(), rows(3, 4)
    executor = ReferenceExecutor(model)
    first = Site("0.output", 0, None, None, (1, 5))
    second = Edit(Site("2.input", 0, (0,), None, (2,)), Scale(3.0))
    edit = Edit(first, Vanilla(), Run(Inputs(y)))
    got = executor.logits([Run(Inputs(x), (edit, second)), Run(Inputs(x)), Run(Inputs(z))])
    with torch.no_grad():
        hidden, other = model[0](x), model[0](y)
        hidden[[1, 5]] = other[[1, 5]]
        hidden = model[1](hidden)
        hidden[2] *= 3
        right = torch.stack([model[2:](hidden), model(x), model(z)])
    assert got.shape == (3, 3)
    close(got, right, 1e-6)
    [[state]] = executor.states([Run(Inputs(x))], [Site("2.output")])
    assert state.shape == (1, 8)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_mlp_over_several_positions() -> None:
    model, (x, y) = mlp(), rows(2, 5, 4)
    executor = ReferenceExecutor(model)
    edit = Edit(Site("3.output", 0, (4, 1)), Vanilla(), Run(Inputs(y)), Site("3.output", 0, (0, 2)))
    with torch.no_grad():
        hidden, other = model[:4](x), model[:4](y)
        hidden[[4, 1]] = other[[0, 2]]
        right = model[4](hidden)
    close(executor.logits([Run(Inputs(x), (edit,)), Run(Inputs(y))])[0], right, 1e-6)


def test_pixels_are_positions_row_by_row() -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Conv2d(3, 6, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(6, 4, 3),
            nn.Flatten(),
            nn.Linear(48, 2),
        )
    x, y = rows(2, 3, 5, 6)
    executor = ReferenceExecutor(model)
    # Channels 0 and 4 of the pixels in row 1, columns 2 and 5, and row 3, column 0.
    positions = (1 * 6 + 2, 1 * 6 + 5, 3 * 6)
    edit = Edit(Site("0.output", 0, positions, None, (0, 4)), Vanilla(), Run(Inputs(y)))
    with torch.no_grad():
        maps, others = model[0](x[None]), model[0](y[None])
        for row, column in ((1, 2), (1, 5), (3, 0)):
            for channel in (0, 4):
                maps[0, channel, row, column] = others[0, channel, row, column]
        right = model[1:](maps)[0]
    got = executor.logits([Run(Inputs(x), (edit,)), Run(Inputs(x)), Run(Inputs(y))])
    close(got[0], right, 1e-6)
    apart(got[0], got[1])
    [[state]] = executor.states([Run(Inputs(x))], [Site("0.output", 0, (8,))])
    with torch.no_grad():
        close(state[0], model[0](x[None])[0, :, 1, 2], 1e-6)


@pytest.mark.parametrize("batch_first", [True, False])
def test_a_recurrent_network(batch_first: bool) -> None:
    """Whose rows are the second dimension, unless it is told otherwise."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gru = nn.GRU(4, 8, batch_first=batch_first)
            self.head = nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.head(self.gru(x)[0])
            return out

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Net()
    x, y = rows(2, 5, 4)
    executor = ReferenceExecutor(model, batch_dim=0 if batch_first else 1)
    edit = Edit(Site("gru.output", 0, (1, 4), None, (0, 7)), Vanilla(), Run(Inputs(x=y)))
    given = Edit(Site("gru.input", 0, (2,)), Zero())

    def states(sequence: Tensor) -> Tensor:
        sequence = sequence[None] if batch_first else sequence[:, None]
        out: Tensor = model.gru(sequence)[0]
        return out[0] if batch_first else out[:, 0]

    with torch.no_grad():
        cut = x.clone()
        cut[2] = 0
        swapped = states(x)
        for position, column in itertools.product((1, 4), (0, 7)):
            swapped[position, column] = states(y)[position, column]
        right = [model.head(swapped), model.head(states(x)), model.head(states(cut))]
    runs = [Run(Inputs(x=x), (edit,)), Run(Inputs(x=x)), Run(Inputs(x=x), (given,))]
    got = executor.logits(runs)
    assert got.shape == (3, 5, 3)
    for one_row, expected in zip(got, right, strict=True):
        close(one_row, expected, 1e-6)
    apart(got[0], got[1])
    apart(got[2], got[1])


def test_inputs_by_name_in_any_order() -> None:
    """An edit of a module's input goes to the argument that was read."""

    class Inner(nn.Module):
        def forward(self, bias: Tensor, hidden_states: Tensor) -> Tensor:
            return 2 * hidden_states + bias

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Inner()
            self.weight = nn.Parameter(torch.ones(1))

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.inner(bias=torch.ones_like(x), hidden_states=x)
            return out

    x = torch.arange(6.0).reshape(2, 3)
    run = Run(Inputs(x), (Edit(Site("inner.input", 0, (1,)), Zero()),))
    got = ReferenceExecutor(Net()).logits([run])
    close(got[0], torch.tensor([[1.0, 3.0, 5.0], [1.0, 1.0, 1.0]]))


def test_inputs_are_the_same_where_their_bytes_are() -> None:
    x = torch.arange(6.0)
    assert Inputs(x) == Inputs(x.clone())
    assert hash(Inputs(x)) == hash(Inputs(x.clone()))
    assert Inputs(x) != Inputs(x.reshape(2, 3))
    assert Inputs(x) != Inputs(x.double())
    assert Inputs(x) != Inputs(x + 1)
    assert Inputs(x) != Inputs(a=x)
    assert Inputs(a=x, b=x + 1) == Inputs(b=x + 1, a=x)
    assert Inputs(a=x, b=x + 1) != Inputs(a=x + 1, b=x)
    assert Inputs(x) != (0, 1, 2)


def test_inputs_of_several_shapes() -> None:
    model = mlp()
    some = [*rows(2, 5, 4), *rows(2, 3, 4)]
    executor = ReferenceExecutor(model)
    for state, x in zip(
        executor.states([Run(Inputs(x)) for x in some], [Site("output")])[0], some, strict=True
    ):
        with torch.no_grad():
            close(state, model(x), 1e-6)


# Errors.


def error(executor: Executor, site: Site, message: str, *more: Edit) -> None:
    with pytest.raises(EngineError, match=message):
        executor.logits([Run(IDS, (Edit(site, Zero()), *more))])


def test_a_component_that_is_not_there_names_the_nearest(either: Executor) -> None:
    error(either, Site("block_ouput", 0, (0,)), "did you mean 'block_output'")
    error(either, Site("xyz", 0, (0,)), "no component 'xyz'.*they have block_input")


@pytest.mark.parametrize(
    ("site", "message"),
    [
        (Site("block_output", 3, (0,)), "block_output: no layer 3, there are 3"),
        (Site("final_norm", 1, (0,)), "final_norm stands once in the model"),
        (Site("mlp_output", 1, (0,), (0,)), "mlp_output is not divided into heads"),
        (Site("head_query_output", 1, (0,), (4,)), "head_query_output: head 4: there are 4"),
        (Site("head_query_output", 1, (0,), (0,), (12,)), "dimension 12: there are 12"),
        (Site("mlp_output", 1, (0,), None, (48,)), "dimension 48: there are 48"),
    ],
)
@pytest.mark.parametrize("layer", [0, 1, 2])
def test_a_site_that_is_not_there_is_an_error(
    either: Executor, site: Site, message: str, layer: int
) -> None:
    if site.layer == 1 and site.component != "final_norm":
        site = Site(site.component, layer, site.positions, site.heads, site.dims)
    error(either, site, message)


@pytest.mark.parametrize(
    ("component", "layer"),
    [
        ("token_embedding", 0),
        ("block_input", 0),
        ("mlp_output", 0),
        ("block_output", 1),
        ("mlp_output", 2),
        ("attention_output", 2),
        ("head_query_output", 2),
        ("block_output", 2),
        ("final_norm", 0),
        ("logits", 0),
    ],
)
def test_a_position_that_is_not_there_is_an_error(
    either: Executor, component: str, layer: int
) -> None:
    """Also where the edit would make no difference, or another run is longer."""
    message = f"{component}: position {N} of {N}"
    for positions in ((N,), (2, N)):
        site = Site(component, layer, positions)
        error(either, site, message)
        for edit in (Edit(site, Collect()), swap(site, IDS), swap(site, (*OTHER, 4))):
            with pytest.raises(EngineError, match=message):
                either.logits([Run(IDS, (edit,)), Run((*IDS, *IDS))])


def test_a_source_of_another_shape_is_an_error(either: Executor) -> None:
    short = OTHER[:3]
    with pytest.raises(EngineError, match=r"the source has \(3, 48\)|position 5 of 3"):
        one(either, swap(Site("mlp_output", 1), short))
    with pytest.raises(EngineError, match="position 5 of 3"):
        one(either, swap(Site("mlp_output", 1, (5,)), short))
    with pytest.raises(EngineError, match="the source has"):
        one(either, swap(Site("mlp_output", 1, (5,)), OTHER, Site("mlp_output", 1, (2, 3))))
    with pytest.raises(EngineError, match="the source has"):
        one(
            either,
            swap(Site("mlp_output", 1, (5,)), OTHER, Site("head_query_output", 1, (5,), (0,))),
        )
    # One row's source does not fit, another's does.
    wrong = Run(IDS, (swap(Site("mlp_output", 1), short),))
    right = Run(IDS, (swap(Site("mlp_output", 1)),))
    with pytest.raises(EngineError, match=r"the source has|position 5 of 3"):
        either.logits([wrong, right])


def test_columns_of_a_path_that_are_not_there_are_an_error(either: Executor, name: str) -> None:
    site = Site(f"{BLOCKS[name]}[1].mlp.output", 0, (0,), None, (47, 48))
    error(either, site, "dimension 48")


def test_what_gives_another_shape_is_an_error(either: Executor) -> None:
    edit = Edit(Site("mlp_output", 1, (1,)), BaseLambda(lambda b: b[..., :3]))
    with pytest.raises(EngineError, match="the function gave the shape"):
        one(either, edit)


def test_a_skip_needs_an_input_of_its_outputs_width() -> None:
    for component in ("query_output", "key_output", "value_output"):
        with pytest.raises(EngineError, match=r"skip|source|width"):
            one(reference("gpt2"), Edit(Site(component, 1, (1,)), Skip()))


def test_a_site_that_does_not_fire_is_an_error() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.spare = nn.Linear(3, 3), nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.used(self.used(x))
            return out

    executor = ReferenceExecutor(Net())
    run = Inputs(torch.ones(3))
    with pytest.raises(EngineError, match=r"spare\.output: fired 0 times, expected once"):
        executor.logits([Run(run, (Edit(Site("spare.output"), Zero()),))])
    with pytest.raises(EngineError, match=r"used\.output: fired 2 times, expected once"):
        executor.states([Run(run)], [Site("used.output")])


@pytest.mark.parametrize("which", EXECUTORS)
def test_a_block_that_is_passed_by_is_an_error(which: str) -> None:
    model = zoo.make("llama")
    executor = EXECUTORS[which](model, anatomy_of(model))
    model.model.layers[1].forward = lambda hidden_states, **_: hidden_states
    with pytest.raises(EngineError, match=r"fired 0 times|called .* 0 times"):
        executor.logits([Run(IDS, (Edit(Site("mlp_output", 1, (0,)), Zero()),))])


@pytest.mark.parametrize("which", EXECUTORS)
@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_numbers_that_are_not_finite_are_an_error(which: str, value: float) -> None:
    model = zoo.make("gpt2")
    model.get_output_embeddings().weight[3] = value
    executor = EXECUTORS[which](model, anatomy_of(model))
    with pytest.raises(EngineError, match="not finite"):
        executor.logits([Run(IDS)])


def test_a_module_that_gives_no_tensor_is_an_error() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(3, 3)

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {"y": self.inner(x)}

    with pytest.raises(EngineError, match="gives dict"):
        ReferenceExecutor(Net()).logits([Run(Inputs(torch.ones(3)))])


def test_edits_and_sources_that_do_not_belong_together() -> None:
    with pytest.raises(EngineError, match="Vanilla needs a source"):
        Edit(Site("mlp_output", 0, (0,)), Vanilla())
    with pytest.raises(EngineError, match="Zero takes no source"):
        Edit(Site("mlp_output", 0, (0,)), Zero(), Run(IDS))
    with pytest.raises(EngineError, match="a place to read"):
        Edit(Site("mlp_output", 0, (0,)), Zero(), None, Site("mlp_output", 0, (0,)))
    for units in ((), (1, 1), (-1,)):
        with pytest.raises(EngineError, match="at least one, each once"):
            Site("mlp_output", 0, units)
        with pytest.raises(EngineError, match="at least one, each once"):
            Site("mlp_output", 0, None, None, units)


# The model is left as it was found.


def snapshot(model: nn.Module) -> dict[str, object]:
    """What an executor might leave behind in a model."""
    configs = {
        n: m.config._attn_implementation for n, m in model.named_modules() if hasattr(m, "config")
    }
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
        "forward": {n: vars(m).get("forward") for n, m in model.named_modules()},
        "attributes": {n: sorted(vars(m)) for n, m in model.named_modules()},
        "attention": configs,
        "grad": torch.is_grad_enabled(),
    }


def same(a: dict[str, object], b: dict[str, object]) -> None:
    """Two snapshots are of a model in the same state."""
    for key in ("training", "hooks", "forward", "attributes", "attention", "grad"):
        assert a[key] == b[key], key
    parameters, others = a["parameters"], b["parameters"]
    buffers, more = a["buffers"], b["buffers"]
    assert isinstance(parameters, dict)
    assert isinstance(others, dict)
    assert isinstance(buffers, dict)
    assert isinstance(more, dict)
    assert parameters.keys() == others.keys()
    for key, (value, needs, gradient) in parameters.items():
        assert torch.equal(value, others[key][0])
        assert (needs, gradient) == others[key][1:]
    assert buffers.keys() == more.keys()
    for key, value in buffers.items():
        assert torch.equal(value, more[key])


@contextlib.contextmanager
def left_as_found(model: nn.Module, *, hooks: bool = True) -> Iterator[None]:
    """A check with everything in it that might be lost: modes, the user's hooks and forward.

    Args:
        model: the model; some of it will be in training mode.
        hooks: whether the user has hooks of their own, which must run.
    """
    model.train()
    head = model.get_output_embeddings()  # type: ignore[operator]
    head.eval()
    calls: list[int] = []
    mine = [
        head.register_forward_hook(lambda *_: calls.append(1)),
        model.register_forward_pre_hook(lambda *_: calls.append(2)),
    ]
    if not hooks:
        for handle in mine:
            handle.remove()
    before = snapshot(model)
    try:
        yield
    finally:
        same(before, snapshot(model))
        for handle in mine:
            handle.remove()
    assert set(calls) == ({1, 2} if hooks else set()), "the user's hooks did not run"


@pytest.mark.parametrize("which", EXECUTORS)
@pytest.mark.parametrize("family", ["gpt2", "llama", "bert", "mamba", "gpt_oss"])
@pytest.mark.parametrize("fails", ["", "position", "inside", "model"])
def test_the_model_is_left_as_it_was_found(which: str, family: str, fails: str) -> None:
    model = zoo.make(family)
    executor = EXECUTORS[which](model, anatomy_of(model))
    mixer = "mixer_output" if family == "mamba" else "mlp_output"
    edits = [swap(Site("block_output", 1, (2,))), swap(Site(mixer, 2))]
    if family != "mamba":
        edits.append(Edit(Site("attention_weight", 2, (5,)), Scale(2.0)))

    def fail(_value: Tensor) -> Tensor:
        raise RuntimeError("not mine")

    broken: dict[str, tuple[Edit, ...]] = {
        "position": (Edit(Site(mixer, 1, (77,)), Zero()),),
        "inside": (Edit(Site(mixer, 1, (3,)), BaseLambda(fail)),),
    }
    run = Run(IDS, (*edits, *broken.get(fails, ())))
    # A site that is not there is found before anything runs.
    hooks = which == "reference" and fails != "position"
    with left_as_found(model, hooks=hooks), torch.enable_grad():
        if not fails:
            executor.logits([run, Run(IDS)], (-1,), (3, 4) if family != "bert" else None)
            executor.states([run], [Site("block_output", 2)])
            executor.forget()
        elif fails == "model":
            # In the model's own code, once the sources have run.
            plain = nn.Embedding.forward

            def fails_on_the_run(module: nn.Embedding, ids: Tensor) -> Tensor:
                if ids.dim() == 2 and list(run.ids) in ids.tolist():
                    raise IndexError
                return plain(module, ids)

            broken = mock.patch.object(nn.Embedding, "forward", fails_on_the_run)
            with broken, pytest.raises(IndexError):
                executor.logits([run])
        else:
            with pytest.raises((EngineError, RuntimeError)):
                executor.logits([run])


def test_a_forward_of_the_users_own_stays() -> None:
    model = zoo.make("gpt2")
    block = model.transformer.h[0]
    inner = block.forward
    calls: list[int] = []

    def mine(*args: object, **kwargs: object) -> object:
        calls.append(1)
        return inner(*args, **kwargs)

    block.forward = mine
    executor = SuffixExecutor(model, anatomy_of(model))
    run = Run(IDS, (swap(Site("block_output", 1, (2,))),))
    close(executor.logits([run])[0], reference("gpt2").logits([run])[0])
    assert block.forward is mine
    assert calls


@pytest.mark.parametrize("which", EXECUTORS)
def test_dropout_is_off_while_it_runs(which: str) -> None:
    model = zoo.make("gpt2")
    model.transformer.drop.p = 0.5
    plain = forward(model)
    model.train()
    executor = EXECUTORS[which](model, anatomy_of(model))
    close(executor.logits([Run(IDS)], None)[0], plain)
    run = Run(IDS, (swap(Site("block_output", 0, (1,))),))
    close(executor.logits([run], None)[0], reference("gpt2").logits([run], None)[0])
    assert model.training


@pytest.mark.parametrize("which", EXECUTORS)
def test_parameters_that_want_gradients_get_none(which: str) -> None:
    model = zoo.make("llama").requires_grad_(True)
    executor = EXECUTORS[which](model, anatomy_of(model))
    got = executor.logits([Run(IDS, (swap(Site("resid_mid", 1, (2,))),))])
    assert not got.requires_grad
    assert all(p.grad is None for p in model.parameters())


def test_a_users_hook_is_part_of_the_model() -> None:
    """What it changes is there in every run; where it would see a part of one, it is refused."""
    model = zoo.make("gpt2")
    handle = model.transformer.h[1].mlp.register_forward_hook(lambda _m, _a, out: out * 2)
    right = forward(model)
    executor = ReferenceExecutor(model, anatomy_of(model))
    close(executor.logits([Run(IDS)], None)[0], right)
    edit = Edit(Site("mlp_output", 1), Scale(0.5))
    close(executor.logits([Run(IDS, (edit,))], None)[0], forward(made("gpt2")))
    suffix = SuffixExecutor(model, anatomy_of(model))
    with pytest.raises(EngineError, match=r"transformer\.h\.1\.mlp has hooks of somebody else's"):
        suffix.logits([Run(IDS)])
    with pytest.raises(EngineError, match="hooks of somebody else's"):
        suffix.states([Run(IDS, (edit,))], [Site("block_output", 2)])
    handle.remove()
    close(suffix.logits([Run(IDS)], None)[0], forward(model))


def test_what_was_given_is_not_changed() -> None:
    """States that are handed out are the caller's: writing into them changes no later run."""
    for executor in (reference("gpt2"), SuffixExecutor(made("gpt2"), anatomy_of(made("gpt2")))):
        run = Run(IDS, (swap(Site("mlp_output", 1, (2,))),))
        before = executor.logits([run]).clone()
        [[state]] = executor.states([Run(OTHER)], [Site("mlp_output", 1)])
        state.zero_()
        close(executor.logits([run])[0], before[0])
        executor.logits([run]).zero_()
        close(executor.logits([run])[0], before[0])
