"""Functions for notebooks and the command line: run a study, distil once, predict, report, compare.

Heavy submodules are imported by the function that needs them.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

from raredistill.errors import ConfigError, DataError

if TYPE_CHECKING:
    import pandas as pd

    from raredistill.cohort.store import Cohort
    from raredistill.config import StudyConfig
    from raredistill.evaluation.looks import Looks
    from raredistill.reports.paper import VerdictFile
    from raredistill.reports.results import Results
    from raredistill.reports.versus import Versus
    from raredistill.runs.entry import External
    from raredistill.runs.record import RunRecord
    from raredistill.runs.run import Run
    from raredistill.runs.watcher import Watcher
    from raredistill.ship.export import Exported
    from raredistill.ship.predict import Predicted
    from raredistill.ship.refit import Refitted
    from raredistill.studies.estimate import Forecast
    from raredistill.studies.power import Plan
    from raredistill.studies.study import Engine, Study

Steps = Callable[..., None]
"""Called with the number of finished steps and of all steps."""


class Observer(Protocol):
    """Receives the progress of the functions in this module."""

    def steps(self, what: str) -> AbstractContextManager[Steps]:
        """Progress through ``what``."""

    def planned(self, study: Study, chosen: Sequence[Run], busy: Sequence[str]) -> None:
        """A study is about to carry out these runs; other processes are working on those in ``busy``."""

    def training(self, chosen: Sequence[Run]) -> AbstractContextManager[Watcher]:
        """Progress through the runs."""


class Quiet:
    """Shows nothing."""

    @contextmanager
    def steps(self, what: str) -> Iterator[Steps]:
        """Ignored."""
        yield lambda *done: None

    def planned(self, study: Study, chosen: Sequence[Run], busy: Sequence[str]) -> None:
        """Ignored."""

    @contextmanager
    def training(self, chosen: Sequence[Run]) -> Iterator[Watcher]:
        """Ignored."""
        from raredistill.runs.watcher import Unwatched

        yield Unwatched()


QUIET = Quiet()


@dataclass(frozen=True)
class Finished:
    """The result of a study.

    Attributes:
        folder: of the study.
        runs: records of the requested runs.
        waiting: ids of runs that other processes are still working on; the last process writes the report.
        page: the report; None while runs are waiting.
    """

    folder: Path
    runs: list[RunRecord]
    waiting: list[str] = field(default_factory=list)
    page: Path | None = None

    @property
    def failed(self) -> list[RunRecord]:
        """Records of the runs that failed."""
        return [record for record in self.runs if record.status == "failed"]

    def summary(self) -> pd.DataFrame:
        """One row per entry: the rare class and overall scores on test, means over runs."""
        from raredistill.reports import summary_table

        return summary_table(self.folder)

    def verdicts(self) -> list[str]:
        """One sentence per distilled entry: the conclusion that the evidence supports."""
        from raredistill.reports import verdict_sentences

        return verdict_sentences(self.folder)


def study(
    config: Path | str | Mapping[str, Any] | Study,
    out: Path | str = "study",
    *,
    overrides: Sequence[str] = (),
    only: tuple[int, int] | None = None,
    engine: Engine | None = None,
    command: str = "",
    observer: Observer = QUIET,
) -> Finished:
    """Train every run of a study that is not finished yet, and write its report.

    Args:
        config: a YAML file, its content, or a study created in Python.
        out: folder of the study; finished runs in it are reused, interrupted ones resume.
        overrides: ``key=value`` settings to change, such as ``training.epochs=5``.
        only: ``(i, n)``: the i-th of n shares of the runs, with the teachers they need.
        engine: carries out the runs; in this process by default.
        command: stored in the study's description.
        observer: receives the progress.

    Raises:
        ConfigError: a key, value or name is wrong, or two of them cannot be combined.
        DataError: the cohort cannot be read, or ``out`` contains something else.
        SplitError: the patients cannot be divided as requested.
    """
    out = Path(out)
    made = open_study(config, out, overrides=overrides, command=command, observer=observer)
    if made.looks is not None and only is not None:
        raise ConfigError("--only divides a plan that is known, and looks decide which runs follow; start the same command several times")
    from raredistill.studies.study import HERE, elsewhere, left, run_study  # torch, only once the configuration is known to be right

    chosen = share(made, only)
    observer.planned(made, chosen, elsewhere(made, out))
    connected: AbstractContextManager[Any] = engine if isinstance(engine, AbstractContextManager) else nullcontext(engine or HERE)
    with connected as opened:
        if made.looks is not None:
            return _study_by_looks(made, made.looks, out, opened, observer)
        with observer.training(chosen) as watcher:
            runs = run_study(made, out, watcher, chosen=chosen, engine=opened)
    if waiting := left(out):
        return Finished(out, runs, waiting)
    return Finished(out, runs, page=report(out, observer=observer))


def _study_by_looks(made: Study, rule: Looks, out: Path, engine: Engine, observer: Observer) -> Finished:
    """Add repeats until every pair is settled; no run is trained for a pair that is."""
    from raredistill.reports.looks import needed_by, take_look
    from raredistill.runs.layout import StudyFolder
    from raredistill.studies.looks import hold_rule, runs_of_look, write_states
    from raredistill.studies.study import claim, run_study

    claim(out)
    folder = StudyFolder(out)
    states, plan = hold_rule(folder, rule), made.plan()
    runs: dict[str, RunRecord] = {}
    pairs: dict[str, list[str]] = {}
    for place in range(len(rule.looks)):
        chosen = runs_of_look(plan, place, rule, states, pairs)
        with observer.training(chosen) as watcher:
            runs |= {record.id: record for record in run_study(made, out, watcher, chosen=chosen, engine=engine)}
        pairs = needed_by(out)
        states = take_look(out, rule, place, states)
        write_states(folder, rule, states)
        if all(name in states and states[name].outcome != "open" for name in pairs):
            break
    return Finished(out, list(runs.values()), page=report(out, observer=observer))


def open_study(
    config: Path | str | Mapping[str, Any] | Study,
    out: Path,
    *,
    overrides: Sequence[str] = (),
    command: str = "",
    observer: Observer = QUIET,
) -> Study:
    """Create a study from its configuration; if that names raw data, the cohort is prepared in ``out``.

    Raises:
        RareDistillError: as :func:`study`.
    """
    if not isinstance(config, Path | str | Mapping):
        return config
    checked = _config(config, overrides)  # before torch is imported: mistakes are reported at once
    from raredistill.config import make_study

    return make_study(checked, _cohort(checked, out, observer), command)


def share(made: Study, only: tuple[int, int] | None) -> list[Run]:
    """The runs of a study that fall into a share, with their teachers; all runs without a share."""
    from raredistill.studies.plan import share_of

    return made.plan() if only is None else share_of(made.plan(), *only)


def _config(config: Path | str | Mapping[str, Any], overrides: Sequence[str]) -> StudyConfig:
    from raredistill.config import check_config, load_config

    if isinstance(config, Mapping):
        if overrides:
            raise ConfigError("overrides change a file; change the mapping instead")
        return check_config(config, "study")
    return load_config(Path(config), overrides)


def _cohort(config: StudyConfig, out: Path, observer: Observer) -> Cohort:
    from raredistill.cohort.prepare import prepare as make_cohort
    from raredistill.cohort.sources.registry import open_source
    from raredistill.cohort.store import Cohort
    from raredistill.config import cohort_folder
    from raredistill.studies.study import claim

    if isinstance(config.cohort, Path):
        return Cohort.load(config.cohort)
    raw = config.cohort
    source = open_source(raw.source, raw.path, **raw.options)
    claim(out)
    with observer.steps(f"prepared {source.counted}") as progress:
        return make_cohort(
            source, cohort_folder(config, out), size=(raw.size, raw.size), leave_out_bad=raw.leave_out_bad, progress=progress
        )


def forecast(
    config: Path | str | Mapping[str, Any],
    out: Path | str = "study",
    *,
    overrides: Sequence[str] = (),
    only: tuple[int, int] | None = None,
    observer: Observer = QUIET,
) -> list[Forecast]:
    """Time, memory and disk of every run of a study on this machine, from a short measurement of each kind; nothing is trained.

    Raises:
        ConfigError: the study's cohort is not prepared yet, or as :func:`study`.
    """
    checked, out = _config(config, overrides), Path(out)  # before torch is imported: mistakes are reported at once
    from raredistill.config import make_study
    from raredistill.runs.layout import StudyFolder
    from raredistill.studies.estimate import forecast as measure_all

    made = make_study(checked, _prepared(checked, out), "")
    chosen = share(made, only)
    ordered = [run for run in made.plan() if run in chosen]  # a share lists its own runs before their teachers
    with observer.steps("kinds of runs measured") as progress:
        return measure_all(ordered, made.cohort, StudyFolder(out), progress) if ordered else []


def plan(
    config: Path | str | Mapping[str, Any],
    out: Path | str = "study",
    *,
    overrides: Sequence[str] = (),
    gain: float | None = None,
    runs: int | None = None,
    hours: float | None = None,
    observer: Observer = QUIET,
) -> Plan:
    """The power of a study: the gain that its repeats can detect, the repeats that a gain needs, or those that a time allows.

    Args:
        config: a YAML file, or its content.
        out: folder of the study; two finished repeats in it are its pilot, otherwise assumptions are stated.
        overrides: ``key=value`` settings to change.
        gain: a true gain in the rare class's F1 that should be found with 80 % power.
        runs: networks to train in all, in place of the configuration's repeats.
        hours: on this machine, in place of the configuration's repeats; a few steps are measured.
        observer: receives the progress.

    Raises:
        ConfigError: the cohort is not prepared yet, the protocol has no outer folds, or as :func:`study`.
    """
    from raredistill.config import make_study
    from raredistill.reports.pilot import design_of
    from raredistill.studies.power import repeats_within

    checked, out = _config(config, overrides), Path(out)
    made = make_study(checked, _prepared(checked, out), "")
    repeats = len({split.repeat for split in made.splits})
    if runs is not None:
        repeats = max(runs // max(len(made.plan()) // (repeats * len(made.seeds)), 1), 1)
    if hours is not None:
        measured = forecast(config, out, overrides=overrides, observer=observer)
        repeats = repeats_within(sum(each.seconds for each in measured if each.run.split.repeat == 0), hours)
    return design_of(made, out, repeats, gain)


def _prepared(config: StudyConfig, out: Path) -> Cohort:
    from raredistill.cohort.store import DESCRIPTION, Cohort
    from raredistill.config import cohort_folder

    folder, raw = cohort_folder(config, out), config.cohort
    if isinstance(raw, Path) or (folder / DESCRIPTION).exists():
        return Cohort.load(folder)
    options = [f"{key}={value}" for key, value in raw.options.items()]
    prepare = shlex.join(["raredistill", "prepare", raw.source, str(raw.path), *options, "--size", str(raw.size), "--out", "cohort"])
    raise ConfigError(
        f"the cohort of this study is not prepared yet, and a dry run writes nothing; prepare it with: {prepare}\n"
        "then run this command again with cohort=cohort"
    )


def distil(
    data: Any,
    *,
    teacher: Any,
    student: Any,
    method: Any = "kd",
    out: Path | str = "study",
    channels: Sequence[str] = (),
    folds: int = 5,
    repeats: int = 1,
    seeds: Sequence[int] = (0,),
    pretrained: bool | Path = False,
    size: int = 224,
    observer: Observer = QUIET,
    **training: Any,
) -> Finished:
    """Distil one student from one teacher on patient-grouped folds, and train the same student without a teacher.

    Args:
        data: a prepared cohort or its folder, a data frame with ``image``, ``label`` and ``patient``, or a PyTorch data set with a patient
            for each item; see :func:`raredistill.cohort.frame.cohort_of`.
        teacher: a network that is trained on each fold (a name, a module, or a function from channels to one), or an
            :class:`~raredistill.runs.entry.External` one.
        student: the network that learns, likewise.
        method: a distiller: its name, class or function.
        out: folder of the study.
        channels: of all networks; all of the cohort's by default.
        folds: of the outer cross-validation.
        repeats: repetitions of it with different folds; the verdict needs at least 2.
        seeds: one run per seed.
        pretrained: timm's weights, or those of a file, for all networks that are trained.
        size: side in pixels that images given by path are resized to.
        observer: receives the progress.
        training: training settings that differ from the defaults, such as ``epochs=30``.

    Raises:
        RareDistillError: as :func:`study`.
    """
    from raredistill.cohort.frame import cohort_of
    from raredistill.runs.entry import Entry, External
    from raredistill.splits import make_splits
    from raredistill.studies.study import Study, claim
    from raredistill.training.settings import Settings

    claim(Path(out))
    cohort = cohort_of(data, Path(out), size=size)
    shared: dict[str, Any] = {"channels": tuple(channels), "settings": Settings(**training), "pretrained": pretrained}
    outside = isinstance(teacher, External)
    entries = [] if outside else [Entry("teacher", teacher, **shared)]
    entries += [Entry("control", student, **shared)]
    entries += [Entry("student", student, **shared, teacher=teacher if outside else "teacher", method=method)]
    splits = make_splits(cohort, folds=folds, repeats=repeats)
    made = Study(f"{entries[-1].model} from a teacher", cohort, splits, entries, tuple(seeds), config={"cohort": str(cohort.root)})
    return study(made, out, observer=observer)


def teacher_from(
    module: Any,
    file: Path | str,
    *,
    classes: Sequence[str],
    channels: Sequence[str],
    mean: Sequence[float],
    std: Sequence[float],
    image_size: int,
    training_patients: Sequence[str] | None = None,
    external: bool = False,
    prior: Sequence[float] = (),
) -> External:
    """A teacher from a classifier trained elsewhere, given as a module; all its metadata must be stated.

    Args:
        module: from normalised images ``(N, C, H, W)`` to logits ``(N, K)``.
        file: checkpoint to write, ending in ``.safetensors``.
        classes: in the order of its logits.
        channels: in the order of its input.
        mean: of its normalisation, one value per channel, for images in [0, 1].
        std: likewise.
        image_size: side in pixels.
        training_patients: everyone whose images gave it gradients.
        external: whether it was trained on none of the cohort's patients; the report notes that this is your statement.
        prior: class shares that its logits carry, where they are known.

    Raises:
        ConfigError: neither its patients nor ``external`` is given.
        CheckpointError: the numbers of classes, channels and statistics do not fit.
    """
    from raredistill.runs.entry import External
    from raredistill.runs.external import save_module

    if training_patients is None and not external:
        raise ConfigError("teacher_from: name the training_patients of this teacher, or state external=True; otherwise it might leak")
    save_module(
        module, Path(file), classes=tuple(classes), channels=tuple(channels), mean=tuple(mean), std=tuple(std), image_size=image_size,
        training_patients=None if training_patients is None else tuple(training_patients), external=external, prior=tuple(prior) or None,
    )  # fmt: skip
    return External(Path(file), external=external)


def report(folder: Path | str, *, sweep: Sequence[Path] = (), across: Sequence[Path] = (), observer: Observer = QUIET) -> Path:
    """Write the report of a study: Grad-CAM maps (if weights and cohort exist), tables, figures and one HTML page.

    Args:
        folder: of the study, finished or not.
        sweep: studies with the same entries and a different imbalance in training.
        across: studies with the same entries on other data sets.
        observer: receives the progress.

    Returns:
        Path of the page.

    Raises:
        DataError: the folder is not a study's, or a finished run is damaged.
    """
    from raredistill.reports import write_report
    from raredistill.reports.results import read_results

    folder = Path(folder)
    with observer.steps("report") as progress:
        results = read_results(folder)
        _map_hardest(folder, results)
        return write_report(folder, results, sweep=sweep, across=across, progress=progress)


def answer(folder: Path | str) -> VerdictFile:
    """The answer that a study's report gives, for other programs: what ``report/verdicts.json`` holds.

    Raises:
        DataError: no report was written yet.
    """
    from raredistill.reports.paper import read_verdicts
    from raredistill.runs.layout import StudyFolder

    return read_verdicts(StudyFolder(Path(folder)).report)


def _map_hardest(folder: Path, results: Results) -> None:
    from raredistill.reports.maps import wanted_maps
    from raredistill.runs.layout import StudyFolder
    from raredistill.runs.maps import write_maps

    cohort = _cohort_of(folder, results.study.config.get("cohort"))
    if cohort is not None and (wanted := wanted_maps(results)):
        write_maps(StudyFolder(folder), cohort, results.study.rare, wanted)


def _cohort_of(folder: Path, named: Any) -> Cohort | None:
    from raredistill.cohort.store import DESCRIPTION, Cohort
    from raredistill.runs.layout import StudyFolder

    folders = [Path(named)] if isinstance(named, str) else StudyFolder(folder).cohorts()
    there = [each for each in folders if (each / DESCRIPTION).is_file()]
    return Cohort.load(there[-1]) if there else None


def compare(
    control: Path | str, other: Path | str, *, metric: str | None = None, background: str | None = None,
    groups: tuple[Path, str] | None = None,
) -> Versus:  # fmt: skip
    """Compare two runs, two studies or two prediction files; differences are ``other`` minus ``control``.

    Args:
        control: first side.
        other: second side.
        metric: one metric only.
        background: class that is not a patient's label, in files of other programs.
        groups: a CSV file with the column ``patient``, and the column by which gains are also reported, such as sex.

    Raises:
        ConfigError: unknown metric or class.
        DataError: a file cannot be read, the two sides do not match, or nothing can be tested.
    """
    from raredistill.reports.versus import versus

    return versus(Path(control), Path(other), metric=metric, background=background, groups=groups)


Layout = Literal["nifti", "hdf5", "both"]


def demo(out: Path | str, *, patients: int = 40, command: str = "", observer: Observer = QUIET) -> Finished:
    """Generate a small cohort and run the main job on it.

    Raises:
        DataError: ``out`` cannot be written.
    """
    from importlib.resources import files

    from raredistill.phantom import write_phantom

    raw = Path(out) / "raw"
    if not (raw / "name_mapping.csv").exists():
        with observer.steps("generated patients") as progress:
            write_phantom(raw, patients=patients, layout="nifti", size=(96, 96, 48), rare_share=0.35, seed=0, progress=progress)
    config = Path(str(files("raredistill") / "demo.yaml"))
    return study(config, Path(out) / "study", overrides=[f"cohort.path={raw}"], command=command, observer=observer)


def predict(
    model: Path | str,
    source: Path | str,
    out: Path | str,
    *,
    checkpoint: str = "best",
    sensitivity: float | None = None,
    augment: bool = False,
) -> Predicted:
    """Predict images, labelled or not, prepared exactly as the model's training cohort was, and write a table.

    Args:
        model: a run's folder, ``STUDY:ENTRY`` (refitted, else the mean of its folds), or an export.
        source: an image, a folder, a CSV, an ``.npz``, raw data of the training cohort's kind, or a prepared cohort.
        out: ``.csv``, ``.parquet`` or ``.json``; patients are written beside it.
        checkpoint: ``best`` or ``last``.
        sensitivity: wanted for the rare class.
        augment: average with the mirrored image.

    Raises:
        CheckpointError: the model is damaged, or the pixels were prepared in another way.
        DataError: the model or the images cannot be found or read.
    """
    from raredistill.ship.predict import predict as apply
    from raredistill.ship.predictor import Predictor

    return apply(Predictor(model, checkpoint=checkpoint, sensitivity=sensitivity, augment=augment), Path(source), Path(out))


def refit(folder: Path | str, entry: str, *, config: Study | None = None, observer: Observer = QUIET) -> Refitted:
    """Train the recipe of one entry once more on all patients, its teacher first, for as many epochs as the folds chose.

    Its expected performance is that of the study's out-of-fold predictions; temperature and threshold come from those of validation.

    Args:
        folder: of the finished study; the network goes to ``refit/ENTRY`` in it and is then meant by ``STUDY:ENTRY``.
        entry: name of the chosen one.
        config: the study, where it was put together in Python.
        observer: receives the progress.

    Raises:
        ConfigError: no such entry, or the study was put together in Python and is not given.
        DataError: the study is not finished, or its cohort is gone.
    """
    from raredistill.config import check_config, make_study
    from raredistill.runs.layout import StudyFolder
    from raredistill.runs.record import read_study
    from raredistill.ship import refit as ship

    place = StudyFolder(Path(folder))
    told = read_study(place.description).config
    if config is None and "runs" not in told:
        raise ConfigError(f"{folder}: the study was put together in Python; call raredistill.refit(folder, entry, config=study)")
    made = config or make_study(check_config(told, str(place.description)), _study_cohort(place.path), "")
    planned = ship.plan_refit(made, place, entry)
    with observer.training(planned.plan()) as watcher:
        return ship.refit(planned, place, entry, watcher)


def export(
    model: Path | str,
    out: Path | str,
    *,
    checkpoint: str = "best",
    sensitivity: float = 0.9,
    formats: Sequence[str] = ("fp16", "int8"),
) -> Exported:
    """Write a model that runs without raredistill: ONNX, safetensors, description and card, each file compared with the network.

    Args:
        model: a run, or ``STUDY:ENTRY`` after ``raredistill refit``.
        out: folder to write; new or empty.
        checkpoint: ``best`` or ``last``.
        sensitivity: wanted for the rare class.
        formats: besides single precision.

    Raises:
        ConfigError: the model is not one network, or the extra ``export`` is not installed.
        DataError: the study, its cohort or the model cannot be read, or ``out`` holds something.
        CheckpointError: a format does not agree with the network.
    """
    from raredistill.ship.export import export as write
    from raredistill.ship.find import find

    found = find(model)
    return write(found, _study_cohort(found.path), Path(out), checkpoint=checkpoint, sensitivity=sensitivity, extra=formats)


def _study_cohort(folder: Path) -> Cohort:
    from raredistill.runs.layout import StudyFolder
    from raredistill.runs.record import read_study

    named = read_study(StudyFolder(folder).description).config.get("cohort")
    if (cohort := _cohort_of(folder, named)) is None:
        raise DataError(f"{folder}: the study's cohort is no longer there ({named}); prepare it again")
    return cohort
