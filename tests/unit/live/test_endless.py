"""Windows of an endless video: the same as a tuple of them, without making them all."""

import pickle
from functools import partial

import pytest

from omniavatar.live.chunked import chunk_window
from omniavatar.live.endless import WindowsUntil
from omniavatar.live.windowed import live_window
from omniavatar.sampling.chunks import ChunkRule


@pytest.mark.parametrize("window_of", [partial(chunk_window, ChunkRule()), partial(live_window, 9, 5)])
def test_they_are_what_a_tuple_of_all_windows_is(window_of):
    windows, all_of_them = WindowsUntil(window_of, 7), tuple(window_of(number) for number in range(7))
    assert len(windows) == 7 and tuple(windows) == all_of_them
    assert (
        windows[5:] == all_of_them[5:] and windows[6:8] == all_of_them[6:8] and windows[-1] == all_of_them[-1]
    )
    assert tuple(pickle.loads(pickle.dumps(windows))) == all_of_them
    with pytest.raises(IndexError):
        windows[7]


def test_only_those_that_are_read_are_made():
    made = []

    def window_of(number):
        made.append(number)
        return live_window(9, 5, number)

    windows = WindowsUntil(window_of, 1_000_000)
    assert windows[999_998:] == (live_window(9, 5, 999_998), live_window(9, 5, 999_999))
    assert made == [999_998, 999_999]
