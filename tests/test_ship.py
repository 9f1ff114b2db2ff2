"""From a study to a network that is used: predict, refit, export. Images are learnable: the brightness tells the class."""

import json
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from scipy.special import softmax

from raredistill import api
from raredistill.cohort.prepare import prepare
from raredistill.cohort.sources.registry import open_source
from raredistill.errors import CheckpointError, ConfigError, DataError
from raredistill.evaluation.levels import evaluate
from raredistill.models import restore
from raredistill.phantom import write_phantom
from raredistill.predictions import read
from raredistill.ship.predictor import Predictor

SIZE = 16


def draw(root, patients, *, per_patient=2, seed=0):
    """``{class}{patient}-{n}.png`` and ``labels.csv``: class b is brighter than class a."""
    root.mkdir(parents=True, exist_ok=True)
    generator, rows = np.random.default_rng(seed), []
    for label, base in (("a", 60), ("b", 110)):
        for patient in range(patients[label]):
            for n in range(per_patient):
                name = f"{label}{patient}-{n}.png"
                pixels = generator.integers(0, 80, (SIZE, SIZE)) + base
                Image.fromarray(pixels.astype(np.uint8)).save(root / name)
                rows.append({"image": name, "label": label, "patient": f"{label}{patient}"})
    pd.DataFrame(rows).to_csv(root / "labels.csv", index=False)
    return root


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return draw(tmp_path_factory.mktemp("images"), {"a": 10, "b": 6})


@pytest.fixture(scope="module")
def study(images, tmp_path_factory):
    """Two folds of a teacher, a control and a student; network and images are as small as they can be."""
    out = tmp_path_factory.mktemp("ship") / "study"
    config = {
        "name": "ship", "cohort": {"source": "table", "path": str(images / "labels.csv"), "size": SIZE},
        "splits": {"folds": 2, "repeats": 1, "validation_share": 0.4}, "training": {"epochs": 3, "batch_size": 8, "accelerator": "cpu"},
        "runs": [
            {"name": "large", "model": "cifar_resnet8"}, {"name": "small", "model": "small_cnn"},
            {"name": "taught", "model": "small_cnn", "teacher": "large"},
        ],
    }  # fmt: skip
    done = api.study(config, out)
    assert not done.failed
    return out


def run_of(study, entry, fold=0):
    return next(path for path in sorted((study / "runs").iterdir()) if path.name.startswith(f"{entry}-r0f{fold}") and path.is_dir())


def raredistill(*arguments):
    command = [sys.executable, "-c", "from raredistill.cli import main; main()", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def patients_of(study, fold):
    return json.loads((study / "splits" / f"r0f{fold}.json").read_text())["patients"]


def test_a_run_predicts_what_its_own_study_wrote_down_and_marks_whom_it_has_seen(study, images, tmp_path):
    run = run_of(study, "taught")
    found = api.predict(run, images / "labels.csv", tmp_path / "p.csv").samples.set_index("sample")
    sides = patients_of(study, 0)
    for side in ("train", "validation", "test"):
        assert set(found.loc[found["patient"].isin(sides[side]), "split"]) == {side}
    kept = read(run / "predictions.parquet").part("test", "best")
    promised = softmax(kept.logits() / Predictor(run).terms.rule.temperatures[0], axis=1)
    assert found.loc[kept.table["sample"], ["p_a", "p_b"]].to_numpy() == pytest.approx(promised, abs=1e-5)


def test_evaluate_leaves_out_patients_that_the_model_has_seen_and_counts_them(study, images, tmp_path):
    run, out = run_of(study, "taught"), tmp_path / "p.csv"
    told = raredistill("predict", run, images / "labels.csv", "--out", out)
    sides = patients_of(study, 0)
    assert f"{2 * len(sides['train'])} samples of {len(sides['train'])} patients trained this model" in told.stdout, told.stderr
    assert evaluate(read(out))["slice"]["samples"] == 2 * len(sides["test"])
    measured = raredistill("evaluate", out)
    assert f"{2 * len(sides['train'])} rows of {len(sides['train'])} patients with split=train" in measured.stdout, measured.stderr


@pytest.mark.parametrize("suffix", [".csv", ".parquet", ".json"])
def test_the_suffix_decides_what_is_written(study, images, tmp_path, suffix):
    out = tmp_path / f"p{suffix}"
    found = api.predict(f"{study}:taught", images / "labels.csv", out)
    readers = {
        ".csv": pd.read_csv,
        ".parquet": pd.read_parquet,
        ".json": lambda path: pd.DataFrame(json.loads(path.read_text())["samples"]),
    }
    assert readers[suffix](out)["p_b"].to_numpy() == pytest.approx(found.samples["p_b"].to_numpy())
    with pytest.raises(ConfigError, match="suffix"):
        api.predict(f"{study}:taught", images / "labels.csv", tmp_path / "p.xlsx")


def test_images_of_every_form_get_the_same_probabilities(study, images, tmp_path):
    model, names = f"{study}:taught", ["a0-0.png", "b0-0.png"]
    whole = api.predict(model, images / "labels.csv", tmp_path / "all.csv").samples.set_index("sample").loc[names, "p_b"].to_numpy()
    folder = tmp_path / "folder"
    folder.mkdir()
    for name in names:
        (folder / name).write_bytes((images / name).read_bytes())
    pd.DataFrame({"image": names}).to_csv(folder / "list.csv", index=False)
    np.savez(folder / "list.npz", images=np.stack([np.asarray(Image.open(images / name)) for name in names]))
    prepared = prepare(open_source("table", images / "labels.csv"), tmp_path / "cohort", size=(SIZE, SIZE))
    for source in (folder, folder / "list.csv", folder / "list.npz"):
        assert api.predict(model, source, tmp_path / "p.csv").samples["p_b"].to_numpy() == pytest.approx(whole)
    assert api.predict(model, folder / names[1], tmp_path / "p.csv").samples["p_b"].to_numpy() == pytest.approx(whole[1:])
    found = api.predict(model, prepared.root, tmp_path / "p.csv").samples.set_index("sample")
    assert found.loc[names, "p_b"].to_numpy() == pytest.approx(whole)


def test_a_renamed_training_image_is_recognised_by_its_bytes(study, images, tmp_path):
    patient = patients_of(study, 0)["train"][0]
    (tmp_path / "new-patient.png").write_bytes((images / f"{patient}-0.png").read_bytes())
    found = api.predict(run_of(study, "taught"), tmp_path / "new-patient.png", tmp_path / "p.csv").samples
    assert found["split"].tolist() == ["train"]
    assert found["patient"].tolist() == [patient]


def test_an_ensemble_is_the_mean_of_its_calibrated_networks(study):
    images = np.random.default_rng(1).integers(0, 256, (5, 1, SIZE, SIZE), dtype=np.uint8)
    predictor = Predictor(f"{study}:taught")
    single = [Predictor(run_of(study, "taught", fold))(images) for fold in (0, 1)]
    assert predictor(images) == pytest.approx(np.mean(single, axis=0))
    assert predictor(images.astype(np.float32) / 255) == pytest.approx(predictor(images), abs=1e-6)
    mirrored = [(one + two) / 2 for one, two in zip(predictor.logits(images), predictor.logits(images[..., ::-1]), strict=True)]
    assert Predictor(f"{study}:taught", augment=True)(images) == pytest.approx(predictor.terms.rule.probabilities(mirrored), abs=1e-6)


def test_the_decision_reaches_the_wanted_sensitivity_on_validation(study):
    run = run_of(study, "taught")
    predictor = Predictor(run, sensitivity=0.8)
    rule, table = predictor.terms.rule, read(run / "predictions.parquet").part("validation", "best")
    probability = softmax(table.logits() / rule.temperatures[0], axis=1)
    called = np.array(rule.decide(probability, table.classes, patients=False))
    truth = table.table["label"].to_numpy()
    assert rule.positive == "b"
    assert (called[truth == "b"] == "b").mean() >= 0.8
    higher = np.nextafter(rule.threshold(patients=False), 2)
    assert (probability[truth == "b", 1] >= higher).mean() < 0.8


def test_patients_are_the_mean_of_their_samples(study, images, tmp_path):
    found = api.predict(f"{study}:taught", images / "labels.csv", tmp_path / "p.csv")
    means = found.samples.groupby("patient")["p_b"].mean()
    table = pd.read_csv(tmp_path / "p.patients.csv").set_index("patient")
    assert table["p_b"].to_numpy() == pytest.approx(means.loc[table.index].to_numpy())
    assert table["samples"].tolist() == [2] * 16


def test_a_name_without_its_hash_is_enough(study, images, tmp_path):
    run = run_of(study, "small", 1)
    by_prefix = api.predict(study / "runs" / "small-r0f1", images / "a0-0.png", tmp_path / "p.csv")
    assert run.name in by_prefix.said
    assert "2 networks" in api.predict(study / "runs" / "small", images / "a0-0.png", tmp_path / "p.csv").said
    with pytest.raises(DataError, match="did you mean"):
        api.predict(f"{study}:tought", images, tmp_path / "p.csv")
    with pytest.raises(DataError, match="name one of its entries"):
        api.predict(study, images, tmp_path / "p.csv")


def test_pixels_prepared_otherwise_are_refused(study, images, tmp_path):
    other = prepare(open_source("table", images / "labels.csv"), tmp_path / "other", size=(24, 24))
    with pytest.raises(CheckpointError, match=r"size \(24, 24\) there, \(16, 16\) in training"):
        api.predict(f"{study}:taught", other.root, tmp_path / "p.csv")
    windowed = prepare(open_source("table", images / "labels.csv", window=[0, 100]), tmp_path / "window", size=(SIZE, SIZE))
    with pytest.raises(CheckpointError, match="window"):
        api.predict(f"{study}:taught", windowed.root, tmp_path / "p.csv")
    coloured = prepare(open_source("table", images / "labels.csv", mode="rgb"), tmp_path / "rgb", size=(SIZE, SIZE))
    with pytest.raises(CheckpointError, match="needs the channels grey"):
        api.predict(f"{study}:taught", coloured.root, tmp_path / "p.csv")
    assert not (tmp_path / "p.csv").exists()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("bad.png", b"no image", "cannot be read as PNG"), ("bad.npz", b"no archive", "npz"), 
        ("bad.csv", b"file\nx.png\n", "no column 'image'"),
        ("bad.txt", b"", "not an image"), ("twice.csv", b"image\nx.png\nx.png\n", "second time"),
        ("out.csv", b"image\n../secret.png\n", "lies outside"), ("class.csv", b"image,label\nx.png,c\n", "none of the model's classes"),
    ],
)  # fmt: skip
def test_bad_input_is_one_message_and_nothing_is_written(study, tmp_path, name, content, message):
    inner = tmp_path / "inner"
    inner.mkdir()
    (tmp_path / "secret.png").write_bytes(b"")
    (inner / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        api.predict(f"{study}:taught", inner / name, tmp_path / "p.csv")
    assert not (tmp_path / "p.csv").exists()


def test_a_checkpoint_can_be_restored_from_a_string(study):
    network, promise = restore(str(run_of(study, "taught") / "best.safetensors"))
    assert network(torch.zeros(1, 1, SIZE, SIZE)).shape == (1, len(promise.classes))


@pytest.fixture(scope="module")
def exported(study, tmp_path_factory):
    out = tmp_path_factory.mktemp("export") / "student"
    return out, api.export(run_of(study, "taught"), out)


def script_of(card, which):
    return card.split("```python\n")[which + 1].split("```")[0]


def run_script(code, folder, argument):
    done = subprocess.run([sys.executable, "-c", code, str(argument)], cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_every_format_agrees_with_the_network_on_validation_samples(exported):
    folder, made = exported
    assert {path.name for path in folder.iterdir()} == {
        "model.onnx", "model.fp16.onnx", "model.int8.onnx", "model.safetensors", "config.json", "README.md", "check.npz",
    }  # fmt: skip
    found = {each.name: each for each in made.formats}
    assert max(found["fp32"].difference, found["safetensors"].difference) <= 1e-4
    assert 0 < found["fp16"].difference < 0.1
    assert set(found["int8"].changes) == {"a", "b"}
    assert found["int8"].bytes < found["fp32"].bytes
    assert made.teacher_ms > 0


def test_an_export_predicts_what_its_run_predicts(study, images, exported, tmp_path):
    run = api.predict(run_of(study, "taught"), images, tmp_path / "run.csv")
    export = api.predict(exported[0], images, tmp_path / "export.csv")
    for column in ("p_a", "p_b"):
        assert export.samples[column].to_numpy() == pytest.approx(run.samples[column].to_numpy(), abs=1e-5)
    assert export.samples["decision"].tolist() == run.samples["decision"].tolist()


def test_the_cards_onnxruntime_script_gives_the_same_probabilities(images, exported):
    folder, _ = exported
    found = run_script(script_of((folder / "README.md").read_text(), 0), folder, images / "b0-0.png")
    pixels = np.asarray(Image.open(images / "b0-0.png"))[None, None]
    assert list(found.values()) == pytest.approx(Predictor(folder)(pixels)[0].tolist(), abs=1e-5)


def test_a_timm_students_weights_have_timms_keys_and_the_cards_script_reads_them(images, tmp_path):
    config = {
        "name": "timm", "cohort": {"source": "table", "path": str(images / "labels.csv"), "size": 32},
        "splits": {"folds": 2, "repeats": 1, "validation_share": 0.4}, "training": {"epochs": 1, "batch_size": 8, "accelerator": "cpu"},
        "runs": [{"name": "student", "model": "test_resnet"}],
    }  # fmt: skip
    api.study(config, tmp_path / "study")
    api.export(run_of(tmp_path / "study", "student"), tmp_path / "export", formats=())
    pixels = np.random.default_rng(0).integers(0, 256, (1, 32, 32), dtype=np.uint8)
    np.save(tmp_path / "pixels.npy", pixels)
    found = run_script(script_of((tmp_path / "export" / "README.md").read_text(), 1), tmp_path / "export", tmp_path / "pixels.npy")
    assert found == pytest.approx(Predictor(tmp_path / "export").logits(pixels[None])[0][0].tolist(), abs=1e-4)


def test_the_cards_numbers_are_those_of_the_held_out_predictions(study, exported):
    card = (exported[0] / "README.md").read_text()
    table = read(run_of(study, "taught") / "predictions.parquet").part("test", "best")
    called = table.probabilities().argmax(axis=1)
    recall = (called[table.labels() == 1] == 1).mean()
    assert f"| sample | recall:b | {recall:.3f} |" in card
    assert "Not a medical device" in card
    config = json.loads((exported[0] / "config.json").read_text())
    assert not any(f'"{patient}"' in json.dumps(config) for patient in patients_of(study, 0)["train"])


def test_an_export_is_checked_elsewhere_without_torch(exported):
    folder, _ = exported
    code = (
        "import sys; from pathlib import Path; from raredistill.ship.bundle import check; "
        f"print(check(Path({str(folder)!r})).samples, 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["8", "False"], done.stderr
    told = raredistill("export", "--check", folder)
    assert told.returncode == 0, told.stderr
    assert "8 images" in told.stdout


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("model.onnx", lambda raw: raw[:-1] + bytes([raw[-1] ^ 1]), "does not match its hash"),
        ("config.json", lambda raw: raw.replace(b"export.1", b"export.9"), "this version reads"),
        ("config.json", lambda raw: raw.replace(b'"b"', b'"c"'), "so it was changed"),
    ],
)  # fmt: skip
def test_a_changed_export_is_refused(exported, tmp_path, file, change, message):
    for path in exported[0].iterdir():
        raw = path.read_bytes()
        (tmp_path / path.name).write_bytes(change(raw) if path.name == file else raw)
    told = raredistill("export", "--check", tmp_path)
    assert told.returncode == 2
    assert message in told.stderr
    assert "Traceback" not in told.stderr


def test_what_cannot_be_exported_leaves_nothing_behind(study, exported, tmp_path):
    with pytest.raises(ConfigError, match="raredistill refit"):
        api.export(f"{study}:taught", tmp_path / "new")
    with pytest.raises(ConfigError, match=r"no threshold was kept for the sensitivity 0\.5"):
        Predictor(exported[0], sensitivity=0.5)
    with pytest.raises(DataError, match="not an empty folder"):
        api.export(run_of(study, "taught"), study)
    with pytest.raises(ConfigError, match="sensitivity"):
        api.export(run_of(study, "taught"), tmp_path / "new", sensitivity=1.5)
    assert list(tmp_path.iterdir()) == []


@pytest.fixture(scope="module")
def refitted(study):
    return api.refit(study, "taught")


def test_a_refit_trains_on_everybody_for_the_epochs_that_the_folds_chose(study, refitted):
    from raredistill.checkpoint import read_promise

    for entry in ("large", "taught"):
        chosen = [json.loads((run_of(study, entry, fold) / "run.json").read_text())["best_epoch"] + 1 for fold in (0, 1)]
        assert refitted.epochs[entry] == max(1, round(np.median(chosen)))
    assert [run.name for run in refitted.runs] == ["large", "taught"]
    for run in refitted.runs:
        assert run.epochs == refitted.epochs[run.name]
        assert len(read_promise(refitted.folder.run(run.id).weights("best")).training_patients) == 16
    tests = [read(run_of(study, "taught", fold) / "predictions.parquet").part("test", "best") for fold in (0, 1)]
    hits = np.concatenate([(table.probabilities().argmax(axis=1) == 1)[table.labels() == 1] for table in tests])
    recall = next(row for row in refitted.expected if (row["level"], row["metric"]) == ("sample", "recall:b"))
    per_run = [(table.probabilities().argmax(axis=1) == 1)[table.labels() == 1].mean() for table in tests]
    assert recall["estimate"] == pytest.approx(np.mean(per_run)) or recall["estimate"] == pytest.approx(hits.mean())


def test_an_entry_then_means_its_refitted_network_and_everybody_is_marked(study, refitted, images, tmp_path):
    found = api.predict(f"{study}:taught", images / "labels.csv", tmp_path / "p.csv")
    assert "refitted on all patients" in found.said
    assert set(found.samples["split"]) == {"train"}
    with pytest.raises(DataError, match="no predictions of the test part"):
        evaluate(read(tmp_path / "p.csv"))


def test_from_a_study_to_onnxruntime_alone(study, refitted, images, tmp_path):
    """The way of the README: study, refit, export, predict unlabelled images without raredistill, with the same answers."""
    new = draw(tmp_path / "new", {"a": 3, "b": 3}, per_patient=1, seed=9)
    (new / "labels.csv").unlink()
    told = raredistill("export", f"{study}:taught", "--out", tmp_path / "student", "--single")
    assert told.returncode == 0, told.stderr
    found = raredistill("predict", tmp_path / "student", new, "--out", tmp_path / "p.csv")
    assert found.returncode == 0, found.stderr
    table = pd.read_csv(tmp_path / "p.csv").set_index("sample")
    assert set(table["split"]) == {"test"}
    code = script_of((tmp_path / "student" / "README.md").read_text(), 0)
    for name in ("a0-0.png", "b2-0.png"):
        alone = run_script(code, tmp_path / "student", new / name)
        assert [alone["a"], alone["b"]] == pytest.approx(table.loc[name, ["p_a", "p_b"]].tolist(), abs=1e-5)


def test_a_study_that_cannot_be_refitted_says_why(study, tmp_path):
    with pytest.raises(ConfigError, match="no entry 'tought'"):
        api.refit(study, "tought")
    with pytest.raises(DataError, match=r"study\.json"):
        api.refit(tmp_path, "taught")


def test_a_runs_folder_can_be_evaluated(study):
    run = run_of(study, "taught")
    told, table = raredistill("evaluate", run), raredistill("evaluate", run / "predictions.parquet")
    assert told.returncode == 0, told.stderr
    assert told.stdout == table.stdout


def test_a_brats_case_without_segmentation_and_grade_is_prepared_as_in_training(tmp_path):
    raw = write_phantom(tmp_path / "raw", patients=12, size=(40, 40, 16), rare_share=0.5, seed=3, workers=1)
    config = {
        "name": "brats", "cohort": {"source": "brats_nifti", "path": str(raw), "size": 16, "options": {"min_tumour_voxels": 3}},
        "channels": ["t1ce"], "splits": {"folds": 2, "repeats": 1, "validation_share": 0.4},
        "training": {"epochs": 1, "accelerator": "cpu"},
        "runs": [{"name": "student", "model": "small_cnn"}],
    }  # fmt: skip
    api.study(config, tmp_path / "study")
    model = run_of(tmp_path / "study", "student")
    whole = api.predict(model, next((tmp_path / "study").glob("cohort-*")), tmp_path / "whole.csv").samples
    case = next(path for path in sorted(raw.rglob("*")) if path.is_dir() and list(path.glob("*seg*")))
    (tmp_path / "new").mkdir()
    for file in case.iterdir():
        if "seg" not in file.name:
            (tmp_path / "new" / file.name).write_bytes(file.read_bytes())
    found = api.predict(model, tmp_path / "new", tmp_path / "new.csv").samples
    same = whole[whole["patient"] == case.name].merge(found, on="slice", suffixes=("", "_new"))
    assert len(same) == (whole["patient"] == case.name).sum() > 0
    for name in ("healthy", "HGG", "LGG"):
        assert same[f"p_{name}"].to_numpy() == pytest.approx(same[f"p_{name}_new"].to_numpy())
    assert "label" not in pd.read_csv(tmp_path / "new.csv").columns
    assert len(pd.read_csv(tmp_path / "new.patients.csv")) == 1
