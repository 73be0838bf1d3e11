"""The page in a real browser, and pictures of it."""

import contextlib
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

from playwright.sync_api import Browser, Error, Page, TimeoutError, sync_playwright

_BROWSERS = ("chromium", "chromium-browser", "google-chrome")
_PATIENCE = 30 * 60 * 1000
"""Milliseconds for anything in the browser to happen: the real model paints for minutes on a CPU."""

_FIELD = 60 * 1000
"""Milliseconds after which a field is taken not to be there."""


class ScreenshotError(Exception):
    """No picture of the page can be taken; the message is one line."""


@contextlib.contextmanager
def open_browser() -> Iterator[Browser]:
    """A Chromium without a window.

    Raises:
        ScreenshotError: none is installed, or it doesn't start.
    """
    found = next(filter(None, map(shutil.which, _BROWSERS)), None)
    if not found:
        raise ScreenshotError(
            "no Chromium here: install it (Debian: apt-get install chromium fonts-noto-cjk)"
        )
    with sync_playwright() as playwright:
        try:
            browser = playwright.chromium.launch(executable_path=found)
        except Error as error:
            raise ScreenshotError(f"{found} does not start: {error.message.splitlines()[0]}") from None
        with browser:
            yield browser


def open_tab(browser: Browser, address: str) -> Page:
    """The page, ready to be used, as a visit of its own."""
    tab = browser.new_page(viewport={"width": 1280, "height": 1200}, locale="ja-JP")
    tab.set_default_timeout(_PATIENCE)
    tab.goto(address)
    tab.locator("#paint").wait_for()
    return tab


def fill(tab: Page, inputs: Mapping[str, str]) -> None:
    """Type values into the fields of inputs, and pick them from lists.

    Raises:
        ScreenshotError: there is no such field, or no such value in its list.
    """
    for name, value in inputs.items():
        # Gradio shows a form before all of its fields are loaded.
        with contextlib.suppress(TimeoutError):
            tab.locator(f"#{name}").locator("textarea, input").first.wait_for(timeout=_FIELD)
        choices = tab.locator(f"#{name} input[role=combobox]")
        if choices.count():
            choices.click()
            # The list of the field before may still be closing.
            options = tab.locator(f"[id^='{choices.get_attribute('aria-controls')}-option-']")
            options.first.wait_for()
            choice = options.and_(tab.get_by_role("option", name=value, exact=True))
            if not choice.count():
                raise ScreenshotError(f"{name}: {value} is not in its list")
            choice.click()
            continue
        field = tab.locator(f"#{name}").locator("textarea, input[type=text], input[type=number]").first
        if not field.count():
            raise ScreenshotError(f"{name}: is no field to type in or pick from")
        field.fill(value)
        field.blur()


def take(address: str, inputs: Mapping[str, str], file: Path) -> None:
    """Fill in the form, let it paint, and take a picture of the upper part of the page.

    Raises:
        ScreenshotError: an input is no field or is refused, or the browser doesn't start.
    """
    with open_browser() as browser:
        tab = open_tab(browser, address)
        fill(tab, inputs)
        tab.click("#paint")
        tab.locator("#history img, #news [role=alert]").first.wait_for()
        if tab.locator("#news [role=alert]").count():
            raise ScreenshotError(tab.locator("#news [role=alert]").inner_text())
        tab.wait_for_function("[...document.images].every(image => image.complete && image.naturalWidth)")
        file.parent.mkdir(parents=True, exist_ok=True)
        tab.evaluate("scrollTo(0, 0)")
        tab.screenshot(path=file, animations="disabled")
