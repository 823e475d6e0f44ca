"""A video for which the disk has no room is refused before its first window."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from engine import make_pipeline, request
from omniavatar.engine.host import Host
from omniavatar.engine.room import check_room, least_bytes
from omniavatar.errors import OutputError
from omniavatar.media import audio
from omniavatar.types import Waveform


class SmallDisk(Host):
    def __init__(self, free: int) -> None:
        self.free, self.asked = free, list[Path]()

    def free_disk(self, folder: Path) -> int:
        self.asked.append(folder)
        return self.free


def test_a_full_disk_is_one_line_before_the_first_window(nano_checkpoint, tmp_path: Path) -> None:
    host = SmallDisk(1000)
    pipeline = make_pipeline(nano_checkpoint, tmp_path / "cache", host=host)
    output = tmp_path / "out" / "talk.mp4"
    output.parent.mkdir()
    line = r"talk\.mp4: the plan needs at least 0\.\d\d MB, its disk has 0\.00 MB free; free some space"
    with pytest.raises(OutputError, match=line):
        pipeline.generate(request(0.5), output)
    assert host.asked == [output.with_name("talk.mp4.job")] and not list(output.parent.iterdir())
    host.free = 10**9
    assert pipeline.generate(request(0.5), output).frames > 0


def test_what_a_plan_needs() -> None:
    windows = [SimpleNamespace(new_frames=count) for count in (41, 28, 28)]
    plan: Any = SimpleNamespace(size=(400, 720), fps=25.0, windows=windows)
    whole = least_bytes(plan, 18)
    assert whole == round(2 * 97 * 400 * 720 * 0.04 / 8 + 24000 * 97 / 25)
    assert least_bytes(plan, 18, done=1) == round(whole * 56 / 97) and least_bytes(plan, 18, done=3) == 0
    assert least_bytes(plan, 24) < whole / 1.4
    check_room(Path("a.mp4"), whole, whole)


def test_decoding_stops_before_it_fills_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(audio, "KEPT_FREE", 200_000)
    sound = Waveform(np.zeros(160_000, np.float32), 16000)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=199_999))
    with pytest.raises(OutputError, match="the decoded sound fills the disk after 0 minutes"):
        audio.decode_mono(sound, tmp_path / "mono.f32")
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=200_000))
    assert audio.decode_mono(sound, tmp_path / "mono.f32").source_samples == 160_000
