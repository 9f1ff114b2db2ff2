"""The report's page under real keys in a real browser: what the mouse can do the keyboard can, and where it is can be seen."""

import base64
import importlib.util
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from matplotlib.colors import to_hex
from scipy.special import softmax

from browser import Browser
from raredistill import predictions
from raredistill.reports import write_report
from raredistill.reports.figures import blank_figure
from raredistill.reports.maps import HALO, LINE, OPAQUE, _outline, overlay
from test_report import SKILL, contrast, write_study

DRAWN = """new Promise((done) => {
  const wait = () => document.documentElement.dataset.drawn ? done(true) : setTimeout(wait, 20); wait(); })"""
STOPS = """[...document.querySelectorAll('a[href], button, input, select, summary, [tabindex="0"]')]
    .filter((part) => part.checkVisibility({visibilityProperty: true}))"""
HERE = "stops.indexOf(document.activeElement)"
# What a person sees of the stop that has the focus: its outline, what that stands on, and whether the bar of sections hides it.
SEEN = """(() => {
  const part = document.activeElement, style = getComputedStyle(part), bar = document.querySelector(".bar");
  let ground = part.parentElement;
  while (getComputedStyle(ground).backgroundColor === "rgba(0, 0, 0, 0)") ground = ground.parentElement;
  const box = part.getBoundingClientRect();
  return {
    place: stops.indexOf(part), outline: style.outlineStyle, width: parseFloat(style.outlineWidth), colour: style.outlineColor,
    ground: getComputedStyle(ground).backgroundColor,
    hidden: !bar.contains(part) && getComputedStyle(bar).position === "sticky" && box.bottom <= bar.getBoundingClientRect().bottom,
    outside: box.bottom <= 0 || box.top >= innerHeight,
  };
})()"""


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    if shutil.which("chromium") is None:
        pytest.skip("no chromium on this machine")
    root = write_study(tmp_path_factory.mktemp("page") / "study", seeds=2)
    study = json.loads((root / "study.json").read_text())
    study["command"] = "raredistill study s.yaml --out s"
    (root / "study.json").write_text(json.dumps(study))
    return write_report(root)


@pytest.fixture(scope="module")
def browser(tmp_path_factory, page):
    with Browser(tmp_path_factory.mktemp("profile")) as opened:
        yield opened


def opened(browser, page, **look):
    browser.look(**look)
    browser.open(page)
    browser.run(DRAWN)
    # Until the observers have looked: they do so after the layout of a frame.
    browser.run("new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(() => setTimeout(done, 20))))")
    browser.run(f"window.stops = {STOPS}; stops.length")
    return browser.run("stops.length")


def hexadecimal(colour):
    return to_hex([int(number) / 255 for number in re.findall(r"\d+", colour)[:3]])


@pytest.mark.parametrize("look", [{}, {"scheme": "dark"}, {"width": 380, "height": 800}, {"width": 380, "height": 800, "scheme": "dark"}])
def test_tab_reaches_every_control_in_order_and_each_is_seen(browser, page, look):
    number = opened(browser, page, **look)
    assert number > 40
    for key, order in (({}, range(number)), ({"shift": True}, range(number - 2, -1, -1))):
        for place in order:
            browser.press("Tab", **key)
            seen = browser.run(SEEN)
            assert seen["place"] == place
            assert (seen["outline"], seen["hidden"], seen["outside"]) == ("solid", False, False), seen
            assert seen["width"] >= 2
            assert contrast(hexadecimal(seen["colour"]), hexadecimal(seen["ground"])) >= 3
    assert browser.complaints == []


def test_what_scrolls_is_a_stop_and_what_does_not_is_none(browser, page):
    opened(browser, page, width=380, height=800)
    browser.run("document.querySelectorAll('#tables details').forEach((part) => { part.open = true; })")
    browser.run("new Promise((done) => setTimeout(done, 100))")
    assert browser.run("""[...document.querySelectorAll(".scroll")].filter((part) => part.checkVisibility()).every((part) =>
        (part.tabIndex === 0) === (part.scrollWidth > part.clientWidth))""")
    assert browser.run("[...document.querySelectorAll('.scroll')].filter((part) => part.tabIndex === 0).length") > 10


@pytest.mark.parametrize("key", ["Enter", "Space"])
def test_keys_sort_a_table_and_sort_it_back(browser, page, key):
    opened(browser, page)
    browser.run("document.querySelector('#table-runs').open = true")
    browser.run("document.querySelector('#table-runs thead th:nth-child(9) button').focus()")  # the first column of numbers
    for order, sign in (("ascending", 1), ("descending", -1)):
        browser.press(key)
        assert browser.run("document.activeElement.parentElement.getAttribute('aria-sort')") == order
        column = browser.run("[...document.querySelector('#table-runs tbody').rows].map((row) => row.cells[8].textContent)")
        numbers = [float(text) for text in column if text != "undefined"]
        assert len(numbers) > 10
        assert np.all(sign * np.diff(numbers) >= 0)


CARDS = "[...document.querySelectorAll('.card')].map((card) => card.querySelector('h3').textContent.trim())"


def test_keys_open_the_switches_and_switch_an_entry_off_everywhere_and_on(browser, page):
    opened(browser, page)
    shown = "[...document.querySelectorAll('[data-shown=\"1\"]')].filter((mark) => getComputedStyle(mark).display !== 'none').length"
    before, cards = browser.run(shown), browser.run(CARDS)
    assert cards == ["small", "taught", "odd"]
    browser.run("document.querySelector('.switches summary').focus()")
    browser.press("Enter")
    assert browser.run("document.querySelector('.switches').open")
    browser.press("Tab")
    browser.press("Tab")
    assert browser.run("document.activeElement.dataset.entry") == "1"
    browser.press("Space")
    assert browser.run(shown) == 0 < before
    assert browser.run(CARDS) == ["small", "odd"]
    assert "taught" not in browser.run("document.querySelector('#patient-scores').innerText")
    assert browser.run("views.roc.runAsync().then((view) => view.data('curves').some((row) => row.entry === 'taught'))") is False
    assert browser.run("views.runs.runAsync().then((view) => view.data('runs').some((row) => row.entry === 'taught'))") is False
    browser.press("Space")
    assert (browser.run(shown), browser.run(CARDS)) == (before, cards)


def expected_matrix(page, entry, threshold):
    """Counts by true and predicted class, the rare one first, straight from the runs' predictions files."""
    order = ["LGG", "healthy", "HGG"]
    matrix = np.zeros((3, 3), dtype=int)
    for folder in sorted((page.parents[1] / "runs").glob(f"{entry}-*")):
        found = predictions.read(folder / "predictions.parquet")
        part = found.part("test", "best")
        classes = list(part.classes)
        for label, chance in zip(part.labels(), softmax(part.logits(), axis=1), strict=True):
            others = {name: chance[classes.index(name)] for name in order[1:]}
            called = "LGG" if chance[classes.index("LGG")] >= threshold else max(others, key=others.get)
            matrix[order.index(classes[label]), order.index(called)] += 1
    return matrix


def test_the_slider_moves_the_operating_point_and_every_number_with_it(browser, page):
    opened(browser, page)
    browser.run("document.querySelector('#threshold').focus()")
    for _ in range(7):
        browser.press("ArrowRight")
    assert browser.run("document.querySelector('#threshold-value').textContent") == "0.57"
    for place, entry in enumerate(("small", "taught")):
        matrix = expected_matrix(page, entry, 0.57)
        seen = browser.run(
            f"[...document.querySelectorAll('.card')[{place}].querySelectorAll('td.number')].map((cell) => +cell.textContent)"
        )
        np.testing.assert_array_equal(np.reshape(seen, (3, 3)), matrix)
        told = browser.run(f"[...document.querySelectorAll('.card')[{place}].querySelectorAll('dd')].map((cell) => cell.textContent)")
        hit, rest = matrix[0, 0], matrix[1:, 1:].sum()
        shares = hit / matrix[0].sum(), rest / matrix[1:].sum(), hit / matrix[:, 0].sum(), rest / matrix[:, 1:].sum()
        assert [float(each.split()[0]) for each in told] == pytest.approx([100 * each for each in shares], abs=0.51)
        point = browser.run(
            "views.roc.runAsync().then((view) => view.data('points')"
            f".filter((row) => row.entry === '{entry}').map((row) => [row.fpr, row.recall])[0])"
        )
        assert point == pytest.approx([1 - shares[1], shares[0]])
    assert browser.complaints == []


def test_metric_and_level_are_chosen_once_for_all_figures(browser, page):
    opened(browser, page)
    choose = "(id, value) => { const part = document.getElementById(id); part.value = value; part.dispatchEvent(new Event('change')); }"
    slices = browser.run("document.querySelector('.card').innerText")
    browser.run(f"({choose})('metric', 'balanced_accuracy'); ({choose})('level', 'patient')")
    assert browser.run("document.querySelector('#scores-title').textContent") == "Balanced accuracy by patient"
    rows = browser.run("views.runs.runAsync().then((view) => view.data('runs').map((row) => [row.metric, row.level, row.run]))")
    assert {(metric, level) for metric, level, _ in rows} == {("balanced_accuracy", "patient")}
    assert rows[0][2] == "repeat 0, fold 0, seed 0"
    assert browser.run("views.roc.runAsync().then((view) => view.data('curves').every((row) => row.level === 'patient'))")
    assert browser.run("document.querySelector('.card').innerText") != slices
    assert "healthy" not in browser.run("document.querySelector('.card').innerText")


def test_a_dot_under_the_pointer_reveals_its_run(browser, page):
    opened(browser, page)
    browser.run("document.querySelector('#plot-runs').scrollIntoView({block: 'center'})")
    x, y = browser.run("""(() => { const box = document.querySelector('#plot-runs path[aria-label], #plot-runs .mark-symbol path')
        .getBoundingClientRect(); return [box.x + box.width / 2, box.y + box.height / 2]; })()""")
    browser.send("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)
    found = browser.run("new Promise((done) => setTimeout(() => done(document.querySelector('#plot-runs').title), 200))")
    assert re.search(r"Run: repeat 0, fold \d, seed \d", found), found


def test_the_hardest_patients_are_browsed_by_key_and_show_every_entry(browser, page):
    opened(browser, page)
    first = browser.run("document.querySelector('#patient-scores').innerText")
    table = pd.read_csv(page.parent / "tables" / "hardest_patients.csv")
    assert table["patient"][0] in first
    browser.run("document.querySelector('#patient-after').focus()")
    browser.press("Enter")
    second = browser.run("document.querySelector('#patient-scores').innerText")
    assert table["patient"][1] in second
    scores = [float(each) for each in re.findall(r"\d\.\d\d", second)]
    assert scores == pytest.approx([table[f"by {name}"][1] for name in ("small", "taught", "odd")], abs=0.0051)
    assert browser.run("document.querySelectorAll('#patient-slices tbody tr').length") == 2


def test_the_first_screen_answers(browser, page):
    for width, height in ((1400, 900), (380, 800)):
        opened(browser, page, width=width, height=height)
        text = browser.run("document.querySelector('#answer').innerText")
        assert "Generated data: the numbers say nothing about patients." in text
        assert "Does a teacher help LGG?" in text
        answer = browser.run("document.querySelector('.answer').innerText")
        assert re.match(
            r"Yes: a teacher helps taught find LGG: F1 0\.\d\d with, 0\.\d\d without; difference \+0\.\d\d, 95 % interval", answer
        )
        assert browser.run("document.querySelector('.answer').getBoundingClientRect().bottom") < height
        assert "Next:" in text
    opened(browser, page, width=1400, height=900)
    assert browser.run("document.querySelector('.next').getBoundingClientRect().bottom") < 900


def test_the_page_is_short(browser, page, tmp_path_factory, monkeypatch):
    for name, skill in (("t4", 1.5), ("t5", 2.0), ("t6", 1.0)):
        monkeypatch.setitem(SKILL, name, skill)
    root = write_study(tmp_path_factory.mktemp("six") / "study", entries=("small", "taught", "odd", "t4", "t5", "t6"))
    path = write_report(root)
    opened(browser, path, width=1400, height=900)
    assert browser.run("document.querySelector('main').innerText.split(/\\s+/).length") <= 900
    assert browser.run("document.documentElement.scrollHeight") <= 6 * 900
    assert path.stat().st_size < 3_000_000
    assert not re.search(r"\b\w+_\w+\b", browser.run("document.querySelector('main').innerText"))


def axe():
    found = importlib.util.find_spec("axe_core_python")
    if found is None:
        pytest.skip("axe-core-python is not installed")
    return (Path(found.submodule_search_locations[0]) / "axe.min.js").read_text(encoding="utf-8")


@pytest.mark.parametrize("look", [{}, {"scheme": "dark"}, {"width": 380, "height": 800}])
def test_axe_finds_no_violation(browser, page, look):
    opened(browser, page, **look)
    browser.run("document.querySelectorAll('details').forEach((part) => { part.open = true; })")
    browser.run(f"{axe()}; 0")
    found = browser.run(
        "axe.run().then((found) => found.violations.map((each) => [each.id, each.nodes.slice(0, 3).map((node) => node.html)]))"
    )
    assert found == []


@pytest.mark.parametrize("width", [380, 1400])
def test_every_figure_is_whole(browser, page, width):
    opened(browser, page, width=width, height=800)
    browser.run("document.querySelectorAll('#more details').forEach((part) => { part.open = true; })")
    assert browser.run("document.documentElement.scrollWidth") <= width
    edges = browser.run(
        "[...document.querySelectorAll('svg')].filter((part) => part.checkVisibility()).map((part) => part.getBoundingClientRect().right)"
    )
    assert len(edges) > 8
    assert max(edges) <= width


def test_on_paper_nothing_is_left_of_what_only_a_screen_can_do(browser, page):
    opened(browser, page, width=718, medium="print")
    assert browser.run("getComputedStyle(document.querySelector('.bar')).display") == "none"
    assert browser.run("document.documentElement.scrollWidth") <= 718
    printed = base64.b64decode(browser.send("Page.printToPDF")["data"])
    assert 1 <= len(re.findall(rb"/Type\s*/Page\b", printed)) <= 12


def test_a_map_covers_its_image_in_proportion_and_is_outlined_in_white_on_black():
    image, heat = np.linspace(3, 7, 64).reshape(8, 8).astype(np.float32), np.zeros((8, 8))
    heat[2:5, 2:5] = 1
    mixed = overlay(image, heat)
    grey = (image - 3) / 4
    np.testing.assert_allclose(mixed[heat == 0], np.repeat(grey[heat == 0][:, None], 3, axis=1), atol=1e-6)
    np.testing.assert_allclose(
        mixed[3, 3], (1 - OPAQUE) * grey[3, 3] + OPAQUE * np.array([252, 255, 164]) / 255, atol=3e-3
    )  # inferno's end
    figure, axes = blank_figure(1, 2)
    _outline(axes[0, 0], heat)
    _outline(axes[0, 1], np.zeros((8, 8)))
    (line,) = axes[0, 0].collections
    assert to_hex(line.get_edgecolor()[0]) == LINE
    assert line.get_path_effects()[0]._gc == {"linewidth": 3.2, "foreground": HALO}
    assert [text.get_text() for text in axes[0, 1].texts] == ["empty map"]
    # Whatever lies below, either the line or its halo stands out from it.
    greys = [to_hex([share] * 3) for share in np.linspace(0, 1, 256)]
    assert min(max(contrast(LINE, ground), contrast(HALO, ground)) for ground in greys) >= 3
    assert contrast(LINE, HALO) >= 4.5
    assert figure is not None
