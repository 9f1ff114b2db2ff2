"""Cost of training: seconds per epoch by entry, and the time to fill the teacher cache."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from raredistill.reports.results import Results


def costs(results: Results) -> pd.DataFrame:
    """One row per entry with a finished run.

    Returns:
        ``entry, runs, epochs, epoch_s, run_s`` (means over its runs; a run's epochs and later steps, without the cache),
        ``cache_views``, ``cache_fill_s`` (mean over the runs that computed a view; other runs reused them) and ``device``; NaN if a
        record does not state it, None if an entry does not use a teacher cache.
    """
    # As objects, to distinguish None (not applicable) from NaN (unknown).
    return pd.DataFrame([_entry(results, entry) for entry in results.entries if results.of(entry)], dtype=object)


def _entry(results: Results, entry: str) -> dict[str, Any]:
    runs = results.of(entry)
    seconds = [record["seconds"] for run in runs for record in results.epochs[run.id] if "seconds" in record]
    caches = [run.teacher_cache for run in runs if run.teacher_cache]
    filled = [cache["seconds"] for cache in caches if cache["computed"]]
    whole = [np.nan if run.seconds is None else run.seconds for run in runs]
    devices = {run.made_with.get("versions", {}).get("device", "") for run in runs}
    return {
        "entry": entry, "runs": len(runs), "epochs": float(np.mean([len(results.epochs[run.id]) for run in runs])),
        "epoch_s": float(np.mean(seconds)) if seconds else np.nan, "run_s": float(np.mean(whole)),
        "cache_views": caches[0]["views"] if caches else None, "cache_fill_s": float(np.mean(filled)) if filled else None,
        "device": "; ".join(sorted(filter(None, devices))),
    }  # fmt: skip
