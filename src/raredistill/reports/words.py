"""How a reader sees names and numbers: headers in words, numbers as people write them."""

from __future__ import annotations

import math
import re
from typing import Any

HEADERS = {
    "p": "p", "p_holm": "p (Holm)", "p_same": "p (no difference)", "nb_p": "p (corrected t)", "low": "Low (95 %)", "high": "High (95 %)",
    "bca_low": "Low (BCa)", "bca_high": "High (BCa)", "g_mean": "G-mean", "mcc": "MCC", "ece": "Calibration error",
    "ece_equal_mass": "Calibration error (equal mass)", "flops": "FLOPs", "latency_ms": "Latency", "latency_on": "Measured on",
    "epoch_s": "Seconds an epoch", "run_s": "Seconds a run", "cache_fill_s": "Seconds to fill the cache", "bytes": "Weights",
    "macro_f1": "Macro F1", "best_checkpoint": "Gain, best checkpoint", "argmax": "Gain, argmax",
    "training_share": "Share that is training noise", "detectable": "Detectable gain",
    "like_randomised": "Correlation with shuffled weights",
    "delong_p": "p (DeLong)", "mcnemar_p": "p (McNemar)", "smallest_p": "Smallest p possible",
}  # fmt: skip
"""Headers that are not the column's own words."""
SHORT = {"f1": "F1", "auroc": "AUROC", "auprc": "AUPRC"}
RATES = {"f1": "F1", "recall": "sensitivity", "precision": "precision", "auprc": "AUPRC", "auroc": "AUROC"}
METRICS = {"macro_f1": "Macro F1", "balanced_accuracy": "Balanced accuracy"}


def header(column: object) -> str:
    """A column's name in words; names of entries and classes stay as they are."""
    name = str(column)
    if name in HEADERS:
        return HEADERS[name]
    if name.startswith(("by ", "as ")):
        return name
    if name.startswith("f1_"):
        return f"{name[3:]} F1"
    head, space, tail = name.rpartition(" ")
    if space and (tail in SHORT or tail in ("recall", "specificity", "precision")):
        return f"{head} {SHORT.get(tail, tail)}"
    words = [SHORT.get(word, word) for word in name.split("_")] if re.fullmatch(r"[a-z0-9_]+", name) else [name]
    text = " ".join(words)
    return text[:1].upper() + text[1:]


def metric_name(metric: str) -> str:
    """``f1:LGG`` as ``LGG F1``, ``balanced_accuracy`` as ``Balanced accuracy``."""
    kind, colon, name = metric.partition(":")
    return f"{name} {RATES.get(kind, kind)}" if colon else METRICS.get(metric, header(metric))


def cell(value: Any, column: object = "") -> str:
    """A value as a person writes it."""
    if isinstance(value, str):
        return metric_name(value) if column == "metric" else value
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "" if value is None else "undefined"
    if isinstance(value, bool) or not hasattr(value, "__float__"):
        return str(value)
    return _number(float(value), str(column), whole=not isinstance(value, float))


def _number(value: float, column: str, *, whole: bool) -> str:
    if column in ("parameters", "flops", "bytes"):
        return amount(value) + ("B" if column == "bytes" else "")
    if column.endswith("_ms"):
        return f"{value:.2g} ms" if value < 100 else f"{value:.0f} ms"
    if column.endswith("_s"):
        return f"{value:.1f}"
    if column.rpartition("_")[2] == "p" or column.startswith("p_"):
        return "< 0.001" if value < 0.001 else f"{value:.2g}"
    if whole:
        return f"{int(value):,}".replace(",", "\u202f") if abs(value) >= 10_000 else str(int(value))
    return f"{value:.3f}".replace("-", "−")


def amount(value: float) -> str:
    """A large number with its unit: ``4.9 M``, ``78 k``."""
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.0f} {unit}" if value >= 100 * size else f"{value / size:.2g} {unit}"
    return f"{value:.0f} "


def share(value: float) -> str:
    """``52 %``."""
    return f"{100 * value:.0f} %"


def score(value: float | None) -> str:
    """A score to two decimals, or a dash where there is none."""
    return "–" if value is None or math.isnan(value) else f"{value:.2f}"


def change(value: float) -> str:
    """Signed difference to two decimals, or three if it would otherwise round to zero."""
    digits = 2 if abs(value) >= 0.005 else 3
    return f"{value:+.{digits}f}".replace("-", "−")
