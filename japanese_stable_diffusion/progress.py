"""How far a request has come, on stderr: a bar in a terminal, and lines elsewhere, as in a log over HTTP."""

import sys
import time
from types import TracebackType

from tqdm import tqdm

INTERVAL = 0.5
"""Seconds between two drawings."""
COLUMNS = 60
"""Width of a line that isn't in a terminal."""


class Progress:
    """A bar that looks like tqdm's and takes no lock.

    Cog cancels a prediction by raising an exception wherever its thread is. tqdm, interrupted while it draws,
    keeps its lock, and the next prediction would wait for it forever.
    """

    def __enter__(self) -> "Progress":
        self._started = time.perf_counter()
        self._next = self._started
        self._moves = sys.stderr.isatty()
        self._line = ""
        return self

    def show(self, done: int, total: int) -> None:
        """Draw the bar, unless it was drawn just now and there is more to come.

        Args:
            done: steps so far, at least 1.
            total: steps in all.
        """
        now = time.perf_counter()
        if now < self._next and done < total:
            return
        self._next = now + INTERVAL
        columns = None if self._moves else COLUMNS
        line = tqdm.format_meter(done, total, now - self._started, ncols=columns, unit="step")
        self._write(f"\r{line:{len(self._line)}}" if self._moves else f"{line}\n")
        self._line = line

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._line and self._moves:
            self._write("\n")

    def _write(self, text: str) -> None:
        sys.stderr.write(text)
        sys.stderr.flush()
