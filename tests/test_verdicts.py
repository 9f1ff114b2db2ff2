"""What may be said, what a budget can show, and when a study may stop."""

import runpy
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from raredistill.errors import ConfigError
from raredistill.evaluation.contrasts import tally
from raredistill.evaluation.gains import Gain
from raredistill.evaluation.looks import Looks, looks_table, settle
from raredistill.evaluation.planning import Pilot, error_range, floor_sentence, forecast, power, power_table, runs_needed
from raredistill.evaluation.verdicts import Verdict, not_learned, rule, verdict_of
from raredistill.predictions import COLUMNS, Predictions

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


def gain(value, se=0.02, df=20.0, **changes):
    """A test's result, with parts that go with its standard error: a half of the variance is training's."""
    q = stats.t.ppf(0.975, df)
    parts = {"variance_patients": se**2 * 0.3, "variance_interaction": se**2 * 0.1, "variance_training": se**2 * 0.5}
    found = Gain(
        gain=value, low=value - q * se, high=value + q * se, p=float(2 * stats.t.sf(abs(value) / se, df)), se=se, df=df, **parts,
        detectable=float(q + stats.t.ppf(0.8, df)) * se, training_share=0.6, variance=se**2, folds=5, runs=3, df_patients=40.0,
        spread_training=se**2 * 0.1, patients_apart=40,
    )  # fmt: skip
    return replace(found, **changes)


def ruled(gains, **options):
    return rule(gains, controls=dict.fromkeys([*gains, *options.get("described", {})], "alone"), what="LGG F1", **options)


def test_holm_decides_over_the_whole_family():
    gains = {"a": gain(0.08), "b": gain(0.045), "c": gain(-0.09), "d": gain(0.001)}
    found = ruled(gains)
    p = {name: each.p for name, each in gains.items()}
    assert found["a"].p_holm == pytest.approx(3 * p["a"])
    assert found["c"].p_holm == pytest.approx(4 * p["c"])
    assert [found[name].verdict for name in "abcd"] == [Verdict.HELPS, Verdict.UNDECIDED, Verdict.HARMS, Verdict.UNDECIDED]
    # Alone it would have been shown.
    assert ruled({"b": gains["b"]})["b"].verdict is Verdict.HELPS
    assert "Holm over 4" in found["a"].sentence
    assert "in LGG F1 it gains +0.080 [+0.038, +0.122] against alone for new patients and new trainings" in found["a"].sentence


def test_equivalence_is_two_one_sided_tests_against_the_margin():
    narrow = gain(0.002, se=0.005)
    lower, upper = stats.t.sf((0.002 + 0.02) / 0.005, 20), stats.t.cdf((0.002 - 0.02) / 0.005, 20)
    assert narrow.beyond(0.02) == pytest.approx((lower, upper))
    found = ruled({"a": narrow}, margin=0.02)["a"]
    assert found.verdict is Verdict.SAME
    assert found.p_same == pytest.approx(max(lower, upper))
    assert "makes no practical difference" in found.sentence
    assert "gains and losses above 0.02 are excluded" in found.sentence
    assert ruled({"a": gain(0.002)}, margin=0.02)["a"].verdict is Verdict.UNDECIDED
    assert ruled({"a": narrow})["a"].verdict is Verdict.UNDECIDED
    # Shown and without meaning: the margin was named for this.
    assert verdict_of(0.01, 0.001, 0.001) is Verdict.SAME
    # A 90 % interval inside the margin and p < 0.05 are the same thing.
    for value in np.linspace(0, 0.03, 7):
        inside = abs(value) + stats.t.ppf(0.95, 20) * 0.005 < 0.02
        assert (max(gain(value, se=0.005).beyond(0.02)) < 0.05) == inside


def test_what_is_not_decided_says_what_is_excluded_and_what_would_decide_it():
    found = ruled({"a": gain(0.012, se=0.022)}, rare_patients=66)["a"]
    assert found.verdict is Verdict.UNDECIDED
    assert "Gains above 0.058 and losses above 0.034 are excluded at 95 %" in found.sentence
    assert "60% is noise of training" in found.notes[0]
    assert "With 5 more repeats a true difference of" in found.notes[1]
    assert "with these 66 rare patients never less than" in found.notes[1]
    same = gain(0.0, se=np.inf, p=1.0, low=-np.inf, high=np.inf, variance_patients=0.0)
    assert "classify every patient alike" in ruled({"a": same}, margin=0.02)["a"].sentence


def test_what_is_barred_is_described_and_no_part_of_the_family():
    found = ruled({"a": gain(0.08), "b": gain(0.08)}, described={"b": "a network never predicts LGG", "c": "one run only"})
    assert found["b"].verdict is found["c"].verdict is Verdict.DESCRIBED
    assert found["a"].family == 1
    assert found["b"].sentence == "b against alone: LGG F1 +0.080, described, not tested: a network never predicts LGG."
    assert "helps" not in found["b"].sentence + found["c"].sentence


def guessing(predicted, labels="aabbbbbb"):
    rows = [("r", str(n), f"p{n}", y, "test", 0, n % 2, 0, "best", y, np.eye(2)[guess] * 9)
            for n, (y, guess) in enumerate(zip(labels, predicted, strict=True))]  # fmt: skip
    return tally(Predictions(pd.DataFrame(rows, columns=list(COLUMNS)), ("a", "b")))


def test_networks_that_did_not_learn_are_named():
    assert "a network never predicts a (repeat 0, fold 1, seed 0)" in not_learned(guessing([0, 1, 0, 1, 1, 1, 1, 1]), "a")
    # Calling every sample rare has F1 2 * 0.25 / 1.25 = 0.4; this has 2 * 1 / (2 + 3) = 0.4, too.
    assert "no better than that of calling every sample a (0.400)" in not_learned(guessing([0, 1, 0, 0, 1, 1, 1, 1]), "a")
    assert not_learned(guessing([0, 0, 1, 1, 1, 1, 1, 1]), "a") == ""


PILOT = Pilot(patients=0.0004, interaction=0.0001, training=0.0006, runs=2, folds=5, df_patients=30.0, spread_training=0.0002)


def test_a_forecast_is_the_formula_written_out():
    plan = forecast(PILOT, runs=6, folds=10, patients=2.0, kept=0.5, level=0.01)
    variance = 2.5 * 0.0003 / 2 + 0.0001 * 2 / 6 / 2 + 0.0006 * 10 / 60
    assert plan.se == pytest.approx(variance**0.5)
    assert plan.detectable == pytest.approx((stats.t.ppf(0.995, 60) + stats.t.ppf(0.8, 60)) * plan.se)
    assert plan.floor == pytest.approx(2.8 * (2.5 * 0.0003 / 2) ** 0.5)
    assert plan.se_low < plan.se < plan.se_high
    assert forecast(Pilot(0.0004, 0.0001, 0.0006, 2, 5), runs=6).se_low == pytest.approx(forecast(PILOT, runs=6).se)
    with pytest.raises(ConfigError, match="at least one run"):
        forecast(PILOT, runs=0)


def test_runs_needed_are_the_fewest_that_reach_the_power_and_none_below_the_floor():
    needed = runs_needed(PILOT, 0.08)
    assert power(PILOT, 0.08, runs=needed) >= 0.8 > power(PILOT, 0.08, runs=needed - 1)
    floor = forecast(PILOT, runs=2).floor
    assert runs_needed(PILOT, 0.9 * floor) is None
    assert f"below {floor:.3f}" in floor_sentence(forecast(PILOT, runs=2), "LGG F1", "these 66 rare patients")
    table = power_table(PILOT, [0.04, 0.08], [2, 6])
    assert table.loc[6, "0.08"] == pytest.approx(power(PILOT, 0.08, runs=6))
    assert (table.diff().loc[6] > 0).all()


def test_an_error_estimated_with_four_degrees_of_freedom_ranges_from_042_to_154():
    assert error_range(4) == pytest.approx((0.42, 1.54), abs=0.005)


def test_a_rule_that_does_not_hold_its_level_is_refused():
    for bad, message in (
        ({"looks": (2, 4), "alpha": (0.01,)}, "one alpha for each"), ({"looks": (1, 4), "alpha": (0.01, 0.01)}, "at least 2"),
        ({"looks": (4, 4), "alpha": (0.01, 0.01)}, "increasing"), ({"looks": (2, 4), "alpha": (0.03, 0.03)}, "at most 0.05"),
        ({"margin": 0.0}, "above 0"),
    ):  # fmt: skip
        with pytest.raises(ConfigError, match=message):
            Looks(**bad)
    assert [Looks().place(repeats) for repeats in (1, 2, 3, 4, 12)] == [None, 0, 0, 1, 2]


def test_a_look_settles_each_pair_at_its_own_level_and_a_settled_one_stays():
    looks = Looks((2, 4), (0.01, 0.04), margin=0.02)
    first = settle(looks, 0, {"good": gain(0.08), "near": gain(0.05), "same": gain(0.0, se=0.004)})
    assert [first[name].outcome for name in ("good", "near", "same")] == ["helps", "open", "makes no practical difference"]
    second = settle(looks, 1, {"good": gain(-0.2), "near": gain(0.055), "same": gain(0.3)}, first)
    assert second["good"] == first["good"]
    assert second["same"] == first["same"]
    # Holm still covers all three pairs: the settled keep the p that settled them, and one of them is 1.
    p = {"good": gain(0.08).p, "near": gain(0.055).p, "same": gain(0.0, se=0.004).p}
    assert second["near"].p_holm == pytest.approx(max(2 * p["near"], 3 * p["good"]))
    assert second["near"].outcome == "helps"
    assert [row["repeats"] for row in looks_table(second, looks) if row["entry"] == "near"] == [2, 4]


def test_the_floor_and_the_budget_end_a_pair():
    wide = gain(0.01, variance_patients=0.01, variance_interaction=0.0)
    assert settle(Looks(wanted=0.05), 0, {"a": wide})["a"].outcome == "floor"
    assert settle(Looks(), 0, {"a": wide})["a"].outcome == "open"
    assert settle(Looks(), 2, {"a": wide})["a"].outcome == "budget"


@pytest.fixture(scope="module")
def simulations():
    sys.path.insert(0, str(BENCHMARKS))
    try:
        return {name: runpy.run_path(str(BENCHMARKS / f"{name}.py")) for name in ("sim_gain", "sim_looks")}
    finally:
        sys.path.remove(str(BENCHMARKS))


def test_the_test_keeps_its_level_and_finds_what_was_promised(simulations):
    learners, scores = simulations["sim_gain"]["learner_nulls"], simulations["sim_gain"]["rejections"]
    assert max(learners("alike, 0.8", 60).values()) <= 0.12
    assert scores("100 alike, noise 0.05", 2, 1, 0.0, 100) <= 0.11
    assert scores("100 alike, noise 0.05", 5, 1, 0.10, 60) >= 0.75


def test_a_pilot_foretells_the_longer_study_within_its_range(simulations):
    held, told, seen = simulations["sim_gain"]["forecasts"]("100 patients, noise 0.05", 80)
    assert held >= 0.85
    assert told == pytest.approx(seen, rel=0.15)


def test_looks_hold_five_percent_where_peeking_does_not(simulations):
    found = simulations["sim_looks"]["rates"]("100 alike, noise 0.05", 0.0, Looks(), 80)
    assert found["helps"] + found["harms"] <= 0.1
    assert found["repeats"] > 8
    effect = simulations["sim_looks"]["rates"]("100 alike, noise 0.05", 0.10, Looks(), 30)
    assert effect["helps"] > 0.8
    assert effect["repeats"] < 7
