"""Every kind of sweep, by its plan."""

from __future__ import annotations

from typing import Any

from interv.plan import PatchPlan, Plan, TrainPlan
from interv.runner.patch_steps import PATCH
from interv.runner.sweep import Kind
from interv.runner.trace import TRACE
from interv.runner.train import TRAIN


def kind_of(plan: Plan) -> Kind[Any]:
    """How a plan is run."""
    if isinstance(plan, TrainPlan):
        return TRAIN
    return PATCH if isinstance(plan, PatchPlan) else TRACE
