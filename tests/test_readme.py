"""What the README and the configs say is what the program does."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from interv.spec.kinds import KINDS
from tests.conftest import CONFIGS, REPOSITORY, SPECS, Result

README = (REPOSITORY / "README.md").read_text()
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", README, re.DOTALL)
COMMANDS = [
    line.split("#")[0].strip()
    for kind, block in BLOCKS
    if kind == "sh"
    for line in block.splitlines()
    if line.startswith("interv ")
]
# A block goes on from those before it, as somebody who types it all in does.
PYTHON = [block for kind, block in BLOCKS if kind == "python"]


def test_it_has_examples() -> None:
    assert len(COMMANDS) >= 5
    assert any(kind == "yaml" for kind, _ in BLOCKS)
    assert PYTHON


@pytest.mark.model
@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_in_the_readme_is_valid(
    command: str, cli: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(REPOSITORY)
    name, *arguments = shlex.split(command)[1:]
    if name == "validate":
        arguments = [str(p) for a in arguments for p in sorted(Path().glob(a))]
    if name in ("report", "compare"):
        # The README's runs are not here; that is all that is wrong.
        result = cli(name, *arguments)
        assert result.code == 2 and "outputs/rome/1a2b3c4d: " in result.err
        return
    if name == "reproduce":
        # Its specs are run in test_default_reference.py.
        name, arguments = "validate", [str(p) for a in arguments for p in Path(a).rglob("*.yaml")]
    if name in ("trace", "collect", "patch", "train-das"):
        # Planned, not run: the demo itself is run in test_default_model.py.
        arguments = [a for a in arguments if a not in ("--fresh", "--json", "--quiet")]
        arguments.append("--plan")
    arguments = [a for a in arguments if a != "--measure"]
    result = cli(name, *arguments)
    assert result.code == 0, result.err


@pytest.mark.model
@pytest.mark.parametrize("block", [b for k, b in BLOCKS if k == "yaml"])
def test_every_spec_in_the_readme_is_valid(
    block: str, cli: Callable[..., Result], tmp_path: Path
) -> None:
    path = tmp_path / "readme.yaml"
    path.write_text(block)
    result = cli("validate", path)
    assert result.code == 0, result.err


@pytest.mark.model
def test_the_python_in_the_readme_runs(environment: dict[str, str], tmp_path: Path) -> None:
    # Links stand in for the repository, so that what it writes is not there.
    for path in REPOSITORY.iterdir():
        if path.name not in ("outputs", ".git"):
            (tmp_path / path.name).symlink_to(path)
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", "\n".join(PYTHON)],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=environment,
        check=False,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.model
@pytest.mark.parametrize("path", SPECS, ids=lambda p: str(p.relative_to(CONFIGS)))
def test_every_config_is_valid_and_planned(
    path: Path, cli: Callable[..., Result], tmp_path: Path
) -> None:
    assert cli("validate", path).code == 0
    assert cli("plan", path, "-o", tmp_path).code == 0
    document = yaml.safe_load(path.read_text())
    sections = list(KINDS[document["kind"]].model_fields)
    keys = [key for key in document if key != "extends"]
    assert keys == [s for s in sections if s in keys], "sections out of order"


def test_every_file_that_the_readme_links_is_there() -> None:
    links = re.findall(r"\]\(([^)#:]+)\)", README)
    assert len(links) >= 3
    for link in links:
        assert (REPOSITORY / link).is_file(), link


def test_every_option_is_in_help(cli: Callable[..., Result]) -> None:
    for option in ("--outputs", "--plan", "--fresh", "--json", "--quiet"):
        assert option in cli("trace", "--help").out
    for option in ("--outputs", "--plan", "--fresh", "--plugin", "--json", "--quiet"):
        assert option in cli("patch", "--help").out
    for option in ("--outputs", "--plan", "--fresh", "--plugin", "--json", "--quiet"):
        assert option in cli("train-das", "--help").out
    for option in ("--all", "--download", "--html", "--junit", "--update", "--yes", "--json"):
        assert option in cli("reproduce", "--help").out
    for option in ("--tolerance", "--figure", "--json"):
        assert option in cli("compare", "--help").out
    assert "--output" in cli("report", "--help").out
    for option in ("--fit", "--pyvene"):
        assert option in cli("save", "--help").out
    for option in ("--show", "--json"):
        assert option in cli("data", "--help").out
    for option in ("--outputs", "--measure", "--json"):
        assert option in cli("plan", "--help").out


def test_every_field_of_a_spec_is_described() -> None:
    from interv.cli.schema import json_schema

    document = json_schema()
    for name, section in document["$defs"].items():
        assert section.get("description") or "enum" in section, name


TARGETS = [
    "install", "demo", "test", "test-wheel", "test-floor", "test-newest", "lock", "peers",
    "reproduce", "check", "bench", "clean",
]  # fmt: skip


@pytest.mark.parametrize("target", TARGETS)
def test_every_make_target_is_there(target: str) -> None:
    assert re.search(rf"^{target}:", (REPOSITORY / "Makefile").read_text(), re.MULTILINE)
