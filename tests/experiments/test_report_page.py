"""The report's page in a browser: offline, without errors, drawn, and answering to the mouse."""

import os
import shutil

import pytest

from optgrad.experiments import page, plots, results, stored

from .made_up import made_up_comparison

pytestmark = pytest.mark.slow

EVIL = "<img src=x onerror='window.evil = true'><script>window.evil = true</script>"
LABELS = ("adam", "M-SVAG, β=0.5", "sgd", "lbfgs"), ("adam", "M-SVAG, β=0.5", "fifth", EVIL)
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
)  # fmt: skip
LINES = "[data-study='0'] [data-plot=curves] .scatterlayer .trace path.js-line"


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    """Headless Chromium without a network."""
    places = [shutil.which(name) for name in ("chromium", "chromedriver")]
    if not all(places):
        # Where a machine checks, a skip would hide that the page is no longer looked at.
        lost = pytest.fail if os.environ.get("CI") == "true" else pytest.skip
        lost("needs chromium and chromedriver: apt-get install chromium chromium-driver")
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = places[0]
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('chromium')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(places[1]))
    offline = {"offline": True, "latency": 0, "downloadThroughput": 0, "uploadThroughput": 0}
    driver.execute_cdp_cmd("Network.enable", {})
    driver.execute_cdp_cmd("Network.emulateNetworkConditions", offline)
    yield driver
    driver.quit()


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """The page of two studies, the second with names that are HTML."""
    folder = tmp_path_factory.mktemp("page")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plots, "figures", lambda comparison: {})
        for i, labels in enumerate(LABELS):
            name = "mlp_small on digits" if i == 0 else EVIL
            results.write(made_up_comparison(labels, name), folder / str(i))
        patch.setattr(plots, "COLOURS", plots.COLOURS[::-1])  # black first
        text = page.html(stored.load_studies([folder / "0", folder / "1"]), "2 studies")
    (folder / "report.html").write_text(text, encoding="utf-8")
    return folder / "report.html"


@pytest.fixture
def shown(browser, place):
    """Opens the page, as wide as is asked for and in a colour scheme."""

    def show(width=1400, scheme="light"):
        size = {"width": width, "height": 1000, "deviceScaleFactor": 1, "mobile": False}
        scheme = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", scheme)
        browser.get(place.as_uri())
        wait(browser, "return document.querySelectorAll('.plot .main-svg').length > 0")
        return browser

    return show


def wait(browser, script, *arguments, seconds=10):
    """Until a script returns something true, which is returned."""
    from selenium.webdriver.support.ui import WebDriverWait

    return WebDriverWait(browser, seconds).until(
        lambda driver: driver.execute_script(script, *arguments)
    )


def count(browser, selector):
    return browser.execute_script("return document.querySelectorAll(arguments[0]).length", selector)


def outlines(browser, selector):
    script = "return [...document.querySelectorAll(arguments[0])].map((p) => p.getAttribute('d'))"
    return browser.execute_script(script, selector)


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1400, 400])
def test_it_loads_offline_and_draws_everything(shown, width, scheme):
    browser = shown(width, scheme)
    assert browser.get_log("browser") == []  # no errors, no warnings
    asked = browser.execute_script(
        "return performance.getEntriesByType('resource').map((entry) => entry.name)"
    )
    assert [name for name in asked if not name.startswith("data:")] == []
    # Two studies with curves and sensitivity, and two profiles.
    assert count(browser, ".plot") == 6
    for index in range(6):
        drawn = browser.execute_script(
            "return [...document.querySelectorAll('.plot')[arguments[0]]"
            ".querySelectorAll('.scatterlayer .trace path.js-line')]"
            ".map((path) => path.getTotalLength())",
            index,
        )
        assert len(drawn) >= 2
        assert max(drawn) > 20
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width
    background = browser.execute_script("return getComputedStyle(document.body).backgroundColor")
    assert background == {"light": "rgb(255, 255, 255)", "dark": "rgb(23, 24, 26)"}[scheme]


def test_names_are_shown_as_text_and_not_run(shown):
    browser = shown()
    assert browser.execute_script("return window.evil") is None
    headings = browser.execute_script(
        "return [...document.querySelectorAll('h2')].map((h) => h.textContent)"
    )
    assert EVIL in headings
    legend = browser.execute_script(
        "return [...document.querySelectorAll('[data-study=\"1\"] .legendtext')]"
        ".map((text) => text.textContent)"
    )
    assert EVIL in legend
    assert count(browser, "img, section script, nav script") == 0


def test_a_click_in_the_legend_hides_a_line_with_its_shade(shown):
    from selenium.webdriver.common.by import By

    browser = shown()
    lines, shades = count(browser, LINES), count(browser, LINES.replace("line", "fill"))
    assert (lines, shades) == (3 + 3, 3)  # the outline of a shade is a line without width
    entry = browser.find_element(By.CSS_SELECTOR, "[data-study='0'] .legendtoggle")
    browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", entry)
    entry.click()
    script = "return document.querySelectorAll(arguments[0]).length === arguments[1]"
    wait(browser, script, LINES, lines - 2)
    assert count(browser, LINES.replace("line", "fill")) == shades - 1
    # It stays hidden with another metric, and comes back with another click.
    choose(browser, "metric", "test_loss")
    assert count(browser, LINES) == lines - 2
    browser.find_element(By.CSS_SELECTOR, "[data-study='0'] .legendtoggle").click()
    wait(browser, script, LINES, lines)


def choose(browser, control, value):
    browser.execute_script(
        "const box = document.querySelector(`[data-study='0'] [data-control=${arguments[0]}]`);"
        "box.value = arguments[1]; box.dispatchEvent(new Event('change'));",
        control, value,
    )  # fmt: skip


def tick(browser, control):
    browser.execute_script(
        "document.querySelector(`[data-study='0'] [data-control=${arguments[0]}]`).click()", control
    )


def test_metric_stage_axes_and_shades_can_be_chosen(shown):
    browser = shown()
    title = "return document.querySelector('[data-study=\"0\"] .ytitle').textContent"
    assert browser.execute_script(title) == "test accuracy [%]"
    before = outlines(browser, LINES)
    choose(browser, "metric", "validation_loss")
    assert browser.execute_script(title) == "validation loss"
    after = outlines(browser, LINES)
    assert after != before
    axes = (
        "const { xaxis, yaxis } = document.querySelector('[data-plot=curves]')._fullLayout;"
        "return [xaxis.type, yaxis.type]"
    )
    assert browser.execute_script(axes) == ["linear", "log"]  # a loss that is positive
    for control, expected in (("logy", ["linear", "linear"]), ("logx", ["log", "linear"])):
        tick(browser, control)
        assert browser.execute_script(axes) == expected
    assert count(browser, LINES.replace("line", "fill")) == 3
    tick(browser, "bands")
    assert count(browser, LINES.replace("line", "fill")) == 0
    choose(browser, "stage", "tuning")
    assert count(browser, LINES) == 2 + 2  # of three values each, one diverged


def test_the_mouse_over_a_point_shows_its_values(shown):
    from selenium.webdriver.common.action_chains import ActionChains

    browser = shown()
    (point, *_) = browser.find_elements("css selector", "[data-study='0'] .scatterlayer .point")
    browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", point)
    points = browser.find_elements("css selector", "[data-study='0'] .scatterlayer .trace .point")
    ActionChains(browser).move_to_element(points[4]).perform()
    text = wait(
        browser, "return document.querySelector('[data-study=\"0\"] .hoverlayer').textContent"
    )
    assert "step 40" in text
    assert "±" in text


def test_tables_are_sorted_by_a_click(shown):
    browser = shown()
    cells = (
        "return [...document.querySelector('[data-study=\"0\"] table').tBodies[0].rows]"
        ".map((row) => row.cells[2].textContent)"
    )
    click = "document.querySelectorAll('[data-study=\"0\"] table thead button')[2].click()"
    found = []
    for _ in range(2):
        browser.execute_script(click)
        found.append(browser.execute_script(cells))
    rising, falling = found
    assert rising[-1] == falling[-1] == "–"  # nothing was stable: last in either order
    values = [float(text.split()[0]) for text in rising[:-1]]
    assert values == sorted(values)
    assert falling[:-1] == rising[:-1][::-1]


def test_black_is_not_drawn_on_black(shown):
    used = (
        "return [...document.querySelectorAll('.scatterlayer .trace path.js-line')]"
        ".map((path) => getComputedStyle(path).stroke)"
    )
    ink = {"light": "rgb(26, 26, 26)", "dark": "rgb(236, 236, 236)"}
    for scheme, other in (("light", "dark"), ("dark", "light")):
        strokes = set(shown(1400, scheme).execute_script(used))
        assert ink[scheme] in strokes
        assert not strokes & {ink[other], "rgb(0, 0, 0)"}


def test_no_button_sends_the_numbers_away(shown):
    buttons = shown().execute_script(
        "return [...document.querySelectorAll('.modebar-btn')]"
        ".map((button) => button.dataset.title.toLowerCase())"
    )
    assert buttons
    assert not [title for title in buttons if "cloud" in title or "share" in title]
