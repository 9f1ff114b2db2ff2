"""Carry out a plan on a Ray cluster: Ray schedules the runs; the study's folder, on shared storage, remains the only record."""

from __future__ import annotations

import json
import os
import secrets
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from types import TracebackType
from typing import Any

import torch

from raredistill import plugins
from raredistill.cohort.store import Cohort
from raredistill.errors import ConfigError, DataError, RareDistillError
from raredistill.files import lock_if_free, locked
from raredistill.processes import failure_of, last_line
from raredistill.runs.drafts import code, versions
from raredistill.runs.layout import RunFolder, StudyFolder
from raredistill.runs.record import RunRecord, describe
from raredistill.runs.run import Run
from raredistill.runs.train import attempt
from raredistill.runs.watcher import Unwatched, Watcher
from raredistill.studies.execute import RETRY_AFTER, refuse_changed
from raredistill.training.resume import whole

ANSWER = 30.0
"""Seconds within which a cluster must respond."""
LOOK = 900.0
"""Seconds in which a node must have looked at the shared folder: its first import of torch may come from a slow disk, on a busy machine."""
RETRIES = 5
"""How often a run is restarted, from its saved state, after its worker or its node died."""
STOP = 90.0
"""Seconds that remote work gets to save its state."""
NOBODY = 60.0
"""Seconds without any node that could carry out the remaining runs, after which the driver gives up."""
STORE = 100 * 2**20
"""Bytes of Ray's object store on this machine: plans and records are small, and pixels are never sent."""
ENVIRONMENT = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_DEDUP_LOGS_SKIP_REGEX": ".", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}
"""No telemetry, and no logs of Ray on the terminal."""
LOOPBACK = "127.0.0.1"
OWN = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0", "RAY_AUTH_MODE": "token"}
"""For a Ray of its own: Ray then takes the loopback address for its node, as it does by default where it expects no cluster, and every call
needs the token that only this process and its children know (Ray 2.52 and later)."""
POLL = 0.5
"""Seconds between two checks of progress."""

Need = dict[str, float]
Outcome = tuple[RunRecord, bool] | RareDistillError | OSError | None


@dataclass(frozen=True)
class Job:
    """Everything a worker receives besides its run; pixels, weights and states are read from the shared folders.

    Attributes:
        here: working directory of the driver, for relative paths.
        out: study folder.
        cohort: folder of the cohort, whose hash must be ``cohort_hash``.
        token: file in ``out`` written by the driver, which holds its lock while nodes check it.
        word: content of that file.
        made_with: versions and code of the driver.
        plugins: that it has loaded, with the hash of each.
    """

    here: Path
    out: Path
    cohort: Path
    cohort_hash: str
    token: Path
    word: str
    made_with: dict[str, dict[str, str]]
    plugins: dict[str, str]


class OnRay:
    """Carries out runs on a Ray cluster; a context manager that connects and disconnects.

    Args:
        address: ``HOST:PORT`` of the head node, or None for a new Ray instance on this machine.
        gpus_per_run: share of a GPU that a run gets, so that several small runs can share one.

    Raises:
        ConfigError: Ray is not installed or does not respond, a node cannot use the study's folder, or no node has the resources for a run.
    """

    def __init__(self, address: str | None, gpus_per_run: float) -> None:
        self.address, self.gpus_per_run = address, gpus_per_run
        self.threads = torch.get_num_threads()

    def __enter__(self) -> OnRay:
        before = signal.getsignal(signal.SIGTERM)
        with ExitStack() as opened:
            if self.address is None:
                self.ray = _start_own(opened)
            else:
                self.ray = _import_ray()
                _refuse_silent(self.ray, self.address)
                opened.callback(self.ray.shutdown)
                self.ray.init(address=self.address, log_to_driver=False, logging_level="CRITICAL")
            self._opened = opened.pop_all()
        signal.signal(signal.SIGTERM, before)  # Ray has replaced our handler
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self._opened.close()

    def check(self, plan: Sequence[Run], cohort: Cohort, folder: StudyFolder) -> None:
        """Refuse runs that fit on no node, and nodes that do not share this process's study folder and cohort."""
        needs = [self._need(run) for run in plan]
        self._refuse_unfit(needs)
        nodes = [node for node in self._nodes() if any(_fits(need, node) for need in needs)]
        with _token(cohort, folder) as job:
            looks = {self._look(job, node): node for node in nodes}
            self.ray.wait(list(looks), num_returns=len(looks), timeout=LOOK)
            if told := [f"node {_name(node)}: {problem}" for look, node in looks.items() if (problem := self._seen(look))]:
                raise ConfigError(f"{'; '.join(told)}. Every node must see the same folders; nothing was trained")

    def execute(
        self, plan: Sequence[Run], cohort: Cohort, folder: StudyFolder, watcher: Watcher, on_record: Callable[[RunRecord], None]
    ) -> list[RunRecord]:
        """Submit each run when its teachers are finished; an interruption stops remote work after it has saved its state.

        Raises:
            RareDistillError: an unfinished run was started with different code or versions.
            ConfigError: all nodes that could carry out the remaining runs are gone.
            OSError: the shared disk is full or cannot be written.
        """
        study = _Study(self, cohort, folder, watcher, on_record)
        try:
            study.carry_out(plan)
        except BaseException:
            self._stop(list(study.running))
            raise
        return [study.records[run.id] for run in plan]

    def submit(self, job: Job, run: Run, records: dict[str, RunRecord]) -> Any:
        """Submit a run to the cluster; Ray restarts it if its worker or its node dies."""
        need = self._need(run)
        task = self.ray.remote(work).options(num_cpus=need["CPU"], num_gpus=need.get("GPU", 0), max_retries=RETRIES)
        return task.remote(job, run, records, int(need["CPU"]))

    def _need(self, run: Run) -> Need:
        """A share of a GPU or several whole GPUs, if the cluster has any and the run may use them; else as many cores as driver threads.

        A run on a CPU therefore has the same bits as on this machine, and can be resumed here.
        """
        wanted, devices = run.entry.settings.accelerator, run.entry.settings.devices
        on_gpu = wanted == "cuda" or (wanted == "auto" and any("GPU" in node["Resources"] for node in self._nodes()))
        if not on_gpu:
            return {"CPU": self.threads}
        return {"GPU": devices if devices > 1 else self.gpus_per_run, "CPU": devices}

    def _nodes(self) -> list[dict[str, Any]]:
        return [node for node in self.ray.nodes() if node["Alive"]]

    def _refuse_unfit(self, needs: Sequence[Need]) -> None:
        nodes = self._nodes()
        if unfit := [need for need in needs if not any(_fits(need, node) for node in nodes)]:
            have = "; ".join(f"{_name(node)}: {_resources(node['Resources'])}" for node in nodes)
            raise ConfigError(
                f"a run needs {_resources(unfit[0])}, which no node has ({have}). Set OMP_NUM_THREADS to the cores that a run may take, "
                "--gpus-per-run to the share of a GPU, or training.accelerator=cpu; or add such a node"
            )

    def is_fit(self, runs: Sequence[Run]) -> bool:
        """Whether a live node can carry out at least one of the runs."""
        return any(_fits(self._need(run), node) for node in self._nodes() for run in runs)

    def _look(self, job: Job, node: dict[str, Any]) -> Any:
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        here = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
        return self.ray.remote(look).options(num_cpus=0, max_retries=0, scheduling_strategy=here).remote(job)

    def _seen(self, look: Any) -> str:
        try:
            return str(self.ray.get(look, timeout=0))
        except self.ray.exceptions.GetTimeoutError:
            return f"it did not check the study's folder within {LOOK:.0f} s; check that its disks respond"
        except self.ray.exceptions.RayError as error:
            return f"it cannot work ({last_line(error)}); install this version of raredistill for the Python that `ray start` runs in there"

    def _stop(self, running: Sequence[Any]) -> None:
        for reference in running:
            self.ray.cancel(reference)  # like Ctrl-C for the worker: it saves its state and ends
        if running:
            self.ray.wait(list(running), num_returns=len(running), timeout=STOP)


class _Study:
    """The state of the driver while a plan is carried out."""

    def __init__(
        self, engine: OnRay, cohort: Cohort, folder: StudyFolder, watcher: Watcher, on_record: Callable[[RunRecord], None]
    ) -> None:
        self.engine, self.cohort, self.folder, self.watcher, self.on_record = engine, cohort, folder, watcher, on_record
        self.job = _job(cohort, folder)
        self.records: dict[str, RunRecord] = {}
        self.running: dict[Any, Run] = {}
        self.told: dict[str, int] = {}
        self.fit = time.monotonic()

    def carry_out(self, plan: Sequence[Run]) -> None:
        """Submit runs as their teachers finish, and monitor them until the last has ended."""
        waiting = list(plan)
        while waiting or self.running:
            with whole():  # inside Ray's own code, a signal ends the process silently
                waiting = self._step(waiting)
            time.sleep(POLL)

    def _step(self, waiting: list[Run]) -> list[Run]:
        """Submit ready runs, collect finished ones, report progress; returns the runs that still wait."""
        ready = [run for run in waiting if all(teacher.id in self.records for teacher in run.teachers)]
        left = [run for run in waiting if run not in ready]
        self.running.update({self._submit(run): run for run in ready})
        done, _ = self.engine.ray.wait(list(self.running), num_returns=len(self.running), timeout=0)
        for reference in done:
            run = self.running.pop(reference)
            if not self._take(run, self._outcome(reference, run)):
                left.append(run)
        for run in self.running.values():
            self._tell(run, self.folder.run(run.id).draft)
        self._refuse_nobody([*left, *self.running.values()])
        return left

    def _submit(self, run: Run) -> Any:
        return self.engine.submit(self.job, run, {teacher.id: self.records[teacher.id] for teacher in run.teachers})

    def _outcome(self, reference: Any, run: Run) -> Outcome:
        try:
            found: Outcome = self.engine.ray.get(reference)
        except self.engine.ray.exceptions.RayError as error:
            # Its worker died every time, for example of too little memory. The other runs continue.
            told = f"its worker died {RETRIES + 1} times ({last_line(error)}); its state is saved, and the same command resumes it"
            return describe(run, self.cohort).failed(told), False
        if isinstance(found, BaseException):
            raise found
        return found

    def _take(self, run: Run, outcome: Outcome) -> bool:
        if not isinstance(outcome, tuple):
            return False  # another process works on it
        record, reused = outcome
        self.records[run.id] = record
        self.on_record(record)
        if not reused:
            self._tell(run, self.folder.run(run.id))
        self.watcher.run_done(run, record, reused=reused)
        return True

    def _tell(self, run: Run, folder: RunFolder) -> None:
        """Report the epochs that a run has logged since the last check; epochs repeated after a node's death are reported once."""
        epochs = list(_epochs(folder.epochs))
        if epochs and run.id not in self.told:
            self.watcher.run_started(run, run.entry.settings.epochs)
            self.told[run.id] = 0
        for record in epochs[self.told.get(run.id, 0) :]:
            self.watcher.epoch_done(run, record)
            self.told[run.id] += 1

    def _refuse_nobody(self, runs: Sequence[Run]) -> None:
        if not runs or self.engine.is_fit(runs):
            self.fit = time.monotonic()
        elif time.monotonic() - self.fit > NOBODY:
            raise ConfigError(
                f"the nodes that could carry out the {len(runs)} remaining runs have been gone for {NOBODY:.0f} s; "
                "all states are saved: the same command resumes on the nodes available then or, without --on ray, on this machine"
            )


def work(job: Job, run: Run, records: dict[str, RunRecord], threads: int) -> Outcome:
    """Carry out one run on a worker as a local study does; an error that would stop a local study is returned as a value."""
    # Ray's workers block Ctrl-C, so it would never arrive while it is delayed to the end of a step.
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    try:
        os.chdir(job.here)
        torch.set_num_threads(threads)
        plugins.load_again(job.plugins)
        refuse_changed([run], StudyFolder(job.out))
        found = attempt(run, Cohort.load(job.cohort), StudyFolder(job.out), Unwatched(), records)
    except (RareDistillError, OSError) as error:
        return error
    if found is None:
        time.sleep(RETRY_AFTER)  # a process outside the cluster, or the lock of a node that has just died
    return found


def look(job: Job) -> str:
    """Message on why a node cannot work on a study; empty if it can."""
    try:
        os.chdir(job.here)
        if not job.token.is_file() or job.token.read_text(encoding="utf-8") != job.word:
            return f"its {job.out} is not the driver's; share that folder with all nodes, under the same path"
        with lock_if_free(job.token) as free:
            if free:
                return f"locks on {job.out} do not reach it, so two nodes could start one run; mount it with locks (NFS 4, Lustre -o flock)"
        if Cohort.load(job.cohort).hash != job.cohort_hash:
            return f"its {job.cohort} is another cohort"
    except OSError as error:
        return f"{error.filename}: {error.strerror} on that node; share that folder with all nodes, under the same path"
    except DataError as error:
        return str(error)
    return _differing(job.made_with)


def _differing(made_with: dict[str, dict[str, str]]) -> str:
    now = _made_with()
    differing = [name for part, known in made_with.items() for name, value in known.items() if now[part].get(name) != value]
    return f"it has other versions of {', '.join(differing)}; install the same on all nodes" if differing else ""


def _made_with() -> dict[str, dict[str, str]]:
    return {"versions": versions(), "code": code()}


def _job(cohort: Cohort, folder: StudyFolder) -> Job:
    here = Path.cwd()
    token = here / folder.path / f".token-{secrets.token_hex(4)}"
    return Job(here, here / folder.path, here / cohort.root, cohort.hash, token, secrets.token_hex(16), _made_with(), plugins.loaded())


@contextmanager
def _token(cohort: Cohort, folder: StudyFolder) -> Iterator[Job]:
    """Write a file in the study's folder and hold its lock: a node that can read it and finds it locked shares the folder."""
    job = _job(cohort, folder)
    try:
        job.token.write_text(job.word, encoding="utf-8")
        with locked(job.token):
            yield job
    finally:
        job.token.unlink(missing_ok=True)


def _import_ray() -> Any:
    os.environ.update(ENVIRONMENT)
    try:
        import ray
    except ImportError:
        raise ConfigError("--on ray needs Ray, which is not installed; install it with: pip install 'raredistill[ray]'") from None
    return ray


def _start_own(opened: ExitStack) -> Any:
    """A Ray on this machine for this process alone: loopback only, with a secret token, its files in a folder that only its user can enter.

    Raises:
        ConfigError: Ray listens to other machines all the same.
    """
    opened.callback(_restore, {name: os.environ.get(name) for name in (*OWN, "RAY_AUTH_TOKEN")})
    os.environ.update({**OWN, "RAY_AUTH_TOKEN": secrets.token_hex(32)})
    ray = _import_ray()
    # Ray opens its own folder to everyone; nobody else can enter the one around it. Its sockets allow only short names.
    private = opened.enter_context(TemporaryDirectory(prefix="ray-", dir="/tmp", ignore_cleanup_errors=True))
    opened.callback(ray.shutdown)
    ray.init(
        address="local", include_dashboard=False, log_to_driver=False, logging_level="CRITICAL", object_store_memory=STORE,
        _temp_dir=f"{private}/r",
    )  # fmt: skip
    if (listens := ray.util.get_node_ip_address()) != LOOPBACK:
        raise ConfigError(f"Ray was imported before and listens on {listens}, for other machines too; start the study in a new process")
    return ray


def _restore(environment: Mapping[str, str | None]) -> None:
    for name, value in environment.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


def _refuse_silent(ray: Any, address: str) -> None:
    if told := failure_of(ray.init, ANSWER, address=address, log_to_driver=False):
        raise ConfigError(
            f"no Ray cluster responds at {address} ({told}). Start it with `ray start --head --port=6379` on one node and "
            "`ray start --address=HEAD:6379` on this and all others, and give --address HEAD:6379; or leave --address out"
        )


def _fits(need: Need, node: dict[str, Any]) -> bool:
    return all(node["Resources"].get(name, 0) >= amount for name, amount in need.items())


def _name(node: dict[str, Any]) -> str:
    return f"{node['NodeManagerHostname']} ({node['NodeName']})"


def _resources(amounts: dict[str, float]) -> str:
    return ", ".join(f"{amounts.get(name, 0):g} {name}" for name in ("CPU", "GPU") if name == "CPU" or name in amounts)


def _epochs(path: Path) -> Iterator[dict[str, Any]]:
    """The complete lines of a log that another node may be writing."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    except OSError:
        return  # not started, or just finished and renamed
    for line in lines:
        try:
            yield json.loads(line)
        except ValueError:
            return
