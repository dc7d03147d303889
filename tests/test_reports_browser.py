"""A report's page in Chromium: its code runs, its graph answers, it fits a phone and the dark."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from test_reports import EVIL, everything

webdriver = pytest.importorskip("selenium.webdriver")
PROGRAMS = map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))
CHROMIUM = next(filter(None, PROGRAMS), "")
DRIVER = shutil.which("chromedriver") or ""
pytestmark = pytest.mark.skipif(
    not (CHROMIUM and DRIVER), reason="needs the programs chromium and chromedriver"
)
FLAGS = (
    "headless no-sandbox disable-gpu disable-quic no-first-run disable-background-networking "
    "disable-component-update disable-sync disable-dev-shm-usage"
).split()
__all__ = ["everything"]  # a fixture


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in FLAGS:
        options.add_argument(f"--{flag}")
    options.add_argument(f"--user-data-dir={tmp_path_factory.mktemp('browser')}")
    driver = webdriver.Chrome(options=options, service=Service(DRIVER))
    yield driver
    driver.quit()


@pytest.fixture
def page(browser: Any, everything: Any, tmp_path: Path) -> Any:
    (file,) = everything.write(tmp_path / "page.html")
    shape(browser, 1280)
    browser.get(file.as_uri())
    yield browser
    assert not browser.get_log("browser"), "no error, nothing that was blocked"


def shape(browser: Any, width: int, colours: str = "light") -> None:
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    wishes = {"prefers-color-scheme": colours, "prefers-reduced-motion": "reduce"}
    features = [{"name": name, "value": value} for name, value in wishes.items()]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})


def find(page: Any, selector: str) -> Any:
    return page.find_element("css selector", selector)


def box(page: Any, name: str) -> Any:
    return find(page, f'.box[aria-label^="{name}"]')


def width(page: Any) -> float:
    return float(find(page, ".map").get_attribute("width"))


def told(page: Any) -> str:
    text: str = find(page, ".told").text
    return text


def test_nothing_is_loaded_and_names_are_text(page: Any) -> None:
    loaded = page.execute_script("return performance.getEntriesByType('resource').length")
    assert loaded == 0 and page.title == f"Report of {EVIL}"
    assert find(page, "h1").text == f"Report of {EVIL}"


def test_a_click_says_what_a_layer_is_coupled_with(page: Any) -> None:
    box(page, "conv1").click()
    assert "8 channels, 8 left" in told(page)
    assert "goes together with\nconv2" in told(page) and "test_reports.py:" in told(page)
    near = page.find_elements("css selector", ".box.near")
    assert {each.get_attribute("aria-label").split(",")[0] for each in near} == {
        "input", "conv1", "conv2", "add",
    }  # fmt: skip
    find(page, ".told button").click()  # the coupled layer's name
    assert told(page).startswith("conv2")
    assert "chosen" in box(page, "conv2").get_attribute("class")
    page.find_elements("css selector", ".told button")[-1].click()  # what comes after it
    assert told(page).startswith("add\nIts output goes to\nconv3")


def test_pointing_at_a_layer_is_enough_and_is_forgotten(page: Any) -> None:
    from selenium.webdriver import ActionChains

    ActionChains(page).move_to_element(box(page, "conv2")).perform()
    assert told(page).startswith("conv2") and "goes together with\nconv1" in told(page)
    ActionChains(page).move_to_element(find(page, "h1")).perform()
    assert "Choose a box" in told(page)
    assert "some" not in find(page, ".map").get_attribute("class")


def test_buttons_zoom(page: Any) -> None:
    begin = width(page)
    find(page, "[data-zoom=in]").click()
    assert width(page) == pytest.approx(1.3 * begin)
    find(page, "[data-zoom=out]").click()
    assert width(page) == pytest.approx(begin)
    find(page, "[data-zoom=whole]").click()
    view, map = (find(page, name).rect for name in (".view", ".map"))
    assert map["height"] <= view["height"] and map["width"] <= view["width"]


def test_the_wheel_zooms_about_the_pointer(page: Any) -> None:
    turn = """
        const view = document.querySelector(".view"), map = document.querySelector(".map");
        const box = document.querySelectorAll(".box")[3];
        const middle = () => { const r = box.getBoundingClientRect(); return [r.x + r.width / 2, r.y + r.height / 2]; };
        const [x, y] = middle();
        for (let i = 0; i < 2; i++) view.dispatchEvent(new WheelEvent("wheel",
          {deltaY: -100, clientX: x, clientY: y, ctrlKey: arguments[0], bubbles: true, cancelable: true}));
        return [x, y, ...middle(), map.getBoundingClientRect().width];
    """  # noqa: E501
    for _ in range(5):
        find(page, "[data-zoom=in]").click()  # until there is more than can be seen
    begin = width(page)
    *_, still = page.execute_script(turn, False)
    assert still == pytest.approx(begin, abs=0.1), "without Ctrl it scrolls, as everywhere"
    x, y, now_x, now_y, wider = page.execute_script(turn, True)
    assert wider == pytest.approx(begin * 1.948, rel=0.01)
    assert (now_x, now_y) == pytest.approx((x, y), abs=2)


def test_a_mouse_drags_and_that_is_no_click(page: Any) -> None:
    from selenium.webdriver import ActionChains

    for _ in range(6):
        find(page, "[data-zoom=in]").click()
    view = find(page, ".view")
    page.execute_script("arguments[0].scrollIntoView(); arguments[0].scrollTop = 200", view)
    ActionChains(page).click_and_hold(view).move_by_offset(0, -60).release().perform()
    assert page.execute_script("return arguments[0].scrollTop", view) == pytest.approx(260, abs=2)
    assert not page.find_elements("css selector", ".box.chosen")


def test_keys_are_enough(page: Any) -> None:
    page.execute_script("document.querySelector('.box[tabindex=\"0\"]').focus()")
    active = page.switch_to.active_element
    active.send_keys("\ue015")  # arrow down, from the input
    assert told(page).startswith("conv1")
    begin = width(page)
    page.switch_to.active_element.send_keys("+")
    assert width(page) > begin
    page.switch_to.active_element.send_keys("\ue00c")  # Escape
    assert "Choose a box" in told(page)
    find(page, ".find input").send_keys("conv3\ue007")
    assert told(page).startswith("conv3\n6 channels, 4 left")


def test_a_phone_scrolls_downwards_only(page: Any) -> None:
    shape(page, 390)
    page.refresh()
    root = "document.documentElement"
    assert page.execute_script(f"return {root}.scrollWidth") == 390
    assert find(page, ".told").rect["y"] > find(page, ".view").rect["y"] + 100, "below the graph"
    assert width(page) <= find(page, ".view").rect["width"]


def test_the_page_is_dark_in_the_dark(page: Any) -> None:
    def brightness(what: str) -> float:
        colour = page.execute_script(f"return getComputedStyle(document.body).{what}")
        return sum(map(int, colour.removeprefix("rgb(").rstrip(")").split(",")))

    assert brightness("backgroundColor") > 700 and brightness("color") < 200
    shape(page, 1280, "dark")
    assert brightness("backgroundColor") < 100 and brightness("color") > 600


def test_rows_are_filtered(browser: Any, tmp_path: Path) -> None:
    import compress
    from compress.measure import Table

    rows = tuple((f"layer{i}", str(i)) for i in range(20))
    made = compress.report(tables={"Many": Table(("layer", "n"), rows)}, environment={})
    (file,) = made.write(tmp_path / "page.html")
    browser.get(file.as_uri())
    find(browser, ".filter input").send_keys("LAYER1")
    shown = [r for r in browser.find_elements("css selector", "tbody tr") if r.is_displayed()]
    assert len(shown) == 11
