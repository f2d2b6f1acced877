"""From a folder's tokenizer files to the tokenizer that transformers makes of them, without torch.

Some of its classes set the special tokens themselves, whatever tokenizer.json says. What is here of
that is what decides token ids for the files of a hub model; the tests compare it with transformers
for every family.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, processors
from tokenizers import pre_tokenizers as pre

from interv.errors import ModelError
from interv.models.chat import ChatTemplates
from interv.models.tokenizer import PromptTokenizer
from interv.models.tokenizer_classes import DEFAULTS, ROLES, class_of

_QWEN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_WORDPIECE = ("BertTokenizer", "EsmTokenizer")
_FOREIGN = {
    "tokenizer.model": "SentencePiece",
    "spiece.model": "SentencePiece",
    "sentencepiece.bpe.model": "SentencePiece",
    "tekken.json": "Mistral's tekken",
    "tiktoken.model": "tiktoken",
}


@dataclass(frozen=True)
class _Settings:
    """What the JSON files beside a tokenizer say.

    Attributes:
        kind: the class that transformers reads the folder with; None: the generic one.
        named: special tokens by role.
        extra: further special tokens.
        added: tokens with their own ids.
        options: the rest of tokenizer_config.json.
        chats: the chat templates.
    """

    kind: str | None = None
    named: Mapping[str, AddedToken] = field(default_factory=dict)
    extra: tuple[AddedToken, ...] = ()
    added: Mapping[int, AddedToken] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)
    chats: ChatTemplates | None = None

    def text(self, role: str) -> str | None:
        """The special token of a role."""
        return self.named[role].content if role in self.named else None


def read_tokenizer(place: Path, *, as_written: bool = False) -> PromptTokenizer | None:
    """Read the tokenizer in a folder (or a tokenizer.json); None where there is none.

    Args:
        place: a folder, or a tokenizer.json with its settings beside it.
        as_written: take tokenizer.json as it is, whatever class the model's type has.

    Raises:
        ModelError: the files are there and cannot be read.
    """
    folder = place if place.is_dir() else place.parent
    whole = folder / "tokenizer.json" if place.is_dir() else place
    try:
        settings = _settings(folder, generic=as_written or not place.is_dir())
        if whole.is_file() and not (settings.kind == "EsmTokenizer" and _has(folder, "vocab.txt")):
            backend = Tokenizer.from_file(str(whole))
            _add_tokens(backend, settings)
            _special_of_class(backend, settings)
        elif place.is_dir() and _has(folder, "vocab.json", "merges.txt"):
            backend = _from_merges(folder, settings)
        elif place.is_dir() and _has(folder, "vocab.txt"):
            backend = _from_words(folder, settings)
        elif place.is_dir():
            _refuse_foreign(folder)
            return None
        else:
            return None
        special = {role: token.content for role, token in settings.named.items()}
        return PromptTokenizer(backend, special, settings.chats)
    except ModelError:
        raise
    except Exception as error:  # `tokenizers` raises bare Exception for a bad file
        raise ModelError(f"{folder}: the tokenizer cannot be read: {error}") from error


def add_special(backend: Tokenizer, before: str | None, behind: str | None) -> None:
    """Make a tokenizer add these special tokens, both in its vocabulary, round each text."""
    tokens = [token for token in (before, behind) if token]
    single = " ".join([*([before] if before else []), "$A", *([behind] if behind else [])])
    backend.post_processor = processors.TemplateProcessing(
        single=single, special_tokens=[(t, backend.token_to_id(t)) for t in dict.fromkeys(tokens)]
    )


def _has(folder: Path, *names: str) -> bool:
    return all((folder / name).is_file() for name in names)


def _refuse_foreign(folder: Path) -> None:
    found = next((name for name in _FOREIGN if _has(folder, name)), None)
    if found is None:
        return
    convert = (
        "from transformers import AutoTokenizer as A; "
        f"A.from_pretrained('{folder}').save_pretrained('{folder}')"
    )
    raise ModelError(
        f"model.tokenizer: {folder} has {found} ({_FOREIGN[found]}) and no tokenizer.json; have "
        f'transformers write one: python -c "{convert}" '
        "(it needs sentencepiece or tiktoken), or set model.tokenizer to a folder with the "
        "model's tokenizer.json"
    )


def _settings(folder: Path, *, generic: bool) -> _Settings:
    options = _json(folder / "tokenizer_config.json")
    config, whole = _json(folder / "config.json"), folder / "tokenizer.json"
    byte_level = whole.is_file() and '"ByteLevel"' in whole.read_text("utf-8")
    kind = None if generic else class_of(config, options, byte_level=byte_level)
    if not generic and not config and not whole.is_file():
        # Nobody says whose files these are.
        kind = kind or ("BertTokenizer" if _has(folder, "vocab.txt") else "GPT2Tokenizer")
    added = {int(i): _token(t) for i, t in options.get("added_tokens_decoder", {}).items()}
    told = dict(options)
    if not added:
        # Files of before they were all in tokenizer_config.json.
        told |= _json(folder / "special_tokens_map.json")
    defaults = DEFAULTS.get(kind or "", {})
    named = {
        role: _token(told.get(role, defaults.get(role)))
        for role in ROLES
        if told.get(role, defaults.get(role)) is not None
    }
    extra = told.get("extra_special_tokens") or told.get("additional_special_tokens") or []
    own = list(extra.values()) if isinstance(extra, dict) else list(extra)
    own += [
        value
        for key, value in options.items()
        if key.endswith("_token") and key not in ROLES and isinstance(value, str)
    ]
    if not added:
        special = {token.content for token in (*named.values(), *map(_token, own))}
        for text, i in _json(folder / "added_tokens.json").items():
            one = text in special
            added[int(i)] = AddedToken(text, normalized=not one, special=one)
    # A token keeps the flags that it was added with.
    flags = {token.content: token for token in added.values()}
    return _Settings(
        kind,
        {role: flags.get(token.content, token) for role, token in named.items()},
        tuple(map(_token, own)),
        dict(sorted(added.items())),
        options,
        _chats(folder, options),
    )


def _json(path: Path) -> dict[str, Any]:
    """A JSON object; empty where there is no such file."""
    if not path.is_file():
        return {}
    found = json.loads(path.read_text("utf-8"))
    if not isinstance(found, dict):
        raise ModelError(f"{path}: is not a JSON object")
    return found


def _token(told: Any) -> AddedToken:
    if isinstance(told, str):
        return AddedToken(told, special=True)
    names = ("single_word", "lstrip", "rstrip", "normalized", "special")
    flags = {name: told[name] for name in names if name in told}
    return AddedToken(told["content"], **{"special": True, **flags})


def _chats(folder: Path, options: Mapping[str, Any]) -> ChatTemplates | None:
    """The chat templates of a folder: files of their own come before tokenizer_config.json."""
    found: dict[str, str] = {}
    if _has(folder, "chat_template.jinja"):
        found["default"] = (folder / "chat_template.jinja").read_text("utf-8")
    for path in sorted((folder / "additional_chat_templates").glob("*.jinja")):
        found[path.stem] = path.read_text("utf-8")
    told = options.get("chat_template")
    if not found and told is None:
        # Where processors of transformers 4 keep it.
        told = _json(folder / "chat_template.json").get("chat_template")
    if not found and isinstance(told, str):
        found["default"] = told
    elif not found and isinstance(told, list):
        found = {entry["name"]: entry["template"] for entry in told}
    elif not found and isinstance(told, dict):
        found = {str(name): str(template) for name, template in told.items()}
    return ChatTemplates(found) if found else None


def _add_tokens(backend: Tokenizer, settings: _Settings) -> None:
    """Have a tokenizer recognise every added and special token of its settings."""
    there = {repr(token) for token in backend.get_added_tokens_decoder().values()}
    backend.add_tokens([token for token in settings.added.values() if repr(token) not in there])
    known = {token.content for token in backend.get_added_tokens_decoder().values()}
    for token in (*settings.named.values(), *settings.extra):
        if token.content not in known:
            known.add(token.content)
            backend.add_special_tokens([token])


def _special_of_class(backend: Tokenizer, settings: _Settings) -> None:
    """Set the special tokens that a class adds whatever tokenizer.json says."""
    model = json.loads(backend.to_str())["model"].get("type")
    if settings.kind == "BertTokenizer" and model == "WordPiece":
        add_special(backend, settings.text("cls_token"), settings.text("sep_token"))
    elif settings.kind == "RobertaTokenizer" and model == "BPE":
        _roberta(backend, settings)
    elif settings.kind == "GPTNeoXTokenizer" and model == "BPE":
        add_special(backend, None, None)


def _roberta(backend: Tokenizer, settings: _Settings) -> None:
    added = backend.get_vocab(with_added_tokens=True)
    sides = [str(settings.text(role)) for role in ("sep_token", "cls_token")]
    separator, first = [(token, added[token]) for token in sides]
    prefix = bool(settings.options.get("add_prefix_space", False))
    trim = bool(settings.options.get("trim_offsets", True))
    backend.post_processor = processors.RobertaProcessing(separator, first, trim, prefix)


def _from_merges(folder: Path, settings: _Settings) -> Tokenizer:
    """A byte-level BPE from vocab.json and merges.txt."""
    prefix = bool(settings.options.get("add_prefix_space", False))
    before: dict[str, tuple[Any, Any]] = {
        "GPT2Tokenizer": (None, pre.ByteLevel(add_prefix_space=prefix)),
        "RobertaTokenizer": (None, pre.ByteLevel(add_prefix_space=prefix)),
        "GPTNeoXTokenizer": (normalizers.NFC(), pre.ByteLevel(add_prefix_space=prefix)),
        "Qwen2Tokenizer": (
            normalizers.NFC(),
            pre.Sequence(
                [
                    pre.Split(Regex(_QWEN), "isolated"),
                    pre.ByteLevel(add_prefix_space=prefix, use_regex=False),
                ]
            ),
        ),
    }
    kind = settings.kind
    if kind not in before:
        raise ModelError(
            f"model.tokenizer: {folder} has vocab.json and merges.txt{_of(kind)} and no "
            "tokenizer.json, so how it splits a text is not known; expected a tokenizer.json, or "
            f"tokenizer_class in tokenizer_config.json: {', '.join(before)}"
        )
    names = (str(folder / "vocab.json"), str(folder / "merges.txt"))
    backend = Tokenizer(models.BPE(*models.BPE.read_file(*names)))
    normalizer, splits = before[kind]
    if normalizer is not None:
        backend.normalizer = normalizer
    backend.pre_tokenizer = splits
    backend.decoder = decoders.ByteLevel()
    _add_tokens(backend, settings)
    if kind == "RobertaTokenizer":
        _roberta(backend, settings)
    else:
        add_special(backend, *_asked(settings))
    return backend


def _asked(settings: _Settings) -> Iterator[str | None]:
    """The tokens of `add_bos_token` and `add_eos_token`."""
    for role in ("bos_token", "eos_token"):
        yield settings.text(role) if settings.options.get(f"add_{role}") else None


def _from_words(folder: Path, settings: _Settings) -> Tokenizer:
    """A tokenizer from vocab.txt: BERT's word pieces, or the letters of ESM."""
    kind, options = settings.kind, settings.options
    if kind not in _WORDPIECE:
        raise ModelError(
            f"model.tokenizer: {folder} has vocab.txt{_of(kind)} and no tokenizer.json, so how it "
            "splits a text is not known; expected a tokenizer.json, or tokenizer_class in "
            f"tokenizer_config.json: {' or '.join(_WORDPIECE)}"
        )
    unknown = settings.text("unk_token")
    vocab = models.WordPiece.read_file(str(folder / "vocab.txt"))
    if kind == "EsmTokenizer":
        backend = Tokenizer(models.WordLevel(vocab, unk_token=unknown))
        backend.pre_tokenizer = pre.WhitespaceSplit()
        # Every token is found wherever it is written, the longest one first.
        backend.add_tokens([AddedToken(token, normalized=False) for token in vocab])
        _add_tokens(backend, settings)
        add_special(backend, settings.text("cls_token"), settings.text("eos_token"))
        return backend
    backend = Tokenizer(models.WordPiece(vocab, unk_token=unknown))
    backend.normalizer = normalizers.BertNormalizer(
        clean_text=True,
        handle_chinese_chars=options.get("tokenize_chinese_chars", True),
        strip_accents=options.get("strip_accents"),
        lowercase=options.get("do_lower_case", True),
    )
    backend.pre_tokenizer = pre.BertPreTokenizer()
    backend.decoder = decoders.WordPiece(prefix="##")
    _add_tokens(backend, settings)
    add_special(backend, settings.text("cls_token"), settings.text("sep_token"))
    return backend


def _of(kind: str | None) -> str:
    return f" of a {kind}" if kind else ""
