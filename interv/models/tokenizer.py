"""Text to tokens without torch: the `tokenizers` library on a model's own tokenizer."""

from __future__ import annotations

import codecs
import functools
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from interv.errors import ModelError
from interv.models.cache import text_hash
from interv.models.chat import ChatTemplates

_SHOWN = "interv.shown"


def _show_bytes(error: UnicodeError) -> tuple[str, int]:
    assert isinstance(error, UnicodeDecodeError)
    wrong = error.object[error.start : error.end]
    return "".join(f"<{byte:02X}>" for byte in wrong), error.end


codecs.register_error(_SHOWN, _show_bytes)


@functools.cache
def _byte_of() -> dict[str, int]:
    """The byte that each character of a byte-level vocabulary is (GPT-2's `bytes_to_unicode`)."""
    shown = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in shown]
    return {chr(b): b for b in shown} | {chr(256 + i): b for i, b in enumerate(others)}


def _bytes_of(piece: str) -> bytes | None:
    """What a vocabulary's entry is in bytes; None where it is not written as bytes."""
    if single := re.fullmatch(r"<0x([0-9A-F]{2})>", piece):
        return bytes.fromhex(single[1])
    found = [_byte_of().get(character) for character in piece]
    return None if None in found else bytes(byte for byte in found if byte is not None)


@dataclass(frozen=True)
class Tokens:
    """A text's token ids, and for each the characters `[start, end)` that it covers.

    Attributes:
        before: how many special tokens the tokenizer puts in front of the text.
        behind: how many it appends to the text.
    """

    ids: tuple[int, ...]
    offsets: tuple[tuple[int, int], ...]
    before: int = 0
    behind: int = 0

    @property
    def end(self) -> int:
        """The position after the last token of the text."""
        return len(self.ids) - self.behind

    @property
    def body(self) -> tuple[int, ...]:
        """Ids of the text alone."""
        return self.ids[self.before : self.end]

    def span(self, text: str, start: int, end: int) -> tuple[int, int]:
        """Tokens `[first, last)` that share a non-blank character with `text[start:end]`."""
        inside = [
            i for i, (a, b) in enumerate(self.offsets) if text[max(a, start) : min(b, end)].strip()
        ]
        return (inside[0], inside[-1] + 1) if inside else (0, 0)


class PromptTokenizer:
    """A model's tokenizer; a text gets special tokens only where they are asked for.

    Args:
        backend: splits a text; its post-processor adds the special tokens.
        special: texts of the special tokens by role (`bos_token`, `mask_token`, ...).
        chat: the chat templates; a string is the default one.
    """

    def __init__(
        self,
        backend: Tokenizer,
        special: Mapping[str, str] | None = None,
        chat: ChatTemplates | str | None = None,
    ) -> None:
        self._backend = backend
        self._backend.no_truncation()
        self._backend.no_padding()
        self._special = dict(special or {})
        self.bos_id = self._id("bos_token")
        self.mask_id = self._id("mask_token")
        self.cls_id = self._id("cls_token")
        model = json.loads(backend.to_str())["model"]
        unknown = model.get("unk_token")
        # The token that replaces a text that the vocabulary does not have.
        self.unk_id: int | None = backend.token_to_id(unknown) if unknown else model.get("unk_id")
        self.chats = ChatTemplates({"default": chat}) if isinstance(chat, str) else chat

    def _id(self, role: str) -> int | None:
        token = self._special.get(role)
        found: int | None = self._backend.token_to_id(token) if token else None
        return found

    @property
    def identity(self) -> str:
        """Hash of everything that decides how a text is split."""
        templates = self.chats.templates if self.chats else {}
        return text_hash(json.dumps([self._backend.to_str(), self._special, templates]))

    @property
    def added(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Special tokens that the model's own tokenizer adds before and behind a text."""
        tokens = self.encode("a", special=True)
        return tokens.ids[: tokens.before], tokens.ids[tokens.end :]

    def encode(self, text: str, *, special: bool = False, bos: bool = False) -> Tokens:
        """Return the tokens of `text`.

        Special tokens that are written in the text are recognised, and not added once more.

        Args:
            text: any text.
            special: add what the model's own tokenizer adds, before and behind.
            bos: put the begin-of-text token first, whether or not the tokenizer does.

        Raises:
            ModelError: `bos` where the tokenizer has no such token.
        """
        encoding = self._backend.encode(text, add_special_tokens=special)
        of_text = [i for i, sequence in enumerate(encoding.sequence_ids) if sequence is not None]
        before = of_text[0] if of_text else len(encoding.ids) if special else 0
        behind = len(encoding.ids) - 1 - of_text[-1] if of_text else 0
        ids, offsets = tuple(encoding.ids), tuple(encoding.offsets)
        if before and ids[before : 2 * before] == ids[:before]:
            ids, offsets = ids[before:], offsets[before:]
        if behind and ids[-2 * behind : -behind] == ids[-behind:]:
            ids, offsets = ids[:-behind], offsets[:-behind]
        if bos:
            if self.bos_id is None:
                raise ModelError("model.prepend_bos: this tokenizer has no begin-of-text token")
            if ids[:1] != (self.bos_id,):
                return Tokens((self.bos_id, *ids), ((0, 0), *offsets), before + 1, behind)
        return Tokens(ids, offsets, before, behind)

    def decode(self, token: int) -> str:
        """Return the text of one token; of bytes that are no whole character, `<E6><9D>`."""
        text = str(self._backend.decode([token], skip_special_tokens=False))
        if "\ufffd" not in text:
            return text
        piece = self._backend.id_to_token(token) or ""
        data = _bytes_of(piece)
        return text if data is None else data.decode("utf-8", _SHOWN)

    def chat(self, prompt: str, name: str | None = None, date: str | None = None) -> str:
        """Return `prompt` as a user's turn, up to where the assistant's answer begins.

        Args:
            prompt: what the user says.
            name: of the template, where the model has several; None: the default one.
            date: today's date for the template, as YYYY-MM-DD.

        Raises:
            ModelError: the model has no such chat template, or it cannot be rendered.
        """
        if self.chats is None:
            raise ModelError("model.chat_template: this model has no chat template")
        return self.chats.render(prompt, self._special, name, date)


def byte_level_bpe(
    vocab: dict[str, int],
    merges: list[tuple[str, str]],
    *,
    split_digits: bool = False,
    special: list[str] | None = None,
) -> Tokenizer:
    """Return a GPT-2 style tokenizer made from its vocabulary and merges."""
    backend = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    steps: list[Any] = [pre_tokenizers.Digits(individual_digits=True)] if split_digits else []
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False))
    backend.pre_tokenizer = pre_tokenizers.Sequence(steps)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(
        [AddedToken(t, special=True, normalized=False) for t in special or []]
    )
    return backend
