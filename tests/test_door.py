"""What the package imports: declared, and there on every system that it names."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator, Set
from functools import cache
from importlib.metadata import packages_distributions
from itertools import chain
from pathlib import Path

import psutil
import pytest

from interv.models.locate import DEFAULT_INSTALL
from interv.runner.record import peak_memory
from tests.conftest import REPOSITORY

PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text("utf-8"))
SOURCES = sorted((REPOSITORY / "interv").rglob("*.py"))

THROUGH_TRANSFORMERS = {"accelerate"}
"""What transformers imports when interv asks it for a GGUF file or a device map."""

POSIX_ONLY = ("fcntl", "grp", "pwd", "resource", "termios")


def normal(name: str) -> str:
    """Return a distribution's name as PEP 503 compares it, without its version range."""
    bare = re.match(r"[\w.-]+", name)
    assert bare
    return re.sub(r"[-_.]+", "-", bare.group()).lower()


def imports(path: Path) -> Iterator[str]:
    """Yield the top-level package of each absolute import, wherever it is in the file."""
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            assert node.module
            yield node.module.split(".")[0]


@cache
def third_party() -> frozenset[str]:
    own = {"interv", *sys.stdlib_module_names}
    return frozenset(name for path in SOURCES for name in imports(path)) - own


distributions = cache(packages_distributions)


def undeclared(modules: Set[str], project: dict[str, object]) -> list[str]:
    """Return the modules that no runtime dependency brings, nor an extra that a message names."""
    dependencies = {normal(name) for name in project["dependencies"]}
    text = "\n".join(path.read_text("utf-8") for path in SOURCES)
    for extra, names in project.get("optional-dependencies", {}).items():
        if f"pip install interv[{extra}]" in text or f"pip install 'interv[{extra}]'" in text:
            dependencies |= {normal(name) for name in names}
    found = distributions()
    return sorted(
        module
        for module in modules
        if not dependencies & {normal(name) for name in found.get(module, [module])}
    )


def test_every_import_is_a_runtime_dependency_or_an_extra_named_in_a_message() -> None:
    modules = third_party()
    assert {"torch", "yaml", "pydantic"} < modules
    assert undeclared(modules | THROUGH_TRANSFORMERS, PROJECT["project"]) == []


def test_an_import_that_nothing_declares_is_found() -> None:
    project = PROJECT["project"]
    fewer = [name for name in project["dependencies"] if normal(name) not in ("pyyaml", "torch")]
    assert undeclared(third_party(), {**project, "dependencies": fewer}) == ["torch", "yaml"]


def test_every_dependency_is_imported() -> None:
    """A dependency that nothing uses costs each user a download and a conflict."""
    used = third_party() | THROUGH_TRANSFORMERS
    found = distributions()
    names = {normal(name) for module in used for name in found.get(module, ())}
    assert {normal(name) for name in PROJECT["project"]["dependencies"]} <= names


WITHOUT = """
import builtins, sys
find = builtins.__import__
def refuse(name, globals=None, *rest, **named):
    if name in {modules!r} and (globals or {{}}).get("__name__", "").startswith("interv"):
        raise ModuleNotFoundError(name)
    return find(name, globals, *rest, **named)
builtins.__import__ = refuse
"""
"""Other packages have a way of their own for Windows, taken by `sys.platform`."""
EVERYTHING = """
import importlib, pkgutil, interv
for module in pkgutil.walk_packages(interv.__path__, "interv."):
    if module.name != "interv.__main__":
        importlib.import_module(module.name)
from pathlib import Path
from interv.runner.folder import locked
from interv.plan.cost import free_cpu_bytes
assert free_cpu_bytes() > 2**20
with locked(Path(sys.argv[1])):
    print("locked")
"""


def test_everything_is_imported_and_a_folder_locked_without_the_modules_of_posix(
    tmp_path: Path, environment: dict[str, str]
) -> None:
    code = WITHOUT.format(modules=POSIX_ONLY) + EVERYTHING
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "run")],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "locked\n"


def test_peak_memory_on_windows_is_what_windows_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    class Counted:
        peak_wset = 12345

    monkeypatch.setattr(psutil.Process, "memory_info", lambda _self: Counted)
    monkeypatch.setattr(sys, "platform", "win32")
    monkeypatch.setitem(sys.modules, "resource", None)
    assert peak_memory() == 12345


def test_the_pins_cover_what_the_makefile_installs_and_name_no_machine() -> None:
    """`make lock` has been run since pyproject.toml changed; what it needs is a pin."""
    lines = (REPOSITORY / ".ci/constraints.txt").read_text("utf-8").splitlines()
    pins = dict(line.split("==") for line in lines if not line.startswith("#"))
    groups = PROJECT["dependency-groups"]
    extras = PROJECT["project"].get("optional-dependencies", {})
    wanted = [*PROJECT["project"]["dependencies"], *chain(*extras.values())]
    wanted += [name for group in groups.values() for name in group if isinstance(name, str)]
    assert {normal(name) for name in wanted} <= set(pins)
    assert all(re.fullmatch(r"[\w.!-]+", version) for version in pins.values())
    # A build of torch brings its own, each at the one version that it is made for.
    assert not [name for name in pins if name.startswith(("nvidia-", "cuda-", "triton"))]


def test_the_message_where_the_default_model_is_missing_has_the_line_that_the_makefile_runs() -> (
    None
):
    package = DEFAULT_INSTALL.split()[-1]
    assert f"MODEL  := {package}\n" in (REPOSITORY / "Makefile").read_text("utf-8")
    assert DEFAULT_INSTALL in (REPOSITORY / "README.md").read_text("utf-8")
