"""A run's folder: made before the model loads, locked while in use, written atomically."""

from __future__ import annotations

import contextlib
import fcntl
import json
import math
import os
import shutil
import socket
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from interv.errors import ResumeError, StorageError
from interv.models.cache import writing

LOCK = ".lock"
SET_ASIDE = "-old-"


def run_folder(outputs: Path, name: str, identity: str) -> Path:
    """`outputs/<name>/<first 8 characters of the identity>`."""
    return outputs / name / identity[:8]


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Create the folder and hold it for this process.

    The kernel drops the lock when the process ends, however it ends.

    Raises:
        StorageError: the folder cannot be written.
        ResumeError: another process holds it.
    """
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    with os.fdopen(descriptor, "r+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ResumeError(
                f"{folder}: in use by {_holder(file.read())}; wait for it, or stop it"
            ) from None
        with writing(folder):
            file.seek(0)
            file.truncate()
            json.dump({"pid": os.getpid(), "host": socket.gethostname()}, file)
            file.flush()
        yield


def _holder(text: str) -> str:
    try:
        holder = json.loads(text)
    except ValueError:
        return "another process"
    pid = holder["pid"]
    command = Path(f"/proc/{pid}/cmdline")
    shown = ""
    if command.is_file():
        shown = (
            " (" + command.read_bytes().replace(b"\0", b" ").decode(errors="replace").strip() + ")"
        )
    return f"process {pid} on {holder['host']}{shown}"


def json_text(document: Any, indent: int | None = None) -> str:
    """Return JSON in which a number that is not finite, which JSON has not, is null."""
    return json.dumps(_finite(document), indent=indent, allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_atomically(path: Path, content: str | bytes) -> None:
    """Replace a file's content, or leave it as it was.

    Raises:
        StorageError: it cannot be written.
    """
    fresh = path.with_name(f".{path.name}.tmp")
    data = content.encode() if isinstance(content, str) else content
    try:
        with writing(path):
            with fresh.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            fresh.replace(path)
    except StorageError:
        with contextlib.suppress(OSError):
            fresh.unlink(missing_ok=True)
        raise


def copied(source: Path, target: Path) -> bool:
    """Copy a folder, whole or not at all; False where it is not there.

    Raises:
        StorageError: it cannot be written.
    """
    if target.is_dir() or not source.is_dir():
        return target.is_dir()
    fresh = target.with_name(f".{target.name}.tmp")
    with writing(target):
        if fresh.is_dir():
            shutil.rmtree(fresh)
        shutil.copytree(source, fresh)
        fresh.rename(target)
    return True


def set_aside(folder: Path) -> Path | None:
    """Move what a run folder holds into a numbered folder beside it; None if it holds nothing.

    Raises:
        StorageError: it cannot be moved.
    """
    held = [path for path in folder.iterdir() if path.name != LOCK]
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
