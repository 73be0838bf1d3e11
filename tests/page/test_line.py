import threading
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from japanese_stable_diffusion.page.line import (
    Failed,
    Finished,
    Job,
    Line,
    News,
    Progress,
    Stopped,
    Teller,
    Waiting,
)
from japanese_stable_diffusion.request import RequestError


class Painter:
    """Makes a picture once it is allowed to go on, a step at a time."""

    def __init__(self) -> None:
        self.painted: list[str] = []
        self.may_go_on: SimpleQueue[bool] = SimpleQueue()
        self.began = threading.Event()

    def make(self, inputs: dict[str, Any], tell: Teller) -> Finished:
        self.began.set()
        for step in (1, 2):
            self.may_go_on.get()
            tell(Progress(step, 2))
        if "wrong" in inputs:
            raise RequestError("wrong: is wrong")
        self.painted.append(inputs["prompt"])
        return Finished((Path(inputs["prompt"]),))


def ending(job: Job) -> News:
    return list(job.news())[-1]


def test_who_came_first_is_served_first_and_others_hear_how_many_are_ahead() -> None:
    painter = Painter()
    line = Line(painter.make)
    jobs = [line.join({"prompt": name}) for name in ("a", "b", "c")]
    painter.began.wait()
    assert next(jobs[2].news()) == Waiting(2)
    for _ in range(2):
        painter.may_go_on.put(True)
    assert ending(jobs[0]) == Finished((Path("a"),))
    for _ in range(4):
        painter.may_go_on.put(True)
    assert [ending(job) for job in jobs[1:]] == [Finished((Path("b"),)), Finished((Path("c"),))]
    assert painter.painted == ["a", "b", "c"]


def test_who_leaves_is_not_served() -> None:
    painter = Painter()
    line = Line(painter.make)
    first, second, third = (line.join({"prompt": name}) for name in ("a", "b", "c"))
    painter.began.wait()
    line.leave(second)
    assert ending(second) == Stopped()
    line.leave(first)
    assert ending(first) == Stopped()
    for _ in range(3):
        painter.may_go_on.put(True)
    assert ending(third) == Finished((Path("c"),))
    assert painter.painted == ["c"]
    line.leave(third)
    assert third.inputs == {"prompt": "c"}


def test_a_failure_is_told_and_the_next_is_served() -> None:
    painter = Painter()
    line = Line(painter.make)
    wrong, right = line.join({"wrong": 1}), line.join({"prompt": "b"})
    for _ in range(4):
        painter.may_go_on.put(True)
    assert ending(wrong) == Failed("wrong: is wrong")
    assert ending(right) == Finished((Path("b"),))
