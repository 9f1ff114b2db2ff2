"""Tests of a difference: each against an independent implementation, and the choice between them by how patients were divided."""

import itertools

import numpy as np
import pandas as pd
import pytest
from scipy import stats
from sklearn import metrics as reference

from raredistill.errors import DataError
from raredistill.evaluation import patient_bootstrap
from raredistill.evaluation.bootstrap import patient_intervals
from raredistill.evaluation.compare import (
    bayesian_correlated_t,
    corrected_interval,
    corrected_resampled_t,
    delong,
    detectable,
    mcnemar,
    swap_within_cells,
    wilcoxon_over_datasets,
)
from raredistill.evaluation.differences import combine, differences, differences_of, in_folds, metric_of, side_sizes, weigh
from raredistill.evaluation.ranking import rank
from raredistill.predictions import COLUMNS, Predictions

CLASSES = ("healthy", "HGG", "LGG")
GAINS = np.array([0.02, 0.05, -0.01, 0.03, 0.04])
SIZES = {"train_size": 80, "test_size": 20}


def study(skill, *, noise=0, folds=5, seeds=1, outer=True, patients=40, hard=False):
    """Test parts of a study: ``outer`` folds test patients of their own, otherwise all folds test the same ones."""
    generator, rows = np.random.default_rng(noise), []
    for fold, seed, patient in itertools.product(range(folds), range(seeds), range(patients)):
        if outer and patient % folds != fold:
            continue
        grade = "LGG" if patient % 3 == 0 else "HGG"
        for index in range(4):
            label = "healthy" if index < 2 else grade
            logits = generator.normal(size=3) + skill * (np.array(CLASSES) == label)
            row = ("run", f"{patient}-{index}", f"p{patient}", grade, "test", 0, fold, seed, "best", label, logits)
            rows.append(row)
    return Predictions(pd.DataFrame(rows, columns=list(COLUMNS)), CLASSES, "healthy", hard)


@pytest.mark.parametrize("decimals", [0, 1])  # fewer thresholds than patients, and more
def test_areas_under_patient_weights_equal_scikit_learn_with_sample_weights(decimals):
    generator = np.random.default_rng(0)
    of_row = generator.integers(0, 9, 200)
    score, positive = np.round(generator.random(200), decimals), generator.random(200) < 0.3
    weights = generator.integers(0, 4, (5, 9))
    ranking = rank(positive, score, of_row, 9)
    assert (ranking.hits.shape[1] < 9) == (decimals == 0)
    for weight, auprc, auroc in zip(weights, ranking.auprc(weights), ranking.auroc(weights), strict=True):
        assert auprc == pytest.approx(reference.average_precision_score(positive, score, sample_weight=weight[of_row]), abs=1e-12)
        assert auroc == pytest.approx(reference.roc_auc_score(positive, score, sample_weight=weight[of_row]), abs=1e-12)
    assert np.isnan(rank(np.zeros(200, dtype=bool), score, of_row, 9).auprc(weights)).all()


def test_bca_agrees_with_scipy_on_a_skewed_mean():
    generator = np.random.default_rng(1)
    right = generator.random(60) < 0.12
    rows = [("r", str(n), f"p{n}", "a", "test", 0, 0, 0, "best", "a", [1.0, 0.0] if hit else [0.0, 1.0]) for n, hit in enumerate(right)]
    table = Predictions(pd.DataFrame(rows, columns=list(COLUMNS)), ("a", "b"))

    def accuracy(label, probability):
        return (probability.argmax(axis=1) == label).mean()

    _, low, high = patient_bootstrap(table, accuracy, resamples=8000, interval="bca")
    expected = stats.bootstrap((right.astype(float),), np.mean, method="BCa", n_resamples=8000, rng=0).confidence_interval
    assert (low, high) == pytest.approx(tuple(expected), abs=0.02)
    _, plain, _ = patient_bootstrap(table, accuracy, resamples=8000)
    assert low > plain
    # By name it is a proportion of patients, and those have a better interval.
    expected = stats.binomtest(int(right.sum()), 60).proportion_ci(method="wilson")
    assert patient_bootstrap(table, "accuracy")[1:] == pytest.approx((expected.low, expected.high))


@pytest.mark.parametrize(("hits", "patients"), [(14, 14), (0, 14), (1, 1)])
def test_a_score_whose_draws_do_not_differ_is_not_certain(hits, patients):
    # Recall 1.000 from 14 patients once had the interval [1.000, 1.000].
    rows = [(f"p{n}", f"{n}-{m}", "a", n < hits) for n in range(patients) for m in range(4)] + [
        ("q", "q", "b", True),
        ("s", "s", "b", True),
    ]
    table = Predictions(
        pd.DataFrame([("r", s, p, y, "test", 0, 0, 0, "best", y, [1.0, 0.0] if (y == "a") == hit else [0.0, 1.0]) for p, s, y, hit in rows],
                     columns=list(COLUMNS)), ("a", "b"))  # fmt: skip
    estimate, low, high = patient_bootstrap(table, "recall:a")
    expected = stats.binomtest(hits, patients).proportion_ci(method="wilson")
    assert (estimate, low, high) == pytest.approx((hits / patients, expected.low, expected.high))
    (_, limits), (_, loss) = patient_intervals(table, ["kappa", "brier"])
    assert limits["percentile"][0] < limits["percentile"][1]
    assert loss["percentile"][0] != loss["percentile"][1]


def test_the_corrected_interval_ends_where_p_is_five_percent():
    low, high = corrected_interval(GAINS, **SIZES)
    assert corrected_resampled_t(GAINS - low, **SIZES)[1] == pytest.approx(0.05)
    assert corrected_resampled_t(GAINS - high, **SIZES)[1] == pytest.approx(0.05)


def test_bayesian_probabilities_are_those_of_the_posterior_drawn():
    # Normal likelihood with an exchangeable correlation and the prior 1/variance (Corani and Benavoli 2015), by simulation.
    correlation, n = 20 / 100, len(GAINS)
    generator = np.random.default_rng(0)
    variance = GAINS.var(ddof=1) * (n - 1) / generator.chisquare(n - 1, 400_000)
    mean = generator.normal(GAINS.mean(), np.sqrt(variance * (1 / n + correlation / (1 - correlation))))
    expected = [(mean < -0.01).mean(), (np.abs(mean) <= 0.01).mean(), (mean > 0.01).mean()]
    np.testing.assert_allclose(bayesian_correlated_t(GAINS, **SIZES), expected, atol=0.004)
    assert np.isnan(bayesian_correlated_t([0.0, 0.0], **SIZES)).all()


def test_the_detectable_difference_is_found_with_its_power():
    generator = np.random.default_rng(0)
    shift = detectable(1 / np.sqrt(5), 4)
    found = stats.ttest_1samp(generator.normal(shift, 1, (20_000, 5)), 0, axis=1).pvalue < 0.05
    # The estimated error stands for the true one, so the power is near 80 %.
    assert found.mean() == pytest.approx(0.8, abs=0.01)
    assert detectable(1.0) == pytest.approx(stats.norm.ppf(0.975) + stats.norm.ppf(0.8))


def test_wilcoxon_equals_all_signs_written_out_and_says_what_it_can_reach():
    values = np.array([0.03, -0.01, 0.04, 0.02, 0.05])
    ranks = stats.rankdata(np.abs(values))
    sums = np.array([ranks[np.array(signs)].sum() for signs in itertools.product([True, False], repeat=5)])
    seen = ranks[values > 0].sum()
    p, smallest = wilcoxon_over_datasets(values)
    assert p == pytest.approx(min(1, 2 * min((sums >= seen).mean(), (sums <= seen).mean())))
    assert smallest == 0.0625
    # Thirteen gains and a draw: the normal approximation said 0.0015.
    p, smallest = wilcoxon_over_datasets([0.0, *np.linspace(0.01, 0.13, 13)])
    assert p == smallest == pytest.approx(2 / 2**13)
    # Ties: all signs written out again.
    values = np.array([0.01, 0.01, -0.01, 0.02, 0.02, 0.03])
    ranks = stats.rankdata(np.abs(values))
    sums = np.array([ranks[np.array(signs)].sum() for signs in itertools.product([True, False], repeat=6)])
    seen = ranks[values > 0].sum()
    assert wilcoxon_over_datasets(values)[0] == pytest.approx(min(1, 2 * min((sums >= seen).mean(), (sums <= seen).mean())))
    assert wilcoxon_over_datasets([0.0, 0.0]) == (1.0, 1.0)
    with pytest.raises(DataError, match="one per data set"):
        wilcoxon_over_datasets([0.1])


def test_mcnemar_is_the_exact_binomial_of_the_discordant_samples():
    first, second = np.array([1, 1, 1, 1, 1, 1, 0, 1, 0]), np.array([1, 0, 0, 0, 0, 0, 1, 1, 0])
    only_first, only_second, p = mcnemar(first, second)
    assert (only_first, only_second) == (5, 1)
    assert p == pytest.approx(2 * stats.binom.cdf(1, 6, 0.5))
    assert mcnemar([1], [1]) == (0, 0, 1.0)


def test_delong_equals_the_structural_components_written_out():
    generator = np.random.default_rng(3)
    truth = np.arange(30) % 3 == 0
    first, second = (np.round(generator.normal(size=30) + truth, 1) for _ in range(2))

    def components(score):
        wins = (score[truth][:, None] > score[~truth]) + 0.5 * (score[truth][:, None] == score[~truth])
        return wins.mean(axis=1), wins.mean(axis=0)

    (a10, a01), (b10, b01) = components(first), components(second)
    variance = np.var(a10 - b10, ddof=1) / truth.sum() + np.var(a01 - b01, ddof=1) / (~truth).sum()
    found = delong(truth, first, second)
    assert found[0] == pytest.approx(reference.roc_auc_score(truth, first))
    assert found[1] == pytest.approx(reference.roc_auc_score(truth, second))
    assert found[2] == pytest.approx(np.sqrt(variance))
    assert found[3] == pytest.approx(2 * stats.norm.sf(abs(a10.mean() - b10.mean()) / np.sqrt(variance)))
    assert delong(truth, first, first)[2:] == (0, 1)
    with pytest.raises(DataError, match="two patients"):
        delong([True, False, False], [1, 2, 3], [1, 2, 3])


def test_outer_folds_are_tested_by_the_corrected_t_with_seeds_averaged_first():
    control, other = study(1.0, seeds=2), study(2.0, noise=1, seeds=2)
    assert in_folds(control)
    found = differences(control, other, "f1:LGG")
    expected = []
    for _fold in range(5):
        means = []
        for side in (control, other):
            scores = [
                reference.f1_score(rows["label"], np.array(CLASSES)[np.stack(rows["logits"]).argmax(1)], labels=["LGG"], average="macro")
                for _, rows in side.table.query("fold == @_fold").groupby("seed")
            ]
            means.append(np.mean(scores))
        expected.append(means[1] - means[0])
    np.testing.assert_allclose(found.values, expected)
    assert (found.train_size, found.test_size) == (32, 8)
    evidence = weigh(found)
    assert evidence.p == pytest.approx(corrected_resampled_t(expected, train_size=32, test_size=8)[1])
    assert evidence.estimate == pytest.approx(np.mean(expected))
    assert evidence.worse + evidence.equal + evidence.better == pytest.approx(1)


def test_validation_patients_are_not_counted_as_trained_on():
    test = study(1.0).table
    validation = test.assign(split="validation", fold=(test["fold"] + 1) % 5).query("label == 'LGG'")
    both = Predictions(pd.concat([test, validation]), CLASSES, "healthy")
    assert side_sizes(both) == (40 - 8 - 14 / 5, 8)


def test_a_shared_test_set_is_averaged_over_runs_and_bootstrapped_over_patients():
    control, other = (study(skill, noise=n, folds=3, outer=False) for n, skill in enumerate((1.0, 3.0)))
    assert not in_folds(control)
    found = differences(control, other, "f1:LGG", resamples=200)
    assert found.basis == "patients"
    runs = [[side.rows(np.flatnonzero(side.table["fold"] == fold)) for fold in range(3)] for side in (control, other)]
    means = [np.mean([metric_of(run, "f1:LGG") for run in side]) for side in runs]
    assert found.estimate == pytest.approx(means[1] - means[0])
    evidence = weigh(found)
    assert evidence.low < evidence.estimate < evidence.high
    assert evidence.p < 0.05
    assert np.isnan(evidence.better)


def test_a_weighted_sum_of_comparisons_is_tested_as_one():
    sides = [study(skill, noise=n) for n, skill in enumerate((1.0, 2.0, 3.0))]
    first, second = (differences(sides[0], side, "macro_f1") for side in sides[1:])
    both = combine([first, second], [-1, 1])
    np.testing.assert_allclose(both.values, differences(sides[1], sides[2], "macro_f1").values)
    with pytest.raises(DataError, match="same splits"):
        combine([first, differences(study(1.0, folds=4), study(2.0, folds=4), "macro_f1")], [1, 1])
    # As many differences, of other folds: they were added once without a word.
    moved = [Predictions(side.table.assign(repeat=1), CLASSES, "healthy") for side in sides[:2]]
    with pytest.raises(DataError, match="same splits"):
        combine([first, differences(*moved, "macro_f1")], [1, 1])


def test_arms_exchanged_within_cells_are_all_exchanges_written_out():
    generator = np.random.default_rng(0)
    right, called, run = generator.integers(1, 9, (2, 6)), generator.integers(9, 14, (2, 6)), np.repeat([0, 1], 3)

    def gain(flip):
        hits, calls = (np.where(flip, each[::-1], each) for each in (right, called))
        scores = [2 * hits[:, run == r].sum(1) / (calls[:, run == r].sum(1) + 40) for r in (0, 1)]
        return abs(np.mean([score[1] - score[0] for score in scores]))

    gains = np.array([gain(np.array(flip)) for flip in itertools.product([False, True], repeat=6)])
    exact = (gains >= gains[0] - 1e-12).mean()
    assert swap_within_cells(right, called, 40, run, draws=40_000) == pytest.approx(exact, abs=0.01)


@pytest.mark.parametrize("outer", [True, False])
def test_many_metrics_at_once_are_each_what_it_is_alone(outer):
    control, other = study(1.0, outer=outer), study(1.6, noise=1, outer=outer)
    metrics = ["auprc:LGG", "f1:LGG", "macro_f1", "auroc:HGG", "recall:healthy", "kappa"]
    found, problems = differences_of(control, other, metrics, resamples=100)
    assert (list(found), problems) == (metrics, {})
    for metric in metrics:
        alone = differences(control, other, metric, resamples=100)
        assert found[metric].estimate == alone.estimate
        np.testing.assert_array_equal(found[metric].values, alone.values)
    both = patient_intervals(other, metrics, resamples=100)
    for metric, (estimate, limits) in zip(metrics, both, strict=True):
        assert (estimate, *limits["percentile"]) == patient_bootstrap(other, metric, resamples=100)
        assert (estimate, *limits["bca"]) == patient_bootstrap(other, metric, resamples=100, interval="bca")


def test_metrics_without_a_value_leave_the_others_theirs():
    hard = study(1.0, hard=True), study(2.0, noise=1, hard=True)
    found, problems = differences_of(*hard, ["f1:LGG", "auprc:LGG"])
    assert list(found) == ["f1:LGG"]
    assert "only hard labels" in problems["auprc:LGG"]
    absent = [side.rows(np.flatnonzero(side.table["patient_label"] == "HGG")) for side in (study(1.0), study(2.0, noise=1))]
    found, problems = differences_of(*absent, ["f1:LGG", "f1:HGG"])
    assert list(found) == ["f1:HGG"]
    assert "has no value" in problems["f1:LGG"]
    (nothing, limits), (something, _) = patient_intervals(absent[0], ["f1:LGG", "f1:HGG"], resamples=50)
    assert np.isnan([nothing, *limits["percentile"], *limits["bca"]]).all()
    assert something == pytest.approx(metric_of(absent[0], "f1:HGG"))


def test_what_cannot_be_tested_is_said():
    with pytest.raises(DataError, match="too few for a test"):
        weigh(differences(study(1.0, folds=2), study(2.0, folds=2), "f1:LGG"))
    with pytest.raises(DataError, match="only hard labels"):
        differences(study(1.0, hard=True), study(2.0, hard=True), "auprc:LGG")
