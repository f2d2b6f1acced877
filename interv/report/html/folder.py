"""A run folder as a page reads it: its files alone, as text."""

from __future__ import annotations

import csv
import functools
import hashlib
import io
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from interv.errors import StorageError, UsageError, nearest

Row = Mapping[str, str]
RECORD, RESOLVED = "run.json", "resolved.yaml"
COMMANDS = {"trace", "patch", "train-das", "collect"}
_DEEP, _NAMED = 3, 8  # folders below a wrong one that are looked at, and named
_HASHED = (".yaml", ".json", ".csv", ".jsonl")
_RECORDED = ("kind", "identity", "interv", "model", "seed", "environment", "sessions")
_COLUMNS = {
    "summary.csv": ("component", "layer", "metric", "mean", "n"),
    "prompts.csv": (),
    "reference.csv": ("claim", "found", "verdict", "wanted"),
}
_NUMBERS = ("value", "clean", "corrupted", "mean", "n", "sem", "ci_low", "ci_high")
_NEVER = ("", "nan", "None")


@dataclass(frozen=True)
class File:
    """A file of the folder; of what is large there is no hash."""

    name: str
    size: int
    sha256: str


@dataclass(frozen=True)
class RunFolder:
    """A finished run.

    Attributes:
        path: of the folder.
        record: run.json.
        spec: as it was written.
        resolved: with every default, as data and as text.
    """

    path: Path
    record: Mapping[str, Any]
    spec: str
    resolved: Mapping[str, Any]
    resolved_text: str

    @property
    def kind(self) -> str:
        return str(self.record["kind"])

    @property
    def name(self) -> str:
        return str(self.resolved["name"])

    @property
    def model(self) -> str:
        return str(self.record["model"]["label"])

    @property
    def sessions(self) -> list[Mapping[str, Any]]:
        """Each time a command computed something."""
        return list(self.record["sessions"])

    def has(self, name: str) -> bool:
        return (self.path / name).is_file()

    def table(self, name: str) -> list[Row]:
        """The rows of a CSV file; none where it is not there."""
        return _rows(self.path / name)

    def figures(self) -> list[Path]:
        """Each figure once, as SVG where there is one."""
        found: dict[str, Path] = {}
        for suffix in ("png", "svg"):
            for path in sorted((self.path / "figures").glob(f"*.{suffix}")):
                found[path.stem] = path
        return [found[stem] for stem in sorted(found)]

    def files(self) -> list[File]:
        """What the folder holds, but for pages and hidden files."""
        paths = [path for path in sorted(self.path.iterdir()) if path.is_file()]
        return [
            File(path.name, path.stat().st_size, _sha256(path) if path.suffix in _HASHED else "")
            for path in paths
            if not path.name.startswith(".") and path.suffix != ".html"
        ]


def read_folder(path: Path) -> RunFolder:
    """Read a run folder.

    Raises:
        UsageError: it is not there, is no run folder, or its run has not finished.
        StorageError: a file of it cannot be read.
    """
    if not (path / RESOLVED).is_file():
        raise UsageError(_no_run(path))
    resolved_text = _text(path / RESOLVED)
    try:
        resolved = yaml.safe_load(resolved_text)
    except yaml.YAMLError as error:
        raise StorageError(f"{path / RESOLVED}: is damaged: {error}") from error
    if not isinstance(resolved, dict) or resolved.get("kind") not in COMMANDS:
        raise UsageError(f"{path / RESOLVED}: is not of a run")
    if not (path / RECORD).is_file():
        outputs = path.resolve().parent.parent
        raise UsageError(
            f"{path}: this run has not finished. The same command again goes on where it stopped; "
            f"without it: interv {resolved['kind']} {path / RESOLVED} -o {outputs}"
        )
    try:
        record = json.loads(_text(path / RECORD))
    except ValueError as error:
        raise StorageError(f"{path / RECORD}: is damaged: {error}") from error
    missing = [name for name in _RECORDED if not isinstance(record, dict) or name not in record]
    if missing or record["kind"] != resolved["kind"]:
        what = f"no '{missing[0]}'" if missing else f"its kind is not that of {RESOLVED}"
        raise StorageError(f"{path / RECORD}: is damaged: {what}")
    run = RunFolder(path, record, _text(path / "spec.yaml"), resolved, resolved_text)
    _check_tables(run)
    return run


def _check_tables(run: RunFolder) -> None:
    """That what every page shows is there, and is of numbers where it must be."""
    for name, columns in _COLUMNS.items():
        path = run.path / name
        if not path.is_file():
            if run.kind == "collect" or name == "reference.csv":
                continue
            raise StorageError(f"{path}: is not there; run the same command again to write it")
        there = next(csv.reader(io.StringIO(_text(path), newline="")), [])
        if name == "prompts.csv" and run.kind in ("trace", "patch"):
            columns = ("prompt_id",)
        for column in columns if there or name != "reference.csv" else ():
            if column not in there:
                raise StorageError(f"{path}: is damaged: it has no column '{column}'")
    for i, row in enumerate(run.table("summary.csv"), start=1):
        try:
            for column in _NUMBERS:
                number(row.get(column))
        except ValueError as error:
            raise StorageError(f"{run.path}/summary.csv: is damaged: row {i}: {error}") from error


def _no_run(path: Path) -> str:
    """What is wrong with a path, and which run folders are near it."""
    if path.is_file():
        return f"{path}: is a file; name a run folder, such as {path.resolve().parent}"
    if path.is_dir():
        found = _run_folders(path)
        there = f"; there are {_listed(found)}" if found else ", and there is none in it"
        return f"{path}: is no run folder{there}"
    above = next(parent for parent in path.parents if parent.is_dir())
    found = _run_folders(above)
    near = nearest(str(path), [str(folder) for folder in found])
    told = f"; did you mean '{near}'?" if near else f"; there are {_listed(found)}" if found else ""
    return f"{path}: no such folder{told}"


def _run_folders(path: Path) -> list[Path]:
    """Run folders below, the latest first."""
    found = {
        record.parent
        for depth in range(1, _DEEP + 1)
        for record in path.glob("/".join(["*"] * depth + [RESOLVED]))
    }
    return sorted(found, key=lambda folder: (-(folder / RESOLVED).stat().st_mtime, str(folder)))


def _listed(folders: Sequence[Path]) -> str:
    more = f" and {len(folders) - _NAMED} more" if len(folders) > _NAMED else ""
    return ", ".join(str(folder) for folder in folders[:_NAMED]) + more


def _text(path: Path) -> str:
    try:
        return path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise StorageError(f"{path}: cannot be read: {error}") from error


@functools.lru_cache(maxsize=16)
def _parsed(path: Path, _changed: int) -> list[Row]:
    csv.field_size_limit(1 << 30)
    return list(csv.DictReader(io.StringIO(_text(path), newline="")))


def _rows(path: Path) -> list[Row]:
    return _parsed(path, path.stat().st_mtime_ns) if path.is_file() else []


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def number(text: str | None) -> float:
    """A cell as a number; NaN where it is empty."""
    return math.nan if text is None or text in _NEVER else float(text)


def whole(text: str | None) -> int | None:
    """A cell as a whole number; None where it is empty."""
    return None if text is None or text in _NEVER else int(float(text))


def is_true(text: str) -> bool:
    return text == "True"


def image_size(content: bytes, path: Path) -> tuple[int, int]:
    """Width and height of a figure in pixels of a screen, 96 to the inch."""
    if path.suffix == ".svg":
        head = content[:4000].decode("utf-8", "replace")
        sizes = [re.search(rf'\b{side}="([\d.]+)pt"', head) for side in ("width", "height")]
        if not all(sizes):
            raise StorageError(f"{path}: is no SVG of matplotlib's; take it out of the folder")
        width, height = (round(float(size[1]) * 96 / 72) for size in sizes if size)
        return width, height
    # PNG: the header's width and height, and its resolution in pixels per metre.
    width, height = (int.from_bytes(content[at : at + 4]) for at in (16, 20))
    at = content.find(b"pHYs")
    per_metre = int.from_bytes(content[at + 4 : at + 8]) if at > 0 else 3780
    scale = 96 / 0.0254 / per_metre
    return round(width * scale), round(height * scale)
