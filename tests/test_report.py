"""The report: verdicts that follow from the numbers, tables that equal scikit-learn, a page that a browser opens without a fault."""

import csv
import html
import itertools
import json
import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from matplotlib import colormaps
from matplotlib.colors import to_hex
from scipy import stats
from scipy.special import softmax
from sklearn.metrics import (
    brier_score_loss,
    cohen_kappa_score,
    f1_score,
    log_loss,
    matthews_corrcoef,
    precision_recall_curve,
    recall_score,
    roc_curve,
)  # fmt: skip

from raredistill import predictions
from raredistill.checkpoint import Promise, save
from raredistill.errors import DataError
from raredistill.evaluation import gain_test
from raredistill.files import seal, sha256, write_json
from raredistill.reports import analyses, figures, summary_table, write_report
from raredistill.reports.decision import Decision
from raredistill.reports.headline import headline
from raredistill.reports.pairs import make_pairs
from raredistill.reports.paper import latex, read_verdicts
from raredistill.reports.results import read_results
from raredistill.reports.tables import confusion_rows, safe
from raredistill.reports.verdicts import family, notes_on_tests, verdicts
from raredistill.runs.layout import RESULTS

CLASSES = ("healthy", "HGG", "LGG")
FOLDS = 3
PROMISE = Promise("small_cnn", "linear", 0.0, CLASSES, ("flair",), 16, (0.5,), (0.5,), None, ("p",), False, "")
SKILL = {"small": 0.8, "taught": 2.5, "odd": 0.8}


def table(run, skill, fold, seed):
    """Predictions of 20 test and 20 validation patients with 4 slices each; skill is the height of the true class' logit."""
    generator = np.random.default_rng([fold, seed, int(10 * skill)])
    rows = []
    for (part, group), checkpoint, patient, index in itertools.product(
        (("test", fold), ("validation", (fold + 1) % FOLDS)), ("best", "last"), range(20), range(4)
    ):
        grade = "LGG" if patient % 3 == 0 else "HGG"
        label = "healthy" if index < 2 else grade
        logits = generator.normal(size=3) + skill * (np.array(CLASSES) == label)
        name = f"p{group}-{patient}"
        rows.append((run, f"{name}-{index}", name, grade, part, 0, fold, seed, checkpoint, label, logits))
    return pd.DataFrame(rows, columns=list(predictions.COLUMNS))


def write_study(root, *, entries=tuple(SKILL), waiting=(), folds=FOLDS, shared=False, seeds=1):
    runs = []
    for name in entries:
        for fold, seed in itertools.product(range(folds), range(seeds)):
            run = {
                "id": f"{name}-f{fold}" + (f"-s{seed}" if seed else ""), "name": name,
                "kind": "baseline" if name == "small" else "distilled", "direction": "",
                "model": "other" if name == "odd" else "small_cnn", "loss": "cross_entropy", "method": "kd", "teacher": "",
                "teacher_name": "t<b>",
                "external_teacher": False, "channels": ["flair"], "repeat": 0, "fold": fold, "seed": seed,
                "status": "waiting" if name in waiting else "done", "error": "", "parameters": 1000, "flops": 1, "bytes": 4000,
            }  # fmt: skip
            runs.append(run)
            if run["status"] == "done":
                write_run(root / "runs" / run["id"], run, SKILL[name], shared=shared)
    counts = [{"class": name, "slices": 40, "patients": 20} for name in CLASSES]
    cohort = {
        "name": "=c<script>", "hash": "h" * 64, "classes": list(CLASSES), "background": "healthy", "channels": ["flair"], "samples": 160,
        "patients": 40, "provenance": {"settings": {"generated": True}}, "counts": counts, "size": [16, 16],
    }  # fmt: skip
    study = {
        "name": "s", "command": "raredistill study", "config": {"name": "s"},
        "cohort": cohort, "protocol": "holdout" if shared else "outer", "rare": "LGG",
        "split_table": [{"repeat": 0, "fold": 0, "side": "train", "class": "LGG", "slices": 1, "patients": 1}], "splits": [],
        "versions": {},
        "machine": {}, "runs": runs,
    }  # fmt: skip
    write_json(root / "study.json", study)
    names = [[f"p{group}-{n}" for n in range(20)] for group in range(FOLDS)]
    for fold in range(folds):
        sides = {"train": names[(fold + 2) % FOLDS], "validation": names[(fold + 1) % FOLDS], "test": names[fold]}
        write_json(root / "splits" / f"r0f{fold}.json", {"patients": sides})
    return root


def write_run(folder, run, skill, *, shared):
    folder.mkdir(parents=True)
    f1 = dict.fromkeys(CLASSES, 0.5)
    part = {"loss": 1.0, "macro_f1": 0.5, "f1": f1}
    (folder / "epochs.jsonl").write_text("".join(json.dumps({"epoch": n, "train": part, "validation": part}) + "\n" for n in range(3)))
    made = table(run["id"], skill, 0, run["seed"]) if shared else table(run["id"], skill, run["fold"], run["seed"])
    predictions.write(folder / "predictions.parquet", made.assign(fold=run["fold"]), CLASSES, "healthy")
    for name in ("best", "last"):
        save(folder / f"{name}.safetensors", {}, PROMISE)
    seal_run(folder, run)


def reseal(folder):
    """The run's record after a test has given it other results on purpose."""
    record = json.loads((folder / "run.json").read_text())
    seal_run(folder, {key: value for key, value in record.items() if key not in ("files", "seal")})


def seal_run(folder, run):
    write_json(folder / "run.json", seal({**run, "files": {name: sha256(folder / name) for name in RESULTS}}))


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    root = write_study(tmp_path_factory.mktemp("report") / "study")
    write_report(root)
    return root


@pytest.fixture(scope="module")
def two_seeds(tmp_path_factory):
    return write_study(tmp_path_factory.mktemp("report") / "two", seeds=2)


def test_a_real_gain_is_shown_and_a_missing_control_is_said(two_seeds):
    found = judged(two_seeds)
    assert found["taught"]["verdict"] == "helps"
    assert found["taught"]["control"] == "small"
    assert found["taught"]["low"] > 0
    assert found["odd"]["verdict"] == "described"
    assert "no finished baseline" in found["odd"]["sentence"]


def judged(study):
    results = read_results(study)
    return {record["entry"]: record for record in verdicts(make_pairs(results), "LGG")}


def counted(skill, fold, seed, checkpoint="last", matched=True):
    """Correct calls, calls and samples of LGG by patient, the rare logit lowered until validation calls as many as there are."""
    both = table("x", skill, fold, seed).query("checkpoint == @checkpoint")
    logits = np.stack(both["logits"]).astype(np.float32).astype(float)
    test, rare = (both["split"] == "test").to_numpy(), (both["label"] == "LGG").to_numpy()
    margin = logits[:, 2] - logits[:, :2].max(axis=1)
    if matched:
        ordered, wanted = np.sort(margin[~test])[::-1], rare[~test].sum()
        margin = margin - (ordered[wanted - 1] + ordered[wanted]) / 2
    rows = pd.DataFrame({"patient": both["patient"], "tp": (margin > 0) & rare, "pp": margin > 0, "ap": rare})[test]
    return rows.groupby("patient")[["tp", "pp", "ap"]].sum()


def test_the_verdict_is_the_gain_test_at_matched_thresholds_of_the_last_epoch(two_seeds):
    def tested(checkpoint, matched):
        sides = [[pd.concat([counted(SKILL[name], fold, seed, checkpoint, matched) for fold in range(FOLDS)]) for seed in (0, 1)]
                 for name in ("small", "taught")]  # fmt: skip
        tp, pp = (np.array([[[run[key].to_numpy() for run in side]] for side in sides], dtype=float) for key in ("tp", "pp"))
        actual = sides[0][0]["ap"].to_numpy()
        return gain_test(tp, pp, actual, np.repeat(range(FOLDS), 20)[None], actual > 0)

    record, expected = judged(two_seeds)["taught"], tested("last", True)
    numbers = [record[key] for key in ("difference", "low", "high", "p", "p_holm", "detectable")]
    wanted = [expected.gain, expected.low, expected.high, expected.p, expected.p, expected.detectable]
    assert numbers == pytest.approx(wanted, rel=1e-6)
    assert record["argmax"] == pytest.approx(tested("last", False).gain)
    assert record["best_checkpoint"] == pytest.approx(tested("best", False).gain)
    assert f"it gains {expected.gain:+.3f} [" in record["sentence"]
    assert "gain test over 2 runs of 3 folds; last epoch, threshold matched on validation" in record["basis"]
    # The corrected t over folds, seeds averaged first, is a reference: of 60 patients a fold trains on 20, as the fixture's splits say.
    gains = []
    for fold in range(FOLDS):
        sums = [[counted(SKILL[name], fold, seed, "best", False).sum() for seed in (0, 1)] for name in ("small", "taught")]
        scores = [np.mean([2 * each["tp"] / (each["pp"] + each["ap"]) for each in side]) for side in sums]
        gains.append(scores[1] - scores[0])
    t = np.mean(gains) / np.sqrt(np.var(gains, ddof=1) * (1 / FOLDS + 20 / 20))
    assert record["nb_p"] == pytest.approx(2 * stats.t.sf(t, FOLDS - 1), rel=1e-4)
    assert any("References, which decide nothing" in note and "Bayesian correlated t" in note for note in record["notes"])


def test_a_margin_of_the_study_makes_equivalence_a_verdict(tmp_path, monkeypatch):
    monkeypatch.setitem(SKILL, "taught", SKILL["small"])
    root = write_study(tmp_path / "s", entries=("small", "taught"), seeds=2)
    study = json.loads((root / "study.json").read_text())
    # Equal sides have an infinite error; sides that differ in little have a small one.
    for seed, name in ((0, "taught-f0"), (1, "taught-f0-s1")):
        changed = table(name, SKILL["small"], 0, seed)
        changed["logits"] = [row + np.array([0, 0, 0.2]) * (n % 7 == 0) for n, row in enumerate(changed["logits"])]
        predictions.write(root / "runs" / name / "predictions.parquet", changed, CLASSES, "healthy")
        reseal(root / "runs" / name)
    write_json(root / "study.json", {**study, "config": {"name": "s", "evidence": {"margin": 0.3}}})
    page = html.unescape(write_report(root).read_text())
    assert "makes no practical difference to LGG F1" in page
    assert "gains and losses above 0.3 are excluded" in page
    assert 'class="makes-no-practical-difference"' in page


def test_a_shared_test_set_is_about_these_networks_only(tmp_path):
    root = write_study(tmp_path / "s", entries=("small", "taught"), shared=True)
    record = judged(root)["taught"]
    assert record["verdict"] == "described"
    assert "This is about these networks only" in record["sentence"]
    assert "helps" not in record["sentence"].replace("whether the recipe helps is not tested", "")
    assert any("variance of training is not covered" in note for note in notes_on_tests(read_results(root)))


def test_one_run_is_described_and_not_tested(study):
    record = judged(study)["taught"]
    assert record["verdict"] == "described"
    assert "one run of each patient does not show the noise of training" in record["sentence"]
    assert record["p"] is None


def test_an_unfinished_study_whose_seeds_differ_by_fold_has_a_report(tmp_path):
    root = write_study(tmp_path / "s", entries=("small", "taught"), seeds=3)
    study = json.loads((root / "study.json").read_text())
    for run in study["runs"]:
        if (run["name"], run["fold"], run["seed"]) in {("taught", 1, 2), ("small", 2, 2), ("taught", 2, 2)}:
            run["status"] = "waiting"
    write_json(root / "study.json", study)
    page = html.unescape(write_report(root).read_text())
    assert "Left out: repeat 0, fold 1, seed 2 is missing on the other side." in page
    assert "Left out: repeat 0, fold 2, seed 2 is missing on both sides." in page
    assert judged(root)["taught"]["verdict"] == "helps"
    for run in study["runs"]:
        run["status"] = "done" if (run["fold"] + run["seed"]) % 3 else "waiting"
    write_json(root / "study.json", study)
    assert "no repeat and seed has all its folds" in html.unescape(write_report(root).read_text())


def test_controls_are_present_or_missing_with_a_reason(study):
    found = pd.read_csv(study / "report" / "tables" / "controls.csv").query("entry == 'taught'").set_index("control")
    assert found["present"].to_dict() == {
        "same loss without a teacher": "yes", "post-hoc adjustment of the control": "missing", "the teacher itself": "missing",
        "self-distillation": "missing", "equal training budget": "missing",
    }  # fmt: skip
    assert "prior" in found.loc["post-hoc adjustment of the control", "what"]


def test_a_moved_threshold_is_told_from_a_gain(tmp_path, monkeypatch):
    monkeypatch.setitem(SKILL, "taught", SKILL["small"])
    root = write_study(tmp_path / "s", entries=("small", "taught"), shared=True)
    for fold in range(FOLDS):
        moved = table(f"taught-f{fold}", SKILL["small"], 0, 0).assign(fold=fold)
        moved["logits"] = [row + np.array([0, 0, 1.5]) for row in moved["logits"]]
        predictions.write(root / "runs" / f"taught-f{fold}" / "predictions.parquet", moved, CLASSES, "healthy")
        reseal(root / "runs" / f"taught-f{fold}")
    assert any("Only recall moved, AUPRC did not" in note for note in judged(root)["taught"]["notes"])


def test_calibration_is_fitted_on_validation_and_measured_on_test(study):
    found = pd.read_csv(study / "report" / "tables" / "calibration.csv").query("level == 'slice'").set_index(["entry", "stage"])
    label, before, after = [], [], []
    for fold in range(FOLDS):
        both = table("x", SKILL["taught"], fold, 0).query("checkpoint == 'best'")
        logits, truth = np.stack(both["logits"]).astype(np.float32), both["label"].map(CLASSES.index).to_numpy()
        test = (both["split"] == "test").to_numpy()
        grid = np.exp(np.linspace(-2, 2, 161))
        losses = [log_loss(truth[~test], softmax(logits[~test] / t, axis=1)) for t in grid]
        label.append(truth[test])
        before.append(softmax(logits[test], axis=1))
        after.append(softmax(logits[test] / grid[int(np.argmin(losses))], axis=1))
    one_hot = np.eye(3)[np.concatenate(label)]
    for stage, parts in (("raw", before), ("temperature", after)):
        expected = ((np.concatenate(parts) - one_hot) ** 2).sum(axis=1).mean()
        assert found.loc[("taught", stage), "brier"] == pytest.approx(expected, abs=2e-3)
    row = found.loc[("taught", "raw")]
    assert row["brier"] == pytest.approx(row.brier_reliability - row.brier_resolution + row.brier_uncertainty + row.brier_within)


def test_two_equal_sides_are_not_decided(tmp_path, monkeypatch):
    monkeypatch.setitem(SKILL, "taught", SKILL["small"])
    record = judged(write_study(tmp_path / "s", entries=("small", "taught"), seeds=2))["taught"]
    assert record["verdict"] == "not decided"
    assert "nothing is excluded" in record["sentence"]
    assert record["difference"] == pytest.approx(0)


def test_scores_equal_scikit_learn(study):
    found = summary_table(study).set_index("entry")
    expected = []
    for fold in range(FOLDS):
        rows = table("x", SKILL["small"], fold, 0).query("checkpoint == 'best' and split == 'test'")
        predicted = np.array(CLASSES)[np.stack(rows["logits"]).astype(np.float32).argmax(1)]
        expected.append(f1_score(rows["label"], predicted, labels=["LGG"], average="macro"))
    assert found.loc["small", "LGG f1"] == pytest.approx(np.mean(expected), abs=1e-6)


def test_fronts_are_those_of_entries_that_nothing_beats_and_latency_is_compared_on_one_device_only(tmp_path):
    root = write_study(tmp_path / "s")
    study = json.loads((root / "study.json").read_text())
    cost = {"small": (1000, 7, [3.0, 1.0, 2.0]), "taught": (1000, 7, [5.0, 5.0, 5.0]), "odd": (400, 9, [1.5, 1.5, 1.5])}
    for run in study["runs"]:
        parameters, flops, latency = cost[run["name"]]
        run |= {"parameters": parameters, "flops": flops, "latency_ms": latency[run["fold"]], "latency_on": "cpu, 1 thread"}
    write_json(root / "study.json", study)
    found = sizes_of(root)
    assert found["latency_ms"].to_dict() == {"small": 4.0, "taught": 4.0, "odd": 1.5}  # one network has one latency
    score = found["LGG f1"]
    for front, column in (("front_parameters", "parameters"), ("front_flops", "flops"), ("front_latency", "latency_ms")):
        for name in cost:
            others = [other for other in cost if other != name]
            beaten = any(
                found[column][o] <= found[column][name]
                and score[o] >= score[name]
                and (found[column][o], score[o]) != (found[column][name], score[name])
                for o in others
            )
            assert found[front][name] == ("no" if beaten else "yes"), (front, name)
    study["runs"][0]["latency_on"] = "cuda, x"
    write_json(root / "study.json", study)
    found = sizes_of(root)
    assert set(found["front_latency"]) == {"unknown"}
    assert found["latency_on"]["small"] == "cpu, 1 thread; cuda, x"


def test_runs_made_before_latency_was_measured_are_reported(study):
    found = pd.read_csv(study / "report" / "tables" / "sizes.csv")
    assert found["latency_ms"].isna().all()
    assert set(found["front_latency"]) == {"unknown"}
    assert set(found["front_parameters"]) == {"yes", "no"}


def sizes_of(root):
    results = read_results(root)
    return analyses.sizes(results, summary_table(root)).set_index("entry")


def test_every_table_has_its_csv_and_every_figure_its_svg_pdf_and_png(study):
    report = study / "report"
    tables = {path.stem: pd.read_csv(path) for path in (report / "tables").glob("*.csv")}
    assert {*tables} >= {"summary", "verdicts", "overall", "by_class", "runs"}
    printable = {name for name, table in tables.items() if 0 < len(table) <= 60}
    assert {path.stem for path in (report / "tables").glob("*.tex")} == {*printable, "main"}
    names = [{path.stem for path in (report / "figures").glob(f"*.{kind}")} for kind in ("svg", "png", "pdf")]
    assert names[0] == names[1] == names[2] >= {"forest", "classes", "confusion-0", "curves-0"}


def test_a_pdf_holds_its_texts_as_text(study):
    assert b"/Subtype /Type0" in (study / "report" / "figures" / "forest.pdf").read_bytes()


def test_the_tables_of_a_paper_compile_as_they_are(study, tmp_path):
    if shutil.which("pdflatex") is None:
        pytest.skip("no LaTeX on this machine")
    folder = study / "report" / "tables"
    names = sorted(path.stem for path in folder.glob("*.tex"))
    inputs = "\n".join(rf"\input{{{folder / name}}}\clearpage" for name in names)
    source = "\\documentclass{article}\\usepackage{booktabs}\\begin{document}\n" + inputs + "\n\\end{document}\n"
    (tmp_path / "paper.tex").write_text(source)
    command = ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "paper.tex"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout[-1500:]
    for name in names:
        text = (folder / f"{name}.tex").read_text()
        assert len(re.search(r"begin\{tabular\}\{(\w+)\}", text).group(1)) <= 7, name
        assert "nan" not in re.findall(r"\w+", text)
        assert r"\_" not in re.sub(r"\\label\{.*", "", text.replace("small\\_cnn", "").replace("cross\\_entropy", "")), name
    main = (folder / "main.tex").read_text()
    row = next(line for line in main.splitlines() if line.startswith("taught"))
    assert r"\textbf{" in row
    assert main.count(r"\textbf{") == 1


def test_the_verdicts_are_json_that_its_schema_describes(study):
    found = json.loads((study / "report" / "verdicts.json").read_text())
    schema = json.loads((study / "report" / "verdicts.schema.json").read_text())
    assert {*found} == {*schema["required"]}
    assert [record["entry"] for record in found["verdicts"]] == ["taught", "odd"]
    table = pd.read_csv(study / "report" / "tables" / "verdicts.csv").set_index("entry")
    assert found["verdicts"][0]["difference"] == pytest.approx(table.loc["taught", "difference"])
    assert found["verdicts"][0]["verdict"] == table.loc["taught", "verdict"]
    assert found == read_verdicts(study / "report").model_dump()


def test_the_methods_paragraph_cites_only_what_its_bibtex_holds(study):
    text = (study / "report" / "methods.md").read_text()
    assert "1 repeat of 3-fold outer cross-validation grouped by patient, with 1 random seed" in text
    assert {*re.findall(r"\[@(\w+)\]", text)} == {*re.findall(r"@\w+\{(\w+),", text)}


def test_differences_on_the_first_screen_are_those_of_the_two_scores(two_seeds):
    results = read_results(two_seeds)
    pairs = make_pairs(results)
    first = headline(results, pairs, verdicts(pairs, "LGG"))
    row = first.rows[0]
    assert row.with_teacher - row.without == pytest.approx(row.gain)
    assert first.command == ""


def test_one_run_is_answered_by_what_to_do_next(study):
    results = read_results(study)
    pairs = make_pairs(results)
    first = headline(replace_command(results, "raredistill study a.yaml --out s splits.repeats=1"), pairs, verdicts(pairs, "LGG"))
    assert first.answer.startswith("This study cannot answer yet: ")
    assert first.command == "raredistill study a.yaml --out s splits.repeats=2"


def test_networks_that_did_not_learn_are_the_first_thing_said(tmp_path, monkeypatch):
    def flat(run, skill, fold, seed, made=table):
        found = made(run, skill, fold, seed)
        if run.startswith("small"):
            found["logits"] = [logits - np.array([0, 0, 50]) for logits in found["logits"]]
        return found

    monkeypatch.setitem(globals(), "table", flat)
    root = write_study(tmp_path / "s", seeds=2)
    results = replace_command(read_results(root), "raredistill study a.yaml --out s")
    pairs = make_pairs(results)
    first = headline(results, pairs, verdicts(pairs, "LGG"))
    assert first.banners[0].startswith("Networks did not learn: of small, a network never predicts LGG (repeat 0, fold 0, seed 0)")
    assert first.answer == "This study cannot answer yet: small did not learn LGG."
    assert first.command == "raredistill study a.yaml --out s training.epochs=90"


def replace_command(results, command):
    return replace(results, study=replace(results.study, command=command))


def test_the_page_is_one_file_that_escapes_and_warns(study):
    page = (study / "report" / "report.html").read_text()
    assert "=c&lt;script&gt;" in page
    assert "t&lt;b&gt;" in page
    assert "<script>=" not in page
    assert "generated (a phantom)" in page
    assert not re.search(r"(src=|href=|url\()[\"']?https?:", page)


def test_an_unfinished_study_is_reported_and_marked(tmp_path):
    root = write_study(tmp_path / "s", waiting=("taught", "odd"))
    assert "unfinished: 6 of 9" in write_report(root).read_text()


def test_a_sweep_shows_the_gain_against_the_imbalance(tmp_path):
    roots = [write_study(tmp_path / name, entries=("small", "taught")) for name in "ab"]
    for root, many in zip(roots, (30, 90), strict=True):
        study = json.loads((root / "study.json").read_text())
        study["split_table"] = [
            {"repeat": 0, "fold": fold, "side": side, "class": name, "slices": number, "patients": 1}
            for fold in range(FOLDS)
            for side, factor in (("train", 1), ("test", 7))
            for name, number in (("healthy", factor * many), ("LGG", factor * 10))
        ]
        write_json(root / "study.json", {**study, "name": f"1:{many // 10}"})
    assert 'data-shown="1"' in write_report(roots[0], sweep=[roots[1]]).read_text()
    found = pd.read_csv(roots[0] / "report" / "tables" / "imbalance.csv")
    assert found[["study", "imbalance_ratio"]].to_numpy().tolist() == [["1:3", 3.0], ["1:9", 9.0]]
    assert found["gain"].to_list() == pytest.approx([judged(root)["taught"]["difference"] for root in roots])
    assert (roots[0] / "report" / "figures" / "imbalance.svg").is_file()


def test_a_study_without_a_finished_run_has_a_report_too(tmp_path):
    page = write_report(write_study(tmp_path / "s", waiting=tuple(SKILL))).read_text()
    assert "unfinished: 9 of 9" in page
    assert "Nothing could be tested" in page
    assert "described, not tested: the study has no finished baseline" in page


def test_no_study_is_told(tmp_path):
    with pytest.raises(DataError, match=r"study\.json"):
        write_report(tmp_path)


def test_formulas_and_latex_signs_are_quoted(tmp_path):
    made = pd.DataFrame({"a_b": ["=1+1", "ok"], "n": [-0.5, 1.0], "=class": ["\t=1", ""]})
    text = safe(made).to_csv(index=False)
    assert [row["'=class"] for row in csv.DictReader(text.splitlines())] == ["'\t=1", ""]
    assert [row["n"] for row in csv.DictReader(text.splitlines())] == ["-0.5", "1.0"]
    assert [row["a_b"] for row in csv.DictReader(text.splitlines())] == ["'=1+1", "ok"]
    assert r"\%" in latex(made.assign(note="5 %"))


def rare_scores(name, fold, part, level):
    """Truth and probability of LGG by slice, or by patient as the renormalised mean over the classes that patients carry."""
    rows = table("x", SKILL[name], fold, 0).query("checkpoint == 'best' and split == @part")
    scored = rows.assign(**dict(zip(CLASSES, softmax(np.stack(rows["logits"]).astype(np.float32).astype(float), axis=1).T, strict=True)))
    if level == "slice":
        return (scored["label"] == "LGG").to_numpy(), scored["LGG"].to_numpy(), scored
    means = scored.groupby(["patient", "patient_label"])[["HGG", "LGG"]].mean().reset_index()
    means["LGG"] /= means["HGG"] + means["LGG"]
    return (means["patient_label"] == "LGG").to_numpy(), means["LGG"].to_numpy(), means


@pytest.mark.parametrize("level", ["slice", "patient"])
@pytest.mark.parametrize("wanted", [0.8, 0.95])
def test_operating_points_are_chosen_on_validation_and_paid_for_on_test(study, level, wanted):
    found = pd.read_csv(study / "report" / "tables" / "operating_points.csv")
    row = found.query("entry == 'small' and level == @level and wanted_sensitivity == @wanted").iloc[0]
    expected = []
    for fold in range(FOLDS):
        truth, score, _ = rare_scores("small", fold, "validation", level)
        threshold = max(t for t in score if (score[truth] >= t).mean() >= wanted)
        truth, score, _ = rare_scores("small", fold, "test", level)
        called = score >= threshold
        expected.append((threshold, called[truth].mean(), 1 - called[~truth].mean(), truth[called].mean(), called.mean()))
    assert row[["threshold", "sensitivity", "specificity", "precision", "flagged"]].to_list() == pytest.approx(np.mean(expected, axis=0))


def test_the_hardest_are_those_with_the_lowest_mean_probability_over_entries(study):
    for level, keys in (("patient", ["patient"]), ("slice", ["patient", "sample"])):
        found = pd.read_csv(study / "report" / "tables" / f"hardest_{level}s.csv").set_index(keys)
        columns = {}
        for name in SKILL:
            parts = [rare_scores(name, fold, "test", level) for fold in range(FOLDS)]
            columns[name] = pd.concat([rows[truth].set_index(keys)["LGG"] for truth, _, rows in parts])
        expected = pd.DataFrame(columns).rename(columns="by {}".format)
        expected["mean"] = expected.mean(axis=1)
        pd.testing.assert_frame_equal(found, expected.sort_values("mean").head(20), rtol=1e-6)


def test_a_patient_called_like_markup_or_a_formula_is_only_a_name(tmp_path, monkeypatch):
    names = {"p0-0": '<img src=x onerror="alert(1)">', "p0-3": "=1+1", "p1-0": "@SUM(1)"}
    plain = table
    monkeypatch.setitem(globals(), "table", lambda *arguments: plain(*arguments).replace({"patient": names}))
    root = write_study(tmp_path / "s", entries=("small",))
    page = write_report(root).read_text()
    assert "&lt;img src=x onerror=&#34;alert(1)&#34;&gt;" in page
    assert "<img" not in page
    with (root / "report" / "tables" / "hardest_patients.csv").open() as file:
        shown = {row["patient"] for row in csv.DictReader(file)}
    assert {names["p0-0"], "'=1+1", "'@SUM(1)"} <= shown
    assert "=1+1" not in shown


def test_every_metric_of_every_run_equals_scikit_learn(study):
    overall = pd.read_csv(study / "report" / "tables" / "runs_overall.csv")
    by_class = pd.read_csv(study / "report" / "tables" / "runs.csv")
    where = "entry == 'small' and fold == 1 and checkpoint == 'best' and level == 'slice'"
    rows = table("x", SKILL["small"], 1, 0).query("checkpoint == 'best' and split == 'test'")
    guess, truth = np.stack(rows["logits"]).astype(np.float32).argmax(1), rows["label"].map(CLASSES.index).to_numpy()
    row = overall.query(where).iloc[0]
    assert row["kappa"] == pytest.approx(cohen_kappa_score(truth, guess))
    assert row["mcc"] == pytest.approx(matthews_corrcoef(truth, guess))
    assert row["macro_f1"] == pytest.approx(f1_score(truth, guess, average="macro"))
    own = by_class.query(where).set_index("class")
    for place, name in enumerate(CLASSES):
        assert own.loc[name, "specificity"] == pytest.approx(recall_score(truth != place, guess != place))


def test_every_figure_names_the_table_it_is_drawn_from(study):
    page = (study / "report" / "report.html").read_text()
    sources = set(re.findall(r"numbers in tables/(\w+)\.csv", page))
    assert {"comparisons", "reliability", "decision", "epochs", "sizes"} <= sources
    assert sources <= {path.stem for path in (study / "report" / "tables").glob("*.csv")}
    assert page.count('class="picture"') == page.count("numbers in tables/")
    assert page.count('role="img" aria-label="') == page.count('class="picture"')


@pytest.mark.parametrize("level", ["slice", "patient"])
def test_curves_are_those_of_scikit_learn(study, level):
    tables = {name: pd.read_csv(study / "report" / "tables" / f"{name}.csv") for name in ("roc", "precision_recall", "decision")}
    found = {name: each[(each["entry"] == "small") & (each["level"] == level)] for name, each in tables.items()}
    parts = [rare_scores("small", fold, "test", level) for fold in range(FOLDS)]
    truth, score = np.concatenate([each[0] for each in parts]), np.concatenate([each[1] for each in parts])
    false, true, _ = roc_curve(truth, score, drop_intermediate=False)
    own = found["roc"]
    assert points(own["false_positive_rate"], own["recall"]) <= points(false, true)
    precision, recall, _ = precision_recall_curve(truth, score)
    assert points(found["precision_recall"]["recall"], found["precision_recall"]["precision"]) <= points(recall, precision)
    for row in found["decision"].itertuples():
        called = score >= row.threshold
        benefit = ((called & truth).sum() - (called & ~truth).sum() * row.threshold / (1 - row.threshold)) / len(truth)
        assert row.benefit == pytest.approx(benefit)


def points(x, y):
    return set(zip(np.round(x, 9), np.round(y, 9), strict=True))


def test_calibration_of_patients_is_that_of_their_mean_probability_over_the_classes_that_they_carry(study):
    found = pd.read_csv(study / "report" / "tables" / "calibration.csv").query("entry == 'small' and level == 'patient'").set_index("stage")
    parts = [rare_scores("small", fold, "test", "patient") for fold in range(FOLDS)]
    truth, score = np.concatenate([each[0] for each in parts]), np.concatenate([each[1] for each in parts])
    assert found.loc["raw", "predictions"] == len(truth) == 60
    assert found.loc["raw", "brier"] == pytest.approx(2 * brier_score_loss(truth, score))
    assert list(found.index) == ["raw", "temperature"]  # a prior of slices is none of patients
    binned = pd.read_csv(study / "report" / "tables" / "reliability.csv").query(
        "entry == 'small' and level == 'patient' and stage == 'raw'"
    )
    right, confidence = (score > 0.5) == truth, np.maximum(score, 1 - score)
    for row in binned.itertuples():
        inside = (confidence > row.low) & (confidence <= row.high)
        assert row.count == inside.sum()
        if inside.any():
            assert row.accuracy == pytest.approx(right[inside].mean())


def test_entries_and_classes_may_be_called_like_columns(tmp_path, monkeypatch):
    names = {"mean": 0.8, "patient": 2.5, "sample": 1.5}
    for name, skill in names.items():
        monkeypatch.setitem(SKILL, name, skill)
    root = write_study(tmp_path / "s", entries=tuple(names))
    found = analyses.hardest_slices(read_results(root))
    assert list(found) == ["patient", "sample", "by mean", "by patient", "by sample", "mean"]
    assert found["mean"].to_list() == pytest.approx(found.filter(like="by ").mean(axis=1).to_list())


def test_classes_may_be_called_like_columns(tmp_path):
    root, renamed = write_study(tmp_path / "s"), dict(zip(CLASSES, ("fold", "true", "equal_mass"), strict=True))
    text = (root / "study.json").read_text()
    for old, new in renamed.items():
        text = text.replace(f'"{old}"', f'"{new}"')
    (root / "study.json").write_text(text)
    for folder in (root / "runs").iterdir():
        made = predictions.read(folder / "predictions.parquet").table.replace({"label": renamed, "patient_label": renamed})
        predictions.write(folder / "predictions.parquet", made, list(renamed.values()), "fold")
        history = (folder / "epochs.jsonl").read_text()
        for old, new in renamed.items():
            history = history.replace(f'"{old}"', f'"{new}"')
        (folder / "epochs.jsonl").write_text(history)
        reseal(folder)
    results = read_results(root)
    counted = confusion_rows(results)
    assert list(counted) == ["entry", "repeat", "fold", "seed", "true", "as fold", "as true", "as equal_mass"]
    assert counted.groupby("entry")[["as fold", "as true", "as equal_mass"]].sum().sum(axis=1).to_dict() == dict.fromkeys(SKILL, 240)
    calibrated = analyses.calibration(results, analyses.calibrated_entries(results)[0])
    assert {"ece_equal_mass", "ece:equal_mass"} <= set(calibrated)


def test_costs_are_means_over_runs_and_the_cache_stands_beside_them(tmp_path):
    root = write_study(tmp_path / "s", entries=("small", "taught"))
    study = json.loads((root / "study.json").read_text())
    spent = {"small": [(1.0, 2.0, 3.0), (2.0, 2.0, 2.0), (3.0, 3.0, 3.0)], "taught": [(1.0, 1.0, 1.0), (0.5, 0.5, 0.5), (0.3, 0.3, 0.3)]}
    for run in study["runs"]:
        seconds = spent[run["name"]][run["fold"]]
        path = root / "runs" / run["id"] / "epochs.jsonl"
        records = [json.loads(line) for line in path.read_text().splitlines()]
        path.write_text("".join(json.dumps({**each, "seconds": s}) + "\n" for each, s in zip(records, seconds, strict=True)))
        reseal(path.parent)
        run |= {"seconds": sum(seconds) + 1, "made_with": {"versions": {"device": "cpu"}}}
        if run["name"] == "taught":
            filled = (4.0, 6.0, 0.0)[run["fold"]]  # the third run found its views computed
            run |= {"teacher_cache": {"views": 2, "computed": 2 if filled else 0, "seconds": filled}}
            run["remarks"] = ["it was odd"]
    write_json(root / "study.json", study)
    page = write_report(root).read_text()
    found = pd.read_csv(root / "report" / "tables" / "costs.csv").set_index("entry")
    assert found.loc["small", ["epoch_s", "run_s"]].to_list() == pytest.approx([21 / 9, 8.0])
    assert found.loc["small", ["cache_views", "cache_fill_s"]].isna().all()
    assert found.loc["taught", ["epoch_s", "run_s", "cache_views", "cache_fill_s"]].to_list() == pytest.approx([0.6, 2.8, 2, 5.0])
    assert "seconds in which a run filled its teacher cache" in page
    assert "it was odd" in page


def test_the_page_says_which_family_holm_corrected(two_seeds):
    page = html.unescape(write_report(two_seeds).read_text())
    assert "The most precise comparison, taught, could have shown gains in LGG F1" in page
    assert "Holm's family has one comparison, LGG F1 by slice of taught against its control" in page
    assert "All other p values of this page (other metrics, the trend over sizes, footnotes) are not adjusted" in page
    results = read_results(two_seeds)
    pair = next(pair for pair in make_pairs(results) if pair.entry == "taught")
    two = [pair, replace(pair, entry="again")]
    assert "2 comparisons (taught, again)" in family(two, "LGG")
    assert [record["p_holm"] for record in verdicts(two, "LGG")] == pytest.approx([2 * pair.decision.gain.p] * 2)
    assert "no p value was adjusted" in family([replace(pair, decision=Decision(reason="none"))], "LGG")


def test_wilcoxon_is_for_data_sets_and_refuses_one_cohort_twice(tmp_path, monkeypatch):
    roots, expected = [], []
    for number, skill in enumerate((2.5, 1.5, 2.0)):
        monkeypatch.setitem(SKILL, "taught", skill)
        root = write_study(tmp_path / str(number), entries=("small", "taught"))
        study = json.loads((root / "study.json").read_text())
        write_json(root / "study.json", {**study, "name": f"s{number}", "cohort": {**study["cohort"], "hash": str(number)}})
        roots.append(root)
        expected.append(judged(root)["taught"]["difference"])
    page = write_report(roots[0], across=roots[1:]).read_text()
    gains = pd.read_csv(roots[0] / "report" / "tables" / "datasets.csv")
    assert gains["gain"].to_list() == pytest.approx(expected)
    row = pd.read_csv(roots[0] / "report" / "tables" / "datasets_tested.csv").iloc[0]
    assert (row["entry"], row["data_sets"]) == ("taught", 3)
    assert row["p"] == pytest.approx(stats.wilcoxon(expected).pvalue)
    assert (row["mean_gain"], row["smallest_p"]) == pytest.approx((np.mean(expected), 0.25))
    assert "Over several data sets" in page
    with pytest.raises(DataError, match="s0 and s0 are of one cohort"):
        write_report(roots[0], across=[roots[0]])


def test_figures_by_class_show_the_rarest_of_many_and_a_large_matrix_is_one_picture():
    classes = [f"c{n}" for n in range(20)]
    counts = [{"class": name, "slices": (7 * n) % 20} for n, name in enumerate(classes)]
    shown = figures.rarest(counts, classes)
    assert shown == [name for n, name in enumerate(classes) if (7 * n) % 20 < 12]
    assert figures.rarest(counts[:5], classes[:5]) == classes[:5]
    large, small = (figures.svg(figures.settled(figures.confusion(np.eye(n), classes[:n])), "m") for n in (20, 3))
    assert large.count("<image") == 2
    assert large.count("<path") < 20 * 20
    assert small.count("<image") == 0


def luminance(colour):
    """Relative luminance of ``#rrggbb`` or ``#rgb``, WCAG 2.1."""
    digits = colour.lstrip("#")
    digits = digits if len(digits) == 6 else "".join(digit * 2 for digit in digits)
    channels = [int(digits[place : place + 2], 16) / 255 for place in (0, 2, 4)]
    linear = [c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one, other):
    bright, dark = sorted((luminance(one), luminance(other)), reverse=True)
    return (bright + 0.05) / (dark + 0.05)


def test_contrast_is_that_of_published_pairs():
    assert contrast("#000000", "#fff") == pytest.approx(21)
    assert contrast("#777777", "#ffffff") == pytest.approx(4.48, abs=0.005)  # the grey that famously just fails
    assert contrast("#767676", "#ffffff") == pytest.approx(4.54, abs=0.005)


STYLE = (Path(figures.__file__).parent / "templates" / "style.css").read_text(encoding="utf-8")


@pytest.mark.parametrize("root", re.findall(r":root \{([^}]*)\}", STYLE))
def test_texts_and_graphics_of_the_page_have_the_contrast_that_wcag_aa_asks(root):
    colour = dict(re.findall(r"--(\w+): (#\w+)", root))
    for ground in ("paper", "soft"):
        assert min(contrast(colour[text], colour[ground]) for text in ("ink", "accent")) >= 4.5
        assert contrast(colour["line"], colour[ground]) >= 3
    assert contrast(colour["ink"], colour["warn"]) >= 4.5
    assert contrast(colour["ink"], colour["cell"]) >= 4.5


def test_both_schemes_are_checked():
    assert len(re.findall(r":root \{", STYLE)) == 2


def test_colours_of_entries_and_classes_stand_out_in_both_schemes_and_do_not_repeat_below_twenty():
    grounds = re.findall(r"--paper: (#\w+)", STYLE)
    assert len(grounds) == 2
    assert min(contrast(colour, ground) for colour in (*figures.PALETTE, *figures.CLASS_PALETTE) for ground in grounds) >= 3
    assert len({*figures.PALETTE, *figures.CLASS_PALETTE}) == len(figures.PALETTE) + len(figures.CLASS_PALETTE)
    assert len(set(figures.colours([str(number) for number in range(20)]).values())) == 20


def test_a_distilled_runs_sum_of_terms_shares_no_axis_with_validation(study):
    results = read_results(study)
    drawn = {name: figures.curves(results, name, CLASSES).axes[0].lines for name in ("small", "taught")}
    assert [len(lines) for lines in drawn.values()] == [2, 1]


def test_a_pale_bar_has_an_edge_that_stands_out():
    scores = pd.DataFrame({"entry": ["a", "b"], "checkpoint": "best", "level": "slice", "class": "LGG", "f1": [0.3, 0.6]})
    bars = figures.class_scores(scores, ["a", "b"], ["LGG"]).axes[0].patches
    assert [bar.get_height() for bar in bars] == [0.3, 0.6]
    for bar in bars:
        assert bar.get_edgecolor()[3] == 1
        assert contrast(to_hex(bar.get_edgecolor()), "#fff") >= 3


def test_figures_in_a_confusion_matrix_can_be_read_on_every_shade():
    shares = np.linspace(0.5, 1, 12)
    matrix = np.diag(np.round(1000 * shares)) + np.roll(np.diag(1000 - np.round(1000 * shares)), 1, axis=1)
    axis = figures.confusion(matrix, [f"c{n}" for n in range(12)]).axes[1]
    share = matrix / 1000
    for text in axis.texts:
        column, row = (int(place) for place in text.get_position())
        ground = to_hex(colormaps["Blues"](share[row, column]))
        assert contrast(to_hex(text.get_color()), ground) >= 4.5
