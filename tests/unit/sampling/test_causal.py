"""The cache's slots against a list from which the oldest blocks are dropped."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from omniavatar.errors import ConfigError
from omniavatar.sampling.causal import CausalWindow

WINDOWS = st.tuples(st.integers(1, 5), st.integers(0, 4), st.integers(1, 6)).map(
    lambda sizes: CausalWindow(sizes[0], sizes[0] * (sizes[1] + sizes[2]), sizes[0] * sizes[1])
)


@given(WINDOWS, st.integers(1, 60))
def test_slots_hold_the_sink_and_the_newest_blocks(window: CausalWindow, blocks: int) -> None:
    sink = window.sink // window.block
    slots: dict[int, int] = {}
    kept: list[int] = []
    for block in range(blocks):
        slots[window.slot(block)] = block
        kept.append(block)
        if len(kept) > window.slots:
            del kept[sink]
        filled = window.filled(block)
        assert sorted(slots) == list(range(filled))
        assert sorted(slots.values()) == kept == list(window.seen(block))


def test_the_released_student_sees_the_sink_the_newest_three_and_itself() -> None:
    window = CausalWindow(block=3, window=15, sink=9)
    assert window.slots == 5
    assert [window.seen(block) for block in (0, 4, 5, 100)] == [
        (0,),
        (0, 1, 2, 3, 4),
        (0, 1, 2, 4, 5),
        (0, 1, 2, 99, 100),
    ]


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ((0, 15, 9), "causal_block=0"),
        ((3, 14, 9), "causal_window=14: must be a multiple of causal_block=3; use 15"),
        ((3, 15, 8), "causal_sink=8: must be a multiple of causal_block=3; use 9"),
        ((3, 9, 9), "raise it to at least 12"),
        ((3, 15, -3), "causal_sink=-3"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(sizes: tuple[int, int, int], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        CausalWindow(*sizes)
