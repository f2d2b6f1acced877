"""What the commands that run a sweep have in common: run, tell, print."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from interv.cli.console import Console
from interv.cli.output import out

if TYPE_CHECKING:
    from interv.api import Done
    from interv.plan import Plan

Tell = Callable[[Console, "Done"], None]


def carry_out_and_print(
    made: Plan, outputs: Path, *, fresh: bool, quiet: bool, as_json: bool, tell: Tell
) -> None:
    """Run a plan, print the folder or JSON on stdout, then describe the results on stderr.

    Raises:
        Exit: with 1 where a claim of the reference was missed.
    """
    from interv.api import with_model
    from interv.runner.folder import json_text

    console = Console(quiet)
    done = _run(with_model(made), outputs, console, fresh=fresh)
    # Before anything is described: a finished run does not depend on its description.
    out(json_text(_summary(done)) if as_json else str(done.folder))
    _describe(console, done, tell)
    if any(verdict.fails_run for verdict in done.report.verdicts):
        raise typer.Exit(1)


def _run(made: Plan, outputs: Path, console: Console, *, fresh: bool) -> Done:
    from interv.api import carry_out
    from interv.runner.folder import run_folder

    assert made.identity is not None
    console.say(f"{made.files.label}, {made.spec.model.dtype}: {made.headline}")
    for note in made.notes:
        console.say(f"note: {note}")
    try:
        with console.progress() as progress:
            done = carry_out(made, outputs, fresh=fresh, progress=progress, say=console.say)
    except KeyboardInterrupt:
        console.say(_interrupted(made, run_folder(outputs, made.spec.name, made.identity)))
        raise
    return done


def _describe(console: Console, done: Done, tell: Tell) -> None:
    if not done.computed:
        console.say("nothing was left to compute")
    if done.journal.adopted:
        console.say(f"{len(done.journal.adopted):,} values were taken over from earlier runs")
    tell(console, done)
    if done.report.certificate:
        from interv.report.certificate import TOLD, shares

        for told in shares(done.report.certificate, TOLD):
            console.say(f"{told}: by so much may the two executors differ in rounding")
    console.verdicts(done.report.verdicts)
    if unshown := done.report.unshown:
        console.say(
            f"no installed font has {unshown[:20]}{'…' if len(unshown) > 20 else ''}: figures show "
            "· for them until one is installed (Noto Sans CJK has Chinese, Japanese and Korean)"
        )
    console.say(f"{len(done.report.figures)} figure files in {done.folder / 'figures'}")


def _interrupted(made: Plan, folder: Path) -> str:
    from interv.runner import journal as journals

    journal = journals.read(folder / journals.JOURNAL)
    done = sum(cell.id in journal for cell in made.cells) if journal else 0
    return (
        f"stopped: {done:,} of {len(made.cells):,} points are kept in {folder}; the same command "
        "goes on from there"
    )


def _summary(done: Done) -> dict[str, Any]:
    report = done.report
    return {
        "folder": str(done.folder),
        "prompts": len(report.prompts),
        report.used: int(report.prompts[report.used].sum()),
        "figures": [str(done.folder / "figures" / name) for name in report.figures],
        "certificate": report.certificate,
        "reference": [verdict.as_dict() for verdict in report.verdicts],
        **report.findings,
        "summary": json.loads(report.summary.to_json(orient="records", double_precision=15)),
    }
