"""A Ray cluster of two nodes on this machine, one of which is killed half-way; a driver that is interrupted; a node that does not share.

``main(FOLDER)`` leaves in FOLDER what each scenario wrote, and in ``outcome.json`` how it ended; ``test_on_ray.py`` looks at both.
``command(FOLDER, OUT, ADDRESS)`` is the command line with slow steps, so that things can happen half-way.
Each is called by ``python -c``: what Python starts beside such a process does not import all this again.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import ray
import torch
import yaml
from driver import CONFIG
from ray.cluster_utils import Cluster

from conftest import Silent, write_tiny
from raredistill import cli
from raredistill.cohort.store import Cohort
from raredistill.config import StudyConfig, make_study
from raredistill.errors import ConfigError
from raredistill.runs.layout import StudyFolder
from raredistill.studies import on_ray
from raredistill.studies.study import Study, run_study

NODE = {"num_cpus": 1, "object_store_memory": 80 * 2**20}
QUICK = {"health_check_initial_delay_ms": 0, "health_check_period_ms": 300, "health_check_failure_threshold": 3}


def slowly(job, run, records, threads, work=on_ray.work):
    """On a worker: as ever, but with slow steps, a state after each, and a line in a diary."""
    import os
    import time

    import ray

    from raredistill.training import loop, resume

    resume.SAVE_EVERY = 0.0
    if not hasattr(loop.Trainer, "quick"):
        loop.Trainer.quick = loop.Trainer.step
        loop.Trainer.step = lambda trainer, batch: (time.sleep(0 if (job.out / "fast").exists() else 1), trainer.quick(batch))[1]
    node, draft = ray.get_runtime_context().get_node_id(), StudyFolder(job.out).run(run.id).draft.path
    with (job.out / "diary").open("a") as handle:
        handle.write(f"{run.id} {node} {os.getpid()} {resume.has_state(draft)}\n")
    return work(job, run, records, threads)


def command(folder: str, out: str, address: str) -> None:
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    torch.set_num_threads(1)
    on_ray.work = slowly
    sys.argv = ["raredistill", "study", f"{folder}/study.yaml", "--out", out, "--on", "ray", "--address", address]
    cli.main()


def study_of(folder: Path) -> Study:
    raw = yaml.safe_load((folder / "study.yaml").read_text())
    return make_study(StudyConfig.model_validate(raw), Cohort.load(folder / "cohort"), "test")


def diary(out: Path) -> list[list[str]]:
    """Run, node, process, and whether there was a state, of each time that a worker took a run up."""
    return [line.split() for line in (out / "diary").read_text().splitlines()] if (out / "diary").exists() else []


def states(out: Path) -> list[str]:
    return sorted(path.parent.name for path in out.glob("runs/*.unfinished/state-b.safetensors"))


def begin(folder: Path, out: Path, address: str, runs: int) -> subprocess.Popen:
    """Start a driver; returns when so many runs are half-way: each has kept two states."""
    seen = len(diary(out))
    call = f"import ray_driver; ray_driver.command({str(folder)!r}, {str(out)!r}, {address!r})"
    child = subprocess.Popen([sys.executable, "-c", call], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while child.poll() is None and not (len(diary(out)) >= seen + runs and len(states(out)) == runs):
        time.sleep(0.02)
    return child


def end(child: subprocess.Popen) -> tuple[int, str, str]:
    told = child.communicate(timeout=1200)  # only so that a hang ends at all: a busy machine decides how long it takes
    return child.returncode, *told


def node_killed(folder: Path, out: Path, cluster, node) -> dict:
    """Kill -9 the second node, with its worker, when both nodes are in the middle of a run."""
    child = begin(folder, out, cluster.address, runs=2)
    half_way = states(out)
    (out / "fast").touch()
    os.kill(node.all_processes["raylet"][0].process.pid, signal.SIGKILL)
    for _, where, worker, _ in diary(out):
        if where == node.node_id:
            os.kill(int(worker), signal.SIGKILL)
    return {"half_way": half_way, "node": node.node_id, "end": end(child), "diary": diary(out)}


def interrupted(folder: Path, out: Path, cluster) -> dict:
    """Ctrl-C to the driver in the middle of a run, then SIGTERM to the next."""
    found = {}
    for number in (signal.SIGINT, signal.SIGTERM):
        child = begin(folder, out, cluster.address, runs=1)
        child.send_signal(number)
        found[number.name] = {"end": end(child), "kept": states(out)}
    return {**found, "diary": diary(out)}


def refused(folder: Path, out: Path, cluster) -> dict:
    """Runs that ask for more cores than a node has; a node in which another file system lies over the study's folder."""
    found, study = {}, study_of(folder)
    (out / "there").mkdir(parents=True)
    alone = lonely_node(out, cluster)
    with on_ray.OnRay(cluster.address, 1.0) as engine:
        for name, threads in (("too_much", 3), ("not_shared", 1)):
            engine.threads = threads
            try:
                engine.check(study.plan(), study.cohort, StudyFolder(out))
            except ConfigError as error:
                found[name] = str(error)
    if alone.poll() is not None:
        found["not_shared"] = ""  # mounting takes rights that we lack
    alone.terminate()
    alone.wait()
    return {**found, "left": sorted(path.name for path in out.iterdir())}


def lonely_node(out: Path, cluster) -> subprocess.Popen:
    start = f"{sys.executable} -m ray.scripts.scripts start --address={cluster.address} --num-cpus=1 --block"
    over = f"mount -t tmpfs tmpfs {out} && exec {start}"
    before = len(alive(cluster))
    child = subprocess.Popen(["unshare", "--mount", "sh", "-c", over], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while child.poll() is None and len(alive(cluster)) == before:
        time.sleep(0.2)
    return child


def alive(cluster) -> list:
    return [node for node in cluster.global_state.node_table() if node["Alive"]]


def main(folder: Path) -> None:
    os.environ.update({**on_ray.ENVIRONMENT, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))})
    torch.set_num_threads(1)
    cohort = write_tiny(folder / "cohort")
    (folder / "study.yaml").write_text(yaml.safe_dump({**CONFIG, "cohort": str(cohort.root)}))
    run_study(study_of(folder), folder / "calm", Silent())
    cluster = Cluster(initialize_head=True, head_node_args={**NODE, "include_dashboard": False, "_system_config": QUICK})
    outcome: dict = {}
    try:
        second = cluster.add_node(**NODE)
        for name, scenario in (
            ("node_killed", lambda out: node_killed(folder, out, cluster, second)),
            ("interrupted", lambda out: interrupted(folder, out, cluster)),
            ("refused", lambda out: refused(folder, out, cluster)),
        ):
            began = time.monotonic()
            outcome[name] = {**scenario(folder / name), "seconds": time.monotonic() - began}
    finally:
        cluster.shutdown()
    run_study(study_of(folder), folder / "interrupted", Silent())
    (folder / "outcome.json").write_text(json.dumps(outcome, indent=1))
