"""What a new user finds out without reading code: settings, version, a first study."""

import dataclasses
import subprocess
import sys
from importlib.metadata import version

import pytest

import raredistill
from raredistill.config import SplitConfig, load_config, make_study
from raredistill.errors import ConfigError, DataError
from raredistill.reference import all_keys, find_keys
from raredistill.runs.entry import Entry
from raredistill.ship.start import start, write_start
from raredistill.training.settings import Settings


def test_every_key_of_a_study_is_listed_with_its_meaning():
    keys = {key.key: key for key in all_keys()}
    expected = {f"training.{field.name}" for field in dataclasses.fields(Settings)} | {
        f"splits.{name}" for name in SplitConfig.model_fields
    }
    expected |= {f"runs.{field.name}" for field in dataclasses.fields(Entry)} - {"runs.settings"}
    assert expected <= set(keys)
    assert [key for key, found in keys.items() if not found.meaning] == []
    assert keys["training.epochs"].default == str(Settings().epochs)
    assert keys["splits.folds"].default == str(SplitConfig().folds)


def test_a_key_is_found_by_its_last_part_and_a_wrong_one_names_the_nearest():
    assert [key.key for key in find_keys("learning_rate")] == ["training.learning_rate"]
    with pytest.raises(ConfigError, match="did you mean learning_rate"):
        find_keys("lerning_rate")


def test_the_version_is_the_installed_one():
    shown = subprocess.run([sys.executable, "-m", "raredistill", "--version"], capture_output=True, text=True, check=True)
    assert shown.stdout.strip() == f"raredistill {version('raredistill')}"
    assert raredistill.__version__ == version("raredistill")


def test_a_first_study_fits_its_cohort(tiny_cohort, tmp_path):
    made = write_start(tiny_cohort, tmp_path / "study.yaml")
    assert (made.rare, made.patients) == ("LGG", 6)
    study = make_study(load_config(tmp_path / "study.yaml"), tiny_cohort, "")
    assert [entry.name for entry in study.entries] == ["teacher", "control", "student"]
    labels = tiny_cohort.samples["patient_label"].to_numpy()
    patients = tiny_cohort.samples["patient"].to_numpy()
    for split in study.splits:
        assert len(set(patients[split.test][labels[split.test] == "LGG"])) == 2
    assert made.precision == pytest.approx(1.96 * (0.8 * 0.2 / 6) ** 0.5)
    assert made.text == start(tiny_cohort).text
    with pytest.raises(DataError, match="exists"):
        write_start(tiny_cohort, tmp_path / "study.yaml")
