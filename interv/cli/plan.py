"""`interv plan`: what a run would do and cost. It writes nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from interv.cli.options import Json, Outputs, Overrides, Plugin, Spec
from interv.cli.output import out

if TYPE_CHECKING:
    from interv.plan import Plan, TrainPlan

EPILOG = "Example: interv plan configs/rome.yaml grid.layers=0-11"


def plan(
    spec: Spec,
    overrides: Overrides = None,
    outputs: Outputs = Path("outputs"),
    measure: Annotated[
        bool, typer.Option("--measure", help="Load the model and time one pack.")
    ] = False,
    plugin: Plugin = None,
    as_json: Json = False,
) -> None:
    """Show prompts, points, cost and what is done already, without loading the model."""
    from interv.plan import CollectPlan, plan_of
    from interv.spec import load_spec

    made = plan_of(load_spec(spec, overrides or (), plugin=plugin))
    if isinstance(made, CollectPlan):
        from interv.cli.collect import show

        show(made, as_json=as_json)
        return
    show_plan(made, outputs, as_json=as_json, measure=measure)


def show_plan(made: Plan, outputs: Path, *, as_json: bool, measure: bool = False) -> None:
    """Print a plan on stdout."""
    from interv.errors import UsageError
    from interv.plan import TrainPlan

    if isinstance(made, TrainPlan):
        if measure:
            raise UsageError("--measure times points of a sweep; fits are told as they go")
        fitted = describe_fits(made, outputs)
        out(json.dumps(fitted, indent=1) if as_json else _fit_lines(fitted))
        return
    facts = describe(made, outputs)
    if measure:
        facts |= _measured(made, facts)
    if as_json:
        out(json.dumps(facts, indent=1))
        return
    for line in _lines(facts):
        out(line)


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
        "also": parts_of(made),
        "notes": made.notes,
        "done_here": len(here),
        "done_by_other_runs": len(elsewhere),
        "not_checked": list(made.unchecked),
        "begun": folder is not None and (folder / journals.JOURNAL).is_file(),
    }


def describe_fits(made: TrainPlan, outputs: Path) -> dict[str, Any]:
    """The fits of a train-das plan, and which of them are done."""
    from interv.plan.train import SPLITS
    from interv.runner import journal as journals
    from interv.runner.folder import run_folder

    folder = run_folder(outputs, made.spec.name, made.identity) if made.identity else None
    own = journals.read(folder / journals.JOURNAL) if folder else None
    train = made.spec.train
    return {
        "name": made.spec.name,
        "model": made.files.label,
        "folder": str(folder) if folder else None,
        "causal_model": made.causal.name,
        "variables": list(made.spec.variables),
        "pairs": {split: len(made.pairs[split]) or made.size(split) for split in SPLITS},
        "fewer_pairs": made.shortages,
        "points": len(made.fits),
        "places": len(made.places),
        "seeds": list(train.seeds),
        "fits_on_shuffled_labels": len(made.shuffled),
        "epochs": train.epochs,
        "batch": train.batch * train.accumulate,
        "done_here": sum(fit.id in own for fit in made.fits) if own else 0,
        "not_checked": list(made.unchecked),
    }


def _fit_lines(facts: dict[str, Any]) -> str:
    pairs = ", ".join(f"{n:,} {split}" for split, n in facts["pairs"].items())
    lines = [
        f"{facts['name']} on {facts['model']}",
        f"  folder        {facts['folder'] or 'known once the model is at hand'}",
        f"  exchanged     {', '.join(facts['variables'])} of {facts['causal_model']}",
        f"  pairs         {pairs}",
        *(f"                {shortage}" for shortage in facts["fewer_pairs"]),
        f"  fits          {facts['points']:,}: {facts['places']:,} places, seeds "
        f"{', '.join(map(str, facts['seeds']))}; {facts['fits_on_shuffled_labels']:,} more on "
        "shuffled labels",
        f"  each          {facts['epochs']:,} epochs, {facts['batch']:,} pairs a step",
        f"  done          {facts['done_here']:,}",
    ]
    lines += [f"  not checked   {reason}" for reason in facts["not_checked"]]
    return "\n".join(lines)


def parts_of(made: Plan) -> list[str]:
    """What a patch spec asks for besides the points, in words."""
    from interv.plan import PatchPlan

    if not isinstance(made, PatchPlan) or not made.pairs:
        return []
    spec, n = made.spec, len(made.pairs)
    parts = [f"{spec.intervention.type} over {made.groups}"] if made.groups else []
    if spec.attribution:
        steps = 1 if spec.attribution.method == "gradient" else spec.attribution.steps
        parts.append(
            f"attribution of {len(made.places):,} places: {n * steps:,} forwards with gradients"
        )
    if spec.decompose:
        parts.append(f"direct logit attribution and logit lens: {n:,} forwards")
    if spec.circuit:
        steps = 1 if spec.circuit.method == "eap" else spec.circuit.steps
        sizes = len(spec.circuit.fractions)
        parts.append(
            f"edge attribution: {n * steps:,} forwards with gradients; circuits of {sizes} sizes "
            f"by two rankings, {spec.circuit.knockouts:,} sets of nodes knocked out"
        )
    return parts


def _measured(made: Plan, facts: dict[str, Any]) -> dict[str, Any]:
    from interv.errors import ModelError

    if made.identity is None or not made.cells:
        reason = "; ".join(made.unchecked) or "the spec has no grid whose points could be timed"
        raise ModelError(f"--measure: {reason}")
    from interv.runner.kinds import kind_of
    from interv.runner.sweep import measure

    load, block_token = measure(made, kind_of(made))
    return {
        "seconds_to_load": round(load, 2),
        "seconds_to_go": round(load + block_token * facts["block_tokens"], 2),
    }


def _lines(facts: dict[str, Any]) -> list[str]:
    if not facts["points"] and not facts["also"]:
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
    lines += [f"  and           {part}" for part in facts["also"]]
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
    lines += [f"  note          {note}" for note in facts["notes"]]
    return lines + [f"  not checked   {reason}" for reason in facts["not_checked"]]


def _why(facts: dict[str, Any], todo: int) -> str:
    if not todo:
        return "nothing"
    if facts["begun"]:
        return "the run was stopped before them, or their prompt was left out"
    return "not computed by any run yet" if not facts["done"] else "not in the earlier runs' grids"
