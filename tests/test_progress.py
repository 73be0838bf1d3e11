"""The progress bar: what it shows, and that an interruption while it draws doesn't stop the next one."""

import io
import sys
import threading

import pytest

from japanese_stable_diffusion.progress import Progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def show(total: int) -> None:
    with Progress() as progress:
        for done in range(1, total + 1):
            progress.show(done, total)


def test_elsewhere_than_in_a_terminal_it_is_lines(capsys: pytest.CaptureFixture[str]) -> None:
    show(1000)
    told = capsys.readouterr().err
    assert told.endswith("\n") and "\r" not in told
    lines = told.splitlines()
    assert "| 1/1000 [" in lines[0] and "| 1000/1000 [" in lines[-1]
    assert len(lines) < 100


def test_in_a_terminal_it_is_one_line_that_moves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", screen := Terminal())
    show(1000)
    told = screen.getvalue()
    assert told.count("\n") == 1 and told.endswith("\n")
    bars = told.removeprefix("\r").split("\r")
    assert "| 1/1000 [" in bars[0] and "| 1000/1000 [" in bars[-1]


def test_before_the_first_step_it_shows_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    show(0)
    assert capsys.readouterr().err == ""


def test_an_interrupted_bar_ends_its_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", screen := Terminal())
    with pytest.raises(KeyboardInterrupt), Progress() as progress:
        progress.show(1, 10)
        raise KeyboardInterrupt
    assert screen.getvalue().endswith("\n")


def test_an_interruption_while_it_draws_does_not_stop_the_next_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    class Interrupted(io.StringIO):
        def write(self, text: str) -> int:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", Interrupted())
        with pytest.raises(KeyboardInterrupt):
            show(1)
    # What a thread holds stays its own, so the next bar has to be drawn by another, as Cog may do.
    following = threading.Thread(target=show, args=[1], daemon=True)
    following.start()
    following.join(timeout=60)
    assert not following.is_alive()
