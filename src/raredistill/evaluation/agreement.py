"""Agreement of students with their teachers, including inherited errors."""

from __future__ import annotations

from typing import Any

import numpy as np

from raredistill.errors import DataError
from raredistill.evaluation.bootstrap import check_same
from raredistill.metrics import confusion_matrix, metrics_from_confusion
from raredistill.predictions import Predictions

_KEYS = ["repeat", "fold", "seed", "patient", "sample"]


def guesses(*sides: Predictions) -> list[Any]:
    """Labels and each side's predicted classes, in a common order of rows: ``label (N,)``, then ``(N,)`` per side.

    Raises:
        DataError: the sides do not predict the same samples in the same folds and seeds.
    """
    for side in sides[1:]:
        check_same(sides[0], side)
    orders = [np.lexsort([side.table[key].to_numpy() for key in reversed(_KEYS)]) for side in sides]
    if len({len(order) for order in orders}) > 1:
        raise DataError("the sides have different numbers of runs; compare the folds and seeds that all have finished")
    return [sides[0].labels()[orders[0]], *(side.probabilities().argmax(axis=1)[order] for side, order in zip(sides, orders, strict=True))]


def inheritance(student: Predictions, teacher: Predictions, control: Predictions) -> dict[str, float]:
    """Agreement of a student with its teacher, compared with that of its control, which was trained without the teacher.

    Args:
        student: test part of one checkpoint.
        teacher: the same samples, folds and seeds.
        control: the same.

    Returns:
        ``agreement`` and ``kappa`` of student and teacher, ``control_agreement``; ``teacher_errors`` (samples), and the shares of them that
        the student and the control repeat with the same wrong class: ``inherited`` and ``control_same_errors`` (NaN without errors).

    Raises:
        DataError: the sides do not match.
    """
    label, taught, teaches, alone = guesses(student, teacher, control)
    wrong = teaches != label
    both = confusion_matrix(teaches, taught, len(student.classes))
    return {
        "agreement": float((taught == teaches).mean()), "kappa": float(metrics_from_confusion(both)["kappa"]),
        "control_agreement": float((alone == teaches).mean()), "teacher_errors": float(wrong.sum()),
        "inherited": float((taught == teaches)[wrong].mean()) if wrong.any() else float("nan"),
        "control_same_errors": float((alone == teaches)[wrong].mean()) if wrong.any() else float("nan"),
    }  # fmt: skip
