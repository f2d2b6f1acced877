"""Which specs are reproduced: files, or those of a folder that have a reference."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from interv.errors import UsageError
from interv.runner.journal import JOURNAL

ALL = Path("configs")
"""The folder of `--all`."""


def find_specs(given: Sequence[Path]) -> list[Path]:
    """The files named, and of folders every YAML file below that says `kind` and `reference`.

    Raises:
        UsageError: a folder has no such file.
    """
    found: list[Path] = []
    for path in given:
        if not path.is_dir():
            found.append(path)
            continue
        files = sorted(p for p in path.rglob("*.y*ml") if p.suffix in (".yaml", ".yml"))
        with_reference = [file for file in files if _is_candidate(file)]
        if not with_reference:
            raise UsageError(
                f"{path}: none of its {len(files)} YAML files has a `kind` and a `reference`"
            )
        found += with_reference
    return list(dict.fromkeys(found))


def _is_candidate(path: Path) -> bool:
    """Whether a file looks like a spec with a reference, and is no run's copy of one.

    By its lines, so that one that is not even YAML is told as such, and others are left alone.
    """
    if (path.parent / JOURNAL).is_file() or not path.is_file():
        return False
    text = path.read_text("utf-8", errors="replace")
    return all(re.search(rf"^{key}:", text, re.MULTILINE) for key in ("kind", "reference"))
