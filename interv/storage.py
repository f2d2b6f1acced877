"""Files and folders that appear whole or not at all, whoever else writes beside them."""

from __future__ import annotations

import contextlib
import hashlib
import os
import platform
import re
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import psutil

from interv.errors import StorageError


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn the operating system's refusal to write into an error that says what to do.

    Raises:
        StorageError: whatever is written inside cannot be.
    """
    try:
        yield
    except OSError as error:
        raise StorageError(
            f"{path}: cannot be written: {error.strerror or error}. What was computed before is "
            "kept; make room or choose another folder, and run the same command again"
        ) from error


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """Yield an open file whose content replaces `path` at the end, or leave `path` as it is.

    The file has an unpredictable name and is created, never opened: a link of that name is not
    followed, and two writers of one path do not meet.

    Raises:
        OSError: it cannot be written.
    """
    _sweep(path)
    fresh = _fresh(path)
    descriptor = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        with os.fdopen(descriptor, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        fresh.replace(path)
    except BaseException:
        fresh.unlink(missing_ok=True)
        raise


def write_atomically(path: Path, content: str | bytes) -> None:
    """Replace a file's content, or leave it as it was.

    Raises:
        StorageError: it cannot be written.
    """
    with writing(path), replacing(path) as file:
        file.write(content.encode() if isinstance(content, str) else content)


@contextlib.contextmanager
def replacing_folder(path: Path) -> Iterator[Path]:
    """Yield an empty folder that takes the name `path` at the end, or leave `path` as it is.

    Only one process at a time may replace a folder: call it under a lock.

    Raises:
        OSError: it cannot be written.
    """
    _sweep(path)
    fresh = _fresh(path)
    fresh.mkdir()
    try:
        yield fresh
        if path.exists():
            shutil.rmtree(path)
        fresh.rename(path)
    except BaseException:
        shutil.rmtree(fresh, ignore_errors=True)
        raise


def copied(source: Path, target: Path) -> bool:
    """Copy a folder, whole or not at all; return False where it is not there.

    Raises:
        StorageError: it cannot be written.
    """
    if target.is_dir() or not source.is_dir():
        return target.is_dir()
    with writing(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        with replacing_folder(target) as fresh:
            shutil.copytree(source, fresh, dirs_exist_ok=True)
    return True


def _host() -> str:
    """This machine, in eight characters: process ids mean nothing on another one."""
    return hashlib.sha256(platform.node().encode()).hexdigest()[:8]


def _stem(path: Path) -> str:
    # A name may be as long as the file system allows; what is added to it must fit too.
    return f".{path.name[:80]}."


def _fresh(path: Path) -> Path:
    return path.with_name(f"{_stem(path)}{_host()}-{os.getpid()}-{secrets.token_hex(4)}.tmp")


def _sweep(path: Path) -> None:
    """Remove what processes that are no longer there left unfinished of `path`."""
    ours = re.compile(re.escape(f"{_stem(path)}{_host()}-") + r"(\d+)-[0-9a-f]{8}\.tmp")
    with contextlib.suppress(FileNotFoundError):  # the folder itself may not be there yet
        for entry in os.scandir(path.parent):
            matched = ours.fullmatch(entry.name)
            if matched and not psutil.pid_exists(int(matched[1])):
                _remove(Path(entry.path))


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
