"""How each kind of variable is made from its declaration."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from decimal import Decimal
from typing import Any

from interv.errors import nearest
from interv.plugins import takes
from interv.spec.causal import CausalVariable
from interv.task.causal_expressions import Expression
from interv.task.causal_model import Known, Variable, as_column
from interv.task.causal_values import Array, CausalError, Scalar, column, distinct, kind_of

Functions = Mapping[str, Callable[..., Any]]

_MOST_STEPS = 1_000_000


def make_variable(
    name: str,
    spec: CausalVariable,
    parents: tuple[str, ...],
    expression: Expression | None,
    before: Mapping[str, Variable],
    functions: Functions,
) -> Variable:
    """A variable whose parents are made; CausalError where the declaration does not fit them."""
    above = [before[p] for p in parents]
    if spec.values is not None:
        return _of_values(name, spec.values, spec.decimals)
    if spec.range is not None:
        return _of_range(name, spec)
    if spec.vector is not None:
        return _vector(name, spec, above)
    if spec.one_of is not None:
        return _one_of(name, spec, above)
    decimals = spec.decimals
    if decimals is None:
        known = [p.decimals for p in above if p.decimals is not None]
        decimals = max(known, default=None)
    if expression is not None:
        kind = expression.kind({p.name: p.kind for p in above})
        possible = expression.possible if kind != "entity" else None
        made = Variable(name, "expression", kind, parents, None, decimals, expression, possible)
    elif spec.table is not None:
        made = _table(name, spec.table, above[0], decimals)
    else:
        assert spec.function is not None
        if spec.function not in functions:
            expected = f"one of: {', '.join(functions)}" if functions else "a plug-in file with it"
            message = f"no function '{spec.function}'"
            raise CausalError(message, expected, nearest(spec.function, list(functions)))
        if wrong := takes(functions[spec.function], len(parents)):
            message = f"function {wrong} cannot be called with {len(parents)} arguments"
            raise CausalError(message, f"one for each of: {', '.join(parents)}")
        call = _Function(spec.function, functions[spec.function], parents)
        made = Variable(name, "function", "any", parents, None, decimals, call)
    if made.possible is None:
        return made
    return replace(made, values=made.possible({p.name: p.values for p in above}))


def _of_values(name: str, values: Sequence[Scalar], decimals: int | None = None) -> Variable:
    kind = kind_of(values)
    if kind is None:
        raise CausalError("the values are text and numbers", "one of them; quotes make text")
    if len(distinct(values)) < len(values):
        twice = next(v for v in values if list(values).count(v) > 1)
        raise CausalError(f"the value {twice!r} is there twice", "each value once")
    floats = [v for v in values if isinstance(v, float)]
    if floats and decimals is None:
        decimals = max(map(_decimals, floats))
    return Variable(name, "values", kind, (), tuple(values), decimals)


def _of_range(name: str, spec: CausalVariable) -> Variable:
    assert spec.range is not None
    low, high = spec.range
    step = 1 if spec.step is None else spec.step
    # A little more than a whole number of steps is one.
    count = int((high - low) / step + 1e-6) + 1
    if count > _MOST_STEPS:
        raise CausalError(f"the range has {count:,} steps", f"at most {_MOST_STEPS:,}")
    if all(isinstance(v, int) for v in (low, high, step)):
        return Variable(
            name, "values", "number", (), tuple(low + step * i for i in range(count)), spec.decimals
        )
    decimals = max(map(_decimals, (low, high, step)))
    values = tuple(round(float(low + step * i), decimals) for i in range(count))
    shown = decimals if spec.decimals is None else spec.decimals
    return Variable(name, "values", "number", (), values, shown)


def _decimals(value: float) -> int:
    exponent = Decimal(str(value)).normalize().as_tuple().exponent
    return max(0, -exponent) if isinstance(exponent, int) else 0


def _vector(name: str, spec: CausalVariable, above: Sequence[Variable]) -> Variable:
    assert spec.vector is not None
    made = Variable(
        name,
        "vector",
        "entity",
        tuple(v.name for v in above),
        width=spec.vector,
        distribution=spec.distribution or "uniform",
        entities=spec.entities,
        share=(0.5 if spec.share is None else spec.share) if above else 0.0,
    )
    for other in above:
        same = (other.how, other.width, other.distribution, other.entities)
        if same != ("vector", made.width, made.distribution, made.entities):
            message = f"'{name}' equals '{other.name}', which is another kind of input"
            raise CausalError(message, "vectors of one width, distribution and number of entities")
    return made


def _one_of(name: str, spec: CausalVariable, above: Sequence[Variable]) -> Variable:
    kinds = {v.kind for v in above}
    computed = [v.name for v in above if not v.is_input]
    if computed:
        raise CausalError(f"one_of has '{computed[0]}', which is computed", "inputs")
    if len(kinds) > 1 or "entity" in kinds:
        raise CausalError(
            f"one_of mixes {' and '.join(sorted(kinds))}", "inputs of text or numbers"
        )
    names = tuple(v.name for v in above)
    if len(set(names)) < len(names):
        raise CausalError("one_of has an input twice", "each once")

    def possible(known: Known) -> tuple[Scalar, ...] | None:
        found = [known[n] for n in names]
        return distinct(v for values in found for v in values or ())

    decimals = max((v.decimals for v in above if v.decimals is not None), default=None)
    shown = decimals if spec.decimals is None else spec.decimals
    values = possible({v.name: v.values for v in above})
    return Variable(name, "one_of", above[0].kind, names, values, shown, None, possible)


def _table(
    name: str, table: Mapping[str, Scalar], parent: Variable, decimals: int | None
) -> Variable:
    kind = kind_of(table.values())
    if kind is None:
        raise CausalError("the table gives text and numbers", "one of them; quotes make text")
    if parent.kind == "entity":
        raise CausalError(f"a table of '{parent.name}', which is a vector", "text or numbers")
    entries: dict[Scalar, Scalar] = {}
    for written, value in table.items():
        keys: list[Scalar] = [written] if parent.kind != "number" else []
        keys += [] if parent.kind == "text" else [k for k in (_key(written),) if k is not None]
        if not keys:
            message = f"'{written}' in the table is no value of '{parent.name}'"
            raise CausalError(message, "a number, true or false", at=("table", written))
        entries.update(dict.fromkeys(keys, value))
    call = _Table(parent.name, entries)
    # What an expression may give is a guess that errs on the side of more.
    for value in parent.values or () if parent.how in ("values", "table", "one_of") else ():
        call.of(value)

    def possible(known: Known) -> tuple[Scalar, ...] | None:
        values = known[parent.name]
        keys = entries if values is None else [v for v in values if v in entries]
        return distinct(entries[key] for key in keys)

    if any(isinstance(v, float) for v in table.values()) and decimals is None:
        decimals = max(_decimals(v) for v in table.values() if isinstance(v, float))
    return Variable(name, "table", kind, (parent.name,), None, decimals, call, possible)


def _key(written: str) -> Scalar | None:
    """A key of a mapping, which YAML gives as text, as a number; None where it is none."""
    if written.lower() in ("true", "false"):
        return written.lower() == "true"
    try:
        return float(written)  # which finds the whole number, too
    except ValueError:
        return None


@dataclass(frozen=True)
class _Table:
    parent: str
    entries: Mapping[Scalar, Scalar]

    def of(self, value: Scalar) -> Scalar:
        if value not in self.entries:
            known = [str(k) for k in self.entries]
            raise CausalError(
                f"the table has no entry for {value!r}, a value of '{self.parent}'",
                f"an entry for each value; it has {', '.join(known[:8])}"
                + (", ..." if len(known) > 8 else ""),
                nearest(str(value), known),
            )
        return self.entries[value]

    def __call__(self, values: Mapping[str, Array], n: int) -> Array:
        found = [self.of(value) for value in values[self.parent].tolist()]
        # Not of what was found alone: the type is the same for all samples.
        return column([*found, *self.entries.values()])[: len(found)]


@dataclass(frozen=True)
class _Function:
    """A user's own function."""

    name: str
    call: Callable[..., Any]
    parents: tuple[str, ...]

    def __call__(self, values: Mapping[str, Array], n: int) -> Array:
        try:
            out = self.call(*(values[p].copy() for p in self.parents))
        except Exception as error:  # the user's own code may raise anything
            kind = type(error).__name__
            raise CausalError(f"function '{self.name}' failed: {kind}: {error}") from error
        found = as_column(out)
        if found.shape != (n,) or found.dtype.kind not in "biufO":
            raise CausalError(
                f"function '{self.name}' gave {found.dtype} of shape {list(found.shape)}",
                f"an array of shape [{n}] of numbers, booleans or text",
            )
        return found
