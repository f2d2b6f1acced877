"""The interventions of one fit, by its type, rank and seed; several are parts of one basis."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from interv.engine.adapters import Adapter, Lora
from interv.engine.dictionaries import (
    Autoencoder,
    Dictionary,
    JumpReLUAutoencoder,
    JumpReluDictionary,
    ReluDictionary,
)
from interv.engine.interventions import Intervention, Vanilla
from interv.engine.masks import (
    Boundary,
    BoundlessRotatedSpace,
    Gate,
    Mask,
    SigmoidMask,
    SigmoidMaskRotatedSpace,
)
from interv.engine.rotations import (
    LowRankRotatedSpace,
    PCARotatedSpace,
    RotatedSpace,
    Rotation,
)
from interv.errors import EngineError, ModelError, UsageError
from interv.models.dictionaries import read_dictionary_shape
from interv.plan.train import Fit
from interv.plan.train_grid import FitSite
from interv.spec.train import TrainedType


@dataclass(frozen=True)
class FitPart:
    """What exchanges one variable at one site.

    Attributes:
        site: where, as the plan has it.
        variable: its index.
    """

    site: FitSite
    variable: int
    intervention: Intervention


@dataclass(frozen=True)
class About:
    """What is known of a site once the model has run.

    Attributes:
        width: of what stands there.
        heads: into how many units it is divided.
        states: some activations `[n, width]`, for principal components.
    """

    width: int
    heads: int
    states: Tensor


def make_parts(
    fit: Fit, options: TrainedType, about: Mapping[FitSite, About], seed: int
) -> list[FitPart]:
    """The interventions of a fit, untrained; deterministic in the seed.

    Several variables at one site have parts of one basis: the first `rank` columns are the first
    one's, and so on. Linked sites hold the same modules.

    Raises:
        EngineError: linked sites of unequal widths.
        UsageError: an autoencoder's file that does not fit.
    """
    widths = {about[site].width for site in fit.sites}
    if fit.linked and len(widths) > 1:
        raise EngineError(f"linked sites are of one width, not {sorted(widths)}")
    parts: list[FitPart] = []
    shared: list[Intervention] | None = None
    for number, site in enumerate(fit.sites):
        made = shared
        if made is None:
            n = len(site.variables)
            made = _interventions(fit, options, about[site], n, seed + 7919 * number)
        if fit.linked:
            shared = made
        parts += [
            FitPart(site, variable, intervention)
            for variable, intervention in zip(site.variables, made, strict=True)
        ]
    return parts


def _interventions(
    fit: Fit, options: TrainedType, about: About, n: int, seed: int
) -> list[Intervention]:
    """One intervention for each of `n` variables at a site."""
    width, rank, kind = about.width, fit.rank, fit.type
    columns = [tuple(range(i * rank, (i + 1) * rank)) for i in range(n)]
    top, _ = options.temperature
    if kind == "vanilla":
        return [Vanilla() for _ in range(n)]
    if kind == "pca_rotated_space":
        fitted = PCARotatedSpace.fit(about.states, rank * n)
        return [replace(fitted, dims=dims) for dims in columns]
    if kind == "rotated_space":
        rotation = _rotation(options, about, width, seed)
        return [RotatedSpace(rotation, dims) for dims in columns]
    if kind == "low_rank_rotated_space":
        rotation = _rotation(options, about, rank * n, seed)
        return [LowRankRotatedSpace(rotation, dims) for dims in columns]
    found: list[Intervention] = []
    for i in range(n):
        own = seed + 104729 * i
        if kind == "boundless_rotated_space":
            rotation = _rotation(options, about, width, own)
            found.append(BoundlessRotatedSpace(rotation, Boundary(width, temperature=top)))
        elif kind == "sigmoid_mask_rotated_space":
            rotation = _rotation(options, about, width, own)
            # The same gate everywhere would leave the rotation without a gradient.
            start = torch.randn(width, generator=torch.Generator().manual_seed(own)) * top / 10
            found.append(
                SigmoidMaskRotatedSpace(rotation, Mask(width, start=start, temperature=top))
            )
        elif kind == "sigmoid_mask":
            each = width // about.heads if options.by_head else 1
            found.append(SigmoidMask(Mask(width, temperature=top, each=each)))
        elif kind == "autoencoder":
            found.append(_autoencoder(options, width, own))
        elif kind == "lora":
            found.append(Lora(Adapter.seeded(width, rank, options.alpha, own)))
        else:
            raise EngineError(f"{kind} is not trained")
    return found


def _rotation(options: TrainedType, about: About, rank: int, seed: int) -> Rotation:
    if options.start == "random":
        return Rotation.seeded(about.width, rank, seed)
    # Components first; what they do not span is filled with random directions.
    most = min(rank, about.width, len(about.states) - 1)
    components = PCARotatedSpace.fit(about.states, most).components.T
    filled = torch.randn(about.width, rank - most, generator=torch.Generator().manual_seed(seed))
    columns, triangle = torch.linalg.qr(torch.cat([components, filled], dim=1))
    return Rotation(columns * torch.where(triangle.diagonal() < 0, -1.0, 1.0))


def _autoencoder(options: TrainedType, width: int, seed: int) -> Autoencoder | JumpReLUAutoencoder:
    """One to be trained, or the one in a file, which keeps its weights unless told otherwise."""
    asked = options.dictionary
    if asked.path is None:
        fresh = ReluDictionary.seeded(width, asked.latents, seed)
        return Autoencoder(fresh, None, asked.error_term)
    try:
        # Tensors of no known meaning are an error here, not left out.
        shape = read_dictionary_shape(Path(asked.path))
        tensors = load_file(asked.path)
    except (OSError, SafetensorError, ModelError) as error:
        raise UsageError(f"intervention.dictionary.path: {error}") from None
    if shape.width != width:
        raise UsageError(f"{asked.path}: an autoencoder {shape.width} wide, the site is {width}")
    if shape.jumps:
        jumps = JumpReluDictionary(**tensors).requires_grad_(options.train_dictionary)
        return JumpReLUAutoencoder(jumps, None, asked.error_term)
    given = ReluDictionary(**tensors).requires_grad_(options.train_dictionary)
    return Autoencoder(given, None, asked.error_term)


def modules_of(parts: Sequence[FitPart]) -> nn.ModuleList:
    """All modules that hold parameters, each once, in the parts' order."""
    found = dict.fromkeys(m for part in parts for m in part.intervention.modules().values())
    return nn.ModuleList(found)


def set_temperature(parts: Sequence[FitPart], value: float) -> None:
    """Sharpen, or soften, every gate."""
    for module in modules_of(parts):
        if isinstance(module, Gate):
            module.set_temperature(value)


def openness(parts: Sequence[FitPart]) -> Tensor | None:
    """The sum over gates of the share that each exchanges; None where there are none.

    Of a boundary that is its parameter β, as the loss of pyvene's Boundless DAS notebook adds
    it; of a mask the mean of its coordinates' gates.
    """
    gates = [module for module in modules_of(parts) if isinstance(module, Gate)]
    # The parameter itself, since a boundary beyond its limits has no gradient in its gates.
    shares = [g.boundary if isinstance(g, Boundary) else g().mean() for g in gates]
    return torch.stack(shares).sum() if shares else None


def randomised(parts: Sequence[FitPart], seed: int) -> list[FitPart]:
    """The same parts in random directions: as many of them, of the same sharpness."""
    copies: dict[int, Any] = {}
    made = [replace(part, intervention=copy.deepcopy(part.intervention, copies)) for part in parts]
    for number, module in enumerate(modules_of(made)):
        generator = torch.Generator().manual_seed(seed + number)
        with torch.no_grad():
            if isinstance(module, Rotation):
                module.free.copy_(Rotation.seeded(*module.shape, seed + number).free)
            elif isinstance(module, Mask):
                module.mask.copy_(
                    module.mask[torch.randperm(len(module.mask), generator=generator)]
                )
            elif isinstance(module, Dictionary):
                # The same norms, thresholds and angles between latents, elsewhere.
                width = module.shape[0]
                module.rotate(Rotation.seeded(width, width, seed + number)())
            elif isinstance(module, Adapter):
                module.up.copy_(torch.randn(module.up.shape, generator=generator) * module.up.std())
    return [
        replace(part, intervention=_random_components(part.intervention, seed)) for part in made
    ]


def _random_components(intervention: Intervention, seed: int) -> Intervention:
    if not isinstance(intervention, PCARotatedSpace):
        return intervention
    n, width = intervention.components.shape
    rows = Rotation.seeded(width, n, seed)().detach().T
    return replace(intervention, components=rows)
