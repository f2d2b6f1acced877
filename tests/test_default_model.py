"""The default model: read from its package, and the demo's figure on it."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest
import torch
import transformers

from interv.engine import load_model
from interv.models import locate
from interv.models.locate import _default_file
from interv.spec.schema import ModelSection
from tests.by_hand import draws, module_name, trace_cell
from tests.conftest import CONFIGS, Result

pytestmark = pytest.mark.model
PROMPT = "The Eiffel Tower is located in the city of"
SECTION = ModelSection(name="smollm2-135m")

TEXTS = [
    PROMPT,
    "When John and Mary went to the store, Mary gave a bottle of milk to",
    "It's 1999; they'll pay $12.50 (or 3,000€) for naïve façades.",
    "日本語とemoji 🙂\n\n\tdef f(x):\n    return x  # two  spaces",
    "<|im_start|>user\nhi<|im_end|>",
]


@pytest.fixture(scope="module")
def model() -> torch.nn.Module:
    return load_model(locate(SECTION, 0), SECTION, 0, "cpu").module


def test_the_tokenizer_is_that_of_transformers() -> None:
    path = _default_file()
    theirs = transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    ours = locate(SECTION, 0).tokenizer
    assert ours is not None
    for text in TEXTS:
        assert list(ours.encode(text).ids) == theirs(text, add_special_tokens=False)["input_ids"]
    # transformers leaves out that this tokenizer splits off each digit; only where a digit
    # follows a space do the two differ, and there the model was trained on ours.
    assert [ours.decode(i) for i in ours.encode("in 42").ids] == ["in", " ", "4", "2"]
    messages = [{"role": "user", "content": "hi"}]
    rendered = theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert ours.chat("hi") == rendered
    assert ours.added == ((), ())


def test_the_shape_is_read_without_the_weights(model: torch.nn.Module) -> None:
    facts = locate(SECTION, 0).facts
    assert facts is not None
    config = model.config
    assert facts.n_layers == config.num_hidden_layers == 30
    assert facts.d_model == config.hidden_size == 576
    assert facts.d_mlp == config.intermediate_size
    assert facts.vocab_size == config.vocab_size
    assert facts.n_params == sum(p.numel() for p in model.parameters())


def test_its_answers_are_the_published_ones(model: torch.nn.Module) -> None:
    """design.md: ` Paris` 0.70 and ` John` 0.93, by transformers alone on the GGUF file."""
    tokenizer = locate(SECTION, 0).tokenizer
    assert tokenizer is not None
    for prompt, answer, probability in ((PROMPT, " Paris", 0.70), (TEXTS[1], " John", 0.93)):
        ids = torch.tensor([tokenizer.encode(prompt).ids])
        with torch.no_grad():
            found = model(ids).logits[0, -1].softmax(-1)
        assert float(found[tokenizer.encode(answer).ids[0]]) == pytest.approx(probability, abs=0.01)


def test_the_demo_shows_the_two_sites(
    model: torch.nn.Module, cli: Callable[..., Result], tmp_path: Path
) -> None:
    """configs/rome.yaml on a coarser grid, each value against plain hooks."""
    grid = "[{component: block_output, layers: [1, 5, 12, 23, 29], positions: [2, 9]}, "
    grid += "{component: mlp_output, window: 10, layers: [2], positions: [2]}, "
    grid += "{component: attention_output, window: 10, layers: [19], positions: [9]}]"
    result = cli(
        "trace", CONFIGS / "rome.yaml", f"grid={grid}", "corrupt.draw_seed=1", "corrupt.samples=4",
        "-o", tmp_path,
    )  # fmt: skip
    assert result.code == 0, result.err
    folder = Path(result.out.strip())
    table = pd.read_csv(folder / "results.csv", keep_default_na=False)
    assert table["clean"][0] == pytest.approx(0.70, abs=0.01)
    assert table["corrupted"][0] < 0.1
    states = table[table["component"] == "block_output"]
    early = states[states["pos"] == 2].set_index("layer")["value"]
    late = states[states["pos"] == 9].set_index("layer")["value"]
    assert early.idxmax() <= 12
    assert late.idxmax() >= 23
    assert early.max() > 3 * early[29]
    assert late.max() > 10 * late[12]
    tokenizer = locate(SECTION, 0).tokenizer
    assert tokenizer is not None
    ids = tokenizer.encode(PROMPT).ids
    [paris] = tokenizer.encode(" Paris").ids
    embeddings = model.get_input_embeddings().weight
    sigma = float(embeddings[list(ids[:4])].double().std())
    noise = draws(1, 4, 4, 576, 3 * sigma)
    for row in table.to_dict("records"):
        low = max(0, row["layer"] - row["window"] // 2)
        high = min(30, row["layer"] - (-row["window"] // 2))
        names = [module_name(model, row["component"], i) for i in range(low, high)]
        logits = trace_cell(model, ids, (0, 4), noise, [(row["pos"], n) for n in names])
        expected = float(logits[:, -1].softmax(-1)[:, paris].mean())
        assert row["value"] == pytest.approx(expected, abs=3e-5)


def test_a_damaged_cache_is_rebuilt(tmp_path: Path, environment: dict[str, str]) -> None:
    """The tokenizer's half; the weights go the same way (test_cache.py)."""
    code = "from interv.models import locate; from interv.spec.schema import ModelSection as M;"
    code += (
        "f = locate(M(name='smollm2-135m'), 0); print(f.folder, f.tokenizer.encode('Paris').ids)"
    )
    there = {**environment, "INTERV_CACHE": str(tmp_path)}

    def start() -> str:
        return subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, env=there, check=True
        ).stdout

    first = start()
    damaged = Path(first.split()[0]) / "tokenizer.json"
    damaged.write_text(damaged.read_text()[:1000])
    assert start() == first
