"""The test that decides: influences against finite differences of the metric itself, edges, and what is refused."""

import itertools
import time

import numpy as np
import pandas as pd
import pytest
from scipy import stats
from sklearn import metrics as reference

from raredistill.errors import ConfigError, DataError
from raredistill.evaluation import gain_test
from raredistill.evaluation.contrasts import contrasts, tally
from raredistill.evaluation.gains import Contrast, Layout, assess, closed_gap, combine, slope, training_factor
from raredistill.predictions import COLUMNS, Predictions

CLASSES = ("healthy", "HGG", "LGG")


def arrays(*, patients=60, rare=20, repeats=2, seeds=1, folds=5, skill=0.8, seed=0):
    """Counts of a study as ``gain_test`` takes them: four samples a patient, called rare more often where they are."""
    generator = np.random.default_rng(seed)
    carries = np.arange(patients) < rare
    fold = np.stack([generator.permutation(np.arange(patients) % folds) for _ in range(repeats)])
    chance = np.where(carries, skill, 0.15)
    calls = generator.binomial(4, chance, size=(2, repeats, seeds, patients)).astype(float)
    return calls * carries, calls, 4.0 * carries, fold, carries


def side(skill, *, noise=0, repeats=2, folds=4, patients=48, seeds=1, samples=3, hard=False):
    """A predictions table of outer folds with a new seed in each repeat."""
    generator, rows = np.random.default_rng(noise), []
    for repeat, which, patient in itertools.product(range(repeats), range(seeds), range(patients)):
        fold = int(np.random.default_rng(repeat).permutation(patients)[patient]) % folds
        grade = "LGG" if patient % 3 == 0 else "HGG"
        for index in range(samples):
            label = "healthy" if index == 0 else grade
            logits = generator.normal(size=3) + skill * (np.array(CLASSES) == label)
            name = f"{patient:03d}"
            rows.append(("run", f"{name}-{index}", name, grade, "test", repeat, fold, 10 * repeat + which, "best", label, logits))
    return Predictions(pd.DataFrame(rows, columns=list(COLUMNS)), CLASSES, "healthy", hard)


def by_loops(tp, pp, actual, fold, rare, kept=1.0):
    """Standard error and degrees of freedom, patient by patient and pair by pair of patients."""
    _, repeats, seeds, patients = tp.shape
    runs = list(itertools.product(range(repeats), range(seeds)))
    arms = []
    for arm in (0, 1):
        whole = np.mean([pp[arm, r, s].sum() for r, s in runs]) + actual.sum()
        score = 2 * np.mean([tp[arm, r, s].sum() for r, s in runs]) / whole
        arms.append([[(2 * tp[arm, r, s, i] - score * (pp[arm, r, s, i] + actual[i])) / whole for i in range(patients)] for r, s in runs])
    d, t, k = np.array(arms[1]) - np.array(arms[0]), len(runs), len(set(fold[0]))
    groups = [np.flatnonzero(rare), np.flatnonzero(~rare)]
    within = [len(g) * np.var(d.mean(0)[g], ddof=1) for g in groups]
    e = d - d.mean(0)
    v_i = sum(np.var(d[:, i], ddof=1) for i in range(patients)) / t
    products = 0.0
    for c, (r, _) in enumerate(runs):
        left = sum(((c == o) - 1 / t) ** 2 * (1.0 if r == runs[o][0] else 1 / k) for o in range(t))
        products += sum(e[c, i] * e[c, j] for i, j in itertools.permutations(range(patients), 2) if fold[r, i] == fold[r, j]) / left
    v_p, v_m = sum(within), max(products / t**2, 0.0)
    base = v_p + (1 + 1 / kept) / 2 * max(v_p - v_i, 0.0)
    lost = base**2 * sum(w**2 / (len(g) - 1) for w, g in zip(within, groups, strict=True)) / v_p**2 + v_m**2 / (k * (t - 1))
    return base + v_m, min((base + v_m) ** 2 / lost, k * t)


@pytest.mark.parametrize(("repeats", "seeds", "kept"), [(2, 1, 1.0), (1, 3, 1.0), (2, 2, 0.3)])
def test_the_variance_is_the_sum_over_patients_and_pairs_written_out(repeats, seeds, kept):
    given = arrays(repeats=repeats, seeds=seeds, seed=repeats)
    found = gain_test(*given, kept=kept)
    variance, df = by_loops(*given, kept=kept)
    assert (found.se**2, found.df) == (pytest.approx(variance), pytest.approx(df))
    assert found.p == pytest.approx(2 * stats.t.sf(abs(found.gain) / found.se, df))
    assert (found.low, found.high) == pytest.approx(stats.t.interval(0.95, df, found.gain, found.se))
    assert found.detectable == pytest.approx((stats.t.ppf(0.975, df) + stats.t.ppf(0.8, df)) * found.se)


def test_three_discordant_patients_are_never_certainty():
    # Ten folds x two repeats that agree to the last digit: the product once said p < 0.001 with the interval [+1, +1].
    rare = np.arange(40) < 12
    tp = np.zeros((2, 2, 1, 40))
    tp[1, :, :, :3] = 1
    fold = np.stack([np.arange(40) % 4] * 2)
    found = gain_test(tp, tp, rare.astype(float), fold, rare)
    assert found.p >= 0.25
    assert found.low < 0 < found.high
    # Every rare patient is gained in every run: no variance is seen at all, and the sign test of 12 patients is what is known.
    tp[1] = rare
    found = gain_test(tp, tp, rare.astype(float), fold, rare)
    assert found.p == pytest.approx(2.0**-11)
    assert found.low < found.gain == 1 < found.high
    same = gain_test(tp[[1, 1]], tp[[1, 1]], rare.astype(float), fold, rare)
    assert (same.gain, same.p, same.se, same.detectable) == (0, 1, np.inf, np.inf)


def test_too_little_is_refused():
    with pytest.raises(DataError, match="one run of each patient"):
        gain_test(*arrays(repeats=1))
    with pytest.raises(DataError, match="only 9 tested patients with"):
        gain_test(*arrays(rare=9))
    with pytest.raises(DataError, match="only 9 tested patients without"):
        gain_test(*arrays(rare=51))
    tp, pp, actual, fold, rare = arrays()
    with pytest.raises(DataError, match="do not fit"):
        gain_test(tp[:, :1], pp, actual, fold, rare)
    with pytest.raises(DataError, match="at least one sample"):
        gain_test(tp, pp, 0 * actual, fold, rare)
    with pytest.raises(DataError, match="kept"):
        gain_test(tp, pp, actual, fold, rare, kept=0)
    assert (training_factor(1.0), training_factor(0.5)) == (2.0, 2.5)


SCORES = {
    "f1:LGG": lambda y, p, w: reference.f1_score(y, p.argmax(1), average=None, sample_weight=w)[2],
    "recall:HGG": lambda y, p, w: reference.recall_score(y, p.argmax(1), average=None, sample_weight=w)[1],
    "precision:LGG": lambda y, p, w: reference.precision_score(y, p.argmax(1), average=None, sample_weight=w)[2],
    "macro_f1": lambda y, p, w: reference.f1_score(y, p.argmax(1), average="macro", sample_weight=w),
    "balanced_accuracy": lambda y, p, w: reference.balanced_accuracy_score(y, p.argmax(1), sample_weight=w),
    "accuracy": lambda y, p, w: reference.accuracy_score(y, p.argmax(1), sample_weight=w),
    "kappa": lambda y, p, w: reference.cohen_kappa_score(y, p.argmax(1), sample_weight=w),
    "mcc": lambda y, p, w: reference.matthews_corrcoef(y, p.argmax(1), sample_weight=w),
    "brier": lambda y, p, w: np.average(((p - np.eye(3)[y]) ** 2).sum(1), weights=w),
    "log_loss": lambda y, p, w: reference.log_loss(y, p, sample_weight=w),
    "auroc:LGG": lambda y, p, w: reference.roc_auc_score(y == 2, p[:, 2], sample_weight=w),
    "auprc:LGG": lambda y, p, w: reference.average_precision_score(y == 2, p[:, 2], sample_weight=w),
}


@pytest.mark.parametrize("metric", SCORES)
def test_an_influence_is_what_a_patients_weight_moves_the_metric_by(metric):
    control, other = side(0.8), side(1.6, noise=1)
    found = contrasts(*(tally(each, list(SCORES)) for each in (control, other)), list(SCORES), "LGG").found[metric]
    area, score = metric.startswith("au"), SCORES[metric]
    patients = np.array(found.layout.patients)

    def value(table, run, weights=None):
        """Pooled over the folds of a run; areas are means over its folds."""
        rows = np.flatnonzero((table.table["repeat"] == run[0]) & (table.table["seed"] == run[1]))
        parts = [rows[table.table["fold"].to_numpy()[rows] == fold] for fold in range(4)] if area else [rows]
        whole = np.ones(len(table.table)) if weights is None else weights
        return np.mean([score(table.labels()[part], table.probabilities()[part], whole[part]) for part in parts])

    gains = [value(other, run) - value(control, run) for run in found.layout.runs]
    assert found.gain == pytest.approx(np.mean(gains))
    for patient in (0, 5):
        weights = 1 + 1e-6 * (control.table["patient"] == patients[patient]).to_numpy()
        for place, run in enumerate(found.layout.runs):
            moved = [(value(table, run, weights) - value(table, run)) / 1e-6 for table in (control, other)]
            if area:
                fold = found.layout.fold[place, patient]
                cell = np.flatnonzero((control.table["repeat"] == run[0]) & (control.table["fold"] == fold))
                own = [score(t.labels()[cell], t.probabilities()[cell], np.ones(len(cell))) for t in (control, other)]
                level = (own[1] - own[0] - found.gain) / 4 / (found.layout.fold[place] == fold).sum()
                assert found.values[place, patient] == pytest.approx(moved[1] - moved[0] + level, abs=1e-6)
    if not area:
        # Counts are linearised about the mean run, so it is the mean over runs that equals the metric of the summed counts.
        weights = 1 + 1e-6 * (control.table["patient"] == patients[5]).to_numpy()
        moved = [
            (score(t.labels(), t.probabilities(), weights) - score(t.labels(), t.probabilities(), None)) / 1e-6 for t in (control, other)
        ]
        assert found.values.mean(axis=0)[5] == pytest.approx(moved[1] - moved[0], abs=1e-6)


def test_tables_and_counts_give_the_same_test():
    control, other = side(0.8, seeds=2), side(1.6, noise=1, seeds=2)
    made = contrasts(tally(control), tally(other), ["f1:LGG"], "LGG")
    found = assess([made.found["f1:LGG"]])[0]
    layout = made.found["f1:LGG"].layout
    tp, pp = (np.zeros((2, 2, 2, 48)) for _ in range(2))
    for arm, table in enumerate((control, other)):
        guess = table.probabilities().argmax(1)
        for row, (patient, repeat, seed, label) in enumerate(table.table[["patient", "repeat", "seed", "label"]].itertuples(index=False)):
            pp[arm, repeat, seed % 10, int(patient)] += guess[row] == 2
            tp[arm, repeat, seed % 10, int(patient)] += guess[row] == 2 and label == "LGG"
    rare = np.arange(48) % 3 == 0
    expected = gain_test(tp, pp, 2.0 * rare, layout.fold[::2], rare)
    assert (found.gain, found.se, found.df, found.p) == pytest.approx((expected.gain, expected.se, expected.df, expected.p))
    assert made.missing == ()


def without(table, **cell):
    kept = ~np.logical_and.reduce([table.table[key] == value for key, value in cell.items()])
    return table.rows(np.flatnonzero(kept))


def test_unfinished_runs_are_named_and_left_out():
    control, other = side(0.8, seeds=2), side(1.6, noise=1, seeds=2)
    made = contrasts(
        tally(without(control, repeat=1, fold=3, seed=11)), tally(without(other, repeat=1, fold=3, seed=11)), ["f1:LGG"], "LGG"
    )
    assert made.missing == ("repeat 1, fold 3, seed 11 is missing on both sides",)
    assert made.found["f1:LGG"].layout.runs == ((0, 0), (0, 1), (1, 10))
    made = contrasts(tally(without(control, repeat=0, fold=2, seed=0)), tally(other), ["f1:LGG"], "LGG")
    assert made.missing == ("repeat 0, fold 2, seed 0 is missing on the control",)
    # Seeds that differ by fold: no run is complete.
    apart = without(without(side(1.0, repeats=1, seeds=2), fold=1, seed=0), fold=2, seed=1)
    with pytest.raises(DataError, match="no repeat and seed has all its folds"):
        contrasts(tally(apart), tally(apart), ["f1:LGG"], "LGG")
    known = {(0, fold, seed) for fold in range(5) for seed in range(2)}
    with pytest.raises(DataError, match="no repeat and seed"):
        contrasts(tally(side(1.0, repeats=1)), tally(side(1.0, repeats=1)), ["f1:LGG"], "LGG", expected=known)


def test_sides_that_do_not_fit_are_refused():
    control = side(1.0)
    changed = control.table.assign(fold=(control.table["fold"] + (control.table["repeat"] == 1)) % 4)
    with pytest.raises(DataError, match="in another fold"):
        contrasts(tally(control), tally(Predictions(changed, CLASSES, "healthy")), ["f1:LGG"], "LGG")
    fewer = control.rows(np.flatnonzero(control.table["sample"] != "003-1"))
    with pytest.raises(DataError, match="patient 003 has other samples"):
        contrasts(tally(control), tally(fewer), ["f1:LGG"], "LGG")
    shared = pd.concat([control.table, control.table.assign(fold=(control.table["fold"] + 1) % 4)])
    with pytest.raises(DataError, match="share test patients"):
        tally(Predictions(shared, CLASSES, "healthy"))
    with pytest.raises(ConfigError, match="did you mean f1:LGG"):
        contrasts(tally(control), tally(control), ["f1:LG"], "LGG")


def test_metrics_without_a_value_say_why():
    hard = tally(side(1.0, hard=True), ["auroc:LGG"]), tally(side(1.6, noise=1, hard=True), ["auroc:LGG"])
    made = contrasts(*hard, ["f1:LGG", "auroc:LGG", "brier"], "LGG")
    assert list(made.found) == ["f1:LGG"]
    assert "only hard labels" in made.problems["auroc:LGG"]
    assert "only hard labels" in made.problems["brier"]
    few = [tally(each.rows(np.flatnonzero(~each.table["patient"].isin([f"{p:03d}" for p in range(0, 24, 3)]))))
           for each in (side(1.0), side(1.6, noise=1))]  # fmt: skip
    made = contrasts(*few, ["f1:LGG", "f1:HGG"], "LGG")
    assert "only 8 patients with LGG are tested" in made.problems["f1:LGG"]
    assert "f1:HGG" not in made.problems
    assert not np.isnan(made.found["f1:LGG"].gain)


def contrast(effect, *, seed=0, patients=60, runs=4, spread=0.02, cut=0):
    generator = np.random.default_rng(seed)
    rare = np.arange(patients) < 20
    fold = np.random.default_rng(cut).permutation(patients) % 5
    own = generator.normal(size=patients) * spread / patients**0.5
    level = generator.normal(size=(runs, 5)) * spread / patients
    values = own + generator.normal(size=(runs, patients)) * spread / patients**0.5 + level[:, fold]
    layout = Layout(tuple((run, run) for run in range(runs)), tuple(f"p{n:02d}" for n in range(patients)), np.tile(fold, (runs, 1)), rare)
    return Contrast(effect, values - values.mean(axis=1, keepdims=True), layout, np.ones(patients, dtype=bool))


def test_a_slope_is_the_least_squares_line_through_the_gains():
    pairs = [contrast(gain, seed=n) for n, gain in enumerate((0.01, 0.03, 0.08))]
    sizes = [-1.0, 0.0, 2.0]
    found = slope(pairs, sizes)
    assert found.gain == pytest.approx(np.polyfit(sizes, [0.01, 0.03, 0.08], 1)[0])
    np.testing.assert_allclose(found.values[1, 7], np.polyfit(sizes, [each.values[1, 7] for each in pairs], 1)[0])
    assert assess([found])[0].se > 0
    with pytest.raises(DataError, match="different size ratios"):
        slope(pairs[:1], [1.0])


def test_contrasts_of_other_runs_folds_or_patients_cannot_be_added():
    first = contrast(0.1)
    with pytest.raises(DataError, match="repeat 3, seed 3 is on one side only"):
        combine([first, contrast(0.1, runs=3)], [1, 1])
    with pytest.raises(DataError, match="patient p60 is on one side only"):
        combine([first, contrast(0.1, patients=61)], [1, 1])
    # The same number of differences, made on other folds: they were once added without a word.
    with pytest.raises(DataError, match="not made on the same folds"):
        combine([first, contrast(0.1, cut=1)], [1, 1])


def test_fiellers_interval_ends_where_the_difference_from_that_share_is_just_not_significant():
    teacher, student = contrast(0.10), contrast(0.06)
    student = Contrast(0.06, 0.5 * teacher.values + 0.3 * contrast(0.0, seed=0).values[::-1], teacher.layout, teacher.apart)
    share, low, high = closed_gap(student, teacher)
    assert share == pytest.approx(0.6)
    for end in (low, high):
        tested = assess([combine([student, teacher], [1, -end])])[0]
        assert tested.p == pytest.approx(0.05, abs=1e-4)
    assert low < share < high
    assert closed_gap(student, contrast(0.001)) is None


def test_all_metrics_of_many_pairs_take_seconds():
    # 57,000 slices of 369 patients: 40 x 30 x 48 rows stand for them here, and the time is scaled.
    metrics = [*(f"{name}:{label}" for name in ("f1", "recall", "precision", "auroc", "auprc") for label in CLASSES), "macro_f1", "brier"]
    table = side(1.0, patients=369, samples=20, repeats=3, folds=5)
    start = time.perf_counter()
    sides = [tally(table, metrics), tally(table, metrics)]
    tallied = (time.perf_counter() - start) / 2 * 57_000 / 7_380
    start = time.perf_counter()
    assess(list(contrasts(*sides, metrics, "LGG").found.values()))
    assert 31 * tallied + 30 * (time.perf_counter() - start) < 60
