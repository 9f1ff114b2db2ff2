"""How often a 95 % interval holds the truth: bootstrap over patients (percentile, BCa) and over slices, on correlated slices.

A simulated test part has R rare patients and four times as many common ones, ten slices each. A rare patient's slices are found with
a probability of his own, sigmoid(1 + 1.5 z); a common patient's slices are mistaken for rare ones with probability sigmoid(-3 + 1.5 z).
The metric is the F1 of the rare class. Command: ``python benchmarks/sim_coverage.py [studies]`` (4,000 by default, minutes on one core)
"""

from __future__ import annotations

import sys

import numpy as np
from numpy.typing import NDArray
from scipy import stats

Floats = NDArray[np.float64]

RARE, RATIO, SLICES, RESAMPLES, BLOCK = (10, 23, 40, 76), 4, 10, 2000, 100
FOUND, MISTAKEN, SPREAD = 1.0, -3.0, 1.5
TAILS = (0.025, 0.975)


def sigmoid(value: Floats) -> Floats:
    """Logistic function."""
    return np.asarray(1 / (1 + np.exp(-value)))


def truth() -> float:
    """The F1 that infinitely many patients would give."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(80)
    weights = weights / weights.sum()
    hit, false = (float((weights * sigmoid(base + SPREAD * nodes)).sum()) for base in (FOUND, MISTAKEN))
    return 2 * hit / (1 + hit + RATIO * false)


def draw_counts(generator: np.random.Generator, studies: int, rare: int) -> tuple[Floats, Floats]:
    """Slices called rare, by patient: ``(studies, rare)`` of rare patients and ``(studies, RATIO * rare)`` of common ones."""
    sizes = ((FOUND, rare), (MISTAKEN, RATIO * rare))
    chances = [sigmoid(base + SPREAD * generator.normal(size=(studies, number))) for base, number in sizes]
    hits, false = (generator.binomial(SLICES, chance).astype(np.float64) for chance in chances)
    return hits, false


def f1(hits: Floats, false: Floats, rare: int) -> Floats:
    """F1 from totals."""
    return np.asarray(2 * hits / np.maximum(hits + false + rare * SLICES, 1))


def by_patient(generator: np.random.Generator, hits: Floats, false: Floats) -> Floats:
    """F1 of resampled patients, stratified by class: ``(resamples, studies)``."""
    rare, common = hits.shape[1], false.shape[1]
    weights = [generator.multinomial(number, np.full(number, 1 / number), size=RESAMPLES).astype(np.float64) for number in (rare, common)]
    return f1(weights[0] @ hits.T, weights[1] @ false.T, rare)


def by_slice(generator: np.random.Generator, hits: Floats, false: Floats) -> Floats:
    """F1 of resampled slices, as if they were independent; totals of drawn slices are binomial."""
    rare = hits.shape[1]
    sizes = (rare * SLICES, false.shape[1] * SLICES)
    totals = [
        generator.binomial(size, each.sum(axis=1) / size, size=(RESAMPLES, len(each)))
        for size, each in zip(sizes, (hits, false), strict=True)
    ]
    return f1(totals[0].astype(np.float64), totals[1].astype(np.float64), rare)


def bca_tails(draws: Floats, hits: Floats, false: Floats) -> Floats:
    """Levels ``(2, studies)`` at which BCa reads the draws (Efron 1987, jackknife within classes)."""
    rare = hits.shape[1]
    estimate = f1(hits.sum(axis=1), false.sum(axis=1), rare)
    bias = stats.norm.ppf(np.clip(((draws < estimate).mean(axis=0) + (draws <= estimate).mean(axis=0)) / 2, 1e-6, 1 - 1e-6))
    all_hits, all_false = hits.sum(axis=1, keepdims=True), false.sum(axis=1, keepdims=True)
    left = [
        2 * (all_hits - hits) / (all_hits - hits + all_false + (rare - 1) * SLICES),
        2 * all_hits / (all_hits + all_false - false + rare * SLICES),
    ]
    influence = np.concatenate([each.mean(axis=1, keepdims=True) - each for each in left], axis=1)
    acceleration = (influence**3).sum(axis=1) / (6 * (influence**2).sum(axis=1) ** 1.5)
    shifted = bias + stats.norm.ppf(TAILS)[:, None]
    return np.asarray(stats.norm.cdf(bias + shifted / (1 - acceleration * shifted)))


def coverage(rare: int, studies: int, seed: int = 0) -> dict[str, float]:
    """Share of studies whose interval holds the truth, by kind of interval."""
    generator, target = np.random.default_rng(seed), truth()
    held: dict[str, list[NDArray[np.bool_]]] = {"patients, percentile": [], "patients, BCa": [], "slices, percentile": []}
    for _ in range(-(-studies // BLOCK)):
        hits, false = draw_counts(generator, BLOCK, rare)
        patients, slices = by_patient(generator, hits, false), by_slice(generator, hits, false)
        corrected = bca_tails(patients, hits, false)
        limits = {
            "patients, percentile": np.quantile(patients, TAILS, axis=0),
            "patients, BCa": np.array([[np.quantile(patients[:, n], level) for n, level in enumerate(row)] for row in corrected]),
            "slices, percentile": np.quantile(slices, TAILS, axis=0),
        }
        for name, (low, high) in limits.items():
            held[name].append((low <= target) & (target <= high))
    return {name: float(np.concatenate(each).mean()) for name, each in held.items()}


if __name__ == "__main__":
    number = int(sys.argv[1]) if len(sys.argv) > 1 else 4000
    print(f"{number} studies, {RESAMPLES} resamples, true F1 {truth():.3f}")
    for patients in RARE:
        print(
            f"{patients} rare patients: " + "; ".join(f"{name} {100 * share:.1f} %" for name, share in coverage(patients, number).items())
        )
