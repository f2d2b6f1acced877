from __future__ import annotations

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
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_folder_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(StorageError, match="cannot be written"):
        cached("x", counting([]))


def test_where_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("INTERV_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert cache_folder() == Path("/somewhere/interv")
