"""The cache folder: files made once from other files, checked each time they are read."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from interv.errors import StorageError

MANIFEST = "manifest.json"


def cache_folder() -> Path:
    """`$INTERV_CACHE`, or `interv` in the user's cache folder."""
    if chosen := os.environ.get("INTERV_CACHE"):
        return Path(chosen).expanduser()
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "interv"


def file_hash(path: Path) -> str:
    """SHA-256 of a file, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def text_hash(text: str) -> str:
    """SHA-256 of a text, in hex."""
    return hashlib.sha256(text.encode()).hexdigest()


def cached(key: str, build: Callable[[Path], None]) -> Path:
    """The folder `key` of the cache, built by `build` if it is not there or is damaged.

    `build` gets an empty folder and fills it. The folder appears under its name whole or not
    at all; every file's hash is in its manifest and is compared before the folder is returned.

    Raises:
        StorageError: the cache folder cannot be written, or the disk is full.
    """
    target = cache_folder() / key
    if _intact(target):
        return target
    with writing(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        fresh = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}-"))
        try:
            build(fresh)
            hashes = {p.name: file_hash(p) for p in sorted(fresh.iterdir())}
            (fresh / MANIFEST).write_text(json.dumps(hashes, indent=1))
            if target.exists():
                shutil.rmtree(target)
            try:
                fresh.rename(target)
            except OSError:
                # Another process was quicker: its folder is as good as ours.
                if not _intact(target):
                    raise
        finally:
            shutil.rmtree(fresh, ignore_errors=True)
    return target


def _intact(folder: Path) -> bool:
    try:
        hashes = json.loads((folder / MANIFEST).read_text())
        return all(file_hash(folder / name) == known for name, known in hashes.items())
    except (OSError, ValueError):
        return False


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn the operating system's refusal to write into an error that says what to do."""
    try:
        yield
    except OSError as error:
        raise StorageError(
            f"{path}: cannot be written: {error.strerror or error}. What was computed before is "
            "kept; make room or choose another folder, and run the same command again"
        ) from error
