"""The tables of docs/deploy.md follow from the measured results by arithmetic."""

from __future__ import annotations

import re

import pytest
from docs.generate import sizing

from command_line import REPOSITORY

PAGE = (REPOSITORY / "docs" / "deploy.md").read_text()


def test_the_newest_result_of_each_configuration_counts() -> None:
    found = sizing.speeds()
    assert len({(each.config, each.name) for each in found}) == len(found) >= 6
    (fast, *_) = (each for each in found if each.config == "inference_1.3B_4steps.yaml")
    assert fast.file >= "2026-11-28"
    assert [each.window for each in found] == sorted(each.window for each in found)


def test_videos_an_hour_are_windows_by_seconds() -> None:
    speed = sizing.Speed("1.3B", "inference_1.3B_4steps.yaml", (), window=2.0, rest=1.0, file="")
    windows, seconds = speed.seconds(60)
    assert windows == 32  # (60.3 s x 25 frames - 53) / (53 - 5) and one: the configuration's windows
    assert seconds == windows * 2.0 + 1.0
    assert speed.an_hour(60, 8) == pytest.approx(8 * 3600 / seconds)


def test_the_measured_run_is_near_its_arithmetic() -> None:
    rows = re.findall(r"^\| ([^|]+) \| ([\d.,]+)[^|]* \| ([\d.,]+)[^|]* \|$", sizing.measured(), re.MULTILINE)
    near = {
        name: (float(a.replace(",", "")), float(b.replace(",", ""))) for name, a, b in rows if "," not in name
    }
    assert {"accepted", "queue full after", "wait of a job accepted into the full queue"} <= set(near)
    for name, (seen, counted) in near.items():
        assert seen == pytest.approx(counted, rel=0.1), name


def test_a_page_without_a_place_is_an_error() -> None:
    assert sizing.page(PAGE) == PAGE
    with pytest.raises(ValueError, match="lacks the place of overload"):
        sizing.page(PAGE.replace("overload: made", "overlord: made"))
