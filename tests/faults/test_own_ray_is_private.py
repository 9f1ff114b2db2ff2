"""A Ray that a study starts for itself: nothing from another machine, nothing without its token, nothing in its folder."""

import os
import subprocess
import sys

import pytest

pytest.importorskip("ray", reason="Ray is not installed: pip install 'raredistill[ray]'")

PROGRAM = """
import os, stat, subprocess, sys
from pathlib import Path
from raredistill.studies.on_ray import OnRay

def listening():
    rows = [line.split() for kind in ("tcp", "tcp6") for line in Path(f"/proc/net/{kind}").read_text().splitlines()[1:]]
    return {row[9]: row[1].rpartition(":")[0] for row in rows if row[3] == "0A"}

def descendants(process):
    found, parents = [process], {}
    for place in Path("/proc").glob("[0-9]*/stat"):
        try:
            parents[int(place.parent.name)] = int(place.read_text().rpartition(")")[2].split()[1])
        except OSError:
            pass
    for child in found:
        found += [each for each, parent in parents.items() if parent == child and each not in found]
    return found

def sockets(process):
    try:
        links = [os.readlink(link) for link in Path(f"/proc/{process}/fd").iterdir()]
    except OSError:
        return set()
    return {link[8:-1] for link in links if link.startswith("socket:[")}

with OnRay(None, 1.0) as engine:
    assert engine.ray.get(engine.ray.remote(lambda: 3).remote()) == 3
    ours = {number for process in descendants(os.getpid()) for number in sockets(process)}
    addresses = {address for number, address in listening().items() if number in ours}
    context = engine.ray.get_runtime_context()
    folder = Path(engine.ray._private.worker._global_node.get_temp_dir_path()).parent
    print("ADDRESSES", *sorted(addresses))
    print("MODE", oct(stat.S_IMODE(folder.stat().st_mode)))
    print("TOKEN", os.environ["RAY_AUTH_MODE"], len(os.environ["RAY_AUTH_TOKEN"]))
    call = "import ray; ray.init(address=%r, log_to_driver=False); print('LET IN')" % context.gcs_address
    without = {**os.environ, "RAY_AUTH_TOKEN": "0" * 64}
    stranger = subprocess.run([sys.executable, "-c", call], env=without, capture_output=True, text=True, timeout=300)
    print("STRANGER", stranger.returncode != 0 and "LET IN" not in stranger.stdout)
print("GONE", not folder.exists(), "RAY_AUTH_TOKEN" in os.environ)
"""


def test_a_ray_of_its_own_listens_to_this_machine_only_asks_for_its_token_and_hides_its_folder():
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    said = dict(line.split(" ", 1) for line in done.stdout.splitlines() if " " in line)
    assert set(said["ADDRESSES"].split()) <= {"0100007F", "0000000000000000FFFF00000100007F", "00000000000000000000000001000000"}
    assert said["ADDRESSES"]
    assert said["MODE"] == "0o700"
    assert said["TOKEN"] == "token 64"
    assert said["STRANGER"] == "True"
    assert said["GONE"] == "True False"


def test_a_ray_that_listens_to_others_is_refused(monkeypatch):
    import ray

    from raredistill.errors import ConfigError
    from raredistill.studies.on_ray import OnRay

    closed = []
    monkeypatch.setattr(ray, "init", lambda **options: None)
    monkeypatch.setattr(ray, "shutdown", lambda: closed.append(True))
    monkeypatch.setattr(ray.util, "get_node_ip_address", lambda: "192.0.2.2")
    before = {name: os.environ.get(name) for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN")}
    with pytest.raises(ConfigError, match=r"listens on 192.0.2.2, for other machines too; start the study in a new process"):
        OnRay(None, 1.0).__enter__()
    assert closed == [True]
    assert {name: os.environ.get(name) for name in before} == before
