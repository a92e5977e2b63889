"""The page in a real browser: charts draw, a click shows a layer's features, nothing is fetched, nothing complains."""

import shutil

import pytest
from made_choice import save_choice
from made_geometry import make_geometry

from stethoscope.report import render_report

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: pip install playwright")
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(BROWSER is None, reason="no Chromium is installed: apt-get install chromium")
QUIET = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--no-first-run",
)


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as playwright:
        launched = playwright.chromium.launch(executable_path=BROWSER, args=list(QUIET))
        yield launched
        launched.close()


@pytest.fixture(scope="module")
def report(results, tmp_path_factory):
    return render_report(results.save(tmp_path_factory.mktemp("run")))


class Visit:
    """A page that was opened, with everything that it asked for or complained of."""

    def __init__(self, browser, path, **context):
        self.page = browser.new_context(**context).new_page()
        self.complaints: list[str] = []
        self.requests: list[str] = []
        self.page.on("console", lambda message: self.complaints.append(message.text))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.goto(path.as_uri())
        self.page.wait_for_selector("html[data-drawn]", timeout=60_000)

    def first_feature(self) -> str:
        return self.page.inner_text("#features tbody tr th")

    def close(self):
        self.page.context.close()


@pytest.fixture
def visit(browser, report):
    visits = []

    def open_page(path=report, **context):
        visits.append(Visit(browser, path, **context))
        return visits[-1]

    yield open_page
    for visited in visits:
        visited.close()


def test_charts_draw_and_nothing_is_fetched(visit, report):
    seen = visit(viewport={"width": 1280, "height": 900})
    assert seen.page.locator("#profile svg .mark-symbol path").count() >= 30
    assert seen.page.locator("#trade-off svg .mark-symbol path").count() == 6
    assert "selected" in (seen.page.text_content("#trade-off svg") or "")
    assert seen.complaints == []
    assert seen.requests == [report.as_uri()]


def test_a_click_on_a_layer_shows_its_features(visit):
    seen = visit(viewport={"width": 1280, "height": 900})
    before = seen.first_feature()
    seen.page.locator("#profile svg path[aria-label*='layer: 4;']").last.click()
    assert seen.first_feature() == "400" != before
    assert seen.page.input_value("#layer") == "4"
    shown = seen.page.locator(".evidence:visible")
    assert shown.count() == 1
    assert shown.locator("details").count() == 8
    marks = shown.locator("details").first.locator("mark")
    assert marks.all_inner_texts() == ["<target-4-400>"] * 4 + ["<control-4-400>"] * 4
    assert seen.page.locator("[data-layer]:visible table").count() == 1  # one layer's health
    assert seen.complaints == []


def test_the_keyboard_opens_a_feature_of_the_layer_picked_there(visit):
    seen = visit()
    seen.page.focus("#layer")
    seen.page.keyboard.press("Home")
    shown = seen.page.locator(".evidence:visible")
    closed = shown.locator("details:not([open]) summary").first
    assert closed.inner_text().startswith("Feature 3:")
    for _ in range(40):
        seen.page.keyboard.press("Tab")
        if seen.page.evaluate("document.activeElement.textContent").startswith("Feature 3:"):
            break
    seen.page.keyboard.press("Enter")
    assert shown.locator("details").nth(3).locator("mark").first.is_visible()


def test_the_keyboard_reaches_a_layer_and_all_its_features(visit):
    seen = visit()
    seen.page.focus("#layer")
    before = int(seen.page.input_value("#layer"))
    seen.page.keyboard.press("ArrowDown")
    assert seen.first_feature() == f"{before + 1}00"
    assert seen.page.locator("#features tbody tr:visible").count() == 10
    for _ in range(3):
        seen.page.keyboard.press("Tab")
        if seen.page.evaluate("document.activeElement.id") == "more":
            break
    seen.page.keyboard.press("Enter")
    assert seen.page.locator("#features tbody tr:visible").count() == 40


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_narrow_screen_does_not_scroll_sideways(visit, scheme):
    seen = visit(viewport={"width": 1280, "height": 844}, color_scheme=scheme)
    seen.page.set_viewport_size({"width": 390, "height": 844})
    # charts are drawn anew one after another
    drawn = "['#profile', '#trade-off'].every(id => document.querySelector(`${id} svg`)?.clientWidth <= 390)"
    seen.page.wait_for_function(drawn)
    assert seen.page.evaluate("document.documentElement.scrollWidth") <= 390
    assert seen.complaints == []


def test_dark_screens_get_dark_charts_and_paper_gets_light_ones(visit):
    seen = visit(color_scheme="dark")
    colour = "getComputedStyle(document.querySelector('#profile svg text')).fill"
    dark = seen.page.evaluate(colour)
    seen.page.emulate_media(media="print")
    assert seen.page.evaluate(colour) != dark
    assert seen.page.evaluate("getComputedStyle(document.documentElement).backgroundColor") == "rgb(255, 255, 255)"


def test_planted_markup_does_not_run(visit, hostile, tmp_path):
    seen = visit(render_report(hostile.save(tmp_path)))
    assert "window.planted_context" in seen.page.locator(".evidence:visible mark").first.inner_text()
    assert seen.page.evaluate("[window.planted, window.planted_context]") == [None, None]
    assert seen.page.locator("img").count() == 0
    assert seen.complaints == []


def test_the_choices_pictures_draw(visit, results, tmp_path):
    folder = results.save(tmp_path / "run")
    save_choice(folder)
    (folder / "selection.json").write_text((folder / "selection.json").read_text().replace('"top_k"', '"calibrated"'))
    seen = visit(render_report(folder), viewport={"width": 1280, "height": 900})
    assert seen.page.locator("#validation-0 svg .mark-symbol path").count() >= 55
    text = seen.page.text_content("#validation-0 svg") or ""
    assert "mass_shift" in text
    assert "random sets of as many layers" in text
    bars = seen.page.locator("#scores-0 svg .mark-rect path")
    assert bars.count() == 30
    assert "score: norm" not in (bars.first.get_attribute("aria-label") or "")
    seen.page.locator("#scores-0 select").select_option(label="norm")
    seen.page.wait_for_function("document.querySelector('#scores-0 svg .mark-rect path').ariaLabel.includes('norm')")
    seen.page.set_viewport_size({"width": 700, "height": 900})
    seen.page.wait_for_function("document.querySelector('#scores-0 svg')?.clientWidth <= 700")
    seen.page.wait_for_function("document.querySelector('#scores-0 svg .mark-rect path').ariaLabel.includes('norm')")
    assert seen.page.locator("#scores-0 select").input_value() == "norm"
    tried = seen.page.locator("header #tried svg")  # the whole fine-tune is among the edits: the picture comes first
    assert tried.locator(".mark-line path").count() == 3
    legend = tried.text_content() or ""
    assert all(name in legend for name in ("filter", "scaled", "raw, best layers", "other edits", "recommended"))
    assert seen.page.locator("section #trade-off svg").count() == 1
    assert seen.complaints == []


def test_the_scalpels_pictures_draw(visit, results, tmp_path):
    folder = results.save(tmp_path / "run")
    make_geometry().save(folder)
    seen = visit(render_report(folder), viewport={"width": 1280, "height": 900})
    assert seen.page.locator("#energy svg .mark-symbol path").count() == 30
    assert seen.page.locator("#curves svg .mark-line path").count() >= 60  # a line and its chance level per layer
    assert seen.page.locator("#split-chart svg .mark-rect path").count() > 4
    assert seen.complaints == []
