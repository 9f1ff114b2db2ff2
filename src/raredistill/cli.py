"""The commands of the command line: each parses its arguments, calls one function and prints."""

from __future__ import annotations

import shlex
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from raredistill.console import said  # at once: when memory has run out it is too late to import
from raredistill.errors import RareDistillError

if TYPE_CHECKING:
    from raredistill.api import Finished
    from raredistill.studies.estimate import Forecast

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


def _load(plugins: list[str] | None) -> list[str] | None:
    from raredistill.plugins import load

    for plugin in plugins or []:
        load(plugin)
    return plugins


Plugins = Annotated[
    list[str] | None,
    typer.Option(
        "--plugin",
        help="a file or module that registers distillers, losses, networks, sources or augmentations; repeatable",
        metavar="FILE_OR_MODULE",
        callback=_load,
    ),
]
PATIENTS_SHOWN = 12


def main() -> None:
    """Run the command line. Exit codes: 0 success; 1 finished, but runs failed; 2 bad input; 130 and 143 interrupted, can be resumed."""
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(TERMINATED))
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]  # a path may contain bytes that are not UTF-8
    try:
        if app(standalone_mode=False) == INTERRUPTED:  # what typer makes of Ctrl-C
            _stop(f"interrupted; {_resume()}", INTERRUPTED)
    except RareDistillError as error:
        _stop(str(error), 2)
    except (typer.Abort, KeyboardInterrupt):
        _stop(f"interrupted; {_resume()}", INTERRUPTED)
    except SystemExit as stop:
        if stop.code == TERMINATED:
            _stop(f"terminated; {_resume()}", TERMINATED)
        raise
    except (OSError, ImportError, MemoryError) as error:
        _stop(f"{_hindrance(error)}, then {_resume()}", 2)
    except Exception as error:
        if not hasattr(error, "exit_code"):
            raise
        _usage(error)


def _command() -> str:
    return shlex.join(["raredistill", *sys.argv[1:]])


def _hindrance(error: OSError | ImportError | MemoryError) -> str:
    """Message on what the machine refused, and what to check."""
    if isinstance(error, OSError):
        what = f"{error.filename or 'a file'}: {error.strerror or error}"
        return f"{what}; what was written before is intact; check the place, its rights and the space left"
    what = f"a library cannot be loaded ({error})" if isinstance(error, ImportError) else "the memory of this process is used up"
    return f"{what}; free memory or raise its limit (ulimit -v), or install raredistill again"


def _resume() -> str:
    return f"resume with: {_command()}"


def _usage(error: Any) -> None:
    if type(error).__name__ == "NoArgsIsHelpError":
        print(error.format_message(), file=sys.stderr)
    elif hasattr(error, "format_message"):
        _stop(f"{error.format_message()} (see raredistill --help)", 2)
    sys.exit(error.exit_code)


def _stop(message: str, code: int) -> None:
    print(f"raredistill: {said(message)}", file=sys.stderr)
    sys.exit(code)


@app.command()
def demo(out: Out = Path("out/demo"), patients: Annotated[int, typer.Option(help="number of generated patients")] = 40) -> None:
    """Run the main job end to end on a generated cohort, in a few minutes."""
    from raredistill import api
    from raredistill.terminal import Terminal

    _finish(api.demo(out, patients=patients, command=_command(), observer=Terminal()), _command())


@app.command()
def phantom(
    out: Annotated[Path, typer.Argument(help="folder to write")],
    patients: Annotated[int, typer.Option(help="number of patients")] = 24,
    layout: Annotated[Layout, typer.Option(help="hdf5 is the layout of the Kaggle archive")] = "nifti",
    size: Annotated[tuple[int, int, int], typer.Option(help="voxels; BraTS has 240 240 155")] = (120, 120, 78),
    rare_share: Annotated[float, typer.Option(help="share of LGG patients; BraTS2020 has 76 of 369")] = 76 / 369,
    seed: int = 0,
    workers: Workers = None,
) -> None:
    """Write a generated data set in BraTS2020's layout, to try things out: it is not medical data."""
    from raredistill.console import Progress
    from raredistill.phantom import write_phantom

    with Progress("generated patients") as progress:
        write_phantom(
            out, patients=patients, layout=layout, size=size, rare_share=rare_share, seed=seed, workers=workers, progress=progress
        )
    _next(f"raredistill verify brats_{'hdf5' if layout == 'hdf5' else 'nifti'} {shlex.quote(str(out))}")


@app.command()
def verify(
    kind: Kind,
    path: RawPath,
    options: Options = None,
    workers: Workers = None,
    out: Annotated[Path | None, typer.Option("--out", help="write the table of problems too: a .csv or .json file")] = None,
    sheet: Annotated[Path, typer.Option(help="picture of near-copies, written only where there are some")] = Path("near-duplicates.png"),
    plugin: Plugins = None,
) -> None:
    """Read a source once and list every problem with its remedy; the exit code is 2 if there is an error."""
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
        cure = "fix them, or leave those patients out with prepare --leave-out-bad" if leave_out else "fix them"
        _stop(f"{_numbers({'error': counts['error']})} in {path}; {cure}", 2)
    _next(shlex.join(["raredistill", "prepare", kind, str(path), *(options or []), "--out", "cohort"]))


def _short(file: str, path: Path) -> str:
    """A file's path relative to the source's folder, to keep rows short."""
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
    leave_out_bad: Annotated[bool, typer.Option("--leave-out-bad", help="leave out patients that cannot be read, and record them")] = False,
    plugin: Plugins = None,
) -> None:
    """Prepare raw data as a cohort on disk: decoded, checked, normalised and resized once."""
    from raredistill.cohort.prepare import prepare as make_cohort
    from raredistill.cohort.sources.registry import open_source
    from raredistill.console import Progress
    from raredistill.terminal import show_cohort

    source = open_source(kind, path, **_options(options))
    with Progress(f"prepared {source.counted}") as progress:
        cohort = make_cohort(source, out, size=(size, size), workers=workers, leave_out_bad=leave_out_bad, progress=progress)
    show_cohort(cohort)
    _next(f"raredistill inspect {shlex.quote(str(out))}")


@app.command()
def inspect(
    cohort: Annotated[Path, typer.Argument(help="a prepared cohort")],
    out: Annotated[Path | None, typer.Option(help="image file to write")] = None,
) -> None:
    """Show counts by class, patient and source, and write a contact sheet of images by class."""
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
def methods(plugin: Plugins = None) -> None:
    """List distillers and losses: name, family, source, requirements, and the number of classes they are valid for."""
    from raredistill.console import show_table
    from raredistill.distill.registry import methods_table
    from raredistill.losses import losses_table
    from raredistill.plugins import plugins_table
    from raredistill.training.settings import choices_table

    show_table(methods_table(), "distillers (method:)")
    show_table(losses_table(), "losses (training.loss:)")
    show_table(choices_table(), "settings that can be combined with any of them")
    show_table(plugins_table(), "plug-ins")
    _next("raredistill study CONFIG runs.1.method=NAME")


@app.command()
def check(
    plugin: Annotated[str, typer.Argument(help="the file or module of a plug-in", metavar="FILE_OR_MODULE")],
    data: Annotated[Path | None, typer.Option(help="raw data on which its sources are tried")] = None,
) -> None:
    """Run a plug-in's distillers, losses, networks, sources and augmentations through the conformance suite."""
    from raredistill import plugins
    from raredistill.testing import check_plugin

    plugins.load(plugin)
    registered = plugins.registered()
    failures = [failure for each in registered for failure in check_plugin(each, data)]
    for failure in failures:
        print(f"{failure.subject}: {failure.check}\n  not so: {failure.problem}")
    if failures:
        _stop(f"{len(failures)} promises are not kept; mend them, then run the same command again", 2)
    names = ", ".join(f"{each.kind} {each.name}" for each in registered)
    untried = " (a source is tried on data: add --data DIR)" if data is None and any(each.kind == "source" for each in registered) else ""
    print(f"{names}: keeps every promise{untried}")
    _next(f"raredistill study CONFIG --plugin {shlex.quote(plugin)}")


@app.command()
def study(
    config: Annotated[Path, typer.Argument(help="YAML file of the study")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="settings to change, such as training.epochs=5", metavar="[KEY=VALUE]...")
    ] = None,
    out: Out = Path("study"),
    only: Annotated[
        str | None, typer.Option(help="one share of the runs, with the teachers they need: 0/4 to 3/4, as in a job array", metavar="I/N")
    ] = None,
    on: Annotated[Literal["ray"] | None, typer.Option(help="run on a Ray cluster")] = None,
    address: Annotated[str | None, typer.Option(help="HOST:PORT of its head node; by default, Ray is started on this machine")] = None,
    gpus_per_run: Annotated[float | None, typer.Option(min=0.01, max=1, help="share of a GPU for each run on Ray; 1 by default")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="train nothing: measure a few steps, forecast time, memory and disk")] = False,
    plugin: Plugins = None,
) -> None:
    """Train every run of a study that is not finished yet, and write its report."""
    from raredistill import api
    from raredistill.terminal import Terminal

    again = shlex.join(["raredistill", "study", str(config), *(overrides or []), "--out", str(out)])
    asked: dict[str, Any] = {"overrides": overrides or [], "only": None if only is None else _share(only), "observer": Terminal()}
    if dry_run and (on or address or gpus_per_run):
        raise RareDistillError("--dry-run measures this machine, not a cluster; leave out --on, --address and --gpus-per-run")
    if on is None and (address is not None or gpus_per_run is not None):
        raise RareDistillError("--address and --gpus-per-run are for a cluster; add --on ray")
    if dry_run:
        expected = api.forecast(config, out, **asked)
        _show_power(config, out, overrides or [])
        _show_forecast(expected, out, again, only)
    else:
        engine = None if on is None else _on_ray(address, gpus_per_run)
        _finish(api.study(config, out, engine=engine, command=_command(), **asked), again)


@app.command()
def plan(
    config: Annotated[Path, typer.Argument(help="YAML file of the study")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="settings to change, such as splits.repeats=5", metavar="[KEY=VALUE]...")
    ] = None,
    out: Out = Path("study"),
    gain: Annotated[float | None, typer.Option(min=0.001, max=1, help="a true gain in the rare class's F1 that should be found")] = None,
    runs: Annotated[int | None, typer.Option(min=1, help="networks to train in all")] = None,
    hours: Annotated[float | None, typer.Option(min=0.01, help="time on this machine; a few steps are measured")] = None,
) -> None:
    """Report what a study could show before it is run: detectable gains, the floor, the repeats that a gain needs."""
    from raredistill import api
    from raredistill.terminal import Terminal, show_plan

    if sum(each is not None for each in (gain, runs, hours)) > 1:
        raise RareDistillError("--gain, --runs and --hours are three questions; ask one at a time")
    show_plan(api.plan(config, out, overrides=overrides or [], gain=gain, runs=runs, hours=hours, observer=Terminal()))


def _on_ray(address: str | None, gpus_per_run: float | None) -> Any:
    from raredistill.studies.on_ray import OnRay

    return OnRay(address, 1.0 if gpus_per_run is None else gpus_per_run)


def _show_forecast(expected: list[Forecast], out: Path, again: str, only: str | None) -> None:
    from raredistill.terminal import show_forecast

    if not expected:
        print(f"no run of this study is in the share {only}")
        return
    show_forecast(expected, out)
    if problems := {each.problem: each.run.id for each in expected if each.problem}:
        _stop("; ".join(f"{run} does not fit on this machine: {problem}" for problem, run in problems.items()), 2)
    _next(again + (f" --only {only}" if only else ""))


def _show_power(config: Path, out: Path, overrides: list[str]) -> None:
    from raredistill import api
    from raredistill.errors import ConfigError

    try:
        print("\n".join(api.plan(config, out, overrides=overrides).sentences))
    except ConfigError as error:
        print(f"What it could detect is not known: {error}")


def _finish(found: Finished, again: str) -> None:
    from raredistill.terminal import show_finished

    show_finished(found)
    if found.waiting:
        print(
            f"{len(found.waiting)} runs are still being done by other processes: {', '.join(found.waiting)}; "
            "the process that finishes the last of them writes the report"
        )
    _next(again if found.waiting else f"open {found.page}")
    if found.failed:
        _stop(f"{len(found.failed)} of {len(found.runs)} runs failed; the same command tries them again", 1)


def _share(only: str) -> tuple[int, int]:
    number, sign, shares = only.partition("/")
    if not (sign and number.isdecimal() and shares.isdecimal() and int(number) < int(shares)):
        raise RareDistillError(
            f"--only {only}: write I/N with I from 0 to N - 1, such as 0/4; in a Slurm array of 4: $SLURM_ARRAY_TASK_ID/4"
        )
    return int(number), int(shares)


@app.command()
def evaluate(
    predictions: Annotated[
        Path, typer.Argument(help="a run, a predictions table (Parquet or CSV), also from another program, or a CSV of confusion matrices")
    ],
    rule: Annotated[Literal["mean", "max", "top5"], typer.Option(help="how the scores of a patient's images are combined")] = "mean",
    background: Annotated[str | None, typer.Option(help="class that is not a patient's label, such as healthy, in foreign files")] = None,
    split: Annotated[Literal["test", "validation", "train"], typer.Option(help="part of the table")] = "test",
) -> None:
    """Print metrics by slice and by patient for one part of a predictions table: by default patients whom the model has not seen."""
    from raredistill.console import records, show_table
    from raredistill.evaluation.levels import metrics_rows
    from raredistill.evaluation.published import is_published, published_tables
    from raredistill.predictions import read
    from raredistill.runs.layout import RunFolder

    predictions = RunFolder(predictions).predictions if RunFolder(predictions).record.is_file() else predictions
    if is_published(predictions):
        tables, sentences = published_tables(predictions)
        for name, table in tables.items():
            show_table(records(table), name)
        print("\n".join(sentences))
        return
    whole = read(predictions, background=background)
    others = whole.table[whole.table["split"] != split]
    for part, rows in others.groupby("split"):
        print(f"left out: {len(rows)} rows of {rows['patient'].nunique()} patients with split={part}")
    for level, metrics in metrics_rows(whole, split=split, rule=rule).items():
        show_table(metrics, level)


@app.command()
def report(
    study: Annotated[Path, typer.Argument(help="folder of a study, finished or not")],
    sweep: Annotated[
        list[Path] | None, typer.Option(help="a study with the same entries and a different imbalance (splits.rarefy); repeatable")
    ] = None,
    across: Annotated[
        list[Path] | None, typer.Option(help="a study with the same entries on another data set (for Wilcoxon's test); repeatable")
    ] = None,
    show: Annotated[bool, typer.Option("--open", help="open the page in the browser")] = False,
) -> None:
    """Write a study's report: one self-contained HTML file, tables and figures."""
    from raredistill import api
    from raredistill.terminal import Terminal, show_answer

    page = api.report(study, sweep=sweep or [], across=across or [], observer=Terminal())
    show_answer(page)
    if not show:
        _next(f"open {page}")
    elif typer.launch(page.resolve().as_uri()):
        print("no browser could be started here; open the page yourself", file=sys.stderr)


@app.command()
def compare(
    sides: Annotated[
        list[Path],
        typer.Argument(
            help="control and other: two studies, runs or prediction files; several pairs, one per data set", metavar="A B [A B]..."
        ),
    ],
    metric: Annotated[str | None, typer.Option(help="one metric only: macro_f1, f1:LGG, recall:LGG, auprc:LGG ...")] = None,
    background: Annotated[str | None, typer.Option(help="class that is not a patient's label, such as healthy, in foreign files")] = None,
    groups: Annotated[Path | None, typer.Option(help="CSV with a column patient, for gains by group")] = None,
    by: Annotated[str | None, typer.Option(help="its column of groups, such as sex, age, site or scanner")] = None,
) -> None:
    """Compare two sets of test predictions: differences (second minus first), intervals, and conclusions."""
    from raredistill import api
    from raredistill.console import records, show_table
    from raredistill.reports.versus import over_datasets

    if len(sides) % 2:
        raise RareDistillError(f"{len(sides)} sides cannot be paired; give a control and another side for each comparison")
    if (groups is None) != (by is None):
        raise RareDistillError("--groups names a file and --by its column; give both")
    grouped = None if groups is None or by is None else (groups, by)
    gains = []
    for first, second in zip(sides[::2], sides[1::2], strict=True):
        found = api.compare(first, second, metric=metric, background=background, groups=grouped)
        show_table(records(found.rows), f"{second} minus {first}")
        if len(found.groups):
            show_table(records(found.groups), f"by {by}; p is not adjusted")
        print("\n".join(found.sentences))
        gains.append(found.gain)
    if len(gains) > 1:
        print(over_datasets(gains))


@app.command()
def predict(
    model: Annotated[str, typer.Argument(help="a run's folder, STUDY:ENTRY, STUDY/runs/NAME without its hash, or an export")],
    source: Annotated[Path, typer.Argument(metavar="INPUT", help="an image, a folder, a CSV, an .npz, raw data, or a prepared cohort")],
    out: Annotated[Path, typer.Option("--out", help=".csv, .parquet or .json")] = Path("predictions.parquet"),
    checkpoint: Annotated[Literal["best", "last"], typer.Option(help="of the runs")] = "best",
    sensitivity: Annotated[float | None, typer.Option(help="wanted for the rare class; 0.9 by default")] = None,
    augment: Annotated[bool, typer.Option("--augment", help="average with the mirrored image")] = False,
    plugin: Plugins = None,
) -> None:
    """Predict images with or without labels: class, calibrated probabilities and decision, by slice and by patient."""
    from raredistill import api

    found = api.predict(model, source, out, checkpoint=checkpoint, sensitivity=sensitivity, augment=augment)
    print("\n".join(found.sentences()))
    print(f"{out}: {len(found.samples)} samples of {found.samples['patient'].nunique()} patients")
    labelled = (found.samples["label"] != "").all() and out.suffix.lower() != ".json"
    _next(f"raredistill evaluate {shlex.quote(str(out))}" if labelled else f"open {out}")


@app.command()
def refit(
    study: Annotated[Path, typer.Argument(help="folder of a finished study")],
    entry: Annotated[str, typer.Argument(help="name of the chosen run")],
    plugin: Plugins = None,
) -> None:
    """Train a chosen recipe once more on all patients, its teacher first, for as many epochs as the folds chose."""
    from raredistill import api
    from raredistill.console import show_table
    from raredistill.terminal import Terminal

    made = api.refit(study, entry, observer=Terminal())
    print("epochs, the median of the folds: " + ", ".join(f"{name} {epochs}" for name, epochs in made.epochs.items()))
    show_table(made.expected, "expected performance: the study's out-of-fold predictions, 95 % intervals over patients")
    _next(f"raredistill export {shlex.quote(f'{study}:{entry}')} --out {shlex.quote(entry)}")


@app.command()
def export(
    model: Annotated[str, typer.Argument(help="a run's folder, or STUDY:ENTRY after raredistill refit")] = "",
    out: Out = Path("export"),
    checkpoint: Annotated[Literal["best", "last"], typer.Option(help="of the run")] = "best",
    sensitivity: Annotated[float, typer.Option(help="wanted for the rare class")] = 0.9,
    single: Annotated[bool, typer.Option("--single", help="single precision only: no fp16, no int8")] = False,
    check: Annotated[Path | None, typer.Option(help="an export to run here with onnxruntime alone", metavar="DIR")] = None,
    plugin: Plugins = None,
) -> None:
    """Write a model that runs without raredistill: ONNX, weights, description and card; or check one."""
    if check is not None:
        from raredistill.ship.bundle import check as repeat

        done = repeat(check)
        print(f"{check}: {done.samples} images, logits differ by at most {done.difference:.2g}")
        return
    if not model:
        raise RareDistillError("name a model, or an export to check with --check DIR")
    from raredistill import api
    from raredistill.console import show_table

    made = api.export(model, out, checkpoint=checkpoint, sensitivity=sensitivity, formats=() if single else ("fp16", "int8"))
    rows = [{"file": each.file, "bytes": each.bytes, "difference": each.difference, "ms": each.milliseconds} for each in made.formats]
    show_table(rows, f"{made.said}; compared on {made.samples} validation samples")
    _next(f"raredistill predict {shlex.quote(str(out))} IMAGES --out predictions.csv")


@app.command()
def init(
    cohort: Annotated[Path, typer.Argument(help="a prepared cohort")],
    out: Annotated[Path, typer.Option("--out", help="YAML file to write")] = Path("study.yaml"),
) -> None:
    """Write a commented first study with networks, folds and epochs for a cohort and this machine."""
    from raredistill.cohort.store import Cohort
    from raredistill.ship.start import RECALL, write_start

    made = write_start(Cohort.load(cohort), out)
    print(
        f"{out}: the rare class is {made.rare} with {made.patients} patients: a recall of {RECALL} is then known to about "
        f"+/- {made.precision:.2f} (95 %), so much smaller differences will not be seen"
    )
    _next(f"raredistill plan {shlex.quote(str(out))}")


@app.command()
def settings(
    key: Annotated[str, typer.Argument(help="one key, such as training.epochs or epochs; all by default")] = "", plugin: Plugins = None
) -> None:
    """List the settings of a study: key, type, default and meaning."""
    from raredistill.reference import all_keys, find_keys

    for found in find_keys(key) if key else all_keys():
        print(f"{found.key}: {found.type}{f' = {found.default}' if found.default else ''}\n    {found.meaning}")


@app.callback(invoke_without_command=True)
def _version(
    version: Annotated[bool, typer.Option("--version", help="print the version", is_eager=True)] = False,
) -> None:
    if version:
        from importlib.metadata import version as installed

        print(f"raredistill {installed('raredistill')}")
        raise typer.Exit


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
