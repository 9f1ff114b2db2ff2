"""Does the gain test keep its level, how much power has it, and does a pilot foretell what a longer study will measure?

Ten scenarios of learners and eight of scores (simulated_studies.py). Nulls must reject at most 6 % plus two Monte-Carlo errors in each row
and 5 % on average; power must reach what is stated; the forecast from two repeats must hold the standard error at six in 90 % of studies
within its range. Exits with 1 when a row fails.
Command: ``python benchmarks/sim_gain.py [--studies 800]`` (about five minutes on one core)
"""

from __future__ import annotations

import argparse
import sys

import numpy as np

from raredistill.evaluation import gain_test
from raredistill.evaluation.contrasts import contrasts, tally
from raredistill.evaluation.gains import assess
from raredistill.evaluation.planning import Pilot, forecast
from simulated_studies import LEARNERS, SCORES, Counts, calibrated, drawn, learned, scored, shift_for, tables

METRICS = ["recall:rare", "precision:rare", "macro_f1", "balanced_accuracy", "log_loss", "auroc:rare", "auprc:rare"]
POWERS = (
    ("369 alike, noise 0.05", 5, 0.05, 0.65), ("369 alike, noise 0.05", 2, 0.05, 0.28), ("369 patients, noise 0.05", 5, 0.05, 0.27),
    ("100 alike, noise 0.05", 5, 0.10, 0.90),
)  # fmt: skip


def first_repeats(counts: Counts, repeats: int) -> Counts:
    tp, pp, actual, fold, rare = counts
    return tp[:, :repeats], pp[:, :repeats], actual, fold[:repeats], rare


def learner_nulls(name: str, studies: int, repeats: tuple[int, ...] = (2, 5)) -> dict[int, float]:
    """Share of studies whose interval misses the truth, by number of repeats; the distilled arm's truth is its mean over studies."""
    setting = LEARNERS[name]
    runs = [learned(np.random.default_rng([61, study]), setting, max(repeats)) for study in range(studies)]
    shares = {}
    for number in repeats:
        found = [gain_test(*first_repeats(each, number), kept=setting.kept) for each in runs]
        truth = float(np.mean([each.gain for each in found])) if setting.distilled else 0.0
        shares[number] = float(np.mean([not each.low <= truth <= each.high for each in found]))
    return shares


def rejections(name: str, repeats: int, seeds: int, gain: float, studies: int) -> float:
    """Share of studies with p < 0.05."""
    setting, generator = calibrated(SCORES[name]), np.random.default_rng([62, repeats, seeds, int(1000 * gain)])
    shift = shift_for(setting, gain) if gain else 0.0
    return float(np.mean([gain_test(*scored(generator, setting, 5, repeats, seeds, shift)).p < 0.05 for _ in range(studies)]))


def forecasts(name: str, studies: int) -> tuple[float, float, float]:
    """Share of studies whose error at six repeats lies in the range foretold from two; median forecast; median of what was measured."""
    generator, held, told, seen = np.random.default_rng(63), [], [], []
    for _ in range(studies):
        whole = scored(generator, calibrated(SCORES[name]), 5, 6, 1, 0.0)
        plan = forecast(Pilot.of(gain_test(*first_repeats(whole, 2))), runs=6)
        measured = gain_test(*whole).se
        held.append(plan.se_low <= measured <= plan.se_high)
        told.append(plan.se)
        seen.append(measured)
    return float(np.mean(held)), float(np.median(told)), float(np.median(seen))


def other_metrics(name: str, repeats: int, studies: int) -> dict[str, float]:
    """Share of null studies with p < 0.05 by metric, by way of predictions tables."""
    generator, small = np.random.default_rng(64), {metric: [] for metric in METRICS}
    for _ in range(studies):
        sides = [tally(each, METRICS) for each in tables(*drawn(generator, SCORES[name], 5, repeats, 1, 0.0))]
        made = contrasts(sides[0], sides[1], METRICS, "rare").found
        for metric, found in zip(made, assess(list(made.values())), strict=True):
            small[metric].append(found.p < 0.05)
    return {metric: float(np.mean(each)) for metric, each in small.items()}


def main(studies: int) -> int:
    """Print every row; the number of rows that fail."""
    nulls, failed = [], 0
    limit = 0.06 + 2 * (0.06 * 0.94 / studies) ** 0.5

    def row(what: str, share: float, good: bool, wanted: str) -> None:
        nonlocal failed
        failed += not good
        print(f"{'ok  ' if good else 'FAIL'} {what:62s} {100 * share:5.1f} %  ({wanted})", flush=True)

    for name in LEARNERS:
        for repeats, share in learner_nulls(name, studies).items():
            nulls.append(share)
            row(f"learners: {name}, 5 x {repeats}: false alarms", share, share <= limit, f"at most {100 * limit:.1f}")
    for name in SCORES:
        for repeats, seeds in ((1, 2), (2, 1), (5, 1)):
            nulls.append(rejections(name, repeats, seeds, 0.0, studies))
            row(f"scores: {name}, 5 x {repeats} x {seeds}: false alarms", nulls[-1], nulls[-1] <= limit, f"at most {100 * limit:.1f}")
    for name in ("100 patients, noise 0.05", "100 alike, noise 0.05"):
        for metric, share in other_metrics(name, 3, studies // 2).items():
            nulls.append(share)
            above = 0.06 + 2 * (0.06 * 0.94 / (studies // 2)) ** 0.5
            row(f"{metric}: {name}, 5 x 3: false alarms", share, share <= above, f"at most {100 * above:.1f}")
    for name, repeats, gain, least in POWERS:
        share = rejections(name, repeats, 1, gain, studies)
        row(f"scores: {name}, 5 x {repeats}, gain {gain}: power", share, share >= least, f"at least {100 * least:.0f}")
    for name in ("100 patients, noise 0.05", "369 alike, noise 0.05"):
        share, told, seen = forecasts(name, studies)
        row(f"forecast of six repeats from two, {name}", share, share >= 0.88, f"at least 88; median {told:.4f}, measured {seen:.4f}")
    mean = float(np.mean(nulls))
    print(f"mean of the nulls {100 * mean:.1f} %, largest {100 * max(nulls):.1f} %, {studies} studies a row")
    return failed + (mean > 0.05)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--studies", type=int, default=800)
    sys.exit(int(main(parser.parse_args().studies) > 0))
