"""Pairs of prompts as text: made by a task, in the spec, or in a file."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from interv.errors import Mark, Problem, nearest
from interv.models import PromptTokenizer
from interv.spec import LoadedSpec
from interv.spec.patch import LAST, SPANS, WHOLE, PairsSection, PairText, PatchSpec
from interv.task.files import missing_file, read_records
from interv.task.tasks import Example, TaskError, make_examples

_RESERVED = (LAST, WHOLE, SPANS, "all")


class WrongPairError(Exception):
    """Why a pair cannot be used: the field, a message, what was expected, what is near."""

    def __init__(
        self, field: str, message: str, expected: str | None = None, near: str | None = None
    ) -> None:
        super().__init__(message)
        self.field, self.message, self.expected, self.near = field, message, expected, near


_Found = tuple[int, Example, tuple[str | int, ...], Mark | None]


def read_examples(
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
            return [], [loaded.problem(("data", "task"), error.message, error.expected)]
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
        except WrongPairError as wrong:
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
            raise WrongPairError("spans", message, "another name")
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
            raise WrongPairError("spans", message, "text of the clean prompt", near)
        if len(starts) > 1 and not numbered:
            message = f"span {name}: {told!r} is in the prompt {len(starts)} times"
            raise WrongPairError("spans", message, f"'{told}@1' to '{told}@{len(starts)}'")
        start = starts[occurrence - 1]
        spans[name] = (start, start + len(told))
    answers = (text.answer,) if isinstance(text.answer, str) else tuple(text.answer)
    wrong = (text.wrong,) if isinstance(text.wrong, str) else tuple(text.wrong)
    if not answers:
        raise WrongPairError("answer", "there is no answer", "one, or a list")
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
