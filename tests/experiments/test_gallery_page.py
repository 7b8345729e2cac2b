"""The gallery's page in a browser: offline, without errors, and doing what its controls say."""

import numpy as np
import pytest

from optgrad.experiments.gallery import numbers, page

from .test_report_page import browser, count, wait

pytestmark = pytest.mark.slow

__all__ = ["browser"]  # a fixture

METHODS = ("sgd", "momentum", "adam", "gauss_newton", "kfac", "m_ssd", "sign_sgd")
SETTINGS = numbers.Settings(budgets=(10, 30), shown=30, values=5, starts=2)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """The page of a small gallery."""
    found = numbers.measure(METHODS, ["rosenbrock", "goldstein_price"], SETTINGS)
    file = tmp_path_factory.mktemp("page") / page.NAME
    file.write_text(page.html(found), encoding="utf-8")
    return file, found


@pytest.fixture
def shown(browser, place):
    """Opens the page, as wide as is asked for, in a colour scheme, and at an address."""

    def show(width=1280, scheme="light", address=""):
        size = {"width": width, "height": 1000, "deviceScaleFactor": 1, "mobile": False}
        scheme = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", scheme)
        browser.get("about:blank")
        browser.get(place[0].as_uri() + address)
        wait(browser, "return document.documentElement.dataset.ready === 'true'")
        return browser

    return show


def pixels(driver, identity):
    """What a canvas shows."""
    return driver.execute_script(
        "return document.getElementById(arguments[0]).toDataURL()", identity
    )


def change(driver, identity, value, event="change"):
    driver.execute_script(
        "const box = document.getElementById(arguments[0]); box.value = arguments[1];"
        "box.dispatchEvent(new Event(arguments[2]));",
        identity, str(value), event,
    )  # fmt: skip


def text(driver, selector):
    return driver.execute_script(
        "return [...document.querySelectorAll(arguments[0])].map((e) => e.textContent)", selector
    )


def press(driver, selector):
    driver.execute_script("document.querySelector(arguments[0]).click()", selector)


def names(driver):
    return text(driver, "#chosen .name")


def colours(driver, identity):
    """How many different colours a canvas has."""
    return driver.execute_script(
        "const c = document.getElementById(arguments[0]);"
        "const d = c.getContext('2d').getImageData(0, 0, c.width, c.height).data;"
        "const found = new Set(); for (let i = 0; i < d.length; i += 4)"
        "found.add(d[i] * 65536 + d[i + 1] * 256 + d[i + 2]); return found.size;",
        identity,
    )


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 400])
def test_it_loads_offline_without_errors_and_fits(shown, width, scheme):
    driver = shown(width, scheme)
    assert driver.get_log("browser") == []
    asked = driver.execute_script(
        "return performance.getEntriesByType('resource').map((entry) => entry.name)"
    )
    assert [name for name in asked if not name.startswith("data:")] == []
    assert driver.execute_script("return document.documentElement.scrollWidth") <= width
    for identity in ("paths", "curves"):
        assert colours(driver, identity) > 20
    background = driver.execute_script("return getComputedStyle(document.body).backgroundColor")
    assert background == {"light": "rgb(255, 255, 255)", "dark": "rgb(23, 24, 26)"}[scheme]


def test_every_control_changes_the_pictures(shown):
    driver = shown()
    before = pixels(driver, "paths"), pixels(driver, "curves")

    def has_changed():
        nonlocal before
        now = pixels(driver, "paths"), pixels(driver, "curves")
        changed = [a != b for a, b in zip(before, now, strict=True)]
        before = now
        return all(changed)

    change(driver, "landscape", 1)
    wait(driver, "return document.getElementById('about').textContent.startsWith('Goldstein')")
    wait(driver, "return location.hash.includes('goldstein_price')")
    assert has_changed()
    press(driver, "#noise-2")
    assert has_changed()
    change(driver, "time", 4, "input")
    assert has_changed()
    slider = "#chosen li:first-child input"
    driver.execute_script(
        "const s = document.querySelector(arguments[0]); s.value = 2;"
        "s.dispatchEvent(new Event('input'))", slider,
    )  # fmt: skip
    assert has_changed()
    press(driver, "#chosen li:nth-child(2) button:last-of-type")
    assert has_changed()
    assert driver.get_log("browser") == []


def test_values_are_those_of_the_runs(shown, place):
    found = place[1]
    driver = shown(address="#landscape=rosenbrock&noise=none&budget=30&methods=adam,sgd:0&t=0")
    last = len(SETTINGS.times) - 1
    change(driver, "time", last, "input")
    methods = list(found.methods)
    chosen = found.chosen("rosenbrock", "adam", 30)
    rows = text(driver, "#values td:last-child")
    for method, value, shown_text in zip(("adam", "sgd"), (chosen, 0), rows, strict=True):
        code = found.excesses[0, methods.index(method), value, 0, last]
        assert float(shown_text.replace("−", "-")) == pytest.approx(numbers.log_excess(code))
    x, y = (
        float(n) for n in text(driver, "#values td:nth-child(3)")[0].replace("−", "-").split(",")
    )
    track = found.positions[0, methods.index("adam"), chosen, 0, last]
    expected = numbers.unrounded(track, ((-2.0, 2.0), (-1.0, 3.0)))
    np.testing.assert_allclose([x, y], expected, atol=0.006)
    assert "(tuned" in text(driver, "#chosen .text")[0]
    assert "(tuned" not in text(driver, "#chosen .text")[1]
    press(driver, "#chosen li:nth-child(2) button")
    assert "(tuned" in text(driver, "#chosen .text")[1]


def test_methods_are_searched_added_and_removed(shown):
    driver = shown(address="#methods=sgd")
    assert names(driver) == ["sgd"]
    change(driver, "search", "sign", "input")
    assert text(driver, "#list option") == ["sign_sgd", "m_ssd"]  # the second by its title
    press(driver, "#add")
    assert names(driver) == ["sgd", "sign_sgd"]
    press(driver, "#add")
    assert names(driver) == ["sgd", "sign_sgd"]
    assert "shown already" in text(driver, "#full")[0]
    change(driver, "search", "", "input")
    for name in ("momentum", "adam", "gauss_newton", "kfac"):
        change(driver, "list", name)
        press(driver, "#add")
    assert len(names(driver)) == 6
    assert driver.execute_script("return document.getElementById('add').disabled")
    assert any("it needs the layers" in line for line in text(driver, "#chosen .text"))
    press(driver, "#chosen li:first-child button:last-of-type")
    assert names(driver)[0] == "sign_sgd"
    assert count(driver, "#legend li") == 5


def test_it_plays_and_pauses(shown):
    driver = shown()
    press(driver, "#play")
    assert text(driver, "#play") == ["Pause"]
    wait(driver, "return Number(document.getElementById('time').value) > 0.5")
    press(driver, "#play")
    assert text(driver, "#play") == ["Play"]
    stopped = driver.execute_script("return document.getElementById('time').value")
    assert 0 < float(stopped) < len(SETTINGS.times) - 1
    clock = text(driver, "#clock")[0]
    assert clock.endswith("gradient equivalents")


def test_the_address_keeps_what_is_shown(shown):
    driver = shown(
        address="#landscape=goldstein_price&noise=small&budget=10&methods=adam:1,sgd&t=7"
    )
    before = pixels(driver, "paths"), pixels(driver, "curves")
    address = driver.execute_script("return location.hash")
    assert address == "#landscape=goldstein_price&noise=small&budget=10&methods=adam:1,sgd&t=7"
    again = shown(address=address)
    assert (pixels(again, "paths"), pixels(again, "curves")) == before


@pytest.mark.parametrize("address", ["#landscape=x&noise=y&budget=z&methods=a:b,adam:99&t=1e9",
                                     "#methods=", "#t=NaN&methods=sgd,sgd"])  # fmt: skip
def test_a_wrong_address_is_no_error(shown, address):
    driver = shown(address=address)
    assert driver.get_log("browser") == []
    assert len(names(driver)) <= 1


def test_the_mouse_over_a_picture_shows_values(shown):
    from selenium.webdriver.common.action_chains import ActionChains

    driver = shown(address="#landscape=rosenbrock&methods=sgd")
    for identity, offset in (("paths", (40, 40)), ("curves", (0, 0))):
        element = driver.find_element("id", identity)
        driver.execute_script("arguments[0].scrollIntoView({block: 'center'})", element)
        width, height = element.size["width"], element.size["height"]
        if identity == "curves":  # the last point of the line
            level = float(text(driver, "#values td:last-child")[0].replace("−", "-"))
            assert -3 < level < 3
            places = [
                (width - 25 - width / 2, y - height / 2) for y in range(16, int(height) - 44, 8)
            ]
        else:
            places = [offset]
        found = ""
        for x, y in places:
            ActionChains(driver).move_to_element_with_offset(element, int(x), int(y)).perform()
            found = driver.execute_script(
                "const h = document.getElementById('hover'); return h.hidden ? '' : h.textContent"
            )
            if found:
                break
        assert "log₁₀ (f − f*)" in found
    assert "sgd, learning_rate" in found


def test_every_control_has_a_name_and_can_be_reached(shown):
    driver = shown()
    unnamed = driver.execute_script(
        "return [...document.querySelectorAll('button, select, input')].filter((e) =>"
        "!(e.textContent.trim() && e.tagName === 'BUTTON') && !e.getAttribute('aria-label')"
        "&& !(e.labels && e.labels.length)).map((e) => e.outerHTML)"
    )
    assert unnamed == []
    assert count(driver, "[tabindex='-1']") == 0
