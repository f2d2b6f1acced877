"""Models made on the spot: their sections, identities, training, and what stands in the cache."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import TypeAdapter, ValidationError
from tokenizers import Tokenizer

from interv.engine import Edit, Inputs, ReferenceExecutor, Run, Site, Vanilla, load_model
from interv.errors import ModelError
from interv.models import ModelFiles, locate
from interv.models.made import (
    MlpShape,
    class_indices,
    classes_of,
    made_files,
    made_identity,
    mlp_shape,
    word_tokenizer,
)
from interv.spec.causal import CausalSection
from interv.spec.made import MlpSection, TransformerSection
from interv.spec.schema import ModelSection
from interv.task.causal import CausalModel, build
from interv.task.causal_pairs import samples
from interv.task.causal_text import answer_text, render
from interv.task.causal_vectors import encode
from interv.train.made import make_mlp, make_transformer, mlp_from, transformer_from


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache folder."""
    monkeypatch.setenv("INTERV_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def mlp(**fields: object) -> MlpSection:
    return MlpSection.model_validate({"kind": "mlp", **fields})


def equality(width: int) -> CausalModel:
    """Hierarchical equality of four vectors."""
    section = {
        "variables": {
            "w": {"vector": width},
            "x": {"vector": width, "equal": "w", "share": 0.5},
            "y": {"vector": width},
            "z": {"vector": width, "equal": "y", "share": 0.5},
            "WX": "w == x",
            "YZ": "y == z",
            "O": "1 if WX == YZ else 0",
        },
        "output": "O",
    }
    return build(CausalSection.model_validate(section), "equality")


def signs(n: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """A task learnt at once: is the first of two numbers positive?"""
    inputs = np.random.default_rng(seed).uniform(-1, 1, (n, 2)).astype(np.float32)
    return inputs, (inputs[:, 0] > 0).astype(np.int64)


def no_draw(n: int, seed: int) -> Any:
    raise AssertionError(f"{n} examples drawn from {seed}, where none should be")


SMALL = MlpShape(2, (8,), 2)
QUICK = {"examples": 4096, "batch": 128, "epochs": 3, "lr": 0.01}


# Sections.


def test_defaults_are_those_of_the_published_network() -> None:
    section = mlp()
    assert (section.hidden, section.weights, section.activation) == (None, "trained", "relu")
    train = section.train
    assert (train.examples, train.batch, train.epochs, train.lr) == (2**20, 1024, 3, 1e-3)
    assert mlp_shape(section, 16, 2) == MlpShape(16, (16, 16, 16), 2)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"hidden": []}, "at least 1"),
        ({"hidden": [4, 0]}, "greater than or equal to 1"),
        ({"hiden": [4]}, "Extra inputs"),
        ({"outputs": 1}, "greater than or equal to 2"),
        ({"activation": "silu"}, "'relu', 'tanh' or 'gelu'"),
        ({"train": {"lr": 0.0}}, "greater than 0"),
        ({"train": {"min_accuracy": 1.5}}, "less than or equal to 1"),
        ({"weights": "equality", "activation": "tanh"}, "equality with tanh"),
        ({"weights": "equality", "outputs": 3}, "equality with 3 outputs"),
        ({"weights": "equality", "inputs": 6}, "equality with 6 inputs"),
        ({"weights": "equality", "hidden": [8]}, r"equality with hidden \[8\]"),
        ({"weights": "equality", "hidden": [8, 8, 8]}, "equality with hidden"),
        ({"weights": "equality", "hidden": [8, 8], "inputs": 16}, "inputs 16"),
    ],
)
def test_wrong_mlp_sections(fields: Mapping[str, object], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        mlp(**fields)


def test_transformer_sections_name_their_type() -> None:
    with pytest.raises(ValidationError, match="no model_type"):
        TransformerSection.model_validate({"kind": "transformer", "config": {"n_layer": 2}})


def test_every_field_is_described_or_plain() -> None:
    schema = TypeAdapter(MlpSection | TransformerSection).json_schema()
    for part in schema["$defs"].values():
        assert part["description"]
        assert part["additionalProperties"] is False


# Shapes, classes, identities.


def test_shape_is_filled_in() -> None:
    assert mlp_shape(mlp(hidden=[5, 7], outputs=4), 6, 3) == MlpShape(6, (5, 7), 4)
    assert mlp_shape(mlp(weights="equality"), 8, 2) == MlpShape(8, (8, 8), 2)
    assert mlp_shape(mlp(weights="equality", hidden=[16, 16]), 16, 2).hidden == (16, 16)


@pytest.mark.parametrize(
    ("fields", "inputs", "outputs", "message"),
    [
        ({"inputs": 8}, 16, 2, "model.inputs: 8, but .* are 16 wide"),
        ({"outputs": 2}, 16, 3, "model.outputs: 2, but .* has 3 values"),
        ({"weights": "equality"}, 6, 2, "four vectors .* 6 inputs"),
        ({"weights": "equality"}, 8, 3, "3 answers"),
        ({"weights": "equality", "hidden": [8, 8]}, 16, 2, r"hidden \[8, 8\]"),
    ],
)
def test_shapes_that_do_not_fit(
    fields: Mapping[str, object], inputs: int, outputs: int, message: str
) -> None:
    with pytest.raises(ModelError, match=message):
        mlp_shape(mlp(**fields), inputs, outputs)


def test_classes() -> None:
    assert classes_of((1, 0), "O") == (0, 1)
    assert classes_of((True, False), "O") == (False, True)
    assert classes_of(("b", "a", "b"), "O") == ("a", "b")
    assert class_indices((0, 1, 5), np.array([5, 0, 1])).tolist() == [2, 0, 1]
    assert class_indices(("a", "b"), np.array(["b", "a"], dtype=object)).tolist() == [1, 0]
    assert class_indices((False, True), np.array([True, False])).tolist() == [1, 0]
    with pytest.raises(ModelError, match=r"output is .*7.*, none of \[0, 1\]"):
        class_indices((0, 1), np.array([0, 7]))
    with pytest.raises(ModelError, match="values of 'O' are not known"):
        classes_of(None, "O")
    with pytest.raises(ModelError, match=r"values of 'O' are \[3\]"):
        classes_of((3,), "O")


def test_identity_is_of_all_that_decides_the_weights() -> None:
    def identity(task: str = "t", seed: int = 0, width: int = 8, **fields: Any) -> str:
        return made_identity(mlp(**fields), MlpShape(4, (width,), 2), seed, task)

    base = identity()
    others = [
        identity(task="u"),
        identity(seed=1),
        identity(width=9),
        identity(dtype="float64"),
        identity(activation="tanh"),
        identity(weights="random"),
        identity(train={"epochs": 2}),
        identity(train={"seed": 7}),
    ]
    assert len({base, *others}) == 9
    # How widths came about, what accuracy is asked for and which of two seeds it was is nothing.
    assert identity(hidden=[8]) == identity(train={"min_accuracy": 0.1}) == base
    assert identity(seed=3, train={"seed": 0}) == base
    assert identity(weights="random", train={"epochs": 9}) == identity(weights="random")


def test_needs_no_torch() -> None:
    code = "import sys, interv.models.made, interv.spec.made; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


# MLPs.


def test_trained_equality_network() -> None:
    section = mlp(train={"examples": 2**18, "epochs": 4, "batch": 512, "lr": 2e-3, "seed": 0})
    model = equality(4)
    made = make_mlp(section, model, seed=5, task="equality")
    assert made.accuracy >= 0.98
    assert not made.module.training
    assert not any(p.requires_grad for p in made.module.parameters())
    # What it says of its accuracy is so, on examples drawn here.
    values, _ = samples(model, 4000, 123)
    inputs = torch.from_numpy(encode(model, values))
    answers = made.module(inputs).argmax(-1).numpy()
    assert (answers == values["O"]).mean() == pytest.approx(made.accuracy, abs=0.01)
    # Interchanging what a block gives, whole, is having the other's answer.
    runs = [Run(Inputs(inputs=x)) for x in inputs[:20]]
    site = Site("block_output", 1)
    swapped = [
        Run(run.ids, (Edit(site, Vanilla(), other),))
        for run, other in zip(runs, [*runs[1:], runs[0]], strict=True)
    ]
    logits = ReferenceExecutor(made.module, made.anatomy).logits(swapped)
    assert logits.argmax(-1).tolist() == [*answers[1:20], answers[0]]


@pytest.mark.parametrize("width", [2, 4])
def test_hand_set_network_is_exact(width: int) -> None:
    made = make_mlp(mlp(weights="equality"), equality(width), seed=0, task=f"equality {width}")
    assert made.accuracy == 1.0
    assert made.anatomy.width("block_output") == 4 * width


def test_random_network_is_no_error() -> None:
    section = mlp(weights="random", hidden=[8])
    made = mlp_from(section, SMALL, signs, 0, "signs")
    assert 0.2 < made.accuracy < 0.9
    other = mlp_from(section, SMALL, signs, 1, "signs")
    assert not torch.equal(made.module.score.weight, other.module.score.weight)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_kept_in_the_cache(cache: Path, dtype: str) -> None:
    section = mlp(train=QUICK, dtype=dtype)
    before = torch.random.get_rng_state()
    first = mlp_from(section, SMALL, signs, 0, "signs")

    second = mlp_from(section, SMALL, no_draw, 0, "signs")
    assert torch.equal(before, torch.random.get_rng_state())
    assert first.accuracy == second.accuracy > 0.97
    assert second.module.score.weight.dtype == getattr(torch, dtype)
    # Made anew it is the same to the last bit.
    (folder,) = (path for path in (cache / "made").iterdir() if path.is_dir())
    kept = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").unlink()
    third = mlp_from(section, SMALL, signs, 0, "signs")
    assert (folder / "model.safetensors").read_bytes() == kept
    for name, value in first.module.state_dict().items():
        assert torch.equal(value, second.module.state_dict()[name])
        assert torch.equal(value, third.module.state_dict()[name])


def test_examples_of_training_and_of_accuracy_are_others() -> None:
    seeds: dict[int, int] = {}

    def noted(n: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
        seeds[n] = seed
        return signs(n, seed)

    for seed in (0, 1):
        mlp_from(mlp(train={**QUICK, "epochs": 1, "min_accuracy": 0.0}), SMALL, noted, seed, "s")
        assert len(seeds) == 2
        train, fresh = seeds.values()
        assert len({train, fresh, seed}) == 3


def test_too_low_an_accuracy_says_so_and_asks_for_no_new_training() -> None:
    def coins(n: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
        return signs(n, seed)[0], np.random.default_rng(seed).integers(0, 2, n)

    train = {**QUICK, "epochs": 1}
    message = r"the trained MLP answers (49|50)\.\d% of 65,536 .* asks for 95\.0%; raise .*epochs"
    with pytest.raises(ModelError, match=message):
        mlp_from(mlp(train=train), SMALL, coins, 0, "coins")
    lowered = mlp(train={**train, "min_accuracy": 0.4})
    assert mlp_from(lowered, SMALL, no_draw, 0, "coins").accuracy == pytest.approx(0.5, abs=0.01)


def test_training_that_diverges() -> None:
    def huge(n: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
        inputs, labels = signs(n, seed)
        return inputs * np.float32(1e30), labels

    with pytest.raises(
        ModelError, match=r"diverged: the loss is \S+ after epoch 1; lower .*\(1e\+10"
    ):
        mlp_from(mlp(train={**QUICK, "lr": 1e10}), SMALL, huge, 0, "huge")


def test_of_text_there_is_no_mlp() -> None:
    section = CausalSection.model_validate(
        {"variables": {"a": [1, 2, 3], "b": "a"}, "output": "b", "templates": ["It is {a},"]}
    )
    with pytest.raises(Exception, match="has prompts, not vectors"):
        make_mlp(mlp(), build(section, "text"), 0, "text")


# Transformers.

CAPITALS = {"France": "Paris", "Spain": "Madrid", "Italy": "Rome", "Japan": "Tokyo"}
TEMPLATES = ["The capital of {country} is", "{country}? Its main city, I'd say, is"]
TINY = {
    "gpt2": {"model_type": "gpt2", "n_layer": 1, "n_head": 2, "n_embd": 32, "n_positions": 16},
    "llama": {
        "model_type": "llama",
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "hidden_size": 16,
        "intermediate_size": 32,
        "max_position_embeddings": 16,
    },
}


def capitals(**changes: object) -> CausalModel:
    section = {
        "variables": {
            "country": list(CAPITALS),
            "capital": {"table": CAPITALS, "of": "country"},
        },
        "output": "capital",
        "templates": TEMPLATES,
        **changes,
    }
    return build(CausalSection.model_validate(section), "capitals")


def texts(model: CausalModel) -> list[str]:
    values, templates = samples(model, 200, 0)
    prompts = [filled.text for filled in render(model, values, templates)]
    return prompts + [answer_text(model, value) for value in values[model.output].tolist()]


def transformer(kind: str = "gpt2", **train: object) -> TransformerSection:
    train = {"examples": 200, "batch": 32, "steps": 60, "warmup": 5, "lr": 0.01, **train}
    return TransformerSection.model_validate(
        {"kind": "transformer", "config": TINY[kind], "train": train}
    )


def files_of(section: TransformerSection, task: str = "capitals", seed: int = 0) -> ModelFiles:
    return made_files(section, texts(capitals()), seed, task)


def pieces(backend: Tokenizer, text: str) -> list[str]:
    return [backend.id_to_token(i) for i in backend.encode(text).ids]


def test_words_and_signs_are_tokens() -> None:
    text = "John's 9.99, (not) ok?\n Yes  no"
    backend = word_tokenizer([text, " John"])
    found = pieces(backend, text)
    assert "".join(found) == text == backend.decode(backend.encode(text).ids)
    assert found[:6] == ["John", "'", "s", " 9", ".", "99"]
    assert pieces(backend, " John") == [" John"]
    assert pieces(backend, " Mary") == ["<unk>"]
    again = word_tokenizer([" John", text, text])
    assert again.to_str() == backend.to_str()


def test_files_before_training() -> None:
    files = files_of(transformer())
    tokenizer = files.tokenizer
    assert tokenizer is not None and files.facts is not None and files.folder is not None
    for word in (" Paris", " France", "France"):
        (token,) = tokenizer.encode(word).ids
        assert token != tokenizer.unk_id
        assert tokenizer.decode(token) == word
    assert tokenizer.encode("The France", bos=True).ids[0] == tokenizer.bos_id == 0
    assert tokenizer.added == ((), ())
    assert files.facts.vocab_size == len(tokenizer_words(files.folder))
    assert not list(files.folder.glob("*.safetensors"))


def tokenizer_words(folder: Path) -> dict[str, int]:
    return Tokenizer.from_file(str(folder / "tokenizer.json")).get_vocab()


def test_identity_of_a_transformer() -> None:
    base = files_of(transformer()).identity
    others = [
        files_of(transformer("llama")),
        files_of(transformer(steps=61)),
        files_of(transformer(), task="other"),
        files_of(transformer(), seed=1),
        made_files(transformer(), [*texts(capitals()), " more"], 0, "capitals"),
    ]
    assert len({base, *(files.identity for files in others)}) == 6
    assert files_of(transformer(min_accuracy=0.2)).identity == base
    assert files_of(transformer(seed=0), seed=9).identity == base


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"vocab_size": 5}, "vocab_size is 5, and the task has 2"),
        ({"n_positions": 4}, "4 positions, and the longest prompt has 12 tokens"),
        ({"model_type": "bert", "num_hidden_layers": 1, "hidden_size": 16}, "bert is no causal"),
        ({"n_embd": None}, "none of hidden_size, n_embd"),
    ],
)
def test_configs_that_do_not_fit(fields: Mapping[str, object], message: str) -> None:
    section = transformer().model_copy(update={"config": {**TINY["gpt2"], **fields}})
    with pytest.raises(ModelError, match=message):
        files_of(section)


def test_config_that_transformers_refuses() -> None:
    section = transformer().model_copy(update={"config": {**TINY["gpt2"], "n_head": 3}})
    with pytest.raises(ModelError, match=r"model\.config: no such model can be made: .*divisible"):
        make_transformer(section, files_of(section), capitals(), 0)


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_trained_transformer_is_an_ordinary_folder(kind: str) -> None:
    section, model = transformer(kind, steps=200), capitals()
    files = files_of(section)
    before = torch.random.get_rng_state()
    made = make_transformer(section, files, model, 0)
    assert torch.equal(before, torch.random.get_rng_state())
    assert made.accuracy == 1.0
    folder = made.files.folder
    assert folder is not None and made.files.identity == files.identity
    path = ModelSection(path=str(folder))
    loaded = load_model(made.files, path, 0, "cpu")
    assert loaded.anatomy.n_layers == 1
    tokenizer = locate(path, 0).tokenizer
    assert tokenizer is not None
    for country, capital in CAPITALS.items():
        for template in TEMPLATES:
            ids = tokenizer.encode(template.format(country=country)).ids
            logits = ReferenceExecutor(loaded.module, loaded.anatomy).logits([Run(ids)])
            assert tokenizer.decode(int(logits[0, 0].argmax())) == f" {capital}"

    assert transformer_from(section, files, no_draw, 0) == made


def test_transformer_that_has_not_learnt() -> None:
    section = transformer(steps=1)
    message = r"the small gpt2 gives the right answer to \d+\.\d% of 2,048 .*asks for 95\.0%; raise"
    with pytest.raises(ModelError, match=message):
        make_transformer(section, files_of(section), capitals(), 0)


def test_transformer_that_diverges() -> None:
    section = transformer(lr=1e30, warmup=0)
    with pytest.raises(ModelError, match=r"the gpt2's training diverged: .*in step \d+; lower"):
        make_transformer(section, files_of(section), capitals(), 0)


@pytest.mark.parametrize(
    ("prompt", "answer", "message"),
    [
        ("The capital of Chile is", " Paris", "no token for ' Chile' in 'The capital of Chile is'"),
        ("The capital of France is", " Lyon", "no token for ' Lyon'"),
        ("The capital of France is", " Paris Rome", "the answer ' Paris Rome' is 2 tokens"),
    ],
)
def test_texts_that_have_no_tokens(prompt: str, answer: str, message: str) -> None:
    section = transformer()

    def draw(n: int, _seed: int) -> tuple[list[str], list[str]]:
        return [prompt] * n, [answer] * n

    with pytest.raises(ModelError, match=re.escape(message)):
        transformer_from(section, files_of(section), draw, 0)
