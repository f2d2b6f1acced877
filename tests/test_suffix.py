"""The suffix executor against the reference, on random runs of random small models."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import interv.engine.suffix
import interv.engine.walk
from interv.engine import (
    Addition,
    BaseLambda,
    Clamp,
    Collect,
    Edit,
    Inputs,
    Intervention,
    Lambda,
    Mean,
    Noise,
    ReferenceExecutor,
    Replace,
    Run,
    Scale,
    Site,
    Skip,
    Subtraction,
    SuffixExecutor,
    Vanilla,
    Zero,
    anatomy_of,
)
from interv.errors import EngineError
from interv.models.anatomy import Anatomy
from tests import zoo
from tests.test_reference import IDS, OTHER, by_hand

FAMILIES = (
    "gpt2",
    "llama",
    "mistral",  # a sliding window of 3, shorter than most prompts
    "gemma2",
    "gemma3_text",
    "phi3",
    "gpt_oss",
    "opt",
    "gpt_neox",
    "olmo2",
    "starcoder2",  # recognised
    "bert",
    "gptj",
    "mamba",
)
EXACT = 1e-9
LOOSE = {"gptj": 2e-6, "gemma2": 2e-6}
"""float32 inside, as in the matrix: rows of one batch are rounded otherwise than alone."""

N = len(IDS)
LAST = zoo.LAYERS - 1
STARTS = ((5, 9, 17, 3, 40, 8, 2, 71, 7), (5, 9, 21, 3, 40, 8, 2, 71, 7))
"""Two prompts, and their beginnings; alike in the first two tokens and from the fourth on."""


@cache
def made(name: str) -> tuple[nn.Module, Anatomy]:
    """A model that no test changes."""
    model = zoo.make(name)
    return model, anatomy_of(model)


def suffix(name: str, max_tokens: int = 2048) -> SuffixExecutor:
    return SuffixExecutor(*made(name), max_tokens)


def reference(name: str) -> ReferenceExecutor:
    return ReferenceExecutor(*made(name))


def close(got: Tensor, right: Tensor, near: float = EXACT) -> None:
    assert got.shape == right.shape
    assert float((got - right).abs().max()) <= near * float(right.abs().max())


def apart(one: Tensor, two: Tensor) -> None:
    far = float((one - two).abs().max() / two.abs().max())
    assert far > 1e-4, "no effect: nothing is tested"


def agree(
    name: str,
    runs: Sequence[Run],
    at: Sequence[int] | None = (-1,),
    tokens: Sequence[int] | None = None,
) -> Tensor:
    """Logits of all runs at once are those of the reference, run by run."""
    got = suffix(name).logits(runs, at, tokens)
    executor = reference(name)
    right = torch.cat([executor.logits([run], at, tokens) for run in runs])
    close(got, right, LOOSE.get(name, EXACT))
    return got


def swap(site: Site, source: tuple[int, ...] | Run = OTHER, read: Site | None = None) -> Edit:
    return Edit(site, Vanilla(), source if isinstance(source, Run) else Run(source), read)


# Random plans.


PHASES = (Phase.explicit, Phase.generate)
"""Without shrinking, which takes minutes: plans are short, and printed."""


def subset(draw: st.DrawFn, upto: int, most: int = 3) -> tuple[int, ...]:
    """Some of the numbers below `upto`, in any order."""
    return tuple(draw(st.lists(st.integers(0, upto - 1), min_size=1, max_size=most, unique=True)))


@st.composite
def sites(draw: st.DrawFn, name: str, length: int) -> Site:
    _, anatomy = made(name)
    component = draw(st.sampled_from(anatomy.components))
    layer = draw(st.integers(0, LAST)) if anatomy.has_layers(component) else 0
    positions = draw(st.sampled_from([None, ...]))
    some = subset(draw, length) if positions is ... else None
    units, heads, dims = anatomy.n_units(component), None, None
    if units and draw(st.booleans()):
        heads = subset(draw, units)
    if component != "attention_weight" and draw(st.booleans()):
        width = anatomy.width(component)
        assert width is not None
        dims = subset(draw, width // units if units and heads else width)
    return Site(component, layer, some, heads, dims)


SKIPPED = ("block_output", "mlp_output", "attention_output", "mixer_output")
"""Their modules give what is as wide as what they get, where they are the sub-layers."""
BARE = ("opt", "bert")
"""Blocks without an MLP's module: its output is the down projection's."""


@cache
def mean(width: int) -> Mean:
    """One for each width: it is the same intervention wherever it is."""
    return Mean(torch.linspace(-1, 1, width, dtype=torch.float64))


@cache
def replacement(n_positions: int, width: int) -> Replace:
    return Replace(torch.linspace(-2, 1, n_positions * width).double().reshape(-1, width))


def double_less(base: Tensor, source: Tensor) -> Tensor:
    return 2 * base - source


def turned(base: Tensor) -> Tensor:
    return base.flip(-2)


@st.composite
def interventions(draw: st.DrawFn, name: str, site: Site, length: int) -> Intervention:
    kinds: list[Intervention] = [Vanilla(), Vanilla(), Vanilla(), Addition(), Subtraction()]
    kinds += [Zero(), Collect(), Scale(-1.5), Clamp(-0.2, 0.3), Lambda(double_less)]
    kinds += [Noise(0.4, 1, draw(st.integers(0, 2))), BaseLambda(turned)]
    _, anatomy = made(name)
    whole = site.heads is None and site.dims is None
    width = anatomy.width(site.component)
    if width is not None and whole:
        kinds += [mean(width), replacement(len(site.positions or range(length)), width)]
    if (
        site.component in SKIPPED
        and whole
        and not (site.component == "mlp_output" and name in BARE)
    ):
        kinds += [Skip(), Skip()]
    return draw(st.sampled_from(kinds))


@st.composite
def a_run(draw: st.DrawFn, name: str, depth: int = 2, at_least: int = 2) -> Run:
    """A run with noise on the embeddings, perhaps, and edits whose sources are such runs."""
    length = draw(st.integers(at_least, 9))
    ids = draw(st.sampled_from(STARTS))[:length]
    edits: list[Edit] = []
    if draw(st.booleans()):
        site = Site("token_embedding", 0, subset(draw, length, 2))
        edits.append(Edit(site, Noise(0.5, 3, draw(st.integers(0, 1)))))
    base = Run(ids, tuple(edits))
    for _ in range(draw(st.integers(0, 3))):
        site = draw(sites(name, length))
        intervention = draw(interventions(name, site, length))
        if not intervention.needs_source:
            edits.append(Edit(site, intervention))
            continue
        # Patterns of another length, or all positions of one, are of another shape.
        fixed = site.positions is None or site.component == "attention_weight"
        other = draw(a_run(name, depth - 1, length)) if depth > 0 else base
        if fixed and len(other) != length:
            other = Run(OTHER[:length] if length <= N else ids)
        source = draw(st.sampled_from([base, Run(ids), other]))
        read = None
        if site.positions is not None and draw(st.booleans()):
            upto = length if fixed else len(source)
            everywhere = draw(st.permutations(range(upto)))
            layer = draw(st.integers(0, LAST)) if made(name)[1].has_layers(site.component) else 0
            positions = tuple(everywhere[: len(site.positions)])
            read = Site(site.component, layer, positions, site.heads, site.dims)
        edits.append(Edit(site, intervention, source, read))
    return Run(ids, tuple(edits))


@st.composite
def plans(
    draw: st.DrawFn, name: str, most: int = 5
) -> tuple[list[Run], tuple[int, ...] | None, tuple[int, ...] | None]:
    """Runs of several prompts, positions to be read, and tokens."""
    runs = draw(st.lists(a_run(name), min_size=1, max_size=most))
    shortest = min(map(len, runs))
    wanted = st.lists(st.integers(-shortest, shortest - 1), min_size=1, max_size=3)
    at: tuple[int, ...] | None = draw(st.one_of(st.just((-1,)), wanted.map(tuple)))
    if len({len(run) for run in runs}) == 1 and draw(st.integers(0, 3)) == 0:
        at = None
    tokens = subset(draw, zoo.VOCAB, 4) if draw(st.integers(0, 2)) == 0 else None
    return runs, at, tokens


@pytest.mark.parametrize("name", FAMILIES)
def test_random_plans(name: str) -> None:
    @settings(max_examples=30, phases=PHASES)
    @given(plans(name))
    def check(plan: tuple[list[Run], Any, Any]) -> None:
        agree(name, *plan)

    check()


@pytest.mark.parametrize("name", FAMILIES)
def test_batches_orders_and_walks_make_no_difference(name: str) -> None:
    @settings(max_examples=12, phases=PHASES)
    @given(plans(name), st.randoms(use_true_random=False))
    def check(plan: tuple[list[Run], Any, Any], chance: random.Random) -> None:
        runs, at, tokens = plan
        near = LOOSE.get(name, EXACT)
        executor = suffix(name)
        together = executor.logits([*runs, *runs], at, tokens)
        assert torch.equal(together[: len(runs)], together[len(runs) :])
        # Again, with all kept; then shuffled, in many small walks; then one by one.
        close(executor.logits(runs, at, tokens), together[: len(runs)], near)
        order = list(range(len(runs)))
        chance.shuffle(order)
        shuffled = suffix(name, 1).logits([runs[i] for i in order], at, tokens)
        for place, i in enumerate(order):
            close(shuffled[place], together[i], near)
            executor.forget()
            close(executor.logits([runs[i]], at, tokens)[0], together[i], near)

    check()


@pytest.mark.parametrize("name", FAMILIES)
def test_states_of_random_runs(name: str) -> None:
    @settings(max_examples=12, phases=PHASES)
    @given(st.data())
    def check(data: st.DataObject) -> None:
        runs = data.draw(st.lists(a_run(name), min_size=1, max_size=3))
        shortest = min(map(len, runs))
        wanted = data.draw(st.lists(sites(name, shortest), min_size=1, max_size=4))
        got = suffix(name).states(runs, wanted)
        right = reference(name).states(runs, wanted)
        for site, ours, theirs in zip(wanted, got, right, strict=True):
            for one, two in zip(ours, theirs, strict=True):
                assert one.shape == two.shape, site
                near = LOOSE.get(name, EXACT) * max(1.0, float(two.abs().max()))
                assert float((one - two).abs().max()) <= near, site

    check()


# Each component by itself, in every family that starts at positions and one that does not.


@pytest.mark.parametrize("name", ["gpt2", "gemma2", "olmo2", "bert"])
def test_a_sweep_over_positions(name: str) -> None:
    _, anatomy = made(name)
    runs = [
        Run(IDS, (swap(Site(component, layer, (position,))),))
        for component in anatomy.components
        for layer in (range(zoo.LAYERS) if anatomy.has_layers(component) else (0,))
        for position in (0, 2, 3, N - 1)
    ]
    executor = reference(name)
    for at in ((-1,), (2, -1)):
        right = executor.logits(runs, at)
        close(suffix(name).logits(runs, at), right, LOOSE.get(name, EXACT))


@pytest.mark.parametrize("name", ["gpt2", "llama", "bert", "mamba", "gptj"])
def test_a_self_swap_changes_nothing(name: str) -> None:
    _, anatomy = made(name)
    executor = suffix(name)
    plain = executor.logits([Run(IDS)], None)
    for component in anatomy.components:
        layer = 1 if anatomy.has_layers(component) else 0
        runs = []
        for positions in (None, (1, 4)):
            site = Site(component, layer, positions)
            back = (Edit(site, Addition(), Run(IDS)), Edit(site, Subtraction(), Run(IDS)))
            runs += [Run(IDS, (swap(site, IDS),)), Run(IDS, back)]
            # A `Lambda` is not known to be a swap, so that this one is computed.
            runs.append(Run(IDS, (Edit(site, Lambda(lambda _b, s: s), Run(IDS)),)))
        for logits in executor.logits(runs, None):
            close(logits[None], plain, LOOSE.get(name, EXACT))


def test_noise_windows_and_held_places() -> None:
    for name in ("gpt2", "llama", "mistral"):
        noisy = [
            Run(IDS, (Edit(Site("token_embedding", 0, (1, 2)), Noise(1.0, 1, draw)),))
            for draw in (0, 1)
        ]
        runs = []
        for base in noisy:
            for p in range(N):
                window = tuple(swap(Site("mlp_output", i, (p,)), IDS) for i in (0, 1))
                restored = swap(Site("block_output", 1, (p,)), IDS)
                held = tuple(swap(Site("mlp_output", i, (p,)), base) for i in range(zoo.LAYERS))
                runs += [Run(IDS, (*base.edits, *window)), Run(IDS, (*base.edits, restored, *held))]
        agree(name, [*runs, *noisy])


def test_path_patching_by_nested_runs() -> None:
    """A sender is patched, everything else held; the receiver reads what it then gets."""
    for name in ("gpt2", "llama", "opt"):
        held = tuple(swap(Site("attention_output", i), IDS) for i in range(zoo.LAYERS))
        sender = swap(Site("mlp_output", 0, (2,)))
        middle = Run(IDS, (sender, *held))
        runs = [
            Run(IDS, (swap(Site(receiver, 2, (2,)), middle),))
            for receiver in ("mlp_input", "attention_input", "block_output", "resid_mid")
        ]
        runs.append(Run(IDS, (swap(Site("head_query_output", 2, (2,), (1,)), middle),)))
        got = agree(name, runs)
        apart(got, agree(name, [Run(IDS)]))


def test_a_source_is_read_before_between_and_after_its_own_edits() -> None:
    """What its edit does not reach is the plain prompt's."""
    middle = Run(IDS, (swap(Site("block_output", 1, (3,))),))
    for name in ("gpt2", "llama", "bert", "mamba"):
        _, anatomy = made(name)
        every = [
            Site(component, layer)
            for component in anatomy.components
            for layer in (range(zoo.LAYERS) if anatomy.has_layers(component) else (0,))
        ]
        got, right = suffix(name).states([middle], every), reference(name).states([middle], every)
        wrong = [
            site
            for site, [one], [two] in zip(every, got, right, strict=True)
            if not torch.allclose(one, two, rtol=1e-9, atol=1e-9)
        ]
        assert not wrong
    agree("gpt2", [Run(IDS, (swap(Site("mlp_output", 0, (3,)), middle),)), middle])


# Which rows differ from their base.


def test_the_same_edit_twice_is_not_the_edit_once() -> None:
    """Two runs whose sets of edits are alike."""
    once = Edit(Site("token_embedding", 0, (1,)), Scale(2.0))
    more = Edit(Site("token_embedding", 0, (1,)), Addition(), Run(OTHER, ()))
    late = Edit(Site("token_embedding", 0, (1,)), Noise(1.0, 1, 0))
    for mine, others in (
        ((once,), (once, once)),
        ((once, late), (late, once)),
        ((once, more), (more, once)),
    ):
        read = swap(Site("block_output", 1, (2,)), Run(IDS, others))
        plain, changed = agree("llama", [Run(IDS, mine), Run(IDS, (*mine, read))])
        apart(changed, plain)


def test_a_draw_over_several_positions_is_not_cut_apart() -> None:
    swapped = swap(Site("block_output", 1, (4,)))
    for name in ("gpt2", "llama"):
        for component in ("mlp_output", "block_output"):
            for first, second in ((1, 5), (5, 1)):
                noise = Edit(Site(component, LAST, (first, second)), Noise(1.0, 1, 0))
                agree(name, [Run(IDS, (noise,)), Run(IDS, (swapped, noise))])


@pytest.mark.parametrize("component", ["mlp_output", "block_output", "final_norm", "logits"])
def test_what_is_made_for_several_positions_is_not_cut_apart(component: str) -> None:
    """Though a row starts behind the first of them, and only one is looked at."""
    layer = LAST if made("llama")[1].has_layers(component) else 0
    width = made("llama")[1].width(component)
    assert width is not None
    swapped = swap(Site("block_output", 0, (3,)))
    runs = []
    for positions in ((1, 4), (1, 5), (5, 2)):
        for kind in (replacement(2, width), BaseLambda(turned), Noise(1.0, 1, 0), mean(width)):
            edit = Edit(Site(component, layer, positions), kind)
            runs += [Run(IDS, (edit,)), Run(IDS, (swapped, edit)), Run(IDS, (edit, swapped))]
        edit = Edit(Site(component, layer, positions), Lambda(double_less), Run(OTHER))
        runs += [Run(IDS, (edit,)), Run(IDS, (swapped, edit))]
    agree("llama", runs)
    agree("llama", runs, (4,))
    agree("llama", runs, None)


def test_a_skip_takes_its_turn_among_a_blocks_edits() -> None:
    for layer in range(zoo.LAYERS):
        site = Site("block_output", layer, (3,))
        kinds = [Edit(site, Skip()), Edit(site, Scale(2.0)), swap(site), Edit(site, Zero())]
        runs = [Run(IDS, (one, two)) for one in kinds for two in kinds]
        for name in ("gpt2", "llama", "bert"):
            agree(name, runs, None)


def test_one_position_read_twice() -> None:
    runs = [
        Run(IDS, (Edit(Site(component, 0, (N - 1,)), Scale(3.0)),))
        for component in ("final_norm", "logits", "block_output")
    ]
    agree("llama", runs, (-1, N - 1, 2, -1))


def test_windows_longer_than_some_prompts() -> None:
    """sdpa makes no mask where the window holds the whole prompt, and one for longer ones."""
    for name in ("mistral", "gemma2", "gpt_oss", "gemma3_text"):
        runs = [
            Run(ids[:n], (Edit(Site("block_output", 0, (min(1, n - 1),)), Zero()),))
            for n in (6, 2, 3, 4, 1)
            for ids in (IDS, OTHER)
        ]
        together = agree(name, runs)
        apart(together[0], agree(name, [Run(IDS)])[0])


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "gptj"])
def test_prompts_of_different_length_walk_together(name: str) -> None:
    runs = [
        Run(IDS[:n], (swap(Site("block_output", 0, (n - 2,)), OTHER[:n]),)) for n in (3, 6, 4, 5, 2)
    ]
    agree(name, runs, (-2, -1))
    agree(name, [*runs, *(Run(run.ids) for run in runs)], (-1, 0), (3, 77))


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "mamba", "gptj"])
def test_tokens_are_columns(name: str) -> None:
    runs = [Run(IDS, (swap(Site("block_output", i, (2,))),)) for i in range(zoo.LAYERS)]
    runs += [Run(IDS), Run(IDS, (Edit(Site("logits", 0, (N - 1,)), Scale(2.0)),))]
    wanted = (7, 0, 99, 7)
    executor = suffix(name)
    whole = executor.logits(runs, (-1, 2))
    close(executor.logits(runs, (-1, 2), wanted), whole[..., list(wanted)], LOOSE.get(name, EXACT))


# How much is computed.


@contextmanager
def counting(*modules: nn.Module) -> Iterator[list[int]]:
    """How many tokens go through these modules, for each call."""
    seen: list[int] = []
    before = [module.forward for module in modules]
    try:
        for module in modules:

            def count(*args: Any, inner: Any = module.forward, **kwargs: Any) -> Any:
                first = args[0] if args else kwargs["hidden_states"]
                seen.append(first.shape[:-1].numel())
                return inner(*args, **kwargs)

            module.forward = count  # type: ignore[method-assign]
        yield seen
    finally:
        for module, inner in zip(modules, before, strict=True):
            del module.forward
            assert module.forward == inner


def mlps(name: str) -> list[nn.Module]:
    model, _ = made(name)
    blocks = {"gpt2": "transformer.h", "llama": "model.layers", "gptj": "transformer.h"}[name]
    return [model.get_submodule(f"{blocks}.{i}.mlp") for i in range(zoo.LAYERS)]


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_what_changes_nothing_costs_nothing(name: str) -> None:
    executor = suffix(name)
    noise = Edit(Site("token_embedding", 0, (1,)), Noise(1.0, 1, 0))
    noisy = Run(IDS, (noise,))
    nothing = [
        Run(IDS),
        Run(IDS, (Edit(Site("mlp_output", 1, (2,)), Collect()),)),
        Run(IDS, (swap(Site("mlp_output", 1, (2,)), IDS),)),
        # Before the first token that differs; where nobody looks.
        Run(IDS, (swap(Site("block_output", 1, (1,))),)),
        Run(IDS, (swap(Site("mlp_output", LAST, (3,))),)),
        Run(IDS, (swap(Site("head_query_output", LAST, (3,), (1,))),)),
        Run(IDS, (swap(Site("final_norm", 0, (3,))),)),
        noisy,
        Run(IDS, (noise, swap(Site("mlp_output", 1, (2,)), noisy))),
    ]
    first = executor.logits(nothing)
    with counting(*mlps(name)) as seen:
        again = executor.logits(nothing)
    assert sum(seen) == 0, "a row was computed that could not change"
    assert torch.equal(first, again)
    for i in range(7):
        assert torch.equal(first[0], first[i])
    assert torch.equal(first[7], first[8])
    agree(name, nothing)


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_no_more_is_computed_than_the_rows_need(name: str) -> None:
    executor = suffix(name)
    runs = [
        Run(IDS, (swap(Site("block_output", layer, (position,))),))
        for layer in range(zoo.LAYERS)
        for position in (3, 4, 5)
    ]
    executor.logits(runs)
    with counting(*mlps(name)) as seen:
        executor.logits(runs)
    # Block 0 is passed by; the rows of layer 0 have 3, 2 and 1 tokens; those of layer 1 join.
    # Of the last block's output only the last position is looked at.
    assert seen == [6, 12]


def test_a_base_runs_once() -> None:
    executor = suffix("gpt2")
    runs = [Run(IDS, (Edit(Site("mlp_output", 2, (p,)), Zero()),)) for p in range(N)]
    model = made("gpt2")[0]
    calls: list[int] = []
    inner = model.forward

    def count(*args: Any, **kwargs: Any) -> Any:
        calls.append(kwargs["input_ids"].numel())
        return inner(*args, **kwargs)

    model.forward = count
    try:
        executor.logits(runs)
        once = len(calls)
        executor.logits(runs)
        assert len(calls) == once + 1, "the base ran again"
        executor.forget()
        executor.logits(runs)
        assert len(calls) == 2 * once + 1
    finally:
        del model.forward


@pytest.mark.parametrize("name", ["gpt2", "gptj", "bert"])
def test_many_small_walks_are_one_large_one(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    _, anatomy = made(name)
    runs = [
        Run(ids, (swap(Site(component, layer, (2,)), other),))
        for ids, other in ((IDS, OTHER), (OTHER[:4], IDS[:4]))
        for component in ("mlp_output", "block_output", "head_key_output")
        for layer in range(zoo.LAYERS)
    ]
    large = suffix(name).logits(runs, (-2, -1))
    counted: list[int] = []
    whole = SuffixExecutor._walk

    def walk(self: SuffixExecutor, rows: Any, *more: Any, **named: Any) -> Any:
        counted.append(len(rows))
        return whole(self, rows, *more, **named)

    monkeypatch.setattr(SuffixExecutor, "_walk", walk)
    for most in (1, 7, 20):
        counted.clear()
        close(suffix(name, most).logits(runs, (-2, -1)), large, LOOSE.get(name, EXACT))
        assert len(counted) > 1
        if most == 1:
            assert max(counted) == 1
    assert anatomy.n_layers == zoo.LAYERS


@pytest.mark.parametrize("name", ["gpt2", "mistral", "gpt_oss"])
def test_attention_in_small_parts(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows attend some at a time where there are many: with patterns edited and read."""
    weight = Edit(Site("attention_weight", 1, (4,), (1,)), Scale(2.0))
    runs = [
        Run(IDS, (swap(Site("attention_weight", 2, (5,))),)),
        Run(IDS, (swap(Site("block_output", 0, (2,))), weight)),
        Run(IDS[:5], (swap(Site("block_output", 0, (2,)), OTHER[:5]), weight)),
        Run(OTHER, (weight,)),
        Run(IDS, (swap(Site("mlp_output", 1, (1, 3))),)),
    ]
    sites = [Site("attention_weight", layer) for layer in range(zoo.LAYERS)]
    large, states = suffix(name).logits(runs), suffix(name).states(runs, sites)
    monkeypatch.setattr(interv.engine.walk, "_ATTENTION_ELEMENTS", 1)
    small, others = suffix(name).logits(runs), suffix(name).states(runs, sites)
    close(small, large)
    for one, two in zip(states, others, strict=True):
        for a, b in zip(one, two, strict=True):
            close(b, a)
    agree(name, runs)


# What configurations change.

VARIANTS: dict[str, tuple[str, dict[str, object]]] = {
    "gpt2-scaled": ("gpt2", {"scale_attn_by_inverse_layer_idx": True}),
    "gpt2-unscaled": ("gpt2", {"scale_attn_weights": False}),
    "llama-bias": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama-dynamic": (
        "llama",
        {
            "max_position_embeddings": 4,
            "rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0},
        },
    ),
    "mistral-wide": ("mistral", {"sliding_window": None}),
    "qwen2-window": (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 3, "max_window_layers": 1},
    ),
    "opt-projected": ("opt", {"word_embed_proj_dim": 24}),
    "opt-norm-after": ("opt", {"do_layer_norm_before": False}),
    "neox-serial": ("gpt_neox", {"use_parallel_residual": False}),
    "gpt2-tied": ("gpt2", {"tie_word_embeddings": True}),
    "phi3-partial": (
        "phi3",
        {
            "rope_parameters": {
                "rope_theta": 1e4,
                "rope_type": "default",
                "partial_rotary_factor": 0.5,
            }
        },
    ),
}


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_configurations(variant: str, attention: str, monkeypatch: pytest.MonkeyPatch) -> None:
    name, more = VARIANTS[variant]
    monkeypatch.setitem(zoo.CONFIGS, name, {**zoo.CONFIGS[name], **more})
    model = zoo.make(name, attn=attention)
    anatomy = anatomy_of(model)
    runs = [
        Run(ids, (swap(Site(component, layer, (2, 1)), other),))
        for number, component in enumerate(anatomy.components)
        for ids, other in ((IDS, OTHER), (OTHER[:3], (4, 6, 88)))
        for layer in ((number % zoo.LAYERS,) if anatomy.has_layers(component) else (0,))
    ]
    got = SuffixExecutor(model, anatomy).logits(runs, (-1, 1))
    executor = ReferenceExecutor(model, anatomy)
    right = torch.cat([executor.logits([run], (-1, 1)) for run in runs])
    close(got, right)
    with torch.no_grad():
        plain = model(torch.tensor([IDS])).logits[0, [-1, 1]]
    close(SuffixExecutor(model, anatomy).logits([Run(IDS)], (-1, 1))[0], plain)


@pytest.mark.parametrize("name", ["gpt2", "llama", "gpt_oss"])
def test_float32_within_the_last_bits(name: str) -> None:
    model = zoo.make(name, torch.float32)
    anatomy = anatomy_of(model)
    runs = [
        Run(IDS, (swap(Site(component, 1 if anatomy.has_layers(component) else 0, (p,))),))
        for component in anatomy.components
        for p in range(N)
    ]
    right = ReferenceExecutor(model, anatomy).logits(runs)
    close(SuffixExecutor(model, anatomy).logits(runs), right, 1e-5)


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_bfloat16_runs(name: str) -> None:
    model = zoo.make(name, torch.bfloat16)
    anatomy = anatomy_of(model)
    runs = [Run(IDS, (swap(Site("block_output", i, (2,))),)) for i in range(zoo.LAYERS)]
    right = ReferenceExecutor(model, anatomy).logits(runs)
    close(SuffixExecutor(model, anatomy).logits(runs).float(), right.float(), 5e-2)


# What it does not take.


def test_blocks_that_are_no_plain_sequence_are_refused() -> None:
    """Something happens between two blocks."""
    model = zoo.make("gpt2")

    class Scaled(type(model.transformer.h[1])):  # type: ignore[misc]
        def __call__(self, hidden: Tensor, *args: object, **kwargs: object) -> object:
            return super().__call__(hidden * 1.1, *args, **kwargs)

    model.transformer.h[1].__class__ = Scaled
    executor = SuffixExecutor(model, anatomy_of(model))
    run = Run(IDS, (swap(Site("block_output", 0, (2,))),))
    with pytest.raises(EngineError, match="block 1 does not start from what block 0 gives"):
        executor.logits([run])


def test_inputs_and_towers_are_refused() -> None:
    with pytest.raises(EngineError, match="token ids only"):
        suffix("gpt2").logits([Run(Inputs(torch.tensor(IDS)))])
    blip = zoo.make("blip")
    with pytest.raises(EngineError, match="one plain sequence"):
        SuffixExecutor(blip, anatomy_of(blip))
    with pytest.raises(EngineError, match="one plain sequence"):
        SuffixExecutor(nn.Linear(2, 2), Anatomy())


def test_a_head_that_is_no_linear_layer_gives_no_tokens() -> None:
    model = zoo.make("gpt2")

    class Head(nn.Linear):
        def forward(self, value: Tensor) -> Tensor:
            return super().forward(value).tanh()

    model.lm_head.__class__ = Head
    anatomy = anatomy_of(model)
    executor = SuffixExecutor(model, anatomy)
    whole = ReferenceExecutor(model, anatomy).logits([Run(IDS)])
    close(executor.logits([Run(IDS)]), whole)
    with pytest.raises(EngineError, match="not a plain linear layer"):
        executor.logits([Run(IDS)], (-1,), (3, 4))


def test_a_swap_is_the_swap_by_hand() -> None:
    """Once without the reference in between."""
    model, _ = made("gpt2")
    kept: list[Tensor] = []

    def keep(value: Tensor) -> None:
        kept.append(value)

    by_hand(model, "transformer.h.1.mlp", "output", keep, OTHER)

    def put(value: Tensor) -> Tensor:
        value[0, 3] = kept[0][0, 3]
        return value

    right = by_hand(model, "transformer.h.1.mlp", "output", put)
    got = suffix("gpt2").logits([Run(IDS, (swap(Site("mlp_output", 1, (3,))),))], None)
    close(got[0], right)
