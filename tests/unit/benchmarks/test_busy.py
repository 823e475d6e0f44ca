"""Busy shares of made-up traces."""

from __future__ import annotations

import itertools
import random

import pytest
from benchmarks.busy import busy, united


def event(category: str, start: float, length: float, **more: object) -> dict[str, object]:
    return {"ph": "X", "cat": category, "ts": start, "dur": length, "name": "k", **more}


def test_union_counts_overlaps_once() -> None:
    assert united([]) == []
    assert united([(5, 6), (0, 2), (1, 3), (3, 4), (0.5, 1)]) == [(0, 4), (5, 6)]


def test_union_equals_counting_every_moment() -> None:
    generator = random.Random(0)
    for _ in range(50):
        starts = [generator.randrange(40) for _ in range(12)]
        intervals = [(start, start + generator.randrange(1, 7)) for start in starts]
        moments = {moment for start, end in intervals for moment in range(start, end)}
        merged = united(intervals)
        assert sum(end - start for start, end in merged) == len(moments)
        assert all(a[1] < b[0] for a, b in itertools.pairwise(merged))


def test_shares_and_gaps() -> None:
    figures = busy(
        [
            event("kernel", 1_000_000, 400_000),
            event("kernel", 1_200_000, 300_000),
            event("gpu_memcpy", 900_000, 50_000),
            event("gpu_memcpy", 1_450_000, 150_000),
            event("kernel", 1_800_000, 200_000),
            event("cpu_op", 1_500_000, 300_000),
            {"ph": "M", "name": "process_name"},
        ]
    )
    assert figures.seconds == pytest.approx(1.0)
    assert figures.kernels == pytest.approx(0.7)
    assert figures.with_copies == pytest.approx(0.8)
    assert figures.gaps == (pytest.approx((0.5, 0.3)),)


def test_a_trace_without_kernels_is_an_error() -> None:
    with pytest.raises(ValueError, match="no kernels"):
        busy([event("gpu_memcpy", 0, 1)])
