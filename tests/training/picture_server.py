"""Pictures over HTTP on the loopback interface, and all that goes wrong with strangers' servers."""

import io
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
from PIL import Image


def jpeg(number: int, width: int, height: int) -> bytes:
    """Coloured clouds: different numbers look different."""
    colours = np.random.default_rng(number).integers(0, 256, (6, 6, 3), np.uint8)
    encoded = io.BytesIO()
    Image.fromarray(colours).resize((width, height), Image.Resampling.BICUBIC).save(
        encoded, "JPEG", quality=95
    )
    return encoded.getvalue()


class Server(ThreadingHTTPServer):
    """Ends its silent handlers when it is told to stop."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.stop = threading.Event()


class Handler(BaseHTTPRequestHandler):
    """/WIDTHxHEIGHT/NUMBER is a picture; the others are named for what they do."""

    server: Server

    def do_GET(self) -> None:
        what, _, number = self.path[1:].partition("/")
        if what == "missing":
            self.send_error(404)
            return
        if what == "silent":
            self.server.stop.wait()
            return
        self.send_response(200)
        if what == "forbidden":
            self.send_header("X-Robots-Tag", "noai")
        self.end_headers()
        if what == "page":
            self.wfile.write(b"<html>moved</html>")
        elif what == "cut":
            self.wfile.write(jpeg(0, 300, 300)[:400])
        elif what == "dripping":
            while not self.server.stop.wait(0.2):
                self.wfile.write(b"\xff")
        elif what == "forbidden":
            self.wfile.write(jpeg(0, 300, 300))
        else:
            width, height = what.split("x")
            self.wfile.write(jpeg(int(number), int(width), int(height)))

    def log_message(self, format: str, *arguments: object) -> None:
        """Say nothing."""

    def handle(self) -> None:
        """A client may hang up at any time."""
        try:
            super().handle()
        except OSError:
            self.close_connection = True


@contextmanager
def pictures() -> Iterator[str]:
    """A running server's address."""
    with Server() as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.stop.set()
            server.shutdown()
