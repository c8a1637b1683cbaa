"""The report's page in a real Chromium."""

import shutil

import pytest

from ablations.reporting import compose

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
playwright = pytest.importorskip("playwright.sync_api", reason="playwright drives the browser: pip install playwright")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here: apt-get install chromium")

OPTIONS = "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
OPTIONS += "--disable-component-update --disable-sync"
EVIL = "folder:/a<script>document.title='owned'</script><img src=x onerror=document.title='owned'>"


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as driver:
        started = driver.chromium.launch(executable_path=CHROMIUM, args=OPTIONS.split())
        yield started
        started.close()


@pytest.fixture
def opened(browser):
    """A function that opens a study's page on a laptop's screen, and fails on anything in the console."""
    page, said = browser.new_page(viewport={"width": 1366, "height": 768}), []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on(
        "request", lambda request: said.append(request.url) if not request.url.startswith(("file:", "data:")) else 0
    )

    def open_study(folder):
        page.goto((folder / "report" / "report.html").as_uri())
        return page

    yield open_study
    page.close()
    assert not said


@pytest.fixture(scope="module")
def folder(synthetic, tmp_path_factory):
    made = synthetic(tmp_path_factory.mktemp("browser") / "study")
    compose.write([made])
    return made


def test_the_first_screen_fits_and_the_page_is_short(opened, folder):
    page = opened(folder)
    assert page.locator("section").bounding_box()["y"] + page.locator("section").bounding_box()["height"] <= 768
    assert page.evaluate("document.documentElement.scrollHeight") < 2 * 768
    assert page.evaluate("document.documentElement.scrollWidth") <= 1366


def test_a_click_sorts_and_another_reverses(opened, folder):
    page = opened(folder)
    page.get_by_text("Arms", exact=True).click()
    table = page.locator("details[open] table")
    head = table.locator("th", has_text="step ms")
    column = [*table.locator("th").all_inner_texts()].index("step ms")

    def shown():
        return [float(row.locator("td").nth(column).inner_text().split()[0]) for row in table.locator("tbody tr").all()]

    before = shown()
    head.click()
    assert shown() == sorted(before) != before
    head.click()
    assert shown() == sorted(before, reverse=True)
    head.press("Enter")
    assert shown() == sorted(before)
    table.locator("th").first.click()
    names = [row.locator("td").first.inner_text() for row in table.locator("tbody tr").all()]
    assert names == sorted(names)


def test_negative_and_missing_numbers_sort_as_numbers(opened, folder, tmp_path):
    from ablations.reporting import html

    rows = ["−10.5 [−11, −9]", "+2.0", "—", "−9.0", ">+999", "1,234"]
    text = "# a\n\n## b\n\n| n | v |\n| --- | --- |\n" + "".join(f"| {i} | {v} |\n" for i, v in enumerate(rows))
    (tmp_path / "report").mkdir()
    (tmp_path / "report" / "report.html").write_text(html.render(text, tmp_path))
    page = opened(tmp_path)
    page.locator("th", has_text="v").click()
    assert page.locator("tbody tr td:nth-child(2)").all_inner_texts() == [rows[i] for i in (0, 3, 1, 4, 5, 2)]


def test_marks_tell_their_values(opened, folder):
    page = opened(folder)
    page.get_by_text("Memory", exact=True).click()
    bar = page.locator("details[open] svg g:has(> title)").first
    bar.hover()
    assert bar.locator("title").text_content() == "baseline: softmax 8.00 of 12.00 MiB"


def test_no_script_of_a_name_runs(opened, synthetic, tmp_path):
    made = synthetic(tmp_path / "study", arms=("baseline", "flash"), seeds=1, epochs=1, data=EVIL, timed=False)
    compose.write([made])
    page = opened(made)
    page.wait_for_timeout(200)
    assert page.title() != "owned"
    assert "<script>" in page.locator("h1").inner_text()


def test_print_unfolds_everything(opened, folder):
    page = opened(folder)
    page.emulate_media(media="print")
    page.wait_for_timeout(100)
    assert all(box and box["height"] > 50 for box in (f.bounding_box() for f in page.locator("figure").all()))
