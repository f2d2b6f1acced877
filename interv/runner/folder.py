"""A run's folder: made before the model loads, locked while in use."""

from __future__ import annotations

import contextlib
import json
import math
import os
import socket
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import psutil
from filelock import FileLock, Timeout

from interv.errors import ResumeError
from interv.storage import write_atomically, writing

LOCK = ".lock"
HOLDER = ".holder"
"""Who holds the lock: beside it, since some systems let nobody read a locked file."""
SET_ASIDE = "-old-"


def run_folder(outputs: Path, name: str, identity: str) -> Path:
    """`outputs/<name>/<first 8 characters of the identity>`."""
    return outputs / name / identity[:8]


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Create the folder and hold it for this process.

    The system drops the lock when the process ends, however it ends.

    Raises:
        StorageError: the folder cannot be written.
        ResumeError: another process holds it.
    """
    lock = FileLock(folder / LOCK, blocking=False)
    holder = folder / HOLDER
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire()
        except Timeout:
            raise ResumeError(
                f"{folder}: in use by {_told(holder)}; wait for it, or stop it"
            ) from None
    try:
        write_atomically(holder, json.dumps({"pid": os.getpid(), "host": socket.gethostname()}))
        yield
    finally:
        with contextlib.suppress(OSError):
            holder.unlink(missing_ok=True)
        lock.release()


def _told(holder: Path) -> str:
    """Return who holds a lock, with its command line where it runs on this machine."""
    try:
        found = json.loads(holder.read_bytes())
    except (OSError, ValueError):
        return "another process"
    shown = ""
    if found["host"] == socket.gethostname():
        with contextlib.suppress(psutil.Error):
            shown = f" ({' '.join(psutil.Process(found['pid']).cmdline())})"
    return f"process {found['pid']} on {found['host']}{shown}"


def json_text(document: Any, indent: int | None = None) -> str:
    """Return JSON in which a number that is not finite, which JSON has not, is null."""
    return json.dumps(_finite(document), indent=indent, allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def set_aside(folder: Path) -> Path | None:
    """Move what a run folder holds into a numbered folder beside it; None if it holds nothing.

    Raises:
        StorageError: it cannot be moved.
    """
    held = [path for path in folder.iterdir() if path.name not in (LOCK, HOLDER)]
    if not held:
        return None
    number = 1
    while (old := folder.with_name(f"{folder.name}{SET_ASIDE}{number}")).exists():
        number += 1
    with writing(old):
        old.mkdir()
        for path in held:
            path.rename(old / path.name)
    return old
