"""The cache folder: files made once from other files, checked each time they are read."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path

from filelock import FileLock

from interv.storage import replacing_folder, writing

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
    """Return the folder `key` of the cache, built by `build` if it is not there or is damaged.

    `build` gets an empty folder and fills it. The folder appears under its name whole or not
    at all; every file's hash is in its manifest and is compared before the folder is returned.
    One process at a time builds a key; the others wait for it.

    Raises:
        StorageError: the cache folder cannot be written, or the disk is full.
    """
    target = cache_folder() / key
    if _intact(target):
        return target
    with writing(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(target.with_name(f".{target.name}.lock")):
            # Another process may have built it while this one waited.
            if not _intact(target):
                with replacing_folder(target) as fresh:
                    build(fresh)
                    hashes = {p.name: file_hash(p) for p in sorted(fresh.iterdir())}
                    (fresh / MANIFEST).write_text(json.dumps(hashes, indent=1))
    return target


def _intact(folder: Path) -> bool:
    try:
        hashes = json.loads((folder / MANIFEST).read_text())
        return all(file_hash(folder / name) == known for name, known in hashes.items())
    except (OSError, ValueError):
        return False
