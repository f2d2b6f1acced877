"""`interv compare`: two runs against each other."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from interv.cli.console import Console, count
from interv.cli.options import Json, Quiet
from interv.cli.output import out

if TYPE_CHECKING:
    from interv.report.compare import Comparison

EPILOG = "Example: interv compare outputs/rome/1a2b3c4d outputs/rome/5e6f7a8b --tolerance 1e-4"
_MOST = 10  # places and settings that are told

Run = Annotated[Path, typer.Argument(help="A run folder.", show_default=False)]


def compare(
    first: Run,
    second: Run,
    tolerance: Annotated[
        float | None,
        typer.Option("--tolerance", min=0, help="Exit with 1 if a value differs by more."),
    ] = None,
    figure: Annotated[
        Path | None,
        typer.Option("--figure", help="A PNG with both side by side.", show_default=False),
    ] = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Compare two runs: what was asked, what computed them, and the value of every place.

    stdout gets the places of both as CSV, or with --json what differs in numbers.
    """
    from interv.errors import UsageError
    from interv.report.compare import compare as compared
    from interv.report.tables import to_csv

    if figure is not None and figure.suffix != ".png":
        raise UsageError(f"--figure {figure}: expected a name that ends in .png")
    found = compared(first, second)
    told = found.as_dict()
    out(json.dumps(told, indent=1) if as_json else to_csv(found.cells).rstrip("\n"))
    _tell(Console(quiet), found)
    if figure is not None:
        _draw(figure, first, second, found)
    if tolerance is not None and not (
        found.farthest <= tolerance
        and len(found.cells)
        and found.only == (0, 0)
        and not found.unknown
    ):
        raise typer.Exit(1)


def _tell(console: Console, found: Comparison) -> None:
    for what, differences in (("asked", found.asked), ("computed by", found.environment)):
        for key, (one, other) in list(differences.items())[:_MOST]:
            console.say(f"{what} {key}: {one} and {other}")
        if len(differences) > _MOST:
            console.say(f"{what}: {len(differences) - _MOST} more differences")
    if not found.asked:
        console.say("the same was asked of both")
    told = found.as_dict()
    console.say(
        f"{told['places']:,} places in both, {found.only[0]:,} only in the first, "
        f"{found.only[1]:,} only in the second; the largest difference is {found.farthest:.3g}; "
        f"{told['intervals_apart']:,} of {told['intervals_compared']:,} pairs of intervals do not "
        "touch"
    )
    if found.unknown:
        console.say(f"{count(found.unknown, 'place')} with a value in one of the runs only")
    order = found.cells["difference"].abs().sort_values(ascending=False).index
    places = list(found.cells)[: list(found.cells).index("reference")]
    for row in found.cells.loc[order[:_MOST]].to_dict("records"):
        if row["difference"]:
            place = " ".join(str(row[column]) for column in places if str(row[column]))
            console.say(f"  {place}: {row['reference']:.6g} and {row['found']:.6g}")


def _draw(path: Path, first: Path, second: Path, found: Comparison) -> None:
    from interv.errors import UsageError
    from interv.report.reference_figures import side_by_side
    from interv.storage import write_atomically

    if found.cells.empty:
        raise UsageError("--figure: the runs have no place in common")
    title = f"{first} and {second}: at most {found.farthest:.3g} apart"
    write_atomically(path, side_by_side(found.cells, title, (str(first), str(second))))
