"""One intervention of every type, and what several of their tests use."""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from interv.engine.adapters import Adapter, Lora
from interv.engine.constants import Constant, Mean, ProjectOut, Replace
from interv.engine.dictionaries import (
    Autoencoder,
    EditLatents,
    JumpReLUAutoencoder,
    JumpReluDictionary,
    ReluDictionary,
)
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
from interv.engine.masks import (
    Boundary,
    BoundlessRotatedSpace,
    Mask,
    SigmoidMask,
    SigmoidMaskRotatedSpace,
)
from interv.engine.rotations import LowRankRotatedSpace, PCARotatedSpace, RotatedSpace, Rotation

with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
    warnings.simplefilter("ignore")
    import pyvene

WIDTH = 6


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def orthonormal(width: int, rank: int, seed: int = 0) -> Tensor:
    """Made otherwise than the module does: the left singular vectors of random numbers."""
    return torch.linalg.svd(numbers(width, rank, seed=seed), full_matrices=False)[0]


BASE, SOURCE = numbers(2, 3, WIDTH, seed=1), numbers(2, 3, WIDTH, seed=2)
R = orthonormal(WIDTH, WIDTH)
W = orthonormal(WIDTH, 2)
MASK = numbers(WIDTH, seed=3)


def relu_dictionary(n: int = 9, width: int = WIDTH) -> ReluDictionary:
    tensors = [numbers(width, n), numbers(n, seed=1), numbers(n, width, seed=2)]
    return ReluDictionary(*tensors, numbers(width, seed=3))


def jump_dictionary(n: int = 9, width: int = WIDTH) -> JumpReluDictionary:
    tensors = [numbers(width, n), numbers(n, seed=1), numbers(n, width, seed=2)]
    return JumpReluDictionary(*tensors, numbers(width, seed=3), numbers(n, seed=4))


def pca(width: int = WIDTH, **options: Any) -> PCARotatedSpace:
    activations = numbers(40, width, seed=5) * torch.arange(1, width + 1) + 3
    return PCARotatedSpace.fit(activations, **options)


def swaps(width: int = WIDTH) -> list[Intervention]:
    """Those that swap in a basis, a mask or latents, of sites of a width."""
    square = Rotation.seeded(width, width, seed=0)
    relu, jump = relu_dictionary(width=width), jump_dictionary(width=width)
    return [
        RotatedSpace(square),
        RotatedSpace(square, (width - 1,)),
        LowRankRotatedSpace(Rotation.seeded(width, (width + 1) // 2, seed=1)),
        LowRankRotatedSpace(square, (0,)),
        BoundlessRotatedSpace(square, Boundary(width, temperature=2.0)),
        SigmoidMask(Mask(width, start=numbers(width), temperature=0.5)),
        SigmoidMaskRotatedSpace(square, Mask(width, start=numbers(width), temperature=1.0)),
        pca(width),
        pca(width, standardise=True, dims=(0,)),
        Autoencoder(relu),
        Autoencoder(relu, (2, 5)),
        JumpReLUAutoencoder(jump),
        JumpReLUAutoencoder(jump, (2, 5)),
    ]


SWAPS = swaps()
HELD = [
    *SWAPS,
    Lora(Adapter(numbers(WIDTH, 2), numbers(2, WIDTH, seed=1), 3.0)),
    EditLatents(relu_dictionary(), Clamp(1.0, 2.0), (0, 4)),
]
"""Those that hold modules, or components."""

# Exact in bfloat16.
_VALUES = torch.arange(3.0 * WIDTH).reshape(3, WIDTH) / 4
EVERY: list[Intervention] = [
    Vanilla(),
    Addition(),
    Subtraction(),
    Zero(),
    Collect(),
    Skip(),
    Noise(0.1, 3, 1),
    Scale(-1.5),
    Clamp(-0.5, 0.5),
    Lambda(torch.maximum),
    BaseLambda(torch.neg),
    Mean(_VALUES[1]),
    Replace(_VALUES),
    Constant(Addition(), _VALUES),
    ProjectOut(MASK),
    *HELD,
]


def name_of(value: object) -> str:
    return value.name if isinstance(value, Intervention) else ""


def source_for(intervention: Intervention, source: Tensor) -> Tensor | None:
    return source if intervention.needs_source or intervention.reads_input else None


def loss_of(activations: Tensor) -> Tensor:
    return (activations * numbers(WIDTH, seed=9)).tanh().sum()


def gradients(loss: Tensor, of: Sequence[Tensor]) -> tuple[Tensor, ...]:
    return torch.autograd.grad(loss, of)


def as_pyvene(kind: str, **options: object) -> Any:
    """One of its modules. Its classes draw from torch's own generator."""
    with torch.random.fork_rng():
        return getattr(pyvene, f"{kind}Intervention")(embed_dim=WIDTH, **options)


def same_as(module: Any, ours: Intervention) -> None:
    """It writes into its base, and some of its classes take (batch, width)."""
    base, source = BASE.reshape(-1, WIDTH), SOURCE.reshape(-1, WIDTH)
    with torch.no_grad():
        expected = module(base.clone(), source.clone())
        torch.testing.assert_close(ours.apply(base, source), expected, atol=1e-5, rtol=0)
