"""Where components stand: columns of each layout by hand, paths, layers, and what is refused."""

from __future__ import annotations

from functools import cache

import pytest

from interv.engine import anatomy_of
from interv.errors import EngineError
from interv.models.anatomy import Anatomy, Place, as_path, is_by_head
from interv.models.config import read_facts
from interv.models.families import BY_MODEL_TYPE, FAMILIES
from tests import raw_swap, zoo


@cache
def anatomy(name: str) -> Anatomy:
    """Of a model of the zoo, without making it."""
    config = zoo.config(name).to_dict()  # type: ignore[attr-defined]
    facts = read_facts(config, name)
    return Anatomy(facts.family, facts, config)


TABLE = tuple(name for name in zoo.CONFIGS if name not in zoo.RECOGNISED)
HEADS = ("query", "key", "value")


def span(start: int, width: int) -> tuple[int, ...]:
    return tuple(range(start, start + width))


# Columns. Each layout written out: (model, component, head, first column), heads 12 wide.
LAYOUTS = [
    # One after the other: 4 queries of 12, then 4 keys, then 4 values.
    ("gpt2", "query", 0, 0),
    ("gpt2", "query", 3, 36),
    ("gpt2", "key", 0, 48),
    ("gpt2", "key", 2, 72),
    ("gpt2", "value", 0, 96),
    ("gpt2", "value", 3, 132),
    # The same with two keys and values.
    ("phi3", "query", 3, 36),
    ("phi3", "key", 0, 48),
    ("phi3", "key", 1, 60),
    ("phi3", "value", 0, 72),
    ("phi3", "value", 1, 84),
    # For each head its query, its key, its value.
    ("bloom", "query", 0, 0),
    ("bloom", "key", 0, 12),
    ("bloom", "value", 0, 24),
    ("bloom", "query", 1, 36),
    ("bloom", "value", 3, 132),
    ("falcon_alibi", "query", 2, 72),
    ("falcon_alibi", "key", 2, 84),
    ("falcon_alibi", "value", 2, 96),
    # For each of two key heads: two queries, a key, a value.
    ("falcon", "query", 0, 0),
    ("falcon", "query", 1, 12),
    ("falcon", "key", 0, 24),
    ("falcon", "value", 0, 36),
    ("falcon", "query", 2, 48),
    ("falcon", "query", 3, 60),
    ("falcon", "key", 1, 72),
    ("falcon", "value", 1, 84),
    # One key and value for all four queries.
    ("falcon_mq", "query", 3, 36),
    ("falcon_mq", "key", 0, 48),
    ("falcon_mq", "value", 0, 60),
    # Projections of their own.
    ("llama", "query", 3, 36),
    ("llama", "key", 1, 12),
    ("llama", "value", 1, 12),
]


@pytest.mark.parametrize(("name", "part", "head", "start"), LAYOUTS)
def test_a_heads_columns(name: str, part: str, head: int, start: int) -> None:
    component = f"head_{part}_output"
    found = anatomy(name).columns(component, (head,), None)
    assert found == span(start, 12)
    # Some of the head's own, in the order that was asked for.
    assert anatomy(name).columns(component, (head,), (7, 0, 11)) == (start + 7, start, start + 11)
    # The same as the component counts them, head after head.
    flat = anatomy(name).columns(f"{part}_output", None, (12 * head + 5,))
    assert flat == (start + 5,)


def test_columns_in_interleaved_heads_of_another_width() -> None:
    """NeoX with heads 16 wide."""
    neox = anatomy("gpt_neox")
    assert neox.columns("head_query_output", (1,), None) == span(48, 16)
    assert neox.columns("head_key_output", (1,), None) == span(64, 16)
    assert neox.columns("head_value_output", (3, 0), None) == span(176, 16) + span(32, 16)


def test_heads_need_not_fill_the_model() -> None:
    """Heads of 16, four of them in a model of 48."""
    for name in ("qwen3", "gemma2", "gpt_oss"):
        assert anatomy(name).width("query_output") == 64
        assert anatomy(name).width("key_output") == 32
        assert anatomy(name).width("attention_value_output") == 64
        assert anatomy(name).columns("head_attention_value_output", (3,), None) == span(48, 16)
        assert anatomy(name).width("attention_output") == 48


def test_several_heads_stand_in_the_order_asked_for() -> None:
    gpt2 = anatomy("gpt2")
    assert gpt2.columns("head_key_output", (2, 0), None) == span(72, 12) + span(48, 12)
    assert gpt2.columns("head_key_output", (2, 0), (3, 1)) == (75, 73, 51, 49)
    assert gpt2.columns("query_output", (1,), (0,)) == (12,)


@pytest.mark.parametrize("name", [n for n in TABLE if n not in zoo.VISION])
def test_all_columns_are_the_oracles(name: str) -> None:
    """Which wrote them out by hand in another way."""
    stack = raw_swap.STACKS[name]
    checked = 0
    for component in anatomy(name).components:
        if not component.startswith("head_"):
            continue
        for head, right in enumerate(stack.at[component].columns or ()):
            assert anatomy(name).columns(component, (head,), None) == tuple(right)
            checked += 1
        units = anatomy(name).n_units(component)
        assert units == raw_swap.head_count(name, component)
    assert checked or name == "mamba"


@pytest.mark.parametrize("name", ["gpt2", "phi3", "bloom", "falcon", "falcon_mq", "gpt_neox"])
def test_fused_columns_are_each_there_once(name: str) -> None:
    found: list[int] = []
    for part in HEADS:
        columns = anatomy(name).columns(f"{part}_output", None, None)
        assert columns is not None
        units = anatomy(name).n_units(f"{part}_output")
        assert units is not None
        assert columns == anatomy(name).columns(f"head_{part}_output", tuple(range(units)), None)
        found += columns
    assert sorted(found) == list(range(len(found)))


def test_a_whole_module_needs_no_columns() -> None:
    for name in ("gpt2", "llama"):
        for component in ("block_output", "mlp_activation", "attention_value_output", "logits"):
            assert anatomy(name).columns(component, None, None) is None
        assert anatomy(name).columns("block_output", None, (5, 3)) == (5, 3)
        assert anatomy(name).columns("attention_weight", (1,), None) is None


def test_widths() -> None:
    gpt2, llama = anatomy("gpt2"), anatomy("llama")
    assert (gpt2.width("mlp_activation"), llama.width("mlp_activation")) == (192, 80)
    assert (gpt2.width("key_output"), llama.width("key_output")) == (48, 24)
    assert (gpt2.width("logits"), gpt2.width("token_embedding")) == (100, 48)
    assert gpt2.width("attention_weight") is None
    assert gpt2.width("transformer.h.0.mlp.output") is None
    assert anatomy("mamba").width("mixer_output") == 48
    assert anatomy("mamba").width("mixer_activation") == 96


def test_how_many_heads() -> None:
    llama = anatomy("llama")
    assert llama.n_units("attention_weight") == 4
    assert llama.n_units("head_query_output") == llama.n_units("query_output") == 4
    assert llama.n_units("head_value_output") == llama.n_units("value_output") == 2
    assert llama.n_units("block_output") is None
    assert anatomy("falcon_mq").n_units("head_key_output") == 1


def test_blips_towers_have_heads_of_their_own_width() -> None:
    """Text 48 wide with heads of 12, vision 32 wide with heads of 8."""
    blip = anatomy("blip")
    assert blip.width("text_block_output") == 48
    assert blip.columns("text_head_key_output", (1,), None) == span(12, 12)
    assert blip.width("vision_block_output") == 32
    assert blip.width("vision_mlp_activation") == 56
    assert blip.columns("vision_head_query_output", (1,), None) == span(8, 8)
    assert blip.columns("vision_head_key_output", (1,), None) == span(40, 8)
    assert blip.columns("vision_head_value_output", (3,), None) == span(88, 8)


# Places.


def test_places() -> None:
    gpt2 = anatomy("gpt2")
    assert gpt2.place("mlp_output", 2) == Place("transformer.h.2.mlp", "output")
    assert gpt2.place("block_input", 0) == Place("transformer.h.0", "input")
    assert gpt2.place("resid_mid", 1) == Place("transformer.h.1.ln_2", "input", shared=True)
    assert gpt2.place("attention_weight", 1).pattern
    assert gpt2.place("logits", 0) == Place("lm_head", "output")
    assert str(gpt2.place("mlp_output", 2)) == "transformer.h.2.mlp.output"
    assert str(gpt2.place("attention_weight", 2)) == "transformer.h.2.attn.weights"
    assert str(Anatomy().place("output", 0)) == "the model.output"
    # A norm that follows is another place than the sub-layer's output, or the same.
    gemma = anatomy("gemma2")
    assert gemma.place("mlp_residual", 0) != gemma.place("mlp_output", 0)
    assert gpt2.place("mlp_residual", 0) == gpt2.place("mlp_output", 0)


@pytest.mark.parametrize("name", [*TABLE, *zoo.RECOGNISED])
def test_every_place_is_a_module(name: str) -> None:
    model = zoo.make(name)
    modules = dict(model.named_modules())
    found = anatomy_of(model)
    for component in found.components:
        for layer in range(found.n_layers) if found.has_layers(component) else (0,):
            assert found.place(component, layer).path in modules


@pytest.mark.parametrize(
    ("name", "more"),
    [
        ("opt", {"do_layer_norm_before": False}),
        ("opt", {"word_embed_proj_dim": 24}),
        ("gpt_neox", {"use_parallel_residual": False}),
        ("falcon_alibi", {"new_decoder_architecture": True, "parallel_attn": True}),
        ("bloom", {"apply_residual_connection_post_layernorm": True}),
    ],
)
def test_every_place_is_a_module_whatever_the_config_says(
    name: str, more: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(zoo.CONFIGS, name, {**zoo.CONFIGS[name], **more})
    test_every_place_is_a_module(name)


def test_components_that_a_config_takes_away() -> None:
    assert "resid_mid" not in anatomy("gpt_neox").components
    assert "resid_mid" in anatomy("gpt_neox_serial").components
    assert "resid_mid" not in anatomy("falcon").components
    assert "resid_mid" in anatomy("falcon_alibi").components
    assert "resid_mid" in anatomy("bloom").components
    assert "resid_mid" in anatomy("opt").components
    # What a config.json may leave out is as transformers fills it in.
    config = {k: v for k, v in zoo.CONFIGS["gpt_neox"].items() if k != "use_parallel_residual"}
    facts = read_facts(config, "test")
    assert "resid_mid" not in Anatomy(facts.family, facts, config).components


def test_which_reach() -> None:
    assert anatomy("gpt2").reach == anatomy("gemma3_text").reach == "positions"
    for name in ("gptj", "gpt_neo", "bloom", "falcon", "mamba", "bert"):
        assert anatomy(name).reach == "layers"
    assert anatomy("blip").reach == Anatomy().reach == "nothing"


def test_model_types_are_each_there_once() -> None:
    types = [kind for family in FAMILIES for kind in family.model_types]
    assert len(types) == len(set(types)) == len(BY_MODEL_TYPE)


# Paths.


@pytest.mark.parametrize(
    ("component", "right"),
    [
        ("transformer.h.3.mlp.output", ("transformer.h.3.mlp", "output")),
        ("transformer.h[3].mlp.output", ("transformer.h.3.mlp", "output")),
        ("h[0].input", ("h.0", "input")),
        ("blocks[1][22].input", ("blocks.1.22", "input")),
        ("0.output", ("0", "output")),
        ("output", ("", "output")),
        ("input", ("", "input")),
        ("mlp_output", None),
        ("block_input", None),
        ("transformer.h[3].mlp", None),
        ("transformer.h[3].mlp.weight", None),
        ("", None),
    ],
)
def test_as_path(component: str, right: tuple[str, str] | None) -> None:
    assert as_path(component) == right


def test_paths_are_known_to_any_anatomy() -> None:
    for each in (Anatomy(), anatomy("gpt2"), anatomy("blip")):
        assert each.place("a[1].b.output", 0) == Place("a.1.b", "output")
        assert each.columns("a[1].b.output", None, (3, 1)) == (3, 1)
        assert each.columns("a[1].b.output", None, None) is None
        assert not each.has_layers("a[1].b.output")


@pytest.mark.parametrize(
    ("component", "layer", "right"),
    [
        ("mlp_output", 2, 2),
        ("block_input", 0, 0),
        ("token_embedding", 0, -1),
        ("final_norm", 0, 3),
        ("logits", 0, 3),
        ("transformer.h[1].mlp.output", 0, 1),
        ("transformer.h.2.input", 0, 2),
        ("transformer.wpe.output", 0, None),
        ("transformer.wte.output", 0, -1),
        # What is known by another name is known; where else a module stands is not.
        ("transformer.ln_f.output", 0, 3),
        ("transformer.ln_f.input", 0, None),
        ("lm_head.input", 0, None),
        ("lm_head.output", 0, 3),
        ("output", 0, None),
    ],
)
def test_the_layer_of(component: str, layer: int, right: int | None) -> None:
    found = anatomy("gpt2")
    assert found.layer_of(found.place(component, layer)) == right


def test_which_names_are_by_head() -> None:
    assert is_by_head("head_query_output")
    assert is_by_head("attention_weight")
    assert not is_by_head("query_output")


# What is refused.


@pytest.mark.parametrize(
    ("component", "message"),
    [
        ("block_outptu", r"GPT-2 models have no component 'block_outptu'; did you mean 'block_out"),
        ("mlp_gate_activation", "GPT-2 models have no component 'mlp_gate_activation'"),
        ("xyz", r"no component 'xyz'; they have block_input, block_output, "),
    ],
)
def test_a_component_that_is_not_there(component: str, message: str) -> None:
    with pytest.raises(EngineError, match=message):
        anatomy("gpt2").place(component, 0)


def test_a_refusal_says_why() -> None:
    for name, component, why in (
        ("gptj", "resid_mid", "parallel blocks"),
        ("mixtral", "mlp_activation", "a mixture of experts has no single neurons"),
        ("mamba", "attention_output", "no attention"),
        ("bert", "final_norm", "follows each norm"),
    ):
        with pytest.raises(EngineError, match=rf"no component '{component}' \(.*{why}"):
            anatomy(name).place(component, 0)


def test_a_model_of_no_family_has_paths_only() -> None:
    with pytest.raises(EngineError, match=r"no known family; name a module's side"):
        Anatomy().place("mlp_output", 0)
    assert Anatomy().components == ()


def test_a_layer_that_is_not_there() -> None:
    for layer in (3, -1):
        with pytest.raises(EngineError, match=f"mlp_output: no layer {layer}, there are 3"):
            anatomy("gpt2").place("mlp_output", layer)
    for component in ("logits", "final_norm", "lm_head.output"):
        with pytest.raises(EngineError, match="stands once in the model: its layer is 0"):
            anatomy("gpt2").place(component, 1)


@pytest.mark.parametrize(
    ("component", "heads", "dims", "message"),
    [
        ("block_output", (0,), None, "block_output is not divided into heads"),
        ("head_query_output", (4,), None, "head_query_output: head 4: there are 4"),
        ("head_key_output", (2,), None, "head_key_output: head 2: there are 2"),
        ("head_key_output", (-1,), None, "head_key_output: head -1"),
        ("head_key_output", (0, 0), None, "head_key_output: head 0 is there twice"),
        ("head_key_output", (0,), (12,), "dimension 12: there are 12"),
        ("head_key_output", None, (24,), "dimension 24: there are 24"),
        ("block_output", None, (48,), "dimension 48: there are 48"),
        ("block_output", None, (1, 2, 1), "dimension 1 is there twice"),
        ("attention_weight", None, (0,), "attention_weight has no dimensions"),
        ("attention_weight", (4,), None, "attention_weight: head 4: there are 4"),
        ("model.layers.0.output", (0,), None, "is not divided into heads"),
    ],
)
def test_columns_that_are_not_there(
    component: str, heads: tuple[int, ...] | None, dims: tuple[int, ...] | None, message: str
) -> None:
    with pytest.raises(EngineError, match=message):
        anatomy("llama").columns(component, heads, dims)
