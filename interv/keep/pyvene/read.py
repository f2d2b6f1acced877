"""Reading the folders that pyvene saved."""

from __future__ import annotations

import json
import pickle
import re
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor

from interv.engine.constants import Constant, Replace
from interv.engine.dictionaries import (
    Autoencoder,
    JumpReLUAutoencoder,
    JumpReluDictionary,
    ReluDictionary,
)
from interv.engine.interventions import (
    Intervention,
    Noise,
    Vanilla,
)
from interv.engine.masks import (
    Boundary,
    BoundlessRotatedSpace,
    Mask,
    SigmoidMask,
    SigmoidMaskRotatedSpace,
)
from interv.engine.rotations import (
    LowRankRotatedSpace,
    RotatedSpace,
    Rotation,
)
from interv.engine.runs import Site
from interv.errors import EngineError, UsageError
from interv.keep.format import Part, Trained
from interv.keep.pyvene.words import (
    CONFIG,
    HEADS,
    LOCALIST,
    OURS,
    PLAIN,
    REPRESENTATION,
    ROTATE,
    WRITES_INTO,
    Keys,
    orthogonal,
    path_name,
)
from interv.models.anatomy import Anatomy, as_path
from interv.models.families import BY_MODEL_TYPE, HEAD_PREFIX

_UNREADABLE = (
    *(OSError, RuntimeError, ValueError, EOFError, LookupError, TypeError, AttributeError),
    *(pickle.UnpicklingError, struct.error),
)
"""What torch's own unpickler raises at bytes that are no file of tensors."""
_NOISE_LEVEL = 0.13462981581687927


def read_pyvene(
    folder: Path,
    anatomy: Anatomy | None = None,
    *,
    units: Sequence[str | int | None] | None = None,
    heads: Sequence[Sequence[int] | None] | None = None,
    subspaces: Sequence[Sequence[int] | None] | None = None,
) -> Trained:
    """What `pyvene.IntervenableModel.save` wrote, or `write_pyvene`.

    Linked interventions share their modules. Each part does what pyvene does with one position
    and the same source, but for one thing: where linked interventions stand at different sites,
    pyvene takes the second's base from what the first gave; here each takes its own.

    Args:
        folder: with its `config.json`.
        anatomy: of the model, if at hand: then swaps of all columns are told from those of the
            first few.
        units: position of each representation, as in `Part`; those recorded without, or None.
        heads: heads of each whose unit has `h`; those recorded without.
        subspaces: of each, as in pyvene's call: columns, or numbers of parts of its
            `subspace_partition`; None: what pyvene swaps when told nothing.

    Raises:
        UsageError: a file is missing or damaged, or holds what cannot be expressed here.
    """
    path = folder / CONFIG
    config = _config(path)
    rows = config["representations"]
    recorded = _recorded(path, config, len(rows))
    told = {"units": units, "heads": heads, "subspaces": subspaces}
    for name, given in told.items():
        if given is not None and len(given) != len(rows):
            raise UsageError(f"{folder}: {len(given)} {name} for {len(rows)} representations")
    reader = _Reader(folder, anatomy, str(config.get("model_type")))
    groups: dict[object, int] = {}
    parts = []
    for i, row in enumerate(rows):
        about = recorded[i] if recorded else {}
        saved = _Saved(
            path,
            i,
            _named(path, i, row),
            _class(path, i, config["intervention_types"][i]),
            _dimension(path, i, _at(config, "intervention_dimensions", i)),
            bool(_at(config, "intervention_constant_sources", i)),
            _indices(path, i, heads[i] if heads else about.get("heads")),
            None if subspaces is None else subspaces[i],
        )
        group = saved.row["group_key"]
        source = groups.setdefault(i if group is None else ("group", group), len(groups))
        site, intervention = reader.part(saved)
        unit = units[i] if units else about.get("unit")
        variable = about.get("variable", f"source_{source}")
        parts.append(Part(site, unit, variable, intervention))
    about = config.get(OURS, {}).get("about") or {"model_type": config.get("model_type")}
    return Trained(tuple(parts), {**about, "read_from": "pyvene"})


def _config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(
            f"{path}: cannot be read: {error.strerror or error}; expected a folder that pyvene's "
            "IntervenableModel.save wrote"
        ) from error
    except ValueError as error:
        raise UsageError(f"{path}: not JSON: {error}") from error
    if not isinstance(config, dict) or not all(
        isinstance(config.get(key), list) for key in ("representations", "intervention_types")
    ):
        raise UsageError(
            f"{path}: not pyvene's; expected lists 'representations' and 'intervention_types'"
        )
    if len(config["representations"]) != len(config["intervention_types"]):
        raise UsageError(f"{path}: as many intervention_types as representations are expected")
    if config.get("mode", "parallel") != "parallel":
        raise UsageError(
            f"{path}: the mode is '{config['mode']}'; which source is read from which is not a "
            "part of an intervention here: expected 'parallel'"
        )
    return config


def _recorded(path: Path, config: dict[str, Any], n: int) -> list[dict[str, Any]] | None:
    """What `write_pyvene` noted of each representation, if it did."""
    ours = config.get(OURS)
    if ours is None:
        return None
    parts = ours.get("parts") if isinstance(ours, dict) else None
    if (
        not isinstance(parts, list)
        or len(parts) != n
        or not isinstance(ours.get("about"), dict)
        or not all(_is_ours(part) for part in parts)
    ):
        raise UsageError(
            f"{path}: '{OURS}' is not what interv writes; expected 'about' and {n} 'parts', each "
            "with unit, variable and heads"
        )
    return parts


def _is_ours(part: object) -> bool:
    if not isinstance(part, dict) or not isinstance(part.get("variable"), str):
        return False
    return part.get("unit") is None or type(part["unit"]) in (int, str)


def _named(path: Path, i: int, row: object) -> dict[str, Any]:
    """A representation by the names of its fields; earlier versions of pyvene have fewer."""
    given = dict(zip(REPRESENTATION, row, strict=False)) if isinstance(row, list) else row
    if not isinstance(given, dict) or not set(given) <= set(REPRESENTATION):
        raise UsageError(f"{path}: representation {i} is not pyvene's: {row}")
    found = {**dict.fromkeys(REPRESENTATION), "max_number_of_units": 1, **given}
    partition = found["subspace_partition"]
    if (
        not all(type(found[name]) is str for name in ("component", "unit"))
        or not all(type(found[name]) is int for name in ("layer", "max_number_of_units"))
        or found["max_number_of_units"] < 1
        or not all(
            isinstance(found[name], int | str | None)
            for name in ("group_key", "intervention_link_key")
        )
        or not (partition is None or _are_lists(partition))
    ):
        raise UsageError(f"{path}: representation {i} is not pyvene's: {row}")
    return found


def _are_lists(value: object) -> bool:
    """Whether it is a list of lists of whole numbers."""
    return isinstance(value, list) and all(
        isinstance(inner, list) and all(type(j) is int for j in inner) for inner in value
    )


def _class(path: Path, i: int, written: object) -> str:
    found = re.fullmatch(r"(?:<class ')?([\w.]+)\.(\w+)(?:'>)?", str(written))
    if not found or not found[1].startswith("pyvene."):
        raise UsageError(
            f"{path}: representation {i} is of type {written}; only pyvene's own can be read"
        )
    return found[2]


def _at(config: dict[str, Any], key: str, i: int) -> Any:
    values = config.get(key)
    return values[i] if isinstance(values, list) and i < len(values) else None


def _dimension(path: Path, i: int, value: Any) -> int | list[int] | None:
    if value is None or type(value) is int or _are_lists([value]):
        found: int | list[int] | None = value
        return found
    raise UsageError(f"{path}: representation {i}: intervention dimension {value}")


def _indices(path: Path, i: int, given: Any) -> tuple[int, ...] | None:
    if given is None:
        return None
    if not isinstance(given, Sequence) or not all(type(j) is int for j in given):
        raise UsageError(f"{path}: representation {i}: heads {given}, expected whole numbers")
    return tuple(given)


@dataclass(frozen=True)
class _Saved:
    """One representation of a folder.

    Attributes:
        path, index: the config it is in, and which it is there.
        row: its RepresentationConfig.
        kind: pyvene's class.
        dimension: its interchange_dim: the first so many columns are swapped; of an autoencoder
            the latents.
        constant: it has a source of its own.
        heads: those it is used at.
        subspace: that it is used with.
    """

    path: Path
    index: int
    row: dict[str, Any]
    kind: str
    dimension: int | list[int] | None
    constant: bool
    heads: tuple[int, ...] | None
    subspace: Sequence[int] | None

    def fail(self, message: str) -> NoReturn:
        where = f"{self.path}: representation {self.index} ({self.kind})"
        raise UsageError(f"{where}: {message}")

    @property
    def n_units(self) -> int:
        n: int = self.row["max_number_of_units"]
        return n

    def columns(self) -> tuple[int, ...] | None:
        """Those of the subspace it is used with."""
        if self.subspace is None:
            return None
        partition = self.row["subspace_partition"]
        if partition is None:
            return tuple(self.subspace)
        found: list[int] = []
        for number in self.subspace:
            if not 0 <= number < len(partition):
                self.fail(f"subspace {number}: its partition has {len(partition)}")
            part = partition[number]
            # Two numbers are a range, in pyvene; any other number of them are columns.
            found += range(*part) if len(part) == 2 and type(part[0]) is int else part
        return tuple(found)

    def first(self, most: int) -> tuple[int, ...] | None:
        """Which of `most` coordinates are swapped; None: all."""
        chosen = self.columns()
        if chosen is None and isinstance(self.dimension, int) and self.dimension < most:
            chosen = tuple(range(self.dimension))
        return None if chosen == tuple(range(most)) else chosen


class _Reader:
    """Makes interventions from a folder's files; linked ones of the same modules."""

    def __init__(self, folder: Path, anatomy: Anatomy | None, model_type: str) -> None:
        self.folder, self.anatomy = folder, anatomy
        self.model_type = model_type
        self._files: dict[str, dict[str, Tensor]] = {}
        self._linked: dict[object, dict[str, Any]] = {}
        self._keys = Keys()

    def part(self, saved: _Saved) -> tuple[Site, Intervention]:
        row = saved.row
        if row["moe_key"] is not None:
            saved.fail("a single expert (moe_key) cannot be named here")
        key = self._keys.next(row)
        linked = row["intervention_link_key"]
        modules = {} if linked is None else self._linked.setdefault(linked, {})
        heads = self._heads(saved)
        component, layer = self._place(saved)
        if saved.kind in LOCALIST:
            dims = self._localist_dims(saved, component)
            edit = LOCALIST[saved.kind]()
            made: Intervention = edit
            if saved.constant and edit.needs_source:
                made = self._constant(saved, key, edit, dims, heads)
        else:
            dims = None
            made = self._with_tensors(saved, key, modules)
        try:
            return Site(component, layer, None, heads, dims), made
        except EngineError as error:
            saved.fail(str(error))

    def _heads(self, saved: _Saved) -> tuple[int, ...] | None:
        unit, component = saved.row["unit"], saved.row["component"]
        if unit == "pos":
            return None
        if unit not in ("h", "h.pos") or not component.startswith(HEAD_PREFIX):
            saved.fail(f"the unit '{unit}' of {component}: expected pos, or h.pos of heads")
        if saved.heads is None:
            saved.fail("pyvene does not save at which heads; give them, a list for each")
        if saved.kind not in LOCALIST and len(saved.heads) != saved.n_units:
            saved.fail(f"{len(saved.heads)} heads, it was made for {saved.n_units}")
        return saved.heads

    def _component(self, saved: _Saved) -> str:
        name: str = saved.row["component"]
        if name == "mlp_activation" and self._is_gated(saved):
            # pyvene's is the gate's activation there, without the other factor.
            return "mlp_gate_activation"
        if name == "attention_weight":
            saved.fail("pyvene's attention_weight never fires: it did nothing")
        if as_path(name) is None and name not in PLAIN + HEADS:
            saved.fail(f"the component '{name}' has no name here")
        return name

    def _place(self, saved: _Saved) -> tuple[str, int]:
        """Component and layer; a path by its name, if the model's anatomy has one."""
        component = self._component(saved)
        path = as_path(component)
        if path is None:
            return component, int(saved.row["layer"])
        named = path_name(self.anatomy, *path) if self.anatomy else None
        if named is None and path[1] == "input":
            saved.fail(f"{component}: {WRITES_INTO}; the model's anatomy may have a name for it")
        return named or (component, 0)

    def _is_gated(self, saved: _Saved) -> bool:
        if self.anatomy is not None:
            return "mlp_gate_activation" in self.anatomy.components
        found = re.search(r"transformers\.models\.(\w+)\.", self.model_type)
        family = BY_MODEL_TYPE.get(found[1]) if found else None
        if family is None:
            saved.fail("whether the model's MLP is gated is not known without its anatomy")
        return "mlp_gate_activation" in family.components

    def _localist_dims(self, saved: _Saved, component: str) -> tuple[int, ...] | None:
        """Columns of the component, or of each head."""
        chosen, most = saved.columns(), saved.dimension
        if chosen is not None or most is None:
            return chosen
        if not isinstance(most, int):
            saved.fail(f"its interchange dimension is {most}, expected a whole number")
        width = self.anatomy.width(component) if self.anatomy else None
        units = self.anatomy.n_units(component) if self.anatomy and saved.heads else None
        if width is None:
            # The width is not saved. Of several units it is theirs together, if all is swapped.
            return tuple(range(most)) if saved.n_units == 1 else None
        return tuple(range(most)) if most < width // (units or 1) else None

    def _file(self, saved: _Saved, key: str) -> _State:
        path = self.folder / f"intkey_{key}.bin"
        if path.name not in self._files:
            try:
                state = torch.load(path, map_location="cpu", weights_only=True)
            except FileNotFoundError:
                saved.fail(f"its file {path.name} is missing")
            except _UNREADABLE as error:
                first = (str(error).strip().splitlines() or [type(error).__name__])[0]
                saved.fail(f"{path.name} is not a file of tensors: {first}")
            if not isinstance(state, dict) or not all(
                isinstance(tensor, Tensor) for tensor in state.values()
            ):
                saved.fail(f"{path.name} holds other things than tensors")
            self._files[path.name] = state
        return _State(saved, path.name, self._files[path.name])

    def _constant(
        self,
        saved: _Saved,
        key: str,
        edit: Intervention,
        dims: tuple[int, ...] | None,
        heads: tuple[int, ...] | None,
    ) -> Intervention:
        """An edit with a saved source, the same at each head."""
        state = self._file(saved, key)
        value = state.take("source_representation", None).float()
        if value.numel() != value.shape[-1]:
            saved.fail(f"its source has the shape {tuple(value.shape)}; expected one vector")
        value = value.reshape(-1)
        if dims is not None:
            if max(dims) >= len(value):
                saved.fail(f"its source is {len(value)} wide, column {max(dims)} is swapped")
            value = value[list(dims)]
        value = value.repeat(len(heads or (0,)))
        return Replace(value) if isinstance(edit, Vanilla) else Constant(edit, value)

    def _with_tensors(self, saved: _Saved, key: str, modules: dict[str, Any]) -> Intervention:
        kind = saved.kind
        if kind == "NoiseIntervention":
            # Drawn for four positions, and fails at any other number of them; the misspelt name
            # of its option leaves but one level.
            return Noise(_NOISE_LEVEL, 1, 0)
        if kind == "PCARotatedSpaceIntervention":
            saved.fail("pyvene does not save its components")
        readers = {
            "RotatedSpaceIntervention": self._rotated,
            "LowRankRotatedSpaceIntervention": self._low_rank,
            "BoundlessRotatedSpaceIntervention": self._boundless,
            "SigmoidMaskIntervention": self._mask,
            "SigmoidMaskRotatedSpaceIntervention": self._rotated_mask,
            "AutoencoderIntervention": self._autoencoder,
            "JumpReLUAutoencoderIntervention": self._jump_relu,
        }
        if kind not in readers:
            saved.fail(f"this type is not known; known are {', '.join([*LOCALIST, *readers])}")
        if saved.row["unit"] == "pos" and saved.n_units != 1:
            saved.fail(
                f"made for {saved.n_units} positions, which pyvene takes as one long vector; here "
                "an intervention is made at each"
            )
        state = self._file(saved, key)
        try:
            return readers[kind](saved, state, modules)
        except EngineError as error:
            saved.fail(f"{state.file}: {error}")

    def _rotation(self, state: _State, modules: dict[str, Any]) -> Rotation:
        if "rotation" not in modules:
            original = state.take(ROTATE + "original", (None, None))
            base = state.take(ROTATE + "0.base", (original.shape[0], original.shape[0]))
            modules["rotation"] = Rotation(orthogonal(original, base))
        found: Rotation = modules["rotation"]
        return found

    def _rotated(self, saved: _Saved, state: _State, modules: dict[str, Any]) -> Intervention:
        rotation = self._rotation(state, modules)
        return RotatedSpace(rotation, saved.first(rotation.shape[1]))

    def _low_rank(self, saved: _Saved, state: _State, modules: dict[str, Any]) -> Intervention:
        # Without subspaces all of it is swapped, whatever the interchange dimension is.
        return LowRankRotatedSpace(self._rotation(state, modules), saved.columns())

    def _boundless(self, saved: _Saved, state: _State, modules: dict[str, Any]) -> Intervention:
        if "gate" not in modules:
            gate = Boundary(int(state.take("embed_dim", ())), temperature=state.temperature())
            gate.boundary.data = state.take("intervention_boundaries", (1,)).float().reshape(())
            modules["gate"] = gate
        return BoundlessRotatedSpace(self._rotation(state, modules), modules["gate"])

    def _gate(self, state: _State, name: str, modules: dict[str, Any]) -> Mask:
        if "gate" not in modules:
            start = state.take(name, (None,))
            modules["gate"] = Mask(len(start), start=start, temperature=state.temperature())
        found: Mask = modules["gate"]
        return found

    def _mask(self, saved: _Saved, state: _State, modules: dict[str, Any]) -> Intervention:
        return SigmoidMask(self._gate(state, "mask", modules))

    def _rotated_mask(self, saved: _Saved, state: _State, modules: dict[str, Any]) -> Intervention:
        gate = self._gate(state, "masks", modules)
        return SigmoidMaskRotatedSpace(self._rotation(state, modules), gate)

    def _autoencoder(self, saved: _Saved, state: _State, modules: dict[str, Any]) -> Intervention:
        if "dictionary" not in modules:
            encoder = state.take("autoencoder.encoder.0.weight", (None, None))
            n, width = encoder.shape
            modules["dictionary"] = ReluDictionary(
                encoder.T.contiguous(),
                state.take("autoencoder.encoder.0.bias", (n,)),
                state.take("autoencoder.decoder.0.weight", (width, n)).T.contiguous(),
                state.take("autoencoder.decoder.0.bias", (width,)),
            )
        # Its interchange dimension is an index, not a number of them: one latent, or a list.
        dimension = saved.dimension
        if dimension is None:
            saved.fail("which latents it swaps is not saved")
        latents = (dimension,) if isinstance(dimension, int) else tuple(dimension)
        n = modules["dictionary"].shape[1]
        every = latents == tuple(range(n))
        return Autoencoder(modules["dictionary"], None if every else latents, error_term=False)

    def _jump_relu(self, saved: _Saved, state: _State, modules: dict[str, Any]) -> Intervention:
        if "dictionary" not in modules:
            encoder = state.take("W_enc", (None, None))
            width, n = encoder.shape
            modules["dictionary"] = JumpReluDictionary(
                encoder,
                state.take("b_enc", (n,)),
                state.take("W_dec", (n, width)),
                state.take("b_dec", (width,)),
                # pyvene takes the ReLU too: below 0 its latents are 0.
                state.take("threshold", (n,)).clamp(min=0),
            )
        # As many latents as the site has columns, unless pyvene is told otherwise.
        dictionary = modules["dictionary"]
        return JumpReLUAutoencoder(dictionary, saved.first(dictionary.shape[1]), error_term=False)


@dataclass(frozen=True)
class _State:
    """A file's tensors."""

    saved: _Saved
    file: str
    tensors: Mapping[str, Tensor]

    def take(self, name: str, shape: tuple[int | None, ...] | None) -> Tensor:
        """A tensor of a shape; None: any size, or any shape."""
        if name not in self.tensors:
            self.saved.fail(f"{self.file} has no '{name}'; it has {', '.join(self.tensors)}")
        found = self.tensors[name].detach()
        fits = shape is None or (
            found.dim() == len(shape)
            and all(w in (None, s) for w, s in zip(shape, found.shape, strict=True))
        )
        if not fits or not bool(torch.isfinite(found).all() | (name == "threshold")):
            self.saved.fail(
                f"{self.file}: '{name}' has the shape {tuple(found.shape)}, expected finite "
                f"numbers of the shape {shape}"
            )
        return found

    def temperature(self) -> Tensor:
        # A Parameter in pyvene, which `set_temperature` may leave with one dimension.
        found = self.take("temperature", None).float()
        return found.reshape(()) if found.numel() == 1 else found
