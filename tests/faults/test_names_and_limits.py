"""Names that a terminal, a picture or a table would obey, and small inputs that ask for much: refused in one message, or shown as text."""

import os
import re
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from conftest import Silent, write_tiny
from raredistill import names, predictions
from raredistill.cohort.inspect import contact_sheet
from raredistill.cohort.prepare import prepare
from raredistill.cohort.sources.registry import open_source
from raredistill.cohort.verify import verify
from raredistill.config import load_config
from raredistill.console import said, show_table
from raredistill.errors import ConfigError, DataError, SplitError
from raredistill.files import parse_yaml
from raredistill.reports import write_report
from raredistill.reports.paper import latex
from raredistill.splits import make_splits
from raredistill.studies.study import run_study
from test_study import study

SECONDS = 5.0
"""Far more than any of these takes on a busy machine, far less than what each took."""


def quickly(function, *arguments):
    """What a call raises, which must come soon."""
    began = time.process_time()
    with pytest.raises((ConfigError, DataError)) as caught:
        function(*arguments)
    assert time.process_time() - began < SECONDS
    return str(caught.value)


def folder_of_images(root, labels, file="1.png"):
    for label in labels:
        for patient in ("p1", "p2"):
            path = root / label / patient / file
            path.parent.mkdir(parents=True)
            Image.fromarray(np.full((8, 8), 7, np.uint8)).save(path, format="PNG")
    return root


# Names


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("e\x1b[2J", "control character U+001B"), ("ring\x07", "U+0007"), ("a\u2028b", "U+2028"), ("abc\u202egnp", "U+202E"),
        ("\udcff", "not valid UTF-8"), ("u\u0308", "not composed"), ("x" * 1001, "1001 characters"), ("\x85", "U+0085"),
    ],
)  # fmt: skip
def test_a_name_that_breaks_the_rule_is_told_and_shown_without_being_obeyed(name, problem):
    assert problem in names.fault(name)
    assert names.shown(name).encode() == names.shown(name).encode("utf-8", "strict")
    assert not re.search(r"[\x00-\x1f\x7f-\x9f\u2028-\u202e]", names.shown(name))


@pytest.mark.parametrize("name", ["größer", "患者", "=1+1", "<script>", "a b", "B[/bold]", "a$\\foo{$", "^~", "مريض", "🙂", "x" * 1000])
def test_any_other_name_is_allowed(name):
    assert names.fault(name) == ""
    assert names.shown(name) == name


@pytest.mark.parametrize("label", ["e\x1b[2Jvil", "ring\x07", "u\u0308ber"])
def test_a_class_whose_name_breaks_the_rule_stops_verify_and_prepare(tmp_path, label):
    source = open_source("image_folder", folder_of_images(tmp_path / "raw", [label, "b"]), patient="folder")
    assert any("the class" in problem.what for problem in verify(source, workers=1) if problem.level == "error")
    with pytest.raises(DataError, match="the class"):
        prepare(source, tmp_path / "c", size=(8, 8), workers=1)
    assert not (tmp_path / "c").exists()


def test_bytes_that_are_no_utf8_in_a_file_name_are_told_by_verify_and_leave_no_half_cohort(tmp_path):
    folder_of_images(tmp_path / "raw", ["a", "b"], file=os.fsdecode(b"x\xff.png"))
    program = [sys.executable, "-c", "from raredistill.cli import main; main()"]
    for verb in (["verify", "image_folder", "raw"], ["prepare", "image_folder", "raw", "--out", "c"]):
        done = subprocess.run([*program, *verb, "--workers", "1"], cwd=tmp_path, capture_output=True, text=True, check=False)
        assert (done.returncode, "Traceback" in done.stderr) == (2, False), done.stderr
        assert "not valid UTF-8" in " ".join((done.stdout + done.stderr).split())
        assert r"x\xff" in done.stdout + done.stderr
    assert not (tmp_path / "c").exists()


def test_markup_in_a_column_head_is_text(capsys):
    show_table([{"B[/bold]": "[red]x[/red]", "e\x1b[2J": "\x07"}], "t\x1b[2J")
    shown = capsys.readouterr().out
    assert all(text in shown for text in ("B[/bold]", "[red]x[/red]", r"e\x1b[2J", r"\x07", r"t\x1b[2J"))
    assert "\x1b[2J" not in shown
    assert said("two\nlines \x1b") == "two\nlines \\x1b"


def test_a_dollar_sign_in_a_name_begins_no_formula_in_pictures(tmp_path):
    made = study(write_tiny(tmp_path / "c"), [{"name": "a$x{$", "model": "small_cnn"}],
                 training={"epochs": 1, "batch_size": 16, "accelerator": "cpu"})  # fmt: skip
    run_study(made, tmp_path / "s", Silent())
    write_report(tmp_path / "s")
    drawn = sorted((tmp_path / "s" / "report" / "figures").glob("*.svg"))
    assert len(drawn) > 5
    for picture in drawn:
        ElementTree.parse(picture)
    source = open_source("image_folder", folder_of_images(tmp_path / "raw", ["a$\\foo{$", "b"]), patient="folder")
    assert contact_sheet(prepare(source, tmp_path / "d", size=(8, 8), workers=1), tmp_path / "sheet.png").is_file()


def test_latex_shows_what_it_would_obey():
    import pandas as pd

    text = latex(pd.DataFrame({"a^b": ["~x^2"]}))
    assert r"\textasciicircum{}b" in text
    assert r"\textasciitilde{}x\textasciicircum{}2" in text


# YAML


MERGES = "a0: &a0 {x: 1}\n" + "".join(f"a{n}: &a{n} {{<<: [*a{n - 1}, *a{n - 1}]}}\n" for n in range(1, 25))


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (MERGES, "'<<' cannot be a key"), ("a: 1\na: 2", "the key 'a' is given twice"),
        ("a: {b: {c: 1, c: 1}}", "the key 'c' is given twice"),
        ("[" * 400_000, "nested more than 100 deep"), ("- a\n" * 200_000, "more than 100000 values"), ("#" * 2**21, "at most 1048576"),
        ("!!int 1:30", "tags such as"), ("!!set {a}", "tags such as"), ("9" * 5000, "4300 digits"), ("{[1]: 2}", "cannot be a key"),
    ],
    ids=["merges", "twice", "twice below", "depth", "values", "size", "tag", "set", "digits", "list as key"],
)  # fmt: skip
def test_yaml_that_asks_for_much_or_says_two_things_is_refused_at_once(text, problem):
    assert problem in quickly(parse_yaml, text, "study.yaml")


def test_numbers_of_base_60_and_dates_are_texts_and_other_values_are_what_they_were():
    sixties = "1" + ":11" * 200_000
    assert parse_yaml(f"a: {sixties}", "x") == {"a": sixties}
    text = "{a: 1:30, b: 2026-01-01, c: 12, d: 1.5e+3, e: true, f: null, g: .inf, h: '1', i: &x [1], j: *x, k: 0x1f, l: 1_000}"
    expected = {"a": "1:30", "b": "2026-01-01", "c": 12, "d": 1500.0, "e": True, "f": None, "g": float("inf"), "h": "1"}
    assert parse_yaml(text, "x") == {**expected, "i": [1], "j": [1], "k": 31, "l": 1000}


@pytest.mark.parametrize(
    "override",
    ["splits.repeats=100000000", "splits.seed=-5", "seeds=[99999999999999999999]", "seeds=[-1]", 'name="a\\eb"', 'runs.0.name="\\a"'],
)
def test_numbers_and_names_of_a_study_have_bounds(tmp_path, override):
    (tmp_path / "c.yaml").write_text("{name: s, cohort: c, runs: [{name: a, model: small_cnn}]}")
    load_config(tmp_path / "c.yaml")
    assert override.partition("=")[0] in quickly(load_config, tmp_path / "c.yaml", [override])


@pytest.mark.parametrize("change", [{"seed": -5}, {"seed": 2**31}, {"repeats": 10**8}])
def test_splits_themselves_have_bounds(tiny_cohort, change):
    with pytest.raises(SplitError, match="seeds go from 0 to 2147483647, repeats from 1 to 1000"):
        make_splits(tiny_cohort, folds=2, **change)


# Patterns


def test_a_pattern_that_can_match_in_too_many_ways_is_stopped(tmp_path):
    folder_of_images(tmp_path, ["ab" * 60, "b"], file="c.png")
    message = quickly(lambda: open_source("image_folder", tmp_path, patient="^((a|b|ab)+)+c"))
    assert "takes more than 1 s to match" in message
    assert "repetitions inside repetitions" in message


@pytest.mark.parametrize("pattern", [r".*?(([a]+)+)X", r"^(([a-z]+)+)+\d", r"(x+x+)+y"])
def test_patterns_that_took_for_ever_find_no_patient_at_once(tmp_path, pattern):
    folder_of_images(tmp_path, ["a" * 60, "x" * 60])
    began = time.process_time()
    problems = open_source("image_folder", tmp_path, patient=pattern).problems()
    assert time.process_time() - began < SECONDS
    assert sum(problem.what == "no patient can be told from its path" for problem in problems) == 4


# Parquet


def test_a_small_file_of_many_rows_is_refused_from_its_head(tmp_path):
    many = pa.DictionaryArray.from_arrays(pa.array(np.zeros(6_000_000, np.int8)), ["a"])
    pq.write_table(pa.table({"label": many, "patient": many}), tmp_path / "t.parquet")
    assert (tmp_path / "t.parquet").stat().st_size < 10**5
    assert "6000000 rows; at most 5000000" in quickly(predictions.read, tmp_path / "t.parquet")


@pytest.mark.parametrize("column", ["label", "patient", "logits", "p_a", "fold"])
def test_nested_columns_are_refused_and_columns_that_are_not_needed_are_not_read(tmp_path, column):
    plain = {"label": ["a", "b"], "patient": ["x", "y"], "p_a": [0.5, 0.5], "p_b": [0.5, 0.5], "other": [[{"deep": [1]}]] * 2}
    pq.write_table(pa.table(plain), tmp_path / "t.parquet")
    assert len(predictions.read(tmp_path / "t.parquet").table) == 2
    pq.write_table(pa.table({**plain, column: [[{"deep": [1]}]] * 2}), tmp_path / "t.parquet")
    assert f"its column {column} contains" in quickly(predictions.read, tmp_path / "t.parquet")


@pytest.mark.parametrize("text", ["e\x1b[2J", "u\u0308"])
def test_names_in_tables_made_elsewhere_keep_the_rule(tmp_path, text):
    Path(tmp_path / "t.csv").write_text(f"label,patient,p_a,p_b\na,{text},0.5,0.5\nb,y,0.5,0.5\n")
    assert "the patient" in quickly(predictions.read, tmp_path / "t.csv")
