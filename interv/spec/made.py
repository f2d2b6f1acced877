"""The spec's `model` section where the model is made on the spot: an MLP, a small transformer."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from interv.spec.base import Section, wrong
from interv.spec.conditions import Way, goes_with

Width = Annotated[int, Field(ge=1)]
Rate = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, le=1)]
Beta = Annotated[float, Field(ge=0, lt=1)]


_TRAINED: Way = {"model.weights": ["trained"]}


class MlpTraining(Section):
    """How an MLP learns the causal model's own labels: Adam, cross-entropy."""

    examples: int = Field(
        1_048_576,
        ge=1,
        description="drawn once, gone through `epochs` times",
        json_schema_extra=goes_with(_TRAINED),
    )
    batch: int = Field(
        1024, ge=1, description="examples in one step", json_schema_extra=goes_with(_TRAINED)
    )
    epochs: int = Field(3, ge=1, json_schema_extra=goes_with(_TRAINED))
    lr: Rate = Field(
        1.0e-3,
        description="learning rate, the same throughout",
        json_schema_extra=goes_with(_TRAINED),
    )
    seed: int | None = Field(
        None, ge=0, lt=2**32, description="of the data and of the weights; unset: the spec's seed"
    )
    min_accuracy: Share = Field(
        0.95,
        description="on fresh examples; a model that does worse is an error",
        json_schema_extra=goes_with({"model.weights": ["trained", "equality"]}),
    )


class MlpSection(Section):
    """A multi-layer perceptron on the causal model's input vectors."""

    kind: Literal["mlp"]
    hidden: list[Width] | None = Field(
        None, min_length=1, description="width of each hidden layer; unset: 16, 16, 16"
    )
    inputs: int | None = Field(None, ge=1, description="unset: the causal model's input vectors")
    outputs: int | None = Field(None, ge=2, description="unset: the values of its output")
    activation: Literal["relu", "tanh", "gelu"] = "relu"
    weights: Literal["trained", "random", "equality"] = Field(
        "trained",
        description="`random`: as they are before training; `equality`: the hand-set network that "
        "answers (w = x) = (y = z), its first layer `inputs` wide",
    )
    train: MlpTraining = MlpTraining()
    dtype: Literal["float32", "float64"] = "float32"

    @model_validator(mode="after")
    def _fits(self) -> MlpSection:
        if self.weights != "equality":
            return self
        widths = self.hidden or [self.inputs or 8] * 2
        if self.activation != "relu":
            raise wrong(f"weights: equality with {self.activation}", "activation: relu")
        if self.outputs not in (None, 2):
            raise wrong(f"weights: equality with {self.outputs} outputs", "outputs: 2")
        if self.inputs is not None and self.inputs % 4:
            raise wrong(
                f"weights: equality with {self.inputs} inputs", "four vectors of the same width"
            )
        if len(widths) != 2 or widths[0] != widths[1] or self.inputs not in (None, widths[0]):
            raise wrong(
                f"weights: equality with hidden {self.hidden} and inputs {self.inputs or 'unset'}",
                "two hidden layers, each as wide as the inputs (8 for 2-d vectors)",
            )
        return self


class TransformerTraining(Section):
    """How a small transformer learns to say the causal model's answer after its prompts."""

    examples: int = Field(20_000, ge=1, description="prompts drawn once, taken in random order")
    batch: int = Field(256, ge=1, description="prompts in one step")
    steps: int = Field(600, ge=1)
    lr: Rate = Field(
        2.0e-3, description="the highest learning rate: it rises for `warmup` steps and falls to 0"
    )
    betas: Annotated[list[Beta], Field(min_length=2, max_length=2)] = Field(
        [0.9, 0.98], description="of AdamW"
    )
    weight_decay: float = Field(0.01, ge=0, allow_inf_nan=False)
    warmup: int = Field(50, ge=0, description="steps in which the learning rate rises from 0")
    seed: int | None = Field(
        None, ge=0, lt=2**32, description="of the prompts and of the weights; unset: the spec's"
    )
    min_accuracy: Share = Field(
        0.95, description="share of fresh prompts whose top answer is right; worse is an error"
    )


class TransformerSection(Section):
    """A small transformer with a word-level tokenizer of its own, trained on the task."""

    kind: Literal["transformer"]
    config: dict[str, Any] = Field(
        description="a config.json as a mapping, its model_type first of all; `vocab_size` is "
        "filled in from the task's words"
    )
    train: TransformerTraining = TransformerTraining()
    dtype: Literal["float32", "float64"] = "float32"

    @model_validator(mode="after")
    def _has_type(self) -> TransformerSection:
        if not isinstance(self.config.get("model_type"), str):
            raise wrong("model.config has no model_type", "model_type: gpt2, llama, ...")
        return self
