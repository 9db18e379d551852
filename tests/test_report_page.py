"""The report's page in a real browser without a network, and hostile names in it."""

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from profile_records import a_full_profile, a_profile, a_row
from report_pages import HOSTILE, Texts, hostile, two_shapes

from optimize.tools import report, report_charts, report_words
from optimize.tools.report import page_of, write_report

pytest.importorskip("plotly", reason="needs plotly")
pytest.importorskip("jinja2", reason="needs jinja2")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="needs chromium")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    sync_api = pytest.importorskip("playwright.sync_api", reason="needs playwright")
    if CHROMIUM is None:
        pytest.skip("needs chromium")
    with sync_api.sync_playwright() as playwright:
        found = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-dev-shm-usage"])
        yield found
        found.close()


class Opened:
    """The page of a profile in Chromium without a network: what it asked for, and what it complained of."""

    def __init__(self, browser: Any, path: Path, **words: Any) -> None:
        self.context = browser.new_context(**{"viewport": {"width": 1400, "height": 1000}, **words})
        self.page = self.context.new_page()
        self.asked: list[str] = []
        self.complaints: list[str] = []
        self.page.on("console", lambda m: self.complaints.append(m.text))
        self.page.on("pageerror", lambda e: self.complaints.append(str(e)))
        self.page.on("request", lambda r: self.asked.append(r.url))
        self.page.route(lambda url: not url.startswith("file:"), lambda route: route.abort())
        self.page.goto(path.as_uri())
        self.page.wait_for_selector("html[data-ready]")

    def __enter__(self) -> "Opened":
        return self

    def __exit__(self, *_: object) -> None:
        self.context.close()


@needs_chromium
@pytest.mark.parametrize(("scheme", "width"), [("light", 1400), ("dark", 420)])
def test_the_page_works_offline_and_asks_for_nothing(browser: Any, tmp_path: Path, scheme: str, width: int) -> None:
    path = write_report(a_full_profile(), tmp_path)
    size = {"width": width, "height": 900}
    with Opened(browser, path, offline=True, color_scheme=scheme, viewport=size) as o:
        assert o.page.evaluate("document.documentElement.dataset.theme") == scheme
        figures = o.page.locator(".chart:visible")
        assert figures.count() == 3  # the second breakdown is folded in
        assert o.page.locator(".chart:visible .main-svg").count() >= 3
        assert o.page.locator("g.treemaplayer g.slice").count() > 5
        o.page.locator("summary").nth(1).click()
        o.page.locator("#modules-0-1 g.treemaplayer").wait_for(state="attached")
        wide = "document.documentElement.scrollWidth"
        assert o.page.evaluate(wide) == width  # nothing sticks out
        o.page.screenshot(path=tmp_path / "page.png", full_page=True)
        assert o.asked == [path.as_uri()]
        assert o.complaints == []
    assert (tmp_path / "page.png").stat().st_size > 50_000


@needs_chromium
def test_the_policy_stops_what_would_leave(browser: Any, tmp_path: Path) -> None:
    path = write_report(a_profile(), tmp_path)
    with Opened(browser, path) as o:
        tried = o.page.evaluate("fetch('http://127.0.0.1:9/x').then(() => 'left', () => 'stopped')")
        assert tried == "stopped" and any("Content Security Policy" in c for c in o.complaints)
        assert o.asked == [path.as_uri()]


@needs_chromium
def test_names_from_the_record_are_text_and_nothing_else(browser: Any, tmp_path: Path) -> None:
    path = write_report(hostile(), tmp_path)
    with Opened(browser, path) as o:
        assert o.page.evaluate("window.pwned") is None
        assert o.page.locator("img").count() == 0
        assert o.page.locator("script").count() == 3  # figures, plotly, the page's own
        assert HOSTILE in o.page.locator(".card-name").first.text_content()
        assert HOSTILE in o.page.locator("#notes").text_content()
        trace = o.page.locator("a[download]").get_attribute("href")
        assert trace == "./javascript%3Awindow.pwned%3D1"
        o.page.locator(".track[data-tip]").first.hover()
        assert HOSTILE in o.page.locator("#tip").text_content()
        drawn = "".join(o.page.locator(".chart svg text").all_text_contents())
        assert "<script>window.pwned" in drawn  # as letters
        assert o.page.locator(".chart script, .chart a[href]").count() == 0
        assert o.complaints == []


def test_hostile_names_make_no_tags() -> None:
    clean, dirty = (Texts(page_of(p)) for p in (a_full_profile(), hostile()))
    assert [t for t, _ in dirty.tags] == [t for t, _ in clean.tags]
    assert not [k for _, attrs in dirty.tags for k in attrs if k.startswith("on")]


def test_figures_hold_no_tags_but_our_own() -> None:
    """Plotly makes links and bold letters of tags in texts, and puts values in for what stands in its braces."""
    texts: list[str] = []

    def gather(value: Any) -> None:
        if isinstance(value, dict | list):
            for inner in value.values() if isinstance(value, dict) else value:
                gather(inner)
        elif isinstance(value, str):
            texts.append(value)

    gather(report.figures_in([s.view(hostile()) for s in report.SECTIONS]))
    assert sum("window.pwned" in text for text in texts) > 10
    for text in texts:
        assert "<" not in re.sub(r"</?(b|i|br|extra)>", "", text), text
    row = a_row(backend="%{x}")
    assert "%{x}" not in report_charts.told(row) + report_charts.on_roofline(row)["hovertemplate"]


def test_json_cannot_leave_its_script() -> None:
    said = report.json_in_html({"a": "</script><!--<script>&\u2028"})
    assert not set("<>&\u2028") & set(said)
    assert json.loads(said) == {"a": "</script><!--<script>&\u2028"}


@needs_chromium
def test_sizes_are_shown_one_at_a_time_and_the_theme_turns(browser: Any, tmp_path: Path) -> None:
    path = write_report(two_shapes(), tmp_path)
    with Opened(browser, path, color_scheme="light") as o:
        panels = o.page.locator("#latency .panel:visible")
        assert panels.count() == 2
        assert o.page.locator(".card:visible").count() == 1
        assert set(o.page.locator("#table tbody tr:visible td:nth-child(2)").all_text_contents()) == {"512px"}
        o.page.get_by_role("button", name="1024px").click()
        assert set(o.page.locator("#latency .panel:visible h3 small").all_text_contents()) == {"1024px"}
        assert o.page.locator(".card:visible").count() == 1  # the answer is for one set of sizes, and stays
        assert o.page.locator("#pareto .chart:visible .main-svg").count() >= 2  # drawn when it is shown
        o.page.get_by_role("button", name="all").click()
        assert panels.count() == 4
        ground = "getComputedStyle(document.body).backgroundColor"
        ink = "getComputedStyle(document.querySelector('#pareto .xtick text')).fill"
        before = o.page.evaluate(ground), o.page.evaluate(ink)
        o.page.locator("#theme").click()
        assert o.page.evaluate("document.documentElement.dataset.theme") == "dark"
        after = o.page.evaluate(ground), o.page.evaluate(ink)
        assert before[0] != after[0] and before[1] != after[1]  # the charts too
        assert o.complaints == []


@needs_chromium
def test_the_table_sorts_by_number_and_keeps_blanks_last(browser: Any, tmp_path: Path) -> None:
    rows = (*a_profile().rows, a_row(backend="torch.compile-regional", ms=7777.0))
    path = write_report(a_profile(rows=rows), tmp_path)
    with Opened(browser, path) as o:
        column = o.page.locator("#table td:nth-child(5)")
        assert column.first.text_content() == "77.0 ms"
        head = o.page.locator("#table th", has_text=re.compile("^median$"))
        head.click()
        up = ["31.0 ms", "60.0 ms", "63.0 ms", "77.0 ms", "7.78 s", report_words.NONE]
        assert column.all_text_contents() == up
        head.click()
        assert column.all_text_contents() == [*up[-2::-1], report_words.NONE]
        assert head.get_attribute("aria-sort") == "descending"
