"""Forwards of transformers that are known to be wrong: refused before a run, and measured here."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from torch import Tensor, nn

import interv
from interv.errors import ModelError
from interv.models import known_faults
from interv.models.known_faults import FAULTS, refuse_known_faults
from tests.conftest import Result, SpecWriter, save_tokenizer

SHAPE = {
    "vocab_size": 420,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "query_pre_attn_scalar": 1,
    "attn_logit_softcapping": 4.0,
}


def make(model_type: str) -> nn.Module:
    """A random model in float64 whose attention scores are far above the cap."""
    fields: dict[str, object] = dict(SHAPE)
    auto = transformers.AutoModelForCausalLM
    if model_type == "t5gemma":
        auto = transformers.AutoModelForSeq2SeqLM
        fields = {"encoder": dict(SHAPE), "decoder": dict(SHAPE), "vocab_size": 420}
    config = transformers.AutoConfig.for_model(model_type, **fields)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = auto.from_config(config, dtype=torch.float64).eval()
        for parameter in model.parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=0.5)
    return model


def logits(model: nn.Module, attention: str) -> Tensor | None:
    """None where transformers refuses the attention."""
    ids = torch.arange(3, 15)[None]
    more = {"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}
    try:
        model.set_attn_implementation(attention)
    except ValueError:
        return None
    with torch.no_grad():
        return model(input_ids=ids, **more).logits


@pytest.mark.parametrize(
    ("fault", "model_type"),
    [(fault, kind) for fault in FAULTS for kind in sorted(fault.model_types)],
)
def test_the_table_says_what_the_installed_version_computes(
    fault: known_faults.Fault, model_type: str
) -> None:
    model = make(model_type)
    right, other = logits(model, fault.right), logits(model, fault.attention)
    assert right is not None
    wrong = other is not None and bool((other - right).abs().max() > 1e-3 * right.abs().max())
    assert wrong == bool(known_faults.known_faults(model.config.to_dict()))


@pytest.fixture
def gemma2(tmp_path: Path) -> Path:
    model = make("gemma2")
    folder = tmp_path / "gemma2"
    model.save_pretrained(folder)
    save_tokenizer(folder)
    return folder


@pytest.fixture
def old(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if transformers 5.14.0 were installed."""
    monkeypatch.setattr(known_faults, "_installed", lambda _package: "5.14.0")


@pytest.mark.usefixtures("old")
def test_gemma_2_without_its_softcap_is_refused_by_validate(
    gemma2: Path, write_spec: SpecWriter, cli: Callable[..., Result]
) -> None:
    spec = write_spec(model={"path": str(gemma2)}, corrupt={"type": "noise", "level": 1.0})
    said = cli("validate", spec)
    assert said.code == 2
    assert "transformers 5.14.0 computes gemma2 wrongly with sdpa" in said.err
    assert "set it to eager, or leave those versions: pip install 'transformers>=5.21'" in said.err


@pytest.mark.usefixtures("old")
def test_with_eager_attention_it_runs_and_the_record_says_what_was_avoided(
    gemma2: Path, write_spec: SpecWriter, cli: Callable[..., Result]
) -> None:
    section = {"path": str(gemma2), "attn_implementation": "eager"}
    done = cli("trace", write_spec(model=section), "-o", gemma2.parent / "outputs")
    assert done.code == 0, done.err
    record = json.loads((Path(done.out.split()[-1]) / "run.json").read_text("utf-8"))
    assert "computes gemma2 wrongly with sdpa" in json.dumps(record)


@pytest.mark.usefixtures("old")
def test_a_model_at_hand_is_refused_too() -> None:
    model = make("gemma2")
    model.config._attn_implementation = "sdpa"
    with pytest.raises(ModelError, match="computes gemma2 wrongly"):
        interv.executor(model)


@pytest.mark.usefixtures("old")
def test_a_model_within_a_model_counts_and_one_without_a_cap_does_not() -> None:
    within = {"model_type": "paligemma", "text_config": {"model_type": "gemma2"}}
    with pytest.raises(ModelError, match="computes gemma2 wrongly"):
        refuse_known_faults(within, None)
    refuse_known_faults({"model_type": "gemma2", "attn_logit_softcapping": None}, None)
    refuse_known_faults({"model_type": "gemma2"}, "eager")
    refuse_known_faults({"model_type": "llama"}, None)
