"""The report's page under real keys in a real browser: what the mouse can do the keyboard can, and where it is can be seen."""

import re
import shutil

import numpy as np
import pytest
from matplotlib.colors import to_hex

from browser import Browser
from raredistill.reports import write_report
from raredistill.reports.figures import blank_figure
from raredistill.reports.maps import HALO, LINE, OPAQUE, _outline, overlay
from test_report import contrast, write_study

STOPS = """[...document.querySelectorAll('a[href], button, input, summary, [tabindex="0"]')]
    .filter((part) => part.checkVisibility({visibilityProperty: true}))"""
HERE = "stops.indexOf(document.activeElement)"
# What a person sees of the stop that has the focus: its outline, what that stands on, and whether the bar of sections hides it.
SEEN = """(() => {
  const part = document.activeElement, style = getComputedStyle(part), bar = document.querySelector("nav");
  let ground = part.parentElement;
  while (getComputedStyle(ground).backgroundColor === "rgba(0, 0, 0, 0)") ground = ground.parentElement;
  const box = part.getBoundingClientRect();
  return {
    place: stops.indexOf(part), outline: style.outlineStyle, width: parseFloat(style.outlineWidth), colour: style.outlineColor,
    ground: getComputedStyle(ground).backgroundColor,
    hidden: !bar.contains(part) && getComputedStyle(bar).display !== "none" && box.bottom <= bar.getBoundingClientRect().bottom,
    outside: box.bottom <= 0 || box.top >= innerHeight,
  };
})()"""


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    if shutil.which("chromium") is None:
        pytest.skip("no chromium on this machine")
    return write_report(write_study(tmp_path_factory.mktemp("page") / "study"))


@pytest.fixture(scope="module")
def browser(tmp_path_factory, page):
    with Browser(tmp_path_factory.mktemp("profile")) as opened:
        yield opened


def opened(browser, page, **look):
    browser.look(**look)
    browser.open(page)
    # Until the observers have looked: they do so after the layout of a frame.
    browser.run("new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(() => setTimeout(done, 20))))")
    browser.run(f"window.stops = {STOPS}; stops.length")
    return browser.run("stops.length")


def hexadecimal(colour):
    return to_hex([int(number) / 255 for number in re.findall(r"\d+", colour)[:3]])


@pytest.mark.parametrize("look", [{}, {"scheme": "dark"}, {"width": 380, "height": 800}, {"width": 380, "height": 800, "scheme": "dark"}])
def test_tab_reaches_every_control_in_order_and_each_is_seen(browser, page, look):
    number = opened(browser, page, **look)
    assert number > 60
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
    assert browser.run("""[...document.querySelectorAll(".scroll")].filter((part) => part.checkVisibility()).every((part) =>
        (part.tabIndex === 0) === (part.scrollWidth > part.clientWidth))""")
    assert browser.run("stops.filter((part) => part.matches('.scroll')).length") > 10
    narrow = browser.run("stops.length")
    assert opened(browser, page) < narrow


@pytest.mark.parametrize("key", ["Enter", "Space"])
def test_keys_sort_a_table_and_sort_it_back(browser, page, key):
    opened(browser, page)
    browser.run("document.querySelector('#runs thead th:nth-child(9) button').focus()")  # the first column of numbers
    for order, sign in (("ascending", 1), ("descending", -1)):
        browser.press(key)
        assert browser.run("document.activeElement.parentElement.getAttribute('aria-sort')") == order
        column = browser.run("[...document.querySelector('#runs tbody').rows].map((row) => row.cells[8].textContent)")
        numbers = [float(text) for text in column if text != "undefined"]
        assert len(numbers) > 10
        assert np.all(sign * np.diff(numbers) >= 0)


def test_keys_open_the_switches_and_switch_an_entry_off_and_on(browser, page):
    opened(browser, page)
    shown = "[...document.querySelectorAll('[data-shown=\"1\"]')].filter((mark) => getComputedStyle(mark).display !== 'none').length"
    before = browser.run(shown)
    browser.run("document.querySelector('.switches summary').focus()")
    browser.press("Enter")
    assert browser.run("document.querySelector('.switches').open")
    browser.press("Tab")
    browser.press("Tab")
    assert browser.run("document.activeElement.dataset.entry") == "1"
    browser.press("Space")
    assert browser.run(shown) == 0 < before
    browser.press("Space")
    assert browser.run(shown) == before
    browser.press("Tab", shift=True)
    browser.press("Tab", shift=True)
    browser.press("Space")
    assert not browser.run("document.querySelector('.switches').open")


def test_keys_open_what_is_folded_and_scroll_what_is_wide(browser, page):
    opened(browser, page, width=380, height=800)
    browser.run("document.querySelector('#results details summary').focus()")
    browser.press("Enter")
    assert browser.run("document.querySelector('#results details').open")
    browser.press("Tab")
    assert browser.run("document.activeElement.matches('.scroll')")
    browser.press("ArrowRight")
    wait = "const wait = () => document.activeElement.scrollLeft > 0 ? done(true) : setTimeout(wait, 20); wait();"
    assert browser.run(f"new Promise((done) => {{ {wait} }})")


def test_letters_of_figures_are_as_large_on_a_phone_as_on_paper(browser, page):
    opened(browser, page, width=380, height=800)
    shares = browser.run("""[...document.querySelectorAll(".picture svg")].filter((part) => part.checkVisibility()).map((part) =>
        part.getBoundingClientRect().width / (parseFloat(part.getAttribute("width")) * 4 / 3))""")
    assert len(shares) > 8
    assert min(shares) >= 0.69
    assert browser.run("document.documentElement.scrollWidth") <= 380


def test_captions_are_read_without_scrolling(browser, page):
    opened(browser, page, width=380, height=800)
    assert browser.run("""[...document.querySelectorAll("caption span")].filter((part) => part.checkVisibility()).every((part) =>
        part.getBoundingClientRect().right <= 380)""")


def test_on_paper_nothing_is_left_of_what_only_a_screen_can_do(browser, page):
    opened(browser, page, width=718, medium="print")
    browser.run("dispatchEvent(new Event('beforeprint'))")
    assert browser.run("getComputedStyle(document.querySelector('nav')).display") == "none"
    assert browser.run("[...document.querySelectorAll('main details')].every((part) => part.open)")
    # One may print while a stop has the focus: its outline is dark on white, and covers no letter.
    browser.run("document.querySelector('#answer th button').focus({focusVisible: true})")
    browser.run(f"window.stops = {STOPS}; 0")
    seen = browser.run(SEEN)
    assert contrast(hexadecimal(seen["colour"]), "#ffffff") >= 3
    assert browser.run("document.documentElement.scrollWidth") <= 718
    assert browser.run("""[...document.querySelectorAll("td.number")].every((cell) => {
        const line = document.createRange(); line.selectNodeContents(cell); return line.getClientRects().length === 1; })""")


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
