"""`omniavatar clean`: lists and deletes what is ours and not in use, and nothing else."""

from __future__ import annotations

import hashlib
import json
import os
import time
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from begun_jobs import begun
from command_line import error_lines, run
from media_files import FPS, segments
from omniavatar.engine.job import Job
from omniavatar.engine.marks import PREVIEW_MARK
from omniavatar.media.lease import try_lease
from omniavatar.media.video import GrowingVideo
from omniavatar.plan.sparse_progress import MeasuredWindows, SparseProgress


def embedding(path: Path, days: float) -> None:
    path.write_bytes(hashlib.sha256(b"rows").digest() + b"rows")
    used = time.time() - days * 86400
    os.utime(path, (used, used))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with leftovers of every kind, and with files of a user that resemble them."""
    begun(tmp_path / "a.mp4")
    (tmp_path / "deep" / "er").mkdir(parents=True)
    begun(tmp_path / "deep" / "er" / "b.mp4")
    (part,) = segments(tmp_path, [2])
    with GrowingVideo(tmp_path / "c.partial.mp4", tmp_path / "c.mp4", FPS, None, PREVIEW_MARK) as video:
        video.append(part)
    part.rename(tmp_path / "his.partial.mp4")
    (tmp_path / ".d.mp4.lock").write_text('{"host": "x", "pid": 1, "since": 1.0}')
    (tmp_path / ".his.mp4.lock").write_text("mine")
    (tmp_path / ".a.mp4.0123abcd.tmp").write_bytes(b"half")
    (tmp_path / ".his.mp4.0123abcd.tmp").write_bytes(b"half")
    sums = np.ones((1, 1, 1, 2, 2), np.float32)
    SparseProgress(tmp_path / "masses.safetensors", {}).write(MeasuredWindows(1, sums, None))
    save_file({"sums": sums}, tmp_path / ".his.safetensors.part")
    embedding(tmp_path / "old.embedding", 40)
    embedding(tmp_path / "new.embedding", 2)
    (tmp_path / "his.embedding").write_bytes(b"x" * 100)
    for name in ("his.mp4.job", "sounds.mp4.job"):
        (tmp_path / name).mkdir()
    (tmp_path / "his.mp4.job" / "job.json").write_text('{"salary": 1}')
    (tmp_path / "sounds.mp4.job" / "sound.mp4").write_bytes(b"mine")
    (tmp_path / "a.mp4.job" / "notes.txt").write_text("mine")
    return tmp_path


OURS = {
    "a.mp4.job",
    "a.partial.mp4",
    "b.mp4.job",
    "b.partial.mp4",
    "c.partial.mp4",
    ".d.mp4.lock",
    ".a.mp4.0123abcd.tmp",
    ".masses.safetensors.part",
    "old.embedding",
}


def listed(*arguments: str | Path) -> dict[str, bool]:
    """Name of each listed path -> whether it was deleted."""
    done = run("clean", *map(str, arguments), "--json")
    assert done.exit_code == 0, done.stderr
    rows = json.loads(done.stdout)["leftovers"]
    return {Path(path).name: row["deleted"] for row in rows for path in row["paths"]}


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def test_lists_ours_and_deletes_with_yes_only(folder: Path) -> None:
    before = files(folder)
    assert listed(folder) == dict.fromkeys(OURS, False)
    assert files(folder) == before
    assert listed(folder, "--yes") == dict.fromkeys(OURS, True)
    assert files(folder) == {
        *("his.partial.mp4", ".his.mp4.lock", ".his.mp4.0123abcd.tmp", "his.embedding", "new.embedding"),
        ".his.safetensors.part",
        *("his.mp4.job/job.json", "sounds.mp4.job/sound.mp4", "a.mp4.job/notes.txt"),
    }
    assert not (folder / "deep" / "er" / "b.mp4.job").exists()
    assert listed(folder, "--cache") == {"new.embedding": False}


def test_one_output(folder: Path) -> None:
    assert listed(folder / "a.mp4", "--yes") == {"a.mp4.job": True, "a.partial.mp4": True}
    assert listed(folder / "his.partial.mp4") == {}


def test_what_is_in_use_is_kept(folder: Path) -> None:
    lease, other = try_lease(folder / ".d.mp4.lock"), try_lease(folder / ".masses.safetensors.lock")
    assert lease is not None and other is not None
    with Job(folder / "a.mp4").owned(), lease, other:
        before = files(folder)
        deleted = listed(folder, "--yes")
        assert not deleted["a.mp4.job"] and not deleted[".d.mp4.lock"] and deleted["b.mp4.job"]
        assert not deleted[".masses.safetensors.part"] and (folder / ".masses.safetensors.part").exists()
        assert {name for name in before if name.startswith(("a.mp4.job", "a.partial"))} <= files(folder)
        text = run("clean", str(folder)).stdout
        assert f"kept: process {os.getpid()} on " in text


def test_what_is_shown(folder: Path) -> None:
    lines = run("clean", str(folder / "deep")).stdout.splitlines()
    assert "b.mp4.job, " in lines[0] and lines[0].startswith("unfinished job  ")
    assert lines[1].startswith("1 leftover, ") and lines[1].endswith("; add --yes to delete")
    assert run("clean", str(folder / "deep"), "--yes").stdout.splitlines()[1].endswith(" deleted")
    assert run("clean", str(folder / "deep")).stdout == "nothing to delete\n"


def test_a_wrong_place_is_one_line(tmp_path: Path) -> None:
    done = run("clean", str(tmp_path / "none"))
    assert done.exit_code == 3 and len(error_lines(done)) == 1
    assert "is neither a folder nor an output with leftovers" in done.stderr
