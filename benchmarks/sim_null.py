"""False alarms and power of the corrected t-test: outer folds, and the same test on a shared test set, where it is wrong.

A study has 100 patients, a fifth of them rare, with four slices each; a feature is class + patient + slice noise. The cheap learner is
the nearest class mean; the score is balanced accuracy. Scenarios without a difference: ``methods`` (each has features of its own, equally
good), ``seeds`` (one method, each seed learns from a random half of the training patients), ``shuffled`` (as ``methods``, labels shuffled
by patient). ``effect``: the second method's features carry more signal.
Command: ``python benchmarks/sim_null.py [studies]`` (1,000 by default, a few minutes on one core)
"""

from __future__ import annotations

import sys
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from raredistill.evaluation.compare import corrected_error, corrected_resampled_t, detectable

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]

PATIENTS, RARE, SLICES, FEATURES, FOLDS, HOLDOUT = 100, 20, 4, 5, 5, 30
SIGNAL, GAIN, PATIENT_NOISE = 0.35, 0.55, 0.7
SCENARIOS = ("methods", "seeds", "shuffled", "effect")


def features(generator: np.random.Generator, label: Integers, signal: float) -> Floats:
    """``(patients, slices, features)``: slices of one patient share a part of their noise."""
    own = PATIENT_NOISE * generator.normal(size=(PATIENTS, 1, FEATURES))
    return np.asarray(signal * (2 * label[:, None, None] - 1) + own + generator.normal(size=(PATIENTS, SLICES, FEATURES)))


def score(view: Floats, label: Integers, train: Integers, test: Integers) -> float:
    """Balanced accuracy by slice of the nearest class mean."""
    means = [view[train[label[train] == kind]].mean(axis=(0, 1)) for kind in (0, 1)]
    closer = ((view[test] - means[1]) ** 2).sum(axis=2) < ((view[test] - means[0]) ** 2).sum(axis=2)
    rare = label[test] == 1
    return float((closer[rare].mean() + (~closer[~rare]).mean()) / 2)


def outer(order: Integers, label: Integers) -> Iterator[tuple[Integers, Integers]]:
    """Five folds that test every patient once, stratified by class."""
    part = np.empty(PATIENTS, dtype=np.int64)
    for kind in (0, 1):
        members = order[label[order] == kind]
        part[members] = np.arange(len(members)) % FOLDS
    for fold in range(FOLDS):
        yield np.flatnonzero(part != fold), np.flatnonzero(part == fold)


def shared(order: Integers, label: Integers) -> Iterator[tuple[Integers, Integers]]:
    """One test set; five folds of the rest give five training sides."""
    test = np.concatenate([order[label[order] == kind][: HOLDOUT * share // PATIENTS] for kind, share in ((0, PATIENTS - RARE), (1, RARE))])
    rest = np.setdiff1d(order, test)
    for fold in range(FOLDS):
        yield rest[np.arange(len(rest)) % FOLDS != fold], test


def half(generator: np.random.Generator, train: Integers, label: Integers) -> Integers:
    """A random half of the training patients of each class: what a seed changes."""
    return np.concatenate([generator.permutation(train[label[train] == kind])[: (label[train] == kind).sum() // 2] for kind in (0, 1)])


def study(generator: np.random.Generator, scenario: str) -> dict[str, tuple[Floats, dict[str, float]]]:
    """Differences by fold and patients a side, for outer folds and for a shared test set."""
    label = (np.arange(PATIENTS) < RARE).astype(np.int64)
    first = features(generator, label, SIGNAL)
    second = first if scenario == "seeds" else features(generator, label, SIGNAL + (GAIN if scenario == "effect" else 0))
    if scenario == "shuffled":
        label = generator.permutation(label)
    order = generator.permutation(PATIENTS)
    found = {}
    for name, splits in (("outer", outer), ("shared", shared)):
        gains = []
        for train, test in splits(order, label):
            sides = [half(generator, train, label) if scenario == "seeds" else train for _ in range(2)]
            gains.append(score(second, label, sides[1], test) - score(first, label, sides[0], test))
        found[name] = np.array(gains), {"train_size": float(len(train)), "test_size": float(len(test))}
    return found


def rejections(scenario: str, studies: int, seed: int = 0) -> dict[str, float]:
    """Share of studies with p < 0.05 by design; the mean difference, and the mean gain that a study could detect with 80 % power."""
    generator = np.random.default_rng([seed, SCENARIOS.index(scenario)])
    small: dict[str, list[bool]] = {"outer": [], "shared": []}
    gains, could = [], []
    for _ in range(studies):
        found = study(generator, scenario)
        for name, (values, sizes) in found.items():
            small[name].append(corrected_resampled_t(values, **sizes)[1] < 0.05)
        values, sizes = found["outer"]
        gains.append(values.mean())
        could.append(corrected_error(values, **sizes) ** 2)
    shares = {name: float(np.mean(each)) for name, each in small.items()}
    error = float(np.sqrt(np.mean(could)))
    stated = power_of(float(np.mean(gains)), error)
    return {**shares, "difference": float(np.mean(gains)), "detectable": detectable(error, FOLDS - 1), "stated": stated}


def power_of(gain: float, error: float) -> float:
    """Power that the noncentral t distribution states for a gain with this standard error."""
    critical = float(stats.t.ppf(0.975, FOLDS - 1))
    return float(stats.nct.sf(critical, FOLDS - 1, gain / error) + stats.nct.cdf(-critical, FOLDS - 1, gain / error))


if __name__ == "__main__":
    number = int(sys.argv[1]) if len(sys.argv) > 1 else 1000
    for each in SCENARIOS:
        result = rejections(each, number)
        print(
            f"{each}: p < 0.05 in {100 * result['outer']:.1f} % of {number} studies with outer folds, {100 * result['shared']:.1f} % on a "
            f"shared test set; mean difference {result['difference']:+.3f}, detectable with 80 % power "
            f"{result['detectable']:.3f}, stated power for the mean difference {100 * result['stated']:.0f} %"
        )
