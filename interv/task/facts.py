"""Facts (a prompt, the subject in it, the answer that follows) as tokens, spans and roles."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

from interv.errors import Mark, ModelError, Problem, nearest
from interv.models import PromptTokenizer, Tokens
from interv.spec import LoadedSpec
from interv.spec.schema import LAST, MASK, Fact, FactsSection, TraceSpec
from interv.task.encoder import Encoder, continued, look_alike, moved
from interv.task.files import missing_file, read_records
from interv.task.left_out import LeftOut, copy_of


@dataclass(frozen=True)
class Prompt:
    """One fact, tokenised.

    Attributes:
        index: its row in the data, from 0; `prompt_id` in the results.
        ids: token ids of the prompt, with the special tokens that the tokenizer adds.
        tokens: their texts.
        answer_ids: token ids of the answer; several are scored by teacher forcing.
        subject: tokens `[first, last)` of the subject.
        subject_ids: token ids of the subject by itself, as the authors tokenise it for the
            standard deviation of the embeddings.
        read: where the answer's first token is predicted: the last token of the text, or the
            mask of a masked language model.
        behind: how many special tokens follow the text.
        mask: the position of the mask token; None where there is none.
        corrupted_ids: the prompt with another subject; as many tokens as `ids`.
    """

    index: int
    text: str
    subject_text: str
    answer: str
    ids: tuple[int, ...]
    tokens: tuple[str, ...]
    answer_ids: tuple[int, ...]
    subject: tuple[int, int]
    subject_ids: tuple[int, ...]
    read: int
    behind: int = 0
    mask: int | None = None
    corrupted_ids: tuple[int, ...] | None = None

    @property
    def run_ids(self) -> tuple[int, ...]:
        """The prompt with what is given of its answer, by teacher forcing."""
        return continued(self.ids, self.answer_ids[:-1], self.behind)

    @property
    def corrupted_run_ids(self) -> tuple[int, ...] | None:
        """The same of the prompt with another subject."""
        if self.corrupted_ids is None:
            return None
        return continued(self.corrupted_ids, self.answer_ids[:-1], self.behind)

    def in_run(self, positions: tuple[int, ...]) -> tuple[int, ...]:
        """Where positions of the prompt are in `run_ids`."""
        return moved(positions, len(self.answer_ids) - 1, len(self.ids) - self.behind)

    @property
    def answer_positions(self) -> range:
        """Where the answer's tokens are predicted, counted from the end of `run_ids`."""
        first = self.read - len(self.ids) - len(self.answer_ids) + 1
        return range(first, first + len(self.answer_ids))

    @property
    def content(self) -> Hashable:
        """What decides every value of the prompt: equal for copies."""
        return self.ids, self.answer_ids, self.subject, self.corrupted_ids, self.read, self.behind

    @property
    def first_changed(self) -> int:
        """The first position at which the corrupted run differs from the clean one."""
        if self.corrupted_ids is None:
            return self.subject[0]
        pairs = zip(self.ids, self.corrupted_ids, strict=True)
        return next(i for i, (a, b) in enumerate(pairs) if a != b)

    def role(self, name: str) -> tuple[int, ...]:
        """Positions of a role; empty where this prompt has none.

        The roles of figure 2 of Meng et al. 2022: a subject of one token is both the first
        and the last of the subject, and the token after it may be the last of the prompt.
        """
        first, end = self.subject
        last = len(self.ids) - self.behind - 1
        return {
            "subject": tuple(range(first, end)),
            "first_subject": (first,),
            "middle_subject": tuple(range(first + 1, end - 1)),
            "last_subject": (end - 1,),
            "first_subsequent": (end,) if end <= last else (),
            "further": tuple(range(end + 1, last)),
            "last": (last,),
            MASK: () if self.mask is None else (self.mask,),
        }[name]


class _WrongFactError(Exception):
    """Why a fact cannot be used: the field, a message, what was expected."""

    def __init__(self, field: str, message: str, expected: str | None = None) -> None:
        super().__init__(message)
        self.field, self.message, self.expected = field, message, expected


@dataclass(frozen=True)
class Reader:
    """How a fact becomes tokens.

    Attributes:
        encoder: the tokenizer, with the spec's choices applied.
        masked: the model is a masked language model: the answer is predicted at the mask.
    """

    encoder: Encoder
    join: str
    corrupts_prompt: bool
    masked: bool = False

    @property
    def tokenizer(self) -> PromptTokenizer:
        return self.encoder.tokenizer

    def prompt(self, index: int, fact: Fact) -> Prompt:
        """Tokenise one fact; raises _WrongFactError."""
        text, offset = self._wrap(fact.prompt)
        tokens = self.encoder.encode(text)
        start = offset + self._find(fact)
        subject = tokens.span(text, start, start + len(fact.subject))
        if subject == (0, 0):
            raise _WrongFactError("subject", f"the subject {fact.subject!r} is blank")
        joined = fact.answer if fact.answer[:1].isspace() else self.join + fact.answer
        if joined[:1].isspace() and fact.prompt[-1:].isspace():
            raise _WrongFactError(
                "prompt",
                "the prompt ends in a space and the answer begins with one",
                "a prompt without the last space, or data.join: ''",
            )
        answer_ids = self.encoder.follows(text, tokens, joined)
        if answer_ids is None:
            raise _WrongFactError(
                "answer",
                f"the answer {joined!r} runs together with the prompt's last token "
                f"{self.tokenizer.decode(tokens.ids[tokens.end - 1])!r}",
                "an answer that begins a new token; see data.join",
            )
        unknown = self.tokenizer.unk_id
        if unknown is not None and unknown in answer_ids:
            raise _WrongFactError(
                "answer",
                f"the answer {joined!r} is not in the model's vocabulary",
                "text that the tokenizer has tokens for",
            )
        if unknown is not None and set(tokens.ids[slice(*subject)]) == {unknown}:
            message = f"the subject {fact.subject!r} is not in the model's vocabulary"
            raise _WrongFactError("subject", message, "text that the tokenizer has tokens for")
        if not answer_ids:
            raise _WrongFactError("answer", f"the answer {joined!r} has no tokens")
        marks = self.encoder.marks(tokens)
        return Prompt(
            index=index,
            text=text,
            subject_text=fact.subject,
            answer=joined,
            ids=tokens.ids,
            tokens=tuple(self.tokenizer.decode(i) for i in tokens.ids),
            answer_ids=answer_ids,
            subject=subject,
            subject_ids=self.tokenizer.encode(fact.subject).ids,
            read=self._read(marks, answer_ids),
            behind=tokens.behind,
            mask=marks[MASK][0] if MASK in marks else None,
            corrupted_ids=self._corrupted(fact, text, start, tokens),
        )

    def _wrap(self, prompt: str) -> tuple[str, int]:
        """The text that the model sees, and where in it the prompt begins."""
        text, start = self.encoder.wrap(prompt)
        if start is None:
            raise _WrongFactError("prompt", "the chat template holds the prompt not exactly once")
        return text, start

    def _read(self, marks: Mapping[str, tuple[int, ...]], answer: tuple[int, ...]) -> int:
        if not self.masked:
            return marks[LAST][0]
        if MASK not in marks:
            message = "a masked language model predicts at its mask, and the prompt has not one"
            raise _WrongFactError("prompt", message, self.encoder.expected_mask)
        if len(answer) > 1:
            message = f"a mask is one token, and the answer has {len(answer)}"
            raise _WrongFactError("answer", message, "an answer of one token")
        return marks[MASK][0]

    @staticmethod
    def _find(fact: Fact) -> int:
        starts = []
        at = fact.prompt.find(fact.subject)
        while at >= 0:
            starts.append(at)
            at = fact.prompt.find(fact.subject, at + 1)
        if not starts:
            words = fact.prompt.split()
            n = len(fact.subject.split())
            runs = [" ".join(words[i : i + n]) for i in range(len(words) - n + 1)]
            near = nearest(fact.subject, runs)
            alike = look_alike(fact.subject, fact.prompt, "the subject")
            expected = f"{near!r}, perhaps" if near else "words that stand in the prompt"
            raise _WrongFactError(
                "subject",
                f"the subject {fact.subject!r} is not in the prompt {fact.prompt!r}"
                + (f": it looks the same, but {alike}" if alike else ""),
                "the same characters in both" if alike else expected,
            )
        if fact.occurrence is None and len(starts) > 1:
            raise _WrongFactError(
                "subject",
                f"the subject {fact.subject!r} is in the prompt {len(starts)} times: which one?",
                f"occurrence: 1 to {len(starts)} beside it",
            )
        wanted = fact.occurrence or 1
        if wanted > len(starts):
            raise _WrongFactError(
                "occurrence",
                f"the subject is in the prompt {len(starts)} time(s), not {wanted}",
                f"1 to {len(starts)}",
            )
        return starts[wanted - 1]

    def _corrupted(
        self, fact: Fact, text: str, start: int, tokens: Tokens
    ) -> tuple[int, ...] | None:
        if not self.corrupts_prompt:
            return None
        if fact.corrupted_subject is None:
            raise _WrongFactError(
                "corrupted_subject",
                f"the fact about {fact.subject!r} has no corrupted_subject",
                "one, for corrupt.type: prompt",
            )
        changed = text[:start] + fact.corrupted_subject + text[start + len(fact.subject) :]
        ids = self.encoder.encode(changed).ids
        if len(ids) != len(tokens.ids):
            raise _WrongFactError(
                "corrupted_subject",
                f"with {fact.corrupted_subject!r} the prompt has {len(ids)} tokens, with "
                f"{fact.subject!r} {len(tokens.ids)}",
                "a subject of as many tokens",
            )
        if ids == tokens.ids:
            raise _WrongFactError("corrupted_subject", "the corrupted prompt is the clean one")
        return ids


def make_reader(
    loaded: LoadedSpec[TraceSpec], tokenizer: PromptTokenizer, *, masked: bool = False
) -> Reader:
    """Apply the spec's choices; an unset one takes the model's own default."""
    model, join = loaded.spec.model, loaded.spec.data.join
    if join is None:
        join = "" if model.chat_template else " "
    corrupts_prompt = loaded.spec.corrupt.type == "prompt"
    return Reader(Encoder(tokenizer, model), join, corrupts_prompt, masked)


def read_facts(
    loaded: LoadedSpec[TraceSpec],
) -> tuple[list[tuple[Fact, Mark | None, int]], list[Problem]]:
    """The facts of a spec, each with its place (None: in the spec) and its index.

    Raises:
        SpecError: the data file cannot be read at all.
    """
    data = loaded.spec.data
    if data.facts is not None:
        return [(fact, None, i) for i, fact in enumerate(data.facts[: data.limit])], []
    assert data.file is not None
    if missing := missing_file(loaded, data.file):
        return [], [missing]
    records = read_records(Path(data.file))
    facts: list[tuple[Fact, Mark | None, int]] = []
    problems: list[Problem] = []
    for index, (record, mark) in enumerate(records[: data.limit]):
        wrong = list(_missing(record, data, mark))
        if not wrong:
            columns = {**data.columns.model_dump(), "answer": _answer_column(record, data)}
            values = {f: record[c] for f, c in columns.items() if record.get(c)}
            if isinstance(values.get("occurrence"), str) and values["occurrence"].isdecimal():
                values["occurrence"] = int(values["occurrence"])  # CSV knows only text
            try:
                facts.append((Fact.model_validate(values), mark, index))
            except ValidationError as error:
                first = error.errors()[0]
                field = ".".join(str(part) for part in first["loc"])
                problems.append(Problem(f"{field}: {first['msg']}", mark))
        elif wrong[0].message.startswith("no column"):
            return [], wrong
        problems += wrong
    return facts, problems


def _answer_column(record: dict[str, object], data: FactsSection) -> str:
    """The column of the answer: the one named, `answer`, or ROME's `attribute`."""
    return data.columns.answer or ("attribute" if "attribute" in record else "answer")


def _missing(record: dict[str, object], data: FactsSection, mark: Mark) -> Iterator[Problem]:
    for field in ("prompt", "subject", "answer"):
        column = _answer_column(record, data) if field == "answer" else getattr(data.columns, field)
        if column not in record:
            have = [str(k) for k in record]
            yield Problem(
                f"no column '{column}' for the {field}",
                mark,
                f"one of its columns ({', '.join(have)}) under data.columns.{field}",
                nearest(column, have),
            )
        elif not isinstance(record[column], str) or not record[column]:
            yield Problem(f"column '{column}' is {record[column]!r}", mark, "text")


def read_prompts(
    loaded: LoadedSpec[TraceSpec], tokenizer: PromptTokenizer, *, masked: bool = False
) -> tuple[list[Prompt], list[LeftOut], list[Problem]]:
    """Tokenise every fact of a spec.

    Args:
        loaded: the spec.
        tokenizer: of its model.
        masked: the model is a masked language model.

    Returns:
        The prompts, each once; copies of them; and a problem for each fact that cannot be used.
    """
    facts, problems = read_facts(loaded)
    prompts: dict[Hashable, Prompt] = {}
    copies: list[LeftOut] = []
    try:
        reader = make_reader(loaded, tokenizer, masked=masked)
        for fact, mark, index in facts:
            try:
                prompt = reader.prompt(index, fact)
                first = prompts.setdefault(prompt.content, prompt)
                if first is not prompt:
                    copies.append(copy_of(index, prompt.text, first.index))
            except _WrongFactError as wrong:
                if mark is None:
                    at = ("data", "facts", index, wrong.field)
                    problems.append(loaded.problem(at, wrong.message, wrong.expected))
                else:
                    problems.append(Problem(wrong.message, mark, wrong.expected))
    except ModelError as error:
        problems.append(loaded.problem(("model",), str(error)))
    return list(prompts.values()), copies, problems
