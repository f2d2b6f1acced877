"""`interv validate`: everything that can be checked without weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from interv.cli.options import Json, Plugin, Quiet
from interv.cli.output import err, out

EPILOG = "Example: interv validate configs/*.yaml"


def validate(
    files: Annotated[list[Path], typer.Argument(help="Specs.", show_default=False)],
    plugin: Plugin = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Check specs against the schema, and against their models' config and tokenizer."""
    from interv.errors import SpecError, UsageError
    from interv.plan import Plan, plan_of
    from interv.spec import load_spec

    reports: list[dict[str, Any]] = []
    for path in files:
        try:
            plan = plan_of(load_spec(path, plugin=plugin), only_check=True)
        except SpecError as error:
            problems = [_as_dict(p) for p in error.problems]
            reports.append({"file": str(path), "valid": False, "problems": problems})
            err(str(error))
        except UsageError as error:
            reports.append(
                {"file": str(path), "valid": False, "problems": [{"message": str(error)}]}
            )
            err(str(error))
        else:
            notes = plan.notes if isinstance(plan, Plan) else []
            report = {"file": str(path), "valid": True, "not_checked": list(plan.unchecked)}
            reports.append({**report, "notes": notes})
            if not quiet:
                err(f"{path}: valid")
                for note in notes:
                    err(f"  note: {note}")
                for reason in plan.unchecked:
                    err(f"  not checked: {reason}")
    if as_json:
        out(json.dumps(reports, indent=1))
    wrong = sum(not report["valid"] for report in reports)
    if wrong:
        if not quiet and len(files) > 1:
            err(f"{wrong} of {len(files)} specs are not valid")
        raise typer.Exit(2)


def _as_dict(problem: Any) -> dict[str, Any]:
    mark = problem.mark
    return {
        "file": mark.source if mark else None,
        "line": mark.line if mark else None,
        "column": mark.column if mark else None,
        "message": problem.message,
        "expected": problem.expected,
        "near": problem.near,
    }
