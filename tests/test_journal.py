from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import pytest

from interv.errors import ResumeError, StorageError
from interv.runner import journal as journals

ENVIRONMENT = {"torch": "1", "threads": 2}


def begin(folder: Path, adopted: dict[str, object] | None = None) -> journals.Journal:
    folder.mkdir(exist_ok=True)
    return journals.begin(folder / journals.JOURNAL, ENVIRONMENT, {"sigma": 0.1}, adopted or {})


def test_what_is_appended_is_read_back_to_the_last_bit(tmp_path: Path) -> None:
    journal = begin(tmp_path, {"old": {"logit": [0.1]}})
    value = 0.1 + 0.2
    journal.append({"a": {"logit": [value, -1e-300]}})
    again = journals.read(journal.path)
    assert again is not None
    assert again["a"]["logit"] == [value, -1e-300]
    assert "old" in again
    assert again.notes == {"sigma": 0.1}


@pytest.mark.parametrize("cut", [1, 5, 20])
def test_a_line_cut_short_is_dropped_and_repaired(tmp_path: Path, cut: int) -> None:
    journal = begin(tmp_path)
    journal.append({"a": {"logit": [1.0]}})
    whole = journal.path.read_bytes()
    journal.append({"b": {"logit": [2.0]}})
    torn = journal.path.read_bytes()[:-cut]
    journal.path.write_bytes(torn)
    found = journals.read(journal.path)
    assert found is not None
    assert set(found.records) == {"a"}
    assert journal.path.read_bytes() == torn, "reading wrote"
    journals.read(journal.path, repair=True)
    assert journal.path.read_bytes() == whole


def test_a_journal_killed_in_its_first_line_is_none(tmp_path: Path) -> None:
    (tmp_path / "j").write_text('{"environment"')
    assert journals.read(tmp_path / "j") is None
    assert journals.read(tmp_path / "nowhere") is None


def test_damage_in_the_middle_is_an_error(tmp_path: Path) -> None:
    journal = begin(tmp_path)
    journal.append({"a": {"logit": [1.0]}})
    journal.append({"b": {"logit": [1.0]}})
    lines = journal.path.read_text().splitlines()
    lines[1] = lines[1][:-3]
    journal.path.write_text("\n".join(lines) + "\n")
    with pytest.raises(ResumeError, match=":2: the journal is damaged"):
        journals.read(journal.path)


def test_a_full_disk_leaves_the_journal_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    journal = begin(tmp_path)
    journal.append({"a": {"logit": [1.0]}})
    before = journal.path.read_bytes()

    def full(_descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StorageError, match="No space left"):
        journal.append({"b": {"logit": [1.0]}})
    assert journal.path.read_bytes() == before
    assert "b" not in journal


def test_records_of_siblings_are_found_under_the_same_environment(tmp_path: Path) -> None:
    begin(tmp_path / "one", {"x": {"logit": [0.0]}}).append({"a": {"logit": [1.0]}})
    other = tmp_path / "two"
    other.mkdir()
    changed = {**ENVIRONMENT, "torch": "2"}
    journals.begin(other / journals.JOURNAL, changed, {}, {"b": {"logit": [2.0]}})
    mine = tmp_path / "mine"
    wanted = {"a", "b", "c", "x"}
    assert set(journals.find_elsewhere(mine, wanted, ENVIRONMENT)) == {"a", "x"}
    assert set(journals.find_elsewhere(mine, wanted, None)) == {"a", "b", "x"}
    assert set(journals.find_elsewhere(tmp_path / "one", wanted, None)) == {"b"}


def test_differences_are_told_in_words() -> None:
    assert journals.difference(ENVIRONMENT, ENVIRONMENT) == []
    assert journals.difference({"a": 1}, {"a": 2, "b": 3}) == ["a 1 -> 2", "b None -> 3"]


def test_each_line_is_one_pack(tmp_path: Path) -> None:
    journal = begin(tmp_path)
    journal.append({"a": {"logit": [1.0]}, "b": {"logit": [2.0]}})
    lines = journal.path.read_text().splitlines()
    assert len(lines) == 2
    assert set(json.loads(lines[1])["records"]) == {"a", "b"}
