"""Nothing gets in: no code out of files, no path out of the study's folder, no network without being asked."""

import ast
import pickle
import socket
from pathlib import Path

import pytest

import raredistill
from raredistill.config import load_config
from raredistill.errors import CheckpointError, ConfigError
from raredistill.files import read_json
from raredistill.models import create, restore
from raredistill.reports import write_report
from raredistill.studies.study import run_study
from test_study import Silent, study


class Payload:
    """Makes a file when it is unpickled."""

    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return Path.touch, (self.target,)


@pytest.mark.parametrize("name", ["w.pth", "w.pt", "w.ckpt", "w.bin", "w.pkl", "w.safetensors", "w"])
def test_a_pickle_of_any_name_is_refused_and_never_opened(tmp_path, name):
    (tmp_path / name).write_bytes(pickle.dumps(Payload(tmp_path / "opened")))
    with pytest.raises(CheckpointError, match="safetensors"):
        create("small_cnn", channels=1, classes=3, image_size=16, pretrained=tmp_path / name)
    with pytest.raises(CheckpointError, match="safetensors"):
        restore(tmp_path / name)
    assert not (tmp_path / "opened").exists()


@pytest.mark.parametrize("use", ["teacher", "pretrained"])
def test_a_pickle_as_start_or_teacher_is_refused_before_training(tiny_cohort, tmp_path, use):
    weights = tmp_path / "w.pth"
    weights.write_bytes(pickle.dumps(Payload(tmp_path / "opened")))
    run = {"name": "a", "model": "small_cnn", use: {"weights": str(weights)} if use == "teacher" else str(weights)}
    with pytest.raises(CheckpointError, match="pickle can run code"):
        study(tiny_cohort, [run])
    assert not (tmp_path / "opened").exists()


def test_a_configuration_makes_no_objects(tmp_path):
    (tmp_path / "c.yaml").write_text(f"name: !!python/object/apply:pathlib.Path.touch [{tmp_path / 'opened'}]\n")
    with pytest.raises(ConfigError, match="YAML"):
        load_config(tmp_path / "c.yaml")
    assert not (tmp_path / "opened").exists()


@pytest.mark.parametrize("name", ["../../out", "/etc/run", "a/b", ".hidden", "a\\b", "nul\0", "x" * 200, "two\nlines"])
def test_a_name_that_could_lead_out_of_the_folder_is_refused(tiny_cohort, tmp_path, name):
    with pytest.raises(ConfigError, match=r"names a folder|control character"):
        run_study(study(tiny_cohort, [{"name": name, "model": "small_cnn"}]), tmp_path / "s" / "deep", Silent())


@pytest.mark.parametrize("name", ["größer & <b>", "=1+1", "a b", "a.safetensors"])
def test_odd_but_harmless_names_work(tiny_cohort, tmp_path, name):
    records = run_study(study(tiny_cohort, [{"name": name, "model": "small_cnn"}]), tmp_path, Silent())
    assert {record.status for record in records} == {"done"}


def test_a_study_and_its_report_ask_no_network(tiny_cohort, tmp_path, monkeypatch):
    asked = []

    def refuse(*arguments, **options):
        asked.append(arguments)
        raise OSError("no network in this test")

    for name in ("connect", "connect_ex", "sendto"):
        monkeypatch.setattr(socket.socket, name, refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    runs = [{"name": "large", "model": "resnet10t"}, {"name": "small", "model": "small_cnn", "teacher": "large"}]
    records = run_study(study(tiny_cohort, runs), tmp_path / "s", Silent())
    write_report(tmp_path / "s")
    assert {record.status for record in records} == {"done"}
    assert {record["status"] for record in read_json(tmp_path / "s" / "study.json")["runs"]} == {"done"}
    assert asked == []


FORBIDDEN = {"eval", "exec", "torch.load", "pickle.load", "pickle.loads", "yaml.load", "os.system", "subprocess.run", "subprocess.Popen"}
OWN = {("parallel.py", "pickle.loads"), ("testing.py", "pickle.loads"), ("plugins.py", "exec")}
"""Arguments on their way from a process to its own workers; a copy that the conformance suite has just made itself; and the Python file
that ``--plugin`` names, which the user runs on purpose: no configuration and no data file leads there."""


def test_the_program_calls_nothing_that_runs_code_from_a_file():
    found = set()
    for path in Path(raredistill.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and (called := ast.unparse(node.func)) in FORBIDDEN:
                found.add((path.name, called))
    assert found == OWN
