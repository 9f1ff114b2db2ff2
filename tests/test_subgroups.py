"""Subgroups, prediction sets, ranks over data sets and decision summaries, each against a count or a formula of its own."""

import itertools

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from raredistill.errors import ConfigError, DataError
from raredistill.evaluation.bootstrap import patient_bootstrap
from raredistill.evaluation.conformal import class_thresholds, prediction_sets, set_coverage
from raredistill.evaluation.contrasts import contrasts, tally
from raredistill.evaluation.gains import assess
from raredistill.evaluation.ranks import ranks_over_datasets
from raredistill.evaluation.subgroups import groups_of, subgroup_gains, subgroup_intervals
from raredistill.evaluation.thresholds import decision_curve, decision_summary
from raredistill.predictions import COLUMNS, Predictions

CLASSES = ("a", "b")


def table(skill, *, noise=0, patients=60, repeats=2, split="test"):
    generator, rows = np.random.default_rng(noise), []
    for repeat, patient, index in itertools.product(range(repeats), range(patients), range(3)):
        label = CLASSES[patient % 3 > 0]
        logits = generator.normal(size=2) + skill * (np.array(CLASSES) == label)
        rows.append(("r", f"{patient}-{index}", f"p{patient:02}", label, split, repeat, patient % 5, repeat, "best", label, logits))
    return Predictions(pd.DataFrame(rows, columns=list(COLUMNS)), CLASSES)


def sexes(patients=60, women=36):
    return {f"p{n:02}": "f" if n < women else "m" for n in range(patients)}


def test_a_group_is_scored_as_if_it_were_the_whole_cohort():
    side = table(1.0)
    found = subgroup_intervals(side, sexes(), ["f1:a", "accuracy"], resamples=100)
    women = side.rows(np.flatnonzero(side.table["patient"] < "p36"))
    row = found.query("group == 'f' and metric == 'f1:a'").iloc[0]
    assert (row["estimate"], row["low"], row["high"]) == patient_bootstrap(women, "f1:a", resamples=100)
    assert found.groupby("group")["patients"].first().to_dict() == {"f": 36, "m": 24}
    with pytest.raises(DataError, match="patient p59 has no group"):
        subgroup_intervals(side, sexes(59), ["f1:a"])


def test_a_groups_gain_is_the_test_of_its_patients_and_small_groups_are_described():
    sides = table(0.6), table(1.6, noise=1)
    found = subgroup_gains(*(tally(each) for each in sides), sexes(), ["f1:a", "auroc:a"], "a").set_index("group")
    women = [tally(each.rows(np.flatnonzero(each.table["patient"] < "p36"))) for each in sides]
    expected = assess([contrasts(*women, ["f1:a"], "a").found["f1:a"]])[0]
    assert tuple(found.loc["f", ["gain", "low", "high", "p"]]) == pytest.approx((expected.gain, expected.low, expected.high, expected.p))
    assert found.loc["m", "rare_patients"] == 8
    assert np.isnan(found.loc["m", "p"])
    assert "described, not tested" in found.loc["m", "note"]
    assert set(found["metric"]) == {"f1:a"}


def test_numbers_are_cut_into_thirds_and_gaps_are_a_group():
    ages = {f"p{n}": n + 20 for n in range(30)} | {"x": None, "y": ""}
    found = groups_of(ages)
    sizes = pd.Series(found).value_counts()
    assert sizes.drop("unknown").tolist() == [10, 10, 10]
    assert found["x"] == found["y"] == "unknown"
    assert groups_of({"p": 1.5, "q": 3.0}) == {"p": "1.5", "q": "3.0"}
    with pytest.raises(DataError, match="no patient has a value"):
        groups_of({"p": None})


def test_a_threshold_is_the_patients_quantile_with_a_vote_for_the_new_one():
    generator = np.random.default_rng(0)
    own = generator.random(19)
    probability = np.stack([own, 1 - own], axis=1)
    limits = class_thresholds([0] * 19 + [1], np.vstack([probability, [0.3, 0.7]]), np.arange(20), miss=0.1)
    # 19 patients: the 18th of 19 scores is the ceil(0.9 * 20)-th.
    assert limits[0] == pytest.approx(np.sort(1 - own)[17])
    assert limits[1] == np.inf
    assert prediction_sets([[0.99, 0.01]], limits)[0, 1]
    # A patient with a hundred rows has one vote.
    many = class_thresholds([0] * 118 + [1], np.vstack([np.repeat(probability[:1], 100, axis=0), probability[1:], [[0.3, 0.7]]]),
                            [*[0] * 100, *range(1, 20)], miss=0.1)  # fmt: skip
    assert many[0] == limits[0]
    with pytest.raises(ConfigError, match="between 0 and 1"):
        class_thresholds([0], [[1.0, 0.0]], [0], miss=1.0)
    with pytest.raises(DataError, match="samples of every class"):
        class_thresholds([0], [[1.0, 0.0]], [0])


def test_sets_hold_the_rare_class_as_often_as_promised_for_new_patients():
    held = [set_coverage(table(1.0, noise=2 * n, split="validation", repeats=1), table(1.0, noise=2 * n + 1, repeats=1), miss=0.2)
            for n in range(60)]  # fmt: skip
    means = pd.concat(held).groupby("class")[["coverage", "size", "only"]].mean()
    # 20 and 40 calibration patients: between 1 - miss and a patient's share more, with the Monte-Carlo error of 60 draws.
    assert ((means["coverage"] > 0.77) & (means["coverage"] < 0.88)).all()
    assert (means["only"] <= means["coverage"]).all()
    assert ((means["size"] >= means["coverage"]) & (means["size"] <= 2)).all()


def test_ranks_are_friedmans_and_the_critical_difference_is_nemenyis():
    generator = np.random.default_rng(1)
    scores = pd.DataFrame(generator.random((12, 4)) + np.array([0, 0.02, 0.9, 1.0]), columns=list("abcd"))
    found = ranks_over_datasets(scores)
    assert found.mean_ranks["d"] == pytest.approx((-scores).rank(axis=1)["d"].mean())
    chi = stats.friedmanchisquare(*scores.to_numpy().T).statistic
    f = 11 * chi / (12 * 3 - chi)
    assert found.p == pytest.approx(stats.f.sf(f, 3, 33))
    # Demšar's table 5: 2.569 for four methods.
    assert found.critical_difference == pytest.approx(2.569 * (4 * 5 / (6 * 12)) ** 0.5, rel=1e-3)
    for clique in found.cliques:
        assert np.ptp(found.mean_ranks[list(clique)]) <= found.critical_difference
    assert not any({"a", "d"} <= set(clique) for clique in found.cliques)
    with pytest.raises(DataError, match="at least 3 methods"):
        ranks_over_datasets(scores[["a", "b"]])
    with pytest.raises(DataError, match="no score"):
        ranks_over_datasets(scores.mask(scores < 0.1))


def test_a_decision_summary_reads_the_curve():
    generator = np.random.default_rng(0)
    positive = generator.random(200) < 0.2
    score = np.clip(0.2 + 0.3 * (positive - 0.2) + 0.1 * generator.normal(size=200), 0.01, 0.99)
    found = decision_summary(decision_curve(positive, score, np.linspace(0.05, 0.6, 12)), at=0.2)
    called = score >= 0.2
    benefit = (called & positive).mean() - (called & ~positive).mean() * 0.25
    everyone = positive.mean() - (~positive).mean() * 0.25
    assert found["benefit"] == pytest.approx(benefit)
    assert found["over_default"] == pytest.approx(benefit - max(everyone, 0))
    # Actions avoided: true negatives, less what the missed positives weigh.
    assert found["spared"] == pytest.approx(100 * ((~called & ~positive).mean() - (~called & positive).mean() * 4))
    assert found["useful_from"] <= 0.2 <= found["useful_to"]
    assert np.isnan(decision_summary(decision_curve(positive, np.zeros(200), [0.1, 0.5]), at=0.1)["useful_from"])
