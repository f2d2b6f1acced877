"""pyvene 0.1.8's faults, each found by running it, and that interv does not share them.

The oracle is `tests/raw_swap.py`: swaps by plain hooks, one prompt at a time.
"""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor, nn

from interv.engine import (
    BaseLambda,
    Edit,
    Executor,
    Inputs,
    ReferenceExecutor,
    Run,
    Site,
    SuffixExecutor,
    Vanilla,
    Zero,
    anatomy_of,
)
from interv.errors import EngineError, SpecError
from interv.plan import make_plan
from interv.spec import load_spec
from tests import raw_swap, zoo
from tests.conftest import PROMPT, SpecWriter

CLOSE = 1e-10  # in float64
NEAR = 1e-5  # of patterns, whose softmax is float32 in some families
BASE, SOURCE = tuple(zoo.ids(0)), tuple(zoo.ids(1))
ALL = range(len(BASE))


@pytest.fixture(params=["reference", "suffix"])
def make_executor(request: pytest.FixtureRequest) -> Callable[[nn.Module], Executor]:
    def make(model: nn.Module) -> Executor:
        if request.param == "reference":
            return ReferenceExecutor(model, anatomy_of(model))
        return SuffixExecutor(model, anatomy_of(model), 256)

    return make


def swap(
    component: str,
    layer: int,
    positions: Sequence[int] | None,
    heads: Sequence[int] | None = None,
    dims: Sequence[int] | None = None,
    base: tuple[int, ...] = BASE,
    source: tuple[int, ...] = SOURCE,
) -> Run:
    at, some, columns = (None if x is None else tuple(x) for x in (positions, heads, dims))
    return Run(base, (Edit(Site(component, layer, at, some, columns), Vanilla(), Run(source)),))


def raw(
    model: nn.Module,
    name: str,
    component: str,
    layer: int,
    positions: Sequence[int],
    heads: Sequence[int] | None = None,
    base: Sequence[int] = BASE,
    source: Sequence[int] = SOURCE,
) -> Tensor:
    """Logits `[pos, vocab]` of a swap by plain hooks."""
    rows = raw_swap.capture(model, name, component, layer, source)
    return raw_swap.swapped_logits(model, name, component, layer, base, rows, positions, heads)


def expect(found: Tensor, wanted: Tensor, plain: Tensor, close: float = CLOSE) -> None:
    """The logits are the wanted ones, and those are visibly not the plain ones."""
    assert float((found - wanted).abs().max()) <= close
    assert float((wanted - plain).abs().max()) > 1e-4, "the swap does nothing"


def plain_logits(model: nn.Module, ids: Sequence[int] = BASE) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model(input_ids=torch.tensor([list(ids)])).logits[0]
    return logits


def test_fault_1_positions_of_each_run_after_a_call_with_one_for_all(
    make_executor: Callable[[nn.Module], Executor],
) -> None:
    """After one call with an integer location, pyvene's later per-example locations silently
    are example 0's."""
    model = zoo.make("gpt2")
    executor = make_executor(model)
    others = tuple(zoo.ids(2)), tuple(zoo.ids(3))
    pairs = [(BASE, SOURCE), others, (SOURCE, BASE)]
    for places in ([3, 3, 3], [1, 4, 5], [2, 2, 2], [6, 0, 3]):
        runs = [
            swap("block_output", 1, [p], base=base, source=source)
            for p, (base, source) in zip(places, pairs, strict=True)
        ]
        logits = executor.logits(runs, None)
        for found, p, (base, source) in zip(logits, places, pairs, strict=True):
            wanted = raw(model, "gpt2", "block_output", 1, [p], base=base, source=source)
            expect(found, wanted, plain_logits(model, base))


def test_fault_2_dimensions_of_each_run_are_its_own(
    make_executor: Callable[[nn.Module], Executor],
) -> None:
    """pyvene gives every example the union of per-example subspaces of equal length."""
    model = zoo.make("llama")
    spaces = [[0, 1, 2], [3, 4, 5], [40, 7, 21]]
    logits = make_executor(model).logits(
        [swap("mlp_output", 1, [4], dims=dims) for dims in spaces], None
    )
    own = raw_swap.capture(model, "llama", "mlp_output", 1, BASE)
    source = raw_swap.capture(model, "llama", "mlp_output", 1, SOURCE)
    for found, dims in zip(logits, spaces, strict=True):
        mixed = own.clone()
        mixed[:, dims] = source[:, dims]
        wanted = raw_swap.swapped_logits(model, "llama", "mlp_output", 1, BASE, mixed, [4])
        expect(found, wanted, plain_logits(model))


@pytest.mark.parametrize("name", ["gemma", "gemma2", "gemma3_text", "qwen3"])
@pytest.mark.parametrize("component", ["query_output", "attention_value_output"])
def test_fault_3_heads_whose_widths_do_not_add_up_to_the_models(
    make_executor: Callable[[nn.Module], Executor], name: str, component: str
) -> None:
    """pyvene swaps only part of the vector where head_dim · heads is not the hidden size."""
    model = zoo.make(name)
    executor = make_executor(model)
    heads, width, hidden = 4, 16, 48
    assert heads * width != hidden == model.config.hidden_size
    by_head = f"head_{component}"
    logits = executor.logits(
        [
            swap(component, 1, [3]),
            swap(by_head, 1, [3], range(heads)),
            *(swap(by_head, 1, [3], [head]) for head in range(heads)),
        ],
        None,
    )
    plain = plain_logits(model)
    whole = raw(model, name, component, 1, [3])
    expect(logits[0], whole, plain)
    expect(logits[1], whole, plain)
    for head in range(heads):
        expect(logits[2 + head], raw(model, name, by_head, 1, [3], [head]), plain)
    [[state]] = executor.states([Run(BASE)], [Site(by_head, 1, (3,), (3,))])
    assert state.shape == (1, width)


@pytest.mark.parametrize("component", ["attention_input", "mlp_input"])
def test_fault_4_what_a_sub_layer_reads_is_not_the_residual_stream(
    make_executor: Callable[[nn.Module], Executor], component: str
) -> None:
    """pyvene writes in place; in OLMo 2 no norm stands before a sub-layer, so that its input is
    the residual stream's own tensor, and the stream changes too."""
    model = zoo.make("olmo2")
    executor = make_executor(model)
    run = swap(component, 1, [3])
    expect(
        executor.logits([run], None)[0], raw(model, "olmo2", component, 1, [3]), plain_logits(model)
    )


@pytest.mark.parametrize(
    ("stream", "reader"), [("block_input", "attention_input"), ("resid_mid", "mlp_input")]
)
def test_fault_4_the_stream_and_what_reads_it_in_one_call(
    make_executor: Callable[[nn.Module], Executor], stream: str, reader: str
) -> None:
    """The same, where both are edited or read: what is written to the stream is in the reader
    too, not the other way round."""
    model = zoo.make("olmo2")
    executor = make_executor(model)
    runs = [swap(stream, 1, [3]), swap(reader, 1, [3])]
    for found, component in zip(executor.logits(runs, None), (stream, reader), strict=True):
        expect(found, raw(model, "olmo2", component, 1, [3]), plain_logits(model))
    sites = [Site(stream, 1), Site(reader, 1)]
    [of_stream, own_stream], [of_reader, own_reader] = executor.states([runs[0], Run(BASE)], sites)
    assert torch.equal(of_stream, of_reader)
    assert not torch.equal(of_stream, own_stream)
    [after], [edited] = executor.states([runs[1]], sites)
    assert torch.equal(after, own_stream)
    assert not torch.equal(edited, own_reader)


def test_fault_5_a_misspelt_name_is_an_error(
    make_executor: Callable[[nn.Module], Executor], write_spec: SpecWriter
) -> None:
    """In pyvene a unit that is misspelt behaves as `pos`, a misspelt option is ignored
    (`noise_level` itself), a wrong component name gives `no attribute ''`."""
    model = zoo.make("llama")
    executor = make_executor(model)
    for site, message in (
        (Site("block_ouput", 1, (3,)), "did you mean 'block_output'"),
        (Site("mixer_output", 1, (3,)), "Llama models have no component 'mixer_output'"),
        (Site("model.layers[1].mpl.output", 0, (3,)), r"no module.*mpl.*has self_attn, mlp"),
        (Site("block_output", 3, (3,)), "no layer 3, there are 3"),
        (Site("block_output", 1, (7,)), "position 7 of 7"),
        (Site("block_output", 1, (3,), (0,)), "not divided into heads"),
        (Site("head_query_output", 1, (3,), (4,)), "head 4: there are 4"),
        (Site("block_output", 1, (3,), None, (48,)), "dimension 48: there are 48"),
    ):
        with pytest.raises(EngineError, match=message):
            executor.logits([Run(BASE, (Edit(site, Zero()),))])
    with pytest.raises(TypeError, match="unit"):
        Site("block_output", 1, unit="h.ops")  # type: ignore[call-arg]
    for sections, key in (
        ({"corrupt": {"type": "noise", "noise_level": 0.1}}, "noise_level"),
        ({"grid": {"component": "block_output", "unit": "pos"}}, "unit"),
        ({"grid": {"component": "block_output", "position": 1}}, "position"),
        ({"grid": {"component": "block_ouput"}}, "block_ouput"),
    ):
        with pytest.raises(SpecError, match=key):
            make_plan(load_spec(write_spec(**sections)))


@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma2", "gpt_oss", "gpt_neox", "opt"])
@pytest.mark.parametrize("attn", ["sdpa", "eager"])
def test_fault_6_a_pattern_that_is_swapped_is_another(
    make_executor: Callable[[nn.Module], Executor], name: str, attn: str
) -> None:
    """pyvene's attention_weight no longer fires: the swap is silently a no-op."""
    model = zoo.make(name, attn=attn)
    runs = [
        swap("attention_weight", 1, [5]),
        swap("attention_weight", 1, ALL, [2]),
        swap("attention_weight", 2, [3, 6], [0, 3]),
    ]
    logits = make_executor(model).logits(runs, None)
    plain = plain_logits(model)
    expect(logits[0], raw(model, name, "attention_weight", 1, [5]), plain, NEAR)
    expect(logits[1], raw(model, name, "attention_weight", 1, ALL, [2]), plain, NEAR)
    expect(logits[2], raw(model, name, "attention_weight", 2, [3, 6], [0, 3]), plain, NEAR)


@pytest.mark.parametrize("name", ["gptj", "gpt_neo", "bloom", "mamba"])
def test_fault_6_a_pattern_that_cannot_be_swapped_is_an_error(
    make_executor: Callable[[nn.Module], Executor], name: str
) -> None:
    """The same, where a family computes its attention by itself."""
    with pytest.raises(EngineError, match="no component 'attention_weight'"):
        make_executor(zoo.make(name)).logits([swap("attention_weight", 1, [3])])


@pytest.mark.parametrize(
    ("name", "component"),
    [("gpt2", "block_output"), ("llama", "mlp_activation"), ("phi3", "head_key_output")],
)
def test_fault_7_several_positions_are_read_in_their_order(
    make_executor: Callable[[nn.Module], Executor], name: str, component: str
) -> None:
    """pyvene's collect at several positions scrambles the values."""
    model = zoo.make(name)
    places = (5, 1, 6, 0)
    prompts = [BASE, SOURCE, tuple(zoo.ids(2, length=9))]
    heads = (1, 0) if component.startswith("head_") else None
    states = make_executor(model).states(
        [Run(ids) for ids in prompts], [Site(component, 1, places, heads), Site(component, 1)]
    )
    for ids, some, every in zip(prompts, *states, strict=True):
        rows = raw_swap.capture(model, name, component, 1, ids)
        picked = rows if heads is None else rows[:, list(heads)]
        assert torch.allclose(some, picked[list(places)].flatten(1), rtol=0, atol=CLOSE)
        assert torch.allclose(every, rows.flatten(1), rtol=0, atol=CLOSE)


@pytest.mark.parametrize("fails", [False, True])
def test_fault_8_model_hooks_and_lists_are_as_before(
    make_executor: Callable[[nn.Module], Executor], fails: bool
) -> None:
    """Each pyvene call removes all forward hooks of the model, the user's too; wrapping freezes
    it and puts it in evaluation mode; the caller's lists are changed."""
    model = zoo.make("llama")
    model.train().requires_grad_(True)
    model.model.layers[0].eval()
    seen: list[str] = []
    block = model.model.layers[2]
    block.register_forward_hook(lambda *_: seen.append("after"))
    block.register_forward_pre_hook(lambda *_: seen.append("before"))
    block.mlp.register_forward_hook(lambda *_: seen.append("inside"))

    def breaks(_base: Tensor) -> Tensor:
        raise ValueError("a function of the user's")

    runs = [
        swap("block_output", 1, [3]),
        swap("attention_weight", 1, [5]),
        swap("mlp_input", 0, [1]),
    ]
    if fails:
        runs.append(Run(BASE, (Edit(Site("mlp_output", 2, (4,)), BaseLambda(breaks)),)))
    at, tokens, sites = [-1, 2], [7, 3, 9], [Site("mlp_output", 1)]
    lists = copy.copy(runs), copy.copy(at), copy.copy(tokens), copy.copy(sites)

    def state() -> object:
        return [
            (
                name,
                module.training,
                list(module._forward_hooks),
                list(module._forward_pre_hooks),
                sorted(vars(module)),
            )
            for name, module in model.named_modules()
        ], [(p.requires_grad, p.grad, p.detach().sum().item()) for p in model.parameters()]

    before, implementation = state(), model.config._attn_implementation
    executor = make_executor(model)
    if isinstance(executor, SuffixExecutor):
        # It runs some positions only, and would show the hooks no more: it says so.
        with pytest.raises(EngineError, match=r"layers\.2 has hooks of somebody else's"):
            executor.logits(runs, at, tokens)
    elif fails:
        with pytest.raises(ValueError, match="of the user's"):
            executor.logits(runs, at, tokens)
    else:
        executor.logits(runs, at, tokens)
        executor.states(runs, sites)
    assert state() == before
    assert model.config._attn_implementation == implementation
    assert (runs, at, tokens, sites) == lists
    assert set(seen) == (
        set() if isinstance(executor, SuffixExecutor) else {"before", "inside", "after"}
    )
    seen.clear()
    model(input_ids=torch.tensor([BASE])).logits.sum().backward()
    assert seen == ["before", "inside", "after"]
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("fails", [False, True])
def test_fault_8_the_mode_of_a_model_without_hooks_is_as_before(
    make_executor: Callable[[nn.Module], Executor], fails: bool
) -> None:
    """The same, where the suffix executor runs too."""
    model = zoo.make("gpt2")
    model.train().requires_grad_(True)
    model.transformer.h[0].eval()

    def breaks(base: Tensor) -> Tensor:
        return base / fails

    run = Run(BASE, (Edit(Site("mlp_output", 1, (4,)), BaseLambda(breaks)),))

    def state() -> object:
        return [
            (name, m.training, list(m._forward_hooks), list(m._forward_pre_hooks), sorted(vars(m)))
            for name, m in model.named_modules()
        ]

    before = state()
    executor = make_executor(model)
    with pytest.raises(EngineError, match="not finite") if not fails else contextlib.nullcontext():
        executor.logits([run, swap("attention_weight", 1, [5])], None, [3, 4])
    assert state() == before
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    assert model.config._attn_implementation == "sdpa"


def test_fault_9_ragged_positions_and_prompts_in_one_call(
    make_executor: Callable[[nn.Module], Executor],
) -> None:
    """pyvene crashes on ragged locations (one example with two positions, another with one)."""
    model = zoo.make("llama")
    cells = [(BASE, [3]), (tuple(zoo.ids(2, length=9)), [1, 8]), (tuple(zoo.ids(3, 5)), [0, 2, 4])]
    source = tuple(zoo.ids(4, length=9))
    runs = [swap("mlp_output", 1, at, base=base, source=source) for base, at in cells]
    logits = make_executor(model).logits(runs, (-1, -3))
    for found, (base, at) in zip(logits, cells, strict=True):
        wanted = raw(model, "llama", "mlp_output", 1, at, base=base, source=source)
        expect(found, wanted[[-1, -3]], plain_logits(model, base)[[-1, -3]])


def test_fault_9_negative_positions_count_from_the_end_or_are_an_error(
    make_executor: Callable[[nn.Module], Executor], write_spec: SpecWriter
) -> None:
    """pyvene crashes on negative positions."""
    model = zoo.make("gpt2")
    prompts = [BASE, tuple(zoo.ids(2, length=9))]
    logits = make_executor(model).logits([Run(ids) for ids in prompts], (-2,))
    for found, ids in zip(logits, prompts, strict=True):
        assert torch.allclose(found, plain_logits(model, ids)[[-2]], rtol=0, atol=CLOSE)
    # A site may belong to runs of any length: it has no end to count from.
    with pytest.raises(EngineError, match=r"positions \(-1,\).*counted from 0"):
        Site("block_output", 1, (-1,))
    # A spec's are counted from each prompt's own.
    facts = [
        {"prompt": prompt, "subject": "Space", "answer": "Seattle"}
        for prompt in (PROMPT, f"In 1999 {PROMPT}")
    ]
    grid = {"component": "block_output", "positions": [-1], "layers": 0}
    plan = make_plan(load_spec(write_spec(data={"facts": facts}, grid=grid)))
    last = [len(plan.prompts[c.prompt].ids) - 1 for c in plan.cells]
    assert [c.position for c in plan.cells] == last
    assert len(set(last)) == 2


class Recurrent(nn.Module):
    """A GRU between two linear layers."""

    def __init__(self, batch_first: bool) -> None:
        super().__init__()
        self.embed = nn.Linear(3, 8)
        self.gru = nn.GRU(8, 8, batch_first=batch_first)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        """`x`: `[row, time, 3]`, or `[time, row, 3]`; likewise the result, 5 wide."""
        found: Tensor = self.head(self.gru(self.embed(x))[0])
        return found


@pytest.mark.parametrize("batch_dim", [0, 1])
def test_fault_9_several_rows_of_a_gru(batch_dim: int) -> None:
    """pyvene crashes on more than one example in a GRU. The suffix executor takes no such model."""
    torch.manual_seed(0)
    with torch.random.fork_rng(devices=[]):
        model = Recurrent(batch_first=batch_dim == 0).double().eval()
        rows = torch.randn(4, 6, 3, dtype=torch.float64)
    source = Run(Inputs(rows[3]))
    places = [(0,), (2, 4), (5,)]
    runs = [
        Run(Inputs(x), (Edit(Site("embed.output", 0, at), Vanilla(), source),))
        for x, at in zip(rows, places, strict=False)
    ]
    executor = ReferenceExecutor(model, batch_dim=batch_dim)
    together = executor.logits(runs)
    with torch.no_grad():
        for x, at, run, found in zip(rows, places, runs, together, strict=False):
            mixed = x.clone()
            mixed[list(at)] = rows[3, list(at)]
            wanted = model(mixed[None].movedim(0, batch_dim)).movedim(batch_dim, 0)[0]
            assert torch.allclose(found, wanted, rtol=0, atol=CLOSE)
            assert torch.allclose(executor.logits([run])[0], wanted, rtol=0, atol=CLOSE)
            assert not torch.allclose(
                found, model(x[None].movedim(0, batch_dim)).squeeze(batch_dim)
            )


def test_fault_9_a_cell_that_runs_at_each_step_is_an_error() -> None:
    """Which of its calls is meant cannot be said, so that none is changed silently."""

    class Steps(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cell = nn.GRUCell(3, 4)

        def forward(self, x: Tensor) -> Tensor:
            state = torch.zeros(len(x), 4)
            for step in x.unbind(1):
                state = self.cell(step, state)
            return state

    run = Run(Inputs(torch.ones(6, 3)), (Edit(Site("cell.output"), Zero()),))
    with pytest.raises(EngineError, match="fired 6 times"):
        ReferenceExecutor(Steps()).logits([run])


def test_fault_9_serial_swaps_with_other_edits_beside_them(
    make_executor: Callable[[nn.Module], Executor],
) -> None:
    """pyvene crashes on serial interventions in groups. Here a source that has two edits from
    two sources is read in two places, beside a third edit."""
    model = zoo.make("gpt2")
    third = tuple(zoo.ids(2))
    middle = Run(
        SOURCE,
        (
            Edit(Site("mlp_output", 0, (1,)), Vanilla(), Run(third)),
            Edit(Site("block_output", 0, (4,)), Vanilla(), Run(BASE)),
        ),
    )
    run = Run(
        BASE,
        (
            Edit(Site("block_output", 1, (5,)), Vanilla(), middle),
            Edit(Site("attention_output", 2, (6,)), Vanilla(), middle),
            Edit(Site("block_input", 1, (2,)), Vanilla(), Run(third)),
        ),
    )
    blocks = model.transformer.h

    def forward(ids: Sequence[int], writes: Sequence[tuple[nn.Module, str, int, Tensor]],
                reads: Sequence[nn.Module] = ()) -> tuple[Tensor, list[Tensor]]:  # fmt: skip
        """Plain hooks: rows written into modules' outputs, and outputs read."""
        kept: dict[int, Tensor] = {}

        def writing(at: int, row: Tensor) -> Callable[..., object]:
            def hook(_module: nn.Module, _args: object, output: object) -> object:
                value = (output[0] if isinstance(output, tuple) else output).clone()
                value[0, at] = row
                return (value, *output[1:]) if isinstance(output, tuple) else value

            return hook

        def entering(at: int, row: Tensor) -> Callable[..., object]:
            def hook(_module: nn.Module, args: tuple[Tensor, ...]) -> object:
                value = args[0].clone()
                value[0, at] = row
                return (value, *args[1:])

            return hook

        def reading(i: int) -> Callable[..., None]:
            def hook(_module: nn.Module, _args: object, output: object) -> None:
                kept[i] = (output[0] if isinstance(output, tuple) else output)[0].clone()

            return hook

        handles = [
            module.register_forward_hook(writing(at, row))
            if side == "out"
            else module.register_forward_pre_hook(entering(at, row))
            for module, side, at, row in writes
        ]
        handles += [m.register_forward_hook(reading(i)) for i, m in enumerate(reads)]
        logits = plain_logits(model, ids)
        for handle in handles:
            handle.remove()
        return logits, [kept[i] for i in range(len(reads))]

    _, [of_third, enters] = forward(third, [], [blocks[0].mlp, blocks[0]])
    _, [of_base] = forward(BASE, [], [blocks[0]])
    inside = [(blocks[0].mlp, "out", 1, of_third[1]), (blocks[0], "out", 4, of_base[4])]
    _, [state, attention] = forward(SOURCE, inside, [blocks[1], blocks[2].attn])
    wanted, _ = forward(
        BASE,
        [
            (blocks[1], "out", 5, state[5]),
            (blocks[2].attn, "out", 6, attention[6]),
            (blocks[1], "in", 2, enters[2]),
        ],
    )
    expect(make_executor(model).logits([run], None)[0], wanted, plain_logits(model))


@pytest.mark.parametrize("name", ["qwen2", "olmo", "qwen3", "falcon", "falcon_mq", "phi3"])
@pytest.mark.parametrize("component", ["head_key_output", "head_value_output"])
def test_fault_10_heads_of_shared_keys_and_values(
    make_executor: Callable[[nn.Module], Executor], name: str, component: str
) -> None:
    """With grouped queries pyvene's head components of keys and values crash or are wrong."""
    model = zoo.make(name)
    count = raw_swap.head_count(name, component) or 0
    executor = make_executor(model)
    assert count < 4 == anatomy_of(model).n_units("head_query_output")
    logits = executor.logits([swap(component, 1, [2, 4], [h]) for h in range(count)], None)
    for head in range(count):
        wanted = raw(model, name, component, 1, [2, 4], [head])
        expect(logits[head], wanted, plain_logits(model))
    with pytest.raises(EngineError, match=f"head {count}: there are {count}"):
        executor.logits([swap(component, 1, [2], [count])])


class Counter:
    """Counts a GPT-2's forwards, and the tokens that go through its second block."""

    def __init__(self, model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
        self.forwards = self.tokens = 0
        whole, norm = type(model).forward, nn.LayerNorm.forward

        @functools.wraps(whole)
        def forward(module: nn.Module, *args: object, **kwargs: object) -> object:
            self.forwards += 1
            return whole(module, *args, **kwargs)

        def normalise(module: nn.LayerNorm, value: Tensor) -> Tensor:
            if module is model.transformer.h[1].ln_1:
                self.tokens += value.shape[0] * value.shape[1]
            return norm(module, value)

        # No hooks: the suffix executor refuses them.
        monkeypatch.setattr(type(model), "forward", forward)
        monkeypatch.setattr(nn.LayerNorm, "forward", normalise)


def test_fault_11_a_source_is_run_once(
    make_executor: Callable[[nn.Module], Executor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """pyvene recomputes everything: 12 sites from one source take 13 forwards."""
    model = zoo.make("gpt2")
    counter = Counter(model, monkeypatch)
    executor = make_executor(model)
    components = ("block_output", "mlp_output", "attention_output", "mlp_input")
    runs = [swap(component, layer, [3]) for component in components for layer in range(3)]
    executor.logits([Run(BASE, tuple(run.edits[0] for run in runs))])
    # The source and the swap; and the base, from which the suffix executor goes on.
    fast = isinstance(executor, SuffixExecutor)
    assert counter.forwards <= (3 if fast else 2)
    assert counter.tokens == (7 + 7 + 4 if fast else 7 + 7)
    executor.logits(runs)
    assert counter.forwards <= (4 if fast else 3)
    if fast:
        # Only those that change something before it, and only from the changed position on.
        before = sum(run.edits[0].site.layer == 0 for run in runs)
        inside = sum(run.edits[0].site.layer == 1 for run in runs)
        assert counter.tokens <= 7 + 7 + 4 + 4 * (before + inside)


def test_fault_11_a_sweep_of_path_patching(
    make_executor: Callable[[nn.Module], Executor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """pyvene runs three full forwards for each prompt and head: here 48 of them."""
    model = zoo.make("gpt2")
    prompts = [(BASE, SOURCE), (tuple(zoo.ids(2)), tuple(zoo.ids(3)))]

    def path(base: tuple[int, ...], source: tuple[int, ...], layer: int, head: int) -> Run:
        """From a head to the queries of the last layer, what is between them held."""
        site = Site("head_attention_value_output", layer, None, (head,))
        holds = [
            Edit(Site(component, i), Vanilla(), Run(base))
            for i in range(layer, 2)
            for component in ("attention_output", "mlp_output")
            if i > layer or component == "mlp_output"
        ]
        sender = Run(base, (Edit(site, Vanilla(), Run(source)), *holds))
        return Run(base, (Edit(Site("query_output", 2), Vanilla(), sender),))

    runs = [path(*pair, i, h) for pair in prompts for i in (0, 1) for h in range(4)]
    counter = Counter(model, monkeypatch)
    logits = make_executor(model).logits(runs, None)
    assert counter.forwards <= 6
    monkeypatch.undo()
    plain = executor_free(runs, model)
    assert float((logits - plain).abs().max()) <= CLOSE
    own = torch.stack([plain_logits(model, run.ids) for run in runs])
    assert int(((plain - own).abs().amax((1, 2)) > 1e-5).sum()) == len(runs)


def executor_free(runs: Sequence[Run], model: nn.Module) -> Tensor:
    """Those path patches, by plain hooks, three forwards each: `[run, pos, vocab]`."""
    found = []
    for run in runs:
        [receive] = run.edits
        assert receive.source is not None
        head, *holds = receive.source.edits
        assert head.source is not None and head.site.heads is not None
        width, layer = 12, head.site.layer
        columns = slice(head.site.heads[0] * width, (head.site.heads[0] + 1) * width)
        blocks = model.transformer.h
        value = raw_swap.capture(model, "gpt2", "attention_value_output", layer, head.source.ids)
        held = {
            (edit.site.component, edit.site.layer): raw_swap.capture(
                model, "gpt2", edit.site.component, edit.site.layer, run.ids
            )
            for edit in holds
        }

        def put(_module: nn.Module, args: tuple[Tensor], value: Tensor = value,
                columns: slice = columns) -> object:  # fmt: skip
            new = args[0].clone()
            new[0, :, columns] = value[:, columns]
            return (new,)

        def hold(rows: Tensor) -> Callable[..., object]:
            def hook(_module: nn.Module, _args: object, output: object) -> object:
                new = rows[None]
                return (new, *output[1:]) if isinstance(output, tuple) else new

            return hook

        handles = [blocks[layer].attn.c_proj.register_forward_pre_hook(put)]
        for (component, i), rows in held.items():
            module = blocks[i].attn if component == "attention_output" else blocks[i].mlp
            handles.append(module.register_forward_hook(hold(rows)))
        queries = raw_swap.capture(model, "gpt2", "query_output", 2, run.ids)
        for handle in handles:
            handle.remove()
        found.append(
            raw_swap.swapped_logits(model, "gpt2", "query_output", 2, run.ids, queries, ALL)
        )
    return torch.stack(found)
