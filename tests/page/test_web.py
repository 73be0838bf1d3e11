"""What scripts/web says when it can't open a page."""

import http.server
import os
import socket
import subprocess
import threading
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent


def refusal(*arguments: str, **environment: str) -> str:
    """The line that it ends with."""
    told = subprocess.run(
        [ROOT / "scripts" / "web", *arguments],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
    )
    assert told.returncode in (1, 2) and told.stdout == ""
    assert told.stderr.count("\n") == 1, told.stderr
    return told.stderr


@pytest.mark.parametrize("port", ["0", "65536", "http"])
def test_a_port_that_is_none(port: str) -> None:
    assert port in refusal("--port", port)


def test_a_port_that_is_taken() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        expected = f"can't listen on 127.0.0.1:{port}: Address already in use; choose another --port\n"
        assert refusal("--port", str(port)) == expected


@pytest.fixture
def free_port() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


@pytest.mark.parametrize("url", ["http://127.0.0.1:1", "nonsense", "http://"])
def test_no_server_there(url: str, free_port: str) -> None:
    told = refusal("--port", free_port, "--server", url)
    assert told.startswith(f"{url.rstrip('/')}: no server answers there (")


def test_another_kind_of_server(free_port: str, tmp_path: Path) -> None:
    (tmp_path / "health-check").write_text("<html>")
    server = http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0),
        lambda *details: http.server.SimpleHTTPRequestHandler(*details, directory=str(tmp_path)),
    )
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}"
    told = refusal("--port", free_port, "--server", url)
    assert told == f"{url}: answers GET /health-check with something else than Cog's servers do\n"
    server.shutdown()
    server.server_close()


def test_no_weights(free_port: str) -> None:
    assert refusal("--port", free_port, JSD_WEIGHTS="nowhere").startswith("JSD_WEIGHTS: ")
