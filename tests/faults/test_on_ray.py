"""A study on a Ray cluster: a node that dies, a driver that is stopped, and clusters that cannot work, each done to real processes."""

import json
import os
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from test_crashes import contents

from raredistill.errors import ConfigError
from raredistill.files import read_json
from raredistill.runs.layout import StudyFolder
from raredistill.studies import on_ray
from test_study import Silent, study

HERE = Path(__file__).parent
pytest.importorskip("ray", reason="Ray is not installed: pip install 'raredistill[ray]'")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("ray")


@pytest.fixture(scope="module")
def outcome(folder):
    call = f"import pathlib, ray_driver; ray_driver.main(pathlib.Path({str(folder)!r}))"
    paths = os.pathsep.join([*map(str, (HERE, HERE.parent)), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": paths}
    done = subprocess.run([sys.executable, "-c", call], capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    return json.loads((folder / "outcome.json").read_text())


def test_a_killed_nodes_run_goes_on_from_its_state_on_another_node_to_the_same_bits(folder, outcome):
    found = outcome["node_killed"]
    code, said, errors = found["end"]
    assert (code, len(found["half_way"])) == (0, 2), errors
    [(moved, *_)] = [line for line in found["diary"] if line[1] == found["node"]]
    [again] = [line for line in found["diary"] if line[0] == moved and line[1] != found["node"]]
    assert again[3] == "True"
    assert contents(folder / "node_killed" / "runs") == contents(folder / "calm" / "runs")
    assert {record["status"] for record in read_json(folder / "node_killed" / "study.json")["runs"]} == {"done"}
    assert "epochs: 12/12" in errors
    assert "ray" not in (said + errors).replace(str(folder), "").replace("--on ray", "").lower()  # nothing of its own logs


@pytest.mark.parametrize(("name", "code", "word"), [("SIGINT", 130, "interrupted"), ("SIGTERM", 143, "terminated")])
def test_a_stopped_driver_stops_the_workers_which_keep_their_states(folder, outcome, name, code, word):
    found = outcome["interrupted"][name]
    ended, _, errors = found["end"]
    assert ended == code, errors
    assert f"raredistill: {word}; resume with: raredistill study {folder / 'study.yaml'} --out {folder / 'interrupted'} --on ray" in errors
    assert "Traceback" not in errors
    assert len(found["kept"]) == 1


def test_what_the_cluster_began_is_finished_here_to_the_same_bits(folder, outcome):
    # The second driver's worker went on from what the first one's had kept.
    assert [line[3] for line in outcome["interrupted"]["diary"]] == ["False", "True"]
    assert contents(folder / "interrupted" / "runs") == contents(folder / "calm" / "runs")


def test_runs_that_no_node_can_hold_are_refused_with_what_nodes_have(outcome):
    said = outcome["refused"]["too_much"]
    assert "a run needs 3 CPU, which no node has" in said
    assert "1 CPU" in said
    assert "Set OMP_NUM_THREADS" in said


def test_a_node_that_does_not_share_the_folder_is_refused_by_name(outcome):
    said = outcome["refused"]["not_shared"]
    if not said:
        pytest.skip("mounting another file system takes root")
    assert said.startswith(f"node {socket.gethostname()} (")
    assert "refused is not the driver's; share that folder with all nodes" in said
    assert outcome["refused"]["left"] == ["there"]


def test_an_address_that_does_not_answer_is_told_in_a_bounded_time(monkeypatch, capfd):
    monkeypatch.setattr(on_ray, "ANSWER", 3.0)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"127.0.0.1:{silent.getsockname()[1]}"
        began = time.monotonic()
        with pytest.raises(ConfigError, match=rf"no Ray cluster responds at {address} \(no answer within 3 s\). Start it with"):
            on_ray.OnRay(address, 1.0).__enter__()
    assert time.monotonic() - began < 20
    assert capfd.readouterr() == ("", "")


def test_without_ray_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ConfigError, match=r"not installed; install it with: pip install 'raredistill\[ray\]'"):
        on_ray.OnRay(None, 1.0).__enter__()


@pytest.fixture
def job(tiny_cohort, tmp_path, monkeypatch):
    """What a driver tells the nodes, while it holds the lock on its token."""
    monkeypatch.chdir(tmp_path)
    Path("study").mkdir()
    with on_ray._token(tiny_cohort, StudyFolder(Path("study"))) as job:
        yield job


def test_what_a_node_sees_wrongly_is_named(job, tmp_path):
    assert on_ray.look(job) == ""
    code = {**job.made_with["code"], "training/loop.py": "0123"}
    wrong = {
        "share that folder with all nodes": replace(job, word="another"),
        "mount it with locks": replace(job, token=job.token.with_name("free")),
        "is another cohort": replace(job, cohort_hash="0123"),
        "no such folder; make a cohort": replace(job, cohort=tmp_path / "none"),
        "other versions of training/loop.py; install the same": replace(job, made_with={**job.made_with, "code": code}),
        "No such file or directory on that node; share that folder": replace(job, here=tmp_path / "gone"),
    }
    (tmp_path / "study" / "free").write_text(job.word)
    assert {said: said in on_ray.look(changed) for said, changed in wrong.items()} == dict.fromkeys(wrong, True)


def node(**resources):
    return {"Alive": True, "NodeName": "10.0.0.1", "NodeManagerHostname": "n1", "Resources": resources}


@pytest.fixture
def engine():
    """An engine whose cluster has one node with a GPU and one without."""
    import ray

    engine = on_ray.OnRay(None, 0.25)
    engine.threads = 4
    engine.ray = SimpleNamespace(nodes=lambda: [node(CPU=8.0, GPU=1.0), node(CPU=2.0)], exceptions=ray.exceptions)
    return engine


def plan_of(cohort, **training):
    return study(cohort, [{"name": "a", "model": "small_cnn"}], training={"epochs": 1, "batch_size": 16, **training}).plan()


def test_a_run_asks_for_a_share_of_a_gpu_or_for_the_drivers_threads(engine, tiny_cohort):
    needs = {device: engine._need(plan_of(tiny_cohort, accelerator=device)[0]) for device in ("auto", "cuda", "cpu")}
    assert needs == {"auto": {"GPU": 0.25, "CPU": 1}, "cuda": {"GPU": 0.25, "CPU": 1}, "cpu": {"CPU": 4}}
    assert engine._need(plan_of(tiny_cohort, accelerator="cuda", devices=2)[0]) == {"GPU": 2, "CPU": 2}
    engine.ray.nodes = lambda: [node(CPU=2.0)]
    assert engine._need(plan_of(tiny_cohort, accelerator="auto")[0]) == {"CPU": 4}
    with pytest.raises(ConfigError, match=r"a run needs 1 CPU, 0.25 GPU, which no node has \(n1 \(10.0.0.1\): 2 CPU\)"):
        engine._refuse_unfit([{"CPU": 1, "GPU": 0.25}])


def test_when_all_nodes_that_could_help_are_gone_the_study_stops_and_says_so(engine, tiny_cohort, tmp_path, monkeypatch):
    plan = plan_of(tiny_cohort, accelerator="cpu")
    begun = on_ray._Study(engine, tiny_cohort, StudyFolder(tmp_path), Silent(), lambda record: None)
    begun._refuse_nobody(plan)
    engine.ray.nodes = list
    begun._refuse_nobody(plan)
    monkeypatch.setattr(on_ray, "NOBODY", 0.0)
    with pytest.raises(ConfigError, match=r"2 remaining runs have been gone for 0 s; all states are saved"):
        begun._refuse_nobody(plan)


def test_a_run_whose_worker_dies_each_time_fails_alone(engine, tiny_cohort, tmp_path):
    def dies(reference):
        raise engine.ray.exceptions.WorkerCrashedError

    engine.ray.get = dies
    [run, _] = plan_of(tiny_cohort, accelerator="cpu")
    begun = on_ray._Study(engine, tiny_cohort, StudyFolder(tmp_path), Silent(), lambda record: None)
    record, reused = begun._outcome(None, run)
    assert (record.id, record.status, reused) == (run.id, "failed", False)
    assert record.error.startswith("its worker died 6 times")
