"""The verbs of the command line: each parses, calls one function and prints."""

from __future__ import annotations

import shlex
import signal
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from raredistill.errors import RareDistillError

if TYPE_CHECKING:
    from raredistill.config import StudyConfig
    from raredistill.study.estimate import Forecast
    from raredistill.study.plan import Run

INTERRUPTED, TERMINATED = 128 + signal.SIGINT, 128 + signal.SIGTERM

app = typer.Typer(
    help="Does a teacher help the rare class? Patient-grouped evidence on knowledge distillation for imbalanced images.",
    no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None,
)  # fmt: skip

Layout = Literal["nifti", "hdf5", "both"]
Out = Annotated[Path, typer.Option("--out", help="folder to write; new, empty, or written by this command before")]
Kind = Annotated[str, typer.Argument(help="brats_nifti, brats_hdf5, image_folder, table (CSV) or arrays (npz)")]
RawPath = Annotated[Path, typer.Argument(help="folder or file of the raw data")]
Options = Annotated[
    list[str] | None,
    typer.Argument(help="options of the source as key=value, such as grades=grades.csv or rule=thesis", metavar="[KEY=VALUE]..."),
]
Workers = Annotated[int | None, typer.Option(min=1, help="processes; all cores by default")]


PATIENTS_SHOWN = 12


def main() -> None:
    """Run the command line: 0 done; 1 finished, but runs failed; 2 bad input; 130 and 143 interrupted and resumable."""
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(TERMINATED))
    try:
        if app(standalone_mode=False) == INTERRUPTED:  # what typer makes of Ctrl-C
            _stop(f"interrupted; {_go_on()}", INTERRUPTED)
    except RareDistillError as error:
        _stop(str(error), 2)
    except (typer.Abort, KeyboardInterrupt):
        _stop(f"interrupted; {_go_on()}", INTERRUPTED)
    except SystemExit as stop:
        if stop.code == TERMINATED:
            _stop(f"terminated; {_go_on()}", TERMINATED)
        raise
    except OSError as error:
        what = f"{error.filename or 'a file'}: {error.strerror or error}"
        _stop(f"{what}; what was written before is intact; check the place, its rights and the space left, then {_go_on()}", 2)
    except Exception as error:
        if not hasattr(error, "exit_code"):
            raise
        _usage(error)


def _go_on() -> str:
    return f"go on with: {shlex.join(['raredistill', *sys.argv[1:]])}"


def _usage(error: Any) -> None:
    if type(error).__name__ == "NoArgsIsHelpError":
        print(error.format_message(), file=sys.stderr)
    elif hasattr(error, "format_message"):
        _stop(f"{error.format_message()} (see raredistill --help)", 2)
    sys.exit(error.exit_code)


def _stop(message: str, code: int) -> None:
    print(f"raredistill: {message}", file=sys.stderr)
    sys.exit(code)


@app.command()
def demo(out: Out = Path("out/demo"), patients: Annotated[int, typer.Option(help="generated patients")] = 40) -> None:
    """Run the main job end to end on a generated cohort, in a few minutes."""
    from importlib.resources import files

    raw = out / "raw"
    if not (raw / "name_mapping.csv").exists():
        _phantom(raw, patients, "nifti", (96, 96, 48), 0.35, 0, None)
    _study(Path(str(files("raredistill") / "demo.yaml")), out / "study", [f"cohort.path={raw}"])


@app.command()
def phantom(
    out: Annotated[Path, typer.Argument(help="folder to write")],
    patients: Annotated[int, typer.Option(help="how many")] = 24,
    layout: Annotated[Layout, typer.Option(help="hdf5 is the layout of the Kaggle archive")] = "nifti",
    size: Annotated[tuple[int, int, int], typer.Option(help="voxels; BraTS has 240 240 155")] = (120, 120, 78),
    rare_share: Annotated[float, typer.Option(help="share of LGG patients; BraTS2020 has 76 of 369")] = 76 / 369,
    seed: int = 0,
    workers: Workers = None,
) -> None:
    """Write a generated data set in BraTS2020's layout, for trying things out: it is not medical data."""
    _phantom(out, patients, layout, size, rare_share, seed, workers)
    _next(f"raredistill verify brats_{'hdf5' if layout == 'hdf5' else 'nifti'} {shlex.quote(str(out))}")


def _phantom(
    out: Path, patients: int, layout: Layout, size: tuple[int, int, int], rare_share: float, seed: int, workers: int | None
) -> None:
    from raredistill.console import Progress
    from raredistill.phantom import write_phantom

    with Progress("generated patients") as progress:
        write_phantom(
            out, patients=patients, layout=layout, size=size, rare_share=rare_share, seed=seed, workers=workers, progress=progress
        )


@app.command()
def verify(
    kind: Kind,
    path: RawPath,
    options: Options = None,
    workers: Workers = None,
    out: Annotated[Path | None, typer.Option("--out", help="write the table of problems too: a .csv or .json file")] = None,
    sheet: Annotated[Path, typer.Option(help="picture of near-copies, written only where there are some")] = Path("near-duplicates.png"),
) -> None:
    """Read a source once and list every problem with its cure; exit code 2 when there is an error."""
    from dataclasses import asdict

    from raredistill.cohort.sources.registry import open_source
    from raredistill.cohort.verify import examine, write_table
    from raredistill.console import Progress, show_table

    source = open_source(kind, path, **_options(options))
    with Progress(f"verified {source.counted}") as progress:
        found = examine(source, workers=workers, progress=progress)
    problems = found.problems
    show_table([{**asdict(problem), "file": _short(problem.file, path)} for problem in problems])
    show_table([{"left out because": skip.reason, "number": skip.count, "such as": ", ".join(skip.examples)} for skip in found.skipped])
    if out is not None:
        print(f"problems: {write_table(found, out)}")
    if len(found.copies.near):
        from raredistill.cohort.inspect import pair_sheet

        print(f"near-copies, side by side: {pair_sheet(found.copies, found.looks, sheet)}")
    counts = {level: sum(problem.level == level for problem in problems) for level in ("error", "warning", "note")}
    generated = "; generated data (phantom), not patients" if source.settings().get("generated") else ""
    unlabelled = f" ({found.unlabelled} without a label)" if found.unlabelled else ""
    print(f"{found.usable} usable {source.counted}, {found.samples} samples{unlabelled}; {_numbers(counts)}{generated}")
    print("seconds: " + ", ".join(f"{stage} {seconds:.1f}" for stage, seconds in found.seconds.items()))
    if counts["error"]:
        leave_out = all(problem.patient for problem in problems if problem.level == "error")
        cure = "mend them, or leave those patients out with prepare --leave-out-bad" if leave_out else "mend them"
        _stop(f"{_numbers({'error': counts['error']})} in {path}; {cure}", 2)
    _next(shlex.join(["raredistill", "prepare", kind, str(path), *(options or []), "--out", "cohort"]))


def _short(file: str, path: Path) -> str:
    """A file as the folder of the source sees it: rows stay short, and no name is cut."""
    inner = file.removeprefix(f"{path}/") if file != str(path) else file
    return inner or file


def _numbers(counts: dict[str, int]) -> str:
    return ", ".join(f"{count} {name}{'' if count == 1 else 's'}" for name, count in counts.items())


@app.command()
def prepare(
    kind: Kind,
    path: RawPath,
    options: Options = None,
    out: Out = Path("cohort"),
    size: Annotated[int, typer.Option(help="side of the square slices, in pixels")] = 224,
    workers: Workers = None,
    leave_out_bad: Annotated[
        bool, typer.Option("--leave-out-bad", help="go on without patients that cannot be read, and write down which")
    ] = False,
) -> None:
    """Turn raw data into one cohort on disk: decoded, checked, normalised and resized once."""
    from raredistill.cohort.prepare import prepare as make_cohort
    from raredistill.cohort.sources.registry import open_source
    from raredistill.console import Progress

    source = open_source(kind, path, **_options(options))
    with Progress(f"prepared {source.counted}") as progress:
        cohort = make_cohort(source, out, size=(size, size), workers=workers, leave_out_bad=leave_out_bad, progress=progress)
    _show_cohort(cohort)
    _next(f"raredistill inspect {shlex.quote(str(out))}")


def _show_cohort(cohort: Any) -> None:
    from raredistill.cohort.inspect import GENERATED, is_generated, rule_table
    from raredistill.console import records, show_table

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
    show_table(records(rule_table(cohort)), f"what the two label rules call the slices (used: {cohort.provenance['settings'].get('rule')})")
    if left_out := cohort.provenance["left_out"]:
        names = sorted({problem["patient"] for problem in left_out})
        print(f"left out, with the reasons in {cohort.root / 'cohort.json'}: {', '.join(names[:20])}{' ...' if len(names) > 20 else ''}")


@app.command()
def inspect(
    cohort: Annotated[Path, typer.Argument(help="a prepared cohort")],
    out: Annotated[Path | None, typer.Option(help="picture to write")] = None,
) -> None:
    """Show counts by class, patient and source, and write a contact sheet of slices by class."""
    from raredistill.cohort.inspect import GENERATED, contact_sheet, is_generated, patient_table, summary
    from raredistill.cohort.store import Cohort
    from raredistill.console import records, show_table

    loaded = Cohort.load(cohort)
    loaded.check_pixels()
    picture = out or cohort / "contact_sheet.png"
    contact_sheet(loaded, picture)
    title = f"{loaded.name}: {loaded.provenance.get('kind', '')}, {loaded.size[0]} x {loaded.size[1]}"
    show_table(records(summary(loaded)), title + (f"; {GENERATED}" if is_generated(loaded) else ""))
    patients = patient_table(loaded).reset_index()
    shown = patients.head(PATIENTS_SHOWN)
    if loaded.patients_known:
        show_table(records(shown), f"slices of each patient ({len(shown)} of {len(patients)})")
    else:
        print("no patient is known: each image is its own unit, and images of one patient may stand on both sides of a split")
    print(f"contact sheet: {picture}")
    _next(f"raredistill study CONFIG --out study cohort={shlex.quote(str(cohort))}")


@app.command()
def methods() -> None:
    """List distillers and losses: name, family, source, what they need, and for how many classes they are sound."""
    from raredistill.console import show_table
    from raredistill.distill.registry import methods_table
    from raredistill.losses import losses_table
    from raredistill.training.settings import choices_table

    show_table(methods_table(), "distillers (method:)")
    show_table(losses_table(), "losses (training.loss:)")
    show_table(choices_table(), "what goes with any of them")
    _next("raredistill study CONFIG runs.1.method=NAME")


@app.command()
def study(
    config: Annotated[Path, typer.Argument(help="YAML file of the study")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="settings to change, such as training.epochs=5", metavar="[KEY=VALUE]...")
    ] = None,
    out: Out = Path("study"),
    only: Annotated[
        str | None, typer.Option(help="one share of the runs, with the teachers they need: 0/4 to 3/4, as for a job array", metavar="I/N")
    ] = None,
    on: Annotated[Literal["ray"] | None, typer.Option(help="carry the runs out on a Ray cluster")] = None,
    address: Annotated[str | None, typer.Option(help="HOST:PORT of its head node; a Ray on this machine by default")] = None,
    gpus_per_run: Annotated[float | None, typer.Option(min=0.01, max=1, help="share of a GPU for each run on Ray; 1 by default")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="train nothing: measure a few steps, and tell time, memory and disk")] = False,
) -> None:
    """Train every run of a study that is not done yet, and write its report."""
    if dry_run and (on or address or gpus_per_run):
        raise RareDistillError("--dry-run measures this machine, not a cluster; leave out --on, --address and --gpus-per-run")
    if dry_run:
        _dry_run(config, out, overrides or [], only)
        return
    if on is None and (address is not None or gpus_per_run is not None):
        raise RareDistillError("--address and --gpus-per-run belong to a cluster; add --on ray")
    _study(config, out, overrides or [], only=only, on=on and _on_ray(address, gpus_per_run))


def _on_ray(address: str | None, gpus_per_run: float | None) -> Any:
    from raredistill.study.on_ray import OnRay

    return OnRay(address, 1.0 if gpus_per_run is None else gpus_per_run)


def _study(config_path: Path, out: Path, overrides: list[str], *, only: str | None = None, on: Any = None) -> None:
    from raredistill.config import load_config, make_study
    from raredistill.console import records, show_table
    from raredistill.study.plan import share_of
    from raredistill.study.run import HERE, elsewhere, left, run_study

    config = load_config(config_path, overrides)
    made = make_study(config, _cohort(config, out), shlex.join(["raredistill", *sys.argv[1:]]))
    chosen = made.plan() if only is None else share_of(made.plan(), *_share(only))
    show_table(records(made.overview()), "slices (patients) of each class")
    for run in elsewhere(made, out):
        print(f"another process works at {run}: this one takes the other runs, and waits for it at the end", file=sys.stderr)
    with on or nullcontext(HERE) as engine, StudyProgress(chosen) as watcher:
        runs = run_study(made, out, watcher, chosen=chosen, engine=engine)
    if waiting := left(out):
        _tell_remarks(runs)
        _tell_failures(runs)
        print(f"{len(waiting)} runs are left to other processes: {', '.join(waiting)}; whoever ends the last of them writes the report")
        _next(_same_study(config_path, out, overrides))
    else:
        _finish(out, runs)


def _dry_run(config_path: Path, out: Path, overrides: list[str], only: str | None) -> None:
    from raredistill.config import load_config, make_study
    from raredistill.console import Progress
    from raredistill.study.estimate import forecast
    from raredistill.study.plan import share_of

    made = make_study(load_config(config_path, overrides), _prepared(config_path, out, overrides), "")
    share = made.plan() if only is None else share_of(made.plan(), *_share(only))
    if not share:
        print(f"no run of this study's {len(made.plan())} falls into the share {only}")
        return
    chosen = [run for run in made.plan() if run in share]  # a share's own runs come first, before their teachers
    with Progress("kinds of runs measured") as progress:
        expected = forecast(chosen, made.cohort, out, progress)
    _show_forecast(expected, out)
    if problems := {each.problem: each.run.id for each in expected if each.problem}:
        _stop("; ".join(f"{run} does not fit on this machine: {problem}" for problem, run in problems.items()), 2)
    _next(_same_study(config_path, out, overrides) + (f" --only {only}" if only else ""))


def _prepared(config_path: Path, out: Path, overrides: list[str]) -> Any:
    from raredistill.cohort.store import DESCRIPTION, Cohort
    from raredistill.config import cohort_folder, load_config

    config = load_config(config_path, overrides)
    folder, raw = cohort_folder(config, out), config.cohort
    if isinstance(raw, Path) or (folder / DESCRIPTION).exists():
        return Cohort.load(folder)
    options = [f"{key}={value}" for key, value in raw.options.items()]
    prepare = shlex.join(["raredistill", "prepare", raw.source, str(raw.path), *options, "--size", str(raw.size), "--out", "cohort"])
    raise RareDistillError(
        f"the cohort of this study is not prepared yet, and a dry run writes nothing; prepare it with: {prepare}\n"
        f"then: {_same_study(config_path, out, [*overrides, 'cohort=cohort'])} --dry-run"
    )


def _same_study(config_path: Path, out: Path, overrides: list[str]) -> str:
    return shlex.join(["raredistill", "study", str(config_path), *overrides, "--out", str(out)])


def _show_forecast(expected: list[Forecast], out: Path) -> None:
    from raredistill.console import duration, show_table
    from raredistill.study.estimate import device_rows, disk_free, disk_needed, longest_chain, run_rows, size

    show_table(run_rows(expected), f"{len(expected)} runs in order; minutes that are left, at most where a run may stop early")
    show_table(device_rows(expected), "with more devices: GPUs, or machines like this one (processes on one CPU share its cores)")
    seconds, chain = longest_chain(expected)
    print(f"one device: about {duration(sum(each.seconds for each in expected))}")
    if seconds:
        print(f"any number of devices: at least {duration(seconds)}, for {' then '.join(chain)}")
    print(f"memory: {size(max(each.memory for each in expected))} for the largest run")
    print(f"disk: {size(disk_needed(expected))}, and {size(disk_free(out))} are free")


def _share(only: str) -> tuple[int, int]:
    number, sign, shares = only.partition("/")
    if not (sign and number.isdecimal() and shares.isdecimal() and int(number) < int(shares)):
        raise RareDistillError(
            f"--only {only}: write I/N with I from 0 to N - 1, such as 0/4; in a Slurm array of 4: $SLURM_ARRAY_TASK_ID/4"
        )
    return int(number), int(shares)


def _cohort(config: StudyConfig, out: Path) -> Any:
    from raredistill.cohort.prepare import prepare as make_cohort
    from raredistill.cohort.sources.registry import open_source
    from raredistill.cohort.store import Cohort
    from raredistill.config import cohort_folder
    from raredistill.console import Progress
    from raredistill.study.run import claim

    if isinstance(config.cohort, Path):
        return Cohort.load(config.cohort)
    raw = config.cohort
    source = open_source(raw.source, raw.path, **raw.options)
    claim(out)
    with Progress(f"prepared {source.counted}") as progress:
        return make_cohort(
            source, cohort_folder(config, out), size=(raw.size, raw.size), leave_out_bad=raw.leave_out_bad, progress=progress
        )


def _finish(out: Path, runs: list[dict[str, Any]]) -> None:
    from raredistill.console import records, show_table
    from raredistill.report import summary_table

    show_table(records(summary_table(out)), "test results, mean over folds and seeds")
    _tell_remarks(runs)
    _report(out)
    _tell_failures(runs)


def _tell_remarks(runs: list[dict[str, Any]]) -> None:
    remarks: dict[str, list[str]] = {}
    for record in runs:
        for remark in record.get("remarks", ()):
            remarks.setdefault(remark, []).append(record["id"])
    for remark, names in remarks.items():
        others = f" and {len(names) - 1} more" if len(names) > 1 else ""
        print(f"remark: {names[0]}{others}: {remark}", file=sys.stderr)
    caches = [record["teacher_cache"] for record in runs if record.get("teacher_cache")]
    if caches:
        computed, seconds = (sum(cache[key] for cache in caches) for key in ("computed", "seconds"))
        print(f"teacher cache: {computed} views were computed in {seconds:.1f} s, for {len(caches)} students", file=sys.stderr)


def _tell_failures(runs: list[dict[str, Any]]) -> None:
    failed = [record for record in runs if record["status"] == "failed"]
    for record in failed:
        print(f"failed: {record['id']}: {record['error']}", file=sys.stderr)
    if failed:
        _stop(f"{len(failed)} of {len(runs)} runs failed; the same command tries them again", 1)


class StudyProgress:
    """Progress over the runs of a study, in their epochs."""

    def __init__(self, runs: Sequence[Run]) -> None:
        from raredistill.console import Progress

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
        """A run begins to train, or begins again."""
        self.done -= self.at.get(run.id, 0)
        self.at[run.id] = 0

    def view_kept(self, run: Run, done: int, total: int) -> None:
        """Show how far the teacher cache is."""
        self.progress(self.done, self.total, f"{run.id.rsplit('-', 1)[0]} asks its teacher, view {done} of {total}")

    def epoch_done(self, run: Run, record: dict[str, Any]) -> None:
        """Count an epoch and show where the study is."""
        self.at[run.id] += 1
        self.done += 1
        score = record.get("validation", record["train"])["macro_f1"]
        self.progress(self.done, self.total, f"{run.id.rsplit('-', 1)[0]} macro F1 {score:.3f}")

    def run_done(self, run: Run, record: dict[str, Any], *, reused: bool) -> None:
        """Count the epochs that a finished run did not need."""
        left = run.entry.settings.epochs - self.at.get(run.id, 0)
        if reused:
            self.total -= left
        else:
            self.done += left


@app.command()
def predict(
    run: Annotated[Path, typer.Argument(help="a run's folder: STUDY/runs/NAME")],
    cohort: Annotated[Path, typer.Argument(help="a prepared cohort with the same classes and channels")],
    out: Annotated[Path, typer.Option("--out", help="Parquet file to write")] = Path("predictions.parquet"),
    checkpoint: Annotated[str, typer.Option(help="best or last")] = "best",
) -> None:
    """Apply a trained run to any cohort and write the table of logits."""
    from raredistill.cohort.store import Cohort
    from raredistill.study.predict import predict as apply

    table = apply(run, Cohort.load(cohort), out, which=checkpoint)
    print(f"{out}: {len(table)} samples of {table['patient'].nunique()} patients")
    _next(f"raredistill evaluate {shlex.quote(str(out))}")


@app.command()
def evaluate(
    predictions: Annotated[
        Path, typer.Argument(help="a predictions table (Parquet or CSV), also one made elsewhere, or a CSV of confusion matrices")
    ],
    rule: Annotated[Literal["mean", "max", "top5"], typer.Option(help="how slices make a patient")] = "mean",
    background: Annotated[str | None, typer.Option(help="class that no patient carries, in files made elsewhere, such as healthy")] = None,
) -> None:
    """Print metrics by slice and by patient for the test part of a predictions table."""
    from raredistill.console import records, show_table
    from raredistill.evaluation.levels import metrics_rows
    from raredistill.evaluation.published import is_published, published_tables
    from raredistill.predictions import read

    if is_published(predictions):
        tables, sentences = published_tables(predictions)
        for name, table in tables.items():
            show_table(records(table), name)
        print("\n".join(sentences))
        return
    for level, rows in metrics_rows(read(predictions, background=background), rule=rule).items():
        show_table(rows, level)


@app.command()
def report(
    study: Annotated[Path, typer.Argument(help="a study's folder, also an unfinished one")],
    sweep: Annotated[
        list[Path] | None, typer.Option(help="another study with the same entries and another imbalance (splits.rarefy); repeat for more")
    ] = None,
    across: Annotated[
        list[Path] | None, typer.Option(help="a study with the same entries on another data set; repeat for more (Wilcoxon's test)")
    ] = None,
) -> None:
    """Write a study's report: one self-contained HTML file, tables and figures."""
    _report(study, sweep or [], across or [])


def _report(study: Path, sweep: Sequence[Path] = (), across: Sequence[Path] = ()) -> None:
    from raredistill.console import Progress
    from raredistill.report import write_report

    with Progress("report") as progress:
        page = write_report(study, sweep=sweep, across=across, progress=progress)
    _next(f"open {page}")


@app.command()
def compare(
    sides: Annotated[
        list[Path],
        typer.Argument(
            help="control and other: two studies, runs or prediction files; several pairs, one a data set", metavar="A B [A B]..."
        ),
    ],
    metric: Annotated[str | None, typer.Option(help="one metric only: macro_f1, f1:LGG, recall:LGG, auprc:LGG ...")] = None,
    background: Annotated[str | None, typer.Option(help="class that no patient carries, in files made elsewhere, such as healthy")] = None,
) -> None:
    """Compare two sets of test predictions: differences (second minus first), intervals, and what can be said."""
    from raredistill.console import records, show_table
    from raredistill.report.versus import over_datasets, versus

    if len(sides) % 2:
        raise RareDistillError(f"{len(sides)} sides cannot be paired; name a control and another side for each comparison")
    gains = []
    for first, second in zip(sides[::2], sides[1::2], strict=True):
        found = versus(first, second, metric=metric, background=background)
        show_table(records(found.rows), f"{second} minus {first}")
        print("\n".join(found.sentences))
        gains.append(found.gain)
    if len(gains) > 1:
        print(over_datasets(gains))


def _options(pairs: list[str] | None) -> dict[str, Any]:
    from raredistill.files import parse_yaml

    found = {}
    for pair in pairs or []:
        key, sign, value = pair.partition("=")
        if not sign:
            raise RareDistillError(f"{pair}: write an option as key=value, such as rule=thesis")
        found[key] = parse_yaml(value, pair)
    return found


def _next(command: str) -> None:
    print(f"next: {command}")
