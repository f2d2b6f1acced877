"""`interv collect`: activations to files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from interv.cli.options import Fresh, Json, Outputs, Overrides, PlanOnly, Quiet, Spec
from interv.cli.output import out

if TYPE_CHECKING:
    from interv.plan.collect import CollectPlan

EPILOG = "Example: interv collect configs/collect.yaml grid.layers=0-3"


def collect(
    spec: Spec,
    overrides: Overrides = None,
    outputs: Outputs = Path("outputs"),
    plan_only: PlanOnly = False,
    fresh: Fresh = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Save activations of prompts as safetensors, with an index of what each row is.

    The last line on stdout is the run folder.
    """
    from interv.api import with_model
    from interv.plan.collect import make_collect_plan
    from interv.spec import load_spec

    made = make_collect_plan(load_spec(spec, overrides or (), kind="collect"))
    if plan_only:
        show(made, as_json=as_json)
        return
    made = with_model(made)
    folder = _run(made, outputs, fresh=fresh, quiet=quiet)
    out(json.dumps({"folder": str(folder), **describe(made)}) if as_json else str(folder))


def _run(made: CollectPlan, outputs: Path, *, fresh: bool, quiet: bool) -> Path:
    from interv.api import carry_out_collect
    from interv.cli.console import Console, count

    console = Console(quiet)
    console.say(
        f"{made.files.label}, {made.spec.model.dtype}: {count(len(made.texts), 'prompt')}, "
        f"{count(made.n_rows, 'row')} of {count(len(made.wanted), 'tensor')}"
    )
    try:
        with console.progress() as progress:
            folder, computed = carry_out_collect(
                made, outputs, fresh=fresh, progress=progress, say=console.say
            )
    except KeyboardInterrupt:
        console.say("stopped: finished files are kept; the same command goes on from there")
        raise
    if not computed:
        console.say("nothing was left to compute")
    return folder


def show(made: CollectPlan, *, as_json: bool) -> None:
    """Print a plan on stdout."""
    facts = describe(made)
    if as_json:
        out(json.dumps(facts, indent=1))
        return
    out(f"{facts['name']} on {facts['model']}")
    out(f"  prompts       {facts['prompts']:,}, {facts['rows']:,} rows")
    out(f"  tensors       {facts['tensors']:,}: {', '.join(facts['components'])}")
    size = facts["bytes"]
    out(f"  on disk       {f'about {size / 2**20:,.1f} MiB' if size else 'not known'}")
    for reason in facts["not_checked"]:
        out(f"  not checked   {reason}")


def describe(made: CollectPlan) -> dict[str, Any]:
    """The plan's counts."""
    return {
        "name": made.spec.name,
        "model": made.files.label,
        "prompts": len(made.texts),
        "rows": made.n_rows,
        "tensors": len(made.wanted),
        "components": list(dict.fromkeys(wanted.component for wanted in made.wanted)),
        "bytes": made.n_bytes,
        "not_checked": list(made.unchecked),
    }
