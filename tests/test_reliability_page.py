"""The page of reliability names, for every case, a test that exists."""

import ast
import re
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
PAGE = (TESTS.parent / "docs" / "reliability.md").read_text(encoding="utf-8")
NAMED = re.compile(r"`((?:[\w/]+\.py::)?(?:test_|\.\.\._)\w*(?:\.\.\.)?(?:\[\w+\])?|(?:\w+/)*test_\w+\.py)`")


def functions():
    """Names of all test functions by file, relative to tests/."""
    found = {}
    for path in TESTS.rglob("test_*.py"):
        names = [node.name for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.FunctionDef)]
        found[str(path.relative_to(TESTS))] = [name for name in names if name.startswith("test_")]
    return found


def exists(named, known):
    file, _, name = named.rpartition("::")
    if named.endswith(".py"):
        file, name = named, "..."
    own = [names for path, names in known.items() if path.endswith(file.removeprefix("tests/"))]
    pattern = ".*".join(map(re.escape, name.split("[")[0].split("...")))
    return any(re.fullmatch(pattern, each) for names in own for each in names)


def rows():
    """Rows of the tables that have a column of tests."""
    inside = False
    for line in PAGE.splitlines():
        if not line.startswith("|"):
            inside = False
        elif re.match(r"\| case .*\| test \|", line):
            inside = True
        elif inside and not line.startswith("|---"):
            yield line


def test_every_test_that_the_page_names_exists():
    known = functions()
    named = NAMED.findall(PAGE)
    assert len(named) > 60
    assert [name for name in named if not exists(name, known)] == []


@pytest.mark.parametrize("row", list(rows()))
def test_every_case_names_a_test(row):
    last = re.split(r"(?<!\\)\|", row)[-2]
    assert last.strip() == "same" or NAMED.search(last)


def test_a_name_that_is_nowhere_would_be_noticed():
    known = functions()
    assert not exists("test_crashes.py::test_that_nobody_wrote", known)
    assert not exists("tests/test_nothing.py", known)
    assert exists("test_crashes.py::test_kill_9_of_the_report_leaves_it_to_be_written_again", known)
