"""`interv train-das`: find where a variable of a causal model lives, and prove it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from interv.cli.options import Fresh, Json, Outputs, Overrides, PlanOnly, Plugin, Quiet, Spec

if TYPE_CHECKING:
    from interv.api import Done
    from interv.cli.console import Console

EPILOG = "Example: interv train-das configs/das_ioi.yaml grid.layers=18-24"


def train(
    spec: Spec,
    overrides: Overrides = None,
    outputs: Outputs = Path("outputs"),
    plan_only: PlanOnly = False,
    fresh: Fresh = False,
    plugin: Plugin = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Train interventions at each place of a grid; accuracy on held-out pairs, with controls.

    The last line on stdout is the run folder. The same command again goes on where it
    stopped.
    """
    from interv.cli.plan import show_plan
    from interv.cli.sweep import carry_out_and_print
    from interv.plan import make_train_plan
    from interv.spec import load_spec

    made = make_train_plan(load_spec(spec, overrides or (), kind="train-das", plugin=plugin))
    if plan_only:
        show_plan(made, outputs, as_json=as_json)
        return

    def tell(console: Console, done: Done) -> None:
        found = done.report.findings
        pairs = ", ".join(f"{n:,} {split}" for split, n in found["pairs"].items())
        console.say(f"task accuracy of the model {found['task_accuracy']:.1%}; {pairs} pairs used")
        for shortage in found["fewer_pairs"]:
            console.say(shortage)
        console.alignments(done.report.summary)

    carry_out_and_print(made, outputs, fresh=fresh, quiet=quiet, as_json=as_json, tell=tell)
