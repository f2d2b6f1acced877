"""What a patch spec has beside its grid: attribution, decomposition, circuit, statistics."""

from __future__ import annotations

from math import ceil
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from interv.spec.base import Section, wrong
from interv.spec.conditions import goes_with
from interv.spec.run import FiguresSection

FRACTIONS = [0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0]
"""The shares of edges at which MIB evaluates a circuit (arXiv 2504.13151)."""


def _check_number(value: Any) -> Any:
    number = isinstance(value, int) and not isinstance(value, bool) and value >= 0
    if not number and value != "all":
        raise wrong(f"{value!r} is no number of places", "0 or more, or all")
    return value


class Attribution(Section):
    """Gradients instead of patches, for a whole grid at once; the top of it checked exactly."""

    method: Literal["gradient", "integrated_inputs", "integrated_activations"] = Field(
        "gradient",
        description="gradient: attribution patching, a backward pass for all of it; "
        "integrated_...: gradients averaged on the way of the inputs, or of each activation",
    )
    steps: int = Field(
        5,
        ge=1,
        le=1000,
        description="of the integrated forms",
        json_schema_extra=goes_with({"method": ["integrated_*"]}),
    )
    verify: Annotated[int | Literal["all"], BeforeValidator(_check_number)] = Field(
        20, description="places patched exactly, the top ones"
    )


class Decompose(Section):
    """Direct logit attribution of every part, and the logit lens, of the clean prompts."""

    heads: bool = True
    lens: bool = True
    unembedding: Literal["raw", "centred"] = Field(
        "raw",
        description="of a logit that is compared with none. raw: the logit itself; centred: less "
        "the mean over the vocabulary, as TransformerLens has it",
    )


class Choice(Section):
    """Which edges, or nodes, are the circuit: one way to say so."""

    top: int | None = Field(None, ge=1, description="so many, by the size of their score")
    share: float | None = Field(None, gt=0, le=1, description="of all")
    threshold: float | None = Field(None, ge=0, description="scores of at least this size")

    @model_validator(mode="after")
    def _one(self) -> Choice:
        if sum(v is not None for v in (self.top, self.share, self.threshold)) != 1:
            raise wrong("no one choice", "exactly one of top, share, threshold")
        return self


class Circuit(Section):
    """Edge attribution over heads and MLPs, a circuit chosen by it, and how faithful it is.

    In the clean run. Edges outside the circuit carry what the intervention puts there: the
    corrupted run's (noise and denoise alike), zeros, means, or other prompts'.
    """

    level: Literal["edges", "nodes"] = "edges"
    method: Literal["eap", "eap_ig_inputs"] = "eap_ig_inputs"
    steps: int = Field(
        5,
        ge=1,
        le=1000,
        description="of the integrated form",
        json_schema_extra=goes_with({"method": ["eap_ig_inputs"]}),
    )
    quadrature: Literal["riemann", "midpoint"] = Field(
        "riemann",
        description="of the integrated form. riemann: k / steps of the way from what is carried, "
        "k = 0 ... steps - 1, as the code of its authors; midpoint: (k + 1/2) / steps",
        json_schema_extra=goes_with({"method": ["eap_ig_inputs"]}),
    )
    choose: Choice = Choice(share=0.02)
    fractions: list[Annotated[float, Field(ge=0, le=1)]] = Field(
        FRACTIONS,
        min_length=2,
        description="of all edges, at which faithfulness is measured (MIB's)",
    )
    held_out: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="share of the distinct pairs that circuits are evaluated on, edges scored on "
        "the others; 0: both on all pairs",
    )
    knockouts: int = Field(
        0,
        ge=0,
        le=10_000,
        description="random sets of its nodes, for completeness and minimality; 0: no such scores",
    )

    @model_validator(mode="after")
    def _rising(self) -> Circuit:
        if sorted(set(self.fractions)) != self.fractions:
            raise wrong("the fractions do not rise", "each larger than the one before")
        return self


_BEYOND = 5  # resamples that should lie beyond each end of an interval


class Statistics(Section):
    """Uncertainty over prompts."""

    level: float = Field(0.95, gt=0, lt=1, description="of the intervals of means")
    resamples: int = Field(2000, ge=100, le=1_000_000, description="of their bootstrap")
    test: bool = Field(
        False, description="is an effect real? sign flips over prompts, Holm's correction"
    )
    permutations: int = Field(
        10_000,
        ge=100,
        le=10_000_000,
        description="random sign flips",
        json_schema_extra=goes_with({"test": True}),
    )

    @model_validator(mode="after")
    def _enough(self) -> Statistics:
        needed = ceil(2 * _BEYOND / (1 - self.level))
        if self.resamples < needed:
            message = (
                f"level {self.level:g} has tails that {self.resamples:,} resamples do not show"
            )
            raise wrong(message, f"resamples: {needed} or more, or a lower level")
        return self


class PatchFigures(FiguresSection):
    """Which pictures are drawn."""

    top: int = Field(20, ge=1, le=200, description="bars in a bar chart")
    patterns: list[Annotated[list[int], Field(min_length=2, max_length=2)]] = Field(
        default_factory=list, description="[layer, head] whose attention is drawn, first prompt"
    )
