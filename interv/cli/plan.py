"""`interv plan`: what a run would do and cost. It writes nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from interv.cli.options import Json, Outputs, Overrides, Spec

if TYPE_CHECKING:
    from interv.plan import Plan

EPILOG = "Example: interv plan configs/rome.yaml grid.layers=0-11"


def plan(
    spec: Spec,
    overrides: Overrides = None,
    outputs: Outputs = Path("outputs"),
    measure: Annotated[
        bool, typer.Option("--measure", help="Load the model and time one pack.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Show prompts, points, cost and what is done already, without loading the model."""
    from interv.plan import make_plan
    from interv.spec import load_spec

    loaded = load_spec(spec, overrides or ())
    if loaded.spec.kind == "collect":
        from interv.cli.collect import show
        from interv.plan import make_collect_plan

        show(make_collect_plan(loaded), as_json=as_json)
        return
    made = make_plan(loaded)
    show_plan(made, outputs, as_json=as_json, measure=measure)


def show_plan(made: Plan, outputs: Path, *, as_json: bool, measure: bool = False) -> None:
    """Print a plan on stdout."""
    facts = describe(made, outputs)
    if measure:
        facts |= _measured(made, facts)
    if as_json:
        typer.echo(json.dumps(facts, indent=1))
        return
    for line in _lines(facts):
        typer.echo(line)


def describe(made: Plan, outputs: Path) -> dict[str, Any]:
    """The plan's counts, and where each point stands."""
    from interv.plan import estimate
    from interv.runner import journal as journals
    from interv.runner.folder import run_folder

    here: set[str] = set()
    elsewhere: set[str] = set()
    folder = None
    if made.identity is not None:
        folder = run_folder(outputs, made.spec.name, made.identity)
        own = journals.read(folder / journals.JOURNAL)
        ids = {cell.id for cell in made.cells}
        if own is not None:
            here = {i for i in ids if i in own}
        else:
            # A journal takes over what others have only when it begins.
            elsewhere = set(journals.find_elsewhere(folder, ids, None))
    cost = estimate(made, here | elsewhere)
    return {
        "name": made.spec.name,
        "model": made.files.label,
        "folder": str(folder) if folder else None,
        "executor": made.executor,
        **cost.as_dict(),
        "done_here": len(here),
        "done_by_other_runs": len(elsewhere),
        "not_checked": list(made.unchecked),
        "begun": folder is not None and (folder / journals.JOURNAL).is_file(),
    }


def _measured(made: Plan, facts: dict[str, Any]) -> dict[str, Any]:
    from interv.errors import ModelError

    if made.identity is None or not made.cells:
        raise ModelError(f"--measure needs the model: {'; '.join(made.unchecked)}")
    from interv.runner.trace import measure

    load, block_token = measure(made)
    return {
        "seconds_to_load": round(load, 2),
        "seconds_to_go": round(load + block_token * facts["block_tokens"], 2),
    }


def _lines(facts: dict[str, Any]) -> list[str]:
    if not facts["points"]:
        return [
            f"{facts['name']} on {facts['model']}: cannot be counted before the model is at hand",
            *(f"  not checked   {reason}" for reason in facts["not_checked"]),
        ]
    todo = facts["points"] - facts["done"]
    saved = facts["naive_block_tokens"] / facts["block_tokens"] if facts["block_tokens"] else 0.0
    lines = [
        f"{facts['name']} on {facts['model']}",
        f"  folder        {facts['folder'] or 'known once the model is at hand'}",
        f"  prompts       {facts['prompts']:,}"
        " (those whose answer the model does not give are left out, unless data.keep is all)",
        f"  points        {facts['points']:,}, as {facts['rows']:,} rows "
        f"({facts['no_op_rows']:,} of them change nothing)",
        f"  done          {facts['done_here']:,} here, {facts['done_by_other_runs']:,} by other "
        "runs of this name (taken over if made under the same versions)",
        f"  to do         {todo:,}: {_why(facts, todo)}",
        f"  executor      {facts['executor']}: {facts['forwards']:,} forwards",
        f"  block-tokens  {facts['block_tokens']:,} to compute; one forward for each point, "
        f"nothing kept: {facts['naive_block_tokens']:,} ({saved:.2f} times)",
    ]
    memory = facts["memory_bytes"]
    lines.append(
        f"  memory        about {memory / 2**20:,.0f} MiB"
        if memory
        else "  memory        not known"
    )
    if "seconds_to_go" in facts:
        lines.append(
            f"  time          {facts['seconds_to_load']} s to load, about "
            f"{facts['seconds_to_go']} s in all"
        )
    return lines + [f"  not checked   {reason}" for reason in facts["not_checked"]]


def _why(facts: dict[str, Any], todo: int) -> str:
    if not todo:
        return "nothing"
    if facts["begun"]:
        return "the run was stopped before them, or their prompt was left out"
    return "not computed by any run yet" if not facts["done"] else "not in the earlier runs' grids"
