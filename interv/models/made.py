"""Models made on the spot, as far as they are known before they are made: no torch here."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, final

import numpy as np
from numpy.typing import NDArray
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

from interv.errors import EngineError, ModelError
from interv.models.anatomy import Anatomy
from interv.models.cache import cached, text_hash
from interv.models.config import ModelFacts, read_facts
from interv.models.families import Family, Stand
from interv.models.locate import ModelFiles
from interv.models.tokenizer_files import read_tokenizer
from interv.spec.made import MlpSection, TransformerSection

Scalar = bool | int | float | str

_VERSION = 1
"""Raised when the same section comes to mean another model."""

_DEFAULT_HIDDEN = (16, 16, 16)
_SPECIAL = ("<s>", "<unk>")
# A word or a sign with the space before it, as GPT-2 takes them; any other space by itself.
_PIECE = Regex(r" ?\w+| ?[^\w\s]|\s+")

MLP = Family(
    "MLP",
    ("mlp",),
    "h",
    {"block_input": Stand("", "input"), "block_output": Stand("")},
    {"logits": Stand("score", width="vocab")},
    causal=False,
    interface=False,
    note="an MLP's block is one linear layer and its activation",
)


@final
@dataclass(frozen=True)
class MlpAnatomy(Anatomy):
    """Where the components of an MLP stand; its blocks need not be equally wide.

    Attributes:
        widths: of the inputs, then of each block's output.
    """

    widths: tuple[int, ...] = ()

    def width(self, component: str) -> int | None:
        """How many columns a component has; None where that depends on the layer."""
        if component in ("block_input", "block_output"):
            found = self.widths[:-1] if component == "block_input" else self.widths[1:]
            return found[0] if len(set(found)) == 1 else None
        return super().width(component)

    def width_at(self, component: str, layer: int) -> int | None:
        """How many columns a component of one layer has.

        Raises:
            EngineError: there is no such component or layer.
        """
        self.place(component, layer)
        if component in ("block_input", "block_output"):
            return self.widths[layer + (component == "block_output")]
        return self.width(component)


def mlp_anatomy(inputs: int, hidden: Sequence[int], outputs: int) -> MlpAnatomy:
    """The anatomy of an MLP: components `block_input`, `block_output` and `logits`.

    Args:
        inputs: width of its input.
        hidden: width of each hidden layer, which is what a block gives.
        outputs: how many logits it gives.

    Raises:
        EngineError: it has no hidden layer.
    """
    if not hidden:
        raise EngineError("an MLP has at least one hidden layer")
    facts = ModelFacts(
        model_type="mlp",
        n_layers=len(hidden),
        n_heads=0,
        n_kv_heads=0,
        d_model=max(hidden),
        d_head=0,
        d_mlp=max(hidden),
        n_positions=1,
        vocab_size=outputs,
        n_params=_count(inputs, hidden, outputs),
    )
    return MlpAnatomy(MLP, facts, widths=(inputs, *hidden))


def _count(inputs: int, hidden: Sequence[int], outputs: int) -> int:
    widths = (inputs, *hidden, outputs)
    return sum((a + 1) * b for a, b in pairwise(widths))


@dataclass(frozen=True)
class MlpShape:
    """An MLP's widths, what the spec leaves open filled in from the causal model."""

    inputs: int
    hidden: tuple[int, ...]
    outputs: int

    @property
    def anatomy(self) -> MlpAnatomy:
        """Where its components stand."""
        return mlp_anatomy(self.inputs, self.hidden, self.outputs)


def mlp_shape(section: MlpSection, inputs: int, outputs: int) -> MlpShape:
    """An MLP's widths.

    Args:
        section: of the spec.
        inputs: how wide the causal model's input vectors are together.
        outputs: how many values its output has.

    Raises:
        ModelError: the section says otherwise, or the hand-set network does not fit.
    """
    if section.inputs not in (None, inputs):
        raise ModelError(
            f"model.inputs: {section.inputs}, but the causal model's input vectors are {inputs} "
            "wide together; leave it out to have it filled in"
        )
    if section.outputs is not None and section.outputs < outputs:
        raise ModelError(
            f"model.outputs: {section.outputs}, but the causal model's output has {outputs} "
            "values; leave it out to have it filled in"
        )
    if section.weights != "equality":
        return MlpShape(
            inputs, tuple(section.hidden or _DEFAULT_HIDDEN), section.outputs or outputs
        )
    hidden = tuple(section.hidden or (inputs, inputs))
    if inputs % 4 or hidden != (inputs, inputs) or outputs != 2:
        raise ModelError(
            f"model.weights: equality takes four vectors of the same width and gives two answers, "
            f"with two hidden layers as wide as its inputs; here are {inputs} inputs, hidden "
            f"{list(hidden)}, {outputs} answers"
        )
    return MlpShape(inputs, hidden, 2)


def classes_of(values: Sequence[Scalar] | None, output: str) -> tuple[Scalar, ...]:
    """Which value of the causal model's output each logit stands for: in ascending order.

    Args:
        values: those that the output may have; None: not known.
        output: its name.

    Raises:
        ModelError: they are not known, or only one.
    """
    if values is None or len(set(values)) < 2:
        found = "are not known" if values is None else f"are {list(values)}"
        raise ModelError(
            f"causal_model.output: the values of '{output}' {found}; an MLP answers with one of "
            "two or more, each of which has a logit"
        )
    try:
        return tuple(sorted(set(values)))
    except TypeError:
        return tuple(sorted(set(values), key=str))


def class_indices(classes: Sequence[Scalar], labels: NDArray[Any]) -> NDArray[np.int64]:
    """The logit `[n]` of each label `[n]`.

    Raises:
        ModelError: a label is none of the classes.
    """
    found = np.full(len(labels), -1, dtype=np.int64)
    for index, value in enumerate(classes):
        found[labels == value] = index
    if (found < 0).any():
        other = labels[found < 0][0]
        raise ModelError(f"the causal model's output is {other!r}, none of {list(classes)}")
    return found


def made_identity(section: MlpSection, shape: MlpShape, seed: int, task: str) -> str:
    """Hash of all that decides an MLP's weights.

    Args:
        section: of the spec.
        shape: its widths, all filled in.
        seed: of the spec, where the section has none.
        task: identity of the causal model whose labels it learns.
    """
    given = section.model_dump(mode="json", exclude={"hidden", "inputs", "outputs", "train"})
    # An accuracy that is asked for changes no weight.
    train = section.train.model_dump(mode="json", exclude={"seed", "min_accuracy"})
    decides = [
        _VERSION,
        given,
        asdict(shape),
        train if section.weights == "trained" else None,
        seed if section.train.seed is None else section.train.seed,
        task,
    ]
    return text_hash(json.dumps(decides, sort_keys=True))


def word_tokenizer(texts: Sequence[str]) -> Tokenizer:
    """A tokenizer of whole words and single signs, each with the space before it.

    Args:
        texts: every word of theirs is a token; all others are `<unk>`.
    """
    pieces = pre_tokenizers.Split(_PIECE, "isolated")
    words = {word for text in texts for word, _ in pieces.pre_tokenize_str(text)}
    vocabulary = {word: i for i, word in enumerate((*_SPECIAL, *sorted(words - {*_SPECIAL})))}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token=_SPECIAL[1]))
    backend.pre_tokenizer = pieces
    backend.decoder = decoders.Fuse()
    backend.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in _SPECIAL])
    return backend


def made_files(
    section: TransformerSection, texts: Sequence[str], seed: int, task: str
) -> ModelFiles:
    """What is known of a small transformer before it is trained: shape, tokens, identity.

    Its `folder` in the cache has a config and a tokenizer, and no weights.

    Args:
        section: of the spec.
        texts: prompts and answers with every word that the task has.
        seed: of the spec, where the section has none.
        task: identity of the causal model: a hash of its declaration.

    Raises:
        ModelError: the config has no room for the words or the prompts, or is of no language
            model.
        StorageError: the cache cannot be written.
    """
    backend = word_tokenizer(texts)
    config = {**section.config}
    size = config.setdefault("vocab_size", backend.get_vocab_size())
    if not isinstance(size, int) or size < backend.get_vocab_size():
        raise ModelError(
            f"model.config: vocab_size is {size}, and the task has {backend.get_vocab_size()} "
            "words; leave it out to have it filled in"
        )
    # Of many families the usual ones are far behind so few words.
    for name, value in (("bos_token_id", 0), ("eos_token_id", 0), ("pad_token_id", None)):
        config.setdefault(name, value)
    facts = read_facts(config, "model.config")
    if facts.family is not None and facts.family.auto != "AutoModelForCausalLM":
        raise ModelError(
            f"model.config: {facts.model_type} is no causal language model; expected gpt2, llama "
            "or another that continues a text"
        )
    longest = max((len(backend.encode(text).ids) for text in texts), default=0)
    if facts.n_positions is not None and longest > facts.n_positions:
        raise ModelError(
            f"model.config: {facts.n_positions} positions, and the longest prompt has {longest} "
            "tokens"
        )

    def build(folder: Path) -> None:
        backend.save(str(folder / "tokenizer.json"))
        # The class is for transformers, which would read the family's own kind of tokenizer.
        settings = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": _SPECIAL[0],
            "unk_token": _SPECIAL[1],
        }
        (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=1))
        (folder / "config.json").write_text(json.dumps(config, indent=1))

    words = text_hash(json.dumps([_VERSION, config, backend.to_str()], sort_keys=True))
    folder = cached(f"made/words-{words[:16]}", build)
    # An accuracy that is asked for changes no weight, nor do the numbers it then computes in.
    train = section.train.model_dump(mode="json", exclude={"seed", "min_accuracy"})
    own = seed if section.train.seed is None else section.train.seed
    return ModelFiles(
        f"small {facts.model_type}",
        "folder",
        folder,
        config=config,
        facts=facts,
        tokenizer=read_tokenizer(folder),
        identity=text_hash(json.dumps([words, train, own, task], sort_keys=True)),
    )
