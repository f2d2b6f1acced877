"""What will be computed: cells, their ids, packs and cost. Pure, and without torch."""

from interv.plan.cells import Cell, Label, Plan
from interv.plan.cost import Cost, estimate
from interv.plan.packs import ExecutorName, Pack, make_packs
from interv.plan.trace import make_plan

__all__ = [
    "Cell",
    "Cost",
    "ExecutorName",
    "Label",
    "Pack",
    "Plan",
    "estimate",
    "make_packs",
    "make_plan",
]
