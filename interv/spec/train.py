"""The spec of `interv train-das`: a causal model, sites, interventions to train, controls."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Discriminator, Field, Tag, model_validator

from interv.spec.base import OR_ONE, Section, wrong
from interv.spec.causal import CausalSection
from interv.spec.claims import Claim
from interv.spec.conditions import Way, goes_with
from interv.spec.made import MlpSection, TransformerSection
from interv.spec.patch import Places
from interv.spec.run import FiguresSection, RunSection
from interv.spec.schema import Heads, Layers, ModelSection, distinct

ROTATED = (
    "rotated_space",
    "low_rank_rotated_space",
    "boundless_rotated_space",
    "sigmoid_mask_rotated_space",
)
"""Types with a rotation that is trained."""
RANKED = ("rotated_space", "low_rank_rotated_space", "pca_rotated_space", "lora")
"""Types that exchange a number of dimensions, or adapt with so many."""
TEMPERED = ("boundless_rotated_space", "sigmoid_mask", "sigmoid_mask_rotated_space")
UNTRAINED = ("vanilla", "pca_rotated_space")
"""Types without parameters to train: they are evaluated. So is a given autoencoder."""

_TRAINED: tuple[Way, ...] = (
    {"train.what": ["model"]},
    {"intervention.type": ["rotated_space", "low_rank_*", "boundless_*", "sigmoid_*", "lora"]},
    {"intervention.type": ["autoencoder"], "intervention.dictionary.path": False},
    {"intervention.type": ["autoencoder"], "intervention.train_dictionary": True},
)
_INTERVENTION: Way = {"train.what": ["intervention"]}
_MODEL: Way = {"what": ["model"]}
_WHERE: Way = {"component": True}

TypeName = Literal[
    "vanilla",
    "rotated_space",
    "low_rank_rotated_space",
    "boundless_rotated_space",
    "sigmoid_mask",
    "sigmoid_mask_rotated_space",
    "pca_rotated_space",
    "autoencoder",
    "lora",
]
Finite = Annotated[float, Field(allow_inf_nan=False)]
Metric = Literal["iia", "iia_full", "iia_random", "iia_shuffled"]


def _kind_of(value: Any) -> str:
    kind = value.get("kind") if isinstance(value, dict) else getattr(value, "kind", None)
    return kind if kind in ("mlp", "transformer") else "pretrained"


AnyModel = Annotated[
    Annotated[ModelSection, Tag("pretrained")]
    | Annotated[MlpSection, Tag("mlp")]
    | Annotated[TransformerSection, Tag("transformer")],
    Discriminator(_kind_of),
]


def part_of(text: str, variables: Sequence[str]) -> str:
    """A part of a mixture, `a+b`: its names in the variables' order, as results have them."""
    names = [name.strip() for name in text.split("+")]
    known = [name for name in variables if name in names]
    return "+".join(known if len(known) == len(names) else names)


def _check_size(n: int) -> int:
    if n > 100_000_000:
        raise wrong(f"{n} pairs", "at most 100000000")
    return n


Size = Annotated[int, AfterValidator(_check_size)]


class TrainData(Section):
    """Pairs of a base and its sources, with counterfactual labels from the causal model."""

    train: int = Field(512, ge=1, le=100_000_000, description="pairs to train on")
    validation: Size = Field(128, ge=1, description="pairs for early stopping and the curve")
    test: Size = Field(
        256,
        ge=1,
        description="held-out pairs, each once, from which every IIA is; fewer where there are "
        "too few distinct ones",
    )
    changed: float | None = Field(
        None, ge=0, le=1, description="share of pairs whose label the interchange changes"
    )
    balance: bool = Field(False, description="each counterfactual label as often")
    mixture: dict[str, Annotated[Finite, Field(gt=0)]] | None = Field(
        None, description="which variables are exchanged together, and how often: {a: 1, a+b: 2}"
    )
    same_template: bool = Field(True, description="base and sources are of one template")
    held_out: Literal["pairs", "values"] = Field(
        "pairs",
        description="what no two of train, validation and test share: `pairs` of base and source, "
        "or `values` of the exchanged variables, too",
    )
    keep: Literal["correct", "all"] = Field(
        "correct", description="`correct`: pairs whose base and sources the model answers rightly"
    )
    min_accuracy: float = Field(
        0.5, ge=0, le=1, description="of the model itself on the task; below it nothing is trained"
    )
    among: Literal["vocabulary", "answers"] = Field(
        "vocabulary", description="what an answer must be on top of, and what the loss is over"
    )


class Dictionary(Section):
    """The autoencoder whose latents are exchanged."""

    path: str | None = Field(
        None,
        description="safetensors with encoder [width, latent], encoder_bias, decoder "
        "[latent, width], decoder_bias, and of a JumpReLU autoencoder threshold [latent]; it is "
        "not trained; unset: one of `latents` is trained with the exchange",
    )
    latents: int = Field(
        256,
        ge=1,
        description="of one that is trained with the exchange",
        json_schema_extra=goes_with({"path": False}),
    )
    error_term: bool = Field(True, description="what the reconstruction misses stays as it is")


class TrainedType(Section):
    """What is trained at each place. A bare string is a `type`."""

    bare = ("type",)

    type: Annotated[list[TypeName], Field(min_length=1), OR_ONE] = Field(
        description="one, or several to compare"
    )
    rank: Annotated[list[Annotated[int, Field(ge=1)]], Field(min_length=1), OR_ONE] = Field(
        [1],
        description="dimensions of each variable; one, or several to compare",
        json_schema_extra=goes_with({"type": list(RANKED)}),
    )
    temperature: Annotated[
        list[Annotated[Finite, Field(gt=0)]], Field(min_length=2, max_length=2)
    ] = Field(
        [50.0, 0.1],
        description="of masks and boundaries: first and last",
        json_schema_extra=goes_with({"type": list(TEMPERED)}),
    )
    penalty: Finite = Field(
        0.0,
        ge=0,
        description="times the sum of all boundaries, or of the shares of all masks that are open, "
        "added to the loss; boundless DAS has 1",
        json_schema_extra=goes_with({"type": list(TEMPERED)}),
    )
    start: Literal["random", "pca"] = Field(
        "random",
        description="of a rotation's columns",
        json_schema_extra=goes_with({"type": list(ROTATED)}),
    )
    by_head: bool = Field(
        False,
        description="one gate for each head",
        json_schema_extra=goes_with({"type": ["sigmoid_mask"]}),
    )
    alpha: Finite = Field(
        1.0,
        gt=0,
        description="strength of an adapter",
        json_schema_extra=goes_with({"type": ["lora"]}),
    )
    dictionary: Dictionary = Field(
        Dictionary(), json_schema_extra=goes_with({"type": ["autoencoder"]})
    )
    train_dictionary: bool = Field(
        False,
        description="train the autoencoder of `dictionary.path` further, by the exchange",
        json_schema_extra=goes_with({"type": ["autoencoder"], "dictionary.path": True}),
    )

    def trains(self, kind: str) -> bool:
        """Whether a type has parameters that are trained; else it is evaluated as it is."""
        if kind == "autoencoder":
            return self.dictionary.path is None or self.train_dictionary
        return kind not in UNTRAINED

    @model_validator(mode="before")
    @classmethod
    def _bare(cls, value: Any) -> Any:
        return {"type": value} if isinstance(value, str | list) else value


class TrainSite(Section):
    """One site of a set."""

    component: str
    layer: int = Field(0, ge=0)
    position: int | str | None = Field(None, description="a span or an index; unset: all")
    heads: Heads | None = None
    dims: Layers | None = Field(None, description="columns; of each head where heads are given")
    variable: str | None = Field(None, description="the variable that stands here; unset: all")


class TrainGrid(Section):
    """A product of axes, each point a fit; or a set of sites, of which all are one fit."""

    component: Annotated[list[str], Field(min_length=1), OR_ONE] | None = Field(
        None, description="names as `interv inspect` lists them"
    )
    layers: Layers = Field("all", json_schema_extra=goes_with(_WHERE))
    positions: Places = Field(
        "END",
        description="spans or indices, each a fit; `whole`: all",
        json_schema_extra=goes_with(_WHERE),
    )
    heads: Heads | None = Field(
        None,
        description="these heads' columns together; unset: all",
        json_schema_extra=goes_with(_WHERE),
    )
    dims: Layers | None = Field(
        None, description="only these columns", json_schema_extra=goes_with(_WHERE)
    )
    together: bool = Field(
        False,
        description="all layers and positions are one fit",
        json_schema_extra=goes_with(_WHERE),
    )
    set: list[TrainSite] | None = Field(None, min_length=1, description="one fit of several sites")
    linked: bool = Field(
        False,
        description="sites of one fit share their parameters",
        json_schema_extra=goes_with({"set": True}, {"together": True}),
    )
    name: str = Field("", description="of a fit of several sites")

    @model_validator(mode="after")
    def _one_form(self) -> TrainGrid:
        if (self.component is None) == (self.set is None):
            raise wrong("the grid has neither or both", "exactly one of component, set")
        several = self.set is not None or self.together
        if several and not self.name:
            raise wrong("a fit of several sites without a name", "name: and a word for it")
        return self


def _check_rate(rate: float) -> float:
    if rate > 1e30:  # what a step makes of it leaves float32
        raise wrong(f"a rate of {rate:g}", "at most 1e30")
    return rate


Rate = Annotated[Finite, AfterValidator(_check_rate)]


class Training(Section):
    """How each fit is trained."""

    what: Literal["intervention", "model"] = Field(
        "intervention", description="`model`: interchange intervention training of the model itself"
    )
    epochs: int = Field(3, ge=1, le=100_000)
    batch: int = Field(16, ge=1, description="pairs in one step")
    accumulate: int = Field(1, ge=1, description="batches whose gradients make one step")
    optimizer: Literal["adam", "adamw"] = "adam"
    lr: Rate = Field(1e-3, gt=0)
    boundary_lr: Rate | None = Field(
        None,
        gt=0,
        description="of boundaries; unset: as `lr`",
        json_schema_extra=goes_with({"intervention.type": ["boundless_rotated_space"]}),
    )
    weight_decay: Finite = Field(0.0, ge=0)
    schedule: Literal["constant", "linear", "cosine"] = Field(
        "linear", description="of the learning rate, from its top to 0"
    )
    warmup: float = Field(0.0, ge=0, lt=1, description="share of the steps before the top")
    clip: Finite | None = Field(None, gt=0, description="largest norm of the gradient")
    patience: int | None = Field(
        None, ge=1, description="epochs without a better validation IIA before it stops"
    )
    keep: Literal["last", "best"] = Field(
        "last", description="`best`: of the epochs, by validation"
    )
    seeds: Annotated[list[Annotated[int, Field(ge=0, lt=2**31)]], Field(min_length=1), OR_ONE] = (
        Field([0], description="each a fit of its own; the results have their spread")
    )
    task_weight: Finite = Field(
        0.0,
        ge=0,
        description="of the loss on the bases themselves",
        json_schema_extra=goes_with(_MODEL),
    )
    exchange: list[str] | None = Field(
        None,
        description="which parts of the mixture the model learns, as `a` or `a+b`; unset: all",
        json_schema_extra=goes_with(_MODEL),
    )
    autocast: Literal["bfloat16"] | None = Field(
        None,
        description="mixed precision",
        json_schema_extra=goes_with({**_INTERVENTION, "run.device": ["auto", "cuda*"]}),
    )
    checkpointing: bool = Field(
        False,
        description="blocks keep only what enters them and run again in the backward pass: less "
        "memory, about a third more time; the same results",
    )


class Controls(Section):
    """What a trained intervention is compared with."""

    full: bool = Field(True, description="the whole vector exchanged")
    random: bool = Field(
        True,
        description="a random subspace of the same size",
        json_schema_extra=goes_with({"intervention.type": ["[!v]*"]}),
    )
    shuffled: bool = Field(
        True,
        description="trained on shuffled labels, with the first seed",
        json_schema_extra=goes_with(*_TRAINED),
    )


def _check_variables(names: list[str]) -> list[str]:
    twice = sorted({n for n in names if names.count(n) > 1})
    if twice:
        raise wrong(f"variable {twice[0]} is there twice", "each variable once")
    return names


class TrainSpec(Section):
    """Distributed alignment search: where in the model a variable of the causal model lives."""

    kind: Literal["train-das"]
    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", description="folder under outputs/")
    model: AnyModel
    seed: int = Field(0, ge=0, lt=2**32)
    causal_model: CausalSection
    variables: Annotated[
        list[str], Field(min_length=1), AfterValidator(_check_variables), OR_ONE
    ] = Field(description="of the causal model: what is exchanged; several in parts of one basis")
    data: TrainData = TrainData()
    intervention: TrainedType = TrainedType(type=["low_rank_rotated_space"])
    grid: Annotated[list[TrainGrid], Field(min_length=1), OR_ONE]
    train: Training = Field(Training(), json_schema_extra=goes_with(*_TRAINED))
    controls: Controls = Field(Controls(), json_schema_extra=goes_with(_INTERVENTION))
    metric: Annotated[list[Metric], Field(min_length=1), AfterValidator(distinct), OR_ONE] = Field(
        ["iia"],
        description="interchange intervention accuracy; what claims are about, first of all",
    )
    figures: FiguresSection = FiguresSection()
    reference: list[Claim] = Field(default_factory=list)
    run: RunSection = RunSection()

    @model_validator(mode="after")
    def _fits(self) -> TrainSpec:
        types = self.intervention.type
        if self.train.what == "model" and types != ["vanilla"]:
            raise wrong("a model trained under a trained intervention", "intervention: vanilla")
        known = set(self.variables)
        for grid in self.grid:
            for site in grid.set or ():
                if site.variable is not None and site.variable not in known:
                    raise wrong(
                        f"a site of variable '{site.variable}'",
                        f"one of {', '.join(self.variables)}",
                    )
        return self
