"""What a causal model is, and how it runs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any, Literal

import numpy as np

from interv.errors import nearest
from interv.task.causal_expressions import Expression
from interv.task.causal_values import Array, CausalError, Kind, Scalar
from interv.task.templates import Template

Known = Mapping[str, Sequence[Scalar] | None]
Answer = str | Mapping[str, str]

_NOTHING: Mapping[str, Any] = MappingProxyType({})


@dataclass(frozen=True)
class Variable:
    """One variable of a causal model.

    Attributes:
        how: what kind it was declared as; the first three are inputs.
        kind: what its values are.
        parents: what its function reads; of an input: what its draw depends on.
        values: of an input, those it is drawn from; else all it may have, perhaps with others.
            None: not known, or too many.
        decimals: with how many it stands in prompts, where it is a decimal number.
        compute: from its parents' values `[n]` and n, its own `[n]`; None for an input.
        possible: its `values` from its parents'.
        width, distribution, entities, share: of a vector.
    """

    name: str
    how: Literal["values", "vector", "one_of", "expression", "table", "function"]
    kind: Kind
    parents: tuple[str, ...] = ()
    values: tuple[Scalar, ...] | None = None
    decimals: int | None = None
    compute: Callable[[Mapping[str, Array], int], Array] | None = field(default=None, repr=False)
    possible: Callable[[Known], tuple[Scalar, ...] | None] | None = field(
        default=None, repr=False, compare=False
    )
    width: int = 0
    distribution: Literal["uniform", "normal"] = "uniform"
    entities: int | None = None
    share: float = 0.0

    @property
    def is_input(self) -> bool:
        """Whether it is drawn, not computed."""
        return self.compute is None


@dataclass(frozen=True)
class CausalModel:
    """A causal model of a task.

    Attributes:
        about, source: one line each: what it is, and the paper.
        variables: each after its parents.
        inputs: in the order of their declaration.
        where: expressions that hold for every base and every source.
        allowed: values that a variable may have in every base and source, and as a label, because
            others are no single tokens of the model at hand.
        answer: the text of the output's values: one with the output's placeholder in it, or one
            for each value.
    """

    name: str
    about: str
    source: str
    variables: Mapping[str, Variable]
    output: str
    inputs: tuple[str, ...]
    templates: tuple[Template, ...] = ()
    answer: Answer = ""
    where: tuple[Expression, ...] = ()
    allowed: Mapping[str, frozenset[Scalar]] = field(default_factory=dict)

    @property
    def is_vector(self) -> bool:
        """Whether the inputs are vectors and numbers, not prompts."""
        return not self.templates

    @property
    def is_finite(self) -> bool:
        """Whether a pair may come twice: no input is a fresh vector each time."""
        return not any(v.how == "vector" and v.entities is None for v in self.variables.values())

    def variable(self, name: str) -> Variable:
        """The variable of this name.

        Raises:
            CausalError: there is none.
        """
        if name not in self.variables:
            raise unknown("variable", name, self.variables)
        return self.variables[name]

    def run(
        self,
        inputs: Mapping[str, Array],
        fixed: Mapping[str, Array] = _NOTHING,
        where: Mapping[str, Array] = _NOTHING,
    ) -> dict[str, Array]:
        """Compute every variable.

        Args:
            inputs: values `[n]` of every input.
            fixed: values `[n]` that variables have instead of their own.
            where: `[n]` bool: the samples in which they do; unset: all.

        Raises:
            CausalError: an input is missing or has another length, or a function cannot be
                computed (a division by zero, a value that is not in a table).
        """
        for name in (*fixed, *where):
            self.variable(name)
        columns = {name: as_column(values) for name, values in {**inputs, **fixed}.items()}
        lengths = {len(values) for values in columns.values()}
        if missing := [name for name in self.inputs if name not in columns]:
            raise CausalError(f"no values of the input '{missing[0]}'", "all inputs")
        if len(lengths) != 1:
            raise CausalError(f"values of different number: {sorted(lengths)}", "as many of each")
        (n,) = lengths
        return self._run(columns, fixed, where, n)

    def _run(
        self, columns: Mapping[str, Array], fixed: Iterable[str], where: Mapping[str, Array], n: int
    ) -> dict[str, Array]:
        out: dict[str, Array] = {}
        fixed = set(fixed)
        for name, variable in self.variables.items():
            if name in fixed and name not in where:
                out[name] = columns[name]
                continue
            if variable.compute is None:
                own = columns[name]
            else:
                try:
                    own = variable.compute(out, n)
                except CausalError as error:
                    message = f"variable '{name}': {error.message}"
                    at = ("variables", name)
                    raise CausalError(message, error.expected, error.near, at) from None
            out[name] = _merged(where[name], columns[name], own) if name in fixed else own
        return out

    def ancestors(self, name: str) -> tuple[str, ...]:
        """The inputs that decide a variable; an input itself, and what its draw depends on."""
        found, left = set(), [name]
        while left:
            here = left.pop()
            if here not in found:
                found.add(here)
                left += self.variables[here].parents
        return tuple(name for name in self.inputs if name in found)

    def with_values(self, values: Mapping[str, tuple[Scalar, ...]]) -> CausalModel:
        """The same with other values of some inputs; what follows from them is worked out."""
        variables: dict[str, Variable] = {}
        for name, variable in self.variables.items():
            own = values.get(name, variable.values)
            if variable.possible is not None:
                own = variable.possible({k: v.values for k, v in variables.items()})
            variables[name] = replace(variable, values=own)
        return replace(self, variables=MappingProxyType(variables))


def unknown(what: str, name: str, known: Iterable[str]) -> CausalError:
    """The error that there is no such name."""
    names = list(known)
    return CausalError(
        f"no {what} '{name}' in the causal model",
        f"one of: {', '.join(names)}" if names else None,
        nearest(name, names),
    )


def as_column(values: Any) -> Array:
    """Any array or list as one of the arrays that are used here."""
    array = np.asarray(values)
    return array.astype(object) if array.dtype.kind == "U" else array


def _merged(mask: Array, yes: Array, no: Array) -> Array:
    mixed = object in (yes.dtype, no.dtype)
    dtype = object if mixed else np.result_type(yes, no)
    return np.where(mask, yes.astype(dtype), no.astype(dtype))


def answer_key(value: Any) -> str:
    """A value of the output as the key that stands for it in a mapping of answers."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return str(value).lower()
