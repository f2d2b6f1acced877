"""The page of a run, made from its folder's files alone."""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from interv.report.certificate import in_words
from interv.report.html.citations import commands, overrides, own_citation, papers
from interv.report.html.folder import Row, RunFolder, image_size, number, read_folder
from interv.report.html.grid import level_of
from interv.report.html.headline import headline
from interv.report.html.maps import Group, map_groups
from interv.report.html.notes import warnings
from interv.report.html.page import render
from interv.report.html.prompts import prompt_views
from interv.report.html.view import TableView, table_view
from interv.version import __version__

_KINDS = {
    "trace": "Causal trace",
    "patch": "Activation patching",
    "train-das": "Distributed alignment search",
    "collect": "Activations",
}
_ASKED = {
    "trace": "Corrupt the subject, restore one state at a time, see which bring the answer back.",
    "patch": "Exchange activations between a clean and a corrupted run, see what it changes.",
    "train-das": "Train interventions that exchange a variable of a causal model, see where the "
    "language model then answers as the causal model does.",
    "collect": "Save the activations of prompts.",
}
_DRAWN_ANEW = (
    ("trace", ("trace", "average")),
    ("patch", ("heads_", "layers_", "attribution_heads_", "attribution_layers_", "direct_heads")),
    ("train-das", ("iia_",)),
)
_TABLES = {
    "attribution": "Attribution beside exact patching",
    "decomposition": "Direct logit attribution, and the logit lens",
    "scores": "Scores of the circuit",
    "nodes": "Nodes, with what they send",
}
_SHOWN = {
    "interv", "kind", "identity", "model", "seed", "environment", "sessions", "draw_seeds",
    "circuit", "attribution_against_patching", "paths_against_direct_logit_attribution",
    "tensors", "plugin", "notes",
}  # fmt: skip
_IMAGES = {
    "lines": "Lines with intervals",
    "top": "The largest effects",
    "attribution_against_patching": "Attribution against exact patching",
    "attribution_lines": "Attribution, lines with intervals",
    "direct_top": "The largest direct attributions",
    "faithfulness": "Faithfulness of circuits of each size",
    "patterns": "Attention patterns",
    "rank": "Accuracy over the rank",
    "iia": "Accuracy and its controls",
    "reference": "Reference, reproduced, and their difference",
}
_PROMPTS_OPEN = 6
_LARGEST_IMAGE = 3_000_000


@dataclass(frozen=True)
class Image:
    """A figure of the folder; `data` is the whole of it."""

    title: str
    file: str
    alt: str
    width: int
    height: int
    data: str


def write_page(run: Path, output: Path | None = None) -> Path:
    """Write the page of a run folder.

    Args:
        run: the folder.
        output: the page; `report.html` in the folder without it.

    Raises:
        UsageError: no run folder, or its run has not finished.
        StorageError: a file cannot be read or written.
    """
    from interv.storage import write_atomically

    page = run_page(read_folder(run))
    path = run / "report.html" if output is None else output
    write_atomically(path, page)
    return path


def run_page(run: RunFolder) -> str:
    """The page as text; the same folder gives the same page."""
    groups = map_groups(run)
    images, too_large = _images(run, groups)
    rows = run.table("prompts.csv")
    prompts = prompt_views(run)
    return render(
        "run.html",
        version=__version__,
        run=run,
        kind=_KINDS[run.kind],
        asked=_ASKED[run.kind],
        facts=list(_facts(run)),
        sentences=headline(run),
        warnings=warnings(run),
        overrides=overrides(run),
        groups=groups,
        images=images,
        too_large=too_large,
        claims=[_claim(row) for row in run.table("reference.csv")],
        tables=list(_tables(run)),
        statistics=list(_statistics(run)),
        prompts=prompts,
        prompts_total=len(rows),
        prompts_open=_PROMPTS_OPEN,
        splits=table_view("Pairs", "prompts.csv", rows) if rows and not prompts else None,
        record=_record(run),
        packages=_packages(run),
        files=run.files(),
        papers=papers(run),
        citation=own_citation(run),
        commands=commands(run),
    )


def _facts(run: RunFolder) -> Iterator[str]:
    record = run.record
    yield f"{run.model}, {record['model']['dtype']}"
    if points := int(record.get("points", 0)):
        yield _counted(points, "fit" if run.kind == "train-das" else "point")
    # Of vectors, a row of the table is a split.
    if not (run.kind == "train-das" and "pairs_used" in (run.table("prompts.csv") or [{}])[0]):
        yield _counted(int(record["prompts"]), "pair" if run.kind == "train-das" else "prompt")
    yield duration(sum(float(session.get("seconds", 0)) for session in run.sessions))
    yield f"on {record['environment']['device']}"
    yield f"interv {record['interv']}"


def _counted(count: int, noun: str) -> str:
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def duration(seconds: float) -> str:
    """`32 s`, `4 min 10 s`, `2 h 5 min`."""
    if seconds < 60:
        return f"{seconds:.3g} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60} h {minutes % 60} min"


def _images(run: RunFolder, groups: list[Group]) -> tuple[list[Image], list[str]]:
    """Figures that are not drawn anew, and the names of those that are too large."""
    anew = dict(_DRAWN_ANEW).get(run.kind, ()) if groups else ()
    images, too_large = [], []
    for path in run.figures():
        if path.stem.startswith(anew) and not path.stem.startswith("trace_lines"):
            continue
        content = path.read_bytes()
        if len(content) > _LARGEST_IMAGE:
            too_large.append(f"figures/{path.name}")
            continue
        width, height = image_size(content, path)
        media = "image/svg+xml" if path.suffix == ".svg" else "image/png"
        data = f"data:{media};base64,{base64.b64encode(content).decode()}"
        title = _image_title(path.stem)
        alt = f"Figure: {title}, of {run.name} on {run.model}."
        beside = path.with_suffix(".csv")
        if beside.is_file():
            alt += f" Its values are in figures/{beside.name}."
        images.append(Image(title, f"figures/{path.name}", alt, width, height, data))
    return images, too_large


def _image_title(stem: str) -> str:
    """What a figure is called: `Lines: block output recovery`."""
    for prefix, words in _IMAGES.items():
        if stem.startswith(prefix):
            rest = stem.removeprefix(prefix).strip("_").replace("_", " ")
            return f"{words}: {rest}" if rest else words
    return stem.replace("_", " ").capitalize()


def _claim(row: Row) -> dict[str, str]:
    words = {
        "holds": "✓ holds",
        "missed": "✗ missed",
        "noted": "○ missed, noted",
        "outside": "– not in this grid",
    }
    found = row.get("told") or row["found"]
    return {**row, "word": words[row["verdict"]], "found": found}


def _tables(run: RunFolder) -> Iterator[tuple[str, TableView]]:
    """Tables to be shown, and their names."""

    names = {"summary": "A row for each place and metric"}
    for name, title in (names | _TABLES).items():
        rows = run.table(f"{name}.csv")
        if rows:
            size = next((column for column in ("mean", "attribution") if column in rows[0]), None)
            yield name, table_view(title, f"{name}.csv", rows, size)
    if run.kind == "collect":
        yield "index", table_view("A line for each row of the tensors", "index.csv",
                                  run.table("index.csv"))  # fmt: skip


def _statistics(run: RunFolder) -> Iterator[str]:
    rows = run.table("summary.csv")
    if not rows:
        return
    level = level_of(run)
    counts = sorted({int(number(row["n"])) for row in rows})
    n = f"{counts[0]:,}" if len(counts) == 1 else f"{counts[0]:,} to {counts[-1]:,}"
    if run.kind == "train-das":
        seeds = max(int(row["seeds"]) for row in rows)
        yield (
            f"mean is over {_counted(seeds, 'seed')}"
            + (", sd their standard deviation, best the highest of them" if seeds > 1 else "")
            + f"; the interval is Wilson's (95 %), over n = {n} held-out pairs."
        )
        yield "Accuracies are from 0 to 1. Those called iia_… are the controls of iia at its place."
        return
    over = rows[0]["over"]
    base = rows[0].get("relative_to") or "corrupted"
    known = sum(math.isfinite(number(row["ci_low"])) for row in rows)
    statistics: Mapping[str, Any] = run.resolved.get("statistics") or {}
    resamples = int(statistics.get("resamples", 2000))
    yield (
        f"value, clean and corrupted are means over {over}; mean is that of the effect, which is "
        f"value − {base} on the same {over}; n = {n} {over}."
    )
    if known:
        yield (
            f"ci_low and ci_high are the ends of a {level} interval of the mean effect, a "
            f"bootstrap-t that is nowhere narrower than Student's t ({resamples:,} resamples of "
            f"{over}, seed {run.record['seed']}), for {known:,} of {len(rows):,} rows; sem is its "
            "standard error. An effect that lives in few of the "
            f"{over} and shows in none of those drawn is not covered."
        )
    else:
        yield f"sem is the standard error of the mean effect over {over}; no row has an interval."
    if over == "draws":
        yield (
            "These are draws of noise on one prompt: how sure the effect is on this prompt, and "
            "nothing of how it would be on another."
        )
    if statistics.get("test"):
        yield (
            "p is of a two-sided sign-flip permutation test over prompts that the mean effect is "
            f"zero ({int(statistics['permutations']):,} permutations, or all there are); p_holm "
            "is corrected for all places of its metric."
        )


def _record(run: RunFolder) -> list[tuple[str, list[tuple[str, str]]]]:
    """The record in parts, each with names and values."""
    record = run.record
    asked = [("identity", record["identity"]), ("kind", run.kind), ("interv", record["interv"])]
    asked += [(key, _said(value)) for key, value in record.items() if key not in _SHOWN]
    seeds = [("seed", _said(record["seed"]))]
    if draws := record.get("draw_seeds"):
        first = list(draws.items())[:8]
        more = f", and {len(draws) - 8} more in run.json" if len(draws) > 8 else ""
        text = ", ".join(f"prompt {prompt}: {seed}" for prompt, seed in first)
        seeds.append(("seeds of the draws", text + more))
    parts = [
        ("Run", asked),
        ("Seeds", seeds),
        ("Model", [(key, _said(value)) for key, value in record["model"].items()]),
        ("Environment", [(key, _said(value)) for key, value in record["environment"].items()]),
    ]
    sessions = run.sessions
    for i, session in enumerate(sessions, start=1):
        title = "Session" if len(sessions) == 1 else f"Session {i} of {len(sessions)}"
        parts.append((title, list(_session(session))))
    return [
        (title, [(name.replace("_", " "), text) for name, text in lines]) for title, lines in parts
    ]


def _session(session: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    if "seconds" in session:
        yield "time", duration(float(session["seconds"]))
    if "peak_memory_bytes" in session:
        yield "peak memory", f"{session['peak_memory_bytes'] / 2**20:,.0f} MiB"
    if certificate := session.get("certificate"):
        yield "certificate", in_words(certificate)
    if git := session.get("git"):
        yield "git", git["commit"] + (", with changes not committed" if git["dirty"] else "")
    else:
        yield "git", "none"
    known = {"seconds", "peak_memory_bytes", "certificate", "git", "packages", "command"}
    for key, value in session.items():
        if key not in known:
            yield key, _said(value)


def _said(value: Any) -> str:
    """A value of the record, for people."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if value is None:
        return "none"
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, list | dict):
        return json.dumps(value, ensure_ascii=False)
    return str(value)


def _packages(run: RunFolder) -> str:
    packages = run.sessions[-1].get("packages", {}) if run.sessions else {}
    return "\n".join(f"{name}=={version}" for name, version in packages.items())
