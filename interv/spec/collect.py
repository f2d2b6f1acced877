"""The spec of `interv collect`: which activations of which prompts are saved."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from interv.spec.base import OR_ONE, Section, wrong
from interv.spec.conditions import goes_with
from interv.spec.run import RunSection
from interv.spec.schema import Heads, Layers, ModelSection, TextPositions


class PromptsSection(Section):
    """Texts: in the spec, or in a file."""

    prompts: list[Annotated[str, Field(min_length=1)]] | None = Field(None, min_length=1)
    file: str | None = Field(None, description="JSON, JSONL or CSV, from this file")
    column: str = Field(
        "prompt",
        description="the file's column with the text",
        json_schema_extra=goes_with({"file": True}),
    )
    limit: int | None = Field(None, ge=1, description="only the first so many")

    @model_validator(mode="after")
    def _one_origin(self) -> PromptsSection:
        if (self.prompts is None) == (self.file is None):
            raise wrong("the data has neither or both", "exactly one of prompts, file")
        return self


class CollectGrid(Section):
    """A product: components, layers, heads."""

    component: Annotated[list[str], Field(min_length=1), OR_ONE] = Field(
        description="names as `interv inspect` lists them, or a module's path and side"
    )
    layers: Layers = "all"
    heads: Heads | None = Field(None, description="of head components; unset: all")


class CollectSpec(Section):
    """Activations to a file, with an index of what each row is."""

    kind: Literal["collect"]
    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", description="folder under outputs/")
    model: ModelSection
    seed: int = Field(
        0,
        ge=0,
        lt=2**32,
        description="of random weights",
        json_schema_extra=goes_with({"model.config": True}),
    )
    data: PromptsSection
    grid: Annotated[list[CollectGrid], Field(min_length=1), OR_ONE]
    positions: TextPositions = Field("all", description="of every prompt: all, -1, 0-3, last")
    run: RunSection = RunSection()
