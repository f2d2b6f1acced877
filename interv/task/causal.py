"""Causal models of tasks: variables, how each comes from its parents, and the answer.

A model is declared (`interv.spec.causal.CausalSection`) and built here; `run` computes every
variable from the inputs, `fixed` ones set from outside: an interchange. Everything is done for all
samples at once, over numpy arrays `[n]`: bool, int64, float64, and object for text. A vector is an
int64 id (an *entity*), whose numbers are made when it is encoded.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

from interv.spec.causal import CausalSection, CausalVariable
from interv.task.causal_expressions import Expression
from interv.task.causal_model import CausalModel, Variable, answer_key, unknown
from interv.task.causal_values import CausalError
from interv.task.causal_variables import Functions, make_variable
from interv.task.templates import TaskError, Template

__all__ = ["CausalError", "CausalModel", "Variable", "build", "unknown"]

_NOTHING: Mapping[str, Any] = MappingProxyType({})


def build(
    section: CausalSection,
    name: str,
    functions: Functions = _NOTHING,
    *,
    source: str = "",
) -> CausalModel:
    """Make the causal model that a section declares by its variables.

    A built-in `task` is made by `interv.task.causal_builtin.causal_model`.

    Args:
        name: what it is called.
        functions: those that a variable may name, each from arrays `[n]` to an array `[n]`.
        source: the paper.

    Raises:
        CausalError: whatever in it does not fit together; `at` says where.
    """
    if section.variables is None or section.output is None:
        raise CausalError("the causal model has no variables", "variables and output")
    declared = section.variables
    parents: dict[str, tuple[str, ...]] = {}
    expressions: dict[str, Expression] = {}
    for variable, spec in declared.items():
        parents[variable] = _parents(variable, spec, declared, expressions)
    variables: dict[str, Variable] = {}
    for variable in _ordered(parents):
        spec = declared[variable]
        try:
            variables[variable] = make_variable(
                variable, spec, parents[variable], expressions.get(variable), variables, functions
            )
        except CausalError as error:
            raise error.within("variables", variable) from None
    if section.output not in variables:
        raise unknown("variable", section.output, variables).within("output")
    if variables[section.output].kind == "entity":
        message = f"the output '{section.output}' is a vector"
        raise CausalError(message, "a variable with numbers or text", at=("output",))
    where = []
    for at, text in enumerate(section.where):
        try:
            expression = Expression.parse(text)
            _known_names(expression.names, declared)
            expression.kind({k: v.kind for k, v in variables.items()})
        except CausalError as error:
            raise error.within("where", at) from None
        where.append(expression)
    inputs = tuple(v for v in declared if variables[v].is_input)
    model = CausalModel(
        name=name,
        about=section.about,
        source=source,
        variables=MappingProxyType(variables),
        output=section.output,
        inputs=inputs,
        templates=_templates(section.templates or (), variables),
        answer=section.answer if section.answer is not None else f" {{{section.output}}}",
        where=tuple(where),
    )
    if model.is_vector:
        words = [v for v in inputs if variables[v].kind == "text"]
        if words:
            message = f"the input '{words[0]}' is text, and there are no templates"
            raise CausalError(message, "templates: prompts with {variable}s in them")
    else:
        _check_answer(model)
    return model


def _known_names(names: Iterable[str], declared: Iterable[str]) -> None:
    for name in names:
        if name not in declared:
            raise unknown("variable", name, declared)


def _parents(
    name: str,
    spec: CausalVariable,
    declared: Mapping[str, CausalVariable],
    expressions: dict[str, Expression],
) -> tuple[str, ...]:
    """What must be known before this variable; parses its expression."""
    field_name, found = "of", tuple(spec.of or ())
    try:
        if spec.expression is not None:
            field_name = "expression"
            expressions[name] = Expression.parse(spec.expression)
            found = expressions[name].names
        elif spec.one_of is not None:
            field_name, found = "one_of", tuple(spec.one_of)
        elif spec.equal is not None:
            field_name, found = "equal", (spec.equal,)
        _known_names(found, declared)
    except CausalError as error:
        raise error.within("variables", name, field_name) from None
    return found


def _ordered(parents: Mapping[str, tuple[str, ...]]) -> list[str]:
    """Each after its parents, else as declared.

    Raises:
        CausalError: a cycle, which it names.
    """
    out: list[str] = []
    while len(out) < len(parents):
        ready = [n for n in parents if n not in out and all(p in out for p in parents[n])]
        if not ready:
            path = [next(n for n in parents if n not in out)]
            while path.count(path[-1]) < 2:
                path.append(next(p for p in parents[path[-1]] if p not in out))
            loop = path[path.index(path[-1]) :][::-1]
            message = f"the variables run in a circle: {' -> '.join(loop)}"
            raise CausalError(message, "parents before children", at=("variables", loop[-1]))
        out.append(ready[0])
    return out


def _templates(texts: Sequence[str], variables: Mapping[str, Variable]) -> tuple[Template, ...]:
    found = []
    for at, text in enumerate(texts):
        template = _parsed(at + 1, text, ("templates", at))
        if not template.slots:
            message = f"template {at + 1} has no variable: every prompt would be the same"
            raise CausalError(message, "prompts with {variable}s in them", at=("templates", at))
        for slot in template.slots:
            if slot not in variables:
                raise unknown("variable", slot, variables).within("templates", at)
            if variables[slot].kind == "entity":
                message = f"{{{slot}}} in a template is a vector"
                raise CausalError(message, "a variable of text or numbers", at=("templates", at))
        names = set(template.slots)
        for slot in names:
            mentions = {f"{slot}{i + 1}" for i in range(template.slots.count(slot))}
            if len(mentions) > 1 and mentions & names:
                both = sorted(mentions & names)[0]
                message = f"'{both}' is a variable, and a mention of {{{slot}}} too"
                raise CausalError(message, "another name", at=("templates", at))
        found.append(template)
    return tuple(found)


def _parsed(number: int, text: str, at: tuple[str | int, ...]) -> Template:
    try:
        return Template.parse(number, text)
    except TaskError as error:
        raise CausalError(error.message, error.expected, at=at) from None


def _check_answer(model: CausalModel) -> None:
    """Raise CausalError for answers that do not fit the output or the templates."""
    at, values = ("answer",), model.variables[model.output].values
    if isinstance(model.answer, str):
        slots = _parsed(1, model.answer, at).slots
        if set(slots) != {model.output}:
            wrong = next((s for s in slots if s != model.output), None)
            found = f"has {{{wrong}}}" if wrong else "has no placeholder"
            raise CausalError(
                f"the answer {model.answer!r} {found}", f"{{{model.output}}}, the output", at=at
            )
        texts = [model.answer]
    else:
        texts = list(model.answer.values())
        if len(set(texts)) < len(texts):
            raise CausalError("two values have one answer", "an answer for each value", at=at)
        keys = {key.lower() for key in model.answer}
        for value in values or ():
            if answer_key(value) not in keys:
                expected = "one for each of " + ", ".join(answer_key(v) for v in values or ())
                raise CausalError(f"no answer for {answer_key(value)}", expected, at=at)
    ends = [t for t in model.templates if t.text[-1:].isspace()]
    if ends and any(text[:1].isspace() for text in texts):
        message = f"template {ends[0].number} ends in a space, and an answer begins with one"
        raise CausalError(message, "a space in one of them", at=("templates", ends[0].number - 1))
