"""The report in a real headless browser: sorting, filtering, the plan switch, the slider, a narrow window."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest

from mixdq_ao.app.report import build

from .browser import FOUND, NAMES, Browser
from .synthetic import write

pytestmark = pytest.mark.skipif(FOUND is None, reason=f"none of {', '.join(NAMES)} is installed")

# Helpers in the page: what the table shows, and what a reader does to it.
HELP = """
const table = document.getElementById("layer-table");
const rows = () => [...table.tBodies[0].rows].filter((row) => !row.hidden);
const shown = (cell) => [...cell.querySelectorAll(".plan")].filter((e) => getComputedStyle(e).display !== "none");
const press = (i) => table.tHead.rows[0].cells[i].querySelector("button").click();
const column = (i) => rows().map((row) => Number(row.cells[i].dataset.sort));
const pick = (name, value) => {
  const element = document.getElementById(name);
  element.value = value;
  element.dispatchEvent(new Event("input", { bubbles: true }));
  element.dispatchEvent(new Event("change", { bubbles: true }));
};
const stage = () => [...document.querySelectorAll("#compare-stage img")];
const cells = (row) => [...document.querySelector("table.pictures").tBodies[0].rows[row].cells].slice(1);
const source = (row, at) => cells(row)[at].firstElementChild.src;
"""


@pytest.fixture(scope="module")
def browser(tmp_path_factory) -> Iterator[Browser]:
    """The page in a window 500 pixels wide; every error in a script is kept."""
    folder = write(tmp_path_factory.mktemp("results"))
    page = build(folder)
    with Browser(tmp_path_factory.mktemp("profile"), width=500) as browser:
        keep = "window.failed = []; addEventListener('error', (event) => failed.push(event.message))"
        browser.send("Page.enable")
        browser.send("Page.addScriptToEvaluateOnNewDocument", source=keep)
        browser.open(page)
        browser.send("Runtime.evaluate", expression=HELP)
        yield browser
        assert browser.run("failed") == []


def test_nothing_sticks_out_of_a_narrow_window(browser):
    scrolled, window = browser.run("[document.documentElement.scrollWidth, document.documentElement.clientWidth]")
    assert scrolled <= window <= 500


def test_a_long_caption_widens_nothing(browser):
    browser.run("document.querySelector('.choices option').textContent = 'a red circle '.repeat(40)")
    test_nothing_sticks_out_of_a_narrow_window(browser)


def test_the_table_is_sorted_by_a_click_and_back(browser):
    given = browser.run("column(3)")
    assert browser.run("press(3), column(3)") == sorted(given) != given
    assert browser.run("table.tHead.rows[0].cells[3].ariaSort") == "ascending"
    assert browser.run("press(3), column(3)") == sorted(given, reverse=True)


def test_the_table_is_filtered(browser):
    total = browser.run("rows().length")
    names = browser.run("pick('find', 'attn2'), rows().map((row) => row.cells[0].textContent)")
    assert 0 < len(names) < total and all("attn2" in name for name in names)
    assert browser.run("document.getElementById('shown').textContent") == f"{len(names)} of {total} layers"
    assert browser.run("pick('find', ''), rows().length") == total


def test_the_plan_switch_changes_bits_and_reasons(browser):
    def of(k: int) -> list[tuple[str, str]]:
        browser.run(f"document.getElementById('plan-{k}').click()")
        last = "row.cells[row.cells.length - {}]"
        texts = ", ".join(f"shown({last.format(i)})[0].textContent" for i in (2, 1))
        return [tuple(pair) for pair in browser.run(f"rows().map((row) => [{texts}])")]

    w8, w4, w3 = of(0), of(1), of(2)
    assert {bits for bits, _ in w8} == {"8", "16"} and {bits for bits, _ in w3} > {"2", "4"}
    assert all(why for _, why in w8 + w4 + w3) and w8 != w4 != w3
    last = browser.run("table.tHead.rows[0].cells.length - 2")
    browser.run(f"press({last})")  # Bits, of the plan that is shown
    by_bits = of(2)
    assert [bits for bits, _ in by_bits] == sorted((bits for bits, _ in w3), key=int) and sorted(by_bits) == sorted(w3)
    browser.run("press(0)")
    assert browser.run("shown(document.getElementById('layers')).filter((e) => e.querySelector('.map')).length") == 1


def test_the_slider_compares_what_is_chosen(browser):
    assert browser.run("[stage()[0].src === source(0, 0), stage()[1].src === source(0, cells(0).length - 1)]") == [
        True,
        True,
    ]
    browser.run("pick('compare-row', '1'), pick('compare-right', '2')")
    assert browser.run("stage()[1].src === source(1, 2)")
    browser.run("cells(2)[3].firstElementChild.click()")
    assert browser.run("[stage()[0].src === source(2, 0), stage()[1].src === source(2, 3)]") == [True, True]
    said = browser.run("document.getElementById('compare-said').textContent")
    assert re.fullmatch(r"Full precision \| MixDQ W8A8: PSNR \d+\.\d dB against full precision", said)
    browser.run("document.getElementById('compare-difference').click()")
    assert browser.run("getComputedStyle(stage()[1]).mixBlendMode") == "difference"
    browser.run("document.getElementById('compare-difference').click()")


def test_the_slider_follows_the_mouse(browser):
    browser.run("document.documentElement.style.scrollBehavior = 'auto'")
    browser.run("document.getElementById('compare').scrollIntoView()")
    box = browser.run("(({left, top, width, height}) => ({left, top, width, height}))"
                      "(document.getElementById('compare-stage').getBoundingClientRect())")  # fmt: skip
    y = box["top"] + box["height"] / 2
    browser.mouse("mousePressed", box["left"] + 0.5 * box["width"], y)
    browser.mouse("mouseMoved", box["left"] + 0.25 * box["width"], y)
    browser.mouse("mouseReleased", box["left"] + 0.25 * box["width"], y)
    assert browser.run("getComputedStyle(stage()[1]).clipPath") == "inset(0px 0px 0px 25%)"
    assert browser.run("document.getElementById('compare-at').value") == "25"
