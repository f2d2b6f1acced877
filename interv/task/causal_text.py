"""Prompts and answers of causal models as text."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import Any

import numpy as np

from interv.task.causal_model import CausalModel, Variable, answer_key
from interv.task.causal_values import Array, CausalError, Scalar, column
from interv.task.templates import Filled, Span, Template, Vocabulary, before


def value_text(variable: Variable, value: Any) -> str:
    """A value as it stands in a prompt."""
    if isinstance(value, bool | np.bool_):
        return str(bool(value))
    if isinstance(value, int | np.integer):
        return str(int(value)) if variable.decimals is None else f"{value:.{variable.decimals}f}"
    if isinstance(value, float | np.floating):
        return f"{value:g}" if variable.decimals is None else f"{value:.{variable.decimals}f}"
    return str(value)


def render(model: CausalModel, values: Mapping[str, Array], templates: Array) -> list[Filled]:
    """The prompts of `n` samples.

    Args:
        values: of every variable, `[n]`.
        templates: `[n]`, the number of each one's template, from 0.

    Raises:
        CausalError: the model has no templates.
    """
    if model.is_vector:
        raise CausalError(f"{model.name} has no templates", "templates: prompts")
    slots = dict.fromkeys(slot for template in model.templates for slot in template.slots)
    texts = {
        slot: [value_text(model.variables[slot], v) for v in values[slot].tolist()]
        for slot in slots
    }
    return [
        model.templates[number].fill({slot: texts[slot][at] for slot in slots})
        for at, number in enumerate(templates.tolist())
    ]


def spans(filled: Filled) -> dict[str, Span]:
    """Characters `[start, end)` of each variable; of several mentions also `x1`, `x2`, ..."""
    found: dict[str, Span] = {}
    for slot, places in filled.places.items():
        found[slot] = places[0]
        if len(places) > 1:
            found.update({f"{slot}{i + 1}": place for i, place in enumerate(places)})
    return found


def answer_text(model: CausalModel, value: Any) -> str:
    """What follows the prompt where the output has this value, its leading space included.

    Raises:
        CausalError: the mapping of answers has none for it.
    """
    plain = value.item() if isinstance(value, np.generic) else value
    if isinstance(model.answer, str):
        text = value_text(model.variables[model.output], plain)
        return _answer_template(model.answer).fill({model.output: text}).text
    texts = {key.lower(): text for key, text in model.answer.items()}
    if answer_key(plain) not in texts:
        have = ", ".join(texts)
        raise CausalError(f"no answer for {answer_key(plain)}", f"one of: {have}", at=("answer",))
    return texts[answer_key(plain)]


@functools.cache
def _answer_template(text: str) -> Template:
    return Template.parse(1, text)


def answers(model: CausalModel) -> dict[Scalar, str] | None:
    """The answer to each value of the output; None where its values are not known.

    Values that `usable` has dropped are left out.
    """
    values = model.variables[model.output].values
    if values is None:
        return None
    kept = model.allowed.get(model.output)
    return {v: answer_text(model, v) for v in values if kept is None or v in kept}


def usable(model: CausalModel, is_token: Callable[[str], bool]) -> CausalModel:
    """The model with the words and answers that are single tokens.

    Words are tried as they stand in the templates, with the space before them where there is one;
    numbers are not. Values that an input cannot be freed of are never drawn, nor labels.

    Args:
        is_token: whether a text, its leading space included, is a single token.

    Raises:
        CausalError: fewer than two values of a variable remain, or the answers are not known.
    """
    vocabulary = Vocabulary(is_token)
    values: dict[str, tuple[Scalar, ...]] = {}
    allowed: dict[str, frozenset[Scalar]] = {}
    for name, variable in model.variables.items():
        if variable.kind != "text" or variable.values is None or variable.how == "one_of":
            continue
        choosers = [
            v.name for v in model.variables.values() if v.how == "one_of" and name in v.parents
        ]
        spaces = before(model.templates, (name, *choosers))
        kept = tuple(
            v for v in variable.values if all(vocabulary.has(space + str(v)) for space in spaces)
        )
        _enough(f"values of '{name}'", kept, variable.values)
        if variable.is_input:
            values[name] = kept
        elif len(kept) < len(variable.values):
            allowed[name] = frozenset(kept)
    model = model.with_values(values)
    known = answers(model)
    if known is None:
        message = f"the values of the output '{model.output}' cannot be listed"
        raise CausalError(message, "a table, an expression over few values, or fewer inputs")
    right = [value for value, text in known.items() if vocabulary.has(text)]
    _enough(f"answers ({', '.join(repr(t) for t in list(known.values())[:4])}, ...)", right, known)
    if len(right) < len(known):
        allowed[model.output] = allowed.get(model.output, frozenset(right)) & frozenset(right)
    return _pruned(replace(model, allowed=MappingProxyType(allowed)))


def _enough(what: str, kept: Sequence[Scalar], of: Any) -> None:
    if len(kept) < min(2, len(of)):
        raise CausalError(
            f"{len(kept)} of {len(of)} {what} are single tokens of this model",
            "other words, templates with a space before each, or another model",
        )


def _pruned(model: CausalModel) -> CausalModel:
    """Values of inputs that alone decide a value which is not allowed are dropped."""
    allowed = dict(model.allowed)
    for name, good in model.allowed.items():
        roots = model.ancestors(name)
        known = model.variables[roots[0]].values if len(roots) == 1 else None
        if known is None:
            continue
        (root,) = roots
        given = column(known)
        found = {root: given}
        for between in _between(model, root, name):
            compute = model.variables[between].compute
            assert compute is not None
            found[between] = compute(found, len(given))
        kept = [v for v, to in zip(known, found[name].tolist(), strict=True) if to in good]
        _enough(f"values of '{root}'", kept, known)
        model = model.with_values({root: tuple(kept)})
        del allowed[name]
    return replace(model, allowed=MappingProxyType(allowed))


def _between(model: CausalModel, root: str, name: str) -> list[str]:
    """What is computed on the way from the only root of a variable to it, in order."""
    needed, left = set(), [name]
    while left:
        here = left.pop()
        if here != root and here not in needed:
            needed.add(here)
            left += model.variables[here].parents
    return [v for v in model.variables if v in needed]
