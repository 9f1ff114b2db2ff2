"""Atomic writes, locks and folders: nothing is half-written."""

import hashlib
import os

import pytest

from raredistill.errors import DataError
from raredistill.files import atomic, claim_folder, fingerprint, is_sealed, lock_if_free, read_json, seal, sha256, write_json, write_text


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "state.txt"
    write_text(path, "old")

    def fail():
        with atomic(path) as draft:
            draft.write_text("half")
            raise RuntimeError("power cut")

    with pytest.raises(RuntimeError):
        fail()
    assert path.read_text() == "old"
    assert [child.name for child in tmp_path.iterdir()] == ["state.txt"]


def test_what_a_killed_writer_left_is_swept_but_not_what_is_being_written(tmp_path):
    old, young, other = (tmp_path / name for name in (".state[1].txt.11.tmp", ".state[1].txt.12.tmp", ".state.txt.13.tmp"))
    for leftover in (old, young, other):
        leftover.write_text("half")
    for leftover in (old, other):
        os.utime(leftover, (0, 0))
    write_text(tmp_path / "state[1].txt", "whole")
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([young.name, other.name, "state[1].txt"])


def test_a_lock_that_another_holds_is_told_at_once(tmp_path):
    with lock_if_free(tmp_path / "lock") as first, lock_if_free(tmp_path / "lock") as second:
        assert (first, second) == (True, False)
    with lock_if_free(tmp_path / "lock") as third:
        assert third


def test_a_sealed_record_that_was_changed_is_noticed():
    record = seal({"runs": [1, 2], "name": "é"})
    assert is_sealed(record)
    assert not is_sealed({**record, "runs": [1, 3]})
    assert not is_sealed({"runs": [1, 2]})


def test_sha256_is_hashlibs(tmp_path):
    (tmp_path / "f").write_bytes(b"abc" * 1000)
    assert sha256(tmp_path / "f") == hashlib.sha256(b"abc" * 1000).hexdigest()


def test_fingerprint_ignores_the_order_of_keys():
    assert fingerprint({"a": 1, "b": [2, 3]}) == fingerprint({"b": [2, 3], "a": 1})
    assert fingerprint({"a": 1}) != fingerprint({"a": 2})


def test_json_round_trip_and_damage(tmp_path):
    write_json(tmp_path / "a.json", {"é": [1, None]})
    assert read_json(tmp_path / "a.json") == {"é": [1, None]}
    (tmp_path / "a.json").write_text("{")
    with pytest.raises(DataError, match=r"a\.json"):
        read_json(tmp_path / "a.json")
    with pytest.raises(DataError, match="no such file"):
        read_json(tmp_path / "b.json")


def test_a_folder_that_holds_something_else_is_refused(tmp_path):
    claim_folder(tmp_path / "new", "study.json")
    (tmp_path / "new" / "thesis.docx").write_text("precious")
    with pytest.raises(DataError, match="already contains something else"):
        claim_folder(tmp_path / "new", "study.json")
    (tmp_path / "new" / "study.json").write_text("{}")
    claim_folder(tmp_path / "new", "study.json")
    with pytest.raises(DataError, match="is a file"):
        claim_folder(tmp_path / "new" / "thesis.docx", "study.json")
