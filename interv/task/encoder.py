"""Prompts as the model sees them: chat template and special tokens, as the spec asks for them."""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass

from interv.models import PromptTokenizer, Tokens
from interv.models.chat import CHAT_DATE
from interv.spec.schema import CLS, LAST, MASK, ModelSection

Ids = tuple[int, ...]


@dataclass(frozen=True)
class Encoder:
    """A tokenizer with the spec's choices applied; what is unset is as the model's own does it.

    Attributes:
        tokenizer: of the model.
        section: the spec's model.
    """

    tokenizer: PromptTokenizer
    section: ModelSection

    def wrap(self, prompt: str) -> tuple[str, int | None]:
        """Return the text that the model sees, and where in it the prompt begins.

        The place is None where the chat template holds the prompt not exactly once.

        Raises:
            ModelError: there is no such template, or it cannot be rendered.
        """
        wanted = self.section.chat_template
        if not wanted:
            return prompt, 0
        name = wanted if isinstance(wanted, str) else None
        text = self.tokenizer.chat(prompt, name, self.section.chat_date)
        return text, text.index(prompt) if text.count(prompt) == 1 else None

    def encode(self, text: str) -> Tokens:
        """Return the tokens of a wrapped text with its special tokens.

        A chat template writes its own, as in `apply_chat_template` of transformers.
        """
        bos = self.section.prepend_bos
        special = bos is not False and not self.section.chat_template
        return self.tokenizer.encode(text, special=special, bos=bool(bos))

    def follows(self, text: str, tokens: Tokens, answer: str) -> Ids | None:
        """Return the ids of an answer behind a text, without special tokens.

        None where the answer runs together with the last token of the text.
        """
        both = self.encode(text + answer).body
        n = len(tokens.body)
        return both[n:] if both[:n] == tokens.body else None

    def marks(self, tokens: Tokens) -> dict[str, tuple[int, ...]]:
        """Return the positions that have names of their own.

        `END` is the last token of the text, before what the tokenizer appends; `MASK` the mask
        token, where there is one; `CLS` the token that the tokenizer puts first for a classifier.
        """
        found: dict[str, tuple[int, ...]] = {LAST: (tokens.end - 1,)}
        masks = [i for i, token in enumerate(tokens.ids) if token == self.tokenizer.mask_id]
        if len(masks) == 1:
            found[MASK] = (masks[0],)
        if tokens.before and tokens.ids[0] == self.tokenizer.cls_id:
            found[CLS] = (0,)
        return found

    @property
    def expected_mask(self) -> str:
        """What a prompt needs for a model that fills in a mask."""
        mask = self.tokenizer.mask_id
        if mask is None:
            return "a tokenizer with a mask token"
        return f"{self.tokenizer.decode(mask)} once in the prompt"

    @property
    def record(self) -> Mapping[str, object]:
        """What was done to each prompt, for the run's record."""
        model, tokenizer = self.section, self.tokenizer
        before, behind = ((), ()) if model.chat_template else tokenizer.added
        if model.prepend_bos is False:
            before, behind = (), ()
        told: dict[str, object] = {
            "prepend_bos": model.prepend_bos,
            "special_tokens": [[tokenizer.decode(i) for i in ids] for ids in (before, behind)],
            "chat_template": model.chat_template,
        }
        wanted = model.chat_template
        name = wanted if isinstance(wanted, str) else None
        if wanted and tokenizer.chats and (model.chat_date or tokenizer.chats.asks_for_date(name)):
            told["chat_date"] = model.chat_date or CHAT_DATE
        return told


def continued(ids: Ids, tail: Ids, behind: int) -> Ids:
    """Return a prompt's ids with what is given of its answer, before the appended tokens."""
    end = len(ids) - behind
    return (*ids[:end], *tail, *ids[end:])


def moved(positions: Ids, given: int, end: int) -> Ids:
    """Return where a prompt's positions are once `given` tokens of an answer stand at `end`."""
    return tuple(p if p < end else p + given for p in positions)


def look_alike(word: str, text: str, what: str) -> str | None:
    """Return what tells `word` from a part of `text` that looks the same; None: nothing does.

    Text may be composed otherwise (NFC, NFD), or have other spaces: equal to the eye, and
    unequal as code points.

    Args:
        word: what is looked for.
        text: where it is not found.
        what: the word's name in the message.
    """
    wanted = _seen(word)
    for start in range(len(text)):
        for stop in range(start + 1, len(text) + 1):
            found = text[start:stop]
            seen = _seen(found)
            if seen == wanted and found != word:
                pairs = enumerate(zip(word, found, strict=False))
                shorter = min(len(word), len(found))
                at = next((i for i, (a, b) in pairs if a != b), shorter)
                return f"{what} has {_points(word, at)}, the prompt {_points(found, at)}"
            if len(seen) > len(wanted):
                break
    return None


def _seen(text: str) -> str:
    """How a text looks: compatible characters composed, every space a space, nothing unseen."""
    shown = "".join(
        " " if unicodedata.category(c) == "Zs" else c
        for c in text
        if unicodedata.category(c) != "Cf"
    )
    return unicodedata.normalize("NFKC", shown)


def _points(text: str, at: int) -> str:
    """A character and what combines with it, as code points with their names."""
    end = at + 1
    while end < len(text) and unicodedata.combining(text[end]):
        end += 1
    told = [f"U+{ord(c):04X} ({unicodedata.name(c, 'no name')})" for c in text[at:end]]
    return " ".join(told) or "no more characters"
