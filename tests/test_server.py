"""Cog's own server, as scripts/serve starts it, over real sockets."""

import base64
import contextlib
import functools
import http.server
import io
import json
import os
import signal
import socket
import subprocess
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from japanese_stable_diffusion.openapi import schema

ROOT = Path(__file__).resolve().parent.parent
SMALL = {"width": 64, "height": 128, "num_inference_steps": 1}


@contextlib.contextmanager
def serve(weights: str, log: Path) -> Iterator[str]:
    """The address of a server with these weights, which has come to rest: READY or SETUP_FAILED."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with log.open("wb") as file:
        process = subprocess.Popen(
            [ROOT / "scripts" / "serve", "--host", "127.0.0.1"],
            cwd=log.parent,
            env={**os.environ, "PORT": str(port), "JSD_WEIGHTS": weights},
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=file,
        )
    address = f"http://127.0.0.1:{port}"
    try:
        while health(address) not in ("READY", "SETUP_FAILED"):
            assert process.poll() is None, log.read_text()
            time.sleep(0.1)
        yield address
    finally:
        process.send_signal(signal.SIGINT)
        process.wait()


def health(address: str) -> str:
    try:
        return str(call(address + "/health-check")[1]["status"])
    except urllib.error.URLError:
        return "NOT LISTENING"


def call(url: str, body: bytes | None = None) -> tuple[int, dict[str, Any]]:
    request = urllib.request.Request(url, data=body, headers={"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request) as response:
            return response.status, json.load(response)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


def predict(address: str, **inputs: object) -> tuple[int, dict[str, Any]]:
    # An answer can arrive a moment before its slot is free again.
    while health(address) == "BUSY":
        time.sleep(0.01)
    return call(address + "/predictions", json.dumps({"input": inputs}).encode())


@pytest.fixture(scope="module")
def server(tiny_weights: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with serve(str(tiny_weights), tmp_path_factory.mktemp("server") / "log") as address:
        assert health(address) == "READY"
        yield address


def test_a_prompt_becomes_pictures(server: str) -> None:
    status, told = predict(server, prompt="サラリーマン 油絵", seed=4294967295, num_outputs=2, **SMALL)
    assert (status, told["status"]) == (200, "succeeded")
    for output in told["output"]:
        kind, data = output.split(",", 1)
        assert kind == "data:image/png;base64"
        assert Image.open(io.BytesIO(base64.b64decode(data))).size == (64, 128)
    assert len(set(told["output"])) == 2
    assert "seed: 4294967295" in told["logs"]
    assert told["metrics"]["unet_evaluations"] >= 1


def test_what_it_serves_is_described(server: str) -> None:
    assert call(server + "/openapi.json") == (200, schema())


@pytest.mark.parametrize(
    "inputs",
    [
        {"seed": -1},
        {"seed": "1"},
        {"seed": 1.5},
        {"width": 100},
        {"num_outputs": 9},
        {"num_inference_steps": 0},
        {"guidance_scale": 0.5},
        {"scheduler": "none"},
        {"output_format": "gif"},
        {"output_quality": 101},
        {"prompt_strength": -0.1},
        {"image": 5},
        {"prompt": "猫" * 1001},
        {"prompt": 1},
    ],
    ids=str,
)
def test_a_wrong_value_is_refused_by_name(inputs: dict[str, object], server: str) -> None:
    status, told = predict(server, **{**SMALL, **inputs})
    assert status == 422
    assert [detail["loc"] for detail in told["detail"]] == [["body", "input", *inputs]]
    assert_it_still_serves(server)


def test_values_that_are_wrong_together_fail_the_prediction_in_one_line(server: str) -> None:
    status, told = predict(server, width=1024, height=1024, num_inference_steps=1)
    assert (status, told["status"]) == (200, "failed")
    assert "width, height: 1024 × 1024 is 1,048,576 pixels" in told["error"]
    assert "\n" not in told["error"] and "Traceback" not in told["logs"]
    assert_it_still_serves(server)


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b'{"input": 1}', b"\xff\xfe"])
def test_what_is_no_request_is_refused(body: bytes, server: str) -> None:
    with contextlib.suppress(json.JSONDecodeError):
        status, _ = call(server + "/predictions", body)
        assert 400 <= status < 500
    assert_it_still_serves(server)


@pytest.fixture(scope="module")
def photograph(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A picture on the server's disk."""
    path = tmp_path_factory.mktemp("photograph") / "photograph.png"
    Image.linear_gradient("L").resize((64, 128)).save(path)
    return path


def data_url(file: Path) -> str:
    return "data:image/png;base64," + base64.b64encode(file.read_bytes()).decode()


def test_a_picture_may_come_in_a_data_url_or_from_an_http_url(server: str, photograph: Path) -> None:
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=photograph.parent)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as pictures:
        threading.Thread(target=pictures.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{pictures.server_address[1]}/photograph.png"
        fetched = predict(server, image=url, seed=1, num_inference_steps=2)[1]
        pictures.shutdown()
    sent = predict(server, image=data_url(photograph), seed=1, num_inference_steps=2)[1]
    assert fetched["status"] == sent["status"] == "succeeded"
    assert fetched["output"] == sent["output"]
    made = Image.open(io.BytesIO(base64.b64decode(sent["output"][0].split(",")[1])))
    assert made.size == (64, 128)


@pytest.mark.parametrize(
    ("name", "form"),
    [("image", "{}"), ("image", "file://{}"), ("image", "FILE://localhost{}"), ("mask", "{}")],
)
def test_a_caller_can_not_name_a_file_on_the_servers_disk(
    form: str, name: str, server: str, photograph: Path
) -> None:
    named = {"image": data_url(photograph), name: form.format(photograph)}
    status, told = predict(server, **named, num_inference_steps=1)
    assert (status, told["status"]) == (200, "failed")
    assert f"{name}: " in told["error"] and "is not a file that was sent" in told["error"]


@pytest.mark.parametrize("data", [b"", b"<html></html>", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff\xda"])
def test_what_is_no_picture_fails_the_prediction_in_one_line(data: bytes, server: str) -> None:
    url = "data:image/png;base64," + base64.b64encode(data).decode()
    status, told = predict(server, image=url, num_inference_steps=1)
    assert (status, told["status"]) == (200, "failed")
    assert "image: is not a picture" in told["error"]
    assert "\n" not in told["error"] and "Traceback" not in told["logs"]
    assert_it_still_serves(server)


def assert_it_still_serves(server: str) -> None:
    status, told = predict(server, **SMALL)
    assert (status, told["status"]) == (200, "succeeded")


@pytest.mark.slow
def test_missing_weights_fail_the_setup_in_one_line(tmp_path: Path) -> None:
    with serve("nowhere", tmp_path / "log") as address:
        assert health(address) == "SETUP_FAILED"
        assert predict(address, **SMALL)[0] == 503
    log = (tmp_path / "log").read_text()
    assert f"JSD_WEIGHTS: {tmp_path / 'nowhere'} is not a folder" in log
    assert "Traceback" not in log
