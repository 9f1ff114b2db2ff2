"""Nothing is lost and nothing lies after kill -9, Ctrl-C, SIGTERM, a crowd, or a disk that fails: each is done to a real process."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from driver import CONFIG

from conftest import write_tiny
from raredistill import cli, predictions
from raredistill.api import Finished, report
from raredistill.checkpoint import load
from raredistill.config import StudyConfig, make_study
from raredistill.errors import CheckpointError, DataError
from raredistill.files import is_sealed, read_json, seal, write_json
from raredistill.reports import write_report
from raredistill.reports.results import read_results
from raredistill.reports.verdicts import cautions
from raredistill.runs import drafts
from raredistill.studies.study import elsewhere, run_study
from raredistill.training import loop, resume
from test_study import Silent


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("faults")


@pytest.fixture(scope="module")
def outcome(folder):
    driver = Path(__file__).with_name("driver.py")
    done = subprocess.run([sys.executable, str(driver), str(folder)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads((folder / "outcome.json").read_text())


def contents(runs):
    """Every result of every run, byte by byte; only times may differ."""
    found = {}
    for run in sorted(path for path in runs.iterdir() if path.is_dir() and path.suffix != ".damaged"):
        for name in ("best.safetensors", "last.safetensors"):
            weights, promise = load(run / name)
            found[run.name, name] = promise, {key: tensor.numpy().tobytes() for key, tensor in weights.items()}
        found[run.name, "predictions"] = (run / "predictions.parquet").read_bytes()
        epochs = [json.loads(line) for line in (run / "epochs.jsonl").read_text().splitlines()]
        found[run.name, "epochs"] = [{key: value for key, value in epoch.items() if key != "seconds"} for epoch in epochs]
        found[run.name, "left"] = sorted(path.name for path in run.iterdir())
    return found


def test_kill_9_at_random_times_ends_in_the_same_bits(folder, outcome):
    assert outcome["calm"] == outcome["killed"]["end"] == [0, ""]
    assert outcome["killed"]["met"] >= 3
    calm = contents(folder / "calm" / "runs")
    assert len({run for run, _ in calm}) == 4
    assert contents(folder / "killed" / "runs") == calm
    assert {record["status"] for record in read_json(folder / "killed" / "study.json")["runs"]} == {"done"}


def test_kill_9_of_prepare_ends_in_the_same_cohort(folder, outcome):
    assert outcome["killed_images"]["met"] >= 1
    assert outcome["killed_images"]["end"][0] == 0
    calm, killed = (read_json(folder / name / "cohort.json") for name in ("calm-images", "killed-images"))
    assert killed == calm
    names = [sorted(str(path.relative_to(root)) for path in root.rglob("*")) for root in (folder / "calm-images", folder / "killed-images")]
    assert names[0] == names[1]


def test_kill_9_of_the_report_leaves_it_to_be_written_again(folder, outcome):
    assert outcome["killed_report"] == {"met": 1, "end": [0, ""]}
    assert (folder / "signalled" / "report" / "report.html").read_text().rstrip().endswith("</html>")


@pytest.mark.parametrize(("name", "code", "word"), [("SIGINT", 130, "interrupted"), ("SIGTERM", 143, "terminated")])
def test_ctrl_c_and_sigterm_save_and_say_how_to_go_on(folder, outcome, name, code, word):
    ended, said = outcome["signalled"][name]
    assert ended == code
    assert f"raredistill: {word}; resume with: raredistill study {folder / 'study.yaml'} --out {folder / 'signalled'}" in said
    assert "Traceback" not in said
    assert outcome["signalled"]["end"][0] == 0
    assert contents(folder / "signalled" / "runs") == contents(folder / "calm" / "runs")


def test_two_processes_share_the_runs_of_a_study(folder, outcome):
    assert [end[0] for end in outcome["crowded"]["ends"]] == [0, 0]
    first, second = outcome["crowded"]["trained"]
    assert len(first) + len(second) == len({*first, *second}) == 4
    assert first
    assert second
    assert contents(folder / "crowded" / "runs") == contents(folder / "calm" / "runs")
    assert {record["status"] for record in read_json(folder / "crowded" / "study.json")["runs"]} == {"done"}


def test_a_write_that_is_cut_off_is_one_message_and_can_be_gone_on_from(folder, outcome):
    code, said = outcome["full"]["limited"]
    assert code == 2
    assert "File too large" in said
    assert "resume with: raredistill study" in said
    assert "Traceback" not in said
    assert outcome["full"]["end"][0] == 0
    assert contents(folder / "full" / "runs") == contents(folder / "calm" / "runs")


@pytest.mark.parametrize(("state", "said"), [("full", "No space left on device"), ("readonly", "Read-only file system")])
def test_a_full_or_read_only_disk_is_one_message_and_can_be_gone_on_from(folder, outcome, state, said):
    if not outcome["small_disk"]:
        pytest.skip("mounting a small disk takes root")
    code, words = outcome["small_disk"][state]
    assert code == 2
    assert said in words
    assert "resume with: raredistill study" in words
    assert "Traceback" not in words
    assert outcome["small_disk"]["end"][0] == 0
    assert contents(folder / "from-small-disk" / "runs") == contents(folder / "calm" / "runs")


def tiny_study(cohort, **changes):
    raw = {**CONFIG, "cohort": str(cohort.root), "runs": [{"name": "small", "model": "small_cnn", "dropout": 0.3}]}
    return make_study(StudyConfig.model_validate({**raw, **changes}), cohort, "test")


@pytest.fixture(scope="module")
def done(tiny_cohort, tmp_path_factory):
    out = tmp_path_factory.mktemp("done") / "study"
    return out, run_study(tiny_study(tiny_cohort), out, Silent())


class PowerCutError(BaseException):
    pass


class Cutting(Silent):
    """The power goes after an epoch."""

    def epoch_done(self, run, record):
        raise PowerCutError


@pytest.fixture
def begun(tiny_cohort, tmp_path, monkeypatch):
    """A study whose first run was interrupted."""
    monkeypatch.setattr(resume, "SAVE_EVERY", 0.0)
    with pytest.raises(PowerCutError):
        run_study(tiny_study(tiny_cohort), tmp_path / "s", Cutting())
    return tmp_path / "s"


EVERYTHING = [
    {"name": "large", "model": "cifar_resnet8", "training": {"mixing": "mixup", "sam_rho": 0.05, "stage": "crt", "stage_epochs": 2}},
    {"name": "peers", "model": "small_cnn", "dropout": 0.3, "teacher": "large", "online": "mutual"},
    {"name": "hints", "model": "cifar_resnet8", "dropout": 0.3, "teacher": "large", "method": "fitnet"},
]


def test_peers_layers_of_methods_mixing_and_second_stages_resume_to_the_same_bits(tiny_cohort, tmp_path, monkeypatch):
    study = tiny_study(tiny_cohort, runs=EVERYTHING, training={**CONFIG["training"], "epochs": 2})
    run_study(study, tmp_path / "calm", Silent())
    monkeypatch.setattr(resume, "SAVE_EVERY", 0.0)
    original, steps = loop.Trainer.step, []

    def step(trainer, batch):
        steps.append(batch)
        if len(steps) % 4 == 0:
            raise PowerCutError
        return original(trainer, batch)

    monkeypatch.setattr(loop.Trainer, "step", step)
    cuts = 0
    while True:
        try:
            records = run_study(study, tmp_path / "cut", Silent())
            break
        except PowerCutError:
            cuts += 1
    assert cuts > 6
    assert {record.status for record in records} == {"done"}
    assert contents(tmp_path / "cut" / "runs") == contents(tmp_path / "calm" / "runs")


@pytest.mark.parametrize(
    ("part", "name", "old", "said"),
    [
        ("versions", "torch", "1.0", f"torch was 1.0 and is {version('torch')}"),
        ("code", "training/loop.py", "0123", "training/loop.py was 0123 and is"),
        ("code", "models/gone.py", "0123", "models/gone.py was 0123 and is absent"),
    ],
)
def test_going_on_under_something_else_is_refused_with_the_difference(tiny_cohort, begun, part, name, old, said):
    [draft] = (begun / "runs").glob("*.unfinished")
    record = {key: value for key, value in read_json(draft / "origin.json").items() if key != "seal"}
    write_json(draft / "origin.json", seal({**record, part: {**record[part], name: old}}))
    watcher = Silent()
    with pytest.raises(CheckpointError, match=re.escape(said)):
        run_study(tiny_study(tiny_cohort), begun, watcher)
    assert watcher.trained == []
    shutil.rmtree(draft)
    assert {record.status for record in run_study(tiny_study(tiny_cohort), begun, watcher)} == {"done"}


def test_going_on_with_other_threads_is_refused_with_both_numbers(tiny_cohort, begun):
    watcher = Silent()
    torch.set_num_threads(2)
    try:
        with pytest.raises(CheckpointError, match="threads was 1 and is 2"):
            run_study(tiny_study(tiny_cohort), begun, watcher)
    finally:
        torch.set_num_threads(1)
    assert watcher.trained == []
    assert {record.status for record in run_study(tiny_study(tiny_cohort), begun, watcher)} == {"done"}


def test_going_on_with_another_teacher_is_refused(tiny_cohort, tmp_path, monkeypatch):
    monkeypatch.setattr(resume, "SAVE_EVERY", 0.0)
    runs = [{"name": "large", "model": "cifar_resnet8"}, {"name": "taught", "model": "small_cnn", "teacher": "large"}]

    class Later(Silent):
        def epoch_done(self, run, record):
            if run.teacher is not None:
                raise PowerCutError

    study = tiny_study(tiny_cohort, runs=runs)
    with pytest.raises(PowerCutError):
        run_study(study, tmp_path / "s", Later())
    [draft] = (tmp_path / "s" / "runs").glob("taught*.unfinished")
    record = {key: value for key, value in read_json(draft / "origin.json").items() if key != "seal"}
    write_json(draft / "origin.json", seal({**record, "files": {"teacher": "0123"}}))
    records = run_study(study, tmp_path / "s", Silent())
    assert "teacher was 0123" in next(record for record in records if record.id in draft.name).error


def test_a_finished_run_says_what_it_was_made_with(done):
    out, records = done
    run = read_json(out / "runs" / records[0].id / "run.json")
    assert is_sealed(run)
    assert run["made_with"]["versions"]["torch"] == version("torch")
    assert run["made_with"]["code"]["training/loop.py"] == drafts.sha256(Path(loop.__file__))[:16]


@pytest.mark.parametrize("name", ["best.safetensors", "predictions.parquet", "epochs.jsonl", "run.json"])
@pytest.mark.parametrize("damage", ["cut", "flipped", "gone"])
def test_a_damaged_finished_run_is_noticed_and_made_again(tiny_cohort, done, tmp_path, name, damage):
    out = tmp_path / "s"
    shutil.copytree(done[0], out)
    run = done[1][0].id
    path = out / "runs" / run / name
    content = path.read_bytes()
    middle = len(content) // 2
    if damage == "gone":
        path.unlink()
    else:
        path.write_bytes(content[:middle] + (b"" if damage == "cut" else bytes([content[middle] ^ 1]) + content[middle + 1 :]))
    watcher = Silent()
    records = run_study(tiny_study(tiny_cohort), out, watcher)
    assert watcher.trained == [run]
    assert name in records[0].remarks[0]
    assert "trained again" in records[0].remarks[0]
    again, before = contents(out / "runs"), contents(done[0] / "runs")
    assert again == before


def test_what_a_kill_left_beside_a_studys_files_is_gone_after_the_next_start(tiny_cohort, done, tmp_path):
    out = tmp_path / "s"
    shutil.copytree(done[0], out)
    for half in (out / ".study.json.host-1.tmp", out / "splits" / ".r0f0.json.host-1.tmp"):
        half.write_text("{")
    run_study(tiny_study(tiny_cohort), out, Silent())
    assert list(out.rglob(".*.tmp")) == []


def test_a_report_refuses_damaged_predictions(done, tmp_path):
    shutil.copytree(done[0], tmp_path / "s")
    path = tmp_path / "s" / "runs" / done[1][0].id / "predictions.parquet"
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(DataError, match=r"predictions\.parquet"):
        write_report(tmp_path / "s")


def test_a_damaged_cohort_is_noticed_before_training(tmp_path):
    cohort = write_tiny(tmp_path / "c", patients={"HGG": 6, "LGG": 6})
    path = tmp_path / "c" / "pixels" / "flair.u8"
    content = bytearray(path.read_bytes())
    content[1000] ^= 1
    path.write_bytes(content)
    watcher = Silent()
    with pytest.raises(DataError, match=r"flair\.u8 was changed"):
        run_study(tiny_study(cohort), tmp_path / "s", watcher)
    assert watcher.trained == []


def test_a_folder_that_vanishes_is_told_and_not_made_anew(tiny_cohort, tmp_path):
    class Removing(Silent):
        def epoch_done(self, run, record):
            shutil.rmtree(tmp_path / "s", ignore_errors=True)

    with pytest.raises(OSError, match="has vanished"):
        run_study(tiny_study(tiny_cohort), tmp_path / "s", Removing())
    assert not (tmp_path / "s" / "runs").exists()


def test_a_run_that_diverges_names_its_batch_and_its_last_good_checkpoint_and_the_rest_goes_on(tiny_cohort, tmp_path):
    class Poisoned(Silent):
        """A rate that no network survives, from the second epoch on."""

        def epoch_done(self, run, record):
            if run.entry.name == "bad":
                object.__setattr__(run.entry.settings, "learning_rate", 1e30)

    runs = [
        {"name": "bad", "model": "small_cnn", "training": {**CONFIG["training"], "optimizer": "sgd", "schedule": "constant"}},
        {"name": "good", "model": "small_cnn"},
    ]
    records = run_study(tiny_study(tiny_cohort, runs=runs), tmp_path / "s", Poisoned())
    assert {(record.name, record.status) for record in records} == {("bad", "failed"), ("good", "done")}
    bad = records[0]
    assert "not finite in epoch 1, step 1" in bad.error
    named = bad.error.split("samples: ")[1].split(". The last")[0].split(", ")
    assert len(named) == 16
    assert set(named) <= set(tiny_cohort.samples["sample"])
    checkpoint = Path(bad.error.split("checkpoint: ")[1].split(" (epoch")[0])
    weights, promise = load(checkpoint)
    assert promise.model == "small_cnn"
    assert all(tensor.isfinite().all() for tensor in weights.values())
    with pytest.raises(SystemExit) as stop:
        cli._finish(Finished(tmp_path / "s", records, page=report(tmp_path / "s")), "again")
    assert stop.value.code == 1
    assert f"failed: {bad.id}: {bad.error[:40]}" in (tmp_path / "s" / "report" / "report.html").read_text()


def test_out_of_memory_is_written_down_in_the_run(tiny_cohort, tmp_path, monkeypatch):
    original = loop.Network.features

    def features(self, images):
        if len(images) > 5:
            raise torch.OutOfMemoryError("CUDA out of memory (in a test)")
        return original(self, images)

    monkeypatch.setattr(loop.Network, "features", features)
    records = run_study(tiny_study(tiny_cohort), tmp_path / "s", Silent())
    assert {record.status for record in records} == {"done"}
    assert {record.micro_batch for record in records} == {4}
    assert "micro-batches of 4" in records[0].remarks[0]
    assert any("micro-batches of 4" in caution for caution in cautions(read_results(tmp_path / "s")))
    assert len(predictions.read(tmp_path / "s" / "runs" / records[0].id / "predictions.parquet").table)


def test_a_second_process_sees_what_the_first_works_at_and_another_study_is_refused(tiny_cohort, tmp_path):
    mine = tiny_study(tiny_cohort)

    class Meeting(Silent):
        """Others come to the same folder while a run is at work."""

        def epoch_done(self, run, record):
            assert elsewhere(mine, tmp_path / "s") == [run.id]
            other = tiny_study(tiny_cohort, runs=[{"name": "other", "model": "small_cnn"}])
            with pytest.raises(DataError, match="another study"):
                run_study(other, tmp_path / "s", Silent())

    assert {record.status for record in run_study(mine, tmp_path / "s", Meeting())} == {"done"}
    assert elsewhere(mine, tmp_path / "s") == []


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="children are found in /proc")
def test_workers_end_with_a_killed_parent(tmp_path):
    code = (
        "import time; from raredistill.cohort.parallel import pool\n"
        "if __name__ == '__main__':\n"
        "    with pool(2) as processes:\n"
        "        list(processes.map(abs, range(8))); print('ready', flush=True); time.sleep(60)\n"
    )
    (tmp_path / "work.py").write_text(code)
    parent = subprocess.Popen([sys.executable, str(tmp_path / "work.py")], stdout=subprocess.PIPE, text=True)
    parent.stdout.readline()
    workers = descendants(parent.pid)
    assert len(workers) >= 2
    parent.send_signal(signal.SIGKILL)
    parent.communicate()
    end = time.monotonic() + 20
    while any(alive(pid) for pid in workers) and time.monotonic() < end:
        time.sleep(0.05)
    assert [pid for pid in workers if alive(pid)] == []


def descendants(pid):
    children = [int(child) for task in Path(f"/proc/{pid}/task").iterdir() for child in (task / "children").read_text().split()]
    return children + [below for child in children for below in descendants(child)]


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def test_the_driver_leaves_nothing_behind(folder, outcome):
    assert not any(os.path.ismount(path) for path in folder.iterdir())
    left = [path.name for out in ("calm", "killed", "signalled", "full") for path in (folder / out / "runs").iterdir()]
    assert not [name for name in left if "unfinished" in name or name.endswith(".tmp")]
