"""The dry run: the plan's own runs in its order, arithmetic against formulas written out, disk against a real study, Graham's bounds."""

import signal
import sys
from dataclasses import replace

import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from raredistill import cli
from raredistill.runs.layout import StudyFolder
from raredistill.runs.teachers import network_of
from raredistill.studies import estimate
from raredistill.studies import measure as measuring
from raredistill.studies.measure import Cost, kind_of, measure
from raredistill.studies.plan import share_of
from raredistill.studies.schedule import Task, critical_path, makespan
from raredistill.studies.study import left, run_study
from test_study import Silent, study

EPOCHS = {"epochs": 2, "batch_size": 16, "accelerator": "cpu"}
KNOWN = Cost(
    step=2.0, image=0.1, load=0.01, view=0.5, once=7.0, memory=10**9, state=4_000, results=50_000, row=40.0, view_row=3.0,
    device=torch.device("cpu"),
)  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def briefly():
    """No test compares times, so that a few steps are enough."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measuring, "GROUP_SECONDS", 0.01)
        yield


def foretell(made, out, **replaced):
    return estimate.forecast(made.plan(), made.cohort, StudyFolder(out), lambda done, total, note: None, **replaced)


@pytest.fixture
def known(monkeypatch):
    """Every kind of run costs the same, known amounts."""
    monkeypatch.setattr(estimate, "measure", lambda run, cohort, scratch: KNOWN)


@pytest.fixture(scope="module")
def measured(tiny_cohort, tmp_path_factory):
    """A forecast before a study, the study, and a forecast after it."""
    out = tmp_path_factory.mktemp("estimate") / "s"
    made = study(tiny_cohort, training=EPOCHS)
    before = foretell(made, out)
    untouched = not out.exists()
    records = run_study(made, out, Silent())
    return made, out, before, untouched, records, foretell(made, out)


def test_the_dry_run_lists_the_plans_runs_in_its_order_and_writes_nothing(measured):
    made, _, before, untouched, records, _ = measured
    assert untouched
    assert [each.run.id for each in before] == [run.id for run in made.plan()] == [record.id for record in records]
    assert {each.status for each in before} == {"to do"}
    assert [row["after"] for row in estimate.run_rows(before)] == [run.teacher.id if run.teacher else "" for run in made.plan()]
    assert all(each.seconds > 0 and each.memory > 10**8 for each in before)


def test_the_foretold_disk_is_what_a_real_study_takes(measured):
    _, out, before, _, _, _ = measured
    for each in before:
        taken = sum(file.stat().st_size for file in (out / "runs" / each.run.id).rglob("*") if file.is_file())
        assert each.disk == pytest.approx(taken, rel=0.25)


def test_after_the_study_nothing_is_left(measured):
    _, _, _, _, _, after = measured
    assert {(each.status, each.seconds, each.disk) for each in after} == {("done", 0.0, 0)}
    assert estimate.longest_chain(after)[0] == 0
    assert estimate.disk_needed(after) == 0


def test_the_seconds_of_a_run_are_its_steps_its_evaluation_and_what_happens_once(tiny_cohort, tmp_path, known):
    made = study(tiny_cohort, training=EPOCHS)
    for each in foretell(made, tmp_path / "s"):
        train, validation, test = (len(rows) for rows in (each.run.split.train, each.run.split.validation, each.run.split.test))
        steps = 2 * (train // 16) * 2.0
        evaluation = (2 * validation + 2 * (validation + test)) * 0.1
        assert each.seconds == pytest.approx(steps + evaluation + (train + 2 * validation + test) * 0.01 + 7.0)
        pixels = (train * (2 if each.run.teacher and each.run.entry.name == "taught" else len(each.run.entry.channels))) * 256
        assert each.memory == 10**9 + pixels + validation * len(each.run.entry.channels) * 256
        assert each.working == 8_000


def test_a_teacher_cache_is_filled_once_for_all_students_of_a_teacher(tiny_cohort, tmp_path, known):
    taught = {"model": "small_cnn", "teacher": "large"}
    runs = [{"name": "large", "model": "cifar_resnet8"}, {"name": "a", **taught}, {"name": "b", **taught, "dropout": 0.1}]
    made = study(tiny_cohort, runs, training={**EPOCHS, "teacher_cache": {"views": 2}})
    large, first, second = foretell(made, tmp_path / "s")[:3]
    train = len(first.run.split.train)
    assert first.seconds - second.seconds == pytest.approx(2 * train * 0.5)
    assert first.disk - second.disk == 2 * train * 3
    assert large.seconds == pytest.approx(second.seconds)


def test_a_begun_run_counts_the_epochs_that_are_left(tiny_cohort, tmp_path, known):
    made = study(tiny_cohort, training=EPOCHS)
    whole = foretell(made, tmp_path)[0]
    draft = tmp_path / "runs" / f"{whole.run.id}.unfinished"
    draft.mkdir(parents=True)
    (draft / "epochs.jsonl").write_text("{}\n")
    begun = foretell(made, tmp_path)[0]
    assert begun.status == "started, 1 of 2 epochs"
    assert whole.seconds - begun.seconds == pytest.approx(2.0 * (len(whole.run.split.train) // 16) + 0.1 * len(whole.run.split.validation))


def test_pixels_that_do_not_fit_are_told_with_the_cure_and_auto_streams_them(tiny_cohort, tmp_path, known, monkeypatch):
    monkeypatch.setattr("raredistill.memory.available", lambda: 1000)
    resident = foretell(study(tiny_cohort, training={**EPOCHS, "residence": "resident"}), tmp_path)[0]
    assert "pixels take" in resident.problem
    assert "set residence=auto or streamed" in resident.problem
    auto = foretell(study(tiny_cohort, training=EPOCHS), tmp_path)[0]
    assert (auto.residence, auto.problem) == ("streamed", "")


@pytest.mark.parametrize(
    "taught",
    [
        {"teacher": "large", "method": "fitnet"},
        {"teacher": ["large", "other"], "training": {"teacher_cache": {"views": 2}}},
        {"teacher": "large", "cross_fit": 2, "method": "pckd"},
        {"teacher": "large", "online": "mutual", "training": {"mixing": "mixup", "sam_rho": 0.05}},
    ],
)
def test_every_way_of_teaching_can_be_measured(tiny_cohort, tmp_path, taught):
    runs = [
        {"name": "large", "model": "cifar_resnet8"},
        {"name": "other", "model": "small_cnn"},
        {"name": "x", "model": "small_cnn", **taught},
    ]
    [run] = [run for run in study(tiny_cohort, runs, training=EPOCHS).plan() if run.entry.name == "x" and run.split.fold == 0]
    cost = measure(run, tiny_cohort, tmp_path / "0")
    assert 0 < cost.image < cost.step
    assert (cost.view > 0) == (cost.view_row > 0) == (run.entry.settings.views is not None)
    # Two checkpoints of the student and nothing of its teacher; a state holds at least weights, best weights and two moments of Adam.
    weights = 4 * sum(value.numel() for value in network_of(run.entry, tiny_cohort).parameters())
    assert cost.results == pytest.approx(2 * weights, rel=0.05)
    assert cost.state >= 4 * weights * 0.99


def test_runs_that_differ_in_what_costs_nothing_are_measured_once(tiny_cohort):
    plan = study(tiny_cohort, seeds=[0, 1], training=EPOCHS).plan()
    slower = study(tiny_cohort, training={**EPOCHS, "learning_rate": 0.5, "epochs": 9}).plan()
    assert len({kind_of(run) for run in plan}) == 3
    assert {kind_of(run) for run in slower} == {kind_of(run) for run in plan}
    assert kind_of(replace(plan[0], entry=replace(plan[0].entry, settings=replace(plan[0].entry.settings, batch_size=8)))) != kind_of(
        plan[0]
    )


GRID = [Task("a", 3.0), Task("b", 2.0), Task("after-a", 2.0, ("a",)), Task("c", 4.0), Task("after-both", 1.0, ("after-a", "b"))]


@pytest.mark.parametrize(("devices", "seconds"), [(1, 12.0), (2, 6.0), (3, 6.0)])
def test_a_schedule_worked_out_by_hand(devices, seconds):
    # Two: a 0-3, b 0-2, c 2-6, after-a 3-5, after-both 5-6. Three: a, b and c at 0, after-a 3-5, after-both 5-6.
    assert makespan(GRID, devices) == seconds
    assert critical_path(GRID) == (6.0, ["a", "after-a", "after-both"])


@st.composite
def grids(draw):
    tasks = []
    for number in range(draw(st.integers(1, 12))):
        before = draw(st.sets(st.integers(0, number - 1), max_size=2)) if number else set()
        tasks.append(Task(str(number), draw(st.integers(1, 20)), tuple(map(str, before))))
    return tasks


@settings(max_examples=60, deadline=None)
@given(grids(), st.integers(1, 8))
def test_a_schedule_keeps_grahams_bounds(tasks, devices):
    chain, names = critical_path(tasks)
    by_name = {task.name: task for task in tasks}
    assert chain == sum(by_name[name].seconds for name in names)
    work, span = sum(task.seconds for task in tasks), makespan(tasks, devices)
    assert max(work / devices, chain) <= span <= work / devices + (1 - 1 / devices) * chain + 1e-9
    assert makespan(tasks, 1) == work
    assert makespan(tasks, len(tasks)) == chain


def test_shares_are_disjoint_complete_and_bring_their_teachers(tiny_cohort):
    plan = study(tiny_cohort, seeds=[0, 1]).plan()
    for shares in (1, 2, 3, 5, 20):
        own = [plan[number::shares] for number in range(shares)]
        assert sorted(run.id for part in own for run in part) == sorted(run.id for run in plan)
        for number in range(shares):
            share = share_of(plan, number, shares)
            names = [run.id for run in share]
            assert len(set(names)) == len(names)
            assert names[: len(own[number])] == [run.id for run in own[number]]
            assert {teacher.id for run in share for teacher in run.teachers} <= set(names)


def test_shares_carried_out_one_after_the_other_make_the_whole_study(tiny_cohort, tmp_path):
    made, watchers = study(tiny_cohort), [Silent(), Silent(), Silent()]
    remaining = []
    for number, watcher in enumerate(watchers):
        run_study(made, tmp_path, watcher, chosen=share_of(made.plan(), number, 3))
        remaining.append(len(left(tmp_path)))
    trained = [run for watcher in watchers for run in watcher.trained]
    assert sorted(trained) == sorted(run.id for run in made.plan())
    assert remaining == sorted(remaining, reverse=True)
    assert remaining[0] > 0 == remaining[-1]


@pytest.fixture
def command(monkeypatch, capsys):
    """The command line in this process: exit code, output and errors."""
    before = signal.getsignal(signal.SIGTERM)

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["raredistill", "study", *map(str, arguments)])
        code = 0
        try:
            cli.main()
        except SystemExit as stop:
            code = stop.code or 0
        return code, *capsys.readouterr()

    yield call
    signal.signal(signal.SIGTERM, before)


def test_the_command_line_of_a_dry_run_and_of_a_share(tiny_cohort, tmp_path, command):
    config = tmp_path / "study.yaml"
    runs = [{"name": "large", "model": "cifar_resnet8"}, {"name": "taught", "model": "small_cnn", "teacher": "large"}]
    raw = {
        "name": "s",
        "cohort": str(tiny_cohort.root),
        "splits": {"folds": 2, "repeats": 1, "validation_share": 0.34},
        "training": EPOCHS,
        "runs": runs,
    }
    config.write_text(yaml.safe_dump(raw))
    code, said, errors = command(config, "--out", tmp_path / "s", "--dry-run")
    assert code == 0, errors
    assert said.rstrip().endswith(f"next: raredistill study {config} --out {tmp_path / 's'}")
    assert "4 runs in order" in said
    assert "2 folds x 1 repeats find gains in LGG F1 of" in said.replace("\n", " ")
    assert not (tmp_path / "s").exists()
    # The share of a student, and one without a run.
    for share, count in (("1/4", "2 runs in order"), ("7/8", "no run of this study is in the share 7/8")):
        code, said, errors = command(config, "--out", tmp_path / "s", "--only", share, "--dry-run")
        assert code == 0, errors
        assert count in said
    code, said, errors = command(config, "--out", tmp_path / "s", "--only", "0/4")
    assert code == 0, errors
    assert "3 runs are still being done by other processes" in said
    assert f"next: raredistill study {config} --out {tmp_path / 's'}" in said
    assert not (tmp_path / "s" / "report").exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--only", "4/4"], "--only 4/4: write I/N with I from 0 to N - 1"),
        (["--address", "h:1"], "add --on ray"),
        (["--on", "ray", "--dry-run"], "--dry-run measures this machine, not a cluster"),
        (["cohort={source: table, path: x.csv, size: 16}", "--dry-run"], "raredistill prepare table x.csv --size 16 --out cohort"),
    ],
)
def test_what_cannot_be_asked_is_one_message(tiny_cohort, tmp_path, command, arguments, said):
    config = tmp_path / "study.yaml"
    config.write_text(yaml.safe_dump({"name": "s", "cohort": str(tiny_cohort.root), "runs": [{"name": "a", "model": "small_cnn"}]}))
    code, _, errors = command(config, "--out", tmp_path / "s", *arguments)
    assert code == 2
    assert said in errors
    assert not (tmp_path / "s").exists()
