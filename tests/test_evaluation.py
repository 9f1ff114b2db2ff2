import numpy as np
import pandas as pd
import pytest
from scipy import stats
from scipy.special import softmax
from sklearn import metrics as reference

from raredistill.errors import ConfigError, DataError
from raredistill.evaluation import corrected_interval, corrected_resampled_t, evaluate, holm, paired_patient_bootstrap, patient_bootstrap
from raredistill.evaluation.calibration import ece, fit_temperature, reliability_table
from raredistill.evaluation.compare import corrected_error, detectable
from raredistill.evaluation.levels import metrics_rows, patient_predictions, select
from raredistill.predictions import Predictions

CLASSES = ("healthy", "HGG", "LGG")


def _predictions(seed=0, *, patients=20, skill=1.0, seeds=1, slices=6, split="test", background="healthy"):
    """A cohort that is the same for each seed, and predictions that are not."""
    cohort, noise = np.random.default_rng(99), np.random.default_rng(seed)
    rows = []
    for patient in range(patients):
        tumour = "LGG" if patient % 4 == 0 else "HGG"
        for place in range(slices):
            label = "healthy" if background and cohort.random() < 0.4 else tumour
            for member in range(seeds):
                logits = (noise.normal(size=3) + skill * np.eye(3)[CLASSES.index(label)]).astype(np.float32)
                rows.append(("run", f"{patient}-{place}", f"p{patient:02}", tumour, split, 0, 0, member, "best", label, logits))
    columns = ["run", "sample", "patient", "patient_label", "split", "repeat", "fold", "seed", "checkpoint", "label", "logits"]
    return Predictions(pd.DataFrame(rows, columns=columns), CLASSES, background)


def _changed(predictions, **columns):
    return Predictions(predictions.table.assign(**columns), predictions.classes, predictions.background)


def test_a_patient_is_the_renormalised_mean_of_his_slices_over_seeds():
    predictions = _predictions(seeds=2)
    found = patient_predictions(predictions)
    assert found.classes == ("HGG", "LGG")
    assert found.patient == sorted(set(predictions.table["patient"]))
    for name, label, probability in zip(found.patient, found.label, found.probability, strict=True):
        rows = predictions.table[predictions.table["patient"] == name]
        mean = np.mean([softmax(np.asarray(logits, dtype=float))[1:] for logits in rows["logits"]], axis=0)
        np.testing.assert_allclose(probability, mean / mean.sum(), atol=1e-12)
        assert found.classes[label] == rows["patient_label"].iloc[0]


def test_a_sample_weighs_the_same_however_many_seeds_it_has():
    predictions = _predictions(seeds=2)
    table = predictions.table
    first = table.index[(table["sample"] == "0-0") & (table["seed"] == 1)]
    found = patient_predictions(Predictions(table.drop(first), CLASSES, "healthy")).probability[0]
    kept = table.drop(first).query("patient == 'p00'")
    means = [np.mean([softmax(np.asarray(each, dtype=float))[1:] for each in rows], axis=0) for _, rows in kept.groupby("sample")["logits"]]
    np.testing.assert_allclose(found, np.mean(means, axis=0) / np.mean(means, axis=0).sum(), atol=1e-12)


def test_certain_background_leaves_equal_probabilities():
    predictions = _predictions(patients=2)
    found = patient_predictions(_changed(predictions, logits=[[2000.0, 0.0, 0.0]] * len(predictions.table)))
    np.testing.assert_array_equal(found.probability, np.full((2, 2), 0.5))


def test_patients_without_a_class_are_left_out():
    predictions = _predictions(patients=4)
    healthy = predictions.table["patient"] == "p01"
    labels = predictions.table["patient_label"].mask(healthy, "")
    assert patient_predictions(_changed(predictions, patient_label=labels)).patient == ["p00", "p02", "p03"]
    with pytest.raises(DataError, match="patient_label"):
        patient_predictions(_changed(predictions, patient_label=""))


def test_evaluate_gives_both_levels_of_the_part_asked_for():
    test, validation = _predictions(1), _predictions(2, split="validation")
    both = Predictions(pd.concat([test.table, validation.table], ignore_index=True), CLASSES, "healthy")
    found = evaluate(both)
    guess = test.logits().argmax(axis=1)
    np.testing.assert_array_equal(found["slice"]["confusion"], reference.confusion_matrix(test.labels(), guess))
    assert found["slice"]["metrics"]["macro_f1"] == pytest.approx(reference.f1_score(test.labels(), guess, average="macro"))
    pd.testing.assert_frame_equal(select(both).table, test.table)
    assert (found["slice"]["samples"], found["patient"]["samples"]) == (120, 20)
    patients = patient_predictions(test)
    expected = reference.balanced_accuracy_score(patients.label, patients.probability.argmax(axis=1))
    assert found["patient"]["metrics"]["balanced_accuracy"] == pytest.approx(expected)
    assert evaluate(both, split="validation")["slice"]["confusion"].tolist() != found["slice"]["confusion"].tolist()
    with pytest.raises(DataError, match="last"):
        evaluate(both, checkpoint="last")


def test_patients_of_several_runs_are_rows_of_their_own_and_no_ensemble():
    predictions = _predictions(seeds=3)
    found = evaluate(predictions)["patient"]
    parts = [patient_predictions(predictions.rows(np.flatnonzero(predictions.table["seed"] == seed))) for seed in range(3)]
    label, guess = (np.concatenate(each) for each in zip(*((p.label, p.probability.argmax(1)) for p in parts), strict=True))
    assert found["samples"] == 60
    assert found["metrics"]["macro_f1"] == pytest.approx(reference.f1_score(label, guess, average="macro"))


def test_says_why_there_is_no_patient_level():
    single = _predictions(slices=1, background=None)
    assert evaluate(single)["patient"] is None
    assert "one sample" in evaluate(single)["patient_reason"]
    assert "patient_label" in evaluate(_changed(_predictions(), patient_label=""))["patient_reason"]
    assert "by patient" not in metrics_rows(single)


def test_two_classes_with_background_have_no_patient_level():
    table = _predictions(patients=4).table
    table = table.assign(logits=[row[:2] for row in table["logits"]], patient_label="HGG", label=table["label"].replace("LGG", "HGG"))
    assert "one class only" in evaluate(Predictions(table, CLASSES[:2], "healthy"))["patient_reason"]


def test_rows_to_print():
    predictions = _predictions()
    rows = metrics_rows(predictions)
    assert [row["class"] for row in rows["by slice"]] == [*CLASSES, "macro"]
    assert [row["class"] for row in rows["by patient"]] == ["HGG", "LGG", "macro"]
    found = evaluate(predictions)
    assert rows["by slice"][2]["auprc"] == found["slice"]["metrics"]["auprc"][2]
    assert rows["by slice"][-1]["f1"] == pytest.approx(found["slice"]["metrics"]["macro_f1"])
    assert [row["level"] for row in rows["overall"]] == ["slice", "patient"]
    assert rows["overall"][1]["mcc"] == found["patient"]["metrics"]["mcc"]


SCORES = {
    "macro_f1": lambda label, p: reference.f1_score(label, p.argmax(1), average="macro"),
    "balanced_accuracy": lambda label, p: reference.balanced_accuracy_score(label, p.argmax(1)),
    "accuracy": lambda label, p: reference.accuracy_score(label, p.argmax(1)),
    "f1:LGG": lambda label, p: reference.f1_score(label, p.argmax(1), average=None)[2],
    "recall:LGG": lambda label, p: reference.recall_score(label, p.argmax(1), average=None)[2],
    "precision:HGG": lambda label, p: reference.precision_score(label, p.argmax(1), average=None)[1],
    "auprc:LGG": lambda label, p: reference.average_precision_score(label == 2, p[:, 2]),
    "auroc:LGG": lambda label, p: reference.roc_auc_score(label == 2, p[:, 2]),
}


@pytest.mark.parametrize("metric", SCORES)
def test_named_metrics_are_the_same_as_explicit_loops(metric):
    a, b = _predictions(1, skill=1.5), _predictions(2)
    np.testing.assert_allclose(
        patient_bootstrap(a, metric, resamples=20, seed=5), patient_bootstrap(a, SCORES[metric], resamples=20, seed=5), atol=1e-12
    )
    named, looped = (paired_patient_bootstrap(a, b, each, resamples=20, seed=5) for each in (metric, SCORES[metric]))
    np.testing.assert_allclose(named, looped, atol=1e-12)
    estimate, low, high = patient_bootstrap(a, metric, resamples=40)
    assert low <= estimate <= high
    assert estimate == pytest.approx(SCORES[metric](a.labels(), a.probabilities()))


def test_interval_agrees_with_a_hand_written_stratified_bootstrap():
    predictions = _predictions()
    table = predictions.table.assign(right=predictions.logits().argmax(axis=1) == predictions.labels())
    share = table.groupby(["patient_label", "patient"])["right"].mean()
    strata = [each.to_numpy() for _, each in share.groupby(level=0)]
    generator = np.random.default_rng(1)
    draws = [np.concatenate([generator.choice(each, len(each)) for each in strata]).mean() for _ in range(4000)]
    estimate, low, high = patient_bootstrap(predictions, "accuracy", resamples=4000)
    assert estimate == pytest.approx(share.mean())
    np.testing.assert_allclose([low, high], np.percentile(draws, [2.5, 97.5]), atol=0.01)


def test_every_draw_keeps_the_number_of_patients_of_each_class():
    predictions = _predictions(background=None)
    shares = []
    patient_bootstrap(predictions, lambda label, _: shares.append((label == 2).sum()) or 0.5, resamples=20)
    assert set(shares) == {5 * 6}
    shares.clear()
    # Without patient labels the rarest of a patient's own labels takes their place.
    patient_bootstrap(_changed(predictions, patient_label=""), lambda label, _: shares.append((label == 2).sum()) or 0.5, resamples=20)
    assert set(shares) == {5 * 6}


def test_p_counts_the_draws_on_the_other_side_of_zero():
    good, poor = _predictions(1, skill=6), _predictions(2, skill=0)
    difference, low, high, p = paired_patient_bootstrap(good, poor, "macro_f1", resamples=199)
    assert 0 < low < difference < high
    assert p == pytest.approx(2 / 200)
    assert paired_patient_bootstrap(good, good, "macro_f1", resamples=50) == (0, 0, 0, 1)
    back = paired_patient_bootstrap(poor, good, "macro_f1", resamples=199)
    np.testing.assert_allclose(back, (-difference, -high, -low, p), atol=1e-12)


def test_seeds_are_averaged_and_row_order_does_not_matter():
    one, three = _predictions(1), _predictions(2, seeds=3)
    shuffled = Predictions(three.table.sample(frac=1, random_state=0).reset_index(drop=True), CLASSES, "healthy")
    found = paired_patient_bootstrap(one, three, "f1:LGG", resamples=50)
    assert found == pytest.approx(paired_patient_bootstrap(one, shuffled, "f1:LGG", resamples=50))
    runs = [three.rows(np.flatnonzero(three.table["seed"] == seed)) for seed in range(3)]
    single, *expected = [SCORES["f1:LGG"](each.labels(), each.probabilities()) for each in (one, *runs)]
    assert found[0] == pytest.approx(single - np.mean(expected))


def test_the_seed_decides_the_draws():
    predictions = _predictions()
    assert patient_bootstrap(predictions, "macro_f1", seed=1) == patient_bootstrap(predictions, "macro_f1", seed=1)
    assert patient_bootstrap(predictions, "macro_f1", seed=1) != patient_bootstrap(predictions, "macro_f1", seed=2)


def test_refuses_tables_that_do_not_match():
    whole = _predictions(seeds=2)
    table = whole.table
    with pytest.raises(DataError, match="different samples"):
        paired_patient_bootstrap(whole, _predictions(patients=19), "macro_f1")
    with pytest.raises(DataError, match="different samples"):
        paired_patient_bootstrap(whole, _changed(whole, repeat=1), "macro_f1")
    with pytest.raises(DataError, match="another label"):
        paired_patient_bootstrap(whole, _changed(whole, label=table["label"].mask(table["sample"] == "3-1", "LGG")), "macro_f1")
    with pytest.raises(DataError, match="more runs"):
        paired_patient_bootstrap(whole, Predictions(table.iloc[1:], CLASSES, "healthy"), "macro_f1")
    with pytest.raises(DataError, match="different classes"):
        paired_patient_bootstrap(whole, Predictions(table, ("healthy", "LGG", "HGG"), "healthy"), "macro_f1")


def test_refuses_several_parts_and_metrics_without_a_value():
    predictions = _predictions()
    mixed = _changed(predictions, checkpoint=["best", "last"] * (len(predictions.table) // 2))
    with pytest.raises(DataError, match=r"predictions\.part"):
        patient_bootstrap(mixed, "macro_f1")
    healthy = Predictions(predictions.table.query("label != 'LGG'").reset_index(drop=True), CLASSES, "healthy")
    with pytest.raises(DataError, match="no samples"):
        patient_bootstrap(healthy, "f1:LGG", resamples=10)


def test_unknown_metrics_meet_a_suggestion():
    predictions = _predictions(patients=4)
    with pytest.raises(ConfigError, match="did you mean macro_f1"):
        patient_bootstrap(predictions, "makro_f1")
    with pytest.raises(ConfigError, match="did you mean f1:LGG"):
        patient_bootstrap(predictions, "f1:LG")
    with pytest.raises(ConfigError, match="resamples"):
        patient_bootstrap(predictions, "macro_f1", resamples=0)


def test_corrected_t_test():
    differences = np.array([0.02, 0.05, -0.01, 0.03, 0.04])
    t, p = corrected_resampled_t(differences, train_size=80, test_size=20)
    expected = differences.mean() / np.sqrt(differences.var(ddof=1) * (1 / 5 + 20 / 80))
    assert t == pytest.approx(expected)
    assert p == pytest.approx(2 * stats.t.cdf(-abs(expected), 4))
    # A test side that is small beside the training side leaves the plain t-test.
    plain = stats.ttest_1samp(differences, 0)
    assert corrected_resampled_t(differences, train_size=1e15, test_size=1) == pytest.approx((plain.statistic, plain.pvalue))
    assert corrected_resampled_t([0, 0], train_size=1, test_size=1) == (0, 1)
    assert corrected_interval([0, 0], train_size=1, test_size=1) == (-np.inf, np.inf)


def test_equal_differences_are_worth_their_signs_and_no_more():
    # Three folds with one discordant patient each once gave p < 0.001 and the interval [+1, +1]; the sign test says 0.25.
    for gain in (1.0, -0.5):
        assert corrected_resampled_t([gain] * 3, train_size=2, test_size=1)[1] == pytest.approx(0.25)
        low, high = corrected_interval([gain] * 3, train_size=2, test_size=1)
        assert low < 0 < high
        assert detectable(corrected_error([gain] * 3, train_size=2, test_size=1), 2) > 0


def test_corrected_t_test_refuses():
    with pytest.raises(DataError, match="two finite"):
        corrected_resampled_t([0.1], train_size=1, test_size=1)
    with pytest.raises(DataError, match="above 0"):
        corrected_resampled_t([0.1, 0.2], train_size=0, test_size=1)


def test_holm():
    np.testing.assert_allclose(holm([0.01, 0.04, 0.03, 0.005]), [0.03, 0.06, 0.06, 0.02])
    np.testing.assert_allclose(holm([0.9, 0.8]), [1, 1])
    assert holm([]).shape == (0,)
    with pytest.raises(DataError, match="between 0 and 1"):
        holm([0.5, np.nan])


def test_reliability_table_adds_up_to_the_calibration_error():
    predictions = _predictions()
    label, probability = predictions.labels(), predictions.probabilities()
    table = reliability_table(label, probability, bins=10)
    assert table["count"].sum() == len(label)
    filled = table[table["count"] > 0]
    assert ((filled["confidence"] > filled["low"]) & (filled["confidence"] <= filled["high"])).all()
    gap = (filled["count"] * (filled["accuracy"] - filled["confidence"]).abs()).sum() / len(label)
    assert ece(label, probability, bins=10) == pytest.approx(gap)


def test_temperature_undoes_a_scale_and_calibrates():
    generator = np.random.default_rng(0)
    logits = generator.normal(size=(4000, 3)) * 2
    label = (softmax(logits, axis=1).cumsum(axis=1) < generator.random((4000, 1))).sum(axis=1)
    found = fit_temperature(label, logits * 3)
    assert found == pytest.approx(3, rel=0.05)
    grid = np.exp(np.linspace(np.log(found) - 0.1, np.log(found) + 0.1, 41))
    losses = [reference.log_loss(label, softmax(logits * 3 / each, axis=1)) for each in grid]
    assert grid[int(np.argmin(losses))] == pytest.approx(found, rel=0.01)
    assert ece(label, softmax(logits * 3 / found, axis=1)) < ece(label, softmax(logits * 3, axis=1)) / 3
    with pytest.raises(DataError, match="without samples"):
        fit_temperature([], np.empty((0, 3)))
