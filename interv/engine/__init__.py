"""Models that run, and the executors that intervene on them. Needs torch."""

from interv.engine.interventions import (
    Addition,
    Collect,
    Intervention,
    Noise,
    Subtraction,
    Vanilla,
    Zero,
)
from interv.engine.load import LoadedModel, load_model
from interv.engine.reference import ReferenceExecutor
from interv.engine.runs import Edit, Executor, Run, Site
from interv.engine.suffix import SuffixExecutor

__all__ = [
    "Addition",
    "Collect",
    "Edit",
    "Executor",
    "Intervention",
    "LoadedModel",
    "Noise",
    "ReferenceExecutor",
    "Run",
    "Site",
    "Subtraction",
    "SuffixExecutor",
    "Vanilla",
    "Zero",
    "load_model",
]
