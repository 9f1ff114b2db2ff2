"""Plug-ins: other people's methods through the real command line, editing nothing of ours, and every way in which one may go wrong."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml

from conftest import write_tiny
from raredistill import plugins, testing
from raredistill.config import check_config, entries_of
from raredistill.errors import ConfigError
from raredistill.runs.run import plugins_of

EXAMPLES = Path(__file__).parents[1] / "examples"
COMMAND = [sys.executable, "-c", "from raredistill.cli import main; main()"]


def raredistill(*arguments, cwd=None):
    return subprocess.run([*COMMAND, *map(str, arguments)], capture_output=True, text=True, check=False, cwd=cwd)


def failures_of(file):
    """Of the things that one file registers: other tests of this process may have registered theirs."""
    own = [plugin for plugin in plugins.registered() if plugin.spec == str(file.resolve())]
    assert own
    return [failure for plugin in own for failure in testing.check_plugin(plugin)]


@pytest.fixture
def loaded():
    """Loads plug-ins, and takes them out of the registries afterwards."""
    specs = []

    def load(spec):
        specs.append(str(spec))
        plugins.load(str(spec))

    yield load
    for spec in specs:
        plugins.forget(spec)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("plugins")
    write_tiny(folder / "cohort", size=32)
    runs = [
        {"name": "big", "model": "patchwork"}, {"name": "small", "model": "small_cnn"},
        {"name": "taught", "model": "small_cnn", "teacher": "big", "method": "direction", "method_options": {"weight": 2}},
    ]  # fmt: skip
    training = {
        "epochs": 1, "batch_size": 16, "accelerator": "cpu", "loss": "poly1",
        "augmentation": {"preset": "default", "rotation": 5, "steps": ["grain"]},
    }  # fmt: skip
    raw = {"name": "s", "cohort": str(folder / "cohort"), "splits": {"folds": 2, "validation_share": 0.34}, "training": training}
    (folder / "study.yaml").write_text(yaml.safe_dump({**raw, "runs": runs}))
    return folder


@pytest.mark.slow
def test_a_strangers_four_additions_train_through_the_command_line(place):
    without = raredistill("study", "study.yaml", "--out", "s", cwd=place)
    assert without.returncode == 2
    assert "--plugin" in without.stderr
    assert "Traceback" not in without.stderr
    given = [part for name in ("distiller", "loss", "network", "augmentation") for part in ("--plugin", EXAMPLES / f"{name}.py")]
    done = raredistill("study", "study.yaml", "--out", "s", *given, cwd=place)
    assert done.returncode == 0, done.stderr
    runs = json.loads((place / "s" / "study.json").read_text())["runs"]
    assert {(run["name"], run["status"]) for run in runs} == {("big", "done"), ("small", "done"), ("taught", "done")}
    taught = next(run for run in runs if run["name"] == "taught")
    assert {"distiller direction", "loss poly1", "augmentation grain"} <= set(taught["made_with"]["code"])
    # Prediction rebuilds the network, which is the plug-in's too.
    big = next(run["id"] for run in runs if run["name"] == "big")
    refused = raredistill("predict", Path("s", "runs", big), "cohort", cwd=place)
    assert refused.returncode == 2
    assert "patchwork" in refused.stderr
    assert "--plugin" in refused.stderr
    assert raredistill("predict", Path("s", "runs", big), "cohort", "--plugin", EXAMPLES / "network.py", cwd=place).returncode == 0


def test_a_strangers_source_is_read_by_workers(tmp_path):
    (tmp_path / "raw").mkdir()
    for label in "ab":
        for number in range(3):
            values = np.random.default_rng([number, ord(label)]).integers(0, 255, (4, 16, 16), dtype=np.uint8)
            np.save(tmp_path / "raw" / f"{label}-{label}{number}.npy", values)
    source = EXAMPLES / "source.py"
    arguments = ["npy_folder", "raw", "--plugin", source, "--workers", 2]
    done = raredistill("prepare", *arguments, "--out", "cohort", "--size", 16, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "24 samples of 6 patients" in done.stdout
    checked = raredistill("check", source, "--data", "raw", cwd=tmp_path)
    assert (checked.returncode, "keeps every promise" in checked.stdout) == (0, True), checked.stderr


@pytest.mark.parametrize("name", ["distiller", "loss", "network", "augmentation"])
def test_the_examples_keep_every_promise(loaded, name):
    loaded(EXAMPLES / f"{name}.py")
    assert failures_of(EXAMPLES / f"{name}.py") == []
    code = [line for line in (EXAMPLES / f"{name}.py").read_text().splitlines() if line.strip()]
    assert len(code) <= 30


HEAD = "import torch, raredistill\nfrom torch.nn import functional as F\n"
WRONG = {
    "lets gradients reach the teacher": ("a gradient reaches the teacher", "return ((student.logits - teacher.logits) ** 2).mean()"),
    "sums over the batch": ("not a mean over the batch", "return ((student.logits - teacher.logits.detach()) ** 2).sum()"),
    "overflows": ("not finite", "return student.logits.exp().pow(9).mean() + 0 * teacher.logits.detach().sum()"),
}  # fmt: skip


@pytest.mark.parametrize("wrong", WRONG)
def test_what_a_stranger_gets_wrong_is_said_in_words(tmp_path, loaded, wrong):
    said, body = WRONG[wrong]
    (tmp_path / "mine.py").write_text(f"{HEAD}@raredistill.distiller\ndef mine(student, teacher):\n    {body}\n")
    loaded(tmp_path / "mine.py")
    failures = failures_of(tmp_path / "mine.py")
    assert any(said in failure.problem for failure in failures)
    assert {failure.subject for failure in failures} == {"distiller mine"}


REFUSED = {
    "raises": ("raise ValueError('no')", "it fails while it is imported: ValueError: no (line 1)"),
    "exits": ("import sys; sys.exit(3)", "it fails while it is imported: SystemExit"),
    "prints": (f"{HEAD}print('hello')\n@raredistill.loss\ndef mine(logits, target): return 0", "it prints while it is imported ('hello')"),
    "registers nothing": ("x = 1", "it registers nothing"),
    "is not Python": ("def", "SyntaxError"),
    "lacks a library": ("import nonexistent_library", "it imports nonexistent_library, which is not installed"),
    "shadows": (f"{HEAD}@raredistill.distiller\ndef kd(student, teacher): return 0", "distiller kd"),
    "shadows timm": (f"{HEAD}@raredistill.network\ndef resnet18(channels): return 0", "network resnet18"),
    "registers twice": (
        f"{HEAD}@raredistill.loss\ndef mine(logits, target): return 0\n@raredistill.loss(name='mine')\ndef b(logits, target): return 0",
        "the loss mine is registered by",
    ),
    "has a wrong signature": (f"{HEAD}@raredistill.loss\ndef mine(a, b): return 0", "its first parameters are logits and target"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_a_plugin_that_cannot_be_used_is_one_message_and_leaves_nothing(tmp_path, name):
    text, said = REFUSED[name]
    (tmp_path / "bad.py").write_text(text)
    before = plugins.registered()
    with pytest.raises(ConfigError) as caught:
        plugins.load(str(tmp_path / "bad.py"))
    assert said in str(caught.value)
    assert "bad.py" in str(caught.value)
    assert plugins.registered() == before


def test_a_plugin_that_hangs_is_interrupted(tmp_path, monkeypatch):
    monkeypatch.setattr(plugins, "LIMIT", 0.3)
    (tmp_path / "slow.py").write_text("while True: pass")
    with pytest.raises(ConfigError, match=r"its import did not end within 0\.3 s"):
        plugins.load(str(tmp_path / "slow.py"))


def test_the_command_line_refuses_a_plugin_with_one_message(tmp_path):
    (tmp_path / "bad.py").write_text("raise ValueError('no')")
    done = raredistill("methods", "--plugin", "bad.py", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("raredistill: plug-in bad.py: it fails")
    assert len(done.stderr.splitlines()) == 1
    assert raredistill("methods", "--plugin", "nowhere.py", cwd=tmp_path).returncode == 2


def test_an_edited_plugin_names_other_runs_and_what_is_built_in_keeps_its_names(tmp_path, loaded):
    def used(**run):
        raw = {"name": "s", "cohort": "c", "runs": [{"name": "a", "model": "small_cnn"}, {"name": "b", "model": "small_cnn", **run}]}
        return plugins_of(entries_of(check_config(raw, "x"))[1])

    assert used(teacher="a", method="kd") == {}
    text = f"{HEAD}@raredistill.distiller\ndef mine(student, teacher): return F.mse_loss(student.logits, teacher.logits.detach())"
    digests = []
    for version in (text, text + "  # edited"):
        (tmp_path / "mine.py").write_text(version)
        loaded(tmp_path / "mine.py")
        digests.append(used(teacher="a", method="mine")["distiller mine"])
        plugins.forget(str(tmp_path / "mine.py"))
    assert digests[0] != digests[1]


def test_a_method_that_stands_in_a_module_beside_the_plugin_is_hashed_too(tmp_path, loaded, monkeypatch):
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    (tmp_path / "mine.py").write_text("import raredistill_test_beside\n")
    digests = []
    for body in ("return F.mse_loss(student.logits, teacher.logits)", "return 2 * F.mse_loss(student.logits, teacher.logits)"):
        (tmp_path / "raredistill_test_beside.py").write_text(f"{HEAD}@raredistill.distiller\ndef beside(student, teacher):\n    {body}\n")
        sys.modules.pop("raredistill_test_beside", None)
        loaded(tmp_path / "mine.py")
        digests.append(plugins.sources_of([("distiller", "beside")])["distiller beside"])
        plugins.forget(str(tmp_path / "mine.py"))
    sys.modules.pop("raredistill_test_beside", None)
    assert digests[0] != digests[1]


def test_a_process_loads_again_what_its_parent_had_loaded_and_notices_an_edit(tmp_path, loaded):
    (tmp_path / "mine.py").write_text(f"{HEAD}@raredistill.loss\ndef mine(logits, target): return F.cross_entropy(logits, target)")
    loaded(tmp_path / "mine.py")
    known = {spec: digest for spec, digest in plugins.loaded().items() if spec.startswith(str(tmp_path.resolve()))}
    plugins.forget(str(tmp_path / "mine.py"))
    plugins.load_again(known)
    assert known.items() <= plugins.loaded().items()
    plugins.forget(str(tmp_path / "mine.py"))
    (tmp_path / "mine.py").write_text((tmp_path / "mine.py").read_text() + "\n")
    with pytest.raises(ConfigError, match="not the same in every process"):
        plugins.load_again(known)


def test_strengths_of_augmentation_are_settings():
    def settings(augmentation):
        raw = {"name": "s", "cohort": "c", "training": {"augmentation": augmentation}, "runs": [{"name": "a", "model": "small_cnn"}]}
        return entries_of(check_config(raw, "x"))[0].settings

    changed = settings({"preset": "default", "rotation": 3}).strengths
    assert (changed.rotation, changed.hflip, changed.scale) == (3, 0.5, (0.9, 1.1))
    assert settings({"hflip": 0.25}).strengths.rotation == 0
    assert settings("none").strengths is None
    for wrong, said in (({"rotate": 3}, "rotation"), ({"hflip": 2}, "hflip"), ({"preset": "defualt"}, "default"), ("thesi", "thesis")):
        with pytest.raises(ConfigError, match=said):
            settings(wrong)
