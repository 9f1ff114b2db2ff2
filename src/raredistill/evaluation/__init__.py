"""Statistics on any predictions table."""

from raredistill.evaluation.bootstrap import paired_patient_bootstrap, patient_bootstrap
from raredistill.evaluation.compare import corrected_resampled_t, holm
from raredistill.evaluation.levels import evaluate

__all__ = ["corrected_resampled_t", "evaluate", "holm", "paired_patient_bootstrap", "patient_bootstrap"]
