"""A study that stops by looks: real runs of tiny networks, and the rule that may not change; what a plan says before the first run."""

import json
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import yaml

from conftest import write_tiny
from raredistill import api
from raredistill.config import check_config, looks_of
from raredistill.errors import ConfigError, DataError
from raredistill.evaluation.looks import Looks, State
from raredistill.evaluation.planning import Pilot, forecast
from raredistill.runs.layout import StudyFolder
from raredistill.studies.looks import hold_rule, runs_of_look, write_states
from raredistill.studies.power import assumed, chart, make_plan_of, repeats_within


@pytest.fixture(scope="module")
def cohort(tmp_path_factory):
    return write_tiny(tmp_path_factory.mktemp("looks") / "cohort", patients={"HGG": 18, "LGG": 12}, slices=1)


def config(cohort, **changes):
    plain = {
        "name": "looks", "cohort": str(cohort.root), "channels": ["flair"], "splits": {"folds": 2},
        "training": {"epochs": 3, "batch_size": 8, "learning_rate": 0.01, "augmentation": "none", "accelerator": "cpu"},
        "runs": [{"name": "teacher", "model": "cifar_resnet8"}, {"name": "small", "model": "small_cnn"},
                 {"name": "taught", "model": "small_cnn", "teacher": "teacher"}],
    }  # fmt: skip
    return plain | changes


def test_a_study_by_looks_trains_no_run_that_no_look_needs_and_keeps_its_rule(cohort, tmp_path):
    # A margin that cannot be missed settles the pair at the first look; the repeats of the second are never trained.
    rule = {"looks": [2, 4], "alpha": [0.02, 0.03], "margin": 0.9}
    found = api.study(config(cohort, evidence=rule), tmp_path / "s")
    study = json.loads((tmp_path / "s" / "study.json").read_text())
    trained = {run["repeat"] for run in study["runs"] if run["status"] == "done"}
    kept = json.loads((tmp_path / "s" / "looks.json").read_text())
    settled = kept["states"].get("taught", {}).get("outcome", "open")
    assert trained == ({0, 1} if settled != "open" else {0, 1, 2, 3})
    assert kept["rule"] == {**rule, "wanted": None}
    assert len({run["seed"] for run in study["runs"]}) == 4  # each repeat has a seed of its own
    page = found.page.read_text()
    if settled != "open":
        assert "By its looks the study was settled early: 12 of 24 runs were not needed" in page
        assert "Looks: when the study was tested" in page
        with pytest.raises(ConfigError, match="changed after the first look"):
            api.study(config(cohort, evidence={**rule, "margin": 0.5}), tmp_path / "s")
    with pytest.raises(ConfigError, match="--only divides a plan"):
        api.study(config(cohort, evidence=rule), tmp_path / "s", only=(0, 2))


def test_only_open_pairs_have_further_runs(cohort):
    from raredistill.config import make_study

    entries = [{"name": n, "model": "small_cnn", **({"teacher": t} if t else {})}
               for n, t in (("a", ""), ("b", ""), ("c", "a"), ("d", "b"), ("lone", ""))]  # fmt: skip
    made = make_study(check_config(config(cohort, runs=entries, evidence={"looks": [2, 3], "alpha": [0.02, 0.03]}), "test"), cohort, "")
    pairs = {"c": ["a"], "d": ["a", "b"]}
    states = {"c": State("open", 2, 0.02), "d": State("helps", 2, 0.02)}
    first, second = runs_of_look(made.plan(), 0, made.looks, {}, {}), runs_of_look(made.plan(), 1, made.looks, states, pairs)
    assert {(run.entry.name, run.split.repeat) for run in first} == {(name, r) for name in ("a", "b", "c", "d", "lone") for r in (0, 1)}
    assert {run.entry.name for run in second} == {"a", "c"}
    assert {run.split.repeat for run in second} == {0, 1, 2}
    by_teacher = runs_of_look(made.plan(), 1, made.looks, {"c": State("helps"), "d": State()}, {"c": ["a"], "d": ["b"]})
    assert {run.entry.name for run in by_teacher} == {"b", "d"}


def test_looks_that_contradict_the_splits_are_refused(cohort):
    looks = {"looks": [2, 4], "alpha": [0.02, 0.03]}
    for changes, message in (
        ({"evidence": looks, "splits": {"repeats": 3}}, "end at 4 repeats"), ({"evidence": {"alpha": [0.05]}}, "there are none"),
        ({"evidence": looks, "splits": {"protocol": "holdout"}}, "leave looks out"),
        ({"evidence": {**looks, "alpha": [0.03, 0.03]}}, "at most 0.05"),
    ):  # fmt: skip
        with pytest.raises(ConfigError, match=message):
            looks_of(check_config(config(cohort, **changes), "test"))
    assert looks_of(check_config(config(cohort), "test")) is None
    with pytest.raises(ConfigError, match="did you mean margin"):
        check_config(config(cohort, evidence={"margn": 0.1}), "test")


def test_states_are_read_as_they_were_written_and_a_damaged_file_is_named(tmp_path):
    folder, rule = StudyFolder(tmp_path), Looks(margin=0.02)
    assert hold_rule(folder, rule) == {}
    states = {"a": State("helps", 2, 0.01, None, 0.003, ((2, 0.1, 0.003),))}
    write_states(folder, rule, states)
    assert hold_rule(folder, rule) == states
    with pytest.raises(ConfigError, match="changed after the first look"):
        hold_rule(folder, replace(rule, looks=(2, 3, 10)))
    folder.looks.write_text("{}")
    with pytest.raises(DataError, match="not what a study writes"):
        hold_rule(folder, rule)


def test_a_plan_is_the_forecast_at_holms_level():
    pilot = Pilot(0.0004, 0.0001, 0.0006, 2, 5, 30.0, 0.0002)
    made = make_plan_of(pilot, basis="Measured", folds=5, repeats=3, pairs=2, entries=4, rare="LGG", rare_patients=66)
    assert made.forecast == forecast(pilot, runs=3, level=0.025)
    assert made.trainings == 60
    assert f"gains in LGG F1 of {made.forecast.detectable:.3f} or more" in made.sentences[1]
    assert f"With these 66 LGG patients no number of trainings finds gains in LGG F1 below {made.forecast.floor:.3f}" in made.sentences[-1]
    wanted = make_plan_of(pilot, basis="Measured", folds=5, repeats=3, pairs=2, entries=4, rare="LGG", rare_patients=66, gain=0.10)
    assert wanted.forecast.detectable <= 0.10 < forecast(pilot, runs=wanted.repeats - 1, level=0.025).detectable
    assert wanted.designs.iloc[0]["cost"] == wanted.designs["cost"].min()
    none = make_plan_of(pilot, basis="Measured", folds=5, repeats=3, pairs=2, entries=4, rare="LGG", rare_patients=66, gain=0.01)
    assert any("not found by any number of trainings" in sentence for sentence in none.sentences)
    assert (none.repeats, len(none.designs)) == (3, 0)
    bars = chart(made.table, made.table.columns[0])
    assert len(bars) == len(made.table)
    assert assumed(66, 5).patients < assumed(20, 5).patients
    assert (repeats_within(1800, 2), repeats_within(90_000, 2)) == (4, 1)


def test_the_command_plans_from_assumptions_and_then_from_what_was_measured(cohort, tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text(yaml.safe_dump(config(cohort, splits={"folds": 2, "repeats": 2})))

    def said(*arguments):
        command = [
            sys.executable,
            "-c",
            "from raredistill.cli import main; main()",
            "plan",
            str(path),
            "--out",
            str(tmp_path / "s"),
            *arguments,
        ]
        return subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)

    shown = said()
    assert shown.returncode == 0, shown.stderr
    assert "Assumed, since" in shown.stdout
    assert "2 folds x 2 repeats find gains in LGG F1 of" in shown.stdout
    assert "12 networks in all" in shown.stdout
    assert "repeats █" in shown.stdout
    assert "designs that find the gain" in said("--gain", "0.5").stdout
    both = said("--gain", "0.5", "--runs", "9")
    assert both.returncode == 2
    assert "ask one at a time" in both.stderr
    api.study(config(cohort, splits={"folds": 2, "repeats": 2}), tmp_path / "s")
    measured = api.plan(path, tmp_path / "s", runs=24)
    assert measured.repeats == 4
    assert measured.basis.startswith(("Measured on 2 finished runs of taught", "Assumed"))
    assert np.isfinite(measured.forecast.detectable)
