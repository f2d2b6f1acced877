"""A recognised model's components, kept in the journal: tables are made without the model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from interv.engine import LoadedModel
from interv.models.anatomy import Anatomy
from interv.models.families import Family, Stand
from interv.plan import Plan
from interv.runner.journal import Journal


def recognised(model: LoadedModel) -> dict[str, Any]:
    """Return what the journal notes of a model outside the table; nothing of others."""
    family, facts = model.anatomy.family, model.anatomy.facts
    if family is None or facts is None or facts.family is not None:
        return {}
    return {"recognised": asdict(family)}


def anatomy_of_run(plan: Plan, journal: Journal) -> Anatomy:
    """Return where the components of a run's model stand, by the table or by the journal."""
    assert plan.facts is not None
    family = plan.facts.family
    if family is None and "recognised" in journal.notes:
        told: Mapping[str, Any] = journal.notes["recognised"]
        stands = {
            part: {name: Stand(**stand) for name, stand in told[part].items()}
            for part in ("components", "layerless")
        }
        family = Family(**{**told, **stands, "model_types": tuple(told["model_types"])})
    return Anatomy(family, plan.facts, plan.files.config or {})
