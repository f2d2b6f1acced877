"""`reproduce.html`: each claim with its verdict, its source, the command and the record."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from interv.report.claims import Verdict
from interv.report.html.charts import HeatMap
from interv.report.html.page import render
from interv.report.reference_figures import Panel, panels_of
from interv.report.write import RECORD
from interv.reproduce.outcome import Outcome
from interv.version import __version__

_WORDS = {
    "holds": "✓ holds",
    "missed": "✗ missed",
    "noted": "missed, noted",
    "outside": "not in grid",
}
_COUNTED = {
    "holds": "hold",
    "missed": "missed",
    "noted": "missed and noted",
    "outside": "not in grid",
}
_TONES = {"reproduced": "holds", "missed": "missed", "failed": "missed", "not run": "noted"}
_STATUS = {
    "reproduced": "reproduced",
    "missed": "a claim is missed",
    "failed": "failed",
    "not run": "not run",
}


def page_of(outcomes: Sequence[Outcome], at: Path) -> str:
    """The page as HTML.

    Args:
        outcomes: of every spec.
        at: the folder that the page will be in, from which run folders are linked.
    """
    verdicts = [verdict for outcome in outcomes for verdict in outcome.verdicts]
    return render(
        "reproduce.html",
        version=__version__,
        specs=[_spec(i, outcome, at) for i, outcome in enumerate(outcomes)],
        counts=_counts([o.status for o in outcomes], _STATUS),
        claims=_counts([v.word for v in verdicts], _COUNTED),
        seconds=sum(outcome.seconds for outcome in outcomes),
    )


def _counts(found: Sequence[str], words: dict[str, str]) -> list[tuple[str, str, int]]:
    return [(key, word, found.count(key)) for key, word in words.items() if key in found]


def _spec(i: int, outcome: Outcome, at: Path) -> dict[str, Any]:
    return {
        "id": f"spec-{i}",
        "label": outcome.label,
        "tone": _TONES[outcome.status],
        "outcome": outcome,
        "status": _STATUS[outcome.status],
        "holding": sum(verdict.holds for verdict in outcome.verdicts),
        "claims": [{"verdict": v, "word": _WORDS[v.word]} for v in outcome.verdicts],
        "figures": [
            {"claim": v, "panels": list(_maps(v))} for v in outcome.verdicts if v.cells is not None
        ],
        "folder": os.path.relpath(outcome.folder, at) if outcome.folder else None,
        "record": _record(outcome.folder) if outcome.folder else [],
    }


def _record(folder: Path) -> list[tuple[str, str]]:
    """What of a run's record says by what it was computed."""
    record = json.loads((folder / RECORD).read_text("utf-8"))
    environment, last = record["environment"], record["sessions"][-1]
    git = last.get("git") or {}
    shown = {
        "identity": record["identity"],
        "model": f"{record['model']['label']}, {record['model']['dtype']}",
        "weights": record["model"]["weights"],
        "seed": record["seed"],
        "executor": environment["executor"],
        "versions": ", ".join(
            f"{name} {environment[name]}" for name in ("interv", "python", "torch", "transformers")
        ),
        "device": f"{environment['device']}, {environment['threads']} threads",
        "commit": f"{git['commit']}{', with changes' if git['dirty'] else ''}" if git else "",
        "computed in": f"{last['seconds']} s" if "seconds" in last else "",
    }
    return [(name, str(value)) for name, value in shown.items() if value not in ("", None)]


def _maps(verdict: Verdict) -> Iterator[list[HeatMap]]:
    """Reference, reproduced and their difference, for each picture of a claim."""
    assert verdict.cells is not None
    for panel in panels_of(verdict.cells):
        yield _side_by_side(panel)


def _side_by_side(panel: Panel) -> list[HeatMap]:
    low, high, centred = panel.scale
    colours = "diverging" if centred else "purple"
    far = panel.farthest
    pictures = (
        ("reference", panel.reference, low, high, colours, "the reference's values"),
        ("reproduced", panel.found, low, high, colours, "the same scale"),
        ("difference", panel.difference, -far, far, "difference", "reproduced less reference"),
    )
    return [
        HeatMap(
            f"{panel.title}: {name}" if panel.title else name,
            panel.rows,
            panel.columns,
            values,
            panel.row_title,
            panel.column_title,
            bottom,
            top,
            scale,
            bar,
            compact=True,
        )
        for name, values, bottom, top, scale, bar in pictures
    ]
