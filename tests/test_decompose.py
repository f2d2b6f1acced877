"""Direct logit attribution and the logit lens, against sums written out by hand."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache, partial

import pytest
import torch
from torch import Tensor, nn

import interv.engine.decompose
from interv.engine import Edit, Inputs, ReferenceExecutor, Run, Scale, Site, Vanilla, Zero
from interv.engine import anatomy_of as anatomy
from interv.engine.decompose import Part, logit_attributions, logit_lens
from interv.errors import EngineError
from tests import zoo

IDS, OTHER, SHORT = tuple(zoo.ids(0)), tuple(zoo.ids(1)), tuple(zoo.ids(2, 5))
RUNS = [Run(IDS), Run(SHORT), Run(OTHER)]
POSITIONS = [-1, 2, 3]
RIGHT, WRONG = [[7, 8], [7], [11]], [[9], [3, 4], []]

EXACT = ("gpt2", "gpt_neox", "gpt_neox_serial", "opt", "falcon", "falcon_mq", "bloom", "phi")
ROUNDED = ("llama", "gemma", "gemma3_text", "olmo", "olmo2", "gptj", "phi3", "gpt_oss")
"""What is float32 inside, whatever the model's dtype is: the norms, or GPT-J's attention."""


@cache
def made(name: str) -> nn.Module:
    return zoo.make(name)


def reference(name: str) -> ReferenceExecutor:
    return ReferenceExecutor(made(name), anatomy(made(name)))


def model_logits(model: nn.Module, runs: Sequence[Run], positions: Sequence[int]) -> Tensor:
    """`[run, vocab]`, one run at a time."""
    return torch.stack(
        [
            model(torch.tensor([run.ids]), use_cache=False).logits[0, position]
            for run, position in zip(runs, positions, strict=True)
        ]
    )


def differences(logits: Tensor) -> Tensor:
    return torch.stack(
        [
            one[right].mean() - (one[wrong].mean() if wrong else 0)
            for one, right, wrong in zip(logits, RIGHT, WRONG, strict=True)
        ]
    )


def attributed(name: str, runs: Sequence[Run] = RUNS) -> tuple[list[Part], Tensor]:
    return logit_attributions(reference(name), made(name), runs, POSITIONS, RIGHT, WRONG)


@pytest.mark.parametrize("family", EXACT + ROUNDED)
def test_the_parts_sum_to_the_logit_difference(family: str) -> None:
    parts, shares = attributed(family)
    assert shares.dtype == torch.float64 and shares.shape == (len(parts), len(RUNS))
    assert len(set(parts)) == len(parts)
    truth = differences(model_logits(made(family), RUNS, POSITIONS))
    within = 1e-9 if family in EXACT else 5e-6
    torch.testing.assert_close(shares.sum(0), truth, rtol=within, atol=within)
    # Nothing is a remainder: each kind of part has its share.
    assert all(float(row.abs().max()) > 1e-5 for row, part in zip(shares, parts, strict=True)), (
        parts
    )


@pytest.mark.parametrize("family", ["gpt2", "llama", "olmo2"])
def test_they_do_in_float32(family: str) -> None:
    model = zoo.make(family).float()
    executor = ReferenceExecutor(model, anatomy(model))
    parts, shares = logit_attributions(executor, model, RUNS, POSITIONS, RIGHT, WRONG)
    wide_parts, wide = attributed(family)
    assert parts == wide_parts
    torch.testing.assert_close(shares, wide, rtol=1e-4, atol=1e-5)
    truth = differences(model_logits(model, RUNS, POSITIONS)).double()
    torch.testing.assert_close(shares.sum(0), truth, rtol=1e-4, atol=1e-5)


def test_a_bias_before_a_norm_behind_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(zoo.CONFIGS, "biased", {**zoo.CONFIGS["olmo2"], "attention_bias": True})
    model = zoo.make("biased")
    executor = ReferenceExecutor(model, anatomy(model))
    parts, shares = logit_attributions(executor, model, RUNS, POSITIONS, RIGHT, WRONG)
    truth = differences(model_logits(model, RUNS, POSITIONS))
    torch.testing.assert_close(shares.sum(0), truth, rtol=5e-6, atol=5e-6)
    biases = [parts.index(Part("attention_bias", layer)) for layer in range(zoo.LAYERS)]
    assert float(shares[biases].abs().min()) > 1e-4


def test_the_parts_of_a_model_with_biases() -> None:
    parts, _ = attributed("gpt2")
    assert parts == [
        Part("embedding"),
        *(
            part
            for layer in range(zoo.LAYERS)
            for part in (
                *(Part("head", layer, head) for head in range(4)),
                Part("attention_bias", layer),
                Part("mlp", layer),
            )
        ),
        Part("unembedding_bias"),
    ]


def test_the_parts_of_a_model_without() -> None:
    parts, _ = attributed("llama")
    assert {part.component for part in parts} == {"embedding", "head", "mlp"}


def recorded(model: nn.Module, paths: Sequence[tuple[str, str]]) -> dict[str, Tensor]:
    """Sides of modules `[pos, width]` in a run of `IDS`, with plain hooks."""
    seen: dict[str, Tensor] = {}
    handles = []
    for path, side in paths:
        module = model.get_submodule(path)

        def keep(_module: nn.Module, args: tuple[Tensor], out: object, *, at: str) -> None:
            value = args[0] if at.endswith("in") else out[0] if isinstance(out, tuple) else out
            seen[at] = value[0].clone()

        handles.append(module.register_forward_hook(partial(keep, at=path + side)))
    model(torch.tensor([IDS]), use_cache=False)
    for handle in handles:
        handle.remove()
    return seen


def by_hand(family: str, against: int | None = 9) -> dict[Part, float]:
    """Shares of logit 7 at the last position, each part normed by itself.

    Less logit 9, or, with None, less the mean over the vocabulary.
    """
    model = made(family)
    gpt2 = family == "gpt2"
    blocks = "transformer.h" if gpt2 else "model.layers"
    project = f"{blocks}.{{}}.attn.c_proj" if gpt2 else f"{blocks}.{{}}.self_attn.o_proj"
    norm = "transformer.ln_f" if gpt2 else "model.norm"
    behind = f"{blocks}.{{}}.post_attention_layernorm"
    mlp = f"{blocks}.{{}}.post_feedforward_layernorm" if family == "olmo2" else f"{blocks}.{{}}.mlp"
    paths = [(norm, "in"), *((project.format(k), "in") for k in range(zoo.LAYERS))]
    paths += [(mlp.format(k), "out") for k in range(zoo.LAYERS)]
    if family == "olmo2":
        paths += [(behind.format(k), "in") for k in range(zoo.LAYERS)]
    seen = recorded(model, paths)
    end = seen[norm + "in"][-1]
    final = model.get_submodule(norm)
    rows = model.lm_head.weight
    towards = rows[7] - (rows.mean(0) if against is None else rows[against])

    def share(written: Tensor) -> float:
        if gpt2:
            spread = (end.var(unbiased=False) + final.eps).sqrt()
            return float(((written - written.mean()) / spread * final.weight) @ towards)
        spread = (end.square().mean() + final.variance_epsilon).sqrt()
        return float((written / spread * final.weight) @ towards)

    found = {}
    for layer in range(zoo.LAYERS):
        linear = model.get_submodule(project.format(layer))
        value = seen[project.format(layer) + "in"][-1]
        weight = linear.weight if gpt2 else linear.weight.T
        width = len(value) // 4
        for head in range(4):
            some = slice(head * width, (head + 1) * width)
            written = value[some] @ weight[some]
            if family == "olmo2":
                after = model.get_submodule(behind.format(layer))
                got = seen[behind.format(layer) + "in"][-1]
                scale = (got.square().mean() + after.variance_epsilon).sqrt()
                written = written / scale * after.weight
            found[Part("head", layer, head)] = share(written)
        if gpt2:
            found[Part("attention_bias", layer)] = share(linear.bias)
        found[Part("mlp", layer)] = share(seen[mlp.format(layer) + "out"][-1])
    if gpt2:
        found[Part("unembedding_bias")] = float(final.bias @ towards)
        start = model.transformer.wte.weight[IDS[-1]] + model.transformer.wpe.weight[len(IDS) - 1]
    else:
        start = model.model.embed_tokens.weight[IDS[-1]]
    found[Part("embedding")] = share(start)
    return found


@pytest.mark.parametrize("family", ["gpt2", "llama", "olmo2"])
def test_each_part_by_hand(family: str) -> None:
    parts, shares = logit_attributions(
        reference(family), made(family), [Run(IDS)], [-1], [[7]], [[9]]
    )
    expected = by_hand(family)
    assert set(parts) == set(expected)
    within = 1e-9 if family == "gpt2" else 1e-6
    for part, share in zip(parts, shares[:, 0].tolist(), strict=True):
        assert share == pytest.approx(expected[part], rel=within, abs=within), part


@pytest.mark.parametrize("family", ["gpt2", "llama", "olmo2"])
def test_a_logit_less_the_mean_over_the_vocabulary(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As TransformerLens' centred unembedding has it: what all logits share is nobody's."""
    monkeypatch.setattr(interv.engine.decompose, "_MAX_ROWS", 7)
    given = reference(family), made(family), [Run(IDS)], [-1], [[7]]
    parts, shares = logit_attributions(*given, [[]], centred=True)
    expected = by_hand(family, None)
    assert set(parts) == set(expected)
    within = 1e-9 if family == "gpt2" else 1e-6
    for part, share in zip(parts, shares[:, 0].tolist(), strict=True):
        assert share == pytest.approx(expected[part], rel=within, abs=within), part
    _, raw = logit_attributions(*given, [[]])
    assert (raw - shares).abs().max() > 0.01
    # Of a difference it is the difference.
    one, other = (logit_attributions(*given, [[9]], centred=c)[1] for c in (True, False))
    assert torch.equal(one, other)


def test_runs_in_any_order_and_batches_of_any_size(monkeypatch: pytest.MonkeyPatch) -> None:
    parts, shares = attributed("gpt2")
    monkeypatch.setattr(interv.engine.decompose, "_MAX_TOKENS", 1)
    for i, run in enumerate(RUNS):
        again, alone = logit_attributions(
            reference("gpt2"),
            made("gpt2"),
            [run],
            POSITIONS[i : i + 1],
            RIGHT[i : i + 1],
            WRONG[i : i + 1],
        )
        assert again == parts
        torch.testing.assert_close(alone[:, 0], shares[:, i], rtol=1e-9, atol=1e-9)


def test_edits_of_heads_and_patterns_are_in_their_shares() -> None:
    zeroed = Run(IDS, (Edit(Site("head_attention_value_output", 1, heads=(2,)), Zero()),))
    pattern = Run(IDS, (Edit(Site("attention_weight", 0, heads=(1,)), Vanilla(), Run(OTHER)),))
    runs = [zeroed, pattern]
    parts, shares = logit_attributions(
        reference("gpt2"), made("gpt2"), runs, [-1] * 2, [[7]] * 2, [[9]] * 2
    )
    assert float(shares[parts.index(Part("head", 1, 2)), 0]) == 0
    logits = reference("gpt2").logits(runs)[:, 0]
    torch.testing.assert_close(shares.sum(0), logits[:, 7] - logits[:, 9], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("family", "said"),
    [
        ("gemma2", "capped or scaled"),
        ("cohere", "capped or scaled"),
        ("granite", "what blocks add is scaled"),
        ("mamba", "no component 'attention_value_output'"),
        ("bert", "no component 'final_norm'"),
        ("esm", "EsmLMHead is no linear map"),
        ("blip", "one list of blocks"),
    ],
)
def test_models_that_are_no_such_sum_are_refused(family: str, said: str) -> None:
    with pytest.raises(EngineError, match=said):
        attributed(family)


@pytest.mark.parametrize(
    ("site", "said"),
    [
        (Site("block_output", 1, (4, 2, 3)), "an edit changes the stream itself"),
        (Site("resid_mid", 0), "an edit changes the stream itself"),
        (Site("final_norm"), "edited behind the blocks"),
        (Site("logits"), "edited behind the blocks"),
    ],
    ids=lambda value: getattr(value, "component", ""),
)
def test_edits_that_are_no_part_are_refused(site: Site, said: str) -> None:
    runs = [Run(run.ids, (Edit(site, Scale(0.7)),)) for run in RUNS]
    with pytest.raises(EngineError, match=said):
        attributed("gpt2", runs)


class Bent(nn.Module):
    """Not linear but for its scale."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, given: Tensor) -> Tensor:
        normed = self.norm(given)
        return normed + 0.01 * normed.square()


def test_a_norm_of_another_form_is_refused() -> None:
    model = zoo.make("gpt2")
    model.transformer.ln_f = Bent(model.transformer.ln_f)
    executor = ReferenceExecutor(model, anatomy(model))
    with pytest.raises(EngineError, match=r"transformer.ln_f: Bent is not a weight times"):
        logit_attributions(executor, model, RUNS, POSITIONS, RIGHT, WRONG)


def test_a_projection_of_another_form_is_refused() -> None:
    model = zoo.make("gpt2")
    model.transformer.h[1].attn.c_proj = Bent(model.transformer.h[1].attn.c_proj)
    executor = ReferenceExecutor(model, anatomy(model))
    with pytest.raises(EngineError, match=r"h.1.attn.c_proj: Bent is no linear map"):
        logit_attributions(executor, model, RUNS, POSITIONS, RIGHT, WRONG)


def test_low_precision_is_refused() -> None:
    model = zoo.make("gpt2").bfloat16()
    executor = ReferenceExecutor(model, anatomy(model))
    with pytest.raises(EngineError, match=r"float32 or float64, not torch.bfloat16"):
        logit_attributions(executor, model, RUNS, POSITIONS, RIGHT, WRONG)


@pytest.mark.parametrize(
    ("said", "runs", "positions", "right", "wrong"),
    [
        ("no runs", [], [], [], []),
        ("2 positions for 3", RUNS, [-1, -1], RIGHT, WRONG),
        ("position 7 of a run of 7", RUNS, [7, 0, 0], RIGHT, WRONG),
        ("2 right and 3 wrong", RUNS, POSITIONS, RIGHT[:2], WRONG),
        ("without a right token", RUNS, POSITIONS, [[7], [], [8]], WRONG),
        ("token 100: there are 100", RUNS, POSITIONS, [[7], [100], [8]], WRONG),
        ("token -1", RUNS, POSITIONS, RIGHT, [[7], [-1], [8]]),
        ("of tokens only", [Run(Inputs(torch.zeros(3)))], [0], [[1]], [[2]]),
    ],
)
def test_what_does_not_fit_the_runs_is_an_error(
    said: str,
    runs: list[Run],
    positions: list[int],
    right: list[list[int]],
    wrong: list[list[int]],
) -> None:
    with pytest.raises(EngineError, match=said):
        logit_attributions(reference("gpt2"), made("gpt2"), runs, positions, right, wrong)


@pytest.mark.parametrize(
    "family", [*EXACT, *ROUNDED, "gemma2", "cohere", "granite", "mamba", "bert"]
)
def test_the_last_row_of_the_lens_is_the_models_logits(family: str) -> None:
    lens = logit_lens(reference(family), made(family), RUNS, POSITIONS)
    assert lens.shape == (zoo.LAYERS + 1, len(RUNS), zoo.VOCAB)
    truth = model_logits(made(family), RUNS, POSITIONS)
    within = 5e-6 if family in ("gptj", "gemma2") else 1e-9
    torch.testing.assert_close(lens[-1], truth, rtol=within, atol=within)
    assert all(float((lens[layer] - lens[-1]).abs().max()) > 1e-2 for layer in range(zoo.LAYERS))


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_each_row_of_the_lens_by_hand(family: str) -> None:
    model = made(family)
    path = "transformer.h" if family == "gpt2" else "model.layers"
    norm = model.transformer.ln_f if family == "gpt2" else model.model.norm
    seen = recorded(
        model, [(f"{path}.0", "in"), *((f"{path}.{layer}", "out") for layer in range(zoo.LAYERS))]
    )
    streams = [seen[f"{path}.0in"], *(seen[f"{path}.{layer}out"] for layer in range(zoo.LAYERS))]
    lens = logit_lens(reference(family), model, [Run(IDS)], [3])
    for row, stream in zip(lens[:, 0], streams, strict=True):
        torch.testing.assert_close(row, model.lm_head(norm(stream[3:4]))[0], rtol=1e-9, atol=1e-9)


def test_the_lens_gives_columns_for_tokens() -> None:
    tokens = [[3, 4], [9, 9], [1, 0]]
    lens = logit_lens(reference("gpt2"), made("gpt2"), RUNS, POSITIONS)
    some = logit_lens(reference("gpt2"), made("gpt2"), RUNS, POSITIONS, tokens)
    assert some.shape == (zoo.LAYERS + 1, 3, 2)
    for i, wanted in enumerate(tokens):
        torch.testing.assert_close(some[:, i], lens[:, i, wanted], rtol=0, atol=0)


def test_the_lens_of_runs_with_edits() -> None:
    swap = Edit(Site("block_output", 1, (2,)), Vanilla(), Run(OTHER))
    behind = Edit(Site("final_norm"), Scale(2.0))
    runs = [Run(IDS, (swap,)), Run(IDS, (behind, swap))]
    lens = logit_lens(reference("gpt2"), made("gpt2"), runs, [-1, -1])
    torch.testing.assert_close(lens[-1], reference("gpt2").logits(runs)[:, 0], rtol=1e-9, atol=1e-9)
    plain = logit_lens(reference("gpt2"), made("gpt2"), [Run(IDS)], [-1])[:, 0]
    torch.testing.assert_close(lens[:3, 0], plain[:3], rtol=1e-9, atol=1e-9)
    assert float((lens[3, 0] - plain[3]).abs().max()) > 1e-3
    torch.testing.assert_close(lens[:, 1], 2 * lens[:, 0], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("family", "said", "runs", "tokens"),
    [
        ("blip", "one list of blocks", [Run(IDS)], None),
        ("gpt2", "for each as many", RUNS, [[1], [2], [3, 4]]),
        ("gpt2", "for each as many", RUNS, [[1], [2]]),
        ("gpt2", "token 100", RUNS, [[1], [2], [100]]),
        (
            "gpt2",
            "cannot tell",
            [Run(IDS, (Edit(Site("transformer.wpe.output"), Scale(0.5)),))],
            None,
        ),
    ],
)
def test_what_the_lens_cannot_show_is_an_error(
    family: str, said: str, runs: list[Run], tokens: list[list[int]] | None
) -> None:
    with pytest.raises(EngineError, match=said):
        logit_lens(reference(family), made(family), runs, [-1] * len(runs), tokens)


@pytest.mark.parametrize("call", [logit_attributions, logit_lens])
def test_the_model_is_left_as_found(call: Callable[..., object]) -> None:
    model = zoo.make("gpt2")
    model.transformer.h[1].mlp.train()
    heard = []
    model.transformer.ln_f.register_forward_hook(lambda *_: heard.append(1))
    weights = {key: value.clone() for key, value in model.state_dict().items()}
    modes = [module.training for module in model.modules()]

    def hooks() -> list[int]:
        return [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]

    before = hooks()
    executor = ReferenceExecutor(model, anatomy(model))
    further = () if call is logit_lens else (RIGHT, WRONG)
    call(executor, model, RUNS, POSITIONS, *further)
    assert hooks() == before and heard and not executor.kept
    assert modes == [module.training for module in model.modules()]
    assert all(torch.equal(weights[key], value) for key, value in model.state_dict().items())
