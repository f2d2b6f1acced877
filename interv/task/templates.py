"""Templates and how examples are made from them; what the tasks share."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from interv.errors import nearest

IsToken = Callable[[str], bool]
Span = tuple[int, int]
Values = Mapping[str, str | Sequence[str]]
_PART = re.compile(r"\{\{|\}\}|\{([A-Za-z_]\w*)\}|[{}]")


class TaskError(Exception):
    """Why no examples can be made: a message, what was expected, and where in the data section."""

    def __init__(
        self, message: str, expected: str | None = None, at: tuple[str | int, ...] = ("task",)
    ) -> None:
        super().__init__(message)
        self.message, self.expected, self.at = message, expected, at


@dataclass(frozen=True)
class Example:
    """One pair of prompts, as text.

    Attributes:
        clean, corrupted: the prompt and its counterfactual.
        answers: what may follow the clean prompt, as it follows it (leading space included);
            the first is the answer.
        wrong: what it is compared with.
        spans, corrupted_spans: for each name characters `[start, end)` of clean (of corrupted);
            the same names in both.
        template: prompts of one template have the same words but for names, places, objects.
    """

    clean: str
    corrupted: str
    answers: tuple[str, ...]
    wrong: tuple[str, ...]
    spans: Mapping[str, Span]
    corrupted_spans: Mapping[str, Span]
    template: str


@dataclass(frozen=True)
class Task:
    """What a task is, for the user.

    Attributes:
        about: one line.
        source: the paper.
        spans: names of its spans, in the order of the text.
        counterfactuals: the first is the default.
    """

    name: str
    about: str
    source: str
    spans: tuple[str, ...]
    counterfactuals: tuple[str, ...]


@dataclass(frozen=True)
class Filled:
    """A template's text with words in it, and where each placeholder's words stand."""

    text: str
    places: Mapping[str, tuple[Span, ...]]

    def __getitem__(self, slot: str) -> Span:
        return self.places[slot][0]


@dataclass(frozen=True)
class Template:
    """Text with placeholders, `{name}`; `number` counts from 1 in its list.

    Doubled braces, `{{` and `}}`, are braces of the text itself, as in Python's `str.format`.

    Attributes:
        literals: the text around the placeholders, one more than there are `slots`.
        slots: names of the placeholders, in the order of the text.
    """

    number: int
    literals: tuple[str, ...]
    slots: tuple[str, ...]

    @classmethod
    def parse(cls, number: int, text: str) -> Template:
        """Take a text apart.

        Raises:
            TaskError: a single brace that is no part of a placeholder.
        """
        literals, slots, end = [""], list[str](), 0
        for part in _PART.finditer(text):
            literals[-1] += text[end : part.start()]
            end = part.end()
            if part[1]:
                slots.append(part[1])
                literals.append("")
            elif len(part[0]) == 2:
                literals[-1] += part[0][0]
            else:
                raise TaskError(
                    f"'{part[0]}' at character {part.start() + 1} of {text!r} belongs to no "
                    "placeholder",
                    "{name}, the name alone between the braces; {{ and }} for braces in the text",
                    ("templates", number - 1),
                )
        literals[-1] += text[end:]
        return cls(number, tuple(literals), tuple(slots))

    @property
    def text(self) -> str:
        doubled = [literal.replace("{", "{{").replace("}", "}}") for literal in self.literals]
        slots = [f"{{{slot}}}" for slot in self.slots] + [""]
        return "".join(a + b for a, b in zip(doubled, slots, strict=True))

    def error(self, why: str, expected: str | None = None) -> TaskError:
        """Return the error that the template is wrong."""
        at = ("templates", self.number - 1)
        return TaskError(f"template {self.number} {why}: {self.text!r}", expected, at)

    def fill(self, values: Values) -> Filled:
        """Put in the words: one for all mentions of a placeholder, or a word for each."""
        text, places = self.literals[0], dict[str, list[Span]]()
        for slot, literal in zip(self.slots, self.literals[1:], strict=True):
            value, mentions = values[slot], places.setdefault(slot, [])
            word = value if isinstance(value, str) else value[len(mentions)]
            mentions.append((len(text), len(text) + len(word)))
            text += word + literal
        return Filled(text, {slot: tuple(spans) for slot, spans in places.items()})


@dataclass(frozen=True)
class Form:
    """A template in one of its variants.

    Attributes:
        size: how many different clean prompts it has.
        make: the example of a number below `size`; the generator draws what only the
            counterfactual has, so that all counterfactuals have the same clean prompts.
    """

    size: int
    make: Callable[[int, random.Random], Example]


@dataclass(frozen=True)
class Recipe:
    """How a task's examples are made.

    Attributes:
        slots: how often each placeholder stands in a template; None: as often as one likes.
        forms: from templates, the model's words and the counterfactual.
    """

    task: Task
    templates: tuple[str, ...]
    slots: Mapping[str, int | None]
    forms: Callable[[Sequence[Template], Vocabulary, str], list[Form]]

    def read(self, texts: Sequence[str]) -> list[Template]:
        """Parse templates; one that is there twice is read once.

        Raises:
            TaskError: a placeholder that is missing, unknown or there too often.
        """
        if not texts:
            raise TaskError("no templates", "at least one")
        found: dict[str, Template] = {}
        for number, text in enumerate(texts, start=1):
            template = found.setdefault(text, Template.parse(number, text))
            for slot in template.slots:
                if slot not in self.slots:
                    near = nearest(slot, list(self.slots))
                    hint = f"; did you mean {{{near}}}?" if near else ""
                    expected = f"{', '.join(f'{{{name}}}' for name in self.slots)}{hint}"
                    raise template.error(f"has an unknown placeholder {{{slot}}}", expected)
            for slot, wanted in self.slots.items():
                given = template.slots.count(slot)
                if wanted is not None and given != wanted:
                    has = f"has {{{slot}}} {_times(given)}" if given else f"has no {{{slot}}}"
                    raise template.error(has, f"{{{slot}}} {_times(wanted)}")
            if not template.slots:
                some = ", ".join(f"{{{name}}}" for name in self.slots)
                raise template.error("has no placeholder: every prompt would be the same", some)
            if text[-1:].isspace():
                raise template.error("ends in a space, and so would begin the answer with two")
        return list(found.values())


@dataclass(frozen=True)
class Vocabulary:
    """Which words are single tokens of the model at hand."""

    is_token: IsToken
    _known: dict[str, bool] = field(default_factory=dict)

    def has(self, text: str) -> bool:
        if text not in self._known:
            self._known[text] = self.is_token(text)
        return self._known[text]

    def words(
        self,
        kind: str,
        words: Sequence[str],
        templates: Sequence[Template],
        slots: Sequence[str],
        needed: int = 1,
    ) -> list[str]:
        """The words that are single tokens wherever these placeholders stand.

        Raises:
            TaskError: they are fewer than `needed`, unless no template has such a placeholder.
        """
        spaces = {" "} | before(templates, slots)
        found = [w for w in words if all(self.has(space + w) for space in spaces)]
        asked = any(slot in template.slots for template in templates for slot in slots)
        if asked and len(found) < needed:
            raise TaskError(
                f"{len(found)} of {len(words)} {kind} are single tokens of this model, and "
                f"{needed} are needed",
                "templates with a space before each placeholder"
                if "" in spaces
                else "a model whose tokenizer knows more English words",
            )
        return found

    def require(self, answers: Sequence[str]) -> None:
        """Raises TaskError where one of the answers is not a single token."""
        known = sum(self.has(answer) for answer in answers)
        if known < len(answers):
            missing = next(a for a in answers if not self.has(a))
            raise TaskError(
                f"{known} of {len(answers)} answers are single tokens of this model, and all are "
                f"needed; {missing!r} is none",
                "a model whose tokenizer knows them",
            )


def before(templates: Sequence[Template], slots: Sequence[str]) -> set[str]:
    """What stands before these placeholders: a space, which belongs to the word's token, or not."""
    return {
        " " if literal.endswith(" ") else ""
        for template in templates
        for literal, slot in zip(template.literals, template.slots, strict=False)
        if slot in slots
    }


def used(template: Template, slot: str, words: Sequence[str]) -> Sequence[str]:
    """The words, or one empty word where the template has no such placeholder."""
    return words if slot in template.slots else ("",)


def draw(number: int, words: Sequence[str], k: int = 1) -> tuple[int, list[str]]:
    """Take `k` different words, as the number says; what is left of the number, and the words."""
    left, taken = list(words), []
    for _ in range(k):
        number, at = divmod(number, len(left))
        taken.append(left.pop(at))
    return number, taken


def others(words: Sequence[str], but: Sequence[str], rng: random.Random, k: int = 1) -> list[str]:
    """`k` different words that are not among `but`."""
    return rng.sample([w for w in words if w not in but], k)


def rotate(templates: Sequence[Template], variants: int) -> Iterator[tuple[Template, int]]:
    """Every template in every variant, such that neighbours differ in both."""
    for turn in range(variants):
        for at, template in enumerate(templates):
            yield template, (at + turn) % variants


def shuffled(size: int, rng: random.Random) -> Iterator[int]:
    """The numbers below `size` in random order, over and over; of a large size, few are kept."""
    while True:
        moved: dict[int, int] = {}  # Fisher and Yates, on a list that is never written down
        for last in range(size - 1, -1, -1):
            at = rng.randrange(last + 1)
            yield moved.get(at, at)
            moved[at] = moved.pop(last, last)


def _times(n: int) -> str:
    return {1: "once", 2: "twice"}.get(n, f"{n} times")
