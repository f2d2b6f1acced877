"""The spec as pydantic models: which sections a file may have, and what they mean.

Nothing here needs torch. Strict types: a string is never read as a number. A field's
description is what `interv schema` hands to editors.
"""

from __future__ import annotations

import os
import re
from datetime import date
from math import inf
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, WithJsonSchema, model_validator

from interv.spec import axes
from interv.spec.base import OR_ONE, Section, wrong
from interv.spec.claims import Claim
from interv.spec.conditions import goes_with
from interv.spec.run import FiguresSection, RunSection

ROLES = (
    "first_subject",
    "middle_subject",
    "last_subject",
    "first_subsequent",
    "further",
    "last",
)
"""Places that every prompt has, as in figure 2 of Meng et al. 2022 (arXiv 2202.05262)."""

LAST, MASK, CLS = "END", "MASK", "CLS"
"""Places that a prompt has without being given a span: the last token of its text, where a masked
language model fills in, and where a classifier reads. `last` in a trace is `END`."""

POSITION_NAMES = (*ROLES, "roles", "subject", MASK)

Component = Literal[
    "block_input",
    "block_output",
    "resid_mid",
    "attention_input",
    "query_output",
    "key_output",
    "value_output",
    "attention_weight",
    "attention_value_output",
    "attention_output",
    "attention_residual",
    "mlp_input",
    "mlp_gate_activation",
    "mlp_activation",
    "mlp_output",
    "mlp_residual",
    "mixer_input",
    "mixer_activation",
    "mixer_output",
]
"""Components that stand in each block, whole; `interv inspect` says which a model has."""

Metric = Literal["probability", "log_probability", "logit", "rank"]
Dtype = Literal["float32", "float64", "bfloat16", "float16"]


def _axis_check(names: tuple[str, ...], *, negative: bool) -> AfterValidator:
    def check(value: Any) -> Any:
        try:
            axes.check(value, names, negative=negative)
        except axes.AxisError as error:
            raise wrong(str(error), error.expected) from None
        return value

    return AfterValidator(check)


def _axis_schema(names: tuple[str, ...], *, negative: bool) -> WithJsonSchema:
    minimum: dict[str, Any] = {} if negative else {"minimum": 0}
    item = {
        "anyOf": [
            {"type": "integer", **minimum},
            {"enum": ["all", *names]},
            {"type": "string", "pattern": r"^\d+\s*-\s*\d+$"},
        ]
    }
    listed = {"type": "array", "items": item, "minItems": 1}
    return WithJsonSchema({"anyOf": [*item["anyOf"], listed]})


Layers = Annotated[Any, _axis_check((), negative=False), _axis_schema((), negative=False)]
Positions = Annotated[
    Any,
    _axis_check(POSITION_NAMES, negative=True),
    _axis_schema(POSITION_NAMES, negative=True),
]


Heads = Annotated[Any, _axis_check((), negative=False), _axis_schema((), negative=False)]
TextPositions = Annotated[
    Any,
    _axis_check(("last", MASK, CLS), negative=True),
    _axis_schema(("last", MASK, CLS), negative=True),
]


def bare_model(word: str) -> dict[str, str]:
    """What `model: word` stands for: a path where it looks like one, else a name."""
    local = word.startswith((".", "/", "~")) or word.endswith(".gguf")
    # `C:\models\llama`: no name on the hub has a backslash or a colon.
    local = local or "\\" in word or re.match(r"[A-Za-z]:", word) is not None
    return {"path" if local else "name": word}


def named_as_folder(name: str, base: Path) -> str | None:
    """Return what to say of a model's name that is a folder with a model below `base`, else None.

    Such a name means the hub's model, and transformers would load the folder.
    """
    if not os.path.isfile(base / name / "config.json"):  # noqa: PTH113  # any name at all
        return None
    return f"there is a folder of the name '{name}'; did you mean ./{name}?"


def _check_date(value: str) -> str:
    try:
        return date.fromisoformat(value).isoformat()
    except ValueError:
        raise wrong(f"{value!r} is no date", "YYYY-MM-DD") from None


class ModelSection(Section):
    """Which model, from where, in which numbers. A bare string is a `name` or a `path`."""

    name: str | None = Field(None, min_length=1, description="`smollm2-135m` or a hub name")
    revision: str | None = Field(
        None,
        description="branch, tag or commit of a hub model",
        json_schema_extra=goes_with({"name": True}),
    )
    path: str | None = Field(None, description="a local folder or GGUF file, from this file")
    config: dict[str, Any] | None = Field(
        None, description="a config.json as a mapping: random weights made from the seed"
    )
    tokenizer: str | None = Field(
        None, description="folder or tokenizer.json, where the model has none of its own"
    )
    dtype: Dtype = Field("float32", description="the numbers that the model computes in")
    attn_implementation: Literal["sdpa", "eager", "flash_attention_2"] | None = Field(
        None, description="unset: the model's own choice"
    )
    device_map: str | None = Field(None, description="as in transformers: `auto` spreads a model")
    prepend_bos: bool | None = Field(
        None,
        description="unset: the special tokens that the model's own tokenizer adds, before and "
        "behind; true: these, and the begin-of-text token first; false: none",
    )
    chat_template: bool | Annotated[str, Field(min_length=1)] = Field(
        False,
        description="wrap each prompt as a user's turn in the model's chat template, or in the "
        "one of this name",
    )
    chat_date: Annotated[str, AfterValidator(_check_date)] | None = Field(
        None,
        description="today, as YYYY-MM-DD, for a chat template that prints the date; unset: the "
        "template's own default, else 2024-07-26",
        json_schema_extra=goes_with({"chat_template": True}),
    )

    @model_validator(mode="before")
    @classmethod
    def _bare(cls, value: Any) -> Any:
        return bare_model(value) if isinstance(value, str) else value

    @model_validator(mode="after")
    def _one_origin(self) -> ModelSection:
        given = [k for k in ("name", "path", "config") if getattr(self, k) is not None]
        if len(given) != 1:
            raise wrong(
                f"the model has {' and '.join(given) or 'no origin'}",
                "exactly one of name, path, config",
            )
        return self


class Fact(Section):
    """One prompt, the subject in it, and the answer that should follow."""

    prompt: str = Field(min_length=1)
    subject: str = Field(min_length=1, description="must stand in the prompt")
    answer: str = Field(min_length=1, description="what follows the prompt")
    occurrence: int | None = Field(
        None, ge=1, description="which one, where the subject occurs more than once"
    )
    corrupted_subject: str | None = Field(
        None, min_length=1, description="stands in for the subject under corrupt.type: prompt"
    )


class FactColumns(Section):
    """Names of the columns in a data file."""

    prompt: str = "prompt"
    subject: str = "subject"
    answer: str | None = Field(None, description="unset: `answer`, or ROME's `attribute`")
    corrupted_subject: str = Field(
        "corrupted_subject", json_schema_extra=goes_with({"corrupt.type": ["prompt"]})
    )
    occurrence: str = "occurrence"


class FactsSection(Section):
    """Prompts with a subject and an answer: in the spec, or in a file of ROME's shape."""

    facts: list[Fact] | None = Field(None, min_length=1)
    file: str | None = Field(None, description="JSON, JSONL or CSV, from this file")
    columns: FactColumns = Field(FactColumns(), json_schema_extra=goes_with({"file": True}))
    limit: int | None = Field(None, ge=1, description="only the first so many facts")
    keep: Literal["correct", "all"] = Field(
        "correct", description="`correct`: only facts where the model's top answer is right"
    )
    join: str | None = Field(
        None,
        description="goes between prompt and an answer that does not start with a space; unset: "
        "a space, or nothing after a chat template",
    )

    @model_validator(mode="after")
    def _one_origin(self) -> FactsSection:
        if (self.facts is None) == (self.file is None):
            raise wrong("the data has neither or both", "exactly one of facts, file")
        return self


def _multiple(level: object) -> float | None:
    """The k of `ks`; None for anything else."""
    try:
        return float(level[:-1]) if isinstance(level, str) and level.endswith("s") else None
    except ValueError:
        return None


def _check_level(level: Any) -> Any:
    value = _multiple(level) if isinstance(level, str) else level
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < inf:
        raise wrong(f"noise level {level!r}", "a number above 0, or a multiple like 3s")
    return level


NoiseLevel = Annotated[
    Any,
    AfterValidator(_check_level),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "number", "exclusiveMinimum": 0},
                {"type": "string", "pattern": r"^[\d.]+s$"},
            ]
        }
    ),
]


class NoiseCorruption(Section):
    """Gaussian noise on the embeddings of the subject (Meng et al. 2022, section 2.1)."""

    type: Literal["noise"]
    level: NoiseLevel = Field(
        "3s",
        description="a number, or a multiple of the standard deviation of what the embedding "
        "module gives",
    )
    sigma_over: Literal["subjects", "vocabulary"] = Field(
        "subjects",
        description="which embeddings `s` is taken over: one scalar for all prompts",
        json_schema_extra=goes_with({"level": ["*s"]}),
    )
    samples: int = Field(10, ge=1, description="noise draws for each prompt")
    draw_seed: int | None = Field(
        None,
        ge=0,
        lt=2**32,
        description="numpy.random.RandomState(draw_seed) anew for each prompt, as the authors do "
        "(1); unset: from `seed` and the prompt",
    )

    @property
    def multiple(self) -> float | None:
        """The k of a level `ks`; None where the level is a plain number."""
        return _multiple(self.level)


class PromptCorruption(Section):
    """Symmetric token replacement: the subject gives way to `corrupted_subject`."""

    type: Literal["prompt"]


class TraceGrid(Section):
    """A product of axes: what is restored, in which layers, at which positions."""

    component: Annotated[list[Component], Field(min_length=1), OR_ONE]
    layers: Layers = "all"
    positions: Positions = "all"
    window: int = Field(
        1, ge=1, description="layers restored together: [l - w//2, l + ceil(w/2)), clipped"
    )
    sever: Component | None = Field(
        None,
        description="held at its corrupted value at the restored position in every layer "
        "(figure 3 of Meng et al. 2022)",
    )


def distinct(metrics: list[str]) -> list[str]:
    twice = sorted({m for m in metrics if metrics.count(m) > 1})
    if twice:
        raise wrong(f"{twice[0]} is there twice", "each metric once")
    return metrics


class Restoring(Section):
    """How much of a state is put back: unless this is said, all of it."""

    trained: str = Field(
        description="folder of a trained intervention: only what it exchanges is put back, from "
        "this file"
    )


class TraceSpec(Section):
    """Causal tracing (Meng et al. 2022): corrupt the subject, restore single states."""

    kind: Literal["trace"]
    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", description="folder under outputs/")
    model: ModelSection
    seed: int = Field(0, ge=0, lt=2**32)
    data: FactsSection
    corrupt: Annotated[NoiseCorruption | PromptCorruption, Field(discriminator="type")]
    intervention: Restoring | None = None
    grid: Annotated[list[TraceGrid], Field(min_length=1), OR_ONE]
    metric: Annotated[list[Metric], Field(min_length=1), AfterValidator(distinct), OR_ONE] = Field(
        ["probability"]
    )
    average: Literal["facts", "tokens"] = Field(
        "facts",
        description="a role with several tokens: `facts` averages a fact's own first; `tokens` "
        "takes the tokens of all facts alike, less the mean corrupted run, as the authors' code",
    )
    figures: FiguresSection = FiguresSection()
    reference: list[Claim] = Field(default_factory=list)
    run: RunSection = RunSection()
