"""Damaged or hostile files under `report`, `predict` and `verify`: one message and exit code 2, never a traceback."""

import json
import os
import shutil
import struct
import sys
from contextlib import suppress

import pytest

from conftest import Silent, write_tiny
from raredistill import cli
from raredistill.checkpoint import load, read_safetensors
from raredistill.errors import CheckpointError, RareDistillError
from raredistill.files import atomic, read_json, seal, sha256, write_json
from raredistill.reports.results import read_results
from raredistill.studies.study import run_study
from test_study import study


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    root = tmp_path_factory.mktemp("finished")
    training = {"epochs": 1, "batch_size": 16, "accelerator": "cpu"}
    made = study(write_tiny(root / "c"), [{"name": "a", "model": "small_cnn"}], training=training)
    run_study(made, root / "s", Silent())
    return root


@pytest.fixture
def copied(finished, tmp_path):
    shutil.copytree(finished, tmp_path / "x")
    return tmp_path / "x"


def command(monkeypatch, capsys, *arguments):
    """Exit code and messages of the command line, in this process."""
    monkeypatch.setattr(sys, "argv", ["raredistill", *map(str, arguments)])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    return stopped.value.code, capsys.readouterr().err


def run_of(root):
    return sorted(path for path in (root / "s" / "runs").iterdir() if path.is_dir())[0]


def refused(root):
    with pytest.raises(RareDistillError) as caught:
        read_results(root / "s")
    return str(caught.value)


@pytest.mark.parametrize("value", [[1], 5, "x", None, {}])
def test_a_description_that_is_something_else_is_one_message(copied, value, monkeypatch, capsys):
    write_json(copied / "s" / "study.json", value)
    code, said = command(monkeypatch, capsys, "report", copied / "s")
    assert (code, "study.json" in said, "Traceback" in said) == (2, True, False)


@pytest.mark.parametrize("bad", [None, [[]], {"a": 1}, -5, 10**400], ids=["null", "list", "mapping", "negative", "huge"])
def test_any_entry_of_a_description_may_be_damaged(finished, copied, bad):
    whole = read_json(finished / "s" / "study.json")
    wrong = 0
    for place in (whole, whole["runs"][0], whole["cohort"]):
        for key, good in list(place.items()):
            place[key] = bad
            write_text = json.dumps(whole)
            place[key] = good
            (copied / "s" / "study.json").write_text(write_text)
            try:
                read_results(copied / "s")
            except RareDistillError as error:
                wrong += "study.json" in str(error)
    assert wrong >= 30  # of about 60 entries; the others may hold anything


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("epochs.jsonl", b"[]"), ("epochs.jsonl", b"{}"), ("epochs.jsonl", b'{"train": 5}'), ("epochs.jsonl", b"\xff"),
        ("epochs.jsonl", b'{"train": {"loss": 1, "macro_f1": 0, "f1": {}}}'), ("best.safetensors", b"xx"),
        ("best.safetensors", b"\xff" * 99), ("predictions.parquet", b"x"),
    ],
)  # fmt: skip
def test_damaged_results_are_refused_by_their_hash_and_by_what_they_hold(copied, name, content):
    folder = run_of(copied)
    (folder / name).write_bytes(content)
    assert f"{name}: missing, or its content does not match its hash" in refused(copied)
    record = read_json(folder / "run.json")
    files = {**record["files"], name: sha256(folder / name)}
    write_json(folder / "run.json", seal({**{key: value for key, value in record.items() if key != "seal"}, "files": files}))
    assert str(folder / name) in refused(copied)


@pytest.mark.parametrize(
    "text", ["[]", "{}", '{"patients": 5}', '{"patients": {"train": 5}}', '{"patients": {"train": [], "test": []}}', "x"]
)
def test_a_damaged_split_is_one_message(copied, text):
    path = next((copied / "s" / "splits").glob("*.json"))
    path.write_text(text)
    assert str(path) in refused(copied)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("model", 5), ("classes", 5), ("classes", ["a", 5]), ("channels", None), ("image_size", "x"), ("mean", [float("nan")]),
        ("external", 1), ("training_patients", [1]), ("classes", ["e\x1b[2J", "b"]), ("more", 1),
    ],
)  # fmt: skip
def test_a_promise_of_wrong_types_is_one_message(copied, key, value):
    from raredistill import checkpoint

    path = run_of(copied) / "best.safetensors"
    tensors, promise = load(path)
    checkpoint._write(path, tensors, checkpoint._NETWORK, {**promise.__dict__, key: value})
    with pytest.raises(CheckpointError, match="its metadata does not match this version"):
        load(path)


@pytest.mark.parametrize("kind", ["F8_E8M0", "F6_E2M3", "F4", "U64", "C64", "NONSENSE"])
def test_tensors_of_types_that_torch_lacks_are_one_message_or_read(tmp_path, kind):
    size = {"F4": 0.5, "F6_E2M3": 0.75, "U64": 8, "C64": 8}.get(kind, 1)
    head = json.dumps({"x": {"dtype": kind, "shape": [8], "data_offsets": [0, int(8 * size)]}}).encode()
    (tmp_path / "w.safetensors").write_bytes(struct.pack("<Q", len(head)) + head + bytes(int(8 * size)))
    with suppress(CheckpointError):  # anything else would be a traceback; torch may learn a type
        assert read_safetensors(tmp_path / "w.safetensors")[0]["x"].numel() in (4, 8)


def test_an_option_called_path_is_one_message(copied, monkeypatch, capsys):
    code, said = command(monkeypatch, capsys, "verify", "image_folder", copied, "path=/etc")
    assert (code, "image_folder has no option 'path'" in said) == (2, True)


def test_predictions_do_not_go_where_a_folder_stands(copied, monkeypatch, capsys):
    code, said = command(monkeypatch, capsys, "predict", run_of(copied), copied / "c", "--out", copied / "s")
    assert (code, said) == (2, f"raredistill: {copied / 's'} is a folder; name a file\n")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="this system has no device that is always full")
def test_a_full_disk_is_told_with_the_files_name(tmp_path):
    with pytest.raises(OSError, match="No space left") as caught, atomic(tmp_path / "a.json"), open("/dev/full", "w", buffering=1) as file:
        file.write("x\n")
    assert caught.value.filename == str(tmp_path / "a.json")
