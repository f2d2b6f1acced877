"""Every type of intervention, by its name."""

from collections.abc import Mapping

from interv.engine.adapters import Lora
from interv.engine.constants import Constant, Mean, ProjectOut, Replace
from interv.engine.dictionaries import Autoencoder, EditLatents, JumpReLUAutoencoder
from interv.engine.functions import BaseLambda, Lambda
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
from interv.engine.masks import BoundlessRotatedSpace, SigmoidMask, SigmoidMaskRotatedSpace
from interv.engine.rotations import LowRankRotatedSpace, PCARotatedSpace, RotatedSpace

BY_NAME: Mapping[str, type[Intervention]] = {
    kind.name: kind
    for kind in (
        Vanilla,
        Addition,
        Subtraction,
        Zero,
        Collect,
        Skip,
        Noise,
        Scale,
        Clamp,
        Lambda,
        BaseLambda,
        Mean,
        Replace,
        Constant,
        ProjectOut,
        RotatedSpace,
        LowRankRotatedSpace,
        BoundlessRotatedSpace,
        SigmoidMask,
        SigmoidMaskRotatedSpace,
        PCARotatedSpace,
        Autoencoder,
        JumpReLUAutoencoder,
        EditLatents,
        Lora,
    )
}
