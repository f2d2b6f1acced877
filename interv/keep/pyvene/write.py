"""Writing folders that pyvene loads."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, NoReturn

import torch
from torch import Tensor

from interv.engine.constants import Constant, Mean, Replace
from interv.engine.dictionaries import (
    Autoencoder,
    JumpReLUAutoencoder,
    ReluDictionary,
)
from interv.engine.interventions import (
    Addition,
    Skip,
    Subtraction,
    Vanilla,
    Zero,
)
from interv.engine.masks import (
    BoundlessRotatedSpace,
    SigmoidMask,
    SigmoidMaskRotatedSpace,
)
from interv.engine.rotations import (
    LowRankRotatedSpace,
    PCARotatedSpace,
    RotatedSpace,
)
from interv.engine.runs import Site
from interv.errors import EngineError, UsageError
from interv.keep.format import Part, Trained
from interv.keep.pyvene.words import (
    COMPONENTS,
    CONFIG,
    LOCALIST,
    OURS,
    REPRESENTATION,
    STREAM,
    WRITES_INTO,
    Keys,
    parametrized,
    path_name,
)
from interv.models.anatomy import Anatomy, as_path
from interv.models.families import HEAD_PREFIX
from interv.storage import write_atomically, writing


def write_pyvene(folder: Path, trained: Trained, anatomy: Anatomy) -> None:
    """Write a folder that `pyvene.IntervenableModel.load(folder, model)` reads.

    pyvene then needs the source and the positions (and heads) at its call, no subspaces. Modules
    that parts share are written for each, since pyvene chains what is linked.

    Args:
        folder: for `config.json` and a `.bin` for each part that has tensors.
        trained: the intervention.
        anatomy: of the model.

    Raises:
        UsageError: what pyvene cannot do, or does wrongly.
        StorageError: the folder cannot be written.
    """
    rows: list[list[Any]] = []
    kinds, dimensions, constants, keys, recorded = [], [], [], [], []
    files: dict[str, bytes] = {}
    names = Keys()
    for i, part in enumerate(trained.parts):
        found = _express(part, anatomy, f"part {i} ({part.intervention.name})")
        row = dict.fromkeys(REPRESENTATION) | {
            "layer": part.site.layer,
            "component": found.component,
            "unit": found.unit,
            "max_number_of_units": found.n_units,
            "low_rank_dimension": found.low_rank,
            "latent_dim": found.n_latents,
            "hidden_source_representation": True if found.constant else None,
        }
        key = names.next(row)
        rows.append([row[name] for name in REPRESENTATION])
        kinds.append(f"<class 'pyvene.models.interventions.{found.kind}'>")
        dimensions.append(found.dimension)
        # Whether it takes no source from the caller: so does zero, which saves nothing.
        constants.append(found.constant or found.kind == "ZeroIntervention")
        keys.append(key)
        heads = None if part.site.heads is None else list(part.site.heads)
        recorded.append({"unit": part.unit, "variable": part.variable, "heads": heads})
        if found.state:
            buffer = io.BytesIO()
            torch.save(found.full_state(), buffer)
            files[f"intkey_{key}.bin"] = buffer.getvalue()
    document = {
        "model_type": _model_class(anatomy),
        "representations": rows,
        "intervention_types": kinds,
        "mode": "parallel",
        "sorted_keys": keys,
        "intervention_dimensions": dimensions,
        "intervention_constant_sources": constants,
        OURS: {"parts": recorded, "about": dict(trained.about)},
    }
    try:
        text = json.dumps(document, indent=2, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise UsageError(f"{folder}: what is said about the intervention: {error}") from error
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        for name, data in {**files, CONFIG: (text + "\n").encode()}.items():
            write_atomically(folder / name, data)


def _model_class(anatomy: Anatomy) -> str:
    """As pyvene notes it, which does not read it."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CLASSES

    kind = anatomy.facts.model_type if anatomy.facts else ""
    name = CLASSES.get(kind)
    return f"<class 'transformers.models.{kind}.modeling_{kind}.{name}'>" if name else kind


Reach = Literal["each", "positions", "vector"]
Fail = Callable[[str], NoReturn]


@dataclass(frozen=True)
class _Expressed:
    """A part in pyvene's words.

    Attributes:
        kind: its class.
        state: its tensors, without those that every class has.
        dimension: its interchange_dim.
        width: its embed_dim: of all units together.
        reach: what it works on: each unit by itself, each position's heads together
            ("positions"), or all that it is given as one vector.
    """

    kind: str
    dimension: int | list[int] | None
    width: int | None
    reach: Reach
    state: dict[str, Tensor] = field(default_factory=dict)
    low_rank: int | None = None
    n_latents: int | None = None
    constant: bool = False
    component: str = ""
    unit: str = "pos"
    n_units: int = 1

    def full_state(self) -> dict[str, Tensor]:
        """With the buffers of every class."""
        sizes = {"embed_dim": self.width, "interchange_dim": self.dimension}
        common = {name: torch.tensor(size) for name, size in sizes.items() if size is not None}
        return {k: v.detach().cpu().clone() for k, v in {**common, **self.state}.items()}


def _express(part: Part, anatomy: Anatomy, what: str) -> _Expressed:
    def fail(message: str) -> NoReturn:
        raise UsageError(f"{what}: {message}")

    site = part.site
    try:
        width = anatomy.width(site.component)
        units = anatomy.n_units(site.component)
        anatomy.place(site.component, site.layer)
        anatomy.columns(site.component, site.heads, site.dims)
    except EngineError as error:
        fail(str(error))
    n_heads = len(site.heads or ())
    unit_width = None if width is None else width // (units or 1) if site.heads else width
    found = _intervention(part, unit_width, n_heads, fail)
    component = _component(site, anatomy, found, fail)
    if site.heads is None:
        if part.unit is None and found.reach != "each":
            fail(
                "at all positions: pyvene takes several as one long vector, where this is made at "
                "each; name one position"
            )
        return replace(found, component=component)
    if found.reach == "each" and found.state and n_heads > 1:
        fail(f"pyvene makes it at each of the {n_heads} heads by itself; name one head")
    if found.reach == "vector":
        fail("of heads it fails in pyvene with more than one row")
    unit = "h" if part.unit is None else "h.pos"
    return replace(found, component=component, unit=unit, n_units=n_heads)


def _component(site: Site, anatomy: Anatomy, found: _Expressed, fail: Fail) -> str:
    """pyvene's name, or the module's path where it has none and needs no width of it."""
    name = site.component
    known = COMPONENTS.get(anatomy.facts.model_type if anatomy.facts else "", ())
    plain = name.removeprefix(HEAD_PREFIX)
    if site.heads is not None:
        plain = HEAD_PREFIX + plain
    if plain == "mlp_gate_activation":
        plain = "mlp_activation"
    elif plain == "mlp_activation" and "mlp_gate_activation" in anatomy.components:
        plain = ""  # pyvene's is the gate's activation there
    facts = anatomy.facts
    if plain in known and facts is not None:
        grouped = plain in ("key_output", "value_output") and facts.n_kv_heads != facts.n_heads
        if facts.n_heads * facts.d_head == facts.d_model and not (grouped and found.state):
            return plain
        if plain in (*STREAM, "attention_input", "attention_output"):
            return plain
        fail(f"pyvene takes {name} of this model to be of another width than it is")
    if (found.state and not found.constant) or site.heads is not None:
        fail(f"pyvene has no component {name} of this model whose width it knows")
    stand = anatomy.stand(name)
    place = anatomy.place(name, site.layer)
    if as_path(name) and place.side == "input" and not path_name(anatomy, place.path, "input"):
        fail(f"{name}: {WRITES_INTO}")
    if stand.fused or place.pattern or not place.path:
        fail(f"pyvene has no component {name} of this model")
    return re.sub(r"\.(\d+)(?=\.|$)", r"[\1]", f"{place.path}") + f".{place.side}"


def _intervention(part: Part, width: int | None, n_heads: int, fail: Fail) -> _Expressed:
    """The intervention alone, at a unit `width` wide."""
    site, intervention = part.site, part.intervention
    whole = None if width is None else width * max(1, n_heads)

    def low_rank(basis: Tensor) -> _Expressed:
        basis = basis.detach().cpu()
        if site.dims is not None:
            # A basis of those columns is one of all of them.
            if width is None:
                fail("some columns of a module whose width is not known")
            own = [h * width + d for h in range(max(1, n_heads)) for d in site.dims]
            full = torch.zeros(width * max(1, n_heads), basis.shape[1])
            full[own] = basis.to(full)
            basis = full
        size, rank = basis.shape
        kind, state = "LowRankRotatedSpaceIntervention", parametrized(basis)
        return _Expressed(kind, size, size, "positions", state, low_rank=rank)

    def no_dims() -> None:
        if site.dims is not None:
            fail("at some columns only: in pyvene it takes all")

    match intervention:
        case Vanilla() | Addition() | Subtraction() | Zero() | Skip():
            name = next(n for n, of in LOCALIST.items() if of is type(intervention))
            if site.dims is None or site.dims == tuple(range(len(site.dims))):
                size = whole if site.dims is None else len(site.dims)
                return _Expressed(name, size, whole, "each")
            if not isinstance(intervention, Vanilla):
                fail(f"columns {site.dims}: without being told at the call, pyvene takes the first")
            return low_rank(torch.eye(len(site.dims) * max(1, n_heads)))
        case Replace() | Mean() | Constant():
            edit = intervention.edit if isinstance(intervention, Constant) else Vanilla()
            if not isinstance(edit, Vanilla | Addition | Subtraction):
                fail(f"with a constant source pyvene has no '{edit.name}'")
            value = intervention.value
            if value.dim() != 1:
                fail("a value for each position: pyvene has one for all")
            if site.dims not in (None, tuple(range(len(site.dims or ())))):
                fail(f"columns {site.dims}: without being told at the call, pyvene takes the first")
            if site.dims is not None:
                if whole is None:
                    fail("some columns of a module whose width is not known")
                value = torch.nn.functional.pad(value, (0, whole - len(value)))
            name = next(n for n, of in LOCALIST.items() if of is type(edit))
            size = whole if site.dims is None else len(site.dims)
            state = {"source_representation": value}
            return _Expressed(name, size, whole, "each", state, constant=True)
        case RotatedSpace() if site.dims is None:
            basis = intervention.rotation().detach().cpu()
            dims = intervention.dims
            if dims is not None:
                rest = [i for i in range(len(basis)) if i not in set(dims)]
                basis = basis[:, [*dims, *rest]]
            size = len(basis) if dims is None else len(dims)
            kind = "RotatedSpaceIntervention"
            return _Expressed(kind, size, len(basis), "positions", parametrized(basis))
        case RotatedSpace() | LowRankRotatedSpace():
            basis = intervention.rotation()
            dims = intervention.dims
            return low_rank(basis if dims is None else basis[:, list(dims)])
        case PCARotatedSpace():
            if not bool((intervention.scale == 1).all()):
                fail("of standardised activations: pyvene does not save principal components")
            dims, rows = intervention.dims, intervention.components
            return low_rank((rows if dims is None else rows[list(dims)]).T)
        case BoundlessRotatedSpace() | SigmoidMaskRotatedSpace():
            no_dims()
            return _partly(intervention, fail)
        case SigmoidMask():
            no_dims()
            gate = intervention.mask
            state = {"mask": gate.mask, "temperature": gate.temperature}
            return _Expressed("SigmoidMaskIntervention", gate.width, gate.width, "each", state)
        case Autoencoder() | JumpReLUAutoencoder():
            no_dims()
            if intervention.error_term:
                fail("with its error term; pyvene's gives the reconstruction (error_term: false)")
            threshold = getattr(intervention.dictionary, "threshold", None)
            if threshold is not None and bool((threshold < 0).any()):
                fail("a latent's threshold is below 0: pyvene's latents are never negative")
            return _dictionary(intervention)
    return fail("pyvene 0.1.8 has no such type, or does not save it")


def _partly(
    intervention: BoundlessRotatedSpace | SigmoidMaskRotatedSpace, fail: Fail
) -> _Expressed:
    width, rank = intervention.rotation.shape
    if width != rank:
        fail(f"its rotation is {width} by {rank}; pyvene's is square")
    state = parametrized(intervention.rotation().detach().cpu())
    if isinstance(intervention, SigmoidMaskRotatedSpace):
        gate = intervention.mask
        state |= {"masks": gate.mask, "temperature": gate.temperature}
        return _Expressed("SigmoidMaskRotatedSpaceIntervention", width, width, "vector", state)
    boundary = intervention.boundary
    state |= {
        "intervention_boundaries": boundary.boundary.reshape(1),
        "temperature": boundary.temperature,
        "intervention_population": torch.arange(width),
    }
    return _Expressed("BoundlessRotatedSpaceIntervention", width, width, "vector", state)


def _dictionary(intervention: Autoencoder | JumpReLUAutoencoder) -> _Expressed:
    dictionary = intervention.dictionary
    width, n = dictionary.shape
    chosen = list(range(n) if intervention.latents is None else intervention.latents)
    if isinstance(dictionary, ReluDictionary):
        state = {
            "autoencoder.encoder.0.weight": dictionary.encoder.T.contiguous(),
            "autoencoder.encoder.0.bias": dictionary.encoder_bias,
            "autoencoder.decoder.0.weight": dictionary.decoder.T.contiguous(),
            "autoencoder.decoder.0.bias": dictionary.decoder_bias,
        }
        kind = "AutoencoderIntervention"
        return _Expressed(kind, chosen, width, "positions", state, n_latents=n)
    order = [*chosen, *(i for i in range(n) if i not in set(chosen))]
    state = {
        "W_enc": dictionary.encoder[:, order],
        "b_enc": dictionary.encoder_bias[order],
        "W_dec": dictionary.decoder[order],
        "b_dec": dictionary.decoder_bias,
        "threshold": dictionary.threshold[order],
    }
    kind = "JumpReLUAutoencoderIntervention"
    return _Expressed(kind, len(chosen), width, "each", state, low_rank=n)
