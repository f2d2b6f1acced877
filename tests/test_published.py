"""configs/published: what needs no weights is reproduced, the rest plans; references are right."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

import interv
from interv.plan import PatchPlan, Plan
from interv.plan.claims import read_cells
from interv.spec import load_spec
from interv.spec.claims import Claim
from tests.conftest import CONFIGS, Result

PUBLISHED = CONFIGS / "published"
SPECS = sorted(PUBLISHED.rglob("*.yaml"))
GPT2 = [path for path in SPECS if re.search(r"(name|model): gpt2\b", path.read_text())]
GPT2 += [path for path in SPECS if "extends: ioi_act" in path.read_text()]
GPT2 += [path for path in SPECS if re.search(r"extends: (swapped|rome_fig)", path.read_text())]
MADE = [path for path in SPECS if "equality" in path.read_text()]

# TransformerLens' exploratory demo, saved output of 'Logit Difference From Patched Residual
# Stream' and 'From Patched Attention Layer', to three decimals: at S2 in layers 0 to 11, at END
# 7 to 11.
STREAM_AT_S2 = [1, 1.001, 1.001, 1, 0.995, 0.968, 0.968, 0.923, 0.657, 0.027, -0.027, -0.006]
STREAM_AT_END = [0.017, 0.319, 0.938, 1.005, 0.991]
ATTENTION_AT_END = [0.298, 0.57, 0.272, -0.193, -0.406]
HEADS = {
    (10, 7): -0.48, (5, 5): 0.343, (8, 6): 0.319, (11, 10): -0.278, (8, 10): 0.278,
    (9, 9): 0.264, (7, 9): 0.192,
}  # fmt: skip
# Wang et al. 2022, figure 3b.
DIRECT = {
    (9, 9): -0.673, (9, 6): -0.282, (10, 0): -0.207, (10, 10): -0.146, (10, 7): 0.455,
    (11, 10): 0.239, (11, 2): 0.099,
}  # fmt: skip


@pytest.fixture
def gpt2_in_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Configs of GPT-2 in a hub's cache, and a tokenizer whose words are whole, as in GPT-2's."""
    snapshots = []
    for name, (layers, heads, width) in {"gpt2": (12, 12, 768), "gpt2-xl": (48, 25, 1600)}.items():
        snapshot = tmp_path / f"models--{name}" / "snapshots" / ("0" * 40)
        snapshot.mkdir(parents=True)
        (tmp_path / f"models--{name}" / "refs").mkdir()
        (tmp_path / f"models--{name}" / "refs" / "main").write_text("0" * 40)
        config = {"model_type": "gpt2", "n_layer": layers, "n_head": heads, "n_embd": width}
        config |= {"n_positions": 1024, "vocab_size": 50257}
        (snapshot / "config.json").write_text(json.dumps(config))
        snapshots.append(snapshot)
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=20000,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    words = Path(interv.__file__).parent / "task"
    texts = [p.read_text() for p in (*words.glob("*.py"), *SPECS)]
    # As in GPT-2: the Needle is two tokens.
    texts = [text.replace("Needle", "Need") for text in texts]
    quoted = [f" {word}" for text in texts for word in text.replace('"', " ").split()]
    backend.train_from_iterator([*texts, *quoted], trainer)
    for snapshot in snapshots:
        backend.save(str(snapshot / "tokenizer.json"))
        (snapshot / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<|endoftext|>"}))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))


def claims(name: str) -> dict[str, Claim]:
    return {claim.claim: claim for claim in load_spec(PUBLISHED / name).spec.reference}


def cells(claim: Claim) -> dict[tuple[object, ...], float]:
    return {tuple(cell.where.values()): cell.value for cell in read_cells(claim)}


def test_the_set_is_whole() -> None:
    assert len(GPT2) + len(MADE) + 1 == len(SPECS) and len(MADE) == 5
    for path in SPECS:
        for claim in load_spec(path).spec.reference:
            # A tolerance has its reason, and a number its source.
            reason = claim.because or getattr(claim.source, "read", None)
            assert claim.source and (reason or claim.tolerance is None), claim.claim


@pytest.mark.usefixtures("gpt2_in_cache")
@pytest.mark.parametrize("path", GPT2, ids=lambda p: p.stem)
def test_gpt2_specs_plan_without_weights(path: Path, cli: Callable[..., Result]) -> None:
    text = path.read_text()
    fewer = ["data.n=4"] if "task: ioi" in text else []
    if path.stem in ("rome_figure2", "rome_figure3"):
        fewer.append("data.limit=4")
    result = cli("plan", path, *fewer)
    assert result.code == 0, result.err
    assert "not checked   weights" in result.out
    assert "tokenizer" not in result.out
    # No claim is about a place outside the grid: loading would have refused it.
    plan = interv.load(path, *fewer)
    assert isinstance(plan, Plan)
    assert plan.baselines and plan.spec.reference


@pytest.mark.usefixtures("gpt2_in_cache")
def test_the_demo_has_fifteen_tokens_and_s2_at_ten() -> None:
    plan = interv.load(PUBLISHED / "ioi_activation_patching.yaml")
    assert isinstance(plan, PatchPlan)
    assert len(plan.pairs) == 8
    for pair in plan.pairs.values():
        assert len(pair.ids) == 15
        assert pair.first_changed == 10
        assert pair.tokens[10] == pair.wrong[0]


def test_figures_hold_the_published_numbers() -> None:
    found = cells(claims("ioi_activation_patching.yaml")["every cell of the three figures"])
    assert len(found) == 3 * 12 * 15
    for layer, value in enumerate(STREAM_AT_S2):
        assert found["block_input", layer, 10] == pytest.approx(value, abs=6e-4)
    for layer, value in enumerate(STREAM_AT_END, start=7):
        assert found["block_input", layer, 14] == pytest.approx(value, abs=6e-4)
    for layer, value in enumerate(ATTENTION_AT_END, start=7):
        assert found["attention_output", layer, 14] == pytest.approx(value, abs=6e-4)
    heads = cells(claims("ioi_heads.yaml")["every head's output, value and pattern"])
    assert len(heads) == 3 * 144
    for (layer, head), value in HEADS.items():
        assert heads["head_attention_value_output", layer, head] == pytest.approx(value, abs=6e-4)
    direct = cells(claims("ioi_figure3b.yaml")["the ten heads that the figure shows"])
    for place, value in DIRECT.items():
        assert direct[place] == value


@pytest.mark.usefixtures("gpt2_in_cache")
def test_s_inhibition_is_told_apart_by_what_its_prompts_keep() -> None:
    """Figure 9: the heads of four S-inhibition heads at END, from five kinds of prompt."""
    for path in sorted((PUBLISHED / "s_inhibition").glob("*.yaml")):
        plan = interv.load(path, "data.n=6")
        assert isinstance(plan, PatchPlan)
        assert {label.place.set for label in plan.labels} == {"S-inhibition heads"}
        assert plan.spec.data.counterfactual == path.stem


@pytest.mark.published
def test_what_needs_no_weights_is_reproduced(cli: Callable[..., Result], tmp_path: Path) -> None:
    result = cli("reproduce", *MADE, "-o", tmp_path, "--json")
    assert result.code == 0, result.err
    outcomes = json.loads(result.out)
    assert {outcome["status"] for outcome in outcomes} == {"reproduced"}
    assert sum(len(outcome["verdicts"]) for outcome in outcomes) == 14
