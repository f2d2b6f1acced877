"""Models that run, and the executors that intervene on them. Needs torch."""

from interv.engine.adapters import Lora
from interv.engine.constants import Constant, Mean, ProjectOut, Replace
from interv.engine.decompose import logit_attributions, logit_lens
from interv.engine.dictionaries import Autoencoder, EditLatents, JumpReLUAutoencoder
from interv.engine.edges import EdgeGraph, Parts, circuit_logits, edge_scores
from interv.engine.functions import BaseLambda, Lambda
from interv.engine.gradients import attributions
from interv.engine.interventions import (
    Addition,
    Clamp,
    Collect,
    Intervention,
    Noise,
    Scale,
    Skip,
    Subtraction,
    Vanilla,
    Zero,
)
from interv.engine.load import LoadedModel, anatomy_of, load_model
from interv.engine.masks import BoundlessRotatedSpace, SigmoidMask, SigmoidMaskRotatedSpace
from interv.engine.reference import ReferenceExecutor
from interv.engine.registry import BY_NAME
from interv.engine.rotations import LowRankRotatedSpace, PCARotatedSpace, RotatedSpace
from interv.engine.runs import Edit, Executor, Inputs, Run, Site
from interv.engine.suffix import SuffixExecutor

__all__ = [
    "BY_NAME",
    "Addition",
    "Autoencoder",
    "BaseLambda",
    "BoundlessRotatedSpace",
    "Clamp",
    "Collect",
    "Constant",
    "EdgeGraph",
    "Edit",
    "EditLatents",
    "Executor",
    "Inputs",
    "Intervention",
    "JumpReLUAutoencoder",
    "Lambda",
    "LoadedModel",
    "Lora",
    "LowRankRotatedSpace",
    "Mean",
    "Noise",
    "PCARotatedSpace",
    "Parts",
    "ProjectOut",
    "ReferenceExecutor",
    "Replace",
    "RotatedSpace",
    "Run",
    "Scale",
    "SigmoidMask",
    "SigmoidMaskRotatedSpace",
    "Site",
    "Skip",
    "Subtraction",
    "SuffixExecutor",
    "Vanilla",
    "Zero",
    "anatomy_of",
    "attributions",
    "circuit_logits",
    "edge_scores",
    "load_model",
    "logit_attributions",
    "logit_lens",
]
