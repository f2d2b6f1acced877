"""Interchanges as prompts: bases and sources as tokens and spans, each label a token."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from interv.models import PromptTokenizer
from interv.spec.schema import LAST, MASK, ModelSection
from interv.task.causal_model import CausalModel
from interv.task.causal_pairs import Interchanges
from interv.task.causal_text import answer_text, render, spans
from interv.task.causal_values import CausalError
from interv.task.encoder import Encoder

Ids = tuple[int, ...]


@dataclass(frozen=True)
class Said:
    """One prompt.

    Attributes:
        spans: positions of each variable's words; `END` is the last token of the text.
        read: the position that predicts the answer: `END`, or the mask of a masked model.
        answer: the token that should follow, and its text.
    """

    text: str
    ids: Ids
    spans: Mapping[str, tuple[int, ...]]
    read: int
    answer: str
    answer_id: int


@dataclass(frozen=True)
class Exchange:
    """A base, a source for each variable, and what should follow once they are exchanged.

    Attributes:
        index: in the data, over all splits.
        split: train, validation or test.
        sources: for each variable; the base itself where it is not exchanged.
        exchanged: names of the variables that are.
    """

    index: int
    split: str
    base: Said
    sources: tuple[Said, ...]
    exchanged: tuple[str, ...]
    label: str
    label_id: int

    @property
    def changes(self) -> bool:
        """Whether the label is another than the base's own answer."""
        return self.label_id != self.base.answer_id


class Reader:
    """Tokenises the prompts of one causal model; each text once.

    Args:
        model: its words single tokens already.
        tokenizer: of the model that is tried.
        section: which special tokens and chat template go round the prompts.
        masked: the model that is tried is a masked language model.
    """

    def __init__(
        self,
        model: CausalModel,
        tokenizer: PromptTokenizer,
        section: ModelSection,
        *,
        masked: bool = False,
    ) -> None:
        self._model, self._encoder, self._masked = model, Encoder(tokenizer, section), masked
        self._known: dict[tuple[str, str], Said] = {}

    def exchanges(self, made: Interchanges, split: str, first: int) -> list[Exchange]:
        """All of the samples, numbered from `first`.

        Raises:
            CausalError: an answer that is not one token, or runs together with its prompt.
        """
        model = self._model
        bases = self._said(made.base, made.template)
        sources = [
            self._said(values, templates)
            for values, templates in zip(made.sources, made.source_templates, strict=True)
        ]
        found = []
        for i, base in enumerate(bases):
            label = answer_text(model, made.label[i])
            names = tuple(
                name for name, on in zip(made.variables, made.exchanged[i], strict=True) if on
            )
            own = tuple(of[i] for of in sources)
            label_id = self.token(base.text, label)
            found.append(Exchange(first + i, split, base, own, names, label, label_id))
        return found

    def token(self, text: str, answer: str) -> int:
        """The one token that an answer is after a prompt.

        Raises:
            CausalError: it is none, or several.
        """
        encoder = self._encoder
        answer = answer.lstrip() if encoder.section.chat_template else answer
        ids = encoder.follows(text, encoder.encode(text), answer)
        if ids is None or len(ids) != 1:
            message = f"the answer {answer!r} is not one token after {text[-30:]!r}"
            raise CausalError(message, "answers of one token", at=("answer",))
        if ids[0] == encoder.tokenizer.unk_id:
            message = f"the answer {answer!r} is not in the model's vocabulary"
            raise CausalError(message, "answers of one token", at=("answer",))
        return ids[0]

    def _said(self, values: Mapping[str, object], templates: object) -> list[Said]:
        model = self._model
        filled = render(model, values, templates)  # type: ignore[arg-type]
        output = values[model.output]
        answers = [answer_text(model, value) for value in output]  # type: ignore[attr-defined]
        return [
            self._one(one.text, spans(one), answer)
            for one, answer in zip(filled, answers, strict=True)
        ]

    def _one(self, prompt: str, places: Mapping[str, tuple[int, int]], answer: str) -> Said:
        if (prompt, answer) not in self._known:
            encoder = self._encoder
            text, offset = encoder.wrap(prompt)
            if offset is None:
                message = f"the chat template holds the prompt not exactly once: {prompt!r}"
                raise CausalError(message, "prompts that are no part of the template")
            tokens = encoder.encode(text)
            marks = encoder.marks(tokens)
            if self._masked and MASK not in marks:
                message = f"a masked language model predicts at its mask; {prompt!r} has not one"
                raise CausalError(message, encoder.expected_mask, at=("templates",))
            read = marks[MASK if self._masked else LAST][0]
            found = {}
            for name, (start, end) in places.items():
                first, last = tokens.span(text, offset + start, offset + end)
                found[name] = tuple(range(first, last))
            self._known[prompt, answer] = Said(
                text, tokens.ids, {**found, **marks}, read, answer, self.token(text, answer)
            )
        return self._known[prompt, answer]


def position_of(said: Said, unit: int | str | None) -> tuple[int, ...] | None:
    """Positions that a unit means in a prompt: a span's last token, an index; None: all.

    Raises:
        KeyError: the prompt has no such span.
        IndexError: it is too short.
    """
    if unit is None:
        return None
    length = len(said.ids)
    if isinstance(unit, str):
        return (said.spans[unit][-1],)
    if not -length <= unit < length:
        raise IndexError(f"position {unit} of {length} tokens")
    return (unit % length,)


def span_names(exchanges: Sequence[Exchange]) -> list[str]:
    """Spans that every prompt has, in the order of the first one."""
    said = [one for exchange in exchanges for one in (exchange.base, *exchange.sources)]
    common = set.intersection(*(set(one.spans) for one in said)) if said else set()
    return [name for name in said[0].spans if name in common] if said else []
