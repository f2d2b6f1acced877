"""`interv trace`: causal tracing."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from interv.cli.options import Fresh, Json, Outputs, Overrides, PlanOnly, Quiet, Spec

if TYPE_CHECKING:
    from interv.api import Done
    from interv.cli.console import Console

EPILOG = "Example: interv trace configs/rome.yaml grid.layers=0-11 corrupt.samples=5"


def trace(
    spec: Spec,
    overrides: Overrides = None,
    outputs: Outputs = Path("outputs"),
    plan_only: PlanOnly = False,
    fresh: Fresh = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Corrupt the subject, restore one state at a time, see which bring the answer back.

    The last line on stdout is the run folder. The same command again goes on where it
    stopped.
    """
    from interv.cli.plan import show_plan
    from interv.cli.sweep import carry_out_and_print
    from interv.plan import make_plan
    from interv.report.corruption import corruption
    from interv.spec import load_spec

    made = make_plan(load_spec(spec, overrides or (), kind="trace"))
    if plan_only:
        show_plan(made, outputs, as_json=as_json)
        return

    def tell(console: Console, done: Done) -> None:
        report = done.report
        console.left_out(report.prompts, "traced")
        console.top(report.summary, made)
        traced = report.prompts.loc[report.prompts["traced"], ["p_clean", "p_corrupted"]]
        console.warn(corruption(traced.to_numpy().tolist()).warning)

    carry_out_and_print(made, outputs, fresh=fresh, quiet=quiet, as_json=as_json, tell=tell)
