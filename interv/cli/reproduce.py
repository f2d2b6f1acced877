"""`interv reproduce`: specs with a reference, run and compared."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from interv.cli.console import VERDICTS, Console, add_row, count, titled
from interv.cli.options import Fresh, Json, Outputs, Plugin, Quiet
from interv.cli.output import out

if TYPE_CHECKING:
    from interv.reproduce.outcome import Outcome
    from interv.reproduce.update import Change

EPILOG = "Example: interv reproduce configs/default_model --junit outputs/reproduce.xml"
PAGE = "reproduce.html"
_STATUS = {
    "reproduced": "reproduced",
    "missed": "MISSED",
    "failed": "FAILED",
    "not run": "not run",
}
_MOST_CHANGES = 12


def reproduce(
    specs: Annotated[
        list[Path] | None,
        typer.Argument(help="Specs, or folders of them.", show_default=False, metavar="[SPEC]..."),
    ] = None,
    every: Annotated[
        bool, typer.Option("--all", help="Every spec below configs/ that has a reference.")
    ] = False,
    outputs: Outputs = Path("outputs"),
    download: Annotated[
        bool, typer.Option("--download", help="Fetch hub models that are not on this machine.")
    ] = False,
    fresh: Fresh = False,
    plugin: Plugin = None,
    html: Annotated[
        Path | None,
        typer.Option("--html", help=f"The page; without, OUTPUTS/{PAGE}.", show_default=False),
    ] = None,
    junit: Annotated[
        Path | None, typer.Option("--junit", help="JUnit XML for CI.", show_default=False)
    ] = None,
    update: Annotated[
        bool,
        typer.Option("--update", help="Show how references differ from what was found, and ask."),
    ] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask before --update writes.")] = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Run specs that have a reference, compare, and fail where a claim no longer holds.

    What cannot be run is validated and planned as far as its files allow, and listed with the
    reason. stdout gets the page's path. Exit codes: 0 all that was run holds, 1 a claim was
    missed or a run failed, 2 a spec is wrong.
    """
    from interv.errors import UsageError
    from interv.reproduce.outcome import exit_code
    from interv.reproduce.specs import ALL, find_specs

    if every == bool(specs):
        raise UsageError("interv reproduce: name specs or folders, or say --all (not both)")
    if update and not yes and not sys.stdin.isatty():
        raise UsageError("--update asks before it writes; say --yes where nobody can answer")
    if every and not ALL.is_dir():
        raise UsageError(f"--all: there is no folder {ALL}/ here; name specs or folders")
    page = html or outputs / PAGE
    if junit is not None and junit.resolve() == page.resolve():
        raise UsageError(f"--junit and the page are both {page}")
    for path in (page, *([junit] if junit else ())):
        if path.is_dir():
            raise UsageError(f"{path}: is a folder; name a file in it")
    paths = find_specs([ALL] if every else specs or [])
    # Now, and not after an hour of runs.
    _make_folders(page, junit)
    console = Console(quiet)
    outcomes = _run(paths, outputs, console, download=download, fresh=fresh, plugin=plugin)
    _write(outcomes, page, junit)
    _tell(console, outcomes)
    if as_json:
        out(json.dumps([outcome.as_dict() for outcome in outcomes], indent=1))
    else:
        out(str(page))
    if update:
        _update(console, outcomes, plugin=plugin, yes=yes)
    raise typer.Exit(exit_code(outcomes))


def _run(
    paths: list[Path],
    outputs: Path,
    console: Console,
    *,
    download: bool,
    fresh: bool,
    plugin: Sequence[Path] | None,
) -> list[Outcome]:
    from interv.reproduce.run import reproduce as run_one

    outcomes = []
    for i, path in enumerate(paths, start=1):
        console.say(f"[{i}/{len(paths)}] {path}")
        with console.progress() as progress:
            outcome = run_one(
                path, outputs, download=download, fresh=fresh, plugin=plugin, progress=progress,
                say=console.say,
            )  # fmt: skip
        outcomes.append(outcome)
        console.say(f"  {_in_words(outcome)}")
    return outcomes


def _in_words(outcome: Outcome) -> str:
    if outcome.status in ("failed", "not run"):
        told = f"{_STATUS[outcome.status]}: {outcome.reason}"
        return f"{told}\n  {outcome.checked}" if outcome.checked else told
    holding = sum(verdict.holds for verdict in outcome.verdicts)
    return (
        f"{_STATUS[outcome.status]}: {holding} of {count(outcome.claims, 'claim')} hold, "
        f"{outcome.seconds:.0f} s, {outcome.folder}"
    )


def _tell(console: Console, outcomes: list[Outcome]) -> None:
    """Every claim in one table, and a last line that says how it stands."""
    table = titled("claims")
    for name in ("spec", "claim", "found", "wanted", "verdict"):
        table.add_column(name, overflow="fold", no_wrap=name in ("spec", "verdict"))
    for outcome in outcomes:
        for verdict in outcome.verdicts:
            texts = (outcome.label, verdict.claim, verdict.told, verdict.wanted)
            add_row(table, *texts, VERDICTS[verdict.word])
    if table.row_count:
        console.show(table)
    n = {word: sum(outcome.status == word for outcome in outcomes) for word in _STATUS}
    told = [f"{n[word]} {word}" for word in _STATUS if n[word]]
    console.say(f"{count(len(outcomes), 'spec')}: {', '.join(told)}")


def _make_folders(page: Path, junit: Path | None) -> None:
    from interv.storage import writing

    for path in (page, *([junit] if junit else ())):
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)


def _write(outcomes: list[Outcome], page: Path, junit: Path | None) -> None:
    from interv.reproduce.junit import junit as as_junit
    from interv.reproduce.page import page_of
    from interv.storage import write_atomically

    _make_folders(page, junit)
    write_atomically(page, page_of(outcomes, page.parent))
    if junit is not None:
        write_atomically(junit, as_junit(outcomes))


def _update(
    console: Console, outcomes: list[Outcome], *, plugin: Sequence[Path] | None, yes: bool
) -> None:
    from interv.reproduce.update import changes, write_changes

    for outcome in outcomes:
        if not outcome.verdicts:
            continue
        found = changes(outcome.spec, outcome.verdicts, plugin)
        if not found:
            console.say(f"{outcome.spec}: its numbers are what was found")
            continue
        for change in sorted(found, key=_apart)[:_MOST_CHANGES]:
            console.say(f"  {change.file}:{change.line}: {change.claim}: {change.words}")
        if len(found) > _MOST_CHANGES:
            console.say(f"  and {len(found) - _MOST_CHANGES:,} more")
        files = ", ".join(str(file) for file in dict.fromkeys(change.file for change in found))
        if yes or typer.confirm(f"Write {count(len(found), 'number')} into {files}?", err=True):
            write_changes(found)
            console.say(f"written: {files}")


def _apart(change: Change) -> float:
    return -abs(change.after - change.before)
