"""A small Hugging Face Hub on loopback: one gated repository, served from a folder."""

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

REPOSITORY = "rinna/japanese-stable-diffusion"
REVISION = "07655518e5518c6ad4340168d1d0c98958e96ae0"
TOKEN = "hf_member"
LARGE = 100_000
"""Bytes from which the hub keeps a file beside Git, and sends it from another host."""


class Hub(ThreadingHTTPServer):
    """What it serves, what goes wrong, and what it was asked.

    `TOKEN` may read, "hf_stranger" may not yet, and others are unknown.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files = {
            path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()
        }
        self.claimed_bytes: dict[str, int] = {}
        self.stall_at: dict[str, int] = {}
        self.drop_at: dict[str, int] = {}
        self.damaged: set[str] = set()
        self.broken = False
        self.page: bytes | None = None
        self.stalled, self.go_on = threading.Event(), threading.Event()
        self.sent: list[tuple[str, int]] = []
        self.tokens_seen_elsewhere: list[str] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, request: object, client_address: object) -> None:
        """Clients that go away are part of the tests."""


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def do_GET(self) -> None:
        path = urlsplit(self.path).path
        if self.server.broken:
            self.refuse(502)
        elif self.server.page is not None:
            self.send_response(200)
            self.send_header("Content-Type", "text/html")
            self.send_header("Content-Length", str(len(self.server.page)))
            self.end_headers()
            self.wfile.write(self.server.page)
        elif path.startswith(f"/api/models/{REPOSITORY}/revision/"):
            self.describe(path.rsplit("/", 1)[-1])
        elif path.startswith(f"/{REPOSITORY}/resolve/{REVISION}/"):
            self.resolve(path.split(REVISION + "/")[1])
        elif path.startswith("/elsewhere/"):
            self.server.tokens_seen_elsewhere += self.headers.get_all("Authorization", [])
            self.send_file(path.removeprefix("/elsewhere/"))
        else:
            self.refuse(404, "RepoNotFound")

    def describe(self, revision: str) -> None:
        if revision not in (REVISION, "main"):
            self.refuse(404, "RevisionNotFound")
            return
        siblings = []
        for name, path in self.server.files.items():
            content = path.read_bytes()
            size = self.server.claimed_bytes.get(name, len(content))
            entry = {"rfilename": name, "size": size}
            entry["blobId"] = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
            if len(content) >= LARGE:
                sha256 = hashlib.sha256(content).hexdigest()
                entry["lfs"] = {"sha256": sha256, "size": size, "pointerSize": 130}
            siblings.append(entry)
        answer = json.dumps(
            {"id": REPOSITORY, "sha": REVISION, "gated": "auto", "siblings": siblings}
        ).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    def resolve(self, name: str) -> None:
        authorization = self.headers.get("Authorization")
        if authorization is None:
            self.refuse(401, "GatedRepo")
        elif authorization == "Bearer hf_stranger":
            self.refuse(403, "GatedRepo")
        elif authorization != f"Bearer {TOKEN}":
            self.refuse(401, message="Invalid credentials in Authorization header")
        elif self.server.files[name].stat().st_size >= LARGE:
            self.send_response(302)
            self.send_header("Location", f"http://localhost:{self.server.server_port}/elsewhere/{name}")
            self.send_header("Content-Length", "0")
            self.end_headers()
        else:
            self.send_file(name)

    def send_file(self, name: str) -> None:
        content = self.server.files[name].read_bytes()
        if name in self.server.damaged:
            content = content[:-1] + bytes([content[-1] ^ 1])
        start = int(self.headers.get("Range", "bytes=0-").removeprefix("bytes=").rstrip("-"))
        self.server.sent.append((name, start))
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(content) - start))
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.end_headers()
        if name in self.server.stall_at:
            stall = self.server.stall_at.pop(name)
            self.wfile.write(content[start:stall])
            self.server.stalled.set()
            self.server.go_on.wait()
            start = stall
        if name in self.server.drop_at:
            self.wfile.write(content[start : self.server.drop_at.pop(name)])
            self.close_connection = True
            return
        self.wfile.write(content[start:])

    def refuse(self, status: int, code: str | None = None, message: str | None = None) -> None:
        self.send_response(status)
        if code:
            self.send_header("X-Error-Code", code)
        if message:
            self.send_header("X-Error-Message", message)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *arguments: object) -> None:
        pass


@contextmanager
def serve(folder: Path) -> Iterator[Hub]:
    """A hub with the files of a folder, until the block ends."""
    hub = Hub(folder)
    thread = threading.Thread(target=hub.serve_forever, args=(0.05,))
    thread.start()
    try:
        yield hub
    finally:
        hub.go_on.set()
        hub.shutdown()
        hub.server_close()
        thread.join()
