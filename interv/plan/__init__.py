"""What will be computed: cells, their ids, packs and cost. Pure, and without torch."""

from typing import cast

from interv.plan.cells import Cell, Plan
from interv.plan.collect import CollectPlan, make_collect_plan
from interv.plan.cost import Cost, estimate, max_tokens
from interv.plan.packs import ExecutorName, Pack, make_packs
from interv.plan.patch import PatchPlan, make_patch_plan
from interv.plan.trace import Label, TracePlan, make_plan
from interv.plan.train import Fit, TrainPlan
from interv.plan.train_make import make_train_plan
from interv.spec import CollectSpec, LoadedSpec, PatchSpec, Spec, TraceSpec, TrainSpec

__all__ = [
    "Cell",
    "CollectPlan",
    "Cost",
    "ExecutorName",
    "Fit",
    "Label",
    "Pack",
    "PatchPlan",
    "Plan",
    "TracePlan",
    "TrainPlan",
    "estimate",
    "make_collect_plan",
    "make_packs",
    "make_patch_plan",
    "make_plan",
    "make_train_plan",
    "max_tokens",
    "plan_of",
]


def plan_of(loaded: LoadedSpec[Spec], *, only_check: bool = False) -> Plan | CollectPlan:
    """Check a spec of any kind against its model's config and tokenizer, and expand it.

    Args:
        loaded: the spec.
        only_check: leave out what only a run needs.

    Raises:
        SpecError: all that is wrong with it.
    """
    if isinstance(loaded.spec, CollectSpec):
        return make_collect_plan(cast(LoadedSpec[CollectSpec], loaded))
    if isinstance(loaded.spec, PatchSpec):
        return make_patch_plan(cast(LoadedSpec[PatchSpec], loaded), only_check=only_check)
    if isinstance(loaded.spec, TrainSpec):
        return make_train_plan(cast(LoadedSpec[TrainSpec], loaded), only_check=only_check)
    return make_plan(cast(LoadedSpec[TraceSpec], loaded), only_check=only_check)
