"""Pictures made by a running container, through Cog's HTTP API."""

import json
import mimetypes
import re
import threading
import time
import urllib.error
import urllib.request
import uuid
from base64 import b64encode
from http import HTTPStatus
from pathlib import Path
from queue import Empty, SimpleQueue
from tempfile import mkdtemp
from typing import Any

from japanese_stable_diffusion.page.line import Cancelled, Finished, Progress, Teller, Waiting

_PATIENCE = 30.0
"""Seconds in which a server has to answer what needs no computing."""
_INTERVAL = 0.5
"""Seconds between two questions how far it is."""
_BAR = re.compile(r"(\d+)/(\d+) \[[^]]*\]")
"""The counts in a line of the progress bar."""
_PREFIX = re.compile(r"^(Prediction failed: )*(\w+Error: )?")
"""What Cog puts before the message of a failure."""


class ServerError(Exception):
    """The server can't be used or made no pictures; the message is one line."""


class Server:
    """A container, or scripts/serve, that listens at a URL. Waits until it is ready.

    Raises:
        ServerError: nobody answers there, or not as Cog's server does, or its setup failed.
    """

    def __init__(self, url: str) -> None:
        self._url = url.rstrip("/")
        while (status := self._ask("GET", "/health-check")[1].get("status")) == "STARTING":
            time.sleep(_INTERVAL)
        if status == "SETUP_FAILED":
            raise ServerError(f"{self._url}: could not load its model; its own log says why")
        code, self.schema = self._ask("GET", "/openapi.json")
        if code != HTTPStatus.OK or "Input" not in self.schema.get("components", {}).get("schemas", {}):
            raise ServerError(f"{self._url}: describes no inputs at /openapi.json, as Cog's servers do")

    def make(self, inputs: dict[str, Any], tell: Teller) -> Finished:
        """Let the server make the pictures. `Cancelled`, raised by `tell`, is passed on to the server.

        Files among the inputs are sent along.

        Raises:
            ServerError: a wrong input, a failed prediction, or a server that is gone.
        """
        sent = {name: _as_url(value) if isinstance(value, Path) else value for name, value in inputs.items()}
        code = None
        while code in (None, HTTPStatus.CONFLICT):
            if code is not None:
                tell(Waiting(0))
                time.sleep(_INTERVAL)
            code, answer = self._predict({"input": sent}, tell)
        if code == HTTPStatus.UNPROCESSABLE_ENTITY:
            details = answer.get("detail", [])
            raise ServerError("; ".join(f"{detail['loc'][-1]}: {detail['msg']}" for detail in details))
        if answer.get("status") == "canceled":
            raise Cancelled
        if answer.get("status") != "succeeded":
            reason = " ".join(str(answer.get("error") or f"HTTP status {code}").split())
            raise ServerError(_PREFIX.sub("", reason))
        folder = Path(mkdtemp())
        files = tuple(_fetch(url, folder / str(index)) for index, url in enumerate(answer["output"]))
        lines = (line.strip() for line in answer.get("logs", "").splitlines())
        return Finished(files, tuple(line for line in lines if line and not _BAR.search(line)))

    def _predict(self, body: dict[str, Any], tell: Teller) -> tuple[int, dict[str, Any]]:
        path = f"/predictions/{uuid.uuid4().hex}"
        answers: SimpleQueue[tuple[int, dict[str, Any]] | ServerError] = SimpleQueue()

        def predict() -> None:
            try:
                answers.put(self._ask("PUT", path, body, patience=None))
            except ServerError as error:
                answers.put(error)

        # The connection stays open until the pictures are made: if this process dies, the server stops too.
        threading.Thread(target=predict, daemon=True).start()
        while True:
            try:
                answer = answers.get(timeout=_INTERVAL)
                break
            except Empty:
                pass
            # Cog has no other way to ask. It tells how a prediction is doing before it looks at the input; an
            # input that is none makes sure that a prediction that has just ended isn't started again.
            state = self._ask("PUT", path, {"input": 1})[1]
            done, total = (_BAR.findall(state.get("logs", "")) or [(0, 0)])[-1]
            try:
                tell(Progress(int(done), int(total)))
            except Cancelled:
                self._ask("POST", f"{path}/cancel")
                raise
        if isinstance(answer, ServerError):
            raise answer
        return answer

    def _ask(
        self,
        method: str,
        path: str,
        body: dict[str, Any] | None = None,
        patience: float | None = _PATIENCE,
    ) -> tuple[int, dict[str, Any]]:
        data = None if body is None else json.dumps(body).encode()
        headers = {"Content-Type": "application/json"}
        try:
            request = urllib.request.Request(f"{self._url}{path}", data, headers, method=method)
            try:
                with urllib.request.urlopen(request, timeout=patience) as response:
                    code, text = response.status, response.read()
            except urllib.error.HTTPError as error:
                code, text = error.code, error.read()
        except (OSError, ValueError) as error:
            reason = getattr(error, "reason", None) or error
            raise ServerError(
                f"{self._url}: no server answers there ({reason}); start one with scripts/serve or docker run"
            ) from None
        try:
            answer = json.loads(text)
        except ValueError:
            answer = None
        if not isinstance(answer, dict):
            raise ServerError(
                f"{self._url}: answers {method} {path} with something else than Cog's servers do"
            )
        return code, answer


def _as_url(file: Path) -> str:
    kind = mimetypes.guess_type(file.name)[0] or "application/octet-stream"
    return f"data:{kind};base64,{b64encode(file.read_bytes()).decode()}"


def _fetch(url: str, stem: Path) -> Path:
    """The file behind a data URL or another, written to `stem` with the ending of its kind."""
    try:
        with urllib.request.urlopen(url, timeout=_PATIENCE) as response:
            file = stem.with_suffix(mimetypes.guess_extension(response.headers.get_content_type()) or "")
            file.write_bytes(response.read())
    except (OSError, ValueError) as error:
        raise ServerError(f"{url[:60]}: the picture can't be fetched ({error})") from None
    return file
