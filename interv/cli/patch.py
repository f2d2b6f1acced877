"""`interv patch`: activation patching, path patching, attribution, circuits."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from interv.cli.options import Fresh, Json, Outputs, Overrides, PlanOnly, Plugin, Quiet, Spec

if TYPE_CHECKING:
    from interv.api import Done
    from interv.cli.console import Console

EPILOG = "Example: interv patch configs/ioi_heads.yaml data.n=16"


def patch(
    spec: Spec,
    overrides: Overrides = None,
    outputs: Outputs = Path("outputs"),
    plan_only: PlanOnly = False,
    fresh: Fresh = False,
    plugin: Plugin = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Put states of one run into another, site by site or path by path; find the circuit.

    The last line on stdout is the run folder. The same command again goes on where it
    stopped.
    """
    from interv.cli.plan import show_plan
    from interv.cli.sweep import carry_out_and_print
    from interv.plan import make_patch_plan
    from interv.spec import load_spec

    made = make_patch_plan(load_spec(spec, overrides or (), kind="patch", plugin=plugin))
    if plan_only:
        show_plan(made, outputs, as_json=as_json)
        return

    def tell(console: Console, done: Done) -> None:
        report = done.report
        console.left_out(report.prompts, "patched")
        console.patches(report.summary, made)
        console.findings(report.findings)

    carry_out_and_print(made, outputs, fresh=fresh, quiet=quiet, as_json=as_json, tell=tell)
