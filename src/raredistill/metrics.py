"""Performance metrics as pure functions of labels and probabilities; NaN for a class without samples."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import rankdata

from raredistill.errors import DataError

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]


def classification_metrics(label: ArrayLike, probability: ArrayLike) -> dict[str, Any]:
    """Compute all reported metrics of one set of predictions.

    Args:
        label: ``(N,)`` class indices.
        probability: ``(N, K)``, each row summing to 1; the predicted class is the most probable.

    Returns:
        The metrics of :func:`metrics_from_confusion`; ``auroc`` and ``auprc`` ``(K,)``, each class against the rest (area by ranks; average
        precision); ``ece`` in 15 bins; ``brier``, the squared error summed over the classes. NaN where a class is absent.

    Raises:
        DataError: shapes do not fit, a label is out of range, a probability is not finite.

    Examples:
        >>> metrics = classification_metrics([0, 1, 1], [[0.9, 0.1], [0.2, 0.8], [0.6, 0.4]])
        >>> round(metrics["accuracy"], 3), metrics["recall"].tolist(), metrics["auroc"].tolist()
        (0.667, [1.0, 0.5], [1.0, 1.0])
    """
    truth, scores = checked(label, probability)
    classes = scores.shape[1]
    one_hot = truth[:, None] == np.arange(classes)
    return {
        **metrics_from_confusion(confusion_matrix(truth, scores.argmax(axis=1), classes)),
        "auroc": np.array([auroc(one_hot[:, k], scores[:, k]) for k in range(classes)]),
        "auprc": np.array([auprc(one_hot[:, k], scores[:, k]) for k in range(classes)]),
        "ece": ece(truth, scores),
        "brier": float(((scores - one_hot) ** 2).sum(axis=1).mean()) if len(truth) else float("nan"),
    }


def confusion_matrix(label: ArrayLike, predicted: ArrayLike, classes: int) -> Integers:
    """Count samples by true class (rows) and predicted class (columns): ``(K, K)``.

    Args:
        label: ``(N,)`` true class indices.
        predicted: ``(N,)`` predicted class indices.
        classes: number of classes, K.

    Raises:
        DataError: different lengths, or an index out of range.

    Examples:
        >>> confusion_matrix([0, 0, 1, 1], [0, 1, 1, 1], classes=2)
        array([[1, 1],
               [0, 2]])
    """
    truth, guess = _indices(label, classes, "label"), _indices(predicted, classes, "prediction")
    if len(truth) != len(guess):
        raise DataError(f"{len(truth)} labels but {len(guess)} predictions; give one prediction per sample")
    return np.bincount(truth * classes + guess, minlength=classes * classes).reshape(classes, classes).astype(np.int64)


def metrics_from_confusion(matrix: ArrayLike) -> dict[str, Any]:
    """Compute the metrics that need only counts.

    Args:
        matrix: ``(..., K, K)``, rows are true classes; leading axes (such as bootstrap resamples) are kept.

    Returns:
        ``precision, recall, specificity, f1`` ``(..., K)``, NaN for a class absent from the truth (one that is present and never predicted
        has precision 0); ``accuracy, macro_f1, balanced_accuracy, g_mean, mcc, kappa`` ``(...)``, floats for one matrix. Means over
        classes leave absent ones out. ``mcc`` is 0 where all samples are predicted as one class (Gorodkin 2004).

    Raises:
        DataError: not square.

    Examples:
        >>> metrics = metrics_from_confusion([[8, 2], [1, 4]])
        >>> metrics["f1"].round(3).tolist(), round(metrics["macro_f1"], 3), round(metrics["balanced_accuracy"], 3)
        ([0.842, 0.727], 0.785, 0.8)
    """
    counts = np.asarray(matrix, dtype=np.float64)
    if counts.ndim < 2 or counts.shape[-1] != counts.shape[-2]:
        raise DataError(f"a confusion matrix must be (K, K), not {counts.shape}")
    found = metrics_from_margins(np.diagonal(counts, axis1=-2, axis2=-1), counts.sum(axis=-1), counts.sum(axis=-2))
    return {name: float(value) if value.ndim == 0 else value for name, value in found.items()}


def metrics_from_margins(right: Floats, actual: Floats, guessed: Floats) -> dict[str, Floats]:
    """The same metrics from three counts per class ``(..., K)``: correctly classified, in the truth, and predicted.

    They only need the diagonal and the margins of a confusion matrix, so a hundred classes cost little more than three.
    """
    per_class = _per_class(right, actual, guessed)
    recall = per_class["recall"]
    overall = {
        "accuracy": _ratio(right.sum(axis=-1), actual.sum(axis=-1)),
        "macro_f1": _present_mean(per_class["f1"]),
        "balanced_accuracy": _present_mean(recall),
        "g_mean": _geometric_mean(recall),
        **_agreement(right, actual, guessed),
    }
    return {**per_class, **overall}


def auroc(positive: NDArray[np.bool_], score: Floats) -> float:
    """Area under the ROC curve by the Mann-Whitney statistic (ties count half); NaN unless both kinds are present.

    Args:
        positive: ``(N,)``.
        score: ``(N,)``, higher for positives.

    Examples:
        >>> round(auroc(np.array([True, False, True]), np.array([0.9, 0.5, 0.4])), 3)
        0.5
    """
    positives = int(positive.sum())
    negatives = len(positive) - positives
    if not positives or not negatives:
        return float("nan")
    return float((rankdata(score)[positive].sum() - positives * (positives + 1) / 2) / (positives * negatives))


def auprc(positive: NDArray[np.bool_], score: Floats) -> float:
    """Average precision, the step-wise area under the precision-recall curve; NaN without positives.

    Args:
        positive: ``(N,)``.
        score: ``(N,)``, higher for positives.

    Examples:
        >>> round(auprc(np.array([True, False, True]), np.array([0.9, 0.5, 0.4])), 3)
        0.833
    """
    if not positive.any():
        return float("nan")
    order = np.argsort(-score, kind="stable")
    # Equal scores form one threshold: only the last of each group counts.
    last = np.flatnonzero(np.append(np.diff(score[order]) != 0, True))
    hits = np.cumsum(positive[order])[last]
    return float(np.sum(np.diff(hits, prepend=0) / hits[-1] * hits / (last + 1)))


def ece(label: ArrayLike, probability: ArrayLike, bins: int = 15) -> float:
    """Expected calibration error of the top class (Guo et al. 2017).

    Args:
        label: ``(N,)`` class indices.
        probability: ``(N, K)``.
        bins: number of bins of equal width.

    Returns:
        Between 0 and 1; NaN without samples.

    Examples:
        >>> round(ece([0, 1], [[0.9, 0.1], [0.8, 0.2]]), 3)
        0.45
    """
    count, confidence, accuracy = reliability(label, probability, bins)
    filled = count > 0
    if not filled.any():
        return float("nan")
    return float(np.average(np.abs(accuracy - confidence)[filled], weights=count[filled]))


def reliability(label: ArrayLike, probability: ArrayLike, bins: int = 15) -> tuple[Floats, Floats, Floats]:
    """Group samples by the confidence of their top class, in bins (low, high] of equal width.

    Args:
        label: ``(N,)`` class indices.
        probability: ``(N, K)``.
        bins: number of bins.

    Returns:
        Count, mean confidence and accuracy, each ``(bins,)``; NaN in empty bins.

    Raises:
        DataError: as :func:`classification_metrics`, or fewer than one bin.

    Examples:
        >>> count, confidence, accuracy = reliability([0, 1], [[0.9, 0.1], [0.8, 0.2]], bins=2)
        >>> count.tolist(), confidence.round(2).tolist(), accuracy.tolist()
        ([0.0, 2.0], [nan, 0.85], [nan, 0.5])
    """
    if bins < 1:
        raise DataError(f"calibration needs at least one bin, not {bins}")
    truth, scores = checked(label, probability)
    top = scores.max(axis=1)
    place = np.clip(np.digitize(top, np.linspace(0, 1, bins + 1), right=True) - 1, 0, bins - 1)
    count = np.bincount(place, minlength=bins).astype(np.float64)
    sums = [np.bincount(place, weights=each, minlength=bins) for each in (top, (scores.argmax(axis=1) == truth).astype(np.float64))]
    return count, _ratio(sums[0], count), _ratio(sums[1], count)


def checked(label: ArrayLike, probability: ArrayLike) -> tuple[Integers, Floats]:
    """Convert labels ``(N,)`` and scores ``(N, K)`` to arrays, and check that they match.

    Raises:
        DataError: shapes do not fit, a label is out of range, a score is not finite.
    """
    scores = np.asarray(probability, dtype=np.float64)
    if scores.ndim != 2 or len(scores) != np.size(label):
        raise DataError(f"{np.size(label)} labels but scores of shape {scores.shape}; give (N, K), one row per label")
    if not np.isfinite(scores).all():
        raise DataError("a probability or logit is not finite; leave out the run that diverged")
    return _indices(label, scores.shape[1], "label"), scores


def _indices(values: ArrayLike, classes: int, what: str) -> Integers:
    indices = np.asarray(values).ravel().astype(np.int64)
    if len(indices) and (indices.min() < 0 or indices.max() >= classes):
        raise DataError(f"{what} {int(indices.min())} or {int(indices.max())} is not a class index from 0 to {classes - 1}")
    return indices


def _per_class(right: Floats, actual: Floats, guessed: Floats) -> dict[str, Floats]:
    others = actual.sum(axis=-1)[..., None] - actual
    absent = actual == 0
    values = {
        "precision": _ratio(right, guessed, empty=0.0),
        "recall": _ratio(right, actual),
        "specificity": _ratio(others - (guessed - right), others),
        "f1": _ratio(2 * right, actual + guessed),
    }
    return {name: np.where(absent, np.nan, value) for name, value in values.items()}


def _agreement(right: Floats, actual: Floats, guessed: Floats) -> dict[str, Floats]:
    total = actual.sum(axis=-1)
    chance = (actual * guessed).sum(axis=-1)
    covariance = right.sum(axis=-1) * total - chance
    spread = (total**2 - (actual**2).sum(axis=-1)) * (total**2 - (guessed**2).sum(axis=-1))
    mcc = np.where(total > 0, _ratio(covariance, np.sqrt(spread), empty=0.0), np.nan)
    return {"mcc": mcc, "kappa": _ratio(covariance, total**2 - chance)}


def _present_mean(values: Floats) -> Floats:
    present = ~np.isnan(values)
    return _ratio(np.where(present, values, 0.0).sum(axis=-1), present.sum(axis=-1).astype(np.float64))


def _geometric_mean(recall: Floats) -> Floats:
    present = ~np.isnan(recall)
    number = present.sum(axis=-1).astype(np.float64)
    product = np.where(present, recall, 1.0).prod(axis=-1)
    return np.where(number > 0, product ** (1 / np.maximum(number, 1)), np.nan)


def _ratio(numerator: ArrayLike, denominator: ArrayLike, empty: float = np.nan) -> Floats:
    above, below = np.asarray(numerator, dtype=np.float64), np.asarray(denominator, dtype=np.float64)
    result: Floats = np.divide(above, below, out=np.full(below.shape, empty), where=below != 0)
    return result
