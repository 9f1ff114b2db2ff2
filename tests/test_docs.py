"""The documentation: a site without a warning, a README that is short and whose links lead somewhere."""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest
from typer.main import get_command

from raredistill.cli import app

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def test_the_site_is_built_without_a_warning_and_holds_the_reference(tmp_path):
    if importlib.util.find_spec("mkdocs") is None or importlib.util.find_spec("mkdocstrings") is None:
        pytest.skip("mkdocs is not installed: pip install '.[docs]'")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    line = (tmp_path / "site" / "reference" / "cli" / "index.html").read_text()
    assert all(f"raredistill {verb}" in line for verb in get_command(app).commands)
    assert "gain_test" in (tmp_path / "site" / "reference" / "api" / "index.html").read_text()
    assert "balanced_softmax" in (tmp_path / "site" / "reference" / "methods" / "index.html").read_text()


def test_the_readme_is_short_and_its_links_lead_somewhere():
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 120
    for link in re.findall(r"\]\((?!https?:)([^)#]+)", text):
        assert (ROOT / link).exists(), link


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_verb_that_a_page_names_exists(page):
    verbs = {*get_command(app).commands}
    named = re.findall(r"^raredistill ([a-z]+)\b", page.read_text(), flags=re.MULTILINE)
    assert {*named} <= verbs
