"""The built-in causal models, each declared as a user would declare it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from interv.errors import nearest
from interv.spec.causal import CausalSection
from interv.task import causal_words as words
from interv.task.causal import build
from interv.task.causal_model import CausalModel
from interv.task.causal_values import CausalError
from interv.task.words import CAPITALS, COLOURS, MEN, NAMES, OBJECTS, PLACES, THINGS, WOMEN

__all__ = ["BUILTIN", "Builtin", "builtin", "causal_model"]


@dataclass(frozen=True)
class Builtin:
    """A causal model that comes with interv.

    Attributes:
        about, source: one line each: what it is, and the paper.
        exchange: the variables worth exchanging, the most usual one first.
        declared: the fields of its section.
    """

    name: str
    about: str
    source: str
    exchange: tuple[str, ...]
    declared: Mapping[str, Any]

    @property
    def section(self) -> CausalSection:
        """Its declaration."""
        return CausalSection.model_validate({"about": self.about, **self.declared})


_DIGITS = list(range(10))
_BOOLEANS = [True, False]

_ALL = (
    Builtin(
        "hierarchical_equality",
        "Four vectors: are the first two equal just as the last two are?",
        "Geiger et al. 2023, arXiv 2303.02536",
        ("WX", "YZ"),
        {
            "variables": {
                "w": {"vector": 4},
                "x": {"vector": 4, "equal": "w", "share": 0.5},
                "y": {"vector": 4},
                "z": {"vector": 4, "equal": "y", "share": 0.5},
                "WX": "w == x",
                "YZ": "y == z",
                "O": "1 if WX == YZ else 0",
            },
            "output": "O",
        },
    ),
    Builtin(
        "boolean_tree",
        "The value of (a and b) or c, each operator one of the two.",
        "after Geiger et al. 2023, arXiv 2301.04709 (trees of operations)",
        ("part",),
        {
            "variables": {
                "a": _BOOLEANS,
                "inner": ["and", "or"],
                "b": _BOOLEANS,
                "outer": ["and", "or"],
                "c": _BOOLEANS,
                "part": "a and b if inner == 'and' else a or b",
                "value": "part and c if outer == 'and' else part or c",
            },
            "output": "value",
            "templates": list(words.BOOLEAN),
        },
    ),
    Builtin(
        "arithmetic_tree",
        "The sum of three digits, two of them added first.",
        "after Geiger et al. 2023, arXiv 2301.04709 (trees of operations)",
        ("part",),
        {
            "variables": {
                "a": _DIGITS,
                "b": _DIGITS,
                "c": _DIGITS,
                "part": "a + b",
                "total": "part + c",
            },
            "output": "total",
            "templates": list(words.ARITHMETIC),
            "answer": "{total}",
        },
    ),
    Builtin(
        "price_tagging",
        "Is an amount of money between two bounds?",
        "Wu et al. 2023, arXiv 2305.08809",
        ("above_low", "below_high"),
        {
            "variables": {
                "low": {"range": [0.05, 7.45], "step": 0.01},
                "high": {"range": [2.55, 9.95], "step": 0.01},
                "amount": {"range": [0.01, 9.99], "step": 0.01},
                "above_low": "amount >= low",
                "below_high": "amount <= high",
                "between": "above_low and below_high",
            },
            "where": ["2.5 <= high - low <= 7.5"],
            "output": "between",
            "templates": list(words.PRICE),
            "answer": {"true": "Yes", "false": "No"},
        },
    ),
    Builtin(
        "ioi",
        "Two people; one of them gives something to whom? To the one whose name came once: the "
        "first (position 0) or the second (position 1).",
        "Wang et al. 2022, arXiv 2211.00593",
        ("position", "name"),
        {
            "variables": {
                "first": list(NAMES),
                "second": list(NAMES),
                "repeated": {"one_of": ["first", "second"]},
                "place": list(PLACES),
                "object": list(OBJECTS),
                "position": "1 if repeated == first else 0",
                "name": "second if position == 1 else first",
            },
            "where": ["first != second"],
            "output": "name",
            "templates": list(words.GIVING),
        },
    ),
    Builtin(
        "gender",
        "A question at the end of a sentence asks about a person by name: she or he.",
        "Mathwin et al. 2023 (a preliminary circuit for gendered pronouns in GPT-2 small)",
        ("gender",),
        {
            "variables": {
                "name": [*WOMEN, *MEN],
                "gender": {
                    "table": {**dict.fromkeys(WOMEN, "woman"), **dict.fromkeys(MEN, "man")},
                    "of": "name",
                },
                "pronoun": {"table": {"woman": "she", "man": "he"}, "of": "gender"},
            },
            "output": "pronoun",
            "templates": list(words.GENDER),
        },
    ),
    Builtin(
        "capitals",
        "The capital of a country.",
        "after the factual recall of Meng et al. 2022, arXiv 2202.05262",
        ("capital",),
        {
            "variables": {
                "country": list(CAPITALS),
                "capital": {"table": CAPITALS, "of": "country"},
            },
            "output": "capital",
            "templates": list(words.CAPITAL),
        },
    ),
    Builtin(
        "multiple_choice",
        "A colour is told and asked for among four: at which place it stands (the pointer, from "
        "0), and the letter that this place has.",
        "after Wiegreffe et al. 2024, arXiv 2407.15018 (copying colours)",
        ("pointer", "letter"),
        {
            "variables": {
                "thing": list(THINGS),
                **{f"colour{i}": list(COLOURS) for i in range(1, 5)},
                "fact": {"one_of": [f"colour{i}" for i in range(1, 5)]},
                "letter1": [four[0] for four in words.LETTERS],
                **{
                    f"letter{i + 1}": {
                        "table": {four[0]: four[i] for four in words.LETTERS},
                        "of": "letter1",
                    }
                    for i in range(1, 4)
                },
                "pointer": "0 if fact == colour1 else 1 if fact == colour2 else "
                "2 if fact == colour3 else 3",
                "letter": "letter1 if pointer == 0 else letter2 if pointer == 1 else "
                "letter3 if pointer == 2 else letter4",
            },
            "where": words.ALL_DIFFERENT,
            "output": "letter",
            "templates": list(words.CHOICE),
        },
    ),
    Builtin(
        "entailment",
        "Does a sentence follow from another with one word wider or narrower, where negation "
        "turns it round?",
        "after Geiger et al. 2020, arXiv 2004.14623 (MoNLI)",
        ("lexical", "negated"),
        {
            "variables": {
                "narrow": list(words.WIDER),
                "wide": {"table": words.WIDER, "of": "narrow"},
                "turned": _BOOLEANS,
                "premise": "wide if turned else narrow",
                "hypothesis": "narrow if turned else wide",
                "quantity": ["some", "no"],
                "lexical": "premise == narrow",
                "negated": "quantity == 'no'",
                "entails": "lexical != negated",
            },
            "output": "entails",
            "templates": list(words.ENTAILMENT),
            "answer": {"true": " Yes", "false": " No"},
        },
    ),
)

BUILTIN: Mapping[str, Builtin] = MappingProxyType({b.name: b for b in _ALL})


def builtin(name: str) -> CausalModel:
    """The built-in causal model of this name.

    Raises:
        CausalError: there is none.
    """
    if name not in BUILTIN:
        near = nearest(name, list(BUILTIN))
        expected = f"one of: {', '.join(BUILTIN)}"
        raise CausalError(f"no built-in causal model '{name}'", expected, near, ("task",))
    found = BUILTIN[name]
    return build(found.section, name, source=found.source)


def causal_model(
    section: CausalSection,
    name: str,
    functions: Mapping[str, Callable[..., Any]] = MappingProxyType({}),
) -> CausalModel:
    """The causal model of a spec's section, built in or declared; arguments as `build`.

    Raises:
        CausalError: whatever in it does not fit together; `at` says where.
    """
    if section.task is None:
        return build(section, name, functions)
    found = BUILTIN[section.task]
    own = {
        key: value
        for key, value in (("templates", section.templates), ("answer", section.answer))
        if value is not None
    }
    changed = CausalSection.model_validate({"about": found.about, **found.declared, **own})
    return build(changed, section.task, source=found.source)
