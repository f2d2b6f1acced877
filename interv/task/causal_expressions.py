"""Expressions of causal models: a closed grammar.

Parsed with `ast` and walked here; nothing is compiled or run.
"""

from __future__ import annotations

import ast
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product

import numpy as np

from interv.errors import nearest
from interv.spec.causal import FUNCTIONS, LARGEST
from interv.task.causal_evaluate import (
    ARITHMETIC,
    COMPARE,
    arithmetic,
    as_number,
    constants,
    evaluate,
)
from interv.task.causal_values import Array, CausalError, Kind, Scalar, column, distinct

ALLOWED = (
    "variables, numbers, 'text', True, False, == != < <= > >=, in [a, b], and, or, not, "
    "+ - * // %, min, max, abs, a if c else b"
)
_MOST_VALUES = 10_000
_DEEPEST = 50

_EQUALITY = (ast.Eq, ast.NotEq, ast.In, ast.NotIn)


@dataclass(frozen=True)
class Expression:
    """A parsed expression; `names` are the variables in it, in their order."""

    text: str
    names: tuple[str, ...]
    tree: ast.expr = field(repr=False, compare=False)

    @classmethod
    def parse(cls, text: str) -> Expression:
        """Parse and check the grammar.

        Raises:
            CausalError: it is no expression, or has something in it that is not allowed.
        """
        flat = " ".join(text.split("\n")).strip()
        try:
            with warnings.catch_warnings():
                # `1or 2`, '\d': what Python will refuse one day.
                warnings.simplefilter("error")
                tree = ast.parse(flat, mode="eval").body
        except (SyntaxError, ValueError, RecursionError, MemoryError, Warning) as error:
            why = error.msg if isinstance(error, SyntaxError) else type(error).__name__
            raise CausalError(f"{text!r} is no expression: {why}", ALLOWED) from None
        names: list[str] = []
        _check(tree, flat, names, 0)
        return cls(flat, tuple(dict.fromkeys(names)), tree)

    def kind(self, kinds: Mapping[str, Kind]) -> Kind:
        """What it gives, for variables of these kinds.

        Raises:
            CausalError: operands that do not go together.
        """
        return _Kinds(self.text, kinds).of(self.tree)

    def possible(self, known: Mapping[str, Sequence[Scalar] | None]) -> tuple[Scalar, ...] | None:
        """Values that it may have, perhaps with others; None: too many, or not known."""
        return _possible(self.tree, known)

    def __call__(self, values: Mapping[str, Array], n: int) -> Array:
        """Its value `[n]` for the values `[n]` of its variables.

        Raises:
            CausalError: a division by zero, a number that is too large, text in arithmetic.
        """
        try:
            own = {name: values[name] for name in self.names}
            # Not a broadcast constant: the caller may write to it.
            return np.array(evaluate(self.tree, own, n))
        except CausalError as error:
            message = f"{error.message} in {self.text!r}"
            raise CausalError(message, error.expected) from None
        except TypeError as error:  # text and numbers together, from a user's function
            raise CausalError(f"{self.text!r} has text and numbers together: {error}") from None


def _check(node: ast.AST, text: str, names: list[str], depth: int) -> None:
    """Raise CausalError for whatever is not in the grammar; collect names."""

    def refuse(what: ast.AST = node) -> CausalError:
        # Operators have no place of their own.
        part = ast.get_source_segment(text, what) or text
        return CausalError(f"{part!r} is not allowed in the expression {text!r}", ALLOWED)

    if depth > _DEEPEST:
        message = f"the expression is nested more than {_DEEPEST} deep: {text[:60]!r}"
        raise CausalError(message, "variables for its parts")
    below: list[ast.expr]
    match node:
        case ast.Name():
            names.append(node.id)
            below = []
        case ast.Constant():
            value = node.value
            if not isinstance(value, bool | int | float | str):
                raise refuse()
            if not isinstance(value, str) and not abs(value) <= LARGEST:
                raise refuse()
            below = []
        case ast.Compare():
            below = [node.left, *node.comparators]
            for at, op in enumerate(node.ops):
                if isinstance(op, ast.In | ast.NotIn):
                    listed = node.comparators[at]
                    if at < len(node.ops) - 1 or constants(listed) is None:
                        raise refuse()
                    below.remove(listed)
                elif type(op) not in COMPARE:
                    raise refuse()
        case ast.BoolOp():
            below = node.values
        case ast.UnaryOp(op=ast.Not() | ast.USub()):
            below = [node.operand]
        case ast.BinOp() if type(node.op) in ARITHMETIC:
            below = [node.left, node.right]
        case ast.IfExp():
            below = [node.test, node.body, node.orelse]
        case ast.Call(func=ast.Name(id=called)) if not node.keywords:
            if called not in FUNCTIONS:
                near = nearest(called, FUNCTIONS)
                raise CausalError(f"no function {called!r} in {text!r}", ALLOWED, near)
            few, many = (1, 1) if called == "abs" else (2, 100)
            starred = any(isinstance(arg, ast.Starred) for arg in node.args)
            if starred or not few <= len(node.args) <= many:
                raise refuse()
            below = node.args
        case _:
            raise refuse()
    for child in below:
        _check(child, text, names, depth + 1)


@dataclass(frozen=True)
class _Kinds:
    """What each part of an expression gives."""

    text: str
    kinds: Mapping[str, Kind]

    def of(self, node: ast.expr) -> Kind:
        match node:
            case ast.Name():
                return self.kinds[node.id]
            case ast.Constant():
                return "text" if isinstance(node.value, str) else "number"
            case ast.Compare():
                self._comparison(node)
                return "number"
            case ast.BoolOp():
                self._numbers(node, node.values)
                return "number"
            case ast.UnaryOp():
                self._numbers(node, [node.operand])
                return "number"
            case ast.BinOp():
                self._numbers(node, [node.left, node.right])
                return "number"
            case ast.IfExp():
                self._numbers(node, [node.test])
                return self._same(node, [self.of(node.body), self.of(node.orelse)])
            case ast.Call():
                self._numbers(node, node.args)
                return "number"
        raise AssertionError(ast.dump(node))

    def _part(self, node: ast.expr) -> str:
        return ast.get_source_segment(self.text, node) or ast.unparse(node)

    def _numbers(self, node: ast.expr, operands: Sequence[ast.expr]) -> None:
        for operand in operands:
            kind = self.of(operand)
            if kind in ("text", "entity"):
                what = "text" if kind == "text" else "a vector"
                message = f"{self._part(operand)!r} is {what} in {self._part(node)!r}"
                raise CausalError(message, "a number, True or False; text is compared with ==")

    def _same(self, node: ast.expr, kinds: Sequence[Kind]) -> Kind:
        known = {kind for kind in kinds if kind != "any"}
        if len(known) > 1:
            words = {"text": "text", "number": "a number", "entity": "a vector"}
            found = " and ".join(sorted(words[kind] for kind in known))
            raise CausalError(f"{self._part(node)!r} mixes {found}", "one of them")
        return known.pop() if known and "any" not in kinds else "any"

    def _comparison(self, node: ast.Compare) -> None:
        left = self.of(node.left)
        for op, comparator in zip(node.ops, node.comparators, strict=True):
            listed = constants(comparator)
            if listed is None:
                right = self.of(comparator)
                self._same(node, [left, right])
            else:
                right = left
                for value in listed:
                    self._same(node, [left, "text" if isinstance(value, str) else "number"])
            if not isinstance(op, _EQUALITY) and "entity" in (left, right):
                message = f"{self._part(node)!r} puts vectors in an order"
                raise CausalError(message, "vectors are compared with == and !=")
            left = right


def _possible(
    node: ast.expr, known: Mapping[str, Sequence[Scalar] | None]
) -> tuple[Scalar, ...] | None:
    def of(*nodes: ast.expr) -> list[tuple[Scalar, ...]] | None:
        found = [_possible(child, known) for child in nodes]
        return None if None in found else [f for f in found if f is not None]

    def union(*nodes: ast.expr) -> tuple[Scalar, ...] | None:
        found = of(*nodes)
        return None if found is None else distinct(v for values in found for v in values)

    match node:
        case ast.Name():
            values = known[node.id]
            return None if values is None else tuple(values)
        case ast.Constant():
            assert isinstance(node.value, bool | int | float | str)
            return (node.value,)
        case ast.Compare() | ast.UnaryOp(op=ast.Not()):
            return (False, True)
        case ast.BoolOp():
            return union(*node.values)
        case ast.IfExp():
            return union(node.body, node.orelse)
        case ast.Call(func=ast.Name(id="min" | "max")):
            return union(*node.args)
    operands = [node.left, node.right] if isinstance(node, ast.BinOp) else []
    if isinstance(node, ast.UnaryOp):
        operands = [node.operand]
    if isinstance(node, ast.Call):
        operands = node.args
    found = of(*operands)
    if found is None or np.prod([len(values) for values in found], dtype=float) > _MOST_VALUES:
        return None
    columns = [as_number(column(values)) for values in zip(*product(*found), strict=True)]
    if isinstance(node, ast.BinOp):
        left, right = columns
        if isinstance(node.op, ast.FloorDiv | ast.Mod):
            left, right = left[right != 0], right[right != 0]
        return distinct(arithmetic(node.op, left, right).tolist())
    (only,) = columns
    return distinct((np.abs(only) if isinstance(node, ast.Call) else -only).tolist())
