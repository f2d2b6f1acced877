"""Text to tokens without torch: the `tokenizers` library on a model's own tokenizer files."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from interv.errors import ModelError
from interv.models.cache import text_hash


@dataclass(frozen=True)
class Tokens:
    """A text's token ids, and for each the characters `[start, end)` that it covers."""

    ids: tuple[int, ...]
    offsets: tuple[tuple[int, int], ...]

    def span(self, text: str, start: int, end: int) -> tuple[int, int]:
        """Tokens `[first, last)` that share a non-blank character with `text[start:end]`."""
        inside = [
            i for i, (a, b) in enumerate(self.offsets) if text[max(a, start) : min(b, end)].strip()
        ]
        return (inside[0], inside[-1] + 1) if inside else (0, 0)


class PromptTokenizer:
    """A model's tokenizer; whether a begin-of-text token comes first is said, not implied."""

    def __init__(
        self,
        backend: Tokenizer,
        special: Mapping[str, str] | None = None,
        chat_template: str | None = None,
    ) -> None:
        self._backend = backend
        self._backend.no_truncation()
        self._backend.no_padding()
        self._special = dict(special or {})
        bos = self._special.get("bos_token")
        self.bos_id: int | None = backend.token_to_id(bos) if bos else None
        model = json.loads(backend.to_str())["model"]
        unknown = model.get("unk_token")
        # What stands for a text that the vocabulary does not have.
        self.unk_id: int | None = backend.token_to_id(unknown) if unknown else model.get("unk_id")
        self.chat_template = chat_template

    @property
    def identity(self) -> str:
        """Hash of everything that decides how a text is split."""
        return text_hash(self._backend.to_str() + (self.chat_template or ""))

    @property
    def adds_bos(self) -> bool:
        """Whether the model's own tokenizer puts the begin-of-text token first."""
        return self.bos_id is not None and self._backend.encode("a").ids[:1] == [self.bos_id]

    def encode(self, text: str, *, prepend_bos: bool = False) -> Tokens:
        """Tokens of `text`, special tokens only where they are written in it.

        Raises:
            ModelError: `prepend_bos` where the tokenizer has no such token.
        """
        encoding = self._backend.encode(text, add_special_tokens=False)
        ids, offsets = tuple(encoding.ids), tuple(encoding.offsets)
        if prepend_bos:
            if self.bos_id is None:
                raise ModelError("model.prepend_bos: this tokenizer has no begin-of-text token")
            if ids[:1] != (self.bos_id,):
                return Tokens((self.bos_id, *ids), ((0, 0), *offsets))
        return Tokens(ids, offsets)

    def decode(self, token: int) -> str:
        """The text of one token."""
        return str(self._backend.decode([token], skip_special_tokens=False))

    def chat(self, prompt: str) -> str:
        """`prompt` as a user's turn, up to where the assistant's answer begins.

        Raises:
            ModelError: the model has no chat template, or it cannot be rendered.
        """
        if self.chat_template is None:
            raise ModelError("model.chat_template: this model has no chat template")
        from jinja2 import TemplateError
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        def refuse(message: str) -> None:
            raise TemplateError(message)

        # The settings that chat templates are written for (transformers' own).
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        environment.globals["raise_exception"] = refuse
        environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
        try:
            return environment.from_string(self.chat_template).render(
                messages=[{"role": "user", "content": prompt}],
                add_generation_prompt=True,
                **self._special,
            )
        except Exception as error:  # a template may raise anything
            raise ModelError(f"model.chat_template: cannot be rendered: {error}") from None


def byte_level_bpe(
    vocab: dict[str, int],
    merges: list[tuple[str, str]],
    *,
    split_digits: bool = False,
    special: list[str] | None = None,
) -> Tokenizer:
    """A GPT-2 style tokenizer from its vocabulary and merges."""
    backend = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    steps: list[Any] = [pre_tokenizers.Digits(individual_digits=True)] if split_digits else []
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False))
    backend.pre_tokenizer = pre_tokenizers.Sequence(steps)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(
        [AddedToken(t, special=True, normalized=False) for t in special or []]
    )
    return backend


def read_tokenizer(place: Path) -> PromptTokenizer | None:
    """The tokenizer in a folder (or a tokenizer.json); None where there is none.

    Raises:
        ModelError: the files are there and cannot be read.
    """
    folder = place if place.is_dir() else place.parent
    whole = folder / "tokenizer.json" if place.is_dir() else place
    try:
        if whole.is_file():
            backend = Tokenizer.from_file(str(whole))
        elif (
            place.is_dir()
            and (folder / "vocab.json").is_file()
            and (folder / "merges.txt").is_file()
        ):
            vocab = json.loads((folder / "vocab.json").read_text("utf-8"))
            lines = (folder / "merges.txt").read_text("utf-8").splitlines()
            pairs = [line.split(" ") for line in lines if line and not line.startswith("#version")]
            special = [t for t in ("<|endoftext|>",) if t in vocab]
            backend = byte_level_bpe(vocab, [(a, b) for a, b in pairs], special=special)
        else:
            return None
        return PromptTokenizer(backend, *_settings(folder))
    except ModelError:
        raise
    except Exception as error:  # `tokenizers` raises bare Exception for a bad file
        raise ModelError(f"{folder}: the tokenizer cannot be read: {error}") from error


def _settings(folder: Path) -> tuple[dict[str, str], str | None]:
    """Special tokens and chat template, from the files beside the tokenizer."""
    settings: dict[str, Any] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        if (folder / name).is_file():
            settings |= json.loads((folder / name).read_text("utf-8"))
    special: dict[str, str] = {}
    for name in ("bos_token", "eos_token", "unk_token", "pad_token"):
        token = settings.get(name)
        token = token.get("content") if isinstance(token, dict) else token
        if isinstance(token, str):
            special[name] = token
    template = settings.get("chat_template")
    beside = folder / "chat_template.jinja"
    if beside.is_file():
        template = beside.read_text("utf-8")
    return special, template if isinstance(template, str) else None
