"""Pairs of prompts (a prompt and its counterfactual) as tokens, named spans and answers."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass

from interv.errors import ModelError, Problem, nearest
from interv.models import PromptTokenizer, Tokens
from interv.spec import LoadedSpec
from interv.spec.patch import PairsSection, PatchSpec
from interv.spec.schema import LAST, MASK
from interv.task.encoder import Encoder, continued
from interv.task.left_out import LeftOut, copy_of
from interv.task.pair_texts import WrongPairError, pair_examples
from interv.task.tasks import Example

Ids = tuple[int, ...]


@dataclass(frozen=True)
class Pair:
    """One prompt and its counterfactual, tokenised.

    Attributes:
        index: its row in the data, from 0; `prompt_id` in the results.
        ids, corrupted_ids: of the clean prompt, and of its counterfactual (None: it has none),
            of equal length; with the special tokens that the tokenizer adds.
        answers, wrong: the texts, as they follow the prompt; several answers are all right.
        answer_ids, wrong_ids: token ids of each.
        spans: named positions; `END` is the last token of every prompt's text.
        group: names the template, length and positions of spans: prompts that have them in
            common may stand in for each other under mean and resample ablation.
        read: the position that predicts the answer, or its first token.
        behind: how many special tokens follow the text.
    """

    index: int
    text: str
    corrupted_text: str
    ids: Ids
    tokens: tuple[str, ...]
    corrupted_ids: Ids | None
    corrupted_tokens: tuple[str, ...]
    answers: tuple[str, ...]
    answer_ids: tuple[Ids, ...]
    wrong: tuple[str, ...]
    wrong_ids: tuple[Ids, ...]
    spans: Mapping[str, tuple[int, ...]]
    group: str
    read: int
    behind: int = 0

    def run_ids(self, tail: Ids) -> Ids:
        """The clean prompt with what is given of an answer, by teacher forcing."""
        return continued(self.ids, tail, self.behind)

    def corrupted_run_ids(self, tail: Ids) -> Ids:
        """The same of its counterfactual; empty where there is none."""
        return continued(self.corrupted_ids, tail, self.behind) if self.corrupted_ids else ()

    @property
    def ends_text(self) -> bool:
        """Whether the answer follows the text, and is not read within it."""
        return self.read == self.spans[LAST][0]

    @property
    def first_changed(self) -> int:
        """The first position at which the two prompts differ; their length where none does."""
        others = self.corrupted_ids or self.ids
        pairs = zip(self.ids, others, strict=True)
        return next((i for i, (a, b) in enumerate(pairs) if a != b), len(self.ids))

    @property
    def all_ids(self) -> tuple[Ids, ...]:
        """Token ids of every answer, the right ones first."""
        return (*self.answer_ids, *self.wrong_ids)

    @property
    def tails(self) -> tuple[Ids, ...]:
        """What is given of the answers before their last tokens, each once."""
        return tuple(dict.fromkeys(ids[:-1] for ids in self.all_ids))

    @property
    def content(self) -> Hashable:
        """What decides every value of the pair: equal for copies, whatever order answers have."""
        answers = frozenset(self.answer_ids), frozenset(self.wrong_ids)
        return self.ids, self.corrupted_ids, *answers, self.read, self.behind

    def source(self, over: str) -> Ids:
        """The prompt that others' ablations take activations from."""
        return self.ids if over == "clean" else self.corrupted_ids or ()

    def span(self, name: str) -> tuple[int, ...]:
        """Positions of a named span."""
        return self.spans[name]


class _UnequalError(WrongPairError):
    """Pairs of unequal length may also be left out."""


@dataclass(frozen=True)
class _Reader:
    """How a pair becomes tokens.

    Attributes:
        encoder: the tokenizer, with the spec's choices applied.
        data: the spec's pairs.
        needs_corrupted: every pair must have its counterfactual.
        masked: the model is a masked language model.
    """

    encoder: Encoder
    data: PairsSection
    needs_corrupted: bool
    masked: bool = False

    @property
    def tokenizer(self) -> PromptTokenizer:
        return self.encoder.tokenizer

    @property
    def chat(self) -> bool:
        return bool(self.encoder.section.chat_template)

    def pair(self, index: int, example: Example) -> Pair:
        text, ids, spans = self._prompt(example.clean, example.spans, "clean")
        corrupted_text, corrupted, others = "", None, spans
        if example.corrupted:
            corrupted_text, other, others = self._prompt(
                example.corrupted, example.corrupted_spans, "corrupted"
            )
            corrupted = other.ids
            self._compare(ids.ids, corrupted, spans, others)
        elif self.needs_corrupted:
            message = "this pair has no corrupted prompt"
            raise WrongPairError("corrupted", message, "corrupted: another prompt")
        answers = [self._answer(text, ids, a, "answer") for a in example.answers]
        wrong = [self._answer(text, ids, a, "wrong") for a in example.wrong]
        for told, given in wrong:
            if given in [ids for _, ids in answers]:
                message = f"the wrong answer {told!r} is the right one too"
                raise WrongPairError("wrong", message, "another answer")
        _check_apart(answers, "answer")
        _check_apart(wrong, "wrong")
        spans = {**spans, **self.encoder.marks(ids)}
        return Pair(
            index=index,
            text=text,
            corrupted_text=corrupted_text,
            ids=ids.ids,
            tokens=self._texts(ids.ids),
            corrupted_ids=corrupted,
            corrupted_tokens=self._texts(corrupted or ()),
            answers=tuple(told for told, _ in answers),
            answer_ids=tuple(given for _, given in answers),
            wrong=tuple(told for told, _ in wrong),
            wrong_ids=tuple(given for _, given in wrong),
            spans=spans,
            group=_group(example.template, len(ids.ids), spans),
            read=self._read(len(ids.ids), spans),
            behind=ids.behind,
        )

    def _texts(self, ids: Ids) -> tuple[str, ...]:
        return tuple(self.tokenizer.decode(i) for i in ids)

    def _prompt(
        self, prompt: str, spans: Mapping[str, tuple[int, int]], field: str
    ) -> tuple[str, Tokens, dict[str, tuple[int, ...]]]:
        text, offset = self.encoder.wrap(prompt)
        if offset is None:
            message = "the chat template holds the prompt not exactly once"
            raise WrongPairError(field, message, "a prompt that is no part of the template")
        tokens = self.encoder.encode(text)
        if not tokens.body:
            raise WrongPairError(field, "the prompt has no tokens")
        found = {}
        for name, (start, end) in spans.items():
            first, last = tokens.span(text, offset + start, offset + end)
            if first == last:
                raise WrongPairError("spans", f"span {name} holds no token")
            found[name] = tuple(range(first, last))
        return text, tokens, found

    def _compare(
        self,
        ids: Ids,
        corrupted: Ids,
        spans: Mapping[str, tuple[int, ...]],
        others: Mapping[str, tuple[int, ...]],
    ) -> None:
        if len(ids) != len(corrupted):
            raise _UnequalError(
                "corrupted",
                f"the clean prompt has {len(ids)} tokens, the corrupted one {len(corrupted)}",
                "as many in both; or data.unequal: leave_out",
            )
        if ids == corrupted:
            message = "the corrupted prompt is the clean one"
            raise WrongPairError("corrupted", message, "another prompt of as many tokens")
        unknown = self.tokenizer.unk_id
        pairs = enumerate(zip(ids, corrupted, strict=True))
        lost = [i for i, (a, b) in pairs if a != b and unknown in (a, b)]
        if unknown is not None and lost:
            message = f"what differs at position {lost[0]} is not in the model's vocabulary"
            raise WrongPairError("corrupted", message, "text that the tokenizer has tokens for")
        moved = [name for name in spans if name in others and spans[name] != others[name]]
        if moved:
            raise _UnequalError(
                "corrupted",
                f"span {moved[0]} is at {list(spans[moved[0]])} in the clean prompt, at "
                f"{list(others[moved[0]])} in the corrupted one",
                "the same positions in both; or data.unequal: leave_out",
            )

    def _answer(self, text: str, prompt: Tokens, answer: str, field: str) -> tuple[str, Ids]:
        join = self.data.join
        if join is None:
            # What a task makes says itself whether it begins with a space.
            join = "" if self.chat or self.data.task else " "
            # A turn of a chat begins with no space.
            answer = answer.lstrip() if self.chat and self.data.task else answer
        joined = answer if answer[:1].isspace() or not answer else join + answer
        if joined[:1].isspace() and text[-1:].isspace():
            raise WrongPairError(
                field,
                "the prompt ends in a space and the answer begins with one",
                "a prompt without the last space, or data.join: ''",
            )
        ids = self.encoder.follows(text, prompt, joined)
        if ids is None:
            last = self.tokenizer.decode(prompt.ids[prompt.end - 1])
            message = f"the answer {joined!r} runs together with the prompt's last token {last!r}"
            raise WrongPairError(field, message, "an answer that begins a new token")
        unknown = self.tokenizer.unk_id
        if not ids or (unknown is not None and unknown in ids):
            message = f"the answer {joined!r} is not in the model's vocabulary"
            raise WrongPairError(field, message, "text that the tokenizer has tokens for")
        return joined, ids

    def _read(self, length: int, spans: Mapping[str, tuple[int, ...]]) -> int:
        at = self.data.at
        if at is None:
            if self.masked and MASK not in spans:
                message = "a masked language model predicts at its mask, and the prompt has not one"
                raise WrongPairError("clean", message, self.encoder.expected_mask)
            return spans[MASK if self.masked else LAST][0]
        if isinstance(at, int):
            if not -length <= at < length:
                message = f"position {at} is out of range"
                raise WrongPairError("at", message, f"{-length} to {length - 1}")
            return at % length
        if at not in spans:
            message = f"no span '{at}'"
            expected = f"one of: {', '.join(spans)}"
            raise WrongPairError("at", message, expected, nearest(at, list(spans)))
        return spans[at][-1]


def _check_apart(answers: Sequence[tuple[str, Ids]], field: str) -> None:
    """Refuse answers of one list that are not apart: their probabilities are summed."""
    for i, (told, ids) in enumerate(answers):
        for other, its_ids in answers[:i]:
            short, long = sorted((ids, its_ids), key=len)
            if long[: len(short)] == short:
                message = f"{told!r} and {other!r} begin alike: what they share would count twice"
                raise WrongPairError(field, message, "answers of which none begins another")


def _group(template: str, length: int, spans: Mapping[str, tuple[int, ...]]) -> str:
    """Name what prompts that stand in for each other have in common: `1 ABBA, 15 tokens, IO 1`."""
    places = [
        f"{name} {positions[0]}" + (f"-{positions[-1]}" if len(positions) > 1 else "")
        for name, positions in sorted(spans.items())
        if name != LAST
    ]
    return ", ".join([*([template] if template else []), f"{length} tokens", *places])


def read_pairs(
    loaded: LoadedSpec[PatchSpec], tokenizer: PromptTokenizer, *, masked: bool = False
) -> tuple[list[Pair], list[LeftOut], list[Problem]]:
    """Tokenise every pair of a spec.

    Args:
        loaded: the spec.
        tokenizer: of its model.
        masked: the model is a masked language model.

    Returns:
        The pairs, each once; those left out, copies among them; and a problem for each that
        cannot be used.

    Raises:
        SpecError: the data file cannot be read at all.
    """
    spec = loaded.spec
    ablates = spec.intervention.type in ("zero", "mean", "resample")
    corrupts = spec.intervention.over == "corrupted" and spec.intervention.type != "zero"
    patches = bool(spec.grid or spec.attribution or spec.circuit)
    needs = (patches and (not ablates or corrupts)) or bool(spec.paths)
    reader = _Reader(Encoder(tokenizer, spec.model), spec.data, needs, masked)
    pairs: dict[Hashable, Pair] = {}
    left_out: list[LeftOut] = []
    examples, problems = pair_examples(loaded, tokenizer)
    try:
        for index, example, at, mark in examples:
            try:
                pair = reader.pair(index, example)
                first = pairs.setdefault(pair.content, pair)
                if first is not pair:
                    left_out.append(_copy(pair, first))
            except WrongPairError as wrong:
                if isinstance(wrong, _UnequalError) and spec.data.unequal == "leave_out":
                    left_out.append(LeftOut(index, example.clean, wrong.message))
                    continue
                told = f"pair {index}: {wrong.message}"
                if wrong.field == "at":
                    # It is asked of every pair: one message.
                    where = ("data", "at")
                    problems.append(loaded.problem(where, told, wrong.expected, wrong.near))
                    break
                if mark is not None:
                    problems.append(Problem(told, mark, wrong.expected, wrong.near))
                    continue
                place = (*at, wrong.field)
                problems.append(loaded.problem(place, told, wrong.expected, wrong.near))
    except ModelError as error:
        problems.append(loaded.problem(("model",), str(error)))
    if left_out and not pairs and not problems:
        gone = left_out[0]
        message = f"no pair is left: pair {gone.index}: {gone.reason}"
        problems.append(loaded.problem(("data",), message, "pairs of equal token length"))
    return list(pairs.values()), left_out, problems


def _copy(pair: Pair, first: Pair) -> LeftOut:
    """Leave a copy out.

    Raises:
        WrongPairError: it is none, because its places or its template are others.
    """
    if (pair.spans, pair.group) == (first.spans, first.group):
        return copy_of(pair.index, pair.text, first.index)
    message = f"the prompts and answers are those of pair {first.index}, spans or template are not"
    raise WrongPairError("clean", message, "one pair, with all of its spans")
