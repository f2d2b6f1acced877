"""The sections on how a run is computed and drawn, the same for every kind."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import Field

from interv.spec.base import Section
from interv.spec.conditions import Way, goes_with


class FiguresSection(Section):
    """Which picture files are written."""

    formats: Annotated[list[Literal["png", "svg", "pdf"]], Field(min_length=1)] = Field(
        ["png", "svg"]
    )
    dpi: int = Field(150, ge=30, le=1200)


_SWEEP: Way = {"kind": ["trace", "patch"]}
_FITS: Way = {"kind": ["train-das"], "train.what": ["intervention"]}
_SUFFIX: Way = {"executor": ["auto", "suffix"]}


class RunSection(Section):
    """How it is computed; changes no result beyond the last bits."""

    device: str = Field(
        "auto",
        pattern=r"^(auto|cpu|cuda(:\d+)?|mps)$",
        json_schema_extra=goes_with({"model.device_map": False}),
    )
    threads: int | None = Field(None, ge=1, description="CPU threads; unset: torch's choice")
    memory: str | None = Field(
        None,
        pattern=r"^\d+(\.\d+)? ?[KMG]i?B$",
        description="for activations, such as 1GiB; unset: a quarter of what is free",
        json_schema_extra=goes_with({**_SWEEP, "max_tokens": False}, _FITS),
    )
    max_tokens: int | None = Field(
        None,
        ge=1,
        description="tokens in one forward, about; unset: as many as memory holds",
        json_schema_extra=goes_with(_SWEEP),
    )
    deterministic: bool = Field(
        False, description="torch's deterministic algorithms, or an error where there is none"
    )
    executor: Literal["auto", "suffix", "reference"] = Field(
        "auto",
        description="auto: suffix, which computes only what differs, where it holds",
        json_schema_extra=goes_with(_SWEEP, _FITS),
    )
    on_uncertified: Literal["stop", "reference"] = Field(
        "stop",
        description="what to do where the suffix executor differs from the reference",
        json_schema_extra=goes_with({**_SWEEP, **_SUFFIX}, {**_FITS, **_SUFFIX}),
    )

    @property
    def memory_bytes(self) -> int | None:
        """`memory` as a number."""
        found = re.fullmatch(r"([\d.]+) ?([KMG])(i?)B", self.memory or "")
        if not found:
            return None
        unit = (1024 if found[3] else 1000) ** (1 + "KMG".index(found[2]))
        return int(float(found[1]) * unit)
