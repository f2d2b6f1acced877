"""Expressions of causal models, evaluated over arrays as Python would evaluate them on numbers.

`and`, `or`, chains of comparisons and `a if c else b` included: what Python would not evaluate is
not evaluated here either. Sums and products of decimals are rounded to nine places, so that
0.1 + 0.2 is 0.3.
"""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from interv.spec.causal import LARGEST
from interv.task.causal_values import Array, CausalError, Scalar, column

_BIGGEST = 2.0**62  # beyond, a product may have left int64
_DECIMALS = 9

COMPARE: dict[type[ast.cmpop], Callable[[Any, Any], Any]] = {
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
}
ARITHMETIC: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
}


def constants(node: ast.expr) -> list[Scalar] | None:
    """The values of a literal list; None for anything else."""
    if not isinstance(node, ast.List | ast.Tuple) or not node.elts:
        return None
    out: list[Scalar] = []
    for element in node.elts:
        sign, inner = 1, element
        if isinstance(element, ast.UnaryOp) and isinstance(element.op, ast.USub):
            sign, inner = -1, element.operand
        value = inner.value if isinstance(inner, ast.Constant) else None
        if not isinstance(value, bool | int | float | str):
            return None
        if isinstance(value, str):
            if sign < 0:
                return None
            out.append(value)
        elif abs(value) <= LARGEST:
            out.append(value if sign > 0 else -value)
        else:
            return None
    return out


def _truth(values: Array) -> Array:
    if values.dtype == object:
        raise CausalError("text where yes or no is needed", "a comparison")
    return values if values.dtype == bool else values != 0


def _pick(values: Mapping[str, Array], mask: Array) -> dict[str, Array]:
    return {name: array[mask] for name, array in values.items()}


def _merge(mask: Array, yes: Array, no: Array) -> Array:
    """`yes` where the mask is set, `no` elsewhere; each only as long as its part."""
    mixed = object in (yes.dtype, no.dtype)
    out = np.empty(len(mask), dtype=object if mixed else np.result_type(yes, no))
    out[mask], out[~mask] = yes, no
    return out


def evaluate(node: ast.expr, values: Mapping[str, Array], n: int) -> Array:
    """The value `[n]` of a checked expression; CausalError where it has none."""
    match node:
        case ast.Name():
            return values[node.id]
        case ast.Constant():
            assert isinstance(node.value, bool | int | float | str)
            return np.broadcast_to(column([node.value]), (n,))
        case ast.Compare():
            return _chain(node, values, n)
        case ast.BoolOp():
            out = evaluate(node.values[0], values, n)
            for operand in node.values[1:]:
                goes_on = _truth(out)
                if isinstance(node.op, ast.Or):
                    goes_on = ~goes_on
                rest = evaluate(operand, _pick(values, goes_on), int(goes_on.sum()))
                out = _merge(goes_on, rest, out[~goes_on])
            return out
        case ast.UnaryOp():
            operand_value = evaluate(node.operand, values, n)
            if isinstance(node.op, ast.Not):
                return ~_truth(operand_value)
            return -as_number(operand_value)
        case ast.BinOp():
            left, right = evaluate(node.left, values, n), evaluate(node.right, values, n)
            return arithmetic(node.op, as_number(left), as_number(right))
        case ast.IfExp():
            test = _truth(evaluate(node.test, values, n))
            yes = evaluate(node.body, _pick(values, test), int(test.sum()))
            no = evaluate(node.orelse, _pick(values, ~test), int((~test).sum()))
            return _merge(test, yes, no)
        case ast.Call(func=ast.Name(id=called)):
            out, *rest_args = (as_number(evaluate(arg, values, n)) for arg in node.args)
            if called == "abs":
                return np.abs(out)
            for other in rest_args:
                out = np.minimum(out, other) if called == "min" else np.maximum(out, other)
            return out
    raise AssertionError(ast.dump(node))


def _chain(node: ast.Compare, values: Mapping[str, Array], n: int) -> Array:
    """A chain of comparisons: those after one that fails are not made."""
    at, left = np.arange(n), evaluate(node.left, values, n)
    out = np.zeros(n, dtype=bool)
    for number, (op, comparator) in enumerate(zip(node.ops, node.comparators, strict=True)):
        listed = constants(comparator) if isinstance(op, ast.In | ast.NotIn) else None
        if listed is not None:
            holds = np.zeros(len(at), dtype=bool)
            for item in listed:
                holds |= (left == np.broadcast_to(column([item]), (len(at),))).astype(bool)
            holds = ~holds if isinstance(op, ast.NotIn) else holds
            right = left
        else:
            right = evaluate(comparator, values, len(at))
            holds = np.asarray(COMPARE[type(op)](left, right)).astype(bool)
        if number < len(node.ops) - 1:
            at, left, values = at[holds], right[holds], _pick(values, holds)
    out[at] = holds
    return out


def as_number(values: Array) -> Array:
    """Booleans as 0 and 1."""
    if values.dtype == object:
        raise CausalError("text where a number is needed", "a number")
    return values.astype(np.int64) if values.dtype == bool else values


def arithmetic(op: ast.operator, left: Array, right: Array) -> Array:
    """One of + - * // % of numbers."""
    divides = isinstance(op, ast.FloorDiv | ast.Mod)
    if divides and bool((right == 0).any()):
        raise CausalError("a division by zero", "a divisor that is never 0: `a // b if b else 0`")
    if not divides:
        size = np.abs(ARITHMETIC[type(op)](left.astype(np.float64), right.astype(np.float64)))
        if bool((size > _BIGGEST).any()):
            raise CausalError("a number beyond 2**62", "smaller numbers")
    decimal = np.float64 in (left.dtype, right.dtype)
    if decimal and divides:
        whole = np.floor(np.round(left / right, _DECIMALS))
        out = whole if isinstance(op, ast.FloorDiv) else left - whole * right
    else:
        out = ARITHMETIC[type(op)](left, right)
    return np.round(out, _DECIMALS) if decimal else out
