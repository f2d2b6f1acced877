"""The spec of `interv patch`: pairs of prompts, a grid of sites, paths, attribution, circuits."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    Discriminator,
    Field,
    Tag,
    WithJsonSchema,
    model_validator,
)

from interv.spec import axes
from interv.spec.base import OR_ONE, Section, wrong
from interv.spec.claims import Claim
from interv.spec.conditions import Way, goes_with
from interv.spec.patch_parts import Attribution, Circuit, Decompose, PatchFigures, Statistics
from interv.spec.run import RunSection
from interv.spec.schema import Heads, Layers, ModelSection

WHOLE = "whole"
SPANS = "spans"
PROMPT = "prompt"


def _check_places(value: Any) -> Any:
    try:
        axes.check(value, None, negative=True)
    except axes.AxisError as error:
        raise wrong(str(error), error.expected) from None
    return value


_PLACE = {"anyOf": [{"type": "integer"}, {"type": "string"}]}
Places = Annotated[
    Any,
    AfterValidator(_check_places),
    WithJsonSchema({"anyOf": [*_PLACE["anyOf"], {"type": "array", "items": _PLACE}]}),
]
"""Positions: as everywhere, names of spans, or all at once: `whole` (every position that the model
sees, what is given of an answer included) or `prompt` (without the answer)."""


class PairText(Section):
    """A prompt, its counterfactual, and the answers to tell apart."""

    clean: str = Field(min_length=1)
    corrupted: str | None = Field(None, min_length=1, description="not needed by zero and mean")
    answer: str | list[str] = Field(description="what follows the clean prompt; one or several")
    wrong: str | list[str] = Field(
        default_factory=list, description="what it is compared with; one or several"
    )
    spans: dict[str, str] = Field(
        default_factory=dict,
        description="names of places, each the text there; `Mary@2`: its second occurrence",
    )
    template: str = Field("", description="prompts that mean ablation averages over together")


_FROM_OTHERS: Way = {"intervention.type": ["mean", "resample"]}
_WHERE: Way = {"component": True}


class PairColumns(Section):
    """Names of the columns in a data file."""

    clean: str = "clean"
    corrupted: str = "corrupted"
    answer: str = "answer"
    wrong: str = "wrong"
    template: str = Field("template", json_schema_extra=goes_with(_FROM_OTHERS))
    spans: list[str] = Field(default_factory=list, description="columns that are spans")


Task = Literal[
    "ioi", "greater_than", "docstring", "gendered_pronouns", "capitals", "multiple_choice"
]


class PairsSection(Section):
    """Pairs of prompts: made by a task, in the spec, or in a file."""

    task: Task | None = Field(None, description="a built-in task, its words single tokens")
    n: int = Field(
        64,
        ge=1,
        le=100_000,
        description="pairs that a task makes",
        json_schema_extra=goes_with({"task": True}),
    )
    counterfactual: str | None = Field(
        None,
        description="of a task; unset: its first",
        json_schema_extra=goes_with({"task": True}),
    )
    templates: list[Annotated[str, Field(min_length=1)]] | None = Field(
        None,
        min_length=1,
        description="of a task, in your own words",
        json_schema_extra=goes_with({"task": True}),
    )
    pairs: list[PairText] | None = Field(None, min_length=1)
    file: str | None = Field(None, description="JSON, JSONL or CSV, from this file")
    columns: PairColumns = Field(PairColumns(), json_schema_extra=goes_with({"file": True}))
    limit: int | None = Field(
        None,
        ge=1,
        description="only the first so many of a file",
        json_schema_extra=goes_with({"file": True}),
    )
    keep: Literal["all", "correct", "preferred"] = Field(
        "all",
        description="`correct`: the model's top tokens are one of the answers; `preferred`: one "
        "is above every wrong one",
    )
    unequal: Literal["error", "leave_out"] = Field(
        "error", description="what to do with pairs of unequal token length"
    )
    join: str | None = Field(
        None,
        description="goes before an answer that does not start with a space; unset: a space, "
        "or nothing after a chat template",
    )
    at: int | str | None = Field(
        None,
        description="position or span where the answer is predicted; unset: END, the last token "
        "of the text, or MASK in a masked language model",
    )

    @model_validator(mode="after")
    def _one_origin(self) -> PairsSection:
        given = [k for k in ("task", "pairs", "file") if getattr(self, k) is not None]
        if len(given) != 1:
            found = " and ".join(given) or "no origin"
            raise wrong(f"the data has {found}", "exactly one of task, pairs, file")
        return self


class Intervention(Section):
    """What stands at a site instead, and in which run. A bare string is a `type`."""

    bare = ("type",)

    type: Literal["denoise", "noise", "zero", "mean", "resample"] = Field(
        description="denoise: clean into corrupted; noise: corrupted into clean; the others "
        "ablate in the clean run"
    )
    over: Literal["corrupted", "clean"] = Field(
        "corrupted",
        description="prompts that mean and resample take activations from",
        json_schema_extra=goes_with({"type": ["mean", "resample"]}),
    )
    samples: int = Field(
        3,
        ge=1,
        le=1000,
        description="prompts that resample draws for each pair",
        json_schema_extra=goes_with({"type": ["resample"]}),
    )
    least: int = Field(
        5,
        ge=2,
        description="prompts that a mean is over, at least",
        json_schema_extra=goes_with({"type": ["mean"]}),
    )
    trained: str | None = Field(
        None,
        description="folder of a trained intervention: only what it exchanges is exchanged, from "
        "this file",
        json_schema_extra=goes_with({"type": ["denoise", "noise", "resample"]}),
    )

    @model_validator(mode="before")
    @classmethod
    def _bare(cls, value: Any) -> Any:
        return {"type": value} if isinstance(value, str) else value

    @property
    def fewest(self) -> int:
        """Prompts that an ablation needs to take activations from."""
        return {"mean": self.least, "resample": self.samples}.get(self.type, 0)


class SiteText(Section):
    """Units of a component: one of a set's sites."""

    component: str
    layers: Layers = "all"
    positions: Places = WHOLE
    heads: Heads | None = Field(None, description="of head components; unset: all")
    dims: Layers | None = Field(None, description="columns; of each head, where heads are given")


class PatchGrid(Section):
    """A product of axes, each point a patch; or a named set of sites, all patched at once."""

    component: Annotated[list[str], Field(min_length=1), OR_ONE] | None = Field(
        None, description="names as `interv inspect` lists them"
    )
    layers: Layers = Field("all", json_schema_extra=goes_with(_WHERE))
    window: int = Field(
        1,
        ge=1,
        description="layers patched together: [l - w//2, l + ceil(w/2))",
        json_schema_extra=goes_with(_WHERE),
    )
    positions: Places = Field(
        "all",
        description="each one a patch; names of spans; `whole`: all that the model sees at once; "
        "`prompt`: these without the answer",
        json_schema_extra=goes_with(_WHERE),
    )
    heads: Heads | None = Field(
        None,
        description="each one a patch; unset: all, one by one",
        json_schema_extra=goes_with(_WHERE),
    )
    neurons: Layers | None = Field(
        None, description="columns, each one a patch", json_schema_extra=goes_with(_WHERE)
    )
    dims: Layers | None = Field(
        None,
        description="columns patched together: a subspace",
        json_schema_extra=goes_with(_WHERE),
    )
    set: list[SiteText] | None = Field(None, min_length=1, description="patched at once")
    name: str = Field("", description="of a set")

    @model_validator(mode="after")
    def _one_form(self) -> PatchGrid:
        if (self.component is None) == (self.set is None):
            raise wrong("the grid has neither or both", "exactly one of component, set")
        if self.set is not None and not self.name:
            raise wrong("a set without a name", "name: and a word for it")
        if self.neurons is not None and self.dims is not None:
            raise wrong("neurons and dims", "one of them")
        return self


class ReceiverSite(Section):
    """Inputs of heads or of MLPs: one of a joint receiver's sites."""

    component: Literal["head_query_output", "head_key_output", "head_value_output", "mlp_input"]
    layers: Layers
    heads: Heads | None = None
    positions: Places = WHOLE


_ALONE: Way = {"set": False}


class Receiver(Section):
    """Where a path ends: inputs of heads or MLPs, each a point; or a named set, all at once."""

    component: (
        Literal["head_query_output", "head_key_output", "head_value_output", "mlp_input"] | None
    ) = Field(None, json_schema_extra=goes_with(_ALONE))
    layers: Layers | None = Field(None, json_schema_extra=goes_with(_ALONE))
    heads: Heads | None = Field(None, json_schema_extra=goes_with(_ALONE))
    positions: Places = Field(WHOLE, json_schema_extra=goes_with(_ALONE))
    set: list[ReceiverSite] | None = Field(
        None,
        min_length=1,
        description="sites that are one receiver, all at once: any heads of any layers",
    )
    name: str = Field("", description="makes it one receiver: all of it at once")

    @model_validator(mode="after")
    def _one_form(self) -> Receiver:
        if self.set is None and (self.component is None or self.layers is None):
            raise wrong("a receiver without component and layers", "both, or a set of sites")
        if self.set is not None and not self.name:
            raise wrong("a set without a name", "name: and a word for it")
        return self

    @property
    def sites(self) -> list[ReceiverSite]:
        """What it is made of."""
        if self.set is not None:
            return self.set
        given = self.model_dump(include={"component", "layers", "heads", "positions"})
        return [ReceiverSite.model_validate(given)]


_SENDERS = ("head_attention_value_output", "mlp_output")


def _check_sender(sender: PatchGrid) -> PatchGrid:
    for component in sender.component or ():
        if component not in _SENDERS:
            raise wrong(f"{component} sends nothing", " or ".join(_SENDERS))
    if sender.set is not None or sender.window != 1:
        raise wrong("a sender is one head or one MLP", "no set and no window")
    return sender


class PathGrid(Section):
    """Senders × receivers (Wang et al. 2022; Goldowsky-Dill et al. 2023)."""

    senders: Annotated[
        list[Annotated[PatchGrid, AfterValidator(_check_sender)]], Field(min_length=1), OR_ONE
    ] = Field(description="heads and MLPs")
    receivers: Annotated[
        list[
            Annotated[
                Annotated[Literal["logits"], Tag("logits")] | Annotated[Receiver, Tag("heads")],
                # Else a mistake in one form is told of both.
                Discriminator(lambda value: "logits" if isinstance(value, str) else "heads"),
            ]
        ],
        Field(min_length=1),
        OR_ONE,
    ]
    freeze: Annotated[list[Literal["heads", "mlps"]], OR_ONE] = Field(
        ["heads"],
        description="what between sender and receiver stays as in the base run; the rest is "
        "computed again",
    )


class PatchSpec(Section):
    """Activation patching: states of one run put into another, site by site or path by path."""

    kind: Literal["patch"]
    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", description="folder under outputs/")
    model: ModelSection
    seed: int = Field(0, ge=0, lt=2**32)
    data: PairsSection
    intervention: Intervention = Field(
        Intervention(type="denoise"),
        json_schema_extra=goes_with({"grid": True}, {"paths": True}, {"circuit": True}),
    )
    grid: Annotated[list[PatchGrid], OR_ONE] = Field(default_factory=list)
    paths: Annotated[list[PathGrid], OR_ONE] = Field(default_factory=list)
    attribution: Attribution | None = None
    decompose: Decompose | None = None
    circuit: Circuit | None = None
    metric: Annotated[list[str], Field(min_length=1), OR_ONE] = Field(["logit_difference"])
    statistics: Statistics = Statistics()
    figures: PatchFigures = PatchFigures()
    reference: list[Claim] = Field(default_factory=list)
    run: RunSection = RunSection()

    @model_validator(mode="before")
    @classmethod
    def _bare_decompose(cls, value: Any) -> Any:
        if isinstance(value, dict) and value.get("decompose") is True:
            value = {**value, "decompose": {}}
        return value

    @model_validator(mode="after")
    def _something(self) -> PatchSpec:
        if not (self.grid or self.paths or self.decompose or self.circuit):
            raise wrong("nothing is asked for", "grid, paths, decompose or circuit")
        if self.attribution and not self.grid:
            raise wrong("attribution without a grid", "grid: of what is attributed to")
        if self.intervention.trained and (self.attribution or self.circuit or self.paths):
            raise wrong("a trained intervention off the grid", "grid, and no other part")
        if self.attribution and self.intervention.type == "resample":
            raise wrong("attribution of resample", "denoise, noise, zero or mean")
        twice = sorted({m for m in self.metric if self.metric.count(m) > 1})
        if twice:
            raise wrong(f"metric {twice[0]} is there twice", "each metric once")
        return self
