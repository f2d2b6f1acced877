"""Which specs are reproduced: files, or those of a folder that have a reference."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from interv.errors import UsageError
from interv.spec.yaml import read_file

ALL = Path("configs")
"""The folder of `--all`."""


def find_specs(given: Sequence[Path]) -> list[Path]:
    """The files named, and of folders every YAML file below that says `kind` and `reference`.

    Raises:
        UsageError: nothing is there, or a folder has no such file.
        SpecError: a file of a folder that is not YAML.
    """
    found: list[Path] = []
    for path in given:
        if not path.is_dir():
            found.append(path)
            continue
        files = sorted(p for p in path.rglob("*.y*ml") if p.suffix in (".yaml", ".yml"))
        with_reference = [file for file in files if _has_reference(file)]
        if not with_reference:
            raise UsageError(
                f"{path}: none of its {len(files)} YAML files has a `kind` and a `reference`"
            )
        found += with_reference
    return list(dict.fromkeys(found))


def _has_reference(path: Path) -> bool:
    data = read_file(path).data
    return isinstance(data, dict) and "kind" in data and bool(data.get("reference"))
