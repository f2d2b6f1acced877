"""What a patch spec may ask for beside its grid: attribution, decomposition, a circuit."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from interv.spec.base import Section, wrong

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
    steps: int = Field(5, ge=1, le=1000, description="of the integrated forms")
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
    steps: int = Field(5, ge=1, le=1000, description="of the integrated form")
    quadrature: Literal["riemann", "midpoint"] = Field(
        "riemann",
        description="of the integrated form. riemann: k / steps of the way from what is carried, "
        "k = 0 ... steps - 1, as the code of its authors; midpoint: (k + 1/2) / steps",
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
    def _only_what_applies(self) -> Circuit:
        given = sorted({"steps", "quadrature"} & self.model_fields_set)
        if self.method == "eap" and given:
            raise wrong(f"{given[0]} with method: eap", "eap_ig_inputs, or no " + given[0])
        return self

    @model_validator(mode="after")
    def _rising(self) -> Circuit:
        if sorted(set(self.fractions)) != self.fractions:
            raise wrong("the fractions do not rise", "each larger than the one before")
        return self
