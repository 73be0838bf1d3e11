"""Cog's own server, as scripts/serve starts it, over real sockets."""

import base64
import contextlib
import functools
import http.server
import io
import json
import os
import queue
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
from PIL import Image

from japanese_stable_diffusion.openapi import schema
from japanese_stable_diffusion.weights import Manifest, write_manifest

ROOT = Path(__file__).resolve().parent.parent
SMALL = {"width": 64, "height": 128, "num_inference_steps": 1}
ENDLESS = {"width": 64, "height": 64, "num_inference_steps": 500, "num_outputs": 8}
AT_REST = ("READY", "SETUP_FAILED", "UNHEALTHY")


@contextlib.contextmanager
def serve(weights: str, log: Path, *arguments: str) -> Iterator[str]:
    """The address of a server with these weights, once started; its temporary files go beside the log."""
    temporary = log.parent / "temporary"
    temporary.mkdir()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with log.open("wb") as file:
        process = subprocess.Popen(
            [ROOT / "scripts" / "serve", "--host", "127.0.0.1", *arguments],
            cwd=log.parent,
            env={
                **os.environ,
                "PORT": str(port),
                "JSD_WEIGHTS": weights,
                "TMPDIR": str(temporary),
                # Every line of a log is sent on at once, instead of twice a second, and nothing is left out.
                "COG_THROTTLE_RESPONSE_INTERVAL": "0",
            },
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=file,
        )
    address = f"http://127.0.0.1:{port}"
    try:
        told = ["NOT LISTENING"]
        while told[-1] not in AT_REST:
            assert process.poll() is None, log.read_text()
            time.sleep(0.1)
            told.append(health(address))
        assert "STARTING" in told
        yield address
    finally:
        process.send_signal(signal.SIGINT)
        process.wait()


def health(address: str) -> str:
    try:
        return str(call(address + "/health-check")[1]["status"])
    except urllib.error.URLError:
        return "NOT LISTENING"


def call(
    url: str, body: bytes | None = None, method: str | None = None, **headers: str
) -> tuple[int, dict[str, Any]]:
    headers = {"Content-Type": "application/json", **headers}
    request = urllib.request.Request(url, data=body, headers=headers, method=method)
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


def start(address: str, receiver: "Receiver", name: str, **inputs: object) -> tuple[int, dict[str, Any]]:
    """Ask for a prediction called `name` without waiting for it; how it goes is told to the receiver."""
    while health(address) == "BUSY":
        time.sleep(0.01)
    body = json.dumps({"input": inputs, "webhook": receiver.address + "/webhook"}).encode()
    return call(f"{address}/predictions/{name}", body, "PUT", Prefer="respond-async")


class Receiver:
    """A web server of ours that Cog's calls: keeps what it was sent, and stores files under new addresses."""

    def __init__(self) -> None:
        self.received: queue.Queue[dict[str, Any]] = queue.Queue()
        self.files: dict[str, bytes] = {}
        receiver = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                receiver.received.put(json.loads(self.read()))
                self.answer()

            def do_PUT(self) -> None:
                path = f"/{self.headers['X-Prediction-Id']}{self.path}"
                receiver.files[receiver.address + path] = self.read()
                self.answer(Location=receiver.address + path)

            def read(self) -> bytes:
                return self.rfile.read(int(self.headers["Content-Length"]))

            def answer(self, **headers: str) -> None:
                self.send_response(200)
                for name, value in {**headers, "Content-Length": "0"}.items():
                    self.send_header(name, value)
                self.end_headers()

            def log_message(self, *_: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self.server.server_port}"

    def events(self, name: str) -> Iterator[dict[str, Any]]:
        """What is told of a prediction, until it has ended."""
        while True:
            event = self.received.get(timeout=300)
            if event["id"] == name:
                yield event
                if event["status"] in ("succeeded", "failed", "canceled"):
                    return


@pytest.fixture(scope="module")
def receiver() -> Iterator[Receiver]:
    receiver = Receiver()
    thread = threading.Thread(target=receiver.server.serve_forever)
    thread.start()
    yield receiver
    receiver.server.shutdown()
    thread.join()


@pytest.fixture(scope="module", params=["tiny", pytest.param("demo", marks=pytest.mark.slow)])
def weights_folder(request: pytest.FixtureRequest, tiny_weights: Path) -> Path:
    """Random weights, and those of the repository."""
    return tiny_weights if request.param == "tiny" else ROOT / "weights" / "demo"


@pytest.fixture(scope="module")
def folder(weights_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp(f"server-{weights_folder.name}")


@pytest.fixture(scope="module")
def server(weights_folder: Path, folder: Path) -> Iterator[str]:
    with serve(str(weights_folder), folder / "log") as address:
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


def test_a_webhook_is_told_of_the_start_the_log_the_output_and_the_end(
    server: str, receiver: Receiver
) -> None:
    asked = {**SMALL, "num_inference_steps": 20, "num_outputs": 2, "seed": 7}
    assert start(server, receiver, "told", **asked) == (202, {"id": "told", "status": "starting"})
    *running, end = receiver.events("told")
    # Cog tells the start from another thread than the log, so the log's first line may be there already.
    assert running[0]["status"] == "processing" and "output" not in running[0]
    assert running[0]["logs"] in ("", "seed: 7\n")
    assert any("seed: 7" in event["logs"] and "output" not in event for event in running)
    assert (end["status"], len(end["output"])) == ("succeeded", 2)
    # Both pictures come just before the end. Cog tells of them from a third thread, which may find it over.
    for event in running:
        assert event.get("output", []) == end["output"][: len(event.get("output", []))]
    assert "seed: 7" in end["logs"] and "40/40 [" in end["logs"]


def test_the_same_put_again_makes_no_second_prediction(server: str, receiver: Receiver) -> None:
    assert start(server, receiver, "once", **ENDLESS)[0] == 202
    assert health(server) == "BUSY"
    body = json.dumps({"input": ENDLESS, "webhook": receiver.address}).encode()
    status, told = call(server + "/predictions/once", body, "PUT", Prefer="respond-async")
    assert (status, told["id"], told["status"]) == (202, "once", "processing")
    assert call(server + "/predictions/once/cancel", method="POST") == (200, {})
    told = list(receiver.events("once"))
    assert [event["logs"] for event in told].count("") == 1
    assert told[-1]["status"] == "canceled"


def test_while_it_is_busy_another_prediction_is_refused(server: str, receiver: Receiver) -> None:
    start(server, receiver, "first", **ENDLESS)
    status, told = call(server + "/predictions", json.dumps({"input": SMALL}).encode())
    assert (status, told["status"]) == (409, "failed")
    call(server + "/predictions/first/cancel", method="POST")
    list(receiver.events("first"))
    assert_it_still_serves(server)


def test_cancelling_leaves_the_next_prediction_as_it_was(server: str, receiver: Receiver) -> None:
    before = predict(server, seed=3, **SMALL)[1]["output"]
    for attempt in range(5):
        name = f"cancelled{attempt}"
        start(server, receiver, name, **ENDLESS)
        events = receiver.events(name)
        while "/4000 [" not in (event := next(events))["logs"]:
            assert event["status"] == "processing"
        call(f"{server}/predictions/{name}/cancel", method="POST")
        *_, end = events
        assert end["status"] == "canceled" and "output" not in end
        assert predict(server, seed=3, **SMALL)[1]["output"] == before


def test_what_is_not_being_made_cannot_be_cancelled(server: str) -> None:
    assert call(server + "/predictions/unheard-of/cancel", method="POST")[0] == 404


def test_hanging_up_cancels(server: str, receiver: Receiver) -> None:
    body = json.dumps({"id": "left", "input": ENDLESS, "webhook": receiver.address}).encode()
    host, port = server.removeprefix("http://").split(":")
    while health(server) == "BUSY":
        time.sleep(0.01)
    with socket.create_connection((host, int(port))) as client:
        lines = ["POST /predictions HTTP/1.1", f"Host: {host}", "Content-Type: application/json"]
        client.sendall("\r\n".join([*lines, f"Content-Length: {len(body)}", "", ""]).encode() + body)
        events = receiver.events("left")
        while "/4000 [" not in next(events)["logs"]:
            pass
    *_, end = events
    assert end["status"] == "canceled"
    assert_it_still_serves(server)


def test_temporary_files_go_when_the_next_prediction_is_made(server: str, folder: Path) -> None:
    predict(server, num_outputs=3, **SMALL)
    predict(server, **SMALL)
    [left] = (folder / "temporary").glob("japanese-stable-diffusion-*")
    assert [file.name for file in left.iterdir()] == ["output.0.png"]


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


@pytest.mark.slow
def test_pictures_are_uploaded_and_no_file_is_left_when_the_server_stops(
    tiny_weights: Path, tmp_path: Path, receiver: Receiver
) -> None:
    with serve(
        str(tiny_weights), tmp_path / "log", "--upload-url", receiver.address + "/pictures"
    ) as address:
        start(address, receiver, "stored", num_outputs=3, **SMALL)
        *_, end = receiver.events("stored")
        # Cog names them in the order in which the uploads ended.
        names = [f"{receiver.address}/stored/pictures/output.{index}.png" for index in range(3)]
        assert sorted(end["output"]) == names
        for name in names:
            assert Image.open(io.BytesIO(receiver.files[name])).size == (64, 128)
    assert list((tmp_path / "temporary").glob("japanese-stable-diffusion-*")) == []


@pytest.mark.slow
def test_weights_that_are_not_numbers_are_told_as_unhealthy(tiny_weights: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(tiny_weights, broken)
    file = broken / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = safetensors.torch.load_file(file)
    tensors["conv_in.bias"][0] = float("nan")
    safetensors.torch.save_file(tensors, file)
    with serve(str(broken), tmp_path / "log") as address:
        assert health(address) == "UNHEALTHY"


@pytest.mark.slow
@pytest.mark.parametrize(("mode", "count"), [("positive", 100), ("negative", 500)])
def test_whatever_a_fuzzer_sends_is_answered(
    tiny_weights: Path, tmp_path: Path, mode: str, count: int
) -> None:
    """At least so many cases that fit the schema, and that don't: no 5xx, no hang."""
    cheap = tmp_path / "weights"
    shutil.copytree(tiny_weights, cheap)
    # Every size is drawn at 64 × 64 and enlarged.
    write_manifest(Manifest("cheap", native_size=64, enlarge=16), cheap)
    described = schema()
    if mode == "positive":
        described["components"]["schemas"]["Input"]["required"] = ["num_inference_steps", "num_outputs"]
        inputs = described["components"]["schemas"]["Input"]["properties"]
        inputs["num_inference_steps"]["maximum"] = 3
        inputs["num_outputs"]["maximum"] = 2
        for name in ("image", "mask", "lora"):
            inputs[name]["pattern"] = "^data:"
    file = tmp_path / "openapi.json"
    file.write_text(json.dumps(described))
    (tmp_path / "server").mkdir()
    with serve(str(cheap), tmp_path / "server" / "log") as address:
        told = subprocess.run(
            [
                *(sys.executable, "-m", "schemathesis.cli", "run", file, "--url", address, "--mode", mode),
                *(
                    "--checks",
                    "not_a_server_error",
                    "--max-examples",
                    str(count),
                    "--seed",
                    "1",
                    "--no-color",
                ),
                *("--request-timeout", "60", "--suppress-health-check", "all"),
                *("--phases", "examples,coverage,fuzzing"),
            ],
            cwd=tmp_path,
            capture_output=True,
            text=True,
        )
        print(told.stdout)
        assert told.returncode == 0
        cases = re.search(r"(\d+) generated", told.stdout)
        assert cases and int(cases[1]) >= count
        assert_it_still_serves(address)


@pytest.mark.slow
def test_memory_does_not_grow(server: str) -> None:
    """After 200 predictions the process that computes holds at most 3 % more than after 20."""
    used = {}
    for made in range(1, 201):
        size = (64, 128, 192)[made % 3]
        schedulers = schema()["components"]["schemas"]["scheduler"]["enum"]
        status, told = predict(
            server,
            prompt="猫" * (made % 50),
            width=size,
            height=256 - size,
            num_outputs=1 + made % 3,
            num_inference_steps=2,
            scheduler=schedulers[made % len(schedulers)],
        )
        assert (status, told["status"]) == (200, "succeeded")
        used[made] = resident_memory(server)
    print(f"kB after 20 predictions: {used[20]}, after 200: {used[200]}")
    assert used[200] <= 1.03 * used[20]


def resident_memory(server: str) -> int:
    """kB of the worker of the server that listens at this address."""
    port = server.rsplit(":", 1)[1]
    for process in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if process.name.isdigit() and b"_run_worker" in (process / "cmdline").read_bytes():
                environment = (process / "environ").read_bytes().split(b"\0")
                if f"PORT={port}".encode() in environment:
                    status = (process / "status").read_text()
                    return int(status.split("VmRSS:")[1].split()[0])
    raise AssertionError("the server has no worker")
