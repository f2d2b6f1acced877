"""Pairs of prompts (a prompt and its counterfactual) as tokens, named spans and answers."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from interv.errors import Mark, ModelError, Problem, nearest
from interv.models import PromptTokenizer, Tokens
from interv.spec import LoadedSpec
from interv.spec.patch import LAST, SPANS, WHOLE, PairsSection, PairText, PatchSpec
from interv.task.files import missing_file, read_records
from interv.task.tasks import Example, TaskError, make_examples

Ids = tuple[int, ...]

_RESERVED = (LAST, WHOLE, SPANS, "all")


@dataclass(frozen=True)
class Pair:
    """One prompt and its counterfactual, tokenised.

    Attributes:
        index: its row in the data, from 0; `prompt_id` in the results.
        ids, corrupted_ids: of the clean prompt, and of its counterfactual (None: it has none),
            of equal length; with the begin-of-text token if there is one.
        answers, wrong: the texts, as they follow the prompt; the first answer is the answer.
        answer_ids, wrong_ids: token ids of each.
        spans: named positions; `END` is the last one of every prompt.
        group: prompts that mean and resample ablation may take for each other.
        read: the position after which the answer is predicted.
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

    def span(self, name: str) -> tuple[int, ...]:
        """Positions of a named span."""
        return self.spans[name]


@dataclass(frozen=True)
class LeftOut:
    """A pair that is not used, and why."""

    index: int
    text: str
    reason: str


class _WrongPairError(Exception):
    def __init__(
        self, field: str, message: str, expected: str | None = None, near: str | None = None
    ) -> None:
        super().__init__(message)
        self.field, self.message, self.expected, self.near = field, message, expected, near


class _UnequalError(_WrongPairError):
    """Pairs of unequal length may also be left out."""


@dataclass(frozen=True)
class _Reader:
    tokenizer: PromptTokenizer
    prepend_bos: bool
    chat: bool
    data: PairsSection
    needs_corrupted: bool

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
            raise _WrongPairError("corrupted", message, "corrupted: another prompt")
        answers = [self._answer(text, ids, a, "answer") for a in example.answers]
        wrong = [self._answer(text, ids, a, "wrong") for a in example.wrong]
        for told, given in wrong:
            if given in [ids for _, ids in answers]:
                message = f"the wrong answer {told!r} is the right one too"
                raise _WrongPairError("wrong", message, "another answer")
        spans = {**spans, LAST: (len(ids.ids) - 1,)}
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
            group=f"{example.template}|{len(ids.ids)}",
            read=self._read(len(ids.ids), spans),
        )

    def _texts(self, ids: Ids) -> tuple[str, ...]:
        return tuple(self.tokenizer.decode(i) for i in ids)

    def _prompt(
        self, prompt: str, spans: Mapping[str, tuple[int, int]], field: str
    ) -> tuple[str, Tokens, dict[str, tuple[int, ...]]]:
        text, offset = prompt, 0
        if self.chat:
            text = self.tokenizer.chat(prompt)
            if text.count(prompt) != 1:
                message = "the chat template holds the prompt not exactly once"
                raise _WrongPairError(field, message, "a prompt that is no part of the template")
            offset = text.index(prompt)
        tokens = self.tokenizer.encode(text, prepend_bos=self.prepend_bos)
        if not tokens.ids:
            raise _WrongPairError(field, "the prompt has no tokens")
        found = {}
        for name, (start, end) in spans.items():
            first, last = tokens.span(text, offset + start, offset + end)
            if first == last:
                raise _WrongPairError("spans", f"span {name} holds no token")
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
            raise _WrongPairError("corrupted", message, "another prompt of as many tokens")
        unknown = self.tokenizer.unk_id
        pairs = enumerate(zip(ids, corrupted, strict=True))
        lost = [i for i, (a, b) in pairs if a != b and unknown in (a, b)]
        if unknown is not None and lost:
            message = f"what differs at position {lost[0]} is not in the model's vocabulary"
            raise _WrongPairError("corrupted", message, "text that the tokenizer has tokens for")
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
            raise _WrongPairError(
                field,
                "the prompt ends in a space and the answer begins with one",
                "a prompt without the last space, or data.join: ''",
            )
        both = self.tokenizer.encode(text + joined, prepend_bos=self.prepend_bos).ids
        n = len(prompt.ids)
        if both[:n] != prompt.ids:
            last = self.tokenizer.decode(prompt.ids[-1])
            message = f"the answer {joined!r} runs together with the prompt's last token {last!r}"
            raise _WrongPairError(field, message, "an answer that begins a new token")
        ids = both[n:]
        unknown = self.tokenizer.unk_id
        if not ids or (unknown is not None and unknown in ids):
            message = f"the answer {joined!r} is not in the model's vocabulary"
            raise _WrongPairError(field, message, "text that the tokenizer has tokens for")
        return joined, ids

    def _read(self, length: int, spans: Mapping[str, tuple[int, ...]]) -> int:
        at = self.data.at
        if isinstance(at, int):
            if not -length <= at < length:
                message = f"position {at} is out of range"
                raise _WrongPairError("at", message, f"{-length} to {length - 1}")
            return at % length
        if at not in spans:
            message = f"no span '{at}'"
            expected = f"one of: {', '.join(spans)}"
            raise _WrongPairError("at", message, expected, nearest(at, list(spans)))
        return spans[at][-1]


def read_pairs(
    loaded: LoadedSpec[PatchSpec], tokenizer: PromptTokenizer
) -> tuple[list[Pair], list[LeftOut], list[Problem]]:
    """Tokenise every pair of a spec.

    Returns:
        The pairs, those left out, and a problem for each that cannot be used.

    Raises:
        SpecError: the data file cannot be read at all.
    """
    spec = loaded.spec
    model = spec.model
    bos = tokenizer.adds_bos if model.prepend_bos is None else model.prepend_bos
    ablates = spec.intervention.type in ("zero", "mean", "resample")
    corrupts = spec.intervention.over == "corrupted" and spec.intervention.type != "zero"
    needs = not ablates or corrupts or bool(spec.paths)
    reader = _Reader(tokenizer, bos, model.chat_template, spec.data, needs)
    pairs: list[Pair] = []
    left_out: list[LeftOut] = []
    examples, problems = _examples(loaded, tokenizer)
    try:
        for index, example, at, mark in examples:
            try:
                pairs.append(reader.pair(index, example))
            except _WrongPairError as wrong:
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
        first = left_out[0]
        message = f"no pair is left: pair {first.index}: {first.reason}"
        problems.append(loaded.problem(("data",), message, "pairs of equal token length"))
    return pairs, left_out, problems


_Found = tuple[int, Example, tuple[str | int, ...], Mark | None]


def _examples(
    loaded: LoadedSpec[PatchSpec], tokenizer: PromptTokenizer
) -> tuple[list[_Found], list[Problem]]:
    """Every pair as text, with its index and its place in the spec or in a file."""
    data = loaded.spec.data
    if data.task is not None:
        try:
            made = make_examples(
                data.task,
                data.n,
                loaded.spec.seed,
                lambda word: (
                    len(tokenizer.encode(word).ids) == 1
                    and tokenizer.encode(word).ids != (tokenizer.unk_id,)
                ),
                counterfactual=data.counterfactual,
                templates=data.templates,
            )
        except TaskError as error:
            return [], [loaded.problem(("data", *error.at), error.message, error.expected)]
        return [(i, example, ("data", "task"), None) for i, example in enumerate(made)], []
    found: list[_Found] = []
    problems: list[Problem] = []
    texts: Sequence[tuple[PairText, tuple[str | int, ...], Mark | None]] = []
    if data.pairs is not None:
        texts = [(text, ("data", "pairs", i), None) for i, text in enumerate(data.pairs)]
    else:
        texts, problems = _from_file(loaded)
    for index, (text, at, mark) in enumerate(texts):
        try:
            found.append((index, _example(text), at, mark))
        except _WrongPairError as wrong:
            told = f"pair {index}: {wrong.message}"
            place = mark or loaded.problem((*at, wrong.field), told).mark
            problems.append(Problem(told, place, wrong.expected, wrong.near))
    return found, problems


def _example(text: PairText) -> Example:
    """A pair as written, its spans found in both prompts.

    A span's place in the corrupted prompt is not looked for: pairs are of equal token length, so
    that positions of the clean one are those of both.
    """
    spans = {}
    for name, told in text.spans.items():
        if name in _RESERVED:
            message = f"a span cannot be named '{name}': it is a place that every prompt has"
            raise _WrongPairError("spans", message, "another name")
        word, at, number = told.rpartition("@")
        numbered = bool(at) and number.isdecimal()
        occurrence = 1
        if numbered:
            told, occurrence = word, int(number)
        starts = [m.start() for m in re.finditer(re.escape(told), text.clean)] if told else []
        if len(starts) < max(1, occurrence) or occurrence < 1:
            message = f"span {name}: {told!r} is in the prompt {len(starts)} time(s)"
            if numbered and starts:
                message += f", not {occurrence}"
            near = nearest(told, text.clean.split())
            raise _WrongPairError("spans", message, "text of the clean prompt", near)
        if len(starts) > 1 and not numbered:
            message = f"span {name}: {told!r} is in the prompt {len(starts)} times"
            raise _WrongPairError("spans", message, f"'{told}@1' to '{told}@{len(starts)}'")
        start = starts[occurrence - 1]
        spans[name] = (start, start + len(told))
    answers = (text.answer,) if isinstance(text.answer, str) else tuple(text.answer)
    wrong = (text.wrong,) if isinstance(text.wrong, str) else tuple(text.wrong)
    if not answers:
        raise _WrongPairError("answer", "there is no answer", "one, or a list")
    return Example(text.clean, text.corrupted or "", answers, wrong, spans, {}, text.template)


def _from_file(
    loaded: LoadedSpec[PatchSpec],
) -> tuple[list[tuple[PairText, tuple[str | int, ...], Mark | None]], list[Problem]]:
    data = loaded.spec.data
    assert data.file is not None
    if missing := missing_file(loaded, data.file):
        return [], [missing]
    texts: list[tuple[PairText, tuple[str | int, ...], Mark | None]] = []
    problems: list[Problem] = []
    for record, mark in read_records(Path(data.file))[: data.limit]:
        wrong = list(_missing(record, data, mark))
        if wrong:
            return [], wrong
        try:
            texts.append((PairText.model_validate(_fields(record, data)), (), mark))
        except ValidationError as error:
            first = error.errors()[0]
            field = ".".join(str(part) for part in first["loc"])
            problems.append(Problem(f"{field}: {first['msg']}", mark))
    return texts, problems


def _fields(record: Mapping[str, Any], data: PairsSection) -> dict[str, Any]:
    columns = data.columns.model_dump(exclude={"spans"})
    values = {field: record[c] for field, c in columns.items() if record.get(c)}
    spans = {c: record[c] for c in data.columns.spans if record.get(c)}
    inline = None if "spans" in data.columns.spans else record.get("spans")
    if inline and not isinstance(inline, dict):
        return {**values, "spans": inline}  # which is an error
    return {**values, "spans": {**(inline or {}), **spans}}


def _missing(record: Mapping[str, Any], data: PairsSection, mark: Mark) -> Iterator[Problem]:
    wanted = [("clean", data.columns.clean), ("answer", data.columns.answer)]
    wanted += [(f"span {column}", column) for column in data.columns.spans]
    for field, column in wanted:
        if column not in record:
            have = [str(key) for key in record]
            expected = f"one of its columns ({', '.join(have)}) under data.columns"
            near = nearest(column, have)
            yield Problem(f"no column '{column}' for the {field}", mark, expected, near)
