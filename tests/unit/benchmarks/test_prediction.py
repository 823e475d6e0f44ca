"""The formulas in code give the predictions that docs/many_gpus.md prints."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
from benchmarks.shared.prediction import coding_s, forward_s, step_s, window_s

PAGE = Path(__file__).resolve().parents[3] / "docs" / "many_gpus.md"
GPUS = (1, 2, 4, 8)


def guided(scale: str) -> Callable[[int], float]:
    return lambda gpus: 25 * step_s(scale, gpus) + coding_s(gpus)


ROWS: dict[str, Callable[[int], float]] = {
    "14B forward, sp N: s (times one GPU)": lambda gpus: forward_s("14B", gpus),
    "1.3B forward, sp N: s": lambda gpus: forward_s("1.3B", gpus),
    "decode and encode, s": coding_s,
    "14B window, 25 steps, two branches, cfg 2 x sp N/2: s": guided("14B"),
    "1.3B window, 25 steps, two branches, cfg 2 x sp N/2": guided("1.3B"),
    "1.3B window, 4 steps without guidance, sp N": lambda gpus: window_s("1.3B", gpus, 4),
}


@pytest.mark.parametrize("name", ROWS)
def test_the_page_prints_what_the_formulas_give(name: str) -> None:
    (line,) = (line for line in PAGE.read_text().splitlines() if line.startswith(f"| {name} |"))
    cells = [re.match(r"[\d.]+", cell.strip()) for cell in line.split("|")[2:6]]
    printed = [float(cell.group()) for cell in cells if cell is not None]
    assert printed == [pytest.approx(ROWS[name](gpus), rel=0.04) for gpus in GPUS]


@pytest.mark.parametrize("scale", ["14B", "1.3B"])
def test_more_gpus_are_faster_and_never_faster_than_linear(scale: str) -> None:
    for gpus in (2, 3, 4, 5, 8):
        assert forward_s(scale, gpus) < forward_s(scale, gpus - 1)
        assert forward_s(scale, gpus) > forward_s(scale, 1) / gpus
