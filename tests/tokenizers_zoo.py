"""A small tokenizer folder for each family, as its hub folders have them; knows nothing of interv.

What they share is one corpus. A folder has the files, the post-processor and the settings of the
family; transformers' `AutoTokenizer` reads each.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    processors,
    trainers,
)
from tokenizers import pre_tokenizers as pre
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

TEXTS = [
    "The Eiffel Tower is located in the city of",
    "The capital of France is",
    "  two spaces, CAPITALS and 123 numbers",
    "a",
]
END = "<|endoftext|>"


@dataclass(frozen=True)
class Kind:
    """How one family's tokenizer folder is made.

    Attributes:
        build: byte (byte-level BPE), qwen and cohere (their own pre-tokenizers before it),
            metaspace (SentencePiece's BPE), pieces (WordPiece), letters.
        special: tokens at the front of the vocabulary.
        single: the template of tokenizer.json's post-processor; None: it has none.
        config: tokenizer_config.json.
        files: json (tokenizer.json), merges (vocab.json and merges.txt), words (vocab.txt).
        beside: further JSON files.
    """

    build: str
    special: tuple[str, ...]
    single: str | None = None
    config: dict[str, Any] = field(default_factory=dict)
    files: str = "json"
    beside: dict[str, dict[str, Any]] = field(default_factory=dict)


def _named(**roles: str) -> dict[str, str]:
    return {f"{role}_token": text for role, text in roles.items()}


_GPT2 = _named(bos=END, eos=END, unk=END)
_S = _named(bos="<s>", eos="</s>", unk="<unk>")
_OPT = {"bos_token": "</s>", "eos_token": "</s>", "unk_token": "</s>", "pad_token": "<pad>"}
_BERT = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
_ROBERTA = ("<s>", "<pad>", "</s>", "<unk>", "<mask>")
_ESM = ("<cls>", "<pad>", "<eos>", "<unk>", "<mask>")
_LLAMA_3 = "<|begin_of_text|>"
_GEMMA = ("<pad>", "<eos>", "<bos>", "<unk>")
_MASK = {"content": "<mask>", "lstrip": True, "normalized": False, "special": True}
_LLAMA_2 = Kind(
    "metaspace",
    ("<unk>", "<s>", "</s>"),
    "<s> $A",
    {**_S, "tokenizer_class": "LlamaTokenizer", "add_bos_token": True, "legacy": False},
)
_QWEN = Kind("qwen", (END, "<|im_start|>"), None, {"tokenizer_class": "Qwen2Tokenizer"})
_NEOX = {**_GPT2, "tokenizer_class": "GPTNeoXTokenizer"}

FAMILIES: dict[str, Kind] = {
    "gpt2": Kind("byte", (END,), None, {**_GPT2, "tokenizer_class": "GPT2Tokenizer"}, "merges"),
    "gpt_neo": Kind("byte", (END,), None, {**_GPT2, "add_bos_token": False}, "merges"),
    "gptj": Kind("byte", (END,), None, {**_GPT2, "tokenizer_class": "GPT2Tokenizer"}),
    "gpt_neox": Kind("byte", (END, "<|padding|>"), None, _NEOX),
    "gpt_neox_serial": Kind("byte", (END,), f"{END} $A", {**_NEOX, "add_bos_token": True}),
    "opt": Kind(
        "byte",
        ("<s>", "<pad>", "</s>"),
        None,
        {**_OPT, "add_bos_token": True, "tokenizer_class": "GPT2Tokenizer"},
        "merges",
    ),
    "llama": Kind(
        "byte",
        (_LLAMA_3, "<|end_of_text|>"),
        f"{_LLAMA_3} $A",
        {
            **_named(bos=_LLAMA_3, eos="<|end_of_text|>"),
            "tokenizer_class": "PreTrainedTokenizerFast",
        },
    ),
    "mistral": _LLAMA_2,
    "mixtral": _LLAMA_2,
    "qwen2": _QWEN,
    "qwen3": _QWEN,
    "qwen2_moe": Kind("byte", (END,), None, {"tokenizer_class": "Qwen2Tokenizer"}, "merges"),
    "qwen3_moe": _QWEN,
    "gemma": Kind("metaspace", _GEMMA, "<bos> $A", {"tokenizer_class": "GemmaTokenizer"}),
    "gemma2": Kind("metaspace", _GEMMA, "<bos> $A", {"tokenizer_class": "GemmaTokenizerFast"}),
    "gemma3_text": Kind("metaspace", _GEMMA, "<bos> $A", {"add_bos_token": True}),
    "phi3": Kind(
        "metaspace",
        ("<unk>", "<s>", "</s>"),
        None,
        {**_S, "tokenizer_class": "LlamaTokenizer", "add_bos_token": False},
    ),
    "olmo": Kind("byte", (END,), None, _NEOX),
    "olmo2": Kind("byte", (END,), None, {**_GPT2, "tokenizer_class": "GPT2Tokenizer"}),
    "gpt_oss": Kind("byte", ("<|startoftext|>",), None, _named(bos="<|startoftext|>")),
    "falcon": Kind("byte", (">>TITLE<<", END), None, _named(eos=END)),
    "falcon_mq": Kind("byte", (END,), None, {"tokenizer_class": "PreTrainedTokenizerFast"}),
    "falcon_alibi": Kind("byte", (END,), None, {**_GPT2, "tokenizer_class": "CodeGenTokenizer"}),
    "bloom": Kind(
        "byte", ("<unk>", "<s>", "</s>"), None, {**_S, "tokenizer_class": "BloomTokenizerFast"}
    ),
    "mamba": Kind("byte", (END,), None, _NEOX),
    "stablelm": Kind("byte", (END,), f"$A {END}", _NEOX),
    "starcoder2": Kind("byte", (END,), None, {**_GPT2, "tokenizer_class": "GPT2Tokenizer"}),
    "cohere": Kind(
        "cohere",
        ("<PAD>", "<UNK>", "<CLS>", "<SEP>", "<MASK_TOKEN>", "<BOS_TOKEN>"),
        "<BOS_TOKEN> $A",
        {"bos_token": "<BOS_TOKEN>", "tokenizer_class": "CohereTokenizerFast"},
    ),
    "granite": Kind("byte", (END,), None, {**_GPT2, "tokenizer_class": "GPT2Tokenizer"}),
    "phi": Kind("byte", (END,), None, {**_GPT2, "tokenizer_class": "CodeGenTokenizer"}),
    "bert": Kind("pieces", _BERT, "[CLS] $A [SEP]", {"do_lower_case": True}, "words"),
    "roberta": Kind(
        "byte", _ROBERTA, None, {"mask_token": {"__type": "AddedToken", **_MASK}}, "merges"
    ),
    "esm": Kind("letters", _ESM, None, {"tokenizer_class": "EsmTokenizer"}, "words"),
    "blip": Kind("pieces", _BERT, "[CLS] $A [SEP]", {"tokenizer_class": "BertTokenizer"}),
}

OTHERS: dict[str, tuple[str, Kind]] = {
    "bert with a tokenizer.json": ("bert", Kind("pieces", _BERT, "[CLS] $A [SEP]")),
    "bert, cased": (
        "bert",
        Kind(
            "pieces",
            _BERT,
            None,
            {"do_lower_case": False, "tokenizer_class": "BertTokenizer"},
            "words",
        ),
    ),
    "bert whose tokenizer.json adds nothing": ("bert", Kind("pieces", _BERT, None)),
    "roberta with a tokenizer.json": (
        "roberta",
        Kind("byte", _ROBERTA, None, {"tokenizer_class": "RobertaTokenizer"}),
    ),
    "llama 2": ("llama", _LLAMA_2),
    "llama that appends an end": (
        "llama",
        Kind("byte", ("<s>", "</s>"), "<s> $A </s>", _named(bos="<s>", eos="</s>")),
    ),
    "gpt2 with both ends from merges": (
        "gpt2",
        Kind(
            "byte",
            ("<s>", "</s>"),
            None,
            {**_named(bos="<s>", eos="</s>"), "add_bos_token": True, "add_eos_token": True},
            "merges",
        ),
    ),
    "gpt2 with its tokens in special_tokens_map": (
        "gpt2",
        Kind(
            "byte",
            ("<s>", "<pad>", "</s>"),
            None,
            {"add_bos_token": True},
            "merges",
            {
                "special_tokens_map.json": {
                    "bos_token": {"content": "</s>", "normalized": True, "lstrip": False},
                    "pad_token": "<pad>",
                    "additional_special_tokens": ["<s>"],
                },
                "added_tokens.json": {"<new>": 600},
            },
        ),
    ),
    "pythia whose files name the generic class": (
        "gpt_neox",
        Kind("byte", (END,), f"{END} $A", {**_GPT2, "tokenizer_class": "PreTrainedTokenizerFast"}),
    ),
}


def save(folder: Path, config: dict[str, Any], kind: Kind) -> Path:
    """Write a tokenizer folder with the config.json of its model."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer_config.json").write_text(json.dumps(kind.config))
    for name, content in kind.beside.items():
        (folder / name).write_text(json.dumps(content))
    if kind.build == "letters":
        (folder / "vocab.txt").write_text("\n".join([*kind.special, *"ACDEFGHIKLMNPQRSTVWY.-"]))
        return folder
    backend = _backend(kind)
    if kind.files == "json":
        backend.save(str(folder / "tokenizer.json"))
        return folder
    model = json.loads(backend.to_str())["model"]
    if kind.files == "merges":
        (folder / "vocab.json").write_text(json.dumps(model["vocab"]))
        merges = [" ".join(pair) for pair in model["merges"]]
        (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n")
    else:
        words = sorted(model["vocab"], key=model["vocab"].__getitem__)
        (folder / "vocab.txt").write_text("\n".join(words) + "\n")
    return folder


def _backend(kind: Kind) -> Tokenizer:
    corpus = [text for text in [*TEXTS, "x y"] for _ in range(4)]
    special = [AddedToken(text, special=True, normalized=False) for text in kind.special]
    options: dict[str, Any] = {"special_tokens": special, "show_progress": False}
    if kind.build == "pieces":
        backend = Tokenizer(models.WordPiece(unk_token="[UNK]"))
        backend.normalizer = normalizers.BertNormalizer(lowercase=True)
        backend.pre_tokenizer = pre.BertPreTokenizer()
        trainer: Any = trainers.WordPieceTrainer(vocab_size=200, **options)
    elif kind.build == "metaspace":
        backend = Tokenizer(models.BPE(byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
        backend.pre_tokenizer = pre.Metaspace(replacement="▁", prepend_scheme="first", split=False)
        if "<bos>" in kind.special:
            backend.pre_tokenizer = pre.Split(" ", "merged_with_previous")
            backend.normalizer = normalizers.Replace(" ", "▁")
        backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse()])
        trainer = trainers.BpeTrainer(vocab_size=200, **options)
    else:
        backend = Tokenizer(models.BPE())
        backend.pre_tokenizer = pre.ByteLevel(add_prefix_space=False)
        if kind.build == "cohere":
            digits = pre.Digits(individual_digits=True)
            backend.pre_tokenizer = pre.Sequence([digits, pre.ByteLevel(add_prefix_space=False)])
        elif kind.build == "qwen":
            words = pre.Split(Regex(PRETOKENIZE_REGEX), "isolated")
            by_bytes = pre.ByteLevel(add_prefix_space=False, use_regex=False)
            backend.pre_tokenizer = pre.Sequence([words, by_bytes])
            backend.normalizer = normalizers.NFC()
        backend.decoder = decoders.ByteLevel()
        alphabet = pre.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, **options)
    backend.train_from_iterator(corpus, trainer)
    if kind.single:
        found = [(t, backend.token_to_id(t)) for t in kind.special]
        backend.post_processor = processors.TemplateProcessing(
            single=kind.single, special_tokens=found
        )
    return backend
