"""The page as a visitor uses it, in a real browser: with the model here, and with a server that has it."""

import contextlib
import os
import signal
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import pytest
from PIL import Image, ImageChops
from playwright.sync_api import Browser
from playwright.sync_api import Page as Tab
from test_server import serve

from japanese_stable_diffusion.page.layout import Page
from japanese_stable_diffusion.page.line import Finished, Teller
from japanese_stable_diffusion.page.screenshot import fill, open_browser, open_tab
from japanese_stable_diffusion.provenance import read_parameters

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parent.parent.parent
SMALL = {"width": "64", "height": "64", "num_inference_steps": "2"}
ENDLESS = {"width": "256", "height": "256", "num_inference_steps": "500", "num_outputs": "8"}


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
        return port


@contextlib.contextmanager
def web(weights: Path, log: Path, *arguments: str) -> Iterator[str]:
    """The address of a page that is open."""
    port = free_port()
    with log.open("wb") as file:
        process = subprocess.Popen(
            [ROOT / "scripts" / "web", "--port", str(port), *arguments],
            cwd=log.parent,
            env={**os.environ, "JSD_WEIGHTS": str(weights), "TMPDIR": str(log.parent)},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=file,
            text=True,
        )
    assert process.stdout
    try:
        lines = [process.stdout.readline() for _ in range(2)]
        address = f"http://127.0.0.1:{port}"
        assert lines[1] == f"Open {address} in a browser. Ctrl-C ends it.\n", log.read_text()
        yield address
    finally:
        process.send_signal(signal.SIGINT)
        process.wait()
        process.stdout.close()
    assert process.returncode == 130
    assert "Traceback" not in log.read_text()
    # Nothing of what visitors sent and got is left.
    assert not list(log.parent.glob("japanese-stable-diffusion-*"))


@pytest.fixture(scope="module", params=["model", "server"])
def address(
    request: pytest.FixtureRequest, tiny_weights: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("web")
    with contextlib.ExitStack() as stack:
        arguments = []
        if request.param == "server":
            url = stack.enter_context(serve(str(tiny_weights), folder / "server.log"))
            arguments = ["--server", url]
        yield stack.enter_context(web(tiny_weights, folder / "web.log", *arguments))


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with open_browser() as browser:
        yield browser


@pytest.fixture
def tab(browser: Browser, address: str) -> Iterator[Tab]:
    tab = open_tab(browser, address)
    fill(tab, SMALL)
    yield tab
    tab.close()


def paint(tab: Tab, count: int) -> None:
    """Let it paint, until this visit has so many pictures."""
    tab.click("#paint")
    tab.locator("#history img").nth(count - 1).wait_for()


def download(tab: Tab, folder: Path) -> Path:
    with tab.expect_download() as downloading:
        tab.click("#download")
    file = folder / downloading.value.suggested_filename
    downloading.value.save_as(file)
    return file


def test_a_prompt_becomes_a_picture_that_can_be_made_again(tab: Tab, tmp_path: Path) -> None:
    fill(tab, {"prompt": "富士山 浮世絵"})
    paint(tab, 1)
    assert "できました / Done" in tab.inner_text("#news")
    first = download(tab, tmp_path)
    made = read_parameters(first).request
    assert (made.prompt, made.num_inference_steps) == ("富士山 浮世絵", 2)
    assert first.name == f"seed-{made.seed}.png"
    assert f"Seed: {made.seed}" in tab.inner_text("#made")
    assert f"シード / seed {made.seed}" in tab.inner_text("#pictures")

    tab.click("#again")
    tab.locator("#history img").nth(1).wait_for()
    again = download(tab, tmp_path.joinpath("again"))
    assert read_parameters(again).request == made
    assert ImageChops.difference(Image.open(first), Image.open(again)).getbbox() is None

    fill(tab, {"seed": "7", "prompt": "猫"})
    paint(tab, 3)
    assert "Seed: 7" in tab.inner_text("#made")
    # The history begins with the newest; the last is the first that was made.
    tab.locator("#history button:has(img)").last.click()
    tab.locator("#made", has_text="富士山 浮世絵").wait_for()


def test_one_sees_how_far_it_is_and_may_cancel(
    tab: Tab, address: str, request: pytest.FixtureRequest
) -> None:
    fill(tab, ENDLESS)
    tab.click("#paint")
    tab.wait_for_function("document.querySelector('#news progress')?.max == 4000")
    before = tab.evaluate("document.querySelector('#news progress').value")
    tab.wait_for_function("then => document.querySelector('#news progress').value > then", arg=before)
    if "model" in request.node.name:
        previews = "[...document.querySelectorAll('#news img')].map(image => image.naturalWidth)"
        assert tab.evaluate(previews) == [256] * 8
    tab.click("#cancel")
    tab.locator("#news", has_text="やめました / Cancelled").wait_for()
    assert not tab.locator("#pictures img").count()

    fill(tab, {**SMALL, "num_outputs": "2"})
    paint(tab, 2)


@pytest.mark.parametrize("nonsense", ["-1", "<b>七</b>", "4294967296", "1.5"])
def test_a_wrong_value_is_told_in_one_line(nonsense: str, tab: Tab) -> None:
    fill(tab, {"seed": nonsense})
    tab.click("#paint")
    alert = tab.locator("#news [role=alert]")
    alert.wait_for()
    told = alert.inner_text()
    assert told.startswith("seed: ") and nonsense in told and "\n" not in told
    fill(tab, {"seed": ""})
    paint(tab, 1)


def test_a_press_is_heard_from_the_moment_that_the_button_can_be_pressed(tab: Tab) -> None:
    tab.evaluate("""() => {
        const button = document.querySelector("#paint");
        let busy = false;
        new MutationObserver((_, observer) => {
            busy ||= button.disabled;
            if (busy && !button.disabled) {
                observer.disconnect();
                button.click();
            }
        }).observe(button, {attributeFilter: ["disabled"]});
    }""")
    paint(tab, 2)


def test_pressing_twice_starts_again(tab: Tab) -> None:
    fill(tab, ENDLESS)
    paint_twice = "document.querySelector('#paint').click(); document.querySelector('#paint').click()"
    tab.evaluate(paint_twice)
    tab.wait_for_function("document.querySelector('#news progress')?.value > 0")
    assert tab.locator("#cancel").is_enabled() and tab.locator("#paint").is_disabled()
    tab.click("#cancel")
    tab.locator("#news", has_text="やめました / Cancelled").wait_for()
    fill(tab, {**SMALL, "num_outputs": "1"})
    paint(tab, 1)


def test_visitors_stand_in_line_and_who_leaves_makes_room(browser: Browser, tab: Tab, address: str) -> None:
    other = open_tab(browser, address)
    fill(other, ENDLESS)
    other.click("#paint")
    other.locator("#news progress").wait_for()
    tab.click("#paint")
    tab.locator("#news", has_text="前に 1 件").wait_for()
    other.close()
    tab.locator("#history img").first.wait_for()


def test_it_needs_nothing_from_elsewhere(browser: Browser, address: str) -> None:
    tab = browser.new_page()
    asked: list[str] = []
    tab.on("request", lambda request: asked.append(request.url))
    tab.goto(address)
    tab.locator("#paint").wait_for()
    fill(tab, SMALL)
    paint(tab, 1)
    assert asked and [url for url in asked if not url.startswith((address, "data:", "blob:"))] == []
    tab.close()


def test_a_mask_is_drawn_over_a_picture(browser: Browser, tmp_path: Path) -> None:
    received: SimpleQueue[dict[str, Image.Image]] = SimpleQueue()

    def make(inputs: dict[str, Any], tell: Teller) -> Finished:
        received.put({name: Image.open(file).copy() for name, file in inputs.items()})
        return Finished((inputs["image"],))

    upload = {"type": "string", "format": "uri", "nullable": True}
    schema = {"components": {"schemas": {"Input": {"properties": {"image": upload, "mask": upload}}}}}
    Image.new("RGB", (300, 200), "red").save(tmp_path / "red.png")
    port = free_port()
    page = Page(make, schema)
    page.launch("127.0.0.1", port)
    try:
        tab = open_tab(browser, f"http://127.0.0.1:{port}")
        tab.get_by_text("画像などのファイル").click()
        canvas = tab.locator("#image canvas").first
        canvas.wait_for()
        tab.get_by_text("brush that part white").wait_for()
        tab.locator("#image input[type=file]").first.set_input_files(tmp_path / "red.png")
        tab.get_by_text("brush that part white").wait_for(state="detached")
        paint(tab, 1)
        assert received.get().keys() == {"image"}

        box = canvas.bounding_box()
        assert box
        middle = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
        tab.mouse.move(*middle)
        tab.mouse.down()
        tab.mouse.move(middle[0] + 30, middle[1], steps=5)
        tab.mouse.up()
        paint(tab, 2)
        inputs = received.get()
        assert inputs["image"].size == inputs["mask"].size == (300, 200)
        assert inputs["image"].getpixel((5, 5)) == (255, 0, 0)
        # White where the brush was, black elsewhere.
        assert inputs["mask"].getpixel((150, 100)) == 255 and inputs["mask"].getpixel((5, 5)) == 0
        tab.close()
    finally:
        page.close()


def test_its_picture_can_be_taken(tiny_weights: Path, tmp_path: Path) -> None:
    file = tmp_path / "docs" / "page.png"
    small = [argument for name, value in SMALL.items() for argument in ("-i", f"{name}={value}")]
    told = subprocess.run(
        [ROOT / "scripts" / "web-screenshot", *small, "-i", "seed=3", "-o", file],
        env={**os.environ, "JSD_WEIGHTS": str(tiny_weights)},
        capture_output=True,
        text=True,
    )
    assert (told.returncode, told.stdout) == (0, f"{file}\n"), told.stderr
    assert Image.open(file).width == 1280
