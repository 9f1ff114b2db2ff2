"""Does a teacher help the rare class? Evidence from patient-grouped studies of knowledge distillation.

A notebook imports names from here; heavy submodules are imported lazily.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

_HOMES = {
    **{kind: ("raredistill.plugins", kind) for kind in ("distiller", "loss", "network", "source", "augmentation")},
    "study": ("raredistill.api", "study"),
    "distil": ("raredistill.api", "distil"),
    "teacher_from": ("raredistill.api", "teacher_from"),
    "forecast": ("raredistill.api", "forecast"),
    "report": ("raredistill.api", "report"),
    "compare": ("raredistill.api", "compare"),
    "Study": ("raredistill.studies.study", "Study"),
    "Entry": ("raredistill.runs.entry", "Entry"),
    "Cohort": ("raredistill.cohort.store", "Cohort"),
    "open_source": ("raredistill.cohort.sources.registry", "open_source"),
    "prepare": ("raredistill.cohort.prepare", "prepare"),
    "make_splits": ("raredistill.splits", "make_splits"),
    "Batches": ("raredistill.batches", "Batches"),
    "create_model": ("raredistill.models", "create"),
    "Settings": ("raredistill.training.settings", "Settings"),
    "train": ("raredistill.training.loop", "fit"),
    "predict": ("raredistill.api", "predict"),
    "refit": ("raredistill.api", "refit"),
    "export": ("raredistill.api", "export"),
    "Predictor": ("raredistill.ship.predictor", "Predictor"),
    "read_predictions": ("raredistill.predictions", "read"),
    "evaluate": ("raredistill.evaluation.levels", "evaluate"),
}
__all__ = list(_HOMES)


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return import_module("importlib.metadata").version("raredistill")
    if name not in _HOMES:
        raise AttributeError(f"module raredistill has no attribute {name}")
    module, attribute = _HOMES[name]
    return getattr(import_module(module), attribute)
