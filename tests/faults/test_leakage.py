"""What would leak a patient or mix up classes is refused before anything is trained."""

import json
import re
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from conftest import tiny_pixels, tiny_rows, write_tiny
from raredistill import checkpoint
from raredistill.cohort.store import Cohort, save
from raredistill.errors import CheckpointError, ConfigError, DataError, SplitError
from raredistill.files import read_json, write_json
from raredistill.splits import load_split, make_splits, save_split
from raredistill.studies.study import run_study
from test_study import Silent, study

LARGE = [{"name": "large", "model": "small_cnn"}]


@pytest.fixture(scope="module")
def large(tiny_cohort, tmp_path_factory):
    """A finished baseline of two folds: in each, the other's training patients are tested."""
    out = tmp_path_factory.mktemp("large")
    records = run_study(study(tiny_cohort, LARGE), out, Silent())
    return [out / "runs" / record.id / "best.safetensors" for record in records]


def edited(path, to, change):
    """A checkpoint whose record someone has edited, with the hash that it had before."""
    tensors, metadata = checkpoint.read_safetensors(path)
    record = json.loads(metadata["record"])
    change(record)
    save_file(tensors, to, metadata={**metadata, "record": json.dumps(record)})
    return to


@pytest.mark.parametrize(
    "change",
    [
        lambda record: record.update(training_patients=record["training_patients"][1:]),
        lambda record: record.pop("training_patients"),
        lambda record: record.update(classes=record["classes"][::-1]),
        lambda record: record.update(external=True),
    ],
)
def test_a_checkpoint_whose_record_contradicts_its_hash_is_refused(large, tmp_path, change):
    with pytest.raises(CheckpointError, match="does not match its hash"):
        checkpoint.load(edited(large[0], tmp_path / "edited.safetensors", change))


def resaved(path, to, **changes):
    """A checkpoint that says something else of itself, and is whole."""
    tensors, promise = checkpoint.load(path)
    checkpoint.save(to, tensors, checkpoint.Promise(**{**promise.__dict__, **changes}))
    return to


def check_refused(cohort, said, **run):
    """Before anything is trained."""
    with pytest.raises((CheckpointError, ConfigError), match=re.escape(said)):
        study(cohort, [{"name": "s", "model": "small_cnn", **run}]).plan()


@pytest.mark.parametrize("patients", [None, ()])
def test_a_teacher_without_a_list_of_patients_is_refused(tiny_cohort, large, tmp_path, patients):
    weights = resaved(large[0], tmp_path / "t.safetensors", training_patients=patients)
    check_refused(tiny_cohort, "does not state which patients", teacher={"weights": str(weights)})


def test_a_teacher_of_other_class_order_is_refused(tiny_cohort, large, tmp_path):
    weights = resaved(large[0], tmp_path / "t.safetensors", classes=("healthy", "LGG", "HGG"))
    check_refused(tiny_cohort, "order and names must agree", teacher={"weights": str(weights)})


@pytest.mark.parametrize("use", ["teacher", "pretrained"])
def test_weights_that_have_seen_held_out_patients_are_refused_as_teacher_and_as_start(tiny_cohort, large, use):
    check_refused(tiny_cohort, "its knowledge would leak", **{use: {"weights": str(large[0])} if use == "teacher" else str(large[0])})


@pytest.mark.parametrize("use", ["teacher", "pretrained"])
def test_who_has_trained_the_start_or_an_external_teacher_counts_as_trained_on(tiny_cohort, large, tmp_path, use):
    weights = str(resaved(large[0], tmp_path / "start.safetensors", training_patients=("someone else",)))
    run = {"name": "s", "model": "small_cnn", use: weights if use == "pretrained" else {"weights": weights}}
    records = run_study(study(tiny_cohort, [run]), tmp_path / "s", Silent())
    promise = checkpoint.load(tmp_path / "s" / "runs" / records[0].id / "best.safetensors")[1]
    assert set(promise.training_patients) == {"someone else", *checkpoint.load(large[0])[1].training_patients}


def named_cohort(root):
    """A cohort whose patients' names hold spaces."""
    rows = tiny_rows({"HGG": 8, "LGG": 8}, 2)
    rows["patient"] = rows["patient"].str.replace("GG", "GG ")
    return save(root, rows, {"flair": [tiny_pixels(rows, 16, 0)]}, classes=("healthy", "HGG", "LGG"), size=(16, 16))


def test_a_list_of_patients_is_read_by_lines_so_that_names_with_spaces_do_not_slip_through(large, tmp_path):
    cohort = named_cohort(tmp_path / "c")
    tensors, _ = checkpoint.load(large[0])
    save_file(tensors, tmp_path / "t.safetensors")
    weights = resaved(large[0], tmp_path / "t.safetensors", training_patients=None)
    test_patient = cohort.samples["patient"][make_splits(cohort, folds=2, validation_share=0.34)[0].test[0]]
    (tmp_path / "who.txt").write_text(f"someone else\n\n{test_patient}\n")
    check_refused(cohort, f"such as {test_patient}", teacher={"weights": str(weights), "training_patients": str(tmp_path / "who.txt")})


@pytest.mark.parametrize("content", [None, "\n \n", b"\xff\xfe\x00"])
def test_a_list_of_patients_that_is_missing_or_empty_is_refused(tiny_cohort, large, tmp_path, content):
    weights = resaved(large[0], tmp_path / "t.safetensors", training_patients=None)
    if content is not None:
        (tmp_path / "who.txt").write_bytes(content if isinstance(content, bytes) else content.encode())
    check_refused(tiny_cohort, "who.txt", teacher={"weights": str(weights), "training_patients": str(tmp_path / "who.txt")})


def test_what_is_said_of_a_teacher_names_the_run_so_that_a_corrected_list_is_looked_at(tiny_cohort, large, tmp_path):
    weights = resaved(large[0], tmp_path / "t.safetensors", training_patients=None)
    (tmp_path / "who.txt").write_text("someone else\n")
    teacher = {"weights": str(weights), "training_patients": str(tmp_path / "who.txt")}
    before = {run.id for run in study(tiny_cohort, [{"name": "s", "model": "small_cnn", "teacher": teacher}]).plan()}
    (tmp_path / "who.txt").write_text("someone else again\n")
    after = {run.id for run in study(tiny_cohort, [{"name": "s", "model": "small_cnn", "teacher": teacher}]).plan()}
    assert not before & after
    (tmp_path / "who.txt").write_text("\n".join(sorted(set(tiny_cohort.samples["patient"]))))
    check_refused(tiny_cohort, "leak", teacher=teacher)


@pytest.mark.parametrize(
    "change",
    [
        lambda raw: raw["patients"].pop("test"),
        lambda raw: raw["rows"].pop("train"),
        lambda raw: raw.update(patients=None),
        lambda raw: raw["rows"].update(train=[10**6]),
        lambda raw: raw["rows"].update(train=["a"]),
        lambda raw: raw["patients"].update(train=raw["patients"]["train"][1:]),
        lambda raw: raw["patients"].update(validation=[*raw["patients"]["validation"], "nobody"]),
        lambda raw: raw.update(hash="0" * 64),
    ],
)
def test_a_split_file_without_patients_or_against_its_hash_is_refused(tiny_cohort, tmp_path, change):
    split = make_splits(tiny_cohort, folds=2)[0]
    save_split(tmp_path / "split.json", split, tiny_cohort)
    raw = read_json(tmp_path / "split.json")
    change(raw)
    write_json(tmp_path / "split.json", raw)
    with pytest.raises(SplitError, match="make the splits again"):
        load_split(tmp_path / "split.json", tiny_cohort)


@pytest.mark.parametrize("content", ["[]", "3", "null"])
def test_json_that_is_no_split_is_refused(tiny_cohort, tmp_path, content):
    (tmp_path / "split.json").write_text(content)
    with pytest.raises(SplitError, match="not a split"):
        load_split(tmp_path / "split.json", tiny_cohort)


@pytest.mark.parametrize("key", ["classes", "channels"])
def test_a_cohort_whose_classes_or_channels_were_reordered_is_refused(tmp_path, key):
    write_tiny(tmp_path / "c", patients={"HGG": 2, "LGG": 2})
    description = read_json(tmp_path / "c" / "cohort.json")
    write_json(tmp_path / "c" / "cohort.json", {**description, key: description[key][::-1]})
    with pytest.raises(DataError, match="does not match its hash"):
        Cohort.load(tmp_path / "c")


def test_classes_in_another_order_make_another_run(tmp_path):
    rows = tiny_rows({"HGG": 6, "LGG": 6}, 2)
    names = []
    for order in (("healthy", "HGG", "LGG"), ("healthy", "LGG", "HGG")):
        root = tmp_path / "-".join(order)
        cohort = save(root, rows, {"flair": [tiny_pixels(rows, 16, 0)]}, classes=order, size=(16, 16))
        names.append({run.id for run in study(cohort, LARGE).plan()})
    assert not names[0] & names[1]


def test_what_is_fitted_on_training_does_not_depend_on_the_test_part(tiny_cohort, tmp_path):
    """Weights, best epoch and validation figures are the same bits when every test pixel is another."""
    split = make_splits(tiny_cohort, folds=2, validation_share=0.34)[0]
    shutil.copytree(tiny_cohort.root, tmp_path / "other")
    pixels = np.memmap(tmp_path / "other" / "pixels" / "flair.u8", dtype=np.uint8, mode="r+", shape=(len(tiny_cohort.samples), 16, 16))
    pixels[split.test] = 255 - pixels[split.test]
    pixels.flush()
    rows = tiny_cohort.samples
    other = save(
        tmp_path / "new", rows, {"flair": [np.array(pixels)], "t1ce": [tiny_cohort.pixels("t1ce")]}, classes=tiny_cohort.classes,
        size=tiny_cohort.size,
    )  # fmt: skip
    found = []
    for number, cohort in enumerate((tiny_cohort, other)):
        records = run_study(study(cohort, LARGE), tmp_path / str(number), Silent())
        weights = checkpoint.load(tmp_path / str(number) / "runs" / records[0].id / "best.safetensors")[0]
        found.append((records[0].best_epoch, weights))
    assert found[0][0] == found[1][0]
    assert all(torch.equal(tensor, found[1][1][name]) for name, tensor in found[0][1].items())
