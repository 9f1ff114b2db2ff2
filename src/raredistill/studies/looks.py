"""Studies that stop early: the stopping rule is recorded before the first run, and each look after it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from raredistill.errors import ConfigError, DataError
from raredistill.evaluation.looks import Looks, State
from raredistill.files import read_json, write_json
from raredistill.runs.layout import StudyFolder
from raredistill.runs.run import Run
from raredistill.studies.plan import needed

_KEPT = ("outcome", "look", "level", "p_holm", "history")


def hold_rule(folder: StudyFolder, rule: Looks) -> dict[str, State]:
    """Write the rule down before the first run, or compare it with the one that was.

    Returns:
        The states of the pairs that were looked at before.

    Raises:
        ConfigError: the rule was changed after the first look.
        DataError: the file is damaged.
    """
    states = read_states(folder, rule)
    if not states:
        write_states(folder, rule, {})
    return states


def read_states(folder: StudyFolder, rule: Looks) -> dict[str, State]:
    """The states of the pairs that were looked at; none before the first look.

    Raises:
        ConfigError: they were made by another rule.
        DataError: the file is damaged.
    """
    if not folder.looks.is_file():
        return {}
    kept = read_json(folder.looks)
    try:
        states, before = {name: _state(each) for name, each in kept["states"].items()}, kept["rule"]
    except (KeyError, TypeError, AttributeError, ValueError):
        raise DataError(f"{folder.looks}: not what a study writes of its looks; restore it, or start the study in a new folder") from None
    if states and before != rule.record():
        raise ConfigError(
            f"evidence was changed after the first look (it was {before}): its levels would no longer hold; "
            "set it back, or start the study in a new folder"
        )
    return states


def _state(kept: Mapping[str, Any]) -> State:
    plain = {key: kept[key] for key in _KEPT}
    return State(**{**plain, "history": tuple((int(look), float(gain), float(p)) for look, gain, p in plain["history"])})


def write_states(folder: StudyFolder, rule: Looks, states: Mapping[str, State]) -> None:
    """Write down the rule and where each pair stands."""
    kept = {name: {key: value for key, value in asdict(state).items() if key in _KEPT} for name, state in states.items()}
    write_json(folder.looks, {"rule": rule.record(), "states": kept})


def runs_of_look(
    plan: Sequence[Run], place: int, rule: Looks, states: Mapping[str, State], pairs: Mapping[str, Sequence[str]]
) -> list[Run]:
    """The runs that a look needs: all entries at the first, then those of the pairs that are still open, with their teachers.

    Args:
        plan: of the whole study.
        place: index of the look.
        rule: of stopping.
        states: after the look before.
        pairs: entry to the names of all entries that its comparison needs.
    """
    names = {run.entry.name for run in plan} if place == 0 else set()
    for entry, each in pairs.items():
        if entry not in states or states[entry].outcome == "open":
            names |= {entry, *each}
    return needed(plan, names, rule.looks[place])
