"""Arguments that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Spec = Annotated[Path, typer.Argument(help="A spec: a YAML file.", show_default=False)]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        help="Values that replace the file's: model.dtype=float64 grid.layers=0-11",
        metavar="[KEY=VALUE]...",
        show_default=False,
    ),
]
Outputs = Annotated[Path, typer.Option("--outputs", "-o", help="Where run folders are made.")]
Fresh = Annotated[
    bool, typer.Option("--fresh", help="Set an earlier run of this spec aside; begin again.")
]
PlanOnly = Annotated[bool, typer.Option("--plan", help="Show what would be done, and stop.")]
Plugin = Annotated[
    list[Path] | None,
    typer.Option(
        "--plugin",
        help="A Python file with metrics and functions of your own; several times for several.",
        show_default=False,
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON on stdout.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Nothing on stderr but errors.")]
