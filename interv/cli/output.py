"""Lines on stdout (data) and stderr (people); what steers a terminal is escaped in both."""

from __future__ import annotations

import typer

from interv.text import printable


def out(text: str = "", *, end: str = "\n") -> None:
    """Print a line of data on stdout."""
    typer.echo(printable(text) + end, nl=False)


def err(text: str) -> None:
    """Print a line for people on stderr."""
    typer.echo(printable(text), err=True)
