"""The journal: an append-only file of finished packs, from which every result is made.

One JSON document a line. The first holds what the run started with; each further one the
records of one pack, whole. A line cut short by a kill is dropped and its pack runs again.
A record is `{metric: [value of each draw]}`, under the id of what it is the value of.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from interv.errors import ResumeError, StorageError
from interv.runner.folder import SET_ASIDE
from interv.storage import write_atomically, writing

JOURNAL = "journal.jsonl"
Record = dict[str, Any]


@dataclass
class Journal:
    """The records of one run folder, in memory and on disk."""

    path: Path
    environment: Mapping[str, Any]
    notes: Mapping[str, Any]
    adopted: dict[str, Record] = field(default_factory=dict)
    records: dict[str, Record] = field(default_factory=dict)

    def __contains__(self, key: str) -> bool:
        return key in self.records or key in self.adopted

    def __getitem__(self, key: str) -> Record:
        return self.records[key] if key in self.records else self.adopted[key]

    def append(self, records: Mapping[str, Record]) -> None:
        """Add one pack's records: on disk, whole, before this returns.

        Raises:
            StorageError: they could not be written; the file is as it was before.
        """
        line = json.dumps({"records": records}) + "\n"
        with writing(self.path), self.path.open("ab") as file:
            before = file.tell()
            try:
                file.write(line.encode())
                file.flush()
                os.fsync(file.fileno())
            except OSError:
                file.truncate(before)
                raise
        self.records.update(records)


def begin(
    path: Path,
    environment: Mapping[str, Any],
    notes: Mapping[str, Any],
    adopted: Mapping[str, Record],
) -> Journal:
    """Write a new journal that starts with records computed by other runs.

    Args:
        path: the journal.
        environment: what may change the last bits; see `record.environment`.
        notes: what the run found out before its first pack.
        adopted: records of other runs.
    """
    head = {"environment": environment, "notes": notes, "adopted": adopted}
    write_atomically(path, json.dumps(head) + "\n")
    return Journal(path, environment, notes, dict(adopted))


def read(path: Path, *, repair: bool = False) -> Journal | None:
    """Read a journal; None where there is none.

    Args:
        path: the journal.
        repair: cut off a last line that was not written whole. Only its owner may.

    Raises:
        ResumeError: a line other than the last is damaged.
    """
    try:
        raw = path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise StorageError(f"{path}: cannot be read: {error.strerror}") from error
    whole = raw.rfind(b"\n") + 1
    if whole == 0:
        return None
    if repair and whole < len(raw):
        with writing(path):
            os.truncate(path, whole)
    journal: Journal | None = None
    for number, line in enumerate(raw[:whole].splitlines(), start=1):
        try:
            entry = json.loads(line)
            if journal is None:
                journal = Journal(path, entry["environment"], entry["notes"], entry["adopted"])
            else:
                journal.records.update(entry["records"])
        except (ValueError, KeyError, TypeError):
            raise ResumeError(
                f"{path}:{number}: the journal is damaged; `--fresh` sets this run aside and "
                "begins again"
            ) from None
    return journal


def difference(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """What differs between two environments, in words."""
    keys = list(dict.fromkeys([*old, *new]))
    return [f"{k} {old.get(k)} -> {new.get(k)}" for k in keys if old.get(k) != new.get(k)]


def find_elsewhere(
    folder: Path, wanted: set[str], environment: Mapping[str, Any] | None
) -> dict[str, tuple[Record, Path]]:
    """Records of these ids in the journals of sibling folders, and which folder.

    Args:
        folder: the run's own folder, whose journal is not read.
        wanted: ids.
        environment: only journals made under this one; any when None.
    """
    found: dict[str, tuple[Record, Path]] = {}
    for path in sorted(folder.parent.glob(f"*/{JOURNAL}")):
        # A run set aside by --fresh was set aside for a reason.
        aside = SET_ASIDE in path.parent.name
        if path.parent == folder or aside or not wanted - found.keys():
            continue
        try:
            other = read(path)
        except ResumeError:
            continue  # its own command will say so
        if other is None or (
            environment is not None and difference(other.environment, environment)
        ):
            continue
        for records in (other.adopted, other.records):
            found.update({k: (records[k], path.parent) for k in wanted & records.keys()})
    return found
