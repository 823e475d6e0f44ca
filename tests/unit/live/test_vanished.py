"""When a client's machine counts as gone, from the numbers of its connection."""

from __future__ import annotations

import pytest

from omniavatar.live.vanished import Answers, Silence


@pytest.mark.parametrize(
    ("at", "answers", "seconds"),
    [
        ((0.0, 5.0), Answers(0, 9.0, 0.01), 0.0),  # nothing waits, as for a client that does not read
        ((0.0, 5.0), Answers(3, 0.1, 0.01), 0.08),  # much waits, but answers come
        ((0.0, 0.5), Answers(1, 60.0, 0.01), 0.48),  # it was sent just now, after a minute without anything
        ((0.0, 2.0), Answers(1, 2.0, 0.01), 1.98),
        ((0.0, 2.0), Answers(1, 2.0, 0.9), 0.2),  # a long way
    ],
)
def test_only_an_answer_that_is_owed_is_missed(
    at: tuple[float, float], answers: Answers, seconds: float
) -> None:
    times = iter(at)
    silence = Silence(lambda: next(times))
    for _ in at:
        found = silence.seconds(answers)
    assert found == pytest.approx(seconds)
