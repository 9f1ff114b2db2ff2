"""Simulated studies whose truth is known, for sim_gain.py and sim_looks.py.

``learned``: real learners (random features, weighted ridge) trained on redrawn cohorts; arms are exchangeable unless a scenario says so.
``scored``: scores built of patient, sample, network and cohort parts, all normal, so that the population's F1 is known in closed form.
Both return ``tp, pp, actual, fold, rare`` as :func:`raredistill.evaluation.gain_test` takes them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.optimize import brentq
from scipy.stats import norm

from raredistill.evaluation import gain_test
from raredistill.predictions import Predictions

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]
Bools = NDArray[np.bool_]
Counts = tuple[Floats, Floats, Floats, Integers, Bools]


def outer_folds(generator: np.random.Generator, rare: Bools, folds: int) -> Integers:
    """A fold for each patient ``(n,)``, stratified by class."""
    fold = np.empty(len(rare), dtype=np.int64)
    for kind in (rare, ~rare):
        members = generator.permutation(np.flatnonzero(kind))
        fold[members] = (np.arange(len(members)) + generator.integers(folds)) % folds
    return fold


# --- learners -------------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Learners:
    """A scenario of trained learners.

    Attributes:
        patients, rare, samples: sizes of the cohort.
        features, noise_features: inputs, and how many of them carry no signal.
        hidden, ridge: the learner.
        signal, patient_spread: of the inputs.
        alike: share of the noise that the two arms' inputs have in common; 1 gives both the same inputs.
        paired: the arms share the network's first layer, its sample of training patients and its threshold's noise.
        threshold_noise: standard deviation of each network's threshold.
        kept: share of the rare patients that training keeps.
        shuffled: labels are drawn by lot.
        distilled: the second arm learns from a teacher with a second view.
        folds: networks of a run.
    """

    patients: int = 100
    rare: int = 20
    samples: int = 5
    features: int = 8
    noise_features: int = 0
    hidden: int = 24
    ridge: float = 1e-3
    signal: float = 0.35
    patient_spread: float = 0.8
    alike: float = 0.0
    paired: bool = True
    threshold_noise: float = 0.0
    kept: float = 1.0
    shuffled: bool = False
    distilled: bool = False
    folds: int = 5


LEARNERS = {
    "two methods": Learners(),
    "alike, 0.8": Learners(alike=0.8),
    "unstable, 40 features": Learners(features=40, hidden=60, noise_features=32, ridge=1e-4),
    "50 patients, 10 rare": Learners(patients=50, rare=10),
    "labels shuffled": Learners(shuffled=True),
    "distilled, the teacher sees more": Learners(alike=1.0, distilled=True),
    "60 patients, alike, threshold noise": Learners(patients=60, rare=10, alike=0.9, threshold_noise=0.2, paired=False),
    "369 patients, 66 rare": Learners(patients=369, rare=66, samples=3),
    "rarefied to 0.3": Learners(kept=0.3),
    "rarefied to 0.5": Learners(kept=0.5),
}


def learned(generator: np.random.Generator, setting: Learners, repeats: int) -> Counts:
    """Counts of a study whose two arms are trained in every fold of every repeat."""
    rare = np.arange(setting.patients) < setting.rare
    views = _views(generator, setting, rare)
    second = _view(generator, setting, rare, 0.4) if setting.distilled else None
    labels = generator.permutation(rare) if setting.shuffled else rare
    calls, fold = np.zeros((2, repeats, 1, setting.patients)), np.empty((repeats, setting.patients), dtype=np.int64)
    for repeat in range(repeats):
        fold[repeat] = outer_folds(generator, labels, setting.folds)
        train = np.stack(
            [_training(generator, labels, np.flatnonzero(fold[repeat] != each), setting.kept) for each in range(setting.folds)]
        )
        chance = _chance(generator, setting)
        for arm in (0, 1):
            chance = chance if setting.paired or not arm else _chance(generator, setting)
            called = _predict(generator, setting, views[arm], labels, train, chance, second if arm else None)
            calls[arm, repeat, 0] = called[fold[repeat], np.arange(setting.patients)]
    return calls * labels, calls, labels * float(setting.samples), fold, labels


def _view(generator: np.random.Generator, setting: Learners, rare: Bools, spread: float) -> Floats:
    shape = (setting.patients, 1, setting.features), (setting.patients, setting.samples, setting.features)
    return np.asarray(
        np.where(rare, 1, -1)[:, None, None] * setting.signal + spread * generator.normal(size=shape[0]) + generator.normal(size=shape[1])
    )


def _views(generator: np.random.Generator, setting: Learners, rare: Bools) -> list[Floats]:
    """Each arm's inputs ``(patients, samples, features)``, with the share of their noise that they have in common."""
    signal = np.zeros(setting.features)
    signal[: setting.features - setting.noise_features] = setting.signal
    quiet = replace(setting, signal=0.0)
    common = _view(generator, quiet, rare, setting.patient_spread)
    mix = setting.alike**0.5, (1 - setting.alike) ** 0.5
    views = [mix[0] * common + mix[1] * _view(generator, quiet, rare, setting.patient_spread) for _ in range(2)]
    views = [np.where(rare, 1, -1)[:, None, None] * signal + view for view in views]
    return [views[0], views[0]] if setting.distilled else views


def _training(generator: np.random.Generator, labels: Bools, rest: Integers, kept: float) -> Bools:
    """Training patients of a fold: four fifths of the rest by class; validation takes the others."""
    train = np.zeros(len(labels), dtype=bool)
    for kind in (True, False):
        members = generator.permutation(rest[labels[rest] == kind])[: round(0.8 * (labels[rest] == kind).sum())]
        train[members[: max(3, int(kept * len(members)))] if kind else members] = True
    return train


def _chance(generator: np.random.Generator, setting: Learners) -> tuple[Floats, Floats, Bools, Floats]:
    """What a seed decides: first layer, its bias, the training patients that are seen, and the threshold."""
    folds, hidden = setting.folds, setting.hidden
    weights = generator.normal(size=(folds, setting.features, hidden)) / setting.features**0.5
    bias, seen = generator.normal(size=(folds, 1, hidden)), generator.random((folds, setting.patients)) < 0.8
    return weights, bias, seen, setting.threshold_noise * generator.normal(size=(folds, 1))


def _predict(
    generator: np.random.Generator, setting: Learners, view: Floats, labels: Bools, train: Bools,
    chance: tuple[Floats, Floats, Bools, Floats], second: Floats | None,
) -> Floats:  # fmt: skip
    """Samples of each patient that each fold's network calls rare ``(folds, patients)``."""
    weights, bias, seen, shift = chance
    target = np.repeat(np.where(labels, 1.0, -1.0), setting.samples)
    everyone = np.repeat(train, setting.samples, axis=1)
    balance = sum(everyone * kind * 0.5 / (everyone & kind).sum(axis=1, keepdims=True) for kind in (target > 0, target < 0))
    wanted = np.broadcast_to(target, everyone.shape)
    inputs = view.reshape(-1, setting.features)
    if second is not None:
        both = np.concatenate([inputs, second.reshape(-1, setting.features)], axis=1)
        first = generator.normal(size=(setting.folds, both.shape[1], setting.hidden)) / both.shape[1] ** 0.5
        hidden = np.maximum(both @ first + bias, 0)
        taught = (hidden @ _ridge(hidden, wanted, balance, 1e-3)[..., None])[..., 0]
        wanted = 0.5 * target + 0.5 * np.clip(taught, -1.5, 1.5)
    hidden = np.maximum(inputs @ weights + bias, 0)
    hidden = np.concatenate([hidden, np.ones((*hidden.shape[:-1], 1))], axis=-1)
    solved = _ridge(hidden, wanted, balance * np.repeat(seen, setting.samples, axis=1), setting.ridge)
    called = (hidden @ solved[..., None])[..., 0] + shift > 0
    return np.asarray(called.reshape(setting.folds, setting.patients, setting.samples).sum(axis=-1), dtype=np.float64)


def _ridge(inputs: Floats, target: Floats, weight: Floats, strength: float) -> Floats:
    weighted = np.swapaxes(inputs * weight[..., None], -1, -2)
    system = weighted @ inputs + strength * np.eye(inputs.shape[-1])
    return np.asarray(np.linalg.solve(system, weighted @ target[..., None])[..., 0])


# --- scores ---------------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Scores:
    """A scenario of scores; a sample is called rare above 0. All numbers but the sizes are standard deviations.

    Attributes:
        patients, share, samples: sizes; ``share`` of the patients is rare.
        rare_mean, common_mean: class means.
        patient, patient_arm: of a patient, shared by the arms and not.
        sample, sample_arm: of a sample, likewise.
        threshold, quality: of a network: all its scores move together, and the classes apart.
        ratio: the second arm's threshold and quality noise over the first's.
        run_patient, run_sample: of a patient and a sample in one run of one arm.
        cohort: variance that the training patients' luck adds, over that of the tested patients.
        cohort_sd: the same as a standard deviation of the quality; found by :func:`calibrated`.
    """

    patients: int = 100
    share: float = 0.18
    samples: int = 8
    rare_mean: float = 0.0
    common_mean: float = -2.2
    patient: float = 1.0
    patient_arm: float = 0.35
    sample: float = 0.7
    sample_arm: float = 0.3
    threshold: float = 0.15
    quality: float = 0.05
    ratio: float = 1.0
    run_patient: float = 0.2
    run_sample: float = 0.4
    cohort: float = 0.0
    cohort_sd: float = 0.0


SCORES = {
    "50 patients, noise 0.05": Scores(patients=50, share=0.2, threshold=0.25, quality=0.13),
    "100 patients, noise 0.05": Scores(threshold=0.25, quality=0.13),
    "100 patients, noise 0.08": Scores(threshold=0.4, quality=0.21),
    "369 patients, noise 0.05": Scores(patients=369, threshold=0.25, quality=0.13),
    "100 alike, noise 0.05": Scores(patient_arm=0.1, sample_arm=0.1, threshold=0.25, quality=0.13, run_patient=0.1),
    "369 alike, noise 0.05": Scores(patients=369, patient_arm=0.1, sample_arm=0.1, threshold=0.25, quality=0.13, run_patient=0.1),
    "100 patients, unequal noise": Scores(threshold=0.15, quality=0.08, ratio=2.5),
    "100 patients, training set +0.5": Scores(threshold=0.1, quality=0.05, cohort=0.5),
}


def population_f1(setting: Scores, arm: int, shift: float = 0.0) -> float:
    """F1 of infinitely many patients and networks when class means are ``shift`` further apart on each side."""
    ratio = setting.ratio if arm else 1.0
    parts = (setting.patient, setting.patient_arm, setting.sample, setting.sample_arm, setting.run_patient, setting.run_sample,
             ratio * setting.threshold, ratio * setting.quality, setting.cohort_sd)  # fmt: skip
    spread = float(np.sqrt(np.square(parts).sum()))
    hit = float(norm.cdf((setting.rare_mean + shift) / spread))
    false = float(norm.cdf((setting.common_mean - shift) / spread))
    return 2 * hit / (1 + hit + (1 - setting.share) / setting.share * false)


def shift_for(setting: Scores, gain: float) -> float:
    """How far the second arm's class means must move apart for a true gain in F1."""
    wanted = population_f1(setting, 0) + gain
    return float(brentq(lambda shift: population_f1(setting, 1, shift) - wanted, -2, 3))


def calibrated(setting: Scores) -> Scores:
    """The scenario with the standard deviation that gives the training patients' luck its share."""
    if not setting.cohort:
        return setting
    slope = abs(population_f1(setting, 0, 1e-4) - population_f1(setting, 0, -1e-4)) / 2e-4
    generator, quiet = np.random.default_rng(0), replace(setting, cohort=0.0)
    tested = np.mean([gain_test(*scored(generator, quiet, 5, 3, 1, 0.0)).variance_patients for _ in range(100)])
    return replace(setting, cohort_sd=float(np.sqrt(setting.cohort * tested / (2 * slope**2 * 0.8))))


def scored(generator: np.random.Generator, setting: Scores, folds: int, repeats: int, seeds: int, shift: float) -> Counts:
    """Counts of a study."""
    score, fold, rare = drawn(generator, setting, folds, repeats, seeds, shift)
    calls = (score > 0).sum(axis=-1).astype(np.float64)
    return calls * rare, calls, rare * float(setting.samples), fold, rare


def drawn(
    generator: np.random.Generator, setting: Scores, folds: int, repeats: int, seeds: int, shift: float
) -> tuple[NDArray[np.float32], Integers, Bools]:
    """Scores ``(2, repeats, seeds, patients, samples)``, the fold of each repeat and patient, and the rare patients."""
    n, samples = setting.patients, setting.samples
    rare = np.arange(n) < round(setting.share * n)
    fold = np.stack([outer_folds(generator, rare, folds) for _ in range(repeats)])

    def normal(*shape: int) -> NDArray[np.float32]:
        return generator.standard_normal(shape, dtype=np.float32)

    side = np.where(rare, 1.0, -1.0).astype(np.float32)
    means = np.where(rare, setting.rare_mean, setting.common_mean)
    base = np.stack([means, means + shift * side]).astype(np.float32)[:, :, None]
    base = base + setting.patient * normal(n, 1) + setting.patient_arm * normal(2, n, 1)
    base = base + setting.sample * normal(n, samples) + setting.sample_arm * normal(2, n, samples)
    ratio = np.array([1.0, setting.ratio], dtype=np.float32)[:, None, None, None]
    threshold, quality = (spread * ratio * normal(2, repeats, folds, seeds) for spread in (setting.threshold, setting.quality))
    quality = quality + _luck(normal(2, n), fold, folds, setting.cohort_sd)
    network = np.stack([threshold[:, r][:, fold[r]] + side[:, None] * quality[:, r][:, fold[r]] for r in range(repeats)], axis=1)
    score = base[:, None, None] + np.swapaxes(network, 2, 3)[..., None]
    score = score + setting.run_patient * normal(2, repeats, seeds, n, 1) + setting.run_sample * normal(2, repeats, seeds, n, samples)
    return score, fold, rare


def tables(score: NDArray[np.float32], fold: Integers, rare: Bools) -> list[Predictions]:
    """Both arms of :func:`drawn` as predictions of the classes ``common`` and ``rare``."""
    _, repeats, seeds, n, samples = score.shape
    repeat, seed, patient, sample = (each.ravel() for each in np.indices((repeats, seeds, n, samples)))
    names = np.char.zfill(patient.astype(str), 4)
    label = np.where(rare[patient], "rare", "common")
    columns = {
        "run": "r", "sample": np.char.add(np.char.add(names, "-"), sample.astype(str)), "patient": names, "patient_label": label,
        "split": "test", "repeat": repeat, "fold": fold[repeat, patient], "seed": seed, "checkpoint": "best", "label": label,
    }  # fmt: skip
    sides = []
    for arm in score:
        logits = np.stack([np.zeros(arm.size), arm.ravel()], axis=1)
        sides.append(Predictions(pd.DataFrame(columns).assign(logits=None), ("common", "rare")).with_logits(logits))
    return sides


def _luck(worth: NDArray[np.float32], fold: Integers, folds: int, spread: float) -> NDArray[np.float32]:
    """What training patients of each network are worth, ``(2, repeats, folds, 1)``."""
    own = np.stack([[worth[:, each == which].sum(axis=1) for which in range(folds)] for each in fold])
    rest = worth.sum(axis=1) - own
    return np.asarray(spread * np.moveaxis(rest, -1, 0)[..., None] / np.sqrt(worth.shape[1] * (folds - 1) / folds), dtype=np.float32)
