"""The line that requests stand in: pictures are made for one visitor at a time."""

import contextlib
import logging
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from PIL import Image

from japanese_stable_diffusion.command import one_line

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Waiting:
    """Others come first.

    Attributes:
        ahead: how many.
    """

    ahead: int


@dataclass(frozen=True)
class Progress:
    """How far the pictures are.

    Attributes:
        done: denoising steps done so far.
        total: steps that the request takes in all; 0 as long as that isn't known.
        previews: what the pictures in the making look like, RGB.
    """

    done: int = 0
    total: int = 0
    previews: tuple[Image.Image, ...] = ()


@dataclass(frozen=True)
class Finished:
    """The pictures are made.

    Attributes:
        files: the pictures.
        log: what was said meanwhile, one line each.
    """

    files: tuple[Path, ...]
    log: tuple[str, ...] = ()


@dataclass(frozen=True)
class Failed:
    """There will be no pictures.

    Attributes:
        reason: in one line.
    """

    reason: str


@dataclass(frozen=True)
class Stopped:
    """The visitor wants no pictures any more."""


class Cancelled(Exception):
    """Raised where a maker tells its progress, so that it stops there."""


News = Waiting | Progress | Finished | Failed | Stopped
Teller = Callable[[Progress | Waiting], None]
Maker = Callable[[dict[str, Any], Teller], Finished]
"""Makes the pictures of some inputs, and tells its progress; lets a `Cancelled` that this raises pass."""


class Job:
    """A request that stands in line, and what is heard of it."""

    def __init__(self, inputs: dict[str, Any]) -> None:
        self.inputs = inputs
        self._news: SimpleQueue[News] = SimpleQueue()
        self._left = threading.Event()

    def news(self) -> Iterator[News]:
        """The newest news, each time that there is something new, until the request has come to its end.

        What was overtaken by something newer meanwhile is left out.
        """
        news: News = Waiting(0)
        while not isinstance(news, Finished | Failed | Stopped):
            news = self._news.get()
            while not self._news.empty() and not isinstance(news, Finished | Failed | Stopped):
                news = self._news.get()
            yield news

    def tell(self, news: News) -> None:
        """Let the visitor know.

        Raises:
            Cancelled: the visitor has left.
        """
        if self._left.is_set():
            raise Cancelled
        self._news.put(news)

    def leave(self) -> None:
        """Want no pictures any more: what is being computed stops within one step."""
        self._left.set()
        self._news.put(Stopped())


class Line:
    """Requests in the order in which they came. A thread of its own makes their pictures, one by one."""

    def __init__(self, make: Maker) -> None:
        self._make = make
        self._jobs: list[Job] = []
        self._changed = threading.Condition()
        threading.Thread(target=self._work, daemon=True).start()

    def join(self, inputs: dict[str, Any]) -> Job:
        """Stand in line."""
        job = Job(inputs)
        with self._changed:
            self._jobs.append(job)
            self._tell_places()
            self._changed.notify()
        return job

    def leave(self, job: Job) -> None:
        """Step out of the line, or stop what is being made. What has come to its end stays."""
        with self._changed:
            job.leave()
            if job in self._jobs[1:]:
                self._jobs.remove(job)
                self._tell_places()

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._jobs)
                job = self._jobs[0]
            with contextlib.suppress(Cancelled):
                job.tell(self._run(job))
            with self._changed:
                self._jobs.pop(0)
                self._tell_places()

    def _run(self, job: Job) -> News:
        try:
            job.tell(Progress())
            return self._make(job.inputs, job.tell)
        except Cancelled:
            raise
        except Exception as failure:
            log.info("%s", one_line(failure))
            return Failed(one_line(failure))

    def _tell_places(self) -> None:
        for place, job in enumerate(self._jobs[1:], start=1):
            job.tell(Waiting(place))
