"""Families of transformers outside the table: what is offered of each, against plain hooks.

Where components stand is written down here by hand, from the families' own code. What is in no
row of `PLACES` must not be offered: it does not hold in every block.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache

import pytest
import torch
import transformers
from torch import Tensor, nn

from interv.engine import Edit, ReferenceExecutor, Run, Site, SuffixExecutor, Vanilla, anatomy_of
from interv.engine import Zero as ZeroEdit
from interv.engine.load import LoadedModel, embedding_sigma
from interv.errors import EngineError
from interv.models.anatomy import Anatomy
from interv.models.edges import why_no_edges
from tests import zoo

LAYERS = 3
IDS, OTHER = tuple(zoo.ids(0)), tuple(zoo.ids(1))
BASE: dict[str, object] = {
    "hidden_size": 48, "num_hidden_layers": LAYERS, "num_attention_heads": 4,
    "num_key_value_heads": 2, "intermediate_size": 80, "vocab_size": zoo.VOCAB,
    "max_position_embeddings": 64, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 1,
}  # fmt: skip
SMALL = {k: v for k, v in BASE.items() if k.endswith(("_token_id", "vocab_size"))}
EXPERTS = {
    "n_routed_experts": 4, "num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2,
    "moe_intermediate_size": 40, "n_shared_experts": 1, "first_k_dense_replace": 1,
    "n_group": 1, "topk_group": 1,
}  # fmt: skip
LATENT = {
    "q_lora_rank": None, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8,
    "v_head_dim": 12, "num_key_value_heads": 4,
}  # fmt: skip
WIDE = {"head_dim": 16}
MAMBA = {"mamba_n_heads": 4, "mamba_d_head": 24, "mamba_d_state": 8, "mamba_n_groups": 1}

CONFIGS: dict[str, dict[str, object]] = {
    "mpt": {**SMALL, "d_model": 48, "n_heads": 4, "n_layers": LAYERS, "max_seq_len": 64},
    "dbrx": {
        **SMALL, "d_model": 48, "n_heads": 4, "n_layers": LAYERS, "max_seq_len": 64,
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0},
        "ffn_config": {"hidden_size": 48, "ffn_hidden_size": 40, "moe_num_experts": 4,
                       "moe_top_k": 2},
    },
    "deepseek_v3": {**BASE, **EXPERTS, **LATENT},
    "glm4_moe": {**BASE, **EXPERTS, **WIDE},
    "granitemoeshared": {**BASE, **EXPERTS, "shared_intermediate_size": 40,
                         "residual_multiplier": 0.4},
    "glm4": {**BASE, "head_dim": 12},
    "exaone4": {**BASE, "sliding_window": 3, "sliding_window_pattern": 2},
    "cohere2": {**BASE, "head_dim": 12, "sliding_window": 3},
    "nemotron": BASE,
    "persimmon": BASE,
    "apertus": BASE,
    "smollm3": BASE,
    "minicpm3": {**BASE, **LATENT, "q_lora_rank": 16, "scale_emb": 12},
    "vaultgemma": {**BASE, **WIDE, "query_pre_attn_scalar": 16},
    "gpt_bigcode": {**SMALL, "n_embd": 48, "n_layer": LAYERS, "n_head": 4, "n_positions": 64},
    "jamba": {**BASE, **EXPERTS, "attn_layer_period": 3, "attn_layer_offset": 1,
              "expert_layer_period": 2, "expert_layer_offset": 1, "use_mamba_kernels": False,
              "mamba_dt_rank": 4},
    "falcon_h1": {**BASE, **MAMBA, "head_dim": 12, "mamba_d_ssm": 48, "mamba_d_head": 12},
    "lfm2": {**BASE, "layer_types": ["conv", "full_attention", "conv"], "block_ff_dim": 80,
             "block_auto_adjust_ff_dim": False},
    "recurrent_gemma": {**BASE, "lru_width": 48, "head_dim": 12, "attention_window_size": 8,
                        "block_types": ["recurrent", "recurrent", "attention"]},
    "nanochat": BASE,
    "gemma4_text": {**BASE, **WIDE, "vocab_size_per_layer_input": zoo.VOCAB,
                    "hidden_size_per_layer_input": 8, "layer_types": ["full_attention"] * 3},
}  # fmt: skip

Places = dict[str, tuple[str, str]]
QKV: Places = {f"{name}_output": (f"self_attn.{name[0]}_proj", "out")
               for name in ("query", "key", "value")}  # fmt: skip
VALUES: Places = {"attention_value_output": ("self_attn.o_proj", "in")}
ATTENTION: Places = {
    "attention_input": ("self_attn", "in"),
    "attention_output": ("self_attn", "out"),
    "attention_residual": ("self_attn", "out"),
}
MLP: Places = {
    "mlp_input": ("mlp", "in"), "mlp_output": ("mlp", "out"), "mlp_residual": ("mlp", "out"),
}  # fmt: skip
MIDDLE: Places = {"resid_mid": ("post_attention_layernorm", "in")}
NEURONS: Places = {"mlp_activation": ("mlp.down_proj", "in")}
GATED: Places = {**NEURONS, "mlp_gate_activation": ("mlp.act_fn", "out")}
STREAM = {**ATTENTION, **MLP, **MIDDLE}
LLAMA = {**STREAM, **QKV, **VALUES, **GATED}


def without(places: Places, *names: str) -> Places:
    return {name: place for name, place in places.items() if name not in names}


def elsewhere(places: Places, **words: str) -> Places:
    """The same under other modules' names."""

    def renamed(path: str) -> str:
        first, _, rest = path.partition(".")
        return ".".join(filter(None, (words.get(first, first), rest)))

    return {name: (renamed(path), side) for name, (path, side) in places.items()}


AFTER: Places = {
    "attention_residual": ("post_attention_layernorm", "out"),
    "mlp_residual": ("post_feedforward_layernorm", "out"),
}
PLACES: dict[str, Places] = {
    # Its MLP adds the residual itself: what it computes is what its down projection gives.
    "mpt": {
        **elsewhere(ATTENTION, self_attn="attn"),
        "attention_value_output": ("attn.out_proj", "in"),
        "mlp_input": ("ffn", "in"),
        "mlp_output": ("ffn.down_proj", "out"),
        "mlp_residual": ("ffn.down_proj", "out"),
        "mlp_activation": ("ffn.down_proj", "in"),
        "resid_mid": ("norm_2", "in"),
    },
    # Attention and its norms are a module of their own, which adds the residual.
    "dbrx": {"mlp_input": ("ffn", "in")},
    # Dense blocks first; heads are of another width than the config's.
    "deepseek_v3": STREAM,
    "glm4_moe": {**STREAM, **QKV, **VALUES},
    # The experts and a shared MLP are added together; both are scaled first.
    "granitemoeshared": {
        **without(ATTENTION, "attention_residual"), **QKV, **VALUES,
        "mlp_input": ("block_sparse_moe", "in"),
    },
    "glm4": {
        **LLAMA,
        "mlp_gate_activation": ("mlp.activation_fn", "out"),
        "attention_residual": ("post_self_attn_layernorm", "out"),
        "mlp_residual": ("post_mlp_layernorm", "out"),
    },
    # Norms follow both sub-layers, and none reads the stream before the MLP.
    "exaone4": {**without(LLAMA, "resid_mid"), **AFTER},
    "cohere2": without(LLAMA, "resid_mid"),  # parallel
    "nemotron": without(LLAMA, "mlp_gate_activation"),
    "persimmon": {
        **STREAM,
        "attention_value_output": ("self_attn.dense", "in"),
        "mlp_activation": ("mlp.dense_4h_to_h", "in"),
    },
    "apertus": {
        **without(LLAMA, "mlp_gate_activation"), "resid_mid": ("feedforward_layernorm", "in"),
    },
    "smollm3": LLAMA,
    # Both sub-layers are scaled before they are added.
    "minicpm3": {**without(STREAM, "attention_residual", "mlp_residual"), **GATED},
    "vaultgemma": {**LLAMA, "resid_mid": ("pre_feedforward_layernorm", "in")},
    "gpt_bigcode": {
        **elsewhere(STREAM, self_attn="attn", post_attention_layernorm="ln_2"),
        "attention_value_output": ("attn.c_proj", "in"),
        "mlp_activation": ("mlp.c_proj", "in"),
    },
    # Attention in some blocks only.
    "jamba": elsewhere({**MLP, **MIDDLE}, mlp="feed_forward",
                       post_attention_layernorm="pre_ff_layernorm"),
    "lfm2": elsewhere({**MLP, **MIDDLE, "mlp_activation": ("mlp.w2", "in")}, mlp="feed_forward",
                      post_attention_layernorm="ffn_norm"),
    "recurrent_gemma": {},
    # A state-space model runs beside its attention, and is added with it.
    "falcon_h1": {
        **elsewhere({**MLP, **GATED, **MIDDLE}, mlp="feed_forward",
                    post_attention_layernorm="pre_ff_layernorm"),
        **QKV, **VALUES, "attention_input": ("self_attn", "in"),
    },
    "nanochat": {**without(LLAMA, "mlp_gate_activation"), "mlp_activation": ("mlp.fc2", "in")},
    # Each block gets embeddings of its own, and scales what it gives.
    "gemma4_text": {
        **ATTENTION, "attention_residual": ("post_attention_layernorm", "out"),
        "mlp_input": ("mlp", "in"), **GATED,
    },
}  # fmt: skip
BLOCK: Places = {"block_input": ("", "in"), "block_output": ("", "out")}
LAYERLESS = {"token_embedding", "final_norm", "logits"}
NO_LAYERLESS = {"gemma4_text": {"token_embedding"}, "nanochat": {"final_norm"}}
REACH_LAYERS = {
    "mpt",
    "jamba",
    "falcon_h1",
    "lfm2",
    "recurrent_gemma",
    "gemma4_text",
}


@cache
def made(name: str) -> nn.Module:
    """A random model in float64 whose every weight matters."""
    config = transformers.AutoConfig.for_model(name, **CONFIGS[name])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        options = {"experts_implementation": "eager"} if "expert" in str(CONFIGS[name]) else {}
        model = transformers.AutoModelForCausalLM.from_config(
            config, dtype=torch.float64, **options
        )
        model.eval().requires_grad_(False)
        for key, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, dtype=torch.float64)
            if parameter.dim() > 1:
                parameter.copy_(1.5 * noise / parameter.shape[-1] ** 0.5)
            elif key.endswith("weight"):
                parameter.add_(0.2 * noise)
    return model


@cache
def known(name: str) -> Anatomy:
    return anatomy_of(made(name))


def blocks_of(model: nn.Module) -> nn.ModuleList:
    found = [m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == LAYERS]
    return found[0]


def watched(
    model: nn.Module, places: Places, ids: tuple[int, ...], zero: tuple[str, str] | None = None
) -> tuple[dict[str, list[Tensor]], Tensor]:
    """What plain hooks see at places in every block, and the logits; one place may give zeros."""
    seen: dict[str, list[Tensor]] = {name: [] for name in places}
    handles = []

    def keep(name: str) -> Callable[..., None]:
        def hook(_module: nn.Module, args: object, kwargs: object, *output: object) -> None:
            value = output[0] if output else (args[0] if args else kwargs["hidden_states"])  # type: ignore[index]
            value = value[0] if isinstance(value, tuple) else value
            assert isinstance(value, Tensor)
            seen[name].append(value.reshape(len(ids), -1).clone())

        return hook

    def nothing(_module: nn.Module, _args: object, output: object) -> object:
        first = output[0] if isinstance(output, tuple) else output
        assert isinstance(first, Tensor)
        blank = torch.zeros_like(first)
        return (blank, *output[1:]) if isinstance(output, tuple) else blank

    for block in blocks_of(model):
        if zero is not None:
            handles.append(block.get_submodule(zero[0]).register_forward_hook(nothing))
        for name, (path, side) in places.items():
            module = block.get_submodule(path)
            add = module.register_forward_hook if side == "out" else (
                module.register_forward_pre_hook)  # fmt: skip
            handles.append(add(keep(name), with_kwargs=True))
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0]
    for handle in handles:
        handle.remove()
    return seen, logits


@pytest.mark.parametrize("name", CONFIGS)
def test_what_is_offered_stands_where_plain_hooks_say(name: str) -> None:
    model = made(name)
    anatomy = known(name)
    places = {**BLOCK, **PLACES[name]}
    offered = {c for c in anatomy.components if anatomy.has_layers(c)}
    whole = {c for c in offered if not c.startswith("head_")} - {"attention_weight"}
    assert whole == set(places)
    assert set(anatomy.components) - offered >= LAYERLESS - NO_LAYERLESS.get(name, set())
    seen, _ = watched(model, places, IDS)
    sites = [Site(component, layer) for component in sorted(places) for layer in range(LAYERS)]
    executor = ReferenceExecutor(model, anatomy)
    for site, [state] in zip(sites, executor.states([Run(IDS)], sites), strict=True):
        right = seen[site.component][site.layer]
        assert torch.allclose(state, right, rtol=1e-12, atol=1e-12), site


SCALED = {"minicpm3": 12.0, "vaultgemma": 48**0.5}
"""What the embedding module multiplies its weights by."""


@pytest.mark.parametrize("name", sorted(set(CONFIGS) - {"gemma4_text"}))
def test_sigma_of_families_outside_the_table(name: str) -> None:
    embedding = made(name).get_input_embeddings()
    seen: list[Tensor] = []
    handle = embedding.register_forward_hook(lambda _m, _args, output: seen.append(output[0]))
    with torch.no_grad():
        made(name)(torch.tensor([IDS]))
    handle.remove()
    model = LoadedModel(made(name), known(name), torch.device("cpu"), "sdpa")
    sigma = embedding_sigma(model, IDS)
    assert sigma == pytest.approx(float(seen[0].std()), rel=1e-12)
    assert sigma == pytest.approx(SCALED.get(name, 1) * float(embedding.weight[list(IDS)].std()))


def test_a_model_whose_blocks_read_the_tokens_takes_no_noise_on_its_embeddings() -> None:
    """Gemma 3n and 4 have embeddings for each layer: the subject would still be told."""
    assert "token_embedding" not in known("gemma4_text").components


@pytest.mark.parametrize("name", CONFIGS)
def test_the_stream_adds_up(name: str) -> None:
    """block_output − block_input = attention_residual + mlp_residual, as plain hooks see them."""
    places = {**BLOCK, **PLACES[name]}
    seen, _ = watched(made(name), places, IDS)
    for layer in range(LAYERS):
        at = {component: values[layer] for component, values in seen.items()}
        gap = at["block_output"] - at["block_input"]
        if {"attention_residual", "mlp_residual"} <= set(places):
            assert torch.allclose(at["attention_residual"] + at["mlp_residual"], gap, atol=1e-6)
        if {"resid_mid", "mlp_residual"} <= set(places):
            assert torch.allclose(
                at["block_output"] - at["resid_mid"], at["mlp_residual"], atol=1e-6
            )


def runs_of(name: str) -> Iterator[Run]:
    for number, component in enumerate(known(name).components):
        layer = number % LAYERS if known(name).has_layers(component) else 0
        yield Run(IDS, (Edit(Site(component, layer, (2, 5)), Vanilla(), Run(OTHER)),))


@pytest.mark.parametrize("name", CONFIGS)
def test_both_executors_and_whole_swaps(name: str) -> None:
    model = made(name)
    anatomy = known(name)
    assert anatomy.reach == ("layers" if name in REACH_LAYERS else "positions")
    runs = list(runs_of(name))
    right = ReferenceExecutor(model, anatomy).logits(runs)
    suffix = SuffixExecutor(model, anatomy)
    assert (suffix.logits(runs) - right).abs().max() <= 1e-6 * right.abs().max()
    with torch.no_grad():
        other = model(torch.tensor([OTHER])).logits[0, -1]
    if name != "gemma4_text":  # its blocks read the tokens themselves
        whole = Run(IDS, (Edit(Site("block_output", 1), Vanilla(), Run(OTHER)),))
        assert torch.allclose(suffix.logits([whole])[0, 0], other, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "component"),
    [
        (name, component)
        for name in CONFIGS
        for component in ("attention_output", "mlp_output")
        if component in PLACES[name]
    ],
)
def test_a_sub_layer_that_gives_nothing(name: str, component: str) -> None:
    """Zeros at its output in every layer, as a plain hook makes them: the stream goes on."""
    model = made(name)
    place = PLACES[name][component]
    edits = tuple(Edit(Site(component, layer), ZeroEdit()) for layer in range(LAYERS))
    got = ReferenceExecutor(model, known(name)).logits([Run(IDS, edits)])[0, 0]
    seen, logits = watched(model, BLOCK, IDS, zero=place)
    assert torch.allclose(got, logits[-1], rtol=1e-12, atol=1e-12)
    if {"attention_output", "mlp_output"} <= set(PLACES[name]):
        # The stream itself is not lost with what the sub-layer adds.
        for before, after in zip(seen["block_input"], seen["block_output"], strict=True):
            assert not torch.allclose(after, torch.zeros_like(after))
            assert (after - before).abs().max() > 0


def test_a_component_that_some_blocks_lack_is_told_as_not_there() -> None:
    anatomy = known("deepseek_v3")
    with pytest.raises(EngineError, match="deepseek_v3 models have no component 'mlp_activation'"):
        anatomy.place("mlp_activation", 0)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("nemotron", ""),
        ("cohere2", ""),
        ("glm4", "a norm follows the attention"),
        ("minicpm3", "have no attention_residual"),
        ("mpt", "have no head_attention_value_output"),
    ],
)
def test_edges_of_families_outside_the_table(name: str, reason: str) -> None:
    why = why_no_edges(known(name))
    assert reason in why if reason else why == ""
