"""The built-in tasks: their texts are read again here, without their templates."""

from __future__ import annotations

import ast
import re
import zlib
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from interv.models import locate
from interv.models.tokenizer_files import read_tokenizer
from interv.spec.schema import ModelSection
from interv.task import words
from interv.task.tasks import _RECIPES, TASKS, Example, TaskError, make_examples

IsToken = Callable[[str], bool]
EACH = [(name, c) for name, task in TASKS.items() for c in task.counterfactuals]
each = pytest.mark.parametrize(("task", "counterfactual"), EACH)


def pairs_of_digits(text: str) -> bool:
    """As GPT-2: words with their space, and two digits with or without one."""
    return re.fullmatch(r" [A-Za-z]+| ?\d\d|\d", text) is not None


def single_digits(text: str) -> bool:
    """As SmolLM2: each digit by itself."""
    return re.fullmatch(r" [A-Za-z]+|\d", text) is not None


def some_words(salt: int) -> IsToken:
    """Knows two words of three; the letters, pronouns and digits always."""

    def is_token(text: str) -> bool:
        always = re.fullmatch(r"\d| [A-D]| s?he", text) is not None
        return always or (single_digits(text) and zlib.crc32(f"{salt}{text}".encode()) % 3 > 0)

    return is_token


def only(*known: str) -> IsToken:
    return lambda text: text in known or re.fullmatch(r"\d| [A-D]| s?he", text) is not None


def split(text: str) -> list[tuple[str, int]]:
    """Words and punctuation marks, and where they begin."""
    return [(m.group(), m.start()) for m in re.finditer(r"\w+|[^\w\s]", text)]


def told(example: Example) -> tuple[dict[str, str], dict[str, str]]:
    """What stands at the spans of the clean and of the corrupted prompt."""
    clean = {k: example.clean[a:b] for k, (a, b) in example.spans.items()}
    corrupted = {k: example.corrupted[a:b] for k, (a, b) in example.corrupted_spans.items()}
    return clean, corrupted


def check_any(task: str, example: Example, is_token: IsToken) -> None:
    """What holds of every task."""
    assert tuple(sorted(example.spans)) == tuple(sorted(TASKS[task].spans))
    assert example.spans.keys() == example.corrupted_spans.keys()
    clean, corrupted = split(example.clean), split(example.corrupted)
    assert len(clean) == len(corrupted)
    assert example.clean != example.corrupted
    # The two differ in spans only, and a span is at one place in both.
    starts = {a: k for k, (a, _) in example.spans.items()}
    year = "YY" in example.spans
    for (word, at), (other, other_at) in zip(clean, corrupted, strict=True):
        if word != other and not year:
            assert example.corrupted_spans[starts[at]][0] == other_at
    # Every word that no template has is one of those drawn.
    literal = {w for text in _RECIPES[task].templates for w, _ in split(text)}
    drawn = {w for w, _ in clean + corrupted if w not in literal and not w.isdecimal()}
    assert drawn or year
    assert all(is_token(f" {word}") for word in drawn)
    assert all(is_token(answer) for answer in example.answers + example.wrong)
    assert not set(example.answers) & set(example.wrong)
    assert example.answers and example.wrong
    assert example.clean == example.clean.rstrip()
    for text in (example.clean, example.corrupted):
        assert "{" not in text and "  " not in text.replace("\n    ", "")
        assert not re.search(r"\b[Aa] [aeiou]", text)


def check_ioi(example: Example, counterfactual: str) -> None:
    clean, corrupted = told(example)
    names = [w for w, _ in split(example.clean) if w in words.NAMES]
    (io,) = (name for name, n in Counter(names).items() if n == 1)
    (s,) = (name for name, n in Counter(names).items() if n == 2)
    assert example.answers == (f" {io}",) and example.wrong == (f" {s}",)
    assert (clean["IO"], clean["S1"], clean["S2"]) == (io, s, s)
    assert example.spans["S1"][0] < example.spans["S2"][0]
    order = "ABBA" if names[0] == io else "BABA"
    assert example.template.split() == [example.template.split()[0], order]
    # S1+1 is the very next word.
    gap = example.clean[example.spans["S1"][1] : example.spans["S1+1"][0]]
    assert gap == " " and clean["S1+1"] == corrupted["S1+1"]
    assert clean["S1+1"] in split(example.clean)[[w for w, _ in split(example.clean)].index(s) + 1]
    others = [w for w, _ in split(example.corrupted) if w in words.NAMES]
    if counterfactual == "swapped":
        assert others == [*names[:2], io]
    elif counterfactual == "s2":
        assert others[:2] == names[:2] and others[2] not in names
    elif counterfactual == "flip":
        assert others == [names[1], names[0], s]
    elif counterfactual == "exchanged":
        assert others == [{io: s, s: io}[name] for name in names]
    elif counterfactual.startswith("random_names"):
        assert len(set(others)) == 2 and not set(others) & set(names)
        first = others[:2].index(others[2])
        assert (first == names[:2].index(s)) == (counterfactual == "random_names")
    else:
        assert len(set(others)) == 3 and not set(others) & set(names)


def check_greater_than(example: Example, _counterfactual: str) -> None:
    found = re.search(r"(\d\d)(\d\d)\D+(\d\d)$", example.clean)
    assert found
    first, own, second = found.groups()
    assert first == second and told(example)[0]["YY"] == own
    assert told(example)[1]["YY"] == "01"
    assert example.corrupted == example.clean.replace(first + own, first + "01")
    # Whatever is left to say, the year is after the first, or is not.
    fill = 2 - len(example.answers[0])
    assert all(int(a + "0" * fill) > int(own) for a in example.answers)
    assert all(int(w + "9" * fill) <= int(own) for w in example.wrong)
    assert len(example.answers) + len(example.wrong) == 10 ** len(example.answers[0])


def check_docstring(example: Example, counterfactual: str) -> None:
    def read(text: str) -> tuple[list[str], list[str]]:
        (function,) = ast.parse(text + ' x: y\n    """\n').body
        assert isinstance(function, ast.FunctionDef)
        listed = [a.arg for a in function.args.args if a.arg != "self"]
        described = re.findall(r"(\w+):", ast.get_docstring(function) or "")
        return listed, described[:-1]

    listed, described = read(example.clean)
    assert listed[:2] == described and len(set(listed)) == len(listed) == 4
    assert example.answers == (f" {listed[2]}",)
    clean, corrupted = told(example)
    assert [clean[k] for k in TASKS["docstring"].spans] == [*listed[:3], *described]
    others, same = read(example.corrupted)
    assert same == described and others[3] == listed[3]
    assert [corrupted[k] for k in TASKS["docstring"].spans] == [*others[:3], *described]
    if counterfactual == "arguments":
        assert not set(others[:3]) & set(listed) and len(set(others)) == 4
        assert set(example.wrong) == {f" {w}" for w in (*described, listed[3], others[2])}
    else:
        assert others[:2] == listed[:2] and others[2] not in listed
        assert example.wrong == (f" {others[2]}",)


def check_gendered_pronouns(example: Example, _counterfactual: str) -> None:
    clean, corrupted = told(example)
    woman = clean["NAME"] in words.WOMEN
    assert woman != (clean["NAME"] in words.MEN)
    assert (corrupted["NAME"] in words.MEN) == woman
    assert example.answers + example.wrong == ((" she", " he") if woman else (" he", " she"))


def check_capitals(example: Example, _counterfactual: str) -> None:
    clean, corrupted = told(example)
    assert example.answers == (f" {words.CAPITALS[clean['COUNTRY']]}",)
    assert example.wrong == (f" {words.CAPITALS[corrupted['COUNTRY']]}",)


def check_multiple_choice(example: Example, counterfactual: str) -> None:
    def read(text: str, span: dict[str, str]) -> tuple[str, dict[str, str]]:
        choices = dict(re.findall(r"^([A-D])\. (\w+)$", text, re.MULTILINE))
        assert {k: v for k, v in span.items() if k != "FACT"} == choices
        (told_colour,) = (w for w, _ in split(text.split("\n")[0]) if w in words.COLOURS)
        assert told_colour == span["FACT"] and len(set(choices.values())) == 4
        (letter,) = (k for k, v in choices.items() if v == told_colour)
        return letter, choices

    one, choices = read(example.clean, told(example)[0])
    two, others = read(example.corrupted, told(example)[1])
    assert example.answers == (f" {one}",) and example.wrong == (f" {two}",)
    if counterfactual == "position":
        assert sorted(choices.values()) == sorted(others.values())
    else:
        assert choices == others


CHECKS: dict[str, Callable[[Example, str], None]] = {
    "ioi": check_ioi,
    "greater_than": check_greater_than,
    "docstring": check_docstring,
    "gendered_pronouns": check_gendered_pronouns,
    "capitals": check_capitals,
    "multiple_choice": check_multiple_choice,
}


@each
@settings(max_examples=30)
@given(seed=st.integers(0, 2**32 - 1), salt=st.integers(0, 1000))
def test_examples_are_what_they_say(task: str, counterfactual: str, seed: int, salt: int) -> None:
    is_token = some_words(salt)
    for example in make_examples(task, 12, seed, is_token, counterfactual=counterfactual):
        check_any(task, example, is_token)
        CHECKS[task](example, counterfactual)


@each
def test_every_template_and_most_words(task: str, counterfactual: str) -> None:
    made = make_examples(task, 240, 1, single_digits, counterfactual=counterfactual)
    for example in made:
        check_any(task, example, single_digits)
        CHECKS[task](example, counterfactual)
    assert len({example.clean for example in made}) == 240
    groups = Counter(example.template for example in made)
    assert len({label.split()[0] for label in groups}) == len(_RECIPES[task].templates)
    assert len(set(groups.values())) == 1
    # Within a group only what is drawn differs, and so the number of words does not.
    for label in groups:
        texts = [example.clean for example in made if example.template == label]
        assert len({len(split(text)) for text in texts}) == 1


@each
def test_examples_depend_on_nothing_else(task: str, counterfactual: str) -> None:
    made = make_examples(task, 30, 5, single_digits, counterfactual=counterfactual)
    assert made == make_examples(task, 30, 5, single_digits, counterfactual=counterfactual)
    assert made[:7] == make_examples(task, 7, 5, single_digits, counterfactual=counterfactual)
    assert made != make_examples(task, 30, 6, single_digits, counterfactual=counterfactual)
    default = make_examples(task, 30, 5, single_digits)
    assert [example.clean for example in made] == [example.clean for example in default]
    assert (made == default) == (counterfactual == TASKS[task].counterfactuals[0])
    assert make_examples(task, 0, 5, single_digits) == []


def test_both_variants_come_equally_often() -> None:
    made = make_examples("ioi", 48, 0, single_digits)
    assert Counter(e.template.split()[1] for e in made[:12]) == {"ABBA": 6, "BABA": 6}
    assert len({e.template for e in made[:24]}) == 24
    pronouns = make_examples("gendered_pronouns", 16, 0, single_digits)
    assert Counter(e.answers[0] for e in pronouns) == {" she": 8, " he": 8}
    assert len({(e.template, e.answers) for e in pronouns}) == 16
    letters = make_examples("multiple_choice", 16, 0, single_digits)
    assert set(Counter(e.answers[0] for e in letters).values()) == {4}
    # The seed decides what is only in the counterfactual, too.
    others = make_examples("multiple_choice", 16, 1, single_digits)
    assert [e.answers for e in letters] == [e.answers for e in others]
    assert [e.wrong for e in letters] != [e.wrong for e in others]


def test_examples_are_distinct_while_there_are_enough() -> None:
    few = only(" France", " Paris", " Italy", " Rome", " Spain", " Madrid", " Peru")
    made = make_examples("capitals", 36, 3, few)
    assert len({example.clean for example in made[:18]}) == 18
    assert sorted(e.clean for e in made[18:]) == sorted(e.clean for e in made[:18])
    assert not any("Peru" in example.clean for example in made)
    three = make_examples(
        "ioi", 6, 0, only(" Mary", " John", " Anna"), templates=["Then {IO} met {S}; {S} saw"]
    )
    assert len({example.clean for example in three}) == 6


def test_two_digits_where_the_tokenizer_has_them() -> None:
    for example in make_examples("greater_than", 60, 0, pairs_of_digits):
        check_any("greater_than", example, pairs_of_digits)
        check_greater_than(example, "01")
        assert len(example.answers[0]) == 2
    for example in make_examples("greater_than", 60, 0, single_digits):
        assert len(example.answers[0]) == 1 and re.search(r"\d\d[1-8]9\b", example.clean)


def test_years_that_are_tokens_are_neither_drawn_nor_answers() -> None:
    def is_token(text: str) -> bool:
        # All of 18XX but 01 and 20 to 29; of the other centuries the round years; 1701.
        merged = re.fullmatch(r" 18(?!01|2)\d\d| 1\d\d0| 1701", text)
        return pairs_of_digits(text) or merged is not None

    made = make_examples("greater_than", 400, 0, is_token)
    years = {match.group() for e in made if (match := re.search(r"\d{4}", e.clean))}
    assert years and not any(year.endswith("0") and year[1] != "8" for year in years)
    assert {year for year in years if year.startswith("18")} <= {f"182{d}" for d in range(9)}
    assert not any(year.startswith("17") for year in years)
    for example in made:
        century = example.clean[-2:]
        assert not any(is_token(f" {century}{yy}") for yy in example.answers + example.wrong)


def test_the_users_own_templates() -> None:
    own = ["Look, {S} and {IO} sat down. {S} called", "I saw {IO} with {S}, but {S} not"]
    made = make_examples("ioi", 8, 0, single_digits, templates=own)
    assert [e.template for e in made[:4]] == ["1 ABBA", "2 BABA", "1 BABA", "2 ABBA"]
    for example in made:
        assert example.clean.startswith(("Look, ", "I saw "))
        if told(example)[0]["S1+1"] != ",":
            check_ioi(example, "swapped")
    comma = next(e for e in made if e.template == "2 ABBA")
    assert told(comma)[0]["S1+1"] == ","
    # A template and its other order are the same two forms; one written twice is one.
    both = ["Then {IO} met {S}. {S} saw", "Then {S} met {IO}. {S} saw"]
    assert len({e.template for e in make_examples("ioi", 9, 0, single_digits, templates=both)}) == 2
    twice = make_examples("capitals", 4, 0, single_digits, templates=["In {COUNTRY},"] * 2)
    assert {e.template for e in twice} == {"1"}


def test_a_word_that_begins_a_line_is_a_token_without_its_space() -> None:
    known = only(*(f" {w}" for w in ("France", "Paris", "Italy", "Rome", "Peru", "Lima")))
    both = only("France", "Peru", " France", " Paris", " Italy", " Rome", " Peru", " Lima")
    templates = ["{COUNTRY} has a capital called"]
    with pytest.raises(TaskError) as error:
        make_examples("capitals", 1, 0, known, templates=templates)
    assert error.value.expected is not None and "space before" in error.value.expected
    made = make_examples("capitals", 4, 0, both, templates=templates)
    assert {e.clean.split()[0] for e in made} == {"France", "Peru"}


IOI = "Then {IO} and {S} went out. {S} gave it to"
YEARS = "It took from {XX}{YY} to {XX}"
DOC = 'def f({A}, {B}, {C}):\n    """{A}, {B},'
WRONG = [
    ("iol", {}, "unknown task 'iol'", "did you mean 'ioi'"),
    ("ioi", {"counterfactual": "swap"}, "unknown counterfactual of ioi 'swap'", "swapped, names"),
    ("ioi", {"templates": []}, "no templates", "at least one"),
    ("ioi", {"templates": [IOI, "{IO} and {IO}"]}, "template 2 has {IO} twice", "{IO} once"),
    ("ioi", {"templates": ["{S} saw {S}"]}, "template 1 has no {IO}: '{S} saw {S}'", "{IO} once"),
    ("ioi", {"templates": ["{IO} saw {S}"]}, "template 1 has {S} once", "{S} twice"),
    ("ioi", {"templates": [IOI + " {PLASE}"]}, "unknown placeholder {PLASE}", "{PLACE}?"),
    ("ioi", {"templates": ["So {S} met {S}, not {IO},"]}, "{IO} after both", "before the second"),
    ("ioi", {"templates": [IOI + " "]}, "ends in a space", None),
    ("greater_than", {"templates": ["{XX} {YY} {XX}"]}, "no {XX} right before {YY}", "{XX}{YY}"),
    ("greater_than", {"templates": ["{YY} {XX} {XX}"]}, "no {XX} right before {YY}", "{XX}{YY}"),
    ("greater_than", {"templates": [YEARS + "."]}, "does not end in {XX}", "at the end"),
    ("docstring", {"templates": ["def {B} {A} {C} {A} {B} :"]}, "another order", "{A}, {B}, {C}"),
    ("docstring", {"templates": [DOC.replace("{C}", "c")]}, "template 1 has no {C}", "{C} once"),
    ("gendered_pronouns", {"templates": ["So he is"]}, "template 1 has no {NAME}", "{NAME} once"),
    ("capitals", {"templates": ["The capital is"]}, "has no {COUNTRY}", "{COUNTRY} once"),
    ("multiple_choice", {"templates": ["{FACT}: {A} {B} {C} or"]}, "no {D}", "{D} once"),
    ("ioi", {"templates": [IOI, IOI + " {PLACE.name}"]}, "belongs to no placeholder", "{name}"),
    ("ioi", {"templates": ["{ S } and {IO}"]}, "'{' at character 1 of '{ S } and {IO}'", "{{"),
]


@pytest.mark.parametrize(("task", "arguments", "message", "expected"), WRONG)
def test_what_does_not_fit(
    task: str, arguments: dict[str, object], message: str, expected: str | None
) -> None:
    with pytest.raises(TaskError) as error:
        make_examples(task, 4, 0, single_digits, **arguments)  # type: ignore[arg-type]
    assert message in error.value.message and str(error.value) == error.value.message
    assert (error.value.expected is None) == (expected is None)
    assert expected is None or expected in (error.value.expected or "")


MARY = (" Mary", " John", " store", " ring")
FEW = [
    ("ioi", None, only(*MARY[:1]), "1 of {NAMES} names are single tokens", "and 2 are needed"),
    ("ioi", "names", only(*MARY), "2 of {NAMES} names", "and 5 are needed"),
    ("ioi", "s2", only(*MARY), "2 of {NAMES} names", "and 3 are needed"),
    ("ioi", None, only(*MARY[:2]), "0 of {PLACES} places", "and 1 are needed"),
    ("ioi", None, only(*MARY[:3]), "0 of {OBJECTS} objects", "and 1 are needed"),
    ("docstring", None, only(" size", " name"), "2 of {ARGUMENTS} arguments", "and 7 are needed"),
    ("gendered_pronouns", None, only(" Mary"), "0 of {MEN} names of men", "and 1 are needed"),
    ("gendered_pronouns", None, lambda t: t != " he", "1 of 2 answers", "' he' is none"),
    ("capitals", None, only(" France", " Paris", " Italy"), "1 of {CAPITALS}", "2 are needed"),
    ("multiple_choice", None, only(" red", " box"), "1 of {COLOURS} colours", "4 are needed"),
    ("multiple_choice", None, lambda t: t not in " C", "3 of 4 answers", "' C' is none"),
]


@pytest.mark.parametrize(("task", "counterfactual", "is_token", "message", "needed"), FEW)
def test_too_few_words(
    task: str, counterfactual: str | None, is_token: IsToken, message: str, needed: str
) -> None:
    with pytest.raises(TaskError) as error:
        make_examples(task, 4, 0, is_token, counterfactual=counterfactual)
    sizes = {k: len(v) for k, v in vars(words).items() if k.isupper()}
    assert message.format(**sizes) in error.value.message
    assert needed in error.value.message


def test_just_enough_words() -> None:
    (example,) = make_examples("ioi", 1, 0, only(*MARY))
    assert {*told(example)[0].values()} >= {"Mary", "John"}
    # Places are asked for only where a template has them.
    make_examples("ioi", 1, 0, only(*MARY[:2]), templates=[IOI])


@pytest.mark.parametrize(
    ("is_token", "told_numbers"),
    [
        # Words only; years whole; numbers cut into threes from the left, a space by itself.
        (lambda t: t.startswith(" ") and t[1:].isalpha(), "0 of 5 centuries, 0 of 100 pairs"),
        (lambda t: pairs_of_digits(t) or len(t) == 5, "5 of 5 centuries, 100 of 100 pairs"),
        (lambda t: re.fullmatch(r" [a-z]+|\d{1,3}", t) is not None, "0 of 5 centuries, 100 of"),
    ],
)
def test_numbers_that_do_not_split_after_the_century(is_token: IsToken, told_numbers: str) -> None:
    with pytest.raises(TaskError, match="does not split years") as error:
        make_examples("greater_than", 1, 0, is_token)
    assert told_numbers in error.value.message


def test_threes_are_found_out_without_a_space_too() -> None:
    def threes(text: str) -> bool:
        return re.fullmatch(r" [a-z]+|\d{1,3}", text) is not None

    with pytest.raises(TaskError, match="so are all threes"):
        make_examples("greater_than", 1, 0, threes, templates=["({XX}{YY}-{XX}"])


def test_a_tokenizer_without_these_words(gpt2_folder: Path) -> None:
    tokenizer = read_tokenizer(gpt2_folder)
    assert tokenizer is not None
    for task in TASKS:
        with pytest.raises(TaskError, match=r"of this model|this model's tokenizer"):
            make_examples(task, 1, 0, lambda text: len(tokenizer.encode(text).ids) == 1)


def test_the_lists() -> None:
    lists = {k: v for k, v in vars(words).items() if k.isupper()}
    for name, listed in lists.items():
        assert len(set(listed)) == len(listed), name
        assert all(word.isalpha() for word in listed), name
    assert not set(words.WOMEN) & set(words.MEN)
    assert min(len(words.WOMEN), len(words.MEN)) >= 60
    assert len(words.CAPITALS) >= 40
    assert len(set(words.CAPITALS.values())) == len(words.CAPITALS)
    assert not set(words.CAPITALS) & set(words.CAPITALS.values())
    assert not set(words.ARGUMENTS) & {*words.NOUNS, *words.FUNCTIONS}
    for name in ("PLACES", "OBJECTS", "THINGS", "COLOURS", "NOUNS"):
        assert not [word for word in lists[name] if word[0] in "aeiou"], name
    for task in TASKS.values():
        assert task.about and task.source and task.spans and task.counterfactuals


@pytest.mark.model
@each
def test_pairs_of_the_default_model_have_equal_length(task: str, counterfactual: str) -> None:
    tokenizer = locate(ModelSection(name="smollm2-135m"), 0).tokenizer
    assert tokenizer is not None

    def is_token(text: str) -> bool:
        return len(tokenizer.encode(text).ids) == 1

    made = make_examples(task, 20, 0, is_token, counterfactual=counterfactual)
    assert len(made) == 20
    for example in made:
        clean, corrupted = tokenizer.encode(example.clean), tokenizer.encode(example.corrupted)
        assert len(clean.ids) == len(corrupted.ids)
        for name, (start, end) in example.spans.items():
            there = clean.span(example.clean, start, end)
            assert there == corrupted.span(example.corrupted, *example.corrupted_spans[name])
            assert there[1] - there[0] == (2 if name == "YY" else 1)
        for answer in example.answers + example.wrong:
            both = tokenizer.encode(example.clean + answer).ids
            assert both == (*clean.ids, *tokenizer.encode(answer).ids)


def test_a_wrong_template_is_told_at_its_place() -> None:
    with pytest.raises(TaskError) as error:
        make_examples("ioi", 4, 0, single_digits, templates=[IOI, IOI + " {PLACE.name}"])
    assert error.value.at == ("templates", 1)
