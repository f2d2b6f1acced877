"""`interv trace`: causal tracing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from interv.cli.options import Fresh, Json, Outputs, Overrides, Quiet, Spec

if TYPE_CHECKING:
    from interv.plan import Plan
    from interv.report.write import Report
    from interv.runner.journal import Journal

EPILOG = "Example: interv trace configs/rome.yaml grid.layers=0-11 corrupt.samples=5"


def trace(
    spec: Spec,
    overrides: Overrides = None,
    outputs: Outputs = Path("outputs"),
    plan_only: Annotated[
        bool, typer.Option("--plan", help="Show what would be done, and stop.")
    ] = False,
    fresh: Fresh = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Corrupt the subject, restore one state at a time, see which bring the answer back.

    The last line on stdout is the run folder. The same command again goes on where it
    stopped.
    """
    from interv.api import with_model
    from interv.cli.plan import show_plan
    from interv.plan import make_plan
    from interv.spec import load_spec

    loaded = load_spec(spec, overrides or (), kind="trace")
    made = make_plan(loaded)
    if plan_only:
        show_plan(made, outputs, as_json=as_json)
        return
    report, folder = _run(with_model(made), outputs, fresh=fresh, quiet=quiet)
    if as_json:
        typer.echo(json.dumps(_summary(report, folder)))
    else:
        typer.echo(str(folder))
    if any(verdict.fails_run for verdict in report.verdicts):
        raise typer.Exit(1)


def _run(made: Plan, outputs: Path, *, fresh: bool, quiet: bool) -> tuple[Report, Path]:
    from interv.api import carry_out
    from interv.cli.console import Console, count
    from interv.runner.folder import run_folder

    assert made.identity is not None
    console = Console(quiet)
    console.say(
        f"{made.files.label}, {made.spec.model.dtype}: {count(len(made.prompts), 'prompt')}, "
        f"{count(len(made.cells), 'point')} of {count(made.draws, 'row')}"
    )
    try:
        with console.progress() as progress:
            done = carry_out(made, outputs, fresh=fresh, progress=progress, say=console.say)
    except KeyboardInterrupt:
        console.say(_interrupted(made, run_folder(outputs, made.spec.name, made.identity)))
        raise
    if not done.computed:
        console.say("nothing was left to compute")
    _tell(console, made, done.report, done.folder, done.journal)
    return done.report, done.folder


def _interrupted(made: Plan, folder: Path) -> str:
    from interv.runner import journal as journals

    journal = journals.read(folder / journals.JOURNAL)
    done = sum(cell.id in journal for cell in made.cells) if journal else 0
    return (
        f"stopped: {done:,} of {len(made.cells):,} points are kept in {folder}; the same command "
        "goes on from there"
    )


def _tell(console: Any, made: Plan, report: Report, folder: Path, journal: Journal) -> None:
    left_out = report.prompts[~report.prompts["traced"]]
    if len(left_out):
        console.say(
            f"{len(left_out)} of {len(report.prompts)} prompts left out, the model's top answer "
            "not being theirs: see prompts.csv"
        )
    if journal.adopted:
        console.say(f"{len(journal.adopted):,} values were taken over from earlier runs")
    console.top(report.summary, made)
    console.verdicts(report.verdicts)
    console.say(f"{len(report.figures)} figure files in {folder / 'figures'}")


def _summary(report: Report, folder: Path) -> dict[str, Any]:
    return {
        "folder": str(folder),
        "prompts": len(report.prompts),
        "traced": int(report.prompts["traced"].sum()),
        "figures": [str(folder / "figures" / name) for name in report.figures],
        "reference": [verdict.as_dict() for verdict in report.verdicts],
        "summary": json.loads(report.summary.to_json(orient="records", double_precision=15)),
    }
