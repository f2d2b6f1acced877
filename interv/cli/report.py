"""`interv report`: a finished run as one page of HTML."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from interv.cli.output import out

EPILOG = "Example: interv report outputs/rome/1a2b3c4d"


def report(
    run: Annotated[
        Path, typer.Argument(help="A run folder: outputs/NAME/IDENTITY.", show_default=False)
    ],
    output: Annotated[
        Path | None,
        typer.Option("--output", help="The page; report.html in the run folder if not given."),
    ] = None,
) -> None:
    """Write a run as one page of HTML that needs nothing else, for any browser, and on paper.

    It is made from the files of the run folder: no model is loaded.
    """
    from interv.report.html.run_page import write_page

    out(str(write_page(run, output)))
