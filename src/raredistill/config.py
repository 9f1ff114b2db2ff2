"""The configuration of a study: one YAML file and ``key=value``; all mistakes are reported together.

Keys and values are checked before torch is imported; the rules themselves belong to ``Entry``, ``Settings`` and ``Study``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from annotated_types import Ge, Gt, Interval, MinLen
from pydantic import BaseModel, ConfigDict, ValidationError

from raredistill.declared import Name, field_mistakes, mistakes, read
from raredistill.errors import ConfigError
from raredistill.files import fingerprint, parse_yaml
from raredistill.limits import LARGEST_SEED, MOST_REPEATS
from raredistill.runs.entry import Channels, Entry
from raredistill.training.settings import Settings

if TYPE_CHECKING:
    from raredistill.cohort.store import Cohort
    from raredistill.evaluation.looks import Looks
    from raredistill.studies.study import Study

Seed = Annotated[int, Interval(ge=0, le=LARGEST_SEED)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, coerce_numbers_to_str=True)  # classes may be called 0 and 1


class SourceConfig(_Strict):
    """Raw data that the study prepares into ``OUT/cohort`` first."""

    source: str
    path: Path
    size: Annotated[int, Interval(ge=8, le=1024)] = 224
    options: dict[str, Any] = {}
    leave_out_bad: bool = False


class SplitConfig(_Strict):
    """Division of patients; see ``raredistill.splits.make_splits``."""

    protocol: Literal["outer", "holdout", "given"] = "outer"
    folds: Annotated[int, Ge(2)] = 5
    repeats: Annotated[int, Interval(ge=1, le=MOST_REPEATS)] = 3
    validation_share: Annotated[float, Interval(gt=0, lt=1)] = 0.2
    test_share: Annotated[float, Interval(gt=0, lt=1)] = 0.3
    seed: Seed = 0
    rarefy: dict[str, Annotated[float, Interval(gt=0, le=1)]] = {}
    truncate_validation: bool = False


class EvidenceConfig(_Strict):
    """Rules that decide pairs, fixed before the first run; see ``raredistill.evaluation.looks.Looks``. Without looks, all repeats run."""

    margin: Annotated[float, Gt(0)] | None = None
    wanted: Annotated[float, Gt(0)] | None = None
    looks: tuple[int, ...] = ()
    alpha: tuple[float, ...] = ()


class StudyConfig(_Strict):
    """A study as written in YAML: data, splits, training settings, and a grid of runs.

    Each of ``runs`` has the keys of :class:`~raredistill.runs.entry.Entry`, with ``training`` for the settings that differ from the
    study's.
    """

    name: Name
    cohort: Path | SourceConfig
    channels: Channels = ()
    splits: SplitConfig = SplitConfig()
    seeds: Annotated[tuple[Seed, ...], MinLen(1)] = (0,)
    evidence: EvidenceConfig = EvidenceConfig()
    training: dict[str, Any] = {}
    runs: Annotated[tuple[dict[str, Any], ...], MinLen(1)]


def load_config(path: Path, overrides: Sequence[str] = ()) -> StudyConfig:
    """Read a study's YAML and apply ``key=value`` overrides such as ``training.epochs=5`` or ``runs.0.model=resnet50``.

    Raises:
        ConfigError: the file cannot be read, or keys or values are wrong; every mistake is listed.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such configuration file") from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: cannot be read as text: {error}") from None
    raw = parse_yaml(text, str(path))
    if not isinstance(raw, dict):
        raise ConfigError(f"{path}: a study is a mapping of keys such as name, cohort and runs")
    for override in overrides:
        _override(raw, override)
    return check_config(raw, str(path))


def _override(raw: dict[str, Any], override: str) -> None:
    key, sign, text = override.partition("=")
    if not sign:
        raise ConfigError(f"{override}: write an override as key=value, for instance training.epochs=5")
    *parents, last = key.split(".")
    place: Any = raw
    try:
        for parent in parents:
            place = place[int(parent)] if isinstance(place, list) else place.setdefault(parent, {})
        place[int(last) if isinstance(place, list) else last] = parse_yaml(text, override)
    except (ValueError, IndexError, AttributeError, TypeError):
        raise ConfigError(f"{override}: the configuration has no key {key}; lists are counted from 0, as in runs.0.model") from None


def check_config(raw: Mapping[str, Any], name: str) -> StudyConfig:
    """Check the keys and values of a study; ``name`` is for messages.

    Raises:
        ConfigError: lists every mistake.
    """
    found: list[str] = []
    try:
        config = StudyConfig.model_validate(raw)
    except ValidationError as error:
        found += mistakes(error, StudyConfig)
    found += _mistakes_of_training("training.", raw.get("training"))
    for number, run in enumerate(raw["runs"] if isinstance(raw.get("runs"), list | tuple) else []):
        if isinstance(run, Mapping):
            found += _mistakes_of_run(f"runs.{number}.", run)
    if found:
        raise ConfigError(f"{name}:\n" + "\n".join(f"  - {mistake}" for mistake in found))
    return config


def _mistakes_of_run(where: str, run: Mapping[str, Any]) -> list[str]:
    if "settings" in run:
        return [f"{where}settings: unknown key; did you mean training?"]
    training = run.get("training", {})
    if not isinstance(training, Mapping):
        return [f"{where}training: input should be a valid dictionary (it is {training!r:.60})"]
    own = {key: value for key, value in run.items() if key != "training"}
    return field_mistakes(Entry, own, where) + _mistakes_of_training(f"{where}training.", training)


def _mistakes_of_training(where: str, training: Any) -> list[str]:
    return field_mistakes(Settings, training, where) if isinstance(training, Mapping) else []


def entries_of(config: StudyConfig) -> list[Entry]:
    """The entries of the grid, each with the study's channels and settings as defaults.

    Raises:
        ConfigError: lists the conflicts.
    """
    entries, problems = [], []
    for number, run in enumerate(config.runs):
        settings, found = read(Settings, {**config.training, **run.get("training", {})})
        problems += [f"runs {run['name']}: {problem}" for problem in found]
        if settings is not None:
            own = {key: value for key, value in run.items() if key != "training"}
            entry, found = read(Entry, {**own, "channels": own.get("channels") or config.channels, "settings": settings}, f"runs.{number}.")
            problems += found
            entries += [] if entry is None else [entry]
    if problems:
        raise ConfigError("\n".join(dict.fromkeys(problems)))
    return entries


def make_study(config: StudyConfig, cohort: Cohort, command: str) -> Study:
    """Turn a configuration and its cohort into a study.

    Raises:
        ConfigError: a channel, class or model is unknown, or settings cannot be combined.
        SplitError: the patients cannot be divided as requested.
    """
    from raredistill.splits import make_splits
    from raredistill.studies.study import Study

    entries, looks = entries_of(config), looks_of(config)
    divided = config.splits.model_dump() | ({"repeats": looks.looks[-1]} if looks else {})
    splits = make_splits(cohort, **divided)
    plain = config.model_dump(mode="json")
    return Study(config.name, cohort, splits, entries, config.seeds, config.splits.protocol, plain, command, looks)


def looks_of(config: StudyConfig) -> Looks | None:
    """When the study may stop; None where it runs all its repeats.

    Raises:
        ConfigError: the looks do not hold their level, or contradict the splits.
    """
    from raredistill.evaluation.looks import Looks

    given = config.evidence
    if not given.looks:
        if given.alpha:
            raise ConfigError("evidence.alpha are levels of looks, but there are none; add evidence.looks, such as [2, 4, 10]")
        return None
    looks = Looks(given.looks, given.alpha, given.margin, given.wanted)
    if config.splits.protocol != "outer":
        raise ConfigError(f"evidence.looks add repeats of outer folds, but splits.protocol is {config.splits.protocol}; leave looks out")
    if "repeats" in config.splits.model_fields_set and config.splits.repeats != looks.looks[-1]:
        raise ConfigError(f"evidence.looks end at {looks.looks[-1]} repeats, but splits.repeats is {config.splits.repeats}; leave it out")
    return looks


def cohort_folder(config: StudyConfig, out: Path) -> Path:
    """Folder of the study's prepared cohort, named by a hash of its source, so that a changed source is a new cohort."""
    if isinstance(config.cohort, Path):
        return config.cohort
    return out / f"cohort-{fingerprint(config.cohort.model_dump(mode='json'))[:8]}"
