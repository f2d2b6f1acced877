"""Models that the table does not know, recognised by names and arithmetic, or refused."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM

from interv.engine import (
    Edit,
    ReferenceExecutor,
    Run,
    Scale,
    Site,
    SuffixExecutor,
    Vanilla,
    anatomy_of,
)
from interv.engine.recognise import recognise
from interv.errors import EngineError, ModelError
from interv.models.config import read_facts
from interv.models.families import BY_MODEL_TYPE
from tests import raw_swap, zoo
from tests.test_reference import same, snapshot

ALWAYS = {"block_input", "block_output", "token_embedding", "final_norm", "logits"}
ATTENTION = {"attention_input", "attention_output", "attention_value_output", "attention_weight"}
SPECIAL = ("bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id")
IDS, OTHER = tuple(zoo.ids(0)), tuple(zoo.ids(1))


@pytest.mark.parametrize("name", zoo.RECOGNISED)
def test_it_is_not_in_the_table_and_is_recognised(name: str) -> None:
    model = zoo.make(name)
    assert model.config.model_type not in BY_MODEL_TYPE
    anatomy = anatomy_of(model)
    assert anatomy.family is not None
    assert anatomy.family.name == name
    assert anatomy.family.causal
    assert anatomy.reach == "positions"
    found = set(anatomy.components)
    assert found >= ALWAYS | ATTENTION | {"mlp_input", "mlp_output"}
    assert found <= set(raw_swap.components(name))
    with pytest.raises(EngineError, match="recognised by its modules' names"):
        anatomy.place("mixer_output", 0)


@pytest.mark.parametrize("name", zoo.RECOGNISED)
def test_what_is_added_to_the_stream_is_found_by_its_sums(name: str) -> None:
    """Parallel blocks have no middle; where sub-layers are scaled no module gives what is added."""
    found = anatomy_of(zoo.make(name)).components
    assert ("resid_mid" in found) == (name in ("stablelm", "starcoder2", "granite"))
    assert ("attention_residual" in found) == ("mlp_residual" in found) == (name != "granite")


@pytest.mark.parametrize(
    ("name", "table"),
    [("llama", "llama"), ("mistral", "mistral"), ("qwen3", "qwen3"), ("gemma2", "gemma2")],
)
def test_families_of_the_table_would_be_recognised_alike(name: str, table: str) -> None:
    """All that is recognised stands where the table says."""
    model = zoo.make(name)
    facts = read_facts(model.config.to_dict(), name)
    family, known = recognise(model, facts), BY_MODEL_TYPE[table]
    assert family.blocks == known.blocks
    for component, stand in family.components.items():
        assert stand == known.components[component], component
    for component, stand in family.layerless.items():
        assert stand == known.layerless[component], component
    missing = known.components.keys() - family.components.keys()
    assert not missing


def test_a_family_that_calls_no_attention_function_has_no_patterns() -> None:
    """And so its rows start at layers only."""
    model = zoo.make("gptj")
    family = recognise(model, read_facts(model.config.to_dict(), "gptj"))
    assert "attention_weight" not in family.components
    assert family.reach == "layers"


@pytest.mark.parametrize("name", ["llama", "stablelm"])
def test_recognising_leaves_the_model_as_it_was(name: str) -> None:
    model = zoo.make(name)
    model.train()
    before = snapshot(model)
    recognise(model, read_facts(model.config.to_dict(), name))
    same(before, snapshot(model))


def other(name: str, **fields: object) -> nn.Module:
    """A model of a type that is neither in the table nor in the zoo."""
    options = {
        "hidden_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 80,
        "vocab_size": zoo.VOCAB,
        "max_position_embeddings": 64,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "pad_token_id": 1,
    }
    config = AutoConfig.for_model(name, **{**options, **fields})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float64)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            generator = torch.Generator().manual_seed(parameter.numel())
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.data.copy_(noise / parameter.shape[-1] ** 0.5)
    return model.eval().requires_grad_(False)


@pytest.mark.parametrize("name", ["helium", "glm", "smollm3", "exaone4", "seed_oss", "nemotron"])
def test_types_that_nobody_has_looked_at(name: str) -> None:
    """Whatever is recognised, the executors agree on it, and a swap of all is the other prompt."""
    model = other(name, **({"head_dim": 12} if name in ("glm", "helium", "seed_oss") else {}))
    anatomy = anatomy_of(model)
    assert set(anatomy.components) >= {"block_output", "mlp_output", "attention_output"}
    runs = []
    for number, component in enumerate(anatomy.components):
        layer = number % 3 if anatomy.has_layers(component) else 0
        runs.append(Run(IDS, (Edit(Site(component, layer, (2, 5)), Vanilla(), Run(OTHER)),)))
        runs.append(Run(IDS, (Edit(Site(component, layer), Scale(1.5)),)))
    reference, suffix = ReferenceExecutor(model, anatomy), SuffixExecutor(model, anatomy)
    right = reference.logits(runs)
    assert (suffix.logits(runs) - right).abs().max() <= 1e-9 * right.abs().max()
    with torch.no_grad():
        theirs = model(torch.tensor([OTHER])).logits[0, -1]
    for layer in range(3):
        whole = Run(IDS, (Edit(Site("block_output", layer), Vanilla(), Run(OTHER)),))
        assert torch.allclose(suffix.logits([whole])[0, 0], theirs, atol=1e-12)


# What is refused.


def refused(model: nn.Module, message: str) -> None:
    facts = read_facts(model.config.to_dict(), "test")  # type: ignore[operator,union-attr]
    with pytest.raises(ModelError, match=message):
        recognise(model, facts)


def test_blocks_that_are_not_found() -> None:
    model = zoo.make("stablelm")
    blocks = model.model.layers
    del model.model.layers
    model.model.blocks = nn.ModuleDict({str(i): block for i, block in enumerate(blocks)})
    refused(model, "is not recognised: 0 lists of 3 blocks; name modules by path")


def test_two_lists_that_could_be_the_blocks() -> None:
    model = zoo.make("stablelm")
    model.more = nn.ModuleList(model.model.layers)
    refused(model, "is not recognised: 2 lists of 3 blocks")


def test_blocks_without_attention_or_mlp_are_blocks_all_the_same() -> None:
    """Mamba's mixers have names that mean nothing here; the stream between them is one."""
    model = zoo.make("mamba")
    family = recognise(model, read_facts(model.config.to_dict(), "test"))
    assert set(family.components) == {"block_input", "block_output"}
    assert set(family.layerless) == {"token_embedding", "final_norm", "logits"}
    assert family.reach == "layers"


def test_blocks_that_do_not_follow_one_another() -> None:
    model = zoo.make("stablelm")

    class Scaled(type(model.model.layers[2])):  # type: ignore[misc]
        factor = 1.0

        def __call__(self, hidden: Tensor, *args: object, **kwargs: object) -> object:
            return super().__call__(hidden * self.factor, *args, **kwargs)

    for block in model.model.layers:
        block.__class__ = Scaled
    model.model.layers[2].factor = 1.1
    refused(model, "block 2 does not start from what block 1 gives")


def test_a_block_that_is_passed_by() -> None:
    model = zoo.make("stablelm")
    layers = model.model.layers
    inner = layers[1].forward

    def twice(hidden: Tensor, **kwargs: object) -> object:
        return layers[2](inner(hidden, **kwargs), **kwargs)

    layers[1].forward = twice
    refused(model, r"are not recognised: not every block gets and gives one \[row, position, 64\]")


@pytest.mark.parametrize("kind", ["electra", "modernbert"])
def test_encoders_are_not_taken_for_causal_models(kind: str) -> None:
    """A row of a model that looks both ways cannot start at its first changed position."""
    config = AutoConfig.for_model(
        kind,
        hidden_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=80,
        vocab_size=zoo.VOCAB,
        pad_token_id=1,
        **(dict.fromkeys(SPECIAL, 0) if kind == "modernbert" else {"embedding_size": 48}),
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForMaskedLM.from_config(config, dtype=torch.float64).eval()
    try:
        anatomy = anatomy_of(model)
    except ModelError:
        return
    assert anatomy.reach != "positions"
    runs = [Run(IDS, (Edit(Site("block_output", 1, (5,)), Vanilla(), Run(OTHER)),))]
    right = ReferenceExecutor(model, anatomy).logits(runs, None)
    got = SuffixExecutor(model, anatomy).logits(runs, None)
    assert torch.allclose(got, right, atol=1e-9)


def test_columns_of_the_logits_are_as_many_as_tokens() -> None:
    model = zoo.make("stablelm")
    anatomy = anatomy_of(model)
    assert anatomy.width("logits") == zoo.VOCAB
    edit = Edit(Site("logits", 0, (6,), None, (90,)), Scale(0.0))
    logits = ReferenceExecutor(model, anatomy).logits([Run(IDS, (edit,)), Run(IDS)])
    assert logits[0, 0, 90] == 0
    assert torch.allclose(logits[0, 0, :90], logits[1, 0, :90], rtol=0, atol=1e-12)
