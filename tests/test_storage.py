from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from interv.errors import StorageError
from interv.storage import copied, replacing, write_atomically

WRITE = """
import sys
from pathlib import Path
from interv.storage import write_atomically
for _ in range(20):
    write_atomically(Path(sys.argv[1]), sys.argv[2] * 200_000)
"""
DIE = """
import os, signal, sys
from pathlib import Path
from interv.storage import replacing
with replacing(Path(sys.argv[1])) as file:
    file.write(b"half")
    os.kill(os.getpid(), signal.SIGKILL)
"""


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_write_that_fails_leaves_the_old_content(tmp_path: Path) -> None:
    path = tmp_path / "x.csv"
    write_atomically(path, "old")
    with pytest.raises(TypeError, match="bytes-like"), replacing(path) as file:
        file.write("text")  # type: ignore[arg-type]
    assert path.read_text() == "old"
    assert names(tmp_path) == ["x.csv"]


def test_a_folder_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(StorageError, match="cannot be written"):
        write_atomically(tmp_path / "file" / "x.csv", "new")


def test_writers_of_one_file_do_not_meet(tmp_path: Path) -> None:
    """The temporary name was the same for all: 85 of 180 writers failed."""
    path = tmp_path / "page.html"
    writers = [
        subprocess.Popen([sys.executable, "-c", WRITE, str(path), letter]) for letter in "abcdef"
    ]
    assert [writer.wait() for writer in writers] == [0] * 6
    content = path.read_text()
    assert len(content) == 200_000
    assert len(set(content)) == 1
    assert names(tmp_path) == ["page.html"]


def test_a_link_where_a_temporary_file_once_was_is_not_followed(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("precious")
    (tmp_path / ".x.csv.tmp").symlink_to(victim)
    write_atomically(tmp_path / "x.csv", "new")
    assert victim.read_text() == "precious"
    assert not (tmp_path / "x.csv").is_symlink()


def test_what_a_killed_writer_leaves_is_removed_by_the_next(tmp_path: Path) -> None:
    path = tmp_path / "x.csv"
    subprocess.run([sys.executable, "-c", DIE, str(path)], check=False)
    assert len(names(tmp_path)) == 1
    write_atomically(path, "new")
    assert names(tmp_path) == ["x.csv"]


def test_what_a_running_writer_has_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "x.csv"
    with replacing(path) as file:
        file.write(b"first, but finished last")
        write_atomically(path, "second")
        assert path.read_text() == "second"
    assert path.read_text() == "first, but finished last"


def test_the_longest_name_can_be_written(tmp_path: Path) -> None:
    name = "n" * os.pathconf(tmp_path, "PC_NAME_MAX")
    write_atomically(tmp_path / name, "x")
    assert names(tmp_path) == [name]


def test_files_are_as_readable_as_the_users_mask_says(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        write_atomically(tmp_path / "x.csv", "x")
    finally:
        os.umask(before)
    assert (tmp_path / "x.csv").stat().st_mode & 0o777 == 0o640


def test_a_folder_is_copied_whole_or_not_at_all(tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "new" / "target"
    assert not copied(source, target)
    (source / "deep").mkdir(parents=True)
    (source / "deep" / "a").write_text("x")
    assert copied(source, target)
    assert (target / "deep" / "a").read_text() == "x"
    assert names(tmp_path / "new") == ["target"]
