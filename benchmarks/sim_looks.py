"""False alarms, power and repeats used when a study stops as soon as its looks settle it, against peeking at 5 % after every repeat.

Scores of simulated_studies.py, 5 folds, one seed a repeat; three pairs share a study where ``family`` says so. Exits with 1 when false
alarms exceed 5 % plus two Monte-Carlo errors. Command: ``python benchmarks/sim_looks.py [--studies 400]`` (minutes on one core)
"""

from __future__ import annotations

import argparse
import sys

import numpy as np

from raredistill.evaluation import gain_test
from raredistill.evaluation.looks import Looks, settle
from sim_gain import first_repeats
from simulated_studies import SCORES, calibrated, scored, shift_for

RULE = Looks((2, 4, 10), (0.01, 0.01, 0.03))


def sequence(generator: np.random.Generator, name: str, gain: float, rule: Looks, pairs: int = 1) -> tuple[str, int, bool]:
    """Outcome of the first pair, the repeats that it used, and whether peeking at 5 % after every repeat would have claimed something."""
    setting = calibrated(SCORES[name])
    shift = shift_for(setting, gain) if gain else 0.0
    studies = [scored(generator, setting, 5, rule.looks[-1], 1, shift) for _ in range(pairs)]
    peeked = any(gain_test(*first_repeats(studies[0], number)).p < 0.05 for number in range(2, rule.looks[-1] + 1))
    states = {}
    for place, look in enumerate(rule.looks):
        found = {str(n): gain_test(*first_repeats(each, look), level=rule.alpha[place]) for n, each in enumerate(studies)}
        states = settle(rule, place, found, states)
    claims = [states[str(n)].outcome for n in range(pairs)]
    outcome = next((each for each in claims if each in ("helps", "harms")), claims[0]) if not gain else claims[0]
    return outcome, states["0"].look, peeked


def rates(name: str, gain: float, rule: Looks, studies: int, pairs: int = 1) -> dict[str, float]:
    """Shares of outcomes, mean repeats used, and how often peeking claims something; without a gain, any pair's claim counts."""
    generator = np.random.default_rng([71, int(1000 * gain), pairs])
    found = [sequence(generator, name, gain, rule, pairs) for _ in range(studies)]
    outcomes = [outcome for outcome, _, _ in found]
    named = {each: outcomes.count(each) / studies for each in ("helps", "harms", "makes no practical difference", "floor", "budget")}
    return {**named, "repeats": float(np.mean([used for _, used, _ in found])), "peeking": float(np.mean([each for *_, each in found]))}


def main(studies: int) -> int:
    """Print every row; the number of rows that fail."""
    failed, limit = 0, 0.05 + 2 * (0.05 * 0.95 / studies) ** 0.5
    for name in ("100 patients, noise 0.05", "100 alike, noise 0.05", "369 alike, noise 0.05"):
        for gain, margin, pairs in ((0.0, None, 1), (0.0, None, 3), (0.0, 0.03, 1), (0.05, None, 1), (0.10, None, 1)):
            found = rates(name, gain, Looks(RULE.looks, RULE.alpha, margin), studies, pairs)
            false = found["helps"] + found["harms"] if not gain else found["harms"]
            failed += false > limit
            print(
                f"{'FAIL' if false > limit else 'ok  '} {name}, gain {gain:.2f}, margin {margin}, pairs {pairs}: "
                f"helps {found['helps']:.1%}, "
                f"harms {found['harms']:.1%}, no practical difference {found['makes no practical difference']:.1%}; "
                f"{found['repeats']:.1f} repeats of {RULE.looks[-1]}; peeking claims {found['peeking']:.1%}", flush=True,
            )  # fmt: skip
    return failed


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--studies", type=int, default=400)
    sys.exit(int(main(parser.parse_args().studies) > 0))
