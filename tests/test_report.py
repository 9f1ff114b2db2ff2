"""The report: verdicts that follow from the numbers, tables that equal scikit-learn, a page that a browser opens without a fault."""

import csv
import json
import re
import shutil
import subprocess

import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import f1_score

from raredistill import predictions
from raredistill.errors import DataError
from raredistill.files import write_json
from raredistill.report import summary_table, write_report
from raredistill.report.results import read_results
from raredistill.report.tables import latex, safe
from raredistill.report.verdicts import verdicts

CLASSES = ("healthy", "HGG", "LGG")
SKILL = {"small": 0.8, "taught": 2.5, "odd": 0.8}


def table(run, skill, fold, seed):
    """Predictions of 20 patients with 4 slices each; skill is the height of the true class' logit."""
    generator = np.random.default_rng([fold, seed, int(10 * skill)])
    rows = []
    for checkpoint in ("best", "last"):
        for patient in range(20):
            grade = "LGG" if patient % 3 == 0 else "HGG"
            for index in range(4):
                label = "healthy" if index < 2 else grade
                logits = generator.normal(size=3) + skill * (np.array(CLASSES) == label)
                rows.append(
                    (run, f"p{fold}-{patient}-{index}", f"p{fold}-{patient}", grade, "test", 0, fold, seed, checkpoint, label, logits)
                )
    return pd.DataFrame(rows, columns=list(predictions.COLUMNS))


def write_study(root, *, entries=tuple(SKILL), waiting=()):
    runs = []
    for name in entries:
        for fold in range(2):
            run = {
                "id": f"{name}-f{fold}", "name": name, "kind": "baseline" if name == "small" else "distilled", "direction": "",
                "model": "other" if name == "odd" else "small_cnn", "loss": "cross_entropy", "method": "kd", "teacher": "",
                "teacher_name": "t<b>",
                "external_teacher": False, "channels": ["flair"], "repeat": 0, "fold": fold, "seed": 0,
                "status": "waiting" if name in waiting else "done", "error": "", "parameters": 1000, "flops": 1, "bytes": 4000,
            }  # fmt: skip
            runs.append(run)
            if run["status"] == "done":
                write_run(root / "runs" / run["id"], run, SKILL[name])
    counts = [{"class": name, "slices": 40, "patients": 20} for name in CLASSES]
    cohort = {
        "name": "=c<script>", "hash": "h" * 64, "classes": list(CLASSES), "background": "healthy", "channels": ["flair"], "samples": 160,
        "patients": 40, "provenance": {"settings": {"generated": True}}, "counts": counts, "size": [16, 16],
    }  # fmt: skip
    study = {
        "name": "s", "command": "raredistill study", "config": {"name": "s"},
        "cohort": cohort, "protocol": "outer", "rare": "LGG",
        "split_table": [{"repeat": 0, "fold": 0, "side": "train", "class": "LGG", "slices": 1, "patients": 1}], "splits": [],
        "versions": {},
        "machine": {}, "runs": runs,
    }  # fmt: skip
    write_json(root / "study.json", study)
    return root


def write_run(folder, run, skill):
    folder.mkdir(parents=True)
    write_json(folder / "run.json", run)
    f1 = dict.fromkeys(CLASSES, 0.5)
    part = {"loss": 1.0, "macro_f1": 0.5, "f1": f1}
    (folder / "epochs.jsonl").write_text("".join(json.dumps({"epoch": n, "train": part, "validation": part}) + "\n" for n in range(3)))
    predictions.write(folder / "predictions.parquet", table(run["id"], skill, run["fold"], run["seed"]), CLASSES, "healthy")


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    root = write_study(tmp_path_factory.mktemp("report") / "study")
    write_report(root)
    return root


def test_a_real_gain_is_shown_and_a_missing_control_is_said(study):
    found = {record["entry"]: record for record in verdicts(read_results(study))}
    assert found["taught"]["verdict"] == "helps"
    assert found["taught"]["control"] == "small"
    assert found["taught"]["low"] > 0
    assert found["odd"]["verdict"] == "no control"
    assert "cannot be judged" in found["odd"]["sentence"]


def test_two_equal_sides_are_not_shown(tmp_path, monkeypatch):
    monkeypatch.setitem(SKILL, "taught", SKILL["small"])
    root = write_study(tmp_path / "s", entries=("small", "taught"))
    (record,) = verdicts(read_results(root))
    assert record["verdict"] == "not shown"
    assert record["rare_f1"] == pytest.approx(0)


def test_scores_equal_scikit_learn(study):
    found = summary_table(study).set_index("entry")
    expected = []
    for fold in range(2):
        rows = table("x", SKILL["small"], fold, 0).query("checkpoint == 'best'")
        predicted = np.array(CLASSES)[np.stack(rows["logits"]).astype(np.float32).argmax(1)]
        expected.append(f1_score(rows["label"], predicted, labels=["LGG"], average="macro"))
    assert found.loc["small", "LGG f1"] == pytest.approx(np.mean(expected), abs=1e-6)


def test_every_table_has_its_csv_and_tex_and_every_figure_its_svg_and_png(study):
    names = {path.stem for path in (study / "report" / "tables").glob("*.csv")}
    assert (
        names
        == {path.stem for path in (study / "report" / "tables").glob("*.tex")}
        >= {"summary", "verdicts", "overall", "by_class", "runs"}
    )
    figures = {path.stem for path in (study / "report" / "figures").glob("*.svg")}
    assert (
        figures == {path.stem for path in (study / "report" / "figures").glob("*.png")} >= {"forest", "classes", "confusion-0", "curves-0"}
    )


def test_the_page_is_one_file_that_escapes_and_warns(study):
    page = (study / "report" / "report.html").read_text()
    assert "=c&lt;script&gt;" in page
    assert "<script>=" not in page
    assert "generated (a phantom)" in page
    assert not re.search(r"(src=|href=|url\()[\"']?https?:", page)


def test_an_unfinished_study_is_reported_and_marked(tmp_path):
    root = write_study(tmp_path / "s", waiting=("taught", "odd"))
    assert "unfinished: 4 of 6" in write_report(root).read_text()


def test_no_study_is_told(tmp_path):
    with pytest.raises(DataError, match=r"study\.json"):
        write_report(tmp_path)


def test_formulas_and_latex_signs_are_quoted(tmp_path):
    made = pd.DataFrame({"a_b": ["=1+1", "ok"], "n": [-0.5, 1.0]})
    text = safe(made).to_csv(index=False)
    assert [row["a_b"] for row in csv.DictReader(text.splitlines())] == ["'=1+1", "ok"]
    assert r"a\_b" in latex(made)


def test_chromium_opens_the_page(study, tmp_path):
    browser = shutil.which("chromium")
    if browser is None:
        pytest.skip("no chromium on this machine")
    flags = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-background-networking",
        "--disable-component-update",
        "--disable-sync",
    ]
    page = study / "report" / "report.html"
    # A script of the test's own reports what it finds through the title, which the dumped page then shows.
    probe = """<script>
    document.querySelector('#answer th button').click();
    const sorted = document.querySelector('#answer th').getAttribute('aria-sort');
    const box = document.querySelector('input[data-entry="0"]'); box.click();
    const hidden = document.querySelector('[data-shown="0"]').hidden;
    const fits = document.documentElement.scrollWidth <= window.innerWidth;
    document.title = ['probe', sorted, hidden, fits, document.querySelectorAll('section').length].join(' ');
    </script>"""
    probed = tmp_path / "probed.html"
    probed.write_text(page.read_text().replace("</body>", probe + "</body>"))
    command = [
        browser,
        *flags,
        f"--user-data-dir={tmp_path}/profile",
        "--window-size=500,900",
        "--enable-logging=stderr",
        "--dump-dom",
        probed.as_uri(),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert "<title>probe ascending true true 7</title>" in done.stdout
    assert "CONSOLE" not in done.stderr
