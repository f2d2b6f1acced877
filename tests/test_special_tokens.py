"""Token ids of every family's tokenizer, beside transformers' `AutoTokenizer`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer
from transformers.models.auto.tokenization_auto import TOKENIZER_MAPPING_NAMES

from interv.errors import ModelError
from interv.models.tokenizer_classes import GENERIC, REGISTERED
from interv.models.tokenizer_files import read_tokenizer
from tests import tokenizers_zoo as zoo_t
from tests import zoo

FOLDERS = {name: (name, kind) for name, kind in zoo_t.FAMILIES.items()} | zoo_t.OTHERS
LETTERS = ["MKVL AG", "M<mask>AG", "MKVXAG"]


def made(folder: Path, name: str) -> Path:
    model, kind = FOLDERS[name]
    return zoo_t.save(folder, dict(zoo.CONFIGS[model]), kind)


def test_every_family_has_a_tokenizer() -> None:
    assert set(zoo_t.FAMILIES) == set(zoo.CONFIGS)


@pytest.mark.parametrize("name", FOLDERS)
def test_a_folder_is_tokenised_as_transformers_does_it(name: str, tmp_path: Path) -> None:
    folder = made(tmp_path, name)
    theirs: Any = AutoTokenizer.from_pretrained(folder)
    ours = read_tokenizer(folder)
    assert ours is not None
    texts = LETTERS if name == "esm" else zoo_t.TEXTS
    special = [token for token in theirs.all_special_tokens if token]
    for text in [*texts, *(f"x {token} y" for token in special)]:
        assert list(ours.encode(text, special=True).ids) == theirs(text).input_ids, text
        bare = theirs(text, add_special_tokens=False).input_ids
        tokens = ours.encode(text, special=True)
        assert list(tokens.body) == bare
        assert list(ours.encode(text).ids) == bare
        assert ours.encode(text).before == ours.encode(text).behind == 0


def test_what_is_registered_is_what_transformers_registers() -> None:
    known = {t: name for t, name in TOKENIZER_MAPPING_NAMES.items() if name}
    assert {t: known.get(t) for t in REGISTERED} == REGISTERED
    # Mistral's own library is taken where it is installed, and only then.
    generic = {"TokenizersBackend", "MistralCommonBackend"}
    assert {t for t in GENERIC if known.get(t) not in generic} == set()


@pytest.mark.parametrize(
    ("file", "kind"), [("tokenizer.model", "SentencePiece"), ("tekken.json", "tekken")]
)
def test_a_foreign_vocabulary_is_refused_by_name(tmp_path: Path, file: str, kind: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    (tmp_path / file).write_bytes(b"\x0a")
    with pytest.raises(ModelError, match=f"{file}.*{kind}.*save_pretrained"):
        read_tokenizer(tmp_path)


def test_a_vocabulary_of_an_unknown_class_is_refused(tmp_path: Path) -> None:
    zoo_t.save(tmp_path, dict(zoo.CONFIGS["llama"]), zoo_t.FAMILIES["gpt2"])
    (tmp_path / "tokenizer_config.json").write_text("{}")
    with pytest.raises(ModelError, match="how it splits a text is not known"):
        read_tokenizer(tmp_path)


def test_special_tokens_that_are_written_are_not_added_twice(tmp_path: Path) -> None:
    ours = read_tokenizer(made(tmp_path, "bert"))
    assert ours is not None
    whole = ours.encode("the capital of france", special=True)
    assert ours.encode("[CLS] the capital of france [SEP]", special=True).ids == whole.ids
    assert (whole.before, whole.behind) == (1, 1)
    assert [ours.decode(whole.ids[i]) for i in (0, whole.end)] == ["[CLS]", "[SEP]"]
