"""What `calibrate` and `benchmark` write: one writer at a time, and no file of others is replaced."""

from __future__ import annotations

from pathlib import Path

import pytest

from omniavatar.config.load import load_config
from omniavatar.errors import BusyError, TargetError
from omniavatar.measure.benchmark.target import own_reports
from omniavatar.measure.calibrate import calibration_output


@pytest.mark.parametrize("name", ["benchmark.json", "benchmark.md", "benchmark.html"])
def test_reports_of_others_are_not_replaced(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("[1]")
    with pytest.raises(TargetError, match=f"{name}: was not written by omniavatar"):
        own_reports(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_one_benchmark_at_a_time(tmp_path: Path) -> None:
    (tmp_path / "benchmark.json").write_text('{"benchmark": "speed", "rows": []}')
    (tmp_path / "benchmark.md").write_text("| |")
    with own_reports(tmp_path), pytest.raises(BusyError, match="another thread of this process"):
        own_reports(tmp_path)
    assert not (tmp_path / ".benchmark.lock").exists()


@pytest.mark.parametrize("content", ["mine", "{}", "[]"])
def test_a_file_of_others_is_no_file_of_constants(tmp_path: Path, content: str) -> None:
    path = tmp_path / "notes.json"
    path.write_text(content)
    config = load_config("pocket").config
    with pytest.raises(TargetError, match="is not a file of constants"):
        calibration_output(config, path)
    assert path.read_text() == content


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("new.json", None),
        ("a.json", ""),
        ("a.json", '{"schedule": 1, "teacache": 1}'),
        ("step_cache.json", "{"),
    ],
)
def test_files_that_a_calibration_may_write(tmp_path: Path, name: str, content: str | None) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_text(content)
    assert calibration_output(load_config("pocket").config, path) == path
