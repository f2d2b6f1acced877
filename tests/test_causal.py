"""Causal models: the grammar of their functions, how they run, and the pairs made of them."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from typing import Any

import numpy as np
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from interv.spec.causal import CausalSection
from interv.spec.yaml import parse
from interv.task.causal import CausalError, CausalModel, build
from interv.task.causal_expressions import Expression
from interv.task.causal_pairs import Interchanges, interchanges, samples
from interv.task.causal_splits import splits
from interv.task.causal_text import answer_text, answers, render, spans, usable
from interv.task.causal_values import column
from interv.task.causal_vectors import encode, input_width, vectors

EQUALITY: dict[str, Any] = {
    "w": {"vector": 3},
    "x": {"vector": 3, "equal": "w", "share": 0.25},
    "flag": [True, False],
    "WX": "w == x",
    "O": "1 if WX == flag else 0",
}


def model(
    variables: dict[str, Any], output: str, functions: Any = None, **fields: Any
) -> CausalModel:
    section = CausalSection.model_validate({"variables": variables, "output": output, **fields})
    return build(section, "made", functions or {})


# The grammar, against Python's own.

NUMBERS = {"a": [-3, 0, 2, 7], "b": [5, -1, 0, 2], "t": [True, False, True, False]}
WORDS = {"s": ["red", "blue", "red", ""], "r": ["blue", "blue", "green", "red"]}
ENV = {name: column(values) for name, values in {**NUMBERS, **WORDS}.items()}


def _numeric(inner: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    def put(text: str, *parts: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
        return st.tuples(*parts).map(lambda given: text.format(*given))

    sign = st.sampled_from(["+", "-", "*", "//", "%"])
    compare = st.sampled_from(["==", "!=", "<", "<=", ">", ">="])
    return st.one_of(
        put("({} {} {})", inner, sign, inner),
        put("({} {} {})", inner, compare, inner),
        put("({} {} {} {} {})", inner, compare, inner, compare, inner),
        put("({} {} {} in [0, -1, 2])", inner, compare, inner),
        put("({} not in [1, True])", inner),
        put("({} {} {})", inner, st.sampled_from(["and", "or"]), inner),
        put("({} and {} or {})", inner, inner, inner),
        put("(not {})", inner),
        put("(-{})", inner),
        put("({} if {} else {})", inner, inner, inner),
        put("{}({}, {})", st.sampled_from(["min", "max"]), inner, inner),
        put("abs({})", inner),
    )


_TEXT = st.sampled_from(["(s == r)", "(s != 'red')", "(s in ['red', 'blue'])", "(s < r)"])
_LEAF = st.one_of(
    st.sampled_from(["a", "b", "t", "True", "False"]), st.integers(-4, 9).map(str), _TEXT
)


@given(st.recursive(_LEAF, _numeric, max_leaves=12))
def test_an_expression_gives_what_python_gives(text: str) -> None:
    expression = Expression.parse(text)
    rows = [{name: values[i] for name, values in {**NUMBERS, **WORDS}.items()} for i in range(4)]
    try:
        expected = [
            eval(text, {"__builtins__": {"min": min, "max": max, "abs": abs}}, r) for r in rows
        ]
    except ZeroDivisionError:
        with pytest.raises(CausalError, match="division by zero"):
            expression(ENV, 4)
        return
    got = expression(ENV, 4)
    assert got.tolist() == expected
    # And it is among what the expression is said to give.
    possible = expression.possible({**NUMBERS, **WORDS})
    assert possible is None or set(expected) <= set(possible)


def test_what_python_would_not_evaluate_is_not_evaluated() -> None:
    assert Expression.parse("a // b if b != 0 else 9")(ENV, 4).tolist() == [-1, 0, 9, 3]
    assert Expression.parse("b != 0 and a % b == 0")(ENV, 4).tolist() == [False, True, False, False]
    assert Expression.parse("b < 0 < 1 // b")(ENV, 4).tolist() == [False] * 4


def test_decimals_are_what_they_look_like() -> None:
    env = {"p": np.array([0.1, 0.3, 5.1]), "q": np.array([0.2, 0.1, 0.45])}
    assert Expression.parse("p + q == 0.3")(env, 3).tolist() == [True, False, False]
    assert Expression.parse("p // 0.1")(env, 3).tolist() == [1, 3, 51]
    assert Expression.parse("p % 0.1")(env, 3).tolist() == [0, 0, 0]
    assert Expression.parse("p + q")(env, 3).tolist() == [0.3, 0.4, 5.55]


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("__import__('os')", "__import__"),
        ("a.real", "a.real"),
        ("a[0]", "a[0]"),
        ("a / 2", "a / 2"),
        ("a ** 2", "a ** 2"),
        ("(lambda: 1)", "lambda"),
        ("[a, 1]", "[a, 1]"),
        ("a in b", "a in b"),
        ("a in [b]", "a in [b]"),
        ("a is 1", "a is 1"),
        ("+a", "+a"),
        ("~a", "~a"),
        ("max(a)", "max(a)"),
        ("abs(a, 1)", "abs(a, 1)"),
        ("max(*a, 1)", "max(*a, 1)"),
        ("(a := 1)", "a := 1"),
        ("f'{a}'", "f'{a}'"),
        ("None", "None"),
        ("1j", "1j"),
        ("1e400", "1e400"),
        ("a + 99999999999999999999", "99999999999999999999"),
        ("a if b", "a if b"),
        ("a; b", "a; b"),
        ("", ""),
        ("1or a", "1or a"),
        ("-" * 200 + "a", "nested"),
        ("(" * 300 + "a" + ")" * 300, "((("),
        ("[i for i in a]", "[i for i in a]"),
        ("a\x00", "no expression"),
    ],
)
def test_whatever_is_not_in_the_grammar_is_refused(text: str, part: str) -> None:
    with pytest.raises(CausalError) as caught:
        Expression.parse(text)
    assert part in caught.value.message
    wanted = "variables for its parts" if part == "nested" else "min, max, abs"
    assert wanted in (caught.value.expected or "")


def test_numbers_that_leave_their_type_are_an_error() -> None:
    env = {"n": np.array([2**40, 3])}
    with pytest.raises(CausalError, match=r"beyond 2\*\*62 in 'n \* n'"):
        Expression.parse("n * n")(env, 2)


# Declarations.


def test_a_section_is_read_from_yaml_and_back() -> None:
    text = """
variables:
  country: [France, Spain]
  amount: {range: [0.0, 9.99], step: 0.01}
  capital: {table: {France: Paris, Spain: Madrid}, of: country}
  cheap: amount < 5
  answer: {table: {true: small, false: large}, of: cheap}
output: answer
templates: "In {capital}, which is in {country}, {amount} is"
answer: {small: " a little", large: " a lot"}
"""
    section = CausalSection.model_validate(parse(text, "x.yaml").data)
    again = CausalSection.model_validate(
        parse(yaml.safe_dump(section.model_dump(mode="json"), sort_keys=False), "y.yaml").data
    )
    assert again == section
    made = build(section, "prices")
    assert made.inputs == ("country", "amount")
    values = made.run({"country": column(["Spain", "France"]), "amount": column([5.0, 4.99])})
    assert values["capital"].tolist() == ["Madrid", "Paris"]
    assert values["answer"].tolist() == ["large", "small"]
    assert answers(made) == {"small": " a little", "large": " a lot"}
    first, second = render(made, values, np.zeros(2, dtype=int))
    assert first.text == "In Madrid, which is in Spain, 5.00 is"
    assert second.text[slice(*spans(second)["amount"])] == "4.99"
    assert {v: made.variables[v].values for v in ("cheap", "answer")} == {
        "cheap": (False, True),
        "answer": ("large", "small"),
    }


def test_variables_may_stand_in_any_order() -> None:
    made = model({"c": "b * 2", "b": "a + 1", "a": [1, 2]}, "c")
    assert list(made.variables) == ["a", "b", "c"]
    assert made.variables["c"].values == (4, 6)
    assert made.ancestors("c") == ("a",)


COUNTRY = {"country": ["France", "Spain"]}
WRONG: list[tuple[dict[str, Any], dict[str, Any], str, str | None, tuple[Any, ...]]] = [
    ({"a": "b + 1", "b": "c", "c": "a"}, {}, "circle: ", None, ("variables", "a")),
    ({"a": [1, 2], "o": "aa + 1", "bb": [1]}, {}, "no variable 'aa'", "a", ("expression",)),
    ({"amount": [1, 2], "o": "amonut"}, {}, "no variable 'amonut'", "amount", ("expression",)),
    ({"a": [1, 2], "o": "maxx(a, 1)"}, {}, "no function 'maxx'", "max", ("expression",)),
    ({**COUNTRY, "o": "country == 1"}, {}, "mixes a number and text", None, ("o",)),
    ({**COUNTRY, "o": "country + country"}, {}, "'country' is text", None, ("o",)),
    ({**COUNTRY, "o": "country in [1, 2]"}, {}, "mixes a number and text", None, ("o",)),
    ({"w": {"vector": 2}, "o": "w + 1"}, {}, "'w' is a vector", None, ("o",)),
    ({"w": {"vector": 2}, "o": "w < w"}, {}, "in an order", None, ("o",)),
    ({"w": {"vector": 2}, "o": "w == 3"}, {}, "mixes a number and a vector", None, ("o",)),
    ({"w": {"vector": 2}, "o": "w"}, {}, "the output 'o' is a vector", None, ("output",)),
    (
        {"w": {"vector": 2}, "x": {"vector": 3, "equal": "w"}, "o": "w == x"},
        {},
        "another kind of input",
        None,
        ("x",),
    ),
    ({"a": [1, "two"], "o": "a"}, {}, "text and numbers", None, ("a",)),
    ({"a": [1, 2, 1], "o": "a"}, {}, "1 is there twice", None, ("a",)),
    ({"a": {"range": [0, 9], "step": 1e-6}, "o": "a"}, {}, "9,000,001 steps", None, ("a",)),
    (
        {**COUNTRY, "o": {"table": {"Frankreich": "x", "Spain": "y"}, "of": "country"}},
        {},
        "no entry for 'France'",
        "Frankreich",
        ("o",),
    ),
    (
        {"a": [1, 2], "o": {"table": {"one": "x", "2": "y"}, "of": "a"}},
        {},
        "'one' in the table is no value of 'a'",
        None,
        ("table", "one"),
    ),
    (
        {"a": [1, 2], "o": {"function": "twise", "of": "a"}},
        {},
        "no function 'twise'",
        "twice",
        ("o",),
    ),
    ({"a": [1, 2], "b": "a", "o": {"one_of": ["a", "b"]}}, {}, "is computed", None, ("o",)),
    ({"a": [1, 2], "b": "a"}, {"output": "c"}, "no variable 'c'", None, ("output",)),
    ({"a": [1, 2], "o": "a"}, {"where": "b > 1"}, "no variable 'b'", None, ("where", 0)),
    (
        {**COUNTRY, "o": "country"},
        {"templates": ["In {county} is"]},
        "no variable 'county'",
        "country",
        ("templates", 0),
    ),
    (
        {"w": {"vector": 2}, "a": [1, 2], "o": "a"},
        {"templates": ["{w}"]},
        "{w} in a template is a vector",
        None,
        ("templates", 0),
    ),
    (
        {"a": ["x", "y"], "a2": ["x", "y"], "o": "a"},
        {"templates": ["{a} {a} {a2}"]},
        "'a2' is a variable, and a mention of {a}",
        None,
        ("templates", 0),
    ),
    ({**COUNTRY, "o": "country"}, {}, "there are no templates", None, ()),
    (
        {**COUNTRY, "o": "country"},
        {"templates": ["{country}"], "answer": " {country}"},
        "has {country}",
        None,
        ("answer",),
    ),
    (
        {**COUNTRY, "o": "country == 'Spain'"},
        {"templates": ["{country}"], "answer": {"true": " Yes"}},
        "no answer for false",
        None,
        ("answer",),
    ),
    (
        {**COUNTRY, "o": "country"},
        {"templates": ["{country}"], "answer": {"France": " f", "Spain": " f"}},
        "two values have one answer",
        None,
        ("answer",),
    ),
    (
        {**COUNTRY, "o": "country"},
        {"templates": ["{country}: "]},
        "ends in a space",
        None,
        ("templates", 0),
    ),
    *(
        (
            {**COUNTRY, "o": "country"},
            {"templates": ["In {country}", text]},
            f"'{brace}' at character {character} of '{text}' belongs to no placeholder",
            None,
            ("templates", 1),
        )
        for text, brace, character in (
            ("In {country is", "{", 4),
            ("In { country } is", "{", 4),
            ("In {country.name} is", "{", 4),
            ("In {0} {country}", "{", 4),
            ("In {country}} is", "}", 13),
        )
    ),
    (
        {**COUNTRY, "o": "country"},
        {"templates": ["In {country}", "In France"]},
        "template 2 has no variable",
        None,
        ("templates", 1),
    ),
    (
        {**COUNTRY, "o": "country"},
        {"templates": ["In {country}"], "answer": " {o} }"},
        "'}' at character 6 of ' {o} }'",
        None,
        ("answer",),
    ),
]


@pytest.mark.parametrize(("variables", "fields", "message", "near", "at"), WRONG)
def test_a_wrong_declaration_is_told(
    variables: dict[str, Any],
    fields: dict[str, Any],
    message: str,
    near: str | None,
    at: tuple[Any, ...],
) -> None:
    output = fields.pop("output", "o" if "o" in variables else "a")
    with pytest.raises(CausalError) as caught:
        model(variables, output, {"twice": lambda a: 2 * a}, **fields)
    error = caught.value
    assert message in error.message
    assert error.near == near
    assert error.at[len(error.at) - len(at) :] == at


def test_a_cycle_is_named_from_parent_to_child() -> None:
    with pytest.raises(CausalError, match="circle: a -> c -> b -> a"):
        model({"x": [1], "a": "b + x", "b": "c", "c": "a"}, "a")


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"a": {"values": [1], "vector": 2}}, "values and vector"),
        ({"a": {}}, "nothing that it is"),
        ({"a": {"table": {"x": 1}}}, "a table without of"),
        ({"a": {"table": {"x": 1}, "of": ["b", "c"]}}, "a table of 2 variables"),
        ({"a": {"range": [2, 1]}}, "runs backwards"),
        ({"a": {"range": [0, float("nan")]}}, "no usable number"),
        ({"a": [2**60]}, "no usable number"),
        ({"a": [""]}, "an empty text"),
        ({"if": [1]}, "'if' is no name"),
        ({"max": [1]}, "'max' is no name"),
        ({"ä": [1]}, "is no name"),
        ({"a": [None]}, "values"),
    ],
)
def test_a_malformed_variable_is_told(variables: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError) as caught:
        CausalSection.model_validate({"variables": {**variables, "o": "1"}, "output": "o"})
    assert message in str(caught.value)


def test_one_origin() -> None:
    for wrong in ({}, {"task": "ioi", "variables": {"a": [1], "o": "a"}, "output": "o"}):
        with pytest.raises(ValidationError, match="neither or both"):
            CausalSection.model_validate(wrong)
    assert CausalSection.model_validate("ioi").task == "ioi"
    bare, whole = CausalSection.model_json_schema()["anyOf"]
    assert "ioi" in bare["enum"] and "ioi" in whole["properties"]["task"]["anyOf"][0]["enum"]


# Running.


def test_fixed_variables_have_their_values_and_what_follows_does_too() -> None:
    made = model({"a": [1, 2], "b": "a + 1", "c": "b * 10", "o": "c + a"}, "o")
    a = column([1, 2, 1])
    plain = made.run({"a": a})
    assert plain["o"].tolist() == [21, 32, 21]
    after = made.run({"a": a}, {"b": column([7, 7, 7])}, {"b": np.array([True, False, True])})
    assert after["b"].tolist() == [7, 3, 7]
    assert after["o"].tolist() == [71, 32, 71]
    both = made.run({"a": a}, {"b": column([7] * 3), "c": column([1, 2, 3])})
    assert both["o"].tolist() == [2, 4, 4]


def test_running_without_an_input_or_with_unequal_ones_is_an_error() -> None:
    made = model({"a": [1, 2], "b": [1, 2], "o": "a + b"}, "o")
    with pytest.raises(CausalError, match="no values of the input 'b'"):
        made.run({"a": column([1])})
    with pytest.raises(CausalError, match="different number"):
        made.run({"a": column([1]), "b": column([1, 2])})
    with pytest.raises(CausalError) as caught:
        made.run({"a": column([1]), "b": column([1])}, {"oo": column([1])})
    assert caught.value.message == "no variable 'oo' in the causal model"


def test_an_error_while_running_names_the_variable() -> None:
    made = model({"a": [0, 1], "o": "3 // a"}, "o")
    with pytest.raises(
        CausalError, match=r"variable 'o': a division by zero in '3 // a'"
    ) as caught:
        interchanges(made, ["o"], 8, 0)
    assert caught.value.at == ("variables", "o")


def test_functions_of_a_plug_in() -> None:
    def longer(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        a += 1  # its own copy
        return np.where(a > b, "long", "short")

    made = model(
        {"a": [1, 5], "b": [3], "o": {"function": "longer", "of": ["a", "b"]}},
        "o",
        {"longer": longer},
    )
    values = made.run({"a": column([1, 5]), "b": column([3, 3])})
    assert values["o"].tolist() == ["short", "long"]
    assert values["a"].tolist() == [1, 5]
    for bad, message in ((lambda a, _: a[:1], "shape [1]"), (lambda a, _: a[99], "IndexError")):
        made = model(
            {"a": [1, 5], "b": [3], "o": {"function": "f", "of": ["a", "b"]}}, "o", {"f": bad}
        )
        with pytest.raises(CausalError) as caught:
            made.run({"a": column([1, 5]), "b": column([3, 3])})
        assert message in caught.value.message


# Pairs.


def recomputed(made: CausalModel, pairs: Interchanges) -> list[Any]:
    """Labels one sample at a time, with only the exchanged variables set."""
    labels = []
    for i in range(len(pairs)):
        one = {name: pairs.base[name][i : i + 1] for name in made.inputs}
        fixed = {
            v: pairs.sources[j][v][i : i + 1]
            for j, v in enumerate(pairs.variables)
            if pairs.exchanged[i, j]
        }
        labels.append(made.run(one, fixed)[made.output].tolist()[0])
    return labels


@pytest.mark.parametrize("changed", [None, 0.0, 0.3, 1.0])
@pytest.mark.parametrize("balance", [False, True])
def test_labels_are_what_the_model_says(changed: float | None, balance: bool) -> None:
    made = model(EQUALITY, "O")
    pairs = interchanges(made, ["WX", "flag"], 300, 4, changed=changed, balance=balance)
    assert len(pairs) == 300
    assert pairs.label.tolist() == recomputed(made, pairs)
    assert pairs.base["O"].tolist() == made.run(pairs.base)["O"].tolist()
    kinds = Counter(map(tuple, pairs.exchanged.tolist()))
    assert kinds == {(True, False): 100, (False, True): 100, (True, True): 100}
    if changed is not None:
        assert (pairs.label != pairs.base["O"]).mean() == pytest.approx(changed)
    if balance:
        assert pairs.label.mean() == pytest.approx(0.5, abs=0.01)
    for j in range(2):
        same = ~pairs.exchanged[:, j]
        for name, values in pairs.sources[j].items():
            assert (values[same] == pairs.base[name][same]).all()


def test_the_seed_decides_the_pairs() -> None:
    made = model(EQUALITY, "O")

    def drawn(seed: int) -> list[Any]:
        pairs = interchanges(made, ["WX"], 40, seed, changed=0.5)
        return [pairs.base["w"].tolist(), pairs.sources[0]["x"].tolist(), pairs.label.tolist()]

    assert drawn(3) == drawn(3)
    one, two = drawn(3), drawn(4)
    assert not set(one[0]) & set(two[0])


def test_a_mixture_is_kept_to_the_sample() -> None:
    made = model(EQUALITY, "O")
    pairs = interchanges(
        made, ["WX", "flag"], 101, 0, mixture={"WX": 1, "flag + WX": 3}, changed=0.5
    )
    kinds = Counter(map(tuple, pairs.exchanged.tolist()))
    assert kinds == {(True, False): 25, (True, True): 76}


@pytest.mark.parametrize(
    ("arguments", "message", "near"),
    [
        ({"variables": ["WXX"]}, "no variable 'WXX'", "WX"),
        ({"variables": []}, "no variables", None),
        ({"variables": ["WX", "WX"]}, "one twice", None),
        ({"variables": ["WX"], "mixture": {"flag": 1}}, "no exchanged variable 'flag'", None),
        ({"variables": ["WX"], "mixture": {"WX": 0}}, "weight of 'WX' is 0", None),
        ({"variables": ["WX"], "mixture": {"WX+WX": 1}}, "'WX+WX' is there twice", None),
        ({"variables": ["WX"], "mixture": {}}, "an empty mixture", None),
        ({"variables": ["WX"], "changed": 1.5}, "a share of 1.5", None),
    ],
)
def test_wrong_arguments_are_told(
    arguments: dict[str, Any], message: str, near: str | None
) -> None:
    with pytest.raises(CausalError) as caught:
        interchanges(model(EQUALITY, "O"), n=8, seed=0, **arguments)
    assert message in caught.value.message
    assert caught.value.near == near


def test_no_samples_are_an_error() -> None:
    for draw in (lambda m: interchanges(m, ["WX"], 0, 0), lambda m: samples(m, 0, 0)):
        with pytest.raises(CausalError, match="0 samples"):
            draw(model(EQUALITY, "O"))
    one = interchanges(model(EQUALITY, "O"), ["WX", "flag"], 1, 0, changed=0.5, balance=True)
    assert len(one) == 1


def test_pairs_that_do_not_exist_are_an_error() -> None:
    made = model({"a": [1, 2], "b": [1, 2], "idle": "b + 1", "o": "a"}, "o")
    with pytest.raises(CausalError) as caught:
        interchanges(made, ["idle"], 8, 0, changed=0.5)
    assert caught.value.message.startswith("no counterfactual pair whose label changes: variables")
    assert "idle" in caught.value.message
    # One part of the mixture can, the other cannot.
    with pytest.raises(CausalError, match="variables idle,"):
        interchanges(made, ["a", "idle"], 8, 0, changed=1.0)
    made = model({"a": [1, 2], "o": "a"}, "o", where="a > 5")
    with pytest.raises(CausalError, match=r"0 of .* samples fit the conditions") as caught:
        samples(made, 4, 0)
    assert "'a > 5'" in (caught.value.expected or "")


def test_conditions_hold_for_bases_and_sources_but_not_after_the_exchange() -> None:
    made = model({"a": [1, 2, 3], "b": [1, 2, 3], "o": "a * 10 + b"}, "o", where="a < b")
    pairs = interchanges(made, ["a"], 200, 1)
    for values in (pairs.base, *pairs.sources):
        assert (values["a"] < values["b"]).all()
    assert {21, 22}.intersection(pairs.label.tolist())
    assert 22 in pairs.label.tolist()


def test_plain_samples() -> None:
    made = model(EQUALITY, "O")
    values, templates = samples(made, 400, 0)
    assert values["WX"].mean() == pytest.approx(0.25, abs=0.07)
    assert templates.tolist() == [0] * 400
    balanced, _ = samples(model({"a": list(range(20)), "o": "a == 3"}, "o"), 400, 0, balance=True)
    assert balanced["o"].mean() == 0.5


def test_labels_that_are_text_are_balanced() -> None:
    made = model(
        {"a": ["x", "y", "z"], "b": list(range(8)), "o": "a if b > 5 else 'x'"},
        "o",
        templates="{a}{b}",
    )
    pairs = interchanges(made, ["a"], 300, 0, balance=True)
    assert Counter(pairs.label.tolist()) == {"x": 100, "y": 100, "z": 100}


# Vectors.


def test_equal_entities_have_equal_vectors() -> None:
    made = model(
        {
            "w": {"vector": 3},
            "x": {"vector": 3, "equal": "w"},
            "n": [1, 2],
            "z": {"vector": 2, "distribution": "normal"},
            "o": "w == x",
        },
        "o",
    )
    pairs = interchanges(made, ["o"], 4000, 0)
    encoded = encode(made, pairs.base)
    assert encoded.shape == (4000, input_width(made) == 9 and 9)
    assert encoded.dtype == np.float32
    w, x, n, z = encoded[:, :3], encoded[:, 3:6], encoded[:, 6], encoded[:, 7:]
    same = (w == x).all(1)
    assert (same == pairs.base["o"]).all()
    assert not (w == x).any(1)[~same].any()
    assert (n == pairs.base["n"]).all()
    assert abs(w).max() <= 1
    assert w.mean() == pytest.approx(0, abs=0.02)
    assert w.std() == pytest.approx(1 / np.sqrt(3), abs=0.01)
    assert z.mean() == pytest.approx(0, abs=0.04)
    assert z.std() == pytest.approx(1, abs=0.03)
    assert abs(np.corrcoef(np.c_[w, x[:, :1] * ~same[:, None], z].T) - np.eye(6)).max() < 0.06
    assert (encode(made, pairs.base, seed=1) != encoded)[:, :6].all()


def test_fresh_entities_are_never_seen_twice() -> None:
    made = model(EQUALITY, "O")
    pairs = interchanges(made, ["WX", "flag"], 500, 0, changed=0.5, mixture={"WX+flag": 1})
    ids = [values["w"] for values in (pairs.base, *pairs.sources)]
    assert len(set(np.concatenate(ids).tolist())) == 1500


def test_a_finite_set_of_entities() -> None:
    made = model(
        {
            "w": {"vector": 2, "entities": 5},
            "x": {"vector": 2, "entities": 5, "equal": "w", "share": 0.3},
            "o": "w == x",
        },
        "o",
    )
    values, _ = samples(made, 3000, 0)
    assert set(values["w"].tolist()) == set(values["x"].tolist()) == set(range(5))
    # Those that are not drawn equal are not equal by chance.
    assert values["o"].mean() == pytest.approx(0.3, abs=0.03)


def test_vectors_of_any_shape() -> None:
    ids = np.array([[0, 1], [2, 0]])
    got = vectors(ids, 4, 7)
    assert got.shape == (2, 2, 4)
    assert (got[0, 0] == got[1, 1]).all()
    assert (got[0, 0] == vectors(np.array([0]), 4, 7)[0]).all()


# Prompts.


def test_each_mention_of_a_placeholder_has_its_span() -> None:
    made = model(
        {"a": ["cat", "dog"], "b": ["red", "blue"], "o": "a"},
        "o",
        templates=["A {a} is {b}, the {a}", "{b}: {a}"],
    )
    values, _ = samples(made, 4, 0)
    filled = render(made, values, np.array([0, 1, 0, 1]))
    for number, text in enumerate(filled):
        own = {name: text.text[a:b] for name, (a, b) in spans(text).items()}
        a, b = values["a"][number], values["b"][number]
        twice = {"a": a, "a1": a, "a2": a, "b": b}
        assert own == (twice if number % 2 == 0 else {"a": a, "b": b})
    assert spans(filled[0])["a1"] == spans(filled[0])["a"] < spans(filled[0])["a2"]
    assert answer_text(made, values["o"][0]) == f" {values['o'][0]}"


def test_doubled_braces_are_braces_of_the_text() -> None:
    made = model({"a": ["x", "y"], "o": "a"}, "o", templates="{{'is': {a}}}", answer=" {{{o}")
    values, templates = samples(made, 20, 0)
    [text] = {one.text for one in render(made, values, templates) if "x" in one.text}
    assert text == "{'is': x}"
    assert {answer_text(made, value) for value in values["o"]} == {" {x", " {y"}


def test_one_pair_of_prompts_with_two_labels_is_an_error() -> None:
    causal = {"a": ["x", "y", "z"], "b": ["1", "2"], "hidden": [0, 1], "o": "a if hidden else b"}
    made = model(causal, "o", templates="{a} {b}")
    names = ("train", "validation", "test")
    seeds = {name: i for i, name in enumerate(names)}
    with pytest.raises(CausalError, match="with two labels"):
        splits(made, ["a"], dict.fromkeys(names, 60), seeds, changed=0.5)


def test_templates_of_base_and_source() -> None:
    made = model({"a": ["x", "y"], "o": "a"}, "o", templates=["{a}", "b {a}", "c {a}"])
    pairs = interchanges(made, ["a"], 300, 0)
    assert (pairs.template == pairs.source_templates[0]).all()
    assert set(pairs.template.tolist()) == {0, 1, 2}
    apart = interchanges(made, ["a", "o"], 600, 0, same_template=False, mixture={"a": 1, "o": 1})
    for j in range(2):
        differ = apart.template != apart.source_templates[j]
        assert not differ[~apart.exchanged[:, j]].any()
        assert differ[apart.exchanged[:, j]].mean() == pytest.approx(2 / 3, abs=0.1)


def test_words_that_are_no_single_tokens_are_dropped() -> None:
    made = model(
        {
            "country": ["France", "Spain", "Peru", "Mali"],
            "capital": {
                "table": {"France": "Paris", "Spain": "Madrid", "Peru": "Lima", "Mali": "Bamako"},
                "of": "country",
            },
        },
        "capital",
        templates=["The capital of {country} is", "{country}'s capital is"],
    )
    tokens = {
        " France",
        "France",
        " Spain",
        "Spain",
        " Peru",
        " Mali",
        "Mali",
        " Paris",
        " Madrid",
        " Lima",
    }
    kept = usable(made, lambda text: text in tokens)
    # Peru is none at the beginning of a prompt, Bamako is no answer.
    assert kept.variables["country"].values == ("France", "Spain")
    assert answers(kept) == {"Paris": " Paris", "Madrid": " Madrid"}
    with pytest.raises(CausalError, match="1 of 4 values of 'country' are single tokens"):
        usable(made, lambda text: text in tokens - {" Spain", " Mali"})
    with pytest.raises(CausalError, match=r"1 of 3 answers \(' Paris', ' Madrid'"):
        usable(made, lambda text: text in tokens - {" Madrid", " Lima"})


def test_answers_that_several_inputs_decide_are_never_drawn() -> None:
    digits = list(range(10))
    made = model({"a": digits, "b": digits, "o": "a + b"}, "o", templates="{a}+{b}=", answer="{o}")
    kept = usable(made, lambda text: len(text) == 1)
    pairs = interchanges(kept, ["a"], 300, 0, changed=0.5)
    assert max(pairs.label) <= 9
    assert all((v["o"] <= 9).all() for v in (pairs.base, *pairs.sources))
    assert answers(kept) == {n: str(n) for n in range(10)}


def test_a_user_function_s_answers_cannot_be_listed() -> None:
    made = model(
        {"a": [1, 2], "o": {"function": "f", "of": "a"}}, "o", {"f": lambda a: a}, templates="{a}"
    )
    assert answers(made) is None
    with pytest.raises(CausalError, match="cannot be listed"):
        usable(made, lambda _: True)


def test_nothing_here_imports_torch() -> None:
    code = (
        "import sys, interv.task.causal_builtin, interv.task.causal_pairs, "
        "interv.task.causal_text, interv.task.causal_vectors; "
        "print([m for m in ('torch', 'transformers', 'pandas', 'matplotlib') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
