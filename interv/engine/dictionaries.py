"""Swaps and edits in the latents of an autoencoder."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch import Tensor, nn

from interv.engine.interventions import (
    FromSource,
    Intervention,
    Vanilla,
    changed,
    expect_among,
    expect_width,
    parameter,
)
from interv.errors import EngineError


class Dictionary(nn.Module, ABC):
    """An autoencoder of one layer each way: latents `[..., n_latents]`, their decoder's rows.

    Args:
        encoder: `[width, n_latents]`.
        encoder_bias: `[n_latents]`.
        decoder: `[n_latents, width]`.
        decoder_bias: `[width]`.

    Raises:
        EngineError: their shapes do not fit together.
    """

    def __init__(
        self, encoder: Tensor, encoder_bias: Tensor, decoder: Tensor, decoder_bias: Tensor
    ) -> None:
        super().__init__()
        if encoder.dim() != 2:
            raise EngineError(f"an autoencoder's encoder has the shape {tuple(encoder.shape)}")
        width, n_latents = encoder.shape
        _expect_shape("encoder_bias", encoder_bias, n_latents)
        _expect_shape("decoder", decoder, n_latents, width)
        _expect_shape("decoder_bias", decoder_bias, width)
        self.encoder = parameter(encoder)
        self.encoder_bias = parameter(encoder_bias)
        self.decoder = parameter(decoder)
        self.decoder_bias = parameter(decoder_bias)

    @property
    def shape(self) -> tuple[int, int]:
        """The width and the number of latents."""
        return self.encoder.shape[0], self.encoder.shape[1]

    @abstractmethod
    def encode(self, activations: Tensor) -> Tensor:
        """Latents `[..., n_latents]` of activations `[..., width]`, in the parameters' numbers."""

    @torch.no_grad()
    def rotate(self, rotation: Tensor) -> None:
        """Turn every latent's directions by an orthogonal matrix `[width, width]`."""
        turn = rotation.to(self.encoder)
        self.encoder.copy_(turn @ self.encoder)
        self.decoder.copy_(self.decoder @ turn.T)

    def decode(self, latents: Tensor) -> Tensor:
        """Activations `[..., width]` of latents `[..., n_latents]`."""
        return latents @ self.decoder + self.decoder_bias


def _expect_shape(what: str, value: Tensor, *shape: int) -> None:
    if value.shape != shape:
        raise EngineError(
            f"an autoencoder's {what} has the shape {tuple(value.shape)}, expected {shape}"
        )


@final
class ReluDictionary(Dictionary):
    """z = relu((x − decoder_bias) encoder + encoder_bias), as in pyvene's AutoencoderLayer."""

    @classmethod
    def seeded(cls, width: int, n_latents: int, seed: int) -> ReluDictionary:
        """One to be trained: the decoder's rows of length 1, the encoder its transpose."""
        generator = torch.Generator().manual_seed(seed)
        decoder = nn.functional.normalize(torch.randn(n_latents, width, generator=generator))
        return cls(decoder.T, torch.zeros(n_latents), decoder, torch.zeros(width))

    def encode(self, activations: Tensor) -> Tensor:
        return torch.relu((activations - self.decoder_bias) @ self.encoder + self.encoder_bias)


@final
class JumpReluDictionary(Dictionary):
    """z = p · 1[p > threshold], p = x encoder + encoder_bias.

    Rajamanoharan et al. 2024 (arXiv 2407.14435), as SAELens computes it: below a negative
    threshold only. pyvene and Gemma Scope's code take the ReLU of z too, which is the same where
    no threshold is negative. The threshold `[n_latents]` is a buffer: a step has no gradient.
    """

    threshold: Tensor

    def __init__(
        self,
        encoder: Tensor,
        encoder_bias: Tensor,
        decoder: Tensor,
        decoder_bias: Tensor,
        threshold: Tensor,
    ) -> None:
        super().__init__(encoder, encoder_bias, decoder, decoder_bias)
        _expect_shape("threshold", threshold, *encoder_bias.shape)
        self.register_buffer("threshold", threshold.detach().to(self.encoder.dtype, copy=True))

    def encode(self, activations: Tensor) -> Tensor:
        before = activations @ self.encoder + self.encoder_bias
        return torch.where(before > self.threshold, before, torch.zeros_like(before))


@dataclass(frozen=True, eq=False)
class _Swap(FromSource):
    """What is common to swaps of latents, whatever the dictionary.

    Attributes:
        dictionary: the autoencoder.
        latents: those that are swapped, all without.
        error_term: add b − decode(encode(b)), so that only the swap changes anything. Without
            it a swap with s = b changes the site.
    """

    dictionary: Dictionary
    latents: tuple[int, ...] | None = None
    error_term: bool = True

    def __post_init__(self) -> None:
        expect_among(self.name, "latents", self.latents, self.dictionary.shape[1])

    def combine(self, base: Tensor, source: Tensor) -> Tensor:
        return _in_latents(self, Vanilla(), base, source)


@final
@dataclass(frozen=True, eq=False)
class Autoencoder(_Swap):
    """decode(swap(encode(b), encode(s))) on some `latents` of a ReLU dictionary, or all (pyvene).

    Without the `error_term` the site gets the reconstruction, as in pyvene.
    """

    name: ClassVar[str] = "autoencoder"
    dictionary: ReluDictionary


@final
@dataclass(frozen=True, eq=False)
class JumpReLUAutoencoder(_Swap):
    """`Autoencoder`, of a JumpReLU dictionary (pyvene; Gemma Scope, Lieberum et al. 2024)."""

    name: ClassVar[str] = "jump_relu_autoencoder"
    dictionary: JumpReluDictionary


@final
@dataclass(frozen=True, eq=False)
class EditLatents(Intervention):
    """decode(z with edit(z) at `latents`), z = encode(b): latents clamped, scaled, put to zero.

    The error term is as for `Autoencoder`.

    Raises:
        EngineError: the edit needs a source, or reads the module's input.
    """

    name: ClassVar[str] = "edit_latents"
    needs_source: ClassVar[bool] = False
    # As its edit is, which may be any.
    positionwise: ClassVar[bool] = False
    dictionary: Dictionary
    edit: Intervention
    latents: tuple[int, ...] | None = None
    error_term: bool = True

    def __post_init__(self) -> None:
        if self.edit.needs_source or self.edit.reads_input:
            raise EngineError(f"{self.name}: {self.edit.name} needs more than the latents")
        expect_among(self.name, "latents", self.latents, self.dictionary.shape[1])

    def apply(self, base: Tensor, source: Tensor | None) -> Tensor:
        return _in_latents(self, self.edit, base, None)


def _in_latents(
    of: _Swap | EditLatents, edit: Intervention, base: Tensor, source: Tensor | None
) -> Tensor:
    """`edit` made in the latents, and what becomes of the base."""
    dictionary = of.dictionary
    width, n_latents = dictionary.shape
    expect_width(of.name, "autoencoder", width, base)
    like = dictionary.encoder
    before = dictionary.encode(base.to(like))
    at = list(range(n_latents) if of.latents is None else of.latents)
    other = None if source is None else dictionary.encode(source.to(like))[..., at]
    after = before.clone()
    after[..., at] = edit.apply(before[..., at], other)
    decoded = dictionary.decode(after)
    if of.error_term:
        return changed(base, decoded - dictionary.decode(before))
    return decoded.to(base)
