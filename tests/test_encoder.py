"""Values of models whose tokenizers add special tokens, beside transformers' own forward."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
import transformers
from torch import Tensor, nn

from interv.errors import SpecError
from interv.plan import CollectPlan, PatchPlan, TracePlan, TrainPlan, plan_of
from interv.report import patch_tables, tables
from interv.runner.patch_steps import PATCH
from interv.runner.sweep import run_sweep
from interv.runner.trace import TRACE
from interv.spec import load_spec
from interv.task.encoder import Encoder, look_alike
from interv.train.data import groups_of
from tests import tokenizers_zoo as zoo_t

ENDS = zoo_t.OTHERS["llama that appends an end"][1]
MASKED = "the capital of france is [MASK] ."
OTHER = "the capital of eiffel is [MASK] ."
TEXT, SUBJECT = "The Eiffel Tower is located in", "The Eiffel Tower"
ANSWER = " the city"


def _save(folder: Path, auto: Any, kind: zoo_t.Kind, config: Any) -> Path:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = auto.from_config(config)
        for parameter in model.parameters():
            if parameter.dim() > 1:
                torch.nn.init.normal_(parameter, std=0.4)
    model.save_pretrained(folder)
    return zoo_t.save(folder, config.to_dict(), kind)


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = transformers.BertConfig(
        vocab_size=200,
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=32,
    )
    folder = tmp_path_factory.mktemp("bert")
    return _save(folder, transformers.AutoModelForMaskedLM, zoo_t.FAMILIES["bert"], config)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A causal model whose tokenizer puts <s> before and </s> behind each text."""
    config = transformers.LlamaConfig(
        vocab_size=420,
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
    )
    folder = tmp_path_factory.mktemp("llama")
    return _save(folder, transformers.AutoModelForCausalLM, ENDS, config)


def planned(folder: Path, **sections: Any) -> Any:
    spec = {"model": {"path": str(folder), "dtype": "float64"}, "name": "test", **sections}
    return plan_of(load_spec(spec, (), kind=str(sections["kind"])))


def run(plan: PatchPlan | TracePlan, folder: Path) -> pd.DataFrame:
    folder.mkdir(exist_ok=True)
    if isinstance(plan, PatchPlan):
        outcome = run_sweep(plan, PATCH, folder, lambda *_: None, adopt=False)
        return patch_tables.results_table(plan, outcome.journal)
    outcome = run_sweep(plan, TRACE, folder, lambda *_: None, adopt=False)
    return tables.results_table(plan, outcome.journal)


def theirs(folder: Path, auto: Any) -> tuple[nn.Module, Any]:
    model = auto.from_pretrained(folder, dtype=torch.float64).eval()
    return model, transformers.AutoTokenizer.from_pretrained(folder)


@torch.no_grad()
def logits_of(model: nn.Module, ids: list[int], block: nn.Module | None = None, *swap: Any) -> Any:
    """Logits `[pos, vocab]`, one position of a block's output replaced (`at, state`)."""

    def put(_module: nn.Module, _inputs: Any, output: Any) -> Any:
        state = output[0] if isinstance(output, tuple) else output
        changed = state.clone()
        changed[0, swap[0]] = swap[1]
        return (changed, *output[1:]) if isinstance(output, tuple) else changed

    hook = block.register_forward_hook(put) if block is not None else None
    try:
        return model(torch.tensor([ids])).logits[0]
    finally:
        if hook is not None:
            hook.remove()


PAIR = {"clean": MASKED, "corrupted": OTHER, "answer": "tower", "wrong": "city"}


@pytest.mark.parametrize("executor", ["suffix", "reference"])
def test_bert_runs_with_cls_and_sep_and_is_read_at_its_mask(
    bert: Path, tmp_path: Path, executor: str
) -> None:
    model, tokenizer = theirs(bert, transformers.AutoModelForMaskedLM)
    plan = planned(
        bert,
        kind="patch",
        data={"pairs": [PAIR]},
        grid={"component": "block_output", "layers": 0, "positions": ["CLS", "MASK", "END", 4]},
        run={"executor": executor},
    )
    clean, corrupted = tokenizer(MASKED).input_ids, tokenizer(OTHER).input_ids
    mask = clean.index(tokenizer.mask_token_id)
    [pair] = plan.pairs.values()
    assert (list(pair.ids), list(pair.corrupted_ids), pair.read) == (clean, corrupted, mask)
    end = len(clean) - 2
    assert dict(pair.spans) == {"END": (end,), "MASK": (mask,), "CLS": (0,)}
    right, wrong = tokenizer.convert_tokens_to_ids(["tower", "city"])

    def gap(logits: Tensor) -> float:
        return float(logits[mask, right] - logits[mask, wrong])

    block = model.bert.encoder.layer[0]
    with torch.no_grad():
        states = model(torch.tensor([clean]), output_hidden_states=True).hidden_states[1][0]
    places = {"CLS": 0, "MASK": mask, "END": end, "": 4}
    rows = run(plan, tmp_path).to_dict("records")
    assert len(rows) == len(places)
    for row in rows:
        at = places[row["role"]]
        patched = gap(logits_of(model, corrupted, block, at, states[at]))
        assert row["clean"] == pytest.approx(gap(logits_of(model, clean)), abs=1e-9)
        assert row["corrupted"] == pytest.approx(gap(logits_of(model, corrupted)), abs=1e-9)
        assert row["value"] == pytest.approx(patched, abs=1e-9)
    assert len({row["value"] for row in rows}) > 2


def test_a_trace_of_bert_is_read_at_its_mask(bert: Path, tmp_path: Path) -> None:
    model, tokenizer = theirs(bert, transformers.AutoModelForMaskedLM)
    fact = {"prompt": MASKED, "subject": "france", "answer": "tower", "corrupted_subject": "eiffel"}
    plan = planned(
        bert,
        kind="trace",
        data={"facts": [fact], "keep": "all"},
        corrupt={"type": "prompt"},
        grid=[{"component": "block_output", "layers": [0], "positions": ["MASK", "last"]}],
        metric="log_probability",
    )
    clean, corrupted = tokenizer(MASKED).input_ids, tokenizer(OTHER).input_ids
    mask, block = clean.index(tokenizer.mask_token_id), model.bert.encoder.layer[0]
    [answer] = tokenizer("tower", add_special_tokens=False).input_ids
    with torch.no_grad():
        states = model(torch.tensor([clean]), output_hidden_states=True).hidden_states[1][0]
    rows = run(plan, tmp_path).to_dict("records")
    assert [row["pos"] for row in rows] == [mask, len(clean) - 2]
    for row in rows:
        given = logits_of(model, corrupted, block, row["pos"], states[row["pos"]])
        expected = float(given[mask].log_softmax(-1)[answer])
        assert row["value"] == pytest.approx(expected, abs=1e-9)
        whole = float(logits_of(model, clean)[mask].log_softmax(-1)[answer])
        assert row["clean"] == pytest.approx(whole, abs=1e-9)


@pytest.mark.parametrize("prompt", ["the capital of france is", "[MASK] [MASK]"])
def test_a_masked_model_needs_one_mask(bert: Path, prompt: str) -> None:
    data = {"pairs": [{"clean": prompt, "answer": "tower"}]}
    with pytest.raises(SpecError, match=r"predicts at its mask[^$]*\[MASK\] once in the prompt"):
        planned(
            bert, kind="patch", data=data, intervention="zero", grid={"component": "mlp_output"}
        )


def _expected(model: nn.Module, tokenizer: Any) -> float:
    """Log-probability of the answer in what the tokenizer makes of text and answer."""
    ids = tokenizer(TEXT + ANSWER).input_ids
    bare = tokenizer(TEXT, add_special_tokens=False).input_ids
    assert [ids[0], ids[-1]] == [tokenizer.bos_token_id, tokenizer.eos_token_id]
    given = logits_of(model, ids).log_softmax(-1)
    first = len(bare)  # the last token of the text, behind <s>
    return sum(float(given[first + k, ids[first + k + 1]]) for k in range(len(ids) - first - 2))


@pytest.mark.parametrize("executor", ["suffix", "reference"])
def test_an_answer_comes_before_what_the_tokenizer_appends(
    llama: Path, tmp_path: Path, executor: str
) -> None:
    model, tokenizer = theirs(llama, transformers.AutoModelForCausalLM)
    expected = _expected(model, tokenizer)
    same: dict[str, Any] = {"metric": "log_probability", "run": {"executor": executor}}
    grid = {"component": "block_output", "layers": 0}
    traced: TracePlan = planned(
        llama,
        kind="trace",
        data={"facts": [{"prompt": TEXT, "subject": SUBJECT, "answer": ANSWER}], "keep": "all"},
        corrupt={"type": "noise", "level": 1.0, "samples": 1},
        grid=[{**grid, "positions": "last"}],
        **same,
    )
    patched: PatchPlan = planned(
        llama,
        kind="patch",
        data={"pairs": [{"clean": TEXT, "corrupted": TEXT.replace("in", "is"), "answer": ANSWER}]},
        grid={**grid, "positions": ["END", "whole", "prompt"]},
        **same,
    )
    ids = tokenizer(TEXT).input_ids
    [prompt], [pair] = traced.prompts.values(), patched.pairs.values()
    assert list(prompt.ids) == list(pair.ids) == ids
    assert len(prompt.answer_ids) == len(pair.answer_ids[0]) > 1
    assert prompt.role("last") == pair.spans["END"] == (len(ids) - 2,)
    trace, patch = run(traced, tmp_path / "trace"), run(patched, tmp_path / "patch")
    assert trace["clean"].to_list() == pytest.approx([expected], abs=1e-9)
    assert patch["clean"].to_list() == pytest.approx([expected] * 3, abs=1e-9)
    by_role = dict(zip(patch["role"], patch["value"], strict=True))
    assert by_role["whole"] == pytest.approx(expected, abs=1e-9)
    assert abs(by_role["prompt"] - expected) > 1e-6


def _trained(folder: Path, template: str) -> TrainPlan:
    causal = {
        "variables": {
            "place": ["capital", "city"],
            "after": {"table": {"capital": "located", "city": "two"}, "of": "place"},
        },
        "output": "after",
        "templates": [template],
    }
    plan = planned(
        folder,
        kind="train-das",
        causal_model=causal,
        variables="place",
        data={"train": 4, "validation": 2, "test": 2},
        intervention="vanilla",
        grid={"component": "block_output", "positions": ["place", "END"]},
    )
    assert isinstance(plan, TrainPlan)
    return plan


def test_interchanges_have_the_special_tokens_and_are_read_where_the_model_predicts(
    bert: Path, llama: Path
) -> None:
    """Exchanges of `train-das`: the text's end in a causal model, the mask in a masked one."""
    for folder, template, mark in (
        (llama, "The {place} is", 0),
        (bert, "the {place} is [MASK] .", 1),
    ):
        tokenizer: Any = transformers.AutoTokenizer.from_pretrained(folder)
        plan = _trained(folder, template)
        assert plan.exchanges
        for exchange in plan.exchanges:
            base, ids = exchange.base, tokenizer(exchange.base.text).input_ids
            assert list(base.ids) == ids
            mask = ids.index(tokenizer.mask_token_id) if mark else None
            assert base.read == (mask if mark else len(ids) - 2)
            assert base.spans["END"] == (len(ids) - 2,)
            assert tokenizer.decode([base.answer_id]).strip() == base.answer.strip()
        group = groups_of(plan, "train")[0]
        assert group.read is not None
        assert group.read.tolist() == [e.base.read for e in group.said]


def test_positions_that_are_collected_have_names(bert: Path, llama: Path) -> None:
    positions = ["CLS", "MASK", "last", -1]
    grid = {"component": "block_output"}
    sections: dict[str, Any] = {"kind": "collect", "grid": grid, "positions": positions}
    plan: CollectPlan = planned(bert, data={"prompts": [MASKED]}, **sections)
    assert plan.texts[0].tokens[0] == "[CLS]"
    end = len(plan.texts[0].ids) - 1
    assert plan.positions[0] == (0, plan.texts[0].tokens.index("[MASK]"), end - 1, end)
    with pytest.raises(SpecError, match="prompt 0 has no MASK"):
        planned(llama, data={"prompts": [TEXT]}, **sections)


@pytest.mark.parametrize(
    ("asked", "added"),
    [
        ({}, [["<s>"], ["</s>"]]),
        ({"prepend_bos": True}, [["<s>"], ["</s>"]]),
        ({"prepend_bos": False}, [[], []]),
    ],
)
def test_what_was_added_is_in_the_record(llama: Path, asked: dict[str, Any], added: Any) -> None:
    sections: dict[str, Any] = {
        "kind": "collect",
        "data": {"prompts": [TEXT]},
        "grid": {"component": "block_output"},
    }
    spec = {"model": {"path": str(llama), **asked}, "name": "test", **sections}
    plan = plan_of(load_spec(spec, (), kind="collect"))
    assert isinstance(plan, CollectPlan) and plan.files.tokenizer is not None
    encoder = Encoder(plan.files.tokenizer, plan.spec.model)
    assert encoder.record["special_tokens"] == added
    before, behind = (len(side) for side in added)
    bare = plan.files.tokenizer.encode(TEXT).ids
    assert plan.texts[0].ids[before : len(plan.texts[0].ids) - behind] == bare


@pytest.mark.parametrize(
    ("word", "text", "told"),
    [
        ("The Caf\u00e9 Flore", "The Cafe\u0301 Flore is in", ["U+00E9", "U+0065", "U+0301"]),
        ("Cafe\u0301", "a Caf\u00e9", ["U+0301", "U+00E9"]),
        ("The Colosseum", "The\u00a0Colosseum is", ["U+0020 (SPACE)", "U+00A0 (NO-BREAK SPACE)"]),
        ("zero width", "zero\u200b width", ["U+0020", "U+200B (ZERO WIDTH SPACE)"]),
        ("fine", "\ufb01ne", ["U+0066", "U+FB01"]),
    ],
)
def test_what_looks_the_same_is_told_apart_by_code_point(
    word: str, text: str, told: list[str]
) -> None:
    message = look_alike(word, text, "the subject")
    assert message is not None
    for point in told:
        assert point in message
    assert look_alike(word, "some other text", "the subject") is None
