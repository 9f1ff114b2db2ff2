"""Statistics on any predictions table."""

from raredistill.evaluation.bootstrap import paired_patient_bootstrap, patient_bootstrap
from raredistill.evaluation.compare import bayesian_correlated_t, corrected_interval, corrected_resampled_t, holm
from raredistill.evaluation.differences import differences, weigh
from raredistill.evaluation.gains import Gain, gain_test
from raredistill.evaluation.levels import by_patient, evaluate

__all__ = [
    "Gain", "bayesian_correlated_t", "by_patient", "corrected_interval", "corrected_resampled_t", "differences", "evaluate", "gain_test",
    "holm", "paired_patient_bootstrap", "patient_bootstrap", "weigh",
]  # fmt: skip
