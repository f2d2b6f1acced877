"""What an autoencoder's safetensors file holds, from its header; no torch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open

from interv.errors import ModelError, nearest

TENSORS = ("encoder", "encoder_bias", "decoder", "decoder_bias")
"""`[width, latent]`, `[latent]`, `[latent, width]`, `[width]`."""
THRESHOLD = "threshold"
"""`[latent]`, of a JumpReLU autoencoder; a file without it is a ReLU one."""

_FLOATS = ("F16", "BF16", "F32", "F64")
# SAELens and Gemma Scope; OpenAI and EleutherAI; pyvene's ReLU autoencoder.
_OTHERS = {
    "W_enc": "encoder",
    "b_enc": "encoder_bias",
    "W_dec": "decoder",
    "b_dec": "decoder_bias",
    "encoder.weight": "encoder, transposed",
    "encoder.bias": "encoder_bias",
    "decoder.weight": "decoder, transposed",
    "decoder.bias": "decoder_bias",
    "pre_bias": "decoder_bias",
    "log_threshold": "threshold, its exponential",
}


@dataclass(frozen=True)
class DictionaryShape:
    """The form of an autoencoder.

    Attributes:
        width: of what it encodes.
        jumps: whether it has a threshold for each latent.
    """

    width: int
    n_latents: int
    jumps: bool


def read_dictionary_shape(path: Path) -> DictionaryShape:
    """Read the header of an autoencoder's file and check that all of it has a meaning here.

    Raises:
        ModelError: the file cannot be read, lacks a tensor, has one of no known meaning, or
            their shapes do not fit together; all of that in one message.
    """
    try:
        with safe_open(path, framework="numpy") as file:
            found = {}
            for name in file.keys():  # noqa: SIM118
                part = file.get_slice(name)
                found[name] = (tuple(part.get_shape()), str(part.get_dtype()))
    except OSError as error:
        raise ModelError(f"{path}: {error.strerror or error}") from None
    except SafetensorError as error:
        raise ModelError(f"{path}: is not a safetensors file: {error}") from None
    wrong = list(_name_problems(found))
    if not wrong:
        wrong = list(_shape_problems(found))
    if wrong:
        raise ModelError(f"{path}: {'; '.join(wrong)}")
    width, n_latents = found["encoder"][0]
    return DictionaryShape(width, n_latents, THRESHOLD in found)


def _name_problems(found: dict[str, tuple[tuple[int, ...], str]]) -> Iterator[str]:
    known = (*TENSORS, THRESHOLD)
    if missing := [name for name in TENSORS if name not in found]:
        yield f"has no {', '.join(missing)}"
    for name in found:
        if name in known:
            continue
        meant = _OTHERS.get(name) or nearest(name, known)
        yield f"tensor '{name}' has no meaning here" + (f" (here: {meant})" if meant else "")


def _shape_problems(found: dict[str, tuple[tuple[int, ...], str]]) -> Iterator[str]:
    for name, (_, dtype) in found.items():
        if dtype not in _FLOATS:
            yield f"{name} is of {dtype}, not of floating-point numbers"
    shape = found["encoder"][0]
    if len(shape) != 2 or not all(shape):
        yield f"encoder has the shape {shape}, expected (width, latents)"
        return
    width, n_latents = shape
    wanted = {
        "encoder_bias": (n_latents,),
        "decoder": (n_latents, width),
        "decoder_bias": (width,),
        THRESHOLD: (n_latents,),
    }
    for name, expected in wanted.items():
        if name in found and found[name][0] != expected:
            yield f"{name} has the shape {found[name][0]}, expected {expected}"
