"""Comparing files made elsewhere: what is said, and what is refused with exit code 2; published matrices; canaries."""

import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import f1_score

from raredistill.errors import DataError
from raredistill.evaluation.levels import evaluate, metrics_rows, patient_predictions
from raredistill.evaluation.published import is_published, published_tables, read_published
from raredistill.predictions import COLUMNS, Predictions, read
from raredistill.reports.versus import over_datasets, versus

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
CLASSES = ("healthy", "HGG", "LGG")


def foreign(skill, *, noise=0, patients=30, hard=False, folds=1):
    """A table as another tool writes it: label, patient and probabilities, or the predicted class."""
    generator, rows = np.random.default_rng(noise), []
    for patient in range(patients):
        grade = "LGG" if patient % 3 == 0 else "HGG"
        for index in range(4):
            label = "healthy" if index < 2 else grade
            logits = generator.normal(size=3) + skill * (np.array(CLASSES) == label)
            share = np.exp(logits) / np.exp(logits).sum()
            given = {"predicted": CLASSES[int(share.argmax())]} if hard else {f"p_{n}": p for n, p in zip(CLASSES, share, strict=True)}
            rows.append({"sample": f"{patient}-{index}", "patient": f"p{patient}", "label": label, "fold": patient % folds, **given})
    return pd.DataFrame(rows)


def saved(path, table):
    (table.to_csv if path.suffix == ".csv" else table.to_parquet)(path, index=False)
    return path


def raredistill(*arguments):
    command = [sys.executable, "-c", "from raredistill.cli import main; main()", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


def test_two_files_are_compared_on_the_same_patients(tmp_path):
    first, second = foreign(0.8), foreign(2.5, noise=1)
    paths = saved(tmp_path / "a.csv", first), saved(tmp_path / "b.parquet", second)
    found = versus(*paths, background="healthy")
    scores = []
    for table in (first, second):
        guess = np.array(CLASSES)[table[[f"p_{name}" for name in CLASSES]].to_numpy().argmax(1)]
        scores.append(f1_score(table["label"], guess, labels=["LGG"], average="macro"))
    assert found.gain == pytest.approx(scores[1] - scores[0])
    assert f"LGG F1 {found.gain:+.3f}" in found.sentences[0]
    assert "This is about these networks only" in found.sentences[0]
    assert "only 10 patients with LGG" in found.sentences[-1]
    assert set(found.rows["level"]) == {"slice", "patient"}


def test_runs_of_a_foreign_table_are_tested_and_one_run_is_described(tmp_path):
    def runs(skill, noise, number):
        return pd.concat([foreign(skill, noise=noise + 10 * n, folds=5).assign(repeat=n) for n in range(number)])

    paths = [saved(tmp_path / f"{n}.csv", runs(skill, n, 2)) for n, skill in enumerate((0.8, 2.5))]
    found = versus(*paths, background="healthy")
    assert set(found.rows["basis"]) == {"gain test"}
    assert "helps: in LGG F1 it gains" in found.sentences[0]
    assert "gain test over 2 runs of 5 folds" in found.sentences[0]
    paths = [saved(tmp_path / f"{n}.csv", runs(skill, n, 1)) for n, skill in enumerate((0.8, 2.5))]
    found = versus(*paths, background="healthy")
    assert set(found.rows["basis"]) == {"folds"}
    assert "described, not tested: one run of each patient does not show the noise of training" in found.sentences[0]


def test_gains_are_reported_by_groups_of_a_table(tmp_path):
    def runs(skill, noise):
        return pd.concat([foreign(skill, noise=noise + 10 * n, folds=5, patients=60).assign(repeat=n) for n in range(2)])

    paths = [saved(tmp_path / f"{n}.csv", runs(skill, n)) for n, skill in enumerate((0.8, 2.5))]
    people = pd.DataFrame({"patient": [f"p{n}" for n in range(60)], "sex": ["f" if n < 40 else "m" for n in range(60)]})
    table = saved(tmp_path / "people.csv", people)
    found = versus(*paths, background="healthy", groups=(table, "sex")).groups.set_index("group")
    assert found["patients"].to_dict() == {"f": 40, "m": 20}
    assert found.loc["f", "low"] < found.loc["f", "gain"] < found.loc["f", "high"]
    assert "described, not tested" in found.loc["m", "note"]  # seven patients with LGG
    with pytest.raises(DataError, match="no column age"):
        versus(*paths, background="healthy", groups=(table, "age"))
    half = raredistill("compare", *paths, "--groups", table)
    assert half.returncode == 2
    assert "give both" in half.stderr


def test_columns_in_another_order_are_the_same_classes(tmp_path):
    table = foreign(1.0)
    paths = saved(tmp_path / "a.csv", table), saved(tmp_path / "b.csv", table[[*table.columns[:4], "p_LGG", "p_healthy", "p_HGG"]])
    assert versus(*paths, background="healthy").gain == 0


def test_hard_labels_have_no_areas_and_say_why(tmp_path):
    path = saved(tmp_path / "hard.csv", foreign(1.0, hard=True))
    table = read(path, background="healthy")
    found = evaluate(table)
    assert np.isnan(found["slice"]["metrics"]["auprc"]).all()
    assert np.isnan(found["patient"]["metrics"]["brier"])
    assert "only hard labels are known" in found["slice"]["reasons"][0]
    assert {row["reason"] for row in metrics_rows(table)["without a value"]} == set(found["slice"]["reasons"])
    guess = foreign(1.0, hard=True)
    assert found["slice"]["metrics"]["macro_f1"] == pytest.approx(f1_score(guess["label"], guess["predicted"], average="macro"))
    assert not versus(path, path, background="healthy").rows["metric"].str.startswith("au").any()


@pytest.mark.parametrize("rule", ["mean", "max", "top5"])
def test_patient_rules_are_those_written_out(rule):
    generator = np.random.default_rng(0)
    rows = [
        ("r", f"{p}-{n}", f"p{p}", "ab"[p % 2], "test", 0, 0, 0, "best", "ab"[p % 2], generator.normal(size=3))
        for p in range(6)
        for n in range(3 + 2 * p)
    ]
    table = Predictions(pd.DataFrame(rows, columns=list(COLUMNS)), ("none", "a", "b"), "none")
    found = patient_predictions(table, rule)
    for name, probability in zip(found.patient, found.probability, strict=True):
        own = table.probabilities()[(table.table["patient"] == name).to_numpy()][:, 1:]
        put = {"mean": own.mean(0), "max": own.max(0), "top5": np.sort(own, axis=0)[-5:].mean(0)}[rule]
        np.testing.assert_allclose(probability, put / put.sum())


REFUSED = {
    "a column is missing": (lambda t: t.drop(columns="patient"), "lacks the columns patient"),
    "unequal samples": (lambda t: t.iloc[1:], "different samples"),
    "probabilities that add up to 2": (lambda t: t.assign(p_HGG=t["p_HGG"] + 1), "do not add up to 1"),
    "a sample with two labels": (
        lambda t: pd.concat([t, t.iloc[[3]].assign(label="healthy", fold=1)]), "two labels",
    ),
    "a patient with two labels": (lambda t: t.assign(patient_label=t["label"]), "two patient labels"),
    "another label": (lambda t: t.assign(label=t["label"].mask(t["sample"] == "1-0", "HGG")), "another label"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_bad_files_are_refused_with_their_fault(tmp_path, case):
    change, message = REFUSED[case]
    good = saved(tmp_path / "good.csv", foreign(1.0))
    bad = saved(tmp_path / "bad.csv", change(foreign(1.0)))
    with pytest.raises(DataError, match=message):
        versus(good, bad, background="healthy")


def test_the_command_line_says_it_plainly_and_exits_with_2(tmp_path):
    good = saved(tmp_path / "good.csv", foreign(1.0))
    bad = saved(tmp_path / "bad.csv", foreign(1.0).iloc[1:])
    refused = raredistill("compare", good, bad, "--background", "healthy")
    assert refused.returncode == 2
    assert refused.stderr.startswith("raredistill: ")
    assert "different samples" in refused.stderr
    assert "Traceback" not in refused.stderr
    few = [saved(tmp_path / f"{n}.csv", foreign(1.0 + n, folds=2)) for n in range(2)]
    untested = raredistill("compare", *few, "--background", "healthy")
    assert untested.returncode == 0
    assert "described, not tested: one run of each patient" in untested.stdout.replace("\n", " ")
    assert raredistill("compare", good).returncode == 2


def test_several_pairs_are_data_sets(tmp_path):
    assert "cannot reach a p below 0.0625" in over_datasets([0.01, 0.02, 0.03, 0.02, 0.05])
    assert "p = 0.0625" in over_datasets([0.01, 0.02, 0.03, 0.025, 0.05])


def test_thesis_matrices_come_out_to_three_decimals_and_are_only_described(shared_data):
    path = shared_data / "thesis-results" / "confusion_matrices.csv"
    assert is_published(path)
    runs, classes = read_published(path)
    raw = pd.read_csv(path, keep_default_na=False)
    assert len(runs) == 30
    for (_, row), (_, counts) in zip(runs.iterrows(), raw.iterrows(), strict=True):
        truth, guess = [], []
        for true in classes:
            for predicted in classes:
                number = counts[f"{true}_as_{predicted}"]
                truth += [true] * number
                guess += [predicted] * number
        expected = f1_score(truth, guess, labels=list(classes), average=None)
        assert [round(row[f"f1_{name}"], 3) for name in classes] == [round(value, 3) for value in expected]
        assert round(row["macro_f1"], 3) == round(expected.mean(), 3)
    chosen = runs.query("experiment == 'baseline' and student == 'mobilenet_v2' and fold == 0").iloc[0]
    assert (round(chosen["f1_LGG"], 3), round(chosen["macro_f1"], 3)) == (0.442, 0.613)
    tables, sentences = published_tables(path)
    assert len(tables["mean and standard deviation over runs"]) == 10
    assert sum("teaches" in sentence and "not tested" in sentence for sentence in sentences) == 5
    assert "Descriptive only: 3 runs" in sentences[-1]
    assert "cannot be tested" in sentences[-1]


def test_a_small_published_table_gives_scikit_learns_metrics_and_gains(tmp_path):
    path, generator, lines, expected = tmp_path / "m.csv", np.random.default_rng(0), [], {}
    for teacher in ("", "large"):
        scores = []
        for fold in range(3):
            truth = np.repeat(["a", "b"], [30, 12])
            guess = np.where(generator.random(42) < (0.9 if teacher else 0.7), truth, "b")
            counts = [int(((truth == true) & (guess == predicted)).sum()) for true in "ab" for predicted in "ab"]
            lines.append(",".join(map(str, [teacher, "small", fold, *counts])))
            scores.append(f1_score(truth, guess, labels=["a", "b"], average=None))
        expected[teacher] = np.mean(scores, axis=0)
    path.write_text("teacher,student,fold,a_as_a,a_as_b,b_as_a,b_as_b\n" + "\n".join(lines) + "\n")
    tables, sentences = published_tables(path)
    means = tables["mean and standard deviation over runs"].set_index("teacher")
    for teacher, scores in expected.items():
        assert means.loc[teacher, ["f1_a mean", "f1_b mean"]].tolist() == pytest.approx(scores.tolist())
    gain = expected["large"] - expected[""]
    assert f"large teaches small (3 runs): a F1 {gain[0]:+.3f}, b F1 {gain[1]:+.3f} against it alone; not tested." in sentences
    command = [sys.executable, "-c", "from raredistill.cli import main; main()", "evaluate", str(path)]
    shown = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "Descriptive only: 3 runs" in shown.stdout


def test_published_counts_that_are_no_whole_numbers_are_refused(tmp_path):
    (tmp_path / "m.csv").write_text("fold,a_as_a,a_as_b,b_as_a,b_as_b\n0,1,2,3,0.5\n")
    with pytest.raises(DataError, match="not a whole number"):
        published_tables(tmp_path / "m.csv")


def test_published_matrices_with_a_hole_are_refused(tmp_path):
    path = tmp_path / "m.csv"
    path.write_text("fold,a_as_a,a_as_b,b_as_a\n0,1,2,3\n")
    with pytest.raises(DataError, match="b_as_b"):
        published_tables(path)


def test_patient_intervals_hold_the_truth_and_slice_intervals_do_not():
    coverage = runpy.run_path(str(BENCHMARKS / "sim_coverage.py"))["coverage"]
    found = coverage(40, 300)
    assert 0.90 <= found["patients, percentile"] <= 0.98
    assert 0.90 <= found["patients, BCa"] <= 0.98
    assert found["slices, percentile"] < 0.8


def test_the_simulated_bootstrap_is_the_one_of_the_package():
    simulation = runpy.run_path(str(BENCHMARKS / "sim_coverage.py"))
    hits, false = simulation["draw_counts"](np.random.default_rng(3), 1, 23)
    draws = simulation["by_patient"](np.random.default_rng(0), hits, false)
    rows = []
    for grade, counts in (("rare", hits[0]), ("common", false[0])):
        for patient, count in enumerate(counts):
            for index in range(10):
                logits = [1.0, 0.0] if index < count else [0.0, 1.0]
                name = f"{grade}{patient}"
                rows.append(("r", f"{name}-{index}", name, grade, "test", 0, 0, 0, "best", grade, logits))
    table = Predictions(pd.DataFrame(rows, columns=list(COLUMNS)), ("rare", "common"))
    from raredistill.evaluation import patient_bootstrap

    _, low, high = patient_bootstrap(table, "f1:rare")
    np.testing.assert_allclose([low, high], np.quantile(draws[:, 0], [0.025, 0.975]), atol=0.02)


def test_the_corrected_test_keeps_its_level_on_outer_folds_and_not_on_a_shared_test_set():
    rejections = runpy.run_path(str(BENCHMARKS / "sim_null.py"))["rejections"]
    null, effect = rejections("methods", 150), rejections("effect", 60)
    assert null["outer"] <= 0.07
    assert null["shared"] > 0.2
    assert effect["outer"] > 0.6
