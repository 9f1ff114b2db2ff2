"""Rules on entries together with a cohort and its splits, checked before the first run rather than hours later."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from raredistill.cohort.store import Cohort
from raredistill.distill.contract import Shape
from raredistill.distill.registry import make_method
from raredistill.errors import ConfigError, RareDistillError
from raredistill.losses import make_loss
from raredistill.models import facts, widths
from raredistill.runs.entry import Entry, External
from raredistill.runs.teachers import check_external, expected_facts, network_of, patients_before
from raredistill.splits import Split
from raredistill.training.optimizers import check_schedule


def check_entries(entries: Sequence[Entry], cohort: Cohort, splits: Sequence[Split]) -> None:
    """Refuse entries that do not fit a cohort and its splits.

    Raises:
        RareDistillError: lists the problems of all entries; its type is that of the first problem.
    """
    problems: list[RareDistillError] = []
    for entry in entries:
        try:
            _check(entry, entries, cohort, splits)
        except RareDistillError as error:
            problems.append(error)
    if problems:
        raise type(problems[0])("\n".join(dict.fromkeys(map(str, problems))))


def _check(entry: Entry, entries: Sequence[Entry], cohort: Cohort, splits: Sequence[Split]) -> None:
    if unknown := [channel for channel in entry.channels if channel not in cohort.channels]:
        raise ConfigError(f"{entry.called}the cohort has no channel {unknown[0]}; it has {', '.join(cohort.channels)}")
    facts(entry.model, channels=len(entry.channels), classes=len(cohort.classes), image_size=cohort.size[0], head=entry.head)
    make_loss(entry.settings.loss, counts=torch.ones(len(cohort.classes)), **entry.settings.loss_options)
    if entry.teacher is not None:
        _check_teaching(entry, [each for each in entries if each.name in entry.teachers], cohort, splits)
    if entry.pretrained:
        network_of(entry, cohort)
    for split in splits:
        check_schedule(entry.settings, validated=len(split.validation) > 0)
        patients_before(entry, cohort, split)


def _check_teaching(entry: Entry, teachers: Sequence[Entry], cohort: Cohort, splits: Sequence[Split]) -> None:
    shapes = [Shape(*widths(each.model, channels=len(each.channels), image_size=cohort.size[0])) for each in (entry, *teachers)]
    if isinstance(entry.teacher, External):
        check_external(entry.teacher, cohort, splits)
        shapes *= 2
    for split in splits:
        known = expected_facts(entry, teachers, cohort, split, shapes if len(shapes) == 2 else shapes[:1])
        try:
            method = make_method(entry.method, known, **entry.method_options)
        except ConfigError as error:
            raise ConfigError(f"{entry.called}{error}") from None
        if entry.settings.devices > 1 and method.trainable is not None and any(True for _ in method.trainable.buffers()):
            raise ConfigError(f"{entry.called}method {entry.method} keeps statistics of whole batches; set devices: 1")
