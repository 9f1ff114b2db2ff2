"""Terminal output for studies and cohorts: progress, tables and closing sentences."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from raredistill.console import Progress, duration, records, show_table

if TYPE_CHECKING:
    from raredistill.api import Finished
    from raredistill.cohort.store import Cohort
    from raredistill.runs.record import RunRecord
    from raredistill.runs.run import Run
    from raredistill.studies.estimate import Forecast
    from raredistill.studies.power import Plan
    from raredistill.studies.study import Study


class Terminal:
    """Shows progress as bars on a terminal and as lines elsewhere; an :class:`raredistill.api.Observer`."""

    @contextmanager
    def steps(self, what: str) -> Iterator[Progress]:
        """Show progress towards a total."""
        with Progress(what) as progress:
            yield progress

    def planned(self, study: Study, chosen: Sequence[Run], busy: Sequence[str]) -> None:
        """Print the number of runs and the size of each side of each split."""
        show_table(records(study.overview()), "samples (patients) of each class")
        for run in busy:
            print(f"another process is working on {run}: this one does the other runs and waits for it at the end", file=sys.stderr)

    @contextmanager
    def training(self, chosen: Sequence[Run]) -> Iterator[StudyProgress]:
        """Count the epochs of all runs."""
        with StudyProgress(chosen) as progress:
            yield progress


class StudyProgress:
    """Progress over the runs of a study, counted in epochs."""

    def __init__(self, runs: Sequence[Run]) -> None:
        self.total = sum(run.entry.settings.epochs for run in runs)
        self.done = 0
        self.at: dict[str, int] = {}
        self.progress = Progress("epochs")

    def __enter__(self) -> StudyProgress:
        self.progress.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self.progress.__exit__(*error)

    def run_started(self, run: Run, epochs: int) -> None:
        """A run starts or restarts training."""
        self.done -= self.at.get(run.id, 0)
        self.at[run.id] = 0

    def view_kept(self, run: Run, done: int, total: int) -> None:
        """Show the progress of the teacher cache."""
        self.progress(self.done, self.total, f"{run.id.rsplit('-', 1)[0]} queries its teacher, view {done} of {total}")

    def epoch_done(self, run: Run, record: dict[str, Any]) -> None:
        """Count an epoch and show the study's progress."""
        self.at[run.id] += 1
        self.done += 1
        score = record.get("validation", record["train"])["macro_f1"]
        self.progress(self.done, self.total, f"{run.id.rsplit('-', 1)[0]} macro F1 {score:.3f}")

    def run_done(self, run: Run, record: RunRecord, *, reused: bool) -> None:
        """Count the epochs that a finished run did not need."""
        left = run.entry.settings.epochs - self.at.get(run.id, 0)
        if reused:
            self.total -= left
        else:
            self.done += left


def show_cohort(cohort: Cohort) -> None:
    """Print the counts of a prepared cohort, and the patients left out of it."""
    from raredistill.cohort.inspect import GENERATED, is_generated, rule_table

    who = f"of {cohort.samples['patient'].nunique()} patients" if cohort.patients_known else "(images: no patient is known)"
    title = f"{cohort.name}: {len(cohort.samples)} samples {who}"
    title += f", {len(cohort.unlabelled)} of them without a label" if len(cohort.unlabelled) else ""
    title += f", channels {', '.join(cohort.channels)}" + (f"; {GENERATED}" if is_generated(cohort) else "")
    counts = cohort.counts() if cohort.patients_known else cohort.counts().drop(columns="patients").rename(columns={"slices": "images"})
    show_table(records(counts), title)
    if not cohort.patients_known:
        print("warning: no patient is known, so images of one patient may stand on both sides of a split")
    if skipped := cohort.provenance.get("skipped"):
        print("left out: " + "; ".join(f"{skip['count']} {skip['reason']} (such as {skip['examples'][0]})" for skip in skipped))
    show_table(records(rule_table(cohort)), f"slices of each class by both label rules (used: {cohort.provenance['settings'].get('rule')})")
    if left_out := cohort.provenance["left_out"]:
        names = sorted({problem["patient"] for problem in left_out})
        print(f"left out, with the reasons in {cohort.root / 'cohort.json'}: {', '.join(names[:20])}{' ...' if len(names) > 20 else ''}")


def show_forecast(expected: list[Forecast], out: Path) -> None:
    """Print the cost of every run, the effect of more devices, and the memory and disk needed."""
    from raredistill.studies.estimate import device_rows, disk_free, disk_needed, longest_chain, run_rows, size

    show_table(run_rows(expected), f"{len(expected)} runs in order; minutes left (an upper limit if a run may stop early)")
    show_table(device_rows(expected), "with more devices: GPUs, or machines like this one (processes on one CPU share its cores)")
    seconds, chain = longest_chain(expected)
    print(f"one device: about {duration(sum(each.seconds for each in expected))}")
    if seconds:
        print(f"any number of devices: at least {duration(seconds)}, for {' then '.join(chain)}")
    print(f"memory: {size(max(each.memory for each in expected))} for the largest run")
    print(f"disk: {size(disk_needed(expected))}, and {size(disk_free(out))} are free")


def show_plan(plan: Plan) -> None:
    """Print what a design could show, power against repeats, and the designs that show a wanted gain."""
    from raredistill.studies.power import chart

    print("\n".join(plan.sentences))
    print(f"{plan.trainings} networks in all: {plan.folds} folds x {plan.repeats} repeats")
    for gain in plan.table.columns:
        print(f"\npower for a true gain of {gain}")
        print("\n".join(chart(plan.table, gain)))
    if len(plan.designs):
        show_table(records(plan.designs), "designs that find the gain, cheapest first; cost counts training sides")


def show_finished(found: Finished) -> None:
    """Print the scores and conclusions of a finished study, and its remarks and failures on standard error."""
    if not found.waiting:
        show_table(records(found.summary()), "test results, mean over folds and seeds")
    _show_remarks(found.runs)
    for record in found.failed:
        print(f"failed: {record.id}: {record.error}", file=sys.stderr)
    if found.page is not None:
        show_answer(found.page)


def show_answer(page: Path) -> None:
    """Print the answer of a report in words: warnings, verdicts, what to do next, and where the page is."""
    from raredistill.api import answer
    from raredistill.names import shown

    found = answer(page.parents[1])
    for warning in found.warnings:
        print(f"warning: {shown(warning)}", file=sys.stderr)
    print(shown(f"{found.question} {found.answer}"))
    for record in found.verdicts:
        print(shown(f"  {record.sentence}"))
    print(shown(f"To do: {found.next_step}{' ' + found.command if found.command else ''}"))
    print(shown(f"report: {page}"))


def _show_remarks(runs: Sequence[RunRecord]) -> None:
    remarks: dict[str, list[str]] = {}
    for record in runs:
        for remark in record.remarks:
            remarks.setdefault(remark, []).append(record.id)
    for remark, names in remarks.items():
        others = f" and {len(names) - 1} more" if len(names) > 1 else ""
        print(f"remark: {names[0]}{others}: {remark}", file=sys.stderr)
    caches = [record.teacher_cache for record in runs if record.teacher_cache]
    if caches:
        computed, seconds = (sum(cache[key] for cache in caches) for key in ("computed", "seconds"))
        print(f"teacher cache: {computed} views computed in {seconds:.1f} s, for {len(caches)} students", file=sys.stderr)
