from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

from interv.errors import ModelError
from interv.models.tokenizer import PromptTokenizer, byte_level_bpe
from interv.models.tokenizer_files import read_tokenizer
from tests.conftest import save_tokenizer


@pytest.fixture
def tokenizer(tmp_path: Path) -> PromptTokenizer:
    save_tokenizer(tmp_path)
    found = read_tokenizer(tmp_path)
    assert found is not None
    return found


def test_a_span_covers_what_shares_a_character(tokenizer: PromptTokenizer) -> None:
    text = "in downtown Seattle now"
    tokens = tokenizer.encode(text)
    first, end = tokens.span(text, 3, 11)
    assert "".join(tokenizer.decode(i) for i in tokens.ids[first:end]) == " downtown"
    assert tokens.span(text, 2, 3) == (0, 0)


def test_a_begin_of_text_token_comes_first_once(tokenizer: PromptTokenizer) -> None:
    plain = tokenizer.encode("The Space")
    with_bos = tokenizer.encode("The Space", bos=True)
    assert with_bos.ids == (tokenizer.bos_id, *plain.ids)
    assert tokenizer.encode("<s>The Space", bos=True).ids == with_bos.ids
    assert tokenizer.added == ((), ())


def test_whether_the_model_adds_one_is_read_from_its_files(tmp_path: Path) -> None:
    save_tokenizer(tmp_path)
    backend = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", backend.token_to_id("<s>"))]
    )
    adds = PromptTokenizer(backend, {"bos_token": "<s>"})
    assert adds.added == ((adds.bos_id,), ())
    assert (
        PromptTokenizer(backend, {"bos_token": "<s>"}).encode("in").ids
        == PromptTokenizer(backend).encode("in").ids
    )


def test_without_one_it_cannot_be_prepended(tokenizer: PromptTokenizer) -> None:
    tokenizer.bos_id = None
    with pytest.raises(ModelError, match="no begin-of-text"):
        tokenizer.encode("x", bos=True)


def test_vocab_and_merges_are_enough(tmp_path: Path, tokenizer: PromptTokenizer) -> None:
    model = json.loads((tmp_path / "tokenizer.json").read_text())["model"]
    old = tmp_path / "old"
    old.mkdir()
    (old / "vocab.json").write_text(json.dumps(model["vocab"]))
    merges = [" ".join(pair) for pair in model["merges"]]
    (old / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]))
    found = read_tokenizer(old)
    assert found is not None
    assert found.encode("The Space Needle").ids == tokenizer.encode("The Space Needle").ids


def test_no_files_are_no_tokenizer_and_broken_ones_an_error(tmp_path: Path) -> None:
    assert read_tokenizer(tmp_path) is None
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ModelError, match="cannot be read"):
        read_tokenizer(tmp_path)


@given(st.text(st.characters(codec="utf-8"), max_size=40))
def test_digits_split_one_by_one_and_nothing_is_lost(text: str) -> None:
    alphabet = byte_alphabet()
    merges = [("1", "2"), ("a", "b")]
    vocab = {c: i for i, c in enumerate([*alphabet, "12", "ab"])}
    split = PromptTokenizer(byte_level_bpe(vocab, merges, split_digits=True))
    whole = PromptTokenizer(byte_level_bpe(vocab, merges))
    assert vocab["12"] not in split.encode(text + "12").ids
    assert vocab["12"] in whole.encode("12").ids
    assert len(split.encode(text).ids) >= len(whole.encode(text).ids)


def byte_alphabet() -> list[str]:
    from tokenizers import pre_tokenizers

    return sorted(pre_tokenizers.ByteLevel.alphabet())


@given(st.text(min_size=1, max_size=12))
def test_tokens_of_single_bytes_are_told_apart(text: str) -> None:
    """Each byte of a character that is not a token is shown as its code, and nothing else."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = PromptTokenizer(byte_level_bpe({c: i for i, c in enumerate(alphabet)}, []))
    shown = [tokenizer.decode(i) for i in tokenizer.encode(text).ids]
    assert shown == [chr(b) if b < 0x80 else f"<{b:02X}>" for b in text.encode()]


def test_bytes_of_a_character_and_a_part_of_the_next() -> None:
    """A merged token may end within a character; SentencePiece writes single bytes by name."""
    east = "".join(chr(c) for c in (0xE6, 0x13F, 0xB1))  # as GPT-2's vocabulary writes 東
    vocab = {piece: i for i, piece in enumerate(["Ġ" + east + "æ", east, "Ļ"])}
    tokenizer = PromptTokenizer(byte_level_bpe(vocab, []))
    assert [tokenizer.decode(i) for i in range(3)] == [" 東<E6>", "東", "<99>"]
    pieces = Tokenizer(models.BPE({"<unk>": 0, "<0xE6>": 1, "<0x41>": 2}, [], byte_fallback=True))
    pieces.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    assert [PromptTokenizer(pieces).decode(i) for i in (1, 2)] == ["<E6>", "A"]
