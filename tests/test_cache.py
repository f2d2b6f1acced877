from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from interv.errors import StorageError
from interv.models.cache import cache_folder, cached


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INTERV_CACHE", str(tmp_path / "cache"))


def counting(calls: list[int]):
    def build(folder: Path) -> None:
        calls.append(1)
        (folder / "a.bin").write_bytes(b"content" * 100)
        (folder / "b.json").write_text("{}")

    return build


def test_it_is_built_once(tmp_path: Path) -> None:
    calls: list[int] = []
    one, other = cached("x/y", counting(calls)), cached("x/y", counting(calls))
    assert one == other == tmp_path / "cache" / "x" / "y"
    assert len(calls) == 1


@pytest.mark.parametrize("damage", ["shorten", "flip", "delete", "manifest", "no manifest"])
def test_damage_is_noticed_and_mended(damage: str) -> None:
    calls: list[int] = []
    folder = cached("x", counting(calls))
    target = folder / "a.bin"
    if damage == "shorten":
        target.write_bytes(target.read_bytes()[:-1])
    elif damage == "flip":
        target.write_bytes(b"C" + target.read_bytes()[1:])
    elif damage == "delete":
        target.unlink()
    elif damage == "manifest":
        (folder / "manifest.json").write_text("{")
    else:
        (folder / "manifest.json").unlink()
    assert cached("x", counting(calls)) == folder
    assert len(calls) == 2
    assert target.read_bytes() == b"content" * 100


def test_a_build_that_fails_leaves_nothing(tmp_path: Path) -> None:
    def fail(folder: Path) -> None:
        (folder / "half").write_text("x")
        raise RuntimeError("no")

    with pytest.raises(RuntimeError):
        cached("x", fail)
    assert [path.name for path in (tmp_path / "cache").iterdir()] in ([], [".x.lock"])


def test_a_folder_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(StorageError, match="cannot be written"):
        cached("x", counting([]))


def test_where_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("INTERV_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert cache_folder() == Path("/somewhere/interv")


BUILD = """
import sys, time
from pathlib import Path
from interv.models.cache import cached

def build(folder):
    Path(sys.argv[1]).open("a").write("built\\n")
    for i in range(20):
        (folder / f"{i}.bin").write_bytes(bytes(10_000))
        if i == 10:
            print("half", flush=True)
        time.sleep(float(sys.argv[2]))

folder = cached("made/x", build)
# What one process uses, no other takes away.
for _ in range(100):
    assert len((folder / "19.bin").read_bytes()) == 10_000
    time.sleep(0.002)
"""


def start(log: Path, pause: float) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", BUILD, str(log), str(pause)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def test_processes_that_need_one_folder_build_it_once(tmp_path: Path) -> None:
    """The slower of two builders deleted the folder that the faster one was reading."""
    log = tmp_path / "log"
    processes = [start(log, 0.01) for _ in range(6)]
    for process in processes:
        process.communicate()
    assert [process.returncode for process in processes] == [0] * 6
    assert log.read_text() == "built\n"


def test_what_a_killed_build_leaves_is_removed_by_the_next(tmp_path: Path) -> None:
    """517 MB for each kill, for ever."""
    with start(tmp_path / "log", 30) as killed:
        killed.kill()
    with start(tmp_path / "log", 0.2) as killed:
        assert killed.stdout is not None
        assert killed.stdout.readline() == "half\n"
        killed.kill()
    held = tmp_path / "cache" / "made"
    assert any(path.name.endswith(".tmp") for path in held.iterdir())
    with start(tmp_path / "log", 0) as process:
        process.communicate()
    assert sorted(path.name for path in held.iterdir()) == [".x.lock", "x"]
