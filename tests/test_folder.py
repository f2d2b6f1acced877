from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from interv.errors import ResumeError, StorageError
from interv.runner.folder import locked, set_aside

HOLD = """
import sys, time
from pathlib import Path
from interv.runner.folder import locked
with locked(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_folder_in_use_names_its_holder_and_frees_itself(tmp_path: Path) -> None:
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    with holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(ResumeError, match=f"in use by process {holder.pid}"), locked(tmp_path):
            pass
        holder.kill()
    with locked(tmp_path):
        pass


def test_a_folder_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(StorageError, match="cannot be written"), locked(tmp_path / "file" / "run"):
        pass


def test_an_earlier_run_is_set_aside_not_lost(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    for number in (1, 2):
        with locked(folder):
            (folder / "a.csv").write_text(str(number))
            old = set_aside(folder)
            assert old is not None
            assert old.name == f"run-old-{number}"
            assert (old / "a.csv").read_text() == str(number)
            assert set_aside(folder) is None
