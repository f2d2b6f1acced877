"""The built-in causal models: labels against functions written here, and prompts read again."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, get_args

import numpy as np
import pytest

from interv.spec.causal import CausalSection, CausalTask
from interv.task.causal import CausalError, CausalModel
from interv.task.causal_builtin import BUILTIN, builtin, causal_model
from interv.task.causal_pairs import Interchanges, interchanges, samples
from interv.task.causal_text import answer_text, answers, render, spans, usable
from interv.task.causal_vectors import encode
from interv.task.causal_words import WIDER
from interv.task.words import CAPITALS, MEN, WOMEN

Row = dict[str, Any]
OPERATORS = {"and": lambda a, b: a and b, "or": lambda a, b: a or b}
WITH_PROMPTS = [name for name in BUILTIN if name != "hierarchical_equality"]


def words_and_digits(text: str) -> bool:
    """Words with or without their space, and single digits."""
    return re.fullmatch(r" ?[A-Za-z]+|\d", text) is not None


def rows(values: Any) -> list[Row]:
    lists = {name: array.tolist() for name, array in values.items()}
    return [dict(zip(lists, row, strict=True)) for row in zip(*lists.values(), strict=True)]


def _between(above: bool, below: bool) -> bool:
    return above and below


# For each exchanged variable the label, from the inputs of base and source alone.
BY_HAND: dict[tuple[str, str], Callable[[Row, Row], Any]] = {
    ("hierarchical_equality", "WX"): lambda b, s: int((s["w"] == s["x"]) == (b["y"] == b["z"])),
    ("hierarchical_equality", "YZ"): lambda b, s: int((b["w"] == b["x"]) == (s["y"] == s["z"])),
    ("boolean_tree", "part"): lambda b, s: OPERATORS[b["outer"]](
        OPERATORS[s["inner"]](s["a"], s["b"]), b["c"]
    ),
    ("arithmetic_tree", "part"): lambda b, s: s["a"] + s["b"] + b["c"],
    ("price_tagging", "above_low"): lambda b, s: _between(
        s["amount"] >= s["low"], b["amount"] <= b["high"]
    ),
    ("price_tagging", "below_high"): lambda b, s: _between(
        b["amount"] >= b["low"], s["amount"] <= s["high"]
    ),
    ("ioi", "position"): lambda b, s: b["first" if s["repeated"] == s["second"] else "second"],
    ("ioi", "name"): lambda _, s: s["first" if s["repeated"] == s["second"] else "second"],
    ("gender", "gender"): lambda _, s: "she" if s["name"] in WOMEN else "he",
    ("capitals", "capital"): lambda _, s: CAPITALS[s["country"]],
    ("multiple_choice", "pointer"): lambda b, s: chr(ord(b["letter1"]) + place(s)),
    ("multiple_choice", "letter"): lambda _, s: chr(ord(s["letter1"]) + place(s)),
    ("entailment", "lexical"): lambda b, s: (
        (s["premise"] in WIDER and b["quantity"] == "some")
        or (s["premise"] not in WIDER and b["quantity"] == "no")
    ),
    ("entailment", "negated"): lambda b, s: (
        (b["premise"] in WIDER and s["quantity"] == "some")
        or (b["premise"] not in WIDER and s["quantity"] == "no")
    ),
}


def place(row: Row) -> int:
    return [row[f"colour{i}"] for i in range(1, 5)].index(row["fact"])


def at_hand(name: str) -> CausalModel:
    made = builtin(name)
    return made if made.is_vector else usable(made, words_and_digits)


def test_every_variable_worth_exchanging_is_here() -> None:
    assert set(BY_HAND) == {(name, v) for name, b in BUILTIN.items() for v in b.exchange}
    assert get_args(CausalTask) == tuple(BUILTIN)
    for name, made in BUILTIN.items():
        assert made.about == builtin(name).about
        assert made.source == builtin(name).source


@pytest.mark.parametrize(("name", "variable"), BY_HAND)
def test_labels_are_right_and_half_of_them_change(name: str, variable: str) -> None:
    made = at_hand(name)
    pairs = interchanges(made, [variable], 200, 1, changed=0.5)
    both = zip(rows(pairs.base), rows(pairs.sources[0]), strict=True)
    assert pairs.label.tolist() == [BY_HAND[name, variable](b, s) for b, s in both]
    own = pairs.base[made.output]
    assert (pairs.label != own).sum() == 100
    # Without an exchange the label is the base's own answer.
    base = rows(pairs.base)
    assert own.tolist() == [BY_HAND[name, variable](b, b) for b in base]


# The answer from the prompt's text alone.


def _boolean(text: str) -> str:
    return f" {eval(text.splitlines()[-1].removesuffix(' ='))}"


def _arithmetic(text: str) -> str:
    return str(sum(map(int, re.findall(r"\d", text.splitlines()[-1]))))


def _price(text: str) -> str:
    found = re.search(
        r"between (\d\.\d\d) and (\d\.\d\d) dollars.*\n(\d\.\d\d) dollars", text, re.S
    )
    assert found
    low, high, amount = map(float, found.groups())
    assert 2.5 <= round(high - low, 2) <= 7.5
    return "Yes" if low <= amount <= high else "No"


def _ioi(text: str) -> str:
    names = [word for word in re.findall(r"[A-Z]\w+", text) if word in (*WOMEN, *MEN)]
    (once,) = [word for word in names if names.count(word) == 1]
    assert len(names) == 3
    return f" {once}"


def _gender(text: str) -> str:
    (name,) = [word for word in re.findall(r"\w+", text) if word in (*WOMEN, *MEN)]
    return " she" if name in WOMEN else " he"


def _capitals(text: str) -> str:
    (country,) = [word for word in re.findall(r"\w+", text) if word in CAPITALS]
    return f" {CAPITALS[country]}"


def _choice(text: str) -> str:
    question, *options = text.splitlines()
    found = {line[3:]: line[0] for line in options[:-1]}
    assert len(found) == 4
    (colour,) = [word for word in re.findall(r"\w+", question) if word in found]
    return f" {found[colour]}"


def _entailment(text: str) -> str:
    (one, first), (two, second) = re.findall(r"there are (some|no) (\w+)", text, re.IGNORECASE)
    assert one == two
    narrower = WIDER.get(first) == second
    assert narrower or WIDER[second] == first
    return " Yes" if narrower == (one == "some") else " No"


READ = dict(
    zip(
        WITH_PROMPTS,
        (_boolean, _arithmetic, _price, _ioi, _gender, _capitals, _choice, _entailment),
        strict=True,
    )
)


@pytest.mark.parametrize("name", WITH_PROMPTS)
def test_prompts_have_the_answers_that_the_model_gives(name: str) -> None:
    made = at_hand(name)
    values, templates = samples(made, 150, 2)
    prompts = render(made, values, templates)
    for prompt, value in zip(prompts, values[made.output], strict=True):
        assert READ[name](prompt.text) == answer_text(made, value)
    assert {made.templates[i].number for i in templates} == set(range(1, len(made.templates) + 1))
    known = answers(made)
    assert known is not None and len(known) >= 2
    assert all(map(words_and_digits, known.values()))


@pytest.mark.parametrize("name", WITH_PROMPTS)
def test_a_source_has_its_words_where_the_base_has_them(name: str) -> None:
    """The same words around the placeholders: so single tokens stand at the same positions."""
    made = at_hand(name)
    pairs = interchanges(made, list(BUILTIN[name].exchange), 40, 3)
    base = render(made, pairs.base, pairs.template)
    for source, numbers in zip(pairs.sources, pairs.source_templates, strict=True):
        for one, two in zip(base, render(made, source, numbers), strict=True):
            assert _bare(one.text, spans(one)) == _bare(two.text, spans(two))


def _bare(text: str, places: dict[str, tuple[int, int]]) -> str:
    for start, end in sorted(set(places.values()), reverse=True):
        text = text[:start] + "_" + text[end:]
    return text


def test_ioi_has_both_orders_and_spans_of_its_names() -> None:
    made = at_hand("ioi")
    values, templates = samples(made, 100, 0)
    assert set(values["position"].tolist()) == {0, 1}
    for prompt, row in zip(render(made, values, templates), rows(values), strict=True):
        told = {name: prompt.text[a:b] for name, (a, b) in spans(prompt).items()}
        assert {name: told[name] for name in ("first", "second", "repeated")} == {
            name: row[name] for name in ("first", "second", "repeated")
        }
        assert spans(prompt)["first"] < spans(prompt)["second"] < spans(prompt)["repeated"]
        assert row["name"] == row["second" if row["position"] else "first"] != row["repeated"]


def test_pointer_and_letter_can_be_told_apart() -> None:
    made = at_hand("multiple_choice")
    pairs = interchanges(made, ["pointer", "letter"], 300, 0, mixture={"pointer": 1, "letter": 1})
    options = np.array([[pairs.base[f"letter{i}"][k] for i in range(1, 5)] for k in range(300)])
    among = (options == pairs.label[:, None]).any(1)
    assert among[pairs.exchanged[:, 0]].all()
    assert among[pairs.exchanged[:, 1]].mean() < 0.4


def test_the_usual_mixture_of_equality() -> None:
    made = builtin("hierarchical_equality")
    pairs: Interchanges = interchanges(made, ["WX", "YZ"], 60_000, 0)
    assert pairs.exchanged.sum(0).tolist() == [40_000, 40_000]
    assert pairs.label.mean() == pytest.approx(0.5, abs=0.01)
    assert encode(made, pairs.base).shape == (60_000, 16)


def test_templates_and_answers_may_be_ones_own() -> None:
    section = CausalSection.model_validate(
        {
            "task": "price_tagging",
            "templates": "Between {low} and {high}: {amount}?",
            "answer": {"true": " yes", "false": " no"},
        }
    )
    made = causal_model(section, "mine")
    assert made.name == "price_tagging"
    assert made.templates[0].text == "Between {low} and {high}: {amount}?"
    assert answers(made) == {False: " no", True: " yes"}
    assert (
        causal_model(CausalSection.model_validate("ioi"), "x").templates == builtin("ioi").templates
    )
    declared = CausalSection.model_validate(
        {"variables": {"a": [1, 2], "o": "a"}, "output": "o", "about": "nothing"}
    )
    assert causal_model(declared, "mine").name == "mine"


def test_an_unknown_name_is_told() -> None:
    with pytest.raises(CausalError) as caught:
        builtin("capital")
    assert caught.value.message == "no built-in causal model 'capital'"
    assert caught.value.near == "capitals"
    with pytest.raises(CausalError, match="no variable 'posision'") as caught:
        interchanges(builtin("ioi"), ["posision"], 4, 0)
    assert caught.value.near == "position"
