"""Versions of a package whose forward is known to be wrong for a type of model. No torch.

A row is added where it was measured; `tests/test_known_faults.py` measures each again.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from packaging.specifiers import SpecifierSet

from interv.errors import ModelError

DEFAULT_ATTENTION = "sdpa"
"""What transformers takes where a model supports it and nothing else is asked for."""


@dataclass(frozen=True)
class Fault:
    """One wrong forward.

    Attributes:
        package: whose versions are wrong.
        versions: which of them, as a PEP 440 specifier.
        model_types: as `config.json` names them.
        attention: the attention implementation that is wrong.
        field: of the config; where it is null, nothing is left out.
        what: goes wrong.
        right: an attention implementation that is right in all versions.
    """

    package: str
    versions: str
    model_types: frozenset[str]
    attention: str
    field: str
    what: str
    right: str


FAULTS = (
    # Against `eager` on random models the logits are off by 0.3 (Gemma 2), 0.6 (VaultGemma) and
    # 1.0 (T5Gemma) of the largest; measured in 5.14.0 and 5.20.2. From 5.21 on it is refused.
    Fault(
        "transformers",
        "<5.21",
        frozenset({"gemma2", "t5gemma", "vaultgemma"}),
        "sdpa",
        "attn_logit_softcapping",
        "leaves out the soft-capping of the attention scores",
        "eager",
    ),
)


def known_faults(config: Mapping[str, Any]) -> list[tuple[Fault, str]]:
    """Return the faults of the installed versions in a model, with the type that has each.

    Args:
        config: the content of `config.json`; the models within it (`text_config`) count too.
    """
    return [
        (fault, str(part["model_type"]))
        for fault in FAULTS
        if SpecifierSet(fault.versions).contains(_installed(fault.package), prereleases=True)
        for part in _parts(config)
        if part["model_type"] in fault.model_types and part.get(fault.field, "unset") is not None
    ]


def refuse_known_faults(config: Mapping[str, Any], attention: str | None) -> None:
    """Refuse a model that the installed versions compute wrongly.

    Args:
        config: as in `known_faults`.
        attention: the attention implementation; None for the default.

    Raises:
        ModelError: says what is wrong and both ways out of it.
    """
    for fault, model_type in known_faults(config):
        if (attention or DEFAULT_ATTENTION) == fault.attention:
            raise ModelError(
                f"model.attn_implementation: {_sentence(fault, model_type)}; set it to "
                f"{fault.right}, or leave those versions: pip install "
                f"'{fault.package}>={fault.versions.removeprefix('<')}'"
            )


def avoided_faults(config: Mapping[str, Any] | None) -> list[str]:
    """Return the faults that a model has here under another attention, in words for the record."""
    return [_sentence(fault, model_type) for fault, model_type in known_faults(config or {})]


def _sentence(fault: Fault, model_type: str) -> str:
    package = f"{fault.package} {_installed(fault.package)}"
    return f"{package} computes {model_type} wrongly with {fault.attention}: it {fault.what}"


def _installed(package: str) -> str:
    return importlib.metadata.version(package)


def _parts(config: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """Yield the configs in a config, itself first."""
    if "model_type" in config:
        yield config
    for value in config.values():
        if isinstance(value, Mapping):
            yield from _parts(value)
