"""Tiny random models on disk, specs for them, and the command line called in this process."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import yaml
from hypothesis import HealthCheck, settings
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from tests.browser import Browser, browser

# The same examples each time: a test that fails, fails for everybody.
settings.register_profile(
    "interv", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("interv")

# Small models gain nothing from a second thread, and lose much where the machine is busy.
torch.set_num_threads(1)

REPOSITORY = Path(__file__).parent.parent
CONFIGS = REPOSITORY / "configs"
SPECS = sorted(CONFIGS.rglob("*.yaml"))
PROMPT = "The Space Needle is in downtown"
CORPUS = [
    "The Space Needle is in downtown Seattle",
    "The Old Bridge is in downtown Mostar",
    "The Eiffel Tower is located in the city of Paris",
    "Paris Rome Berlin London Seattle Mostar",
]


def save_tokenizer(folder: Path) -> None:
    """A byte-level BPE tokenizer of 320 tokens, whose words of the corpus are whole."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(CORPUS * 10, trainer)
    backend.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>"}))


def tiny_config(kind: str) -> dict[str, object]:
    """A config.json of three layers, 24 wide."""
    if kind == "gpt2":
        return {
            "model_type": "gpt2",
            "n_layer": 3,
            "n_head": 2,
            "n_embd": 24,
            "n_positions": 64,
            "vocab_size": 420,
            "bos_token_id": 0,
            "eos_token_id": 0,
        }
    return {
        "model_type": "llama",
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "hidden_size": 24,
        "intermediate_size": 40,
        "max_position_embeddings": 64,
        "vocab_size": 420,
        "bos_token_id": 0,
        "eos_token_id": 0,
    }


def make_model(kind: str, folder: Path, seed: int = 0) -> Path:
    """Save a random model whose answers depend visibly on its inputs, with its tokenizer."""
    import transformers

    fields = tiny_config(kind)
    config = transformers.AutoConfig.for_model(fields.pop("model_type"), **fields)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = transformers.AutoModelForCausalLM.from_config(config)
        for parameter in model.parameters():
            if parameter.dim() > 1:
                torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder)
    save_tokenizer(folder)
    return folder


@pytest.fixture(scope="session")
def gpt2_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model("gpt2", tmp_path_factory.mktemp("gpt2"))


@pytest.fixture(scope="session")
def llama_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model("llama", tmp_path_factory.mktemp("llama"))


@pytest.fixture(params=["gpt2", "llama"])
def model_folder(request: pytest.FixtureRequest) -> Path:
    folder: Path = request.getfixturevalue(f"{request.param}_folder")
    return folder


SpecWriter = Callable[..., Path]


@pytest.fixture
def write_spec(tmp_path: Path, gpt2_folder: Path) -> SpecWriter:
    """Write a small valid spec; keyword arguments replace its sections (None removes one)."""

    def write(name: str = "spec.yaml", **sections: object) -> Path:
        spec: dict[str, object] = {
            "kind": "trace",
            "model": {"path": str(gpt2_folder)},
            "data": {
                "facts": [{"prompt": PROMPT, "subject": "The Space Needle", "answer": "Seattle"}],
                "keep": "all",
            },
            "corrupt": {"type": "noise", "level": 1.0, "samples": 3},
            "grid": [{"component": "block_output"}, {"component": "mlp_output", "window": 2}],
        }
        spec |= sections
        path = tmp_path / name
        kept = {k: v for k, v in spec.items() if v is not None}
        path.write_text(yaml.safe_dump(kept, sort_keys=False))
        return path

    return write


@dataclass(frozen=True)
class Result:
    code: int
    out: str
    err: str


@pytest.fixture
def cli(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., Result]:
    """Call the console script in this process."""
    from interv.cli import main

    def call(*arguments: object) -> Result:
        monkeypatch.setattr(sys, "argv", ["interv", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            main()
        out, err = capsys.readouterr()
        return Result(int(stop.value.code or 0), out, err)

    return call


@pytest.fixture(scope="session")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    """A browser's tab; for tests that are marked `in_a_browser`."""
    with browser(tmp_path_factory.mktemp("profile")) as tab:
        yield tab


@pytest.fixture(scope="session")
def environment() -> dict[str, str]:
    """For subprocesses: this interpreter's, in English, without a terminal's width."""
    return {**os.environ, "COLUMNS": "120", "HF_HUB_OFFLINE": "1"}
