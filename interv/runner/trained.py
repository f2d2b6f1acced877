"""A trained intervention as what a sweep puts at its places."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from torch import nn

from interv.engine import Intervention, Site
from interv.errors import UsageError
from interv.keep import read
from interv.models import ModelFiles


def swaps_of(folder: Path, files: ModelFiles, model: nn.Module) -> Sequence[Intervention]:
    """What a trained intervention exchanges, each basis once.

    Raises:
        UsageError: it was trained on another model, takes no source, or has sites with bases of
            their own, of which none could stand at another site.
    """
    trained = read(folder)
    weights = trained.about.get("weights")
    if weights is not None and weights != files.identity:
        raise UsageError(
            f"intervention.trained: {folder} was trained on {trained.about.get('model')}, of other "
            f"weights than {files.label}"
        )
    at: dict[tuple[Site, str | int | None], list[Intervention]] = defaultdict(list)
    for part in trained.parts:
        at[part.site, part.unit].append(part.intervention)
    found = list(dict.fromkeys(part.intervention for part in trained.parts))
    if any(list(dict.fromkeys(here)) != found for here in at.values()):
        raise UsageError(
            f"intervention.trained: {folder} has {len(at)} sites with bases of their own; expected "
            "one of one site, or of linked sites"
        )
    device = next(model.parameters()).device
    for swap in found:
        if not swap.needs_source:
            raise UsageError(f"intervention.trained: {folder}: {swap.name} takes no source")
        for module in swap.modules().values():
            module.to(device).requires_grad_(False)
    return found
