from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from interv.runner.record import provenance


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A git repository with one commit, as the working folder."""
    monkeypatch.chdir(tmp_path)
    git("init", "-q")
    (tmp_path / "a.txt").write_text("one\n")
    (tmp_path / ".gitattributes").write_text("*.txt filter=evil\n")
    git("add", ".")
    git("-c", "user.name=x", "-c", "user.email=x@example.org", "commit", "-qm", "first")
    return tmp_path


def git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def test_the_commit_and_whether_there_are_changes(repository: Path) -> None:
    assert provenance()["git"] == {"commit": git("rev-parse", "HEAD"), "dirty": False}
    (repository / "a.txt").write_text("two, longer\n")
    assert provenance()["git"]["dirty"] is True


@pytest.mark.parametrize(
    "key",
    ["core.fsmonitor", "filter.evil.clean", "filter.evil.process", "filter.evil.smudge"],
)
def test_no_program_that_a_repository_names_is_run(repository: Path, key: str) -> None:
    """`git status` ran the working folder's `core.fsmonitor`."""
    git("config", key, f"touch {repository}/pwned; false")
    git("config", "filter.evil.required", "true")
    (repository / "a.txt").write_text("two, longer\n")
    assert provenance()["git"]["dirty"] is True
    assert not (repository / "pwned").exists()


def test_no_program_of_a_submodule_is_run(repository: Path) -> None:
    inner = repository / "inner"
    inner.mkdir()
    subprocess.run(["git", "init", "-q"], cwd=inner, check=True)
    (inner / "b.txt").write_text("x")
    for command in (
        ["add", "."],
        ["-c", "user.name=x", "-c", "user.email=x@example.org", "commit", "-qm", "inner"],
        ["config", "core.fsmonitor", f"touch {repository}/pwned; false"],
    ):
        subprocess.run(["git", *command], cwd=inner, check=True)
    git("-c", "advice.addEmbeddedRepo=false", "add", "inner")
    (inner / "b.txt").write_text("y, longer")
    provenance()
    assert not (repository / "pwned").exists()
    git("status")
    assert (repository / "pwned").exists()  # so the trap is one


def test_outside_a_repository_there_is_no_commit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert provenance()["git"] is None
