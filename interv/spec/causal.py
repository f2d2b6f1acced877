"""The section that declares a causal model: variables, functions, prompts, answers."""

from __future__ import annotations

import keyword
import re
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    Field,
    StrictBool,
    StrictFloat,
    StrictInt,
    StrictStr,
    model_validator,
)

from interv.spec.base import OR_ONE, Section, wrong
from interv.spec.conditions import goes_with

CausalTask = Literal[
    "hierarchical_equality",
    "boolean_tree",
    "arithmetic_tree",
    "price_tagging",
    "ioi",
    "gender",
    "capitals",
    "multiple_choice",
    "entailment",
]
"""The built-in causal models."""

FUNCTIONS = ("min", "max", "abs")
"""Functions that an expression may call."""
LARGEST = 2**53
"""Numbers up to here are exact in every form."""

_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_KINDS = ("values", "range", "vector", "one_of", "expression", "table", "function")
_VECTOR = goes_with({"vector": True})


def _check_scalar(value: Any) -> Any:
    if isinstance(value, int | float) and not isinstance(value, bool):
        if not abs(value) <= LARGEST:  # nor is .nan
            raise wrong(f"{value!r} is no usable number", "a number of at most 2**53")
    elif value == "":
        raise wrong("an empty text", "a word")
    return value


Scalar = Annotated[StrictBool | StrictInt | StrictFloat | StrictStr, AfterValidator(_check_scalar)]
Number = Annotated[StrictInt | StrictFloat, AfterValidator(_check_scalar)]


def _check_name(name: str) -> str:
    taken = keyword.iskeyword(name) or name in FUNCTIONS
    if taken or not _NAME.fullmatch(name):
        expected = "letters, digits and _, no digit first, and no word of the expressions"
        raise wrong(f"'{name}' is no name for a variable", expected)
    return name


Name = Annotated[str, AfterValidator(_check_name)]


class CausalVariable(Section):
    """One variable. A bare list is an input of these values, a bare string an expression."""

    bare = ("values", "expression")

    values: list[Scalar] | None = Field(
        None, min_length=1, description="an input: one of these, each as often"
    )
    range: Annotated[list[Number], Field(min_length=2, max_length=2)] | None = Field(
        None, description="an input: [lowest, highest], both included"
    )
    step: Number | None = Field(
        None,
        gt=0,
        description="between the numbers of a range; unset: 1",
        json_schema_extra=goes_with({"range": True}),
    )
    vector: int | None = Field(
        None, ge=1, le=65536, description="an input: an entity, a random vector of this width"
    )
    equal: str | None = Field(
        None, description="another vector, which this one may equal", json_schema_extra=_VECTOR
    )
    share: float | None = Field(
        None,
        ge=0,
        le=1,
        description="how often it does; unset: 0.5",
        json_schema_extra=goes_with({"vector": True, "equal": True}),
    )
    entities: int | None = Field(
        None,
        ge=2,
        description="how many vectors there are; unset: a fresh one each time",
        json_schema_extra=_VECTOR,
    )
    distribution: Literal["uniform", "normal"] | None = Field(
        None,
        description="of a vector's numbers; unset: uniform in [-1, 1]",
        json_schema_extra=_VECTOR,
    )
    one_of: list[str] | None = Field(
        None,
        min_length=2,
        max_length=20,
        description="an input: the value of one of these other inputs",
    )
    expression: str | None = Field(
        None, min_length=1, max_length=1000, description="over other variables: its parents"
    )
    table: dict[str, Scalar] | None = Field(
        None, min_length=1, description="its value for each value of the variable under `of`"
    )
    function: str | None = Field(None, description="a function of the plug-in file, by name")
    of: Annotated[list[str], Field(min_length=1), OR_ONE] | None = Field(
        None,
        description="whose values go into the table or the function",
        json_schema_extra=goes_with({"table": True}, {"function": True}),
    )
    decimals: int | None = Field(
        None,
        ge=0,
        le=9,
        description="as a number stands in prompts; unset: as in range or values",
        json_schema_extra=goes_with({"vector": False}),
    )

    @model_validator(mode="before")
    @classmethod
    def _bare(cls, value: Any) -> Any:
        if isinstance(value, str):
            return {"expression": value}
        return {"values": value} if isinstance(value, list) else value

    @model_validator(mode="after")
    def _one_kind(self) -> CausalVariable:
        kinds = [kind for kind in _KINDS if getattr(self, kind) is not None]
        if len(kinds) != 1:
            found = " and ".join(kinds) or "nothing that it is"
            raise wrong(f"the variable has {found}", f"exactly one of {', '.join(_KINDS)}")
        (kind,) = kinds
        if kind in ("table", "function") and self.of is None:
            raise wrong(f"a {kind} without of", "of: the variables that go in")
        if kind == "table" and len(self.of or ()) > 1:
            raise wrong(f"a table of {len(self.of or ())} variables", "one variable under of")
        if self.range is not None and self.range[0] > self.range[1]:
            raise wrong(f"the range {self.range} runs backwards", "the lower number first")
        return self


class CausalSection(Section):
    """A causal model: a built-in task, or variables with their functions.

    A bare string is a `task`.
    """

    bare = ("task",)

    task: CausalTask | None = Field(None, description="a built-in causal model")
    variables: dict[Name, CausalVariable] | None = Field(
        None, min_length=2, description="in any order"
    )
    output: str | None = Field(
        None,
        description="the variable that the model should answer with",
        json_schema_extra=goes_with({"variables": True}),
    )
    where: Annotated[list[Annotated[str, Field(min_length=1, max_length=1000)]], OR_ONE] = Field(
        default_factory=list,
        description="expressions that hold for every base and source",
        json_schema_extra=goes_with({"variables": True}),
    )
    templates: (
        Annotated[list[Annotated[str, Field(min_length=1)]], Field(min_length=1), OR_ONE] | None
    ) = Field(None, description="prompts, with {variable}s in them; none for vectors")
    answer: str | dict[str, str] | None = Field(
        None,
        description="text of the output's values: one with {output} in it, or one for each "
        "value; unset: a space and the value",
    )
    about: str = Field(
        "",
        description="what the task is, for the report",
        json_schema_extra=goes_with({"variables": True}),
    )

    @model_validator(mode="before")
    @classmethod
    def _bare(cls, value: Any) -> Any:
        return {"task": value} if isinstance(value, str) else value

    @model_validator(mode="after")
    def _one_origin(self) -> CausalSection:
        if (self.task is None) == (self.variables is None):
            raise wrong("the causal model has neither or both", "exactly one of task, variables")
        if self.task is None and self.output is None:
            raise wrong("variables without an output", "output: one of the variables")
        return self
