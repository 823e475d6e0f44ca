"""How far a video is: one bar over steps, decoding and writing."""

from __future__ import annotations

from omniavatar.cli.course import Course
from omniavatar.engine.events import RequestStarted, StepFinished, WindowFinished, WindowStarted
from omniavatar.types import Event


class Clock:
    """A clock that is set by hand."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


def started(resumed: int = 0) -> RequestStarted:
    return RequestStarted(0, "a.mp4", frames=9, windows=2, steps=2, resumed_windows=resumed)


def step(window: int, number: int) -> StepFinished:
    return StepFinished(window=window, step=number, steps=2, action="compute", passes=1)


def test_the_bar_moves_while_a_window_is_decoded_and_is_full_only_at_the_end() -> None:
    clock = Clock()
    course = Course(started(), clock)

    def at(seconds: float, *events: Event) -> float:
        clock.now = seconds
        for event in events:
            course(event)
        return course.done()

    assert course.text == "loading the models"
    assert at(0, WindowStarted(window=0, windows=2)) == 0
    assert at(5, step(0, 0)) == 0.25 and course.text == "window 1 of 2, step 1 of 2"
    decoding = [at(10, step(0, 1)), at(15), at(30), at(60)]
    assert course.text == "window 1 of 2, decoding"
    assert decoding[0] == 0.5 and decoding == sorted(set(decoding)) and decoding[-1] < 1
    assert at(110, WindowFinished(window=0, windows=2, frames_done=5, seconds=110)) == 1
    at(110, WindowStarted(window=1, windows=2))
    assert at(120, step(1, 1)) == 1 + 10 / 110, "steps took 10 of the 110 s of the window before"
    assert at(220, WindowFinished(window=1, windows=2, frames_done=9, seconds=110)) == 2 < course.total
    assert course.text == "writing the video"


def test_the_bar_never_goes_back() -> None:
    """On a GPU the next window starts before this one is written."""
    clock = Clock()
    course = Course(started(), clock)
    seen = []
    for event in (
        WindowStarted(window=0, windows=2),
        step(0, 1),
        WindowStarted(window=1, windows=2),
        step(1, 0),
        WindowFinished(window=0, windows=2, frames_done=5, seconds=1),
        step(1, 1),
    ):
        clock.now += 1
        course(event)
        seen.append(course.done())
    assert seen == sorted(seen)


def test_a_resumed_video_begins_where_it_stopped() -> None:
    assert Course(started(resumed=1), Clock()).done() == 1
