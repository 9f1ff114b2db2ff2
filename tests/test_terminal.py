"""What the terminal shows: tables that keep their first columns, plain text for pipes, and the answer at the end."""

import re
import subprocess
import sys
from functools import partial
from io import StringIO

import rich.console

from raredistill.console import show_table
from raredistill.reports import write_report
from raredistill.terminal import show_answer
from test_report import write_study

ROWS = [
    {"entry": f"large-teacher-of-students-{number}", "runs": 12, **{f"a rather long metric {place}": 0.123 + place for place in range(8)}}
    for number in range(3)
]


def shown(monkeypatch, capsys, **console):
    buffer = StringIO()
    monkeypatch.setattr(rich.console, "Console", partial(rich.console.Console, file=buffer, **console))
    show_table(ROWS, "scores")
    return buffer.getvalue(), capsys.readouterr().out


def test_at_80_columns_no_name_is_broken_and_the_last_columns_are_left_out_and_named(monkeypatch, capsys):
    table, said = shown(monkeypatch, capsys, force_terminal=True, width=80)
    plain = re.sub(r"\x1b\[[0-9;]*m", "", table)
    assert max(map(len, plain.splitlines())) <= 80
    assert all(row["entry"] in plain for row in ROWS)
    assert "a rather long metric 0" in plain
    assert "a rather long metric 7" not in plain
    assert "not shown here: " in said
    assert said.rstrip().endswith("a rather long metric 7")


def test_a_pipe_gets_every_column_as_plain_text(monkeypatch, capsys):
    table, said = shown(monkeypatch, capsys, force_terminal=False)
    assert "not shown" not in said
    assert "\x1b" not in table
    assert table.isascii()
    assert [line.split()[0] for line in table.splitlines()[1:]] == [row["entry"] for row in ROWS]
    assert table.splitlines()[1].split()[-1] == "7.123"


def test_no_color_is_honoured(monkeypatch, capsys):
    monkeypatch.setenv("NO_COLOR", "1")
    table, _ = shown(monkeypatch, capsys, force_terminal=True, width=80)
    assert not re.search(r"\x1b\[(?:\d+;)*[349][0-7]", table)


def test_a_report_ends_with_the_answer_in_words_and_the_path_of_the_page(tmp_path, capsys):
    page = write_report(write_study(tmp_path / "s", seeds=2))
    show_answer(page)
    found = capsys.readouterr()
    lines = found.out.splitlines()
    assert lines[0].startswith("Does a teacher help LGG? Yes: a teacher helps taught find LGG: F1 ")
    assert lines[1].startswith("  taught helps")
    assert lines[-2].startswith("To do: Try the student on patients from elsewhere")
    assert lines[-1] == f"report: {page}"
    assert "warning: Generated data: the numbers say nothing about patients." in found.err


def test_report_opens_the_page_where_asked(tmp_path):
    root = write_study(tmp_path / "s")
    seen = tmp_path / "seen"
    code = (
        f"import sys, typer; typer.launch = lambda url: 0 * open({str(seen)!r}, 'w').write(url); "
        f"from raredistill.cli import main; sys.argv = ['raredistill', 'report', {str(root)!r}, '--open']; main()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert seen.read_text() == (root / "report" / "report.html").resolve().as_uri()
    assert "next:" not in done.stdout


def test_an_empty_table_prints_nothing(capsys):
    show_table([], "scores")
    assert capsys.readouterr().out == ""
