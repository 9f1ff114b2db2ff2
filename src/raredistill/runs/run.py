"""One entry on one fold with one seed, and its name, derived from all its inputs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from raredistill import plugins
from raredistill.errors import ConfigError
from raredistill.files import fingerprint, sha256
from raredistill.runs.entry import Entry, External
from raredistill.splits import Split


@dataclass(frozen=True)
class Run:
    """One entry on one fold with one seed.

    Attributes:
        id: its name.
        entry: network, settings and teacher.
        split: patients of each side.
        seed: seed of everything random.
        teachers: the runs it depends on; more than one for an ensemble or for cross-fitted teachers.
        peers: entries whose networks are trained together with its own.
        part: for a cross-fitted teacher, the part of the training patients that it leaves out; None for an entry of the study.
    """

    id: str
    entry: Entry
    split: Split
    seed: int
    teachers: tuple[Run, ...] = ()
    peers: tuple[Entry, ...] = ()
    part: int | None = None

    @property
    def teacher(self) -> Run | None:
        """The first of its teachers."""
        return self.teachers[0] if self.teachers else None

    @property
    def plugins(self) -> dict[str, str]:
        """Hash of the source of each plug-in that it uses, its peers' included."""
        return plugins_of(self.entry, self.peers)

    @property
    def fold_seed(self) -> int:
        """Seed of everything random: the same for every entry of a fold, repeat and seed, so that comparisons are paired."""
        return self.seed + 1000 * self.split.fold + 100_000 * self.split.repeat


def run_name(entry: Entry, split: Split, seed: int, *, teachers: Sequence[Run], peers: Sequence[Entry], cohort_hash: str) -> str:
    """The name of a run: its entry, repeat, fold and seed, and a hash of all its inputs.

    Raises:
        ConfigError: a file named in the entry does not exist.
    """
    determines: dict[str, Any] = {
        "entry": _settings_of(entry),
        "teacher": [teacher.id.rsplit("-", 1)[1] for teacher in teachers] or external_facts(entry.teacher if not peers else None),
        "peers": [{**_settings_of(peer), "pretrained": _file_of(peer.pretrained)} for peer in peers],
        "pretrained": _file_of(entry.pretrained),
        "cohort": cohort_hash,
        "split": split.hash,
        "seed": seed,
        **({"plugins": used} if (used := plugins_of(entry, peers)) else {}),  # so that runs without any keep their names
    }
    return f"{entry.name}-r{split.repeat}f{split.fold}s{seed}-{fingerprint(_plain(determines))[:10]}"


def plugins_of(entry: Entry, peers: Sequence[Entry] = ()) -> dict[str, str]:
    """Hash of the source of each plug-in that an entry and its peers use, by kind and name; nothing for what is built in."""
    used: list[tuple[plugins.Kind, str]] = [] if entry.teacher is None else [("distiller", entry.method)]
    for each in (entry, *peers):
        steps = () if each.settings.strengths is None else each.settings.strengths.steps
        used += [("loss", each.settings.loss), ("network", each.model), *(("augmentation", step) for step in steps)]
    return plugins.sources_of(used)


def _settings_of(entry: Entry) -> dict[str, Any]:
    return {key: value for key, value in asdict(entry).items() if key not in ("name", "teacher")}


def external_facts(teacher: Any) -> Any:
    """Everything stated about an external teacher, files by content, so that a corrected list of patients makes a new run."""
    return {key: _file_of(value) for key, value in asdict(teacher).items()} if isinstance(teacher, External) else str(teacher)


def _file_of(value: Any) -> str:
    if not isinstance(value, Path):
        return str(value)
    if not value.is_file():
        raise ConfigError(f"{value}: no such file; check the path in the configuration")
    return sha256(value)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return "file" if isinstance(value, Path) else value
