"""The same entries on several data sets: the only valid use of Wilcoxon's signed-rank test here."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd

from raredistill.errors import DataError
from raredistill.evaluation.compare import holm, wilcoxon_over_datasets
from raredistill.evaluation.ranks import FEWEST, ranks_over_datasets
from raredistill.reports.analyses import gains
from raredistill.reports.pairs import Pair
from raredistill.reports.results import Results

TESTED = ("entry", "data_sets", "mean_gain", "p", "p_holm", "smallest_p")


def across(studies: Sequence[tuple[Results, list[Pair]]]) -> pd.DataFrame:
    """The rare class's gain for every pair on each data set; each data set has its own rare class.

    Raises:
        DataError: two studies use the same cohort, so they are not independent data sets.
    """
    names: dict[str, str] = {}
    for results, _ in studies:
        name, cohort = results.study.name, results.study.cohort.hash
        if cohort in names:
            raise DataError(f"studies {names[cohort]} and {name} are of one cohort: Wilcoxon's test needs independent data sets")
        names[cohort] = name
    tables = []
    for results, pairs in studies:
        where = {"study": results.study.name, "cohort": results.study.cohort.name, "rare": results.study.rare}
        tables.append(gains(pairs, results.study.rare).assign(**where))
    shown = ["entry", "study", "cohort", "rare", "teacher", "gain", "low", "high"]
    return pd.concat(tables, ignore_index=True)[shown].sort_values("entry", kind="stable", ignore_index=True)


def tested_across(table: pd.DataFrame) -> pd.DataFrame:
    """Wilcoxon's signed-rank test for each entry with gains on at least two data sets, with Holm's adjustment over the entries.

    Args:
        table: result of :func:`across`.

    Returns:
        ``entry, data_sets, mean_gain, p, p_holm, smallest_p``, the last being the smallest p that this many data sets can reach.
    """
    rows = []
    for entry, own in table.groupby("entry", sort=False):
        if len(own) > 1:
            p, smallest = wilcoxon_over_datasets(own["gain"])
            rows.append((entry, len(own), float(own["gain"].mean()), p, float("nan"), smallest))
    found = pd.DataFrame(rows, columns=list(TESTED))
    return found.assign(p_holm=holm(found["p"]) if rows else [])


def ranked_across(table: pd.DataFrame) -> pd.DataFrame:
    """Mean ranks of the entries' gains over the data sets that all of them have, with Nemenyi's critical difference.

    Args:
        table: of :func:`across`.

    Returns:
        ``entry, mean_rank, critical_difference, friedman_p, not_told_from``; without columns for fewer than three entries or data sets.
    """
    scores = table.pivot_table(index="study", columns="entry", values="gain").dropna()
    if min(scores.shape) < FEWEST:
        return pd.DataFrame()
    found = ranks_over_datasets(scores)
    alike = {name: sorted({other for clique in found.cliques if name in clique for other in clique} - {name}) for name in scores.columns}
    rows = [
        (entry, float(rank), found.critical_difference, found.p, ", ".join(alike[str(entry)])) for entry, rank in found.mean_ranks.items()
    ]
    return pd.DataFrame(rows, columns=["entry", "mean_rank", "critical_difference", "friedman_p", "not_told_from"])
