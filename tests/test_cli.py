"""The command line as a user meets it: in a process of its own."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml
from PIL import Image


def raredistill(*arguments, cwd=None):
    command = [sys.executable, "-c", "from raredistill.cli import main; main()", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, check=False)


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """A folder of images with a table: three classes, five patients each, two images a patient."""
    root = tmp_path_factory.mktemp("images")
    generator, rows = np.random.default_rng(0), []
    for number, label in enumerate(("a", "b", "c")):
        for patient in range(5):
            for n in range(2):
                name = f"{label}{patient}-{n}.png"
                Image.fromarray(generator.integers(0, 60, (16, 16), dtype=np.uint8) + np.uint8(90 * number)).save(root / name)
                rows.append({"image": name, "label": label, "patient": f"{label}{patient}"})
    pd.DataFrame(rows).to_csv(root / "labels.csv", index=False)
    return root


@pytest.fixture(scope="module")
def config(images):
    raw = {
        "name": "cli", "cohort": {"source": "table", "path": str(images / "labels.csv"), "size": 16},
        "splits": {"folds": 2, "repeats": 1, "validation_share": 0.34}, "training": {"epochs": 1, "batch_size": 8, "accelerator": "cpu"},
        "runs": [
            {"name": "large", "model": "cifar_resnet8"}, {"name": "small", "model": "small_cnn"},
            {"name": "taught", "model": "small_cnn", "teacher": "large"},
        ],
    }  # fmt: skip
    path = images / "study.yaml"
    path.write_text(yaml.safe_dump(raw))
    return path


def test_help_loads_nothing_heavy():
    code = "import sys, raredistill.cli; print([m for m in ('torch', 'pandas', 'matplotlib', 'numpy', 'yaml') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
    shown = raredistill("--help")
    assert shown.returncode == 0
    assert all(
        verb in shown.stdout
        for verb in ("demo", "phantom", "verify", "prepare", "inspect", "methods", "study", "predict", "report", "compare")
    )


def test_the_main_job_from_images_to_report(images, config, tmp_path):
    verified = raredistill("verify", "table", images / "labels.csv")
    assert verified.returncode == 0, verified.stderr
    out = tmp_path / "study"
    done = raredistill("study", config, "--out", out)
    assert done.returncode == 0, done.stderr
    assert "next: open" in done.stdout
    assert (out / "report" / "report.html").stat().st_size > 10_000
    run = next(path for path in (out / "runs").iterdir() if path.name.startswith("taught"))
    cohort = next(out.glob("cohort-*"))
    predicted = raredistill("predict", run, cohort, "--out", tmp_path / "p.parquet")
    assert "30 samples of 15 patients" in predicted.stdout, predicted.stderr
    measured = raredistill("evaluate", tmp_path / "p.parquet")
    assert measured.returncode == 0, measured.stderr
    assert "macro" in measured.stdout.lower()
    other = next(path for path in (out / "runs").iterdir() if path.name.startswith("small") and "f0" in path.name)
    taught = next(path for path in (out / "runs").iterdir() if path.name.startswith("taught") and "f0" in path.name)
    compared = raredistill("compare", other, taught)
    assert "paired bootstrap over the patients of one test set" in compared.stdout, compared.stderr
    inspected = raredistill("inspect", cohort)
    assert inspected.returncode == 0, inspected.stderr
    assert (cohort / "contact_sheet.png").exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["study", "none.yaml"], "none.yaml"),
        (["prepare", "table", "none.csv", "--out", "c"], "none.csv"),
        (["prepare", "tabel", "x.csv"], "table"),
        (["inspect", "nothing"], "nothing"),
        (["studdy"], "studdy"),
        (["report", "nowhere"], "nowhere"),
        (["evaluate", "nothing.parquet"], "nothing.parquet"),
        (["verify", "arrays", "/dev/null"], "cannot be read as .npz"),
        (["prepare", "image_folder", ".", "mode=[grey"], "mode=[grey: cannot be read as YAML"),
        (["prepare", "table", "x.csv", "--workers", "0"], "--workers"),
        (["phantom", "/dev/null/x"], "/dev/null/x cannot be written"),
    ],
)
def test_bad_input_is_one_message_and_code_2(arguments, said, tmp_path):
    result = raredistill(*arguments, cwd=tmp_path)
    assert result.returncode == 2
    assert said in result.stderr
    assert "Traceback" not in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_generated_data_say_so_and_whole_names_are_shown(tmp_path):
    made = raredistill("phantom", tmp_path / "p", "--patients", 2, "--size", 24, 24, 16, "--workers", 1)
    assert made.returncode == 0, made.stderr
    file = tmp_path / "p" / "BraTS20_Training_002" / "BraTS20_Training_002_flair.nii.gz"
    file.rename(file.with_name("x_flair.nii.gz.bak"))
    verified = raredistill("verify", "brats_nifti", tmp_path / "p", "--workers", 1)
    assert verified.returncode == 2
    assert "1 usable patients" in verified.stdout
    assert "1 error, 0 warnings, 0 notes; generated data (phantom), not patients" in verified.stdout
    assert "no flair file" in verified.stdout
    assert "…" not in verified.stdout
    assert "leave those patients out with prepare --leave-out-bad" in verified.stderr
    prepared = raredistill(
        "prepare", "brats_nifti", tmp_path / "p", "--out", tmp_path / "c", "--size", 16, "--leave-out-bad", "--workers", 1
    )
    assert prepared.returncode == 0, prepared.stderr
    assert "generated data (phantom), not patients" in prepared.stdout
    assert "slices of each class by both label rules (used: default)" in prepared.stdout
    assert "BraTS20_Training_002" in prepared.stdout


def test_a_wrong_model_is_told_before_training(config, tmp_path):
    result = raredistill("study", config, "runs.0.model=resnet81", "--out", tmp_path / "s")
    assert result.returncode == 2
    assert "did you mean" in result.stderr


def test_methods_lists_distillers_and_losses():
    shown = raredistill("methods").stdout
    assert all(name in shown for name in ("pckd", "progressive", "remix", "logit_adjustment", "label_aware_smoothing"))
    assert all(name in shown for name in ("kd", "cross_entropy", "balanced_softmax"))


def test_the_package_offers_its_names_to_a_notebook():
    import raredistill as package

    for name in package.__all__:
        assert callable(getattr(package, name))
    with pytest.raises(AttributeError, match="nothing_such"):
        _ = package.nothing_such
    assert Path(package.__file__).exists()
