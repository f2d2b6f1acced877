"""The section that says what should come out: published numbers and shapes, with their source.

A claim has one form: `value` (with `tolerance`), `between`, `cells` (many values at once),
`order` (which places are largest), or `exceeds` (one place above another).
"""

from __future__ import annotations

import math
import re
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Discriminator, Field, Tag, model_validator

from interv.spec.base import Section, wrong
from interv.spec.conditions import goes_with

TableName = Literal["summary", "results", "decomposition", "scores", "nodes", "curve"]
_NUMBERED = ("layer", "window", "pos", "head", "neuron", "rank", "seed")
_FORMS = ("value", "between", "cells", "order", "exceeds")
_RANGE = re.compile(r"\d+(-\d+)?")


def _check_where(where: dict[str, Any]) -> dict[str, Any]:
    for column in _NUMBERED:
        wanted = where.get(column)
        if isinstance(wanted, str) and not _RANGE.fullmatch(wanted):
            raise wrong(f"where.{column}: {wanted!r}", "a number, or a range like 8-11")
    return where


Where = Annotated[dict[str, str | int | None], AfterValidator(_check_where)]


def is_number(value: object, least: float = -math.inf) -> bool:
    """Whether a value is a finite number, and no less than `least`."""
    return isinstance(value, int | float) and math.isfinite(value) and value >= least


class Source(Section):
    """Where a reference's numbers are from."""

    paper: str = Field(min_length=1, description="authors and year, arXiv number, or a notebook")
    figure: str | int | None = Field(None, description="figure or table in it")
    page: int | None = Field(None, ge=1)
    read: str | None = Field(None, description="how the value was read, and how exactly")

    def __str__(self) -> str:
        parts = [self.paper]
        if self.figure is not None:
            named = str(self.figure).lower().startswith(("fig", "table", "appendix"))
            parts.append(str(self.figure) if named else f"figure {self.figure}")
        if self.page is not None:
            parts.append(f"page {self.page}")
        return ", ".join(parts) + (f" ({self.read})" if self.read else "")


class Claim(Section):
    """One published number, figure or shape, and how close ours must come."""

    claim: str = Field(min_length=1, description="in words, for the table")
    where: Where = Field(
        default_factory=dict,
        description="columns of the table and the values they must have; a range of layers: 8-11",
    )
    of: Literal["value", "clean", "corrupted", "effect"] = "value"
    reduce: Literal["only", "max", "min", "mean", "layer_of_max"] = "only"
    table: TableName = Field(
        "summary",
        description="which table the claim is about; results: of `train-das`, a row for each seed",
    )
    value: float | None = None
    tolerance: float | None = Field(
        None,
        ge=0,
        description="of a value, of cells, of ties",
        json_schema_extra=goes_with({"value": True}, {"cells": True}, {"order": True}),
    )
    between: Annotated[list[float], Field(min_length=2, max_length=2)] | None = None
    cells: (
        str | Annotated[list[dict[str, str | int | float | None]], Field(min_length=1)] | None
    ) = Field(
        None,
        description="a value for each of many places: a CSV file, from this file, or a list; "
        "columns of the table and `value`, and `tolerance` where cells differ in it",
    )
    share: float = Field(
        1.0,
        gt=0,
        le=1,
        description="of the cells that must hold",
        json_schema_extra=goes_with({"cells": True}),
    )
    order: Annotated[list[Where], Field(min_length=1)] | None = Field(
        None, description="the places of the largest values, largest first"
    )
    magnitude: bool = Field(
        False,
        description="order by size, whatever the sign",
        json_schema_extra=goes_with({"order": True}),
    )
    exceeds: Where | None = Field(
        None, description="another place (what differs from `where`), whose value is lower"
    )
    by: float | None = Field(
        None,
        gt=0,
        description="by how much it exceeds; unset: their intervals do not touch",
        json_schema_extra=goes_with({"exceeds": True}),
    )
    because: str | None = Field(None, min_length=1, description="why the tolerance is what it is")
    source: Annotated[
        Annotated[str, Field(min_length=1), Tag("text")] | Annotated[Source, Tag("source")],
        # Else a mistake in one form is told of both.
        Discriminator(lambda value: "text" if isinstance(value, str) else "source"),
    ] = Field(description="paper, figure, page, and how the value was read")
    on_miss: Literal["fail", "note"] = "fail"

    @property
    def form(self) -> str:
        """Which of its forms a claim has."""
        return next(form for form in _FORMS if getattr(self, form) is not None)

    @property
    def bounds(self) -> tuple[float, float]:
        """Between what a claim of one number holds."""
        if self.between is not None:
            return self.between[0], self.between[1]
        assert self.value is not None and self.tolerance is not None
        return self.value - self.tolerance, self.value + self.tolerance

    @model_validator(mode="after")
    def _one_form(self) -> Claim:
        forms = [name for name in _FORMS if getattr(self, name) is not None]
        if len(forms) != 1 or (self.value is not None and self.tolerance is None):
            raise wrong(
                " and ".join(forms) if len(forms) > 1 else "no form of comparison",
                "value with tolerance, or one of between: [low, high], cells, order, exceeds",
            )
        [form] = forms
        if self.between is not None and not self.between[0] <= self.between[1]:
            raise wrong(f"between {self.between} holds nothing", "[low, high]")
        for name in ("value", "tolerance"):
            number = getattr(self, name)
            if number is not None and not math.isfinite(number):
                raise wrong(f"{name}: {number}", "a finite number")
        if form in ("cells", "order") and self.reduce != "only":
            raise wrong(f"reduce: {self.reduce} of {form}", "no reduce: each place counts")
        if form == "exceeds" and (
            self.reduce == "layer_of_max" or (self.reduce == "mean" and self.by is None)
        ):
            raise wrong(f"reduce: {self.reduce} has no interval", "max or min, or `by: 0.1`")
        if self.exceeds is not None:
            if {**self.where, **self.exceeds} == self.where:
                raise wrong("exceeds names the place of `where`", "what differs from `where`")
            if self.by is None and self.of in ("clean", "corrupted"):
                raise wrong(f"of: {self.of} has no interval", "`by: 0.1`")
        if isinstance(self.cells, list):
            self._check_cells(self.cells)
        return self

    def _check_cells(self, cells: list[dict[str, str | int | float | None]]) -> None:
        for cell in cells:
            own = cell.get("tolerance")
            tolerance = self.tolerance if own is None else own
            if not (is_number(cell.get("value")) and is_number(tolerance, 0)):
                raise wrong(f"the cell {cell}", "a `value`, and a tolerance here or in the claim")
