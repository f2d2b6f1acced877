"""Two runs against each other: what was asked, what computed them, and every place of both."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from interv.errors import StorageError, UsageError, nearest
from interv.report.write import RECORD
from interv.spec.yaml import read_file

MEASURES = (
    "value", "clean", "corrupted", "mean", "relative_to", "over", "n", "sem", "ci_low", "ci_high",
    "no_interval",    "p", "p_holm", "sd", "best", "seeds",
)  # fmt: skip
"""Columns of summary.csv that are measured; all others say of what."""
_OURS = ("reference", "figures", "run", "name")
"""Sections of a spec that change no result."""


@dataclass(frozen=True)
class Comparison:
    """What differs between two runs.

    Attributes:
        asked: `section.key` of the resolved specs, and what each of the runs has.
        environment: the same of versions, device and threads.
        cells: the places of both: their columns, `reference` (the first run's), `found` (the
            second's), `difference`, and `apart`: whether their intervals do not touch (None
            where one has none).
        only: how many places only the first, and only the second has.
    """

    asked: dict[str, tuple[Any, Any]]
    environment: dict[str, tuple[Any, Any]]
    cells: pd.DataFrame
    only: tuple[int, int]

    @property
    def farthest(self) -> float:
        """The largest difference; 0 where the runs share no place."""
        known = self.cells["difference"].abs().dropna()
        return float(known.max()) if len(known) else 0.0

    @property
    def unknown(self) -> int:
        """How many places have a value in one of the runs only."""
        return int((self.cells["reference"].isna() != self.cells["found"].isna()).sum())

    def as_dict(self) -> dict[str, Any]:
        """Everything but the single cells."""
        apart = self.cells["apart"].dropna()
        return {
            "asked": {k: list(v) for k, v in self.asked.items()},
            "environment": {k: list(v) for k, v in self.environment.items()},
            "places": len(self.cells),
            "only_in_first": self.only[0],
            "only_in_second": self.only[1],
            "only_one_has_a_value": self.unknown,
            "largest_difference": self.farthest,
            "intervals_apart": int(apart.sum()),
            "intervals_compared": len(apart),
        }


def compare(first: Path, second: Path) -> Comparison:
    """Compare two run folders.

    Raises:
        UsageError: one is no finished run, or they are of different kinds.
        StorageError: a file of one is damaged.
    """
    runs = [_read(folder) for folder in (first, second)]
    kinds = [record["kind"] for _, record, _ in runs]
    if kinds[0] != kinds[1]:
        raise UsageError(f"{first} is a run of {kinds[0]}, {second} of {kinds[1]}: nothing to join")
    (asked, record, table), (asked_too, record_too, table_too) = runs
    cells, only = _joined(table, table_too)
    return Comparison(
        _differences(_flat(asked), _flat(asked_too)),
        _differences(record.get("environment", {}), record_too.get("environment", {})),
        cells,
        only,
    )


def _read(folder: Path) -> tuple[Mapping[str, Any], dict[str, Any], pd.DataFrame]:
    missing = [n for n in ("summary.csv", RECORD, "resolved.yaml") if not (folder / n).is_file()]
    if missing:
        parent = folder.parent if folder.parent.is_dir() else Path()
        near = nearest(folder.name, [p.name for p in parent.iterdir() if p.is_dir()])
        hint = f"; did you mean {parent / near}?" if near and near != folder.name else ""
        raise UsageError(
            f"{folder}: is no finished run of a sweep ({missing[0]} is not there){hint}"
        )
    data = read_file(folder / "resolved.yaml").data
    if not isinstance(data, dict):
        raise StorageError(f"{folder / 'resolved.yaml'}: is damaged: it is no mapping")
    asked = {k: v for k, v in data.items() if k not in _OURS}
    try:
        record = json.loads((folder / RECORD).read_text("utf-8"))
        record["kind"]
    except (ValueError, KeyError, TypeError) as error:
        raise StorageError(f"{folder / RECORD}: is damaged: {error!r}") from error
    return asked, record, _table(folder / "summary.csv")


def _table(path: Path) -> pd.DataFrame:
    """A run's summary: places as text, and numbers."""
    try:
        table = pd.read_csv(path, dtype=object, keep_default_na=False)
        for column in table.columns.intersection(["value", "mean", "ci_low", "ci_high"]):
            table[column] = pd.to_numeric(table[column])
    except ValueError as error:  # pandas' own are too
        raise StorageError(f"{path}: is damaged: {error}") from error
    if not {"metric", "mean"} <= set(table.columns):
        raise StorageError(f"{path}: is damaged: it has no column 'metric' or 'mean'")
    return table


def _flat(value: object, at: str = "") -> dict[str, object]:
    """A nested mapping as one of dotted keys."""
    if isinstance(value, dict):
        pairs: Iterator[tuple[object, object]] = iter(value.items())
    elif isinstance(value, list):
        pairs = iter(enumerate(value))
    else:
        return {at: value}
    found: dict[str, object] = {}
    for key, below in pairs:
        found |= _flat(below, f"{at}.{key}" if at else str(key))
    return found


def _differences(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    keys = dict.fromkeys([*first, *second])
    return {k: (first.get(k), second.get(k)) for k in keys if first.get(k) != second.get(k)}


def _joined(first: pd.DataFrame, second: pd.DataFrame) -> tuple[pd.DataFrame, tuple[int, int]]:
    places = [c for c in first.columns if c not in MEASURES]
    other = [c for c in second.columns if c not in MEASURES]
    if set(places) != set(other):
        raise UsageError(f"the runs' places have other columns: {places} and {other}")
    number = "value" if "value" in first.columns and "value" in second.columns else "mean"
    both = first.merge(second, on=places, how="outer", indicator=True, suffixes=("", "_second"))
    only = tuple(int((both["_merge"] == side).sum()) for side in ("left_only", "right_only"))
    both = both[both["_merge"] == "both"]
    cells = both[places].reset_index(drop=True)

    def column(name: str) -> pd.Series[float]:
        empty = pd.Series("", index=both.index)
        return pd.to_numeric(both.get(name, empty)).reset_index(drop=True).astype(float)

    cells["reference"], cells["found"] = column(number), column(f"{number}_second")
    cells["difference"] = cells["found"] - cells["reference"]
    low, high = column("ci_low"), column("ci_high")
    low_too, high_too = column("ci_low_second"), column("ci_high_second")
    apart = ((low > high_too) | (low_too > high)).astype(object)
    cells["apart"] = apart.where(low.notna() & low_too.notna(), None)
    return cells, (only[0], only[1])
