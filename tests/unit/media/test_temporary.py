"""Temporary folders are private while they are used; the next program removes those of killed processes."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from command_line import run
from omniavatar.errors import OutputError
from omniavatar.media.lease import try_lease
from omniavatar.media.temporary import LOCK, RAY, remove_abandoned, temporary_folder

KILLED = """
import sys, time
from omniavatar.media.temporary import temporary_folder
with temporary_folder(sys.argv[1]) as folder:
    (folder / "portrait").write_bytes(b"x")
    print(folder, flush=True)
    time.sleep(600)
"""


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of all temporary files."""
    root = tmp_path / "temporary"
    root.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(root))
    return root


def left_behind(place: Path, name: str = "omniavatar-upload-abcdefgh") -> Path:
    """A folder like that of a killed process."""
    folder = place / name
    (folder / "files").mkdir(parents=True)
    (folder / "files" / "portrait").write_bytes(b"x")
    lease = try_lease(folder / LOCK)
    assert lease is not None
    text = (folder / LOCK).read_text()
    lease.release()
    (folder / LOCK).write_text(text)
    return folder


@pytest.mark.parametrize("kind", ["", "upload"])
def test_a_folder_is_empty_private_and_gone_at_the_end(place: Path, kind: str) -> None:
    with temporary_folder(kind) as folder:
        assert folder.is_dir() and not list(folder.iterdir())
        (root,) = place.iterdir()
        assert root.stat().st_mode & 0o077 == 0 and folder.is_relative_to(root)
        (folder / "portrait").write_bytes(b"x")
        assert remove_abandoned() == 0 and (folder / "portrait").exists(), "its process lives"
    assert not list(place.iterdir())
    with pytest.raises(ValueError), temporary_folder(kind) as folder:
        (folder / "portrait").write_bytes(b"x")
        raise ValueError
    assert not list(place.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["", "speech"])
def test_what_a_killed_process_left_is_removed_and_what_a_living_one_has_stays(
    place: Path, kind: str
) -> None:
    environment = {**os.environ, "TMPDIR": str(place)}
    processes = [
        subprocess.Popen([sys.executable, "-c", KILLED, kind], env=environment, stdout=subprocess.PIPE)
        for _ in range(2)
    ]
    try:
        folders = [Path(process.stdout.readline().decode().strip()) for process in processes]  # type: ignore[union-attr]
        assert remove_abandoned() == 0
        processes[0].kill()
        processes[0].wait()
        assert remove_abandoned() == 1
        assert [folder.exists() for folder in folders] == [False, True]
    finally:
        for process in processes:
            process.kill()
            process.communicate()


@pytest.mark.parametrize(
    "name",
    ["omniavatar-upload-abcdefgh", "omniavatar-abcdefgh", "omniavatar-tokenizer-a_b2c3d4", f"{RAY}a1b2c3d4"],
)
def test_all_kinds_are_found(place: Path, name: str) -> None:
    folder = left_behind(place, name)
    assert remove_abandoned() == 1 and not folder.exists()


@pytest.mark.parametrize(
    "name",
    ["omniavatar-cores-0", "omniavatar-upload-abcdefgh.mp4.job", "other-upload-abcdefgh", "omniavatar-abc"],
)
def test_other_names_are_left_alone(place: Path, name: str) -> None:
    folder = left_behind(place, name)
    assert remove_abandoned() == 0 and (folder / "files" / "portrait").exists()


def test_links_files_and_folders_of_others_are_left_alone(place: Path, tmp_path: Path) -> None:
    elsewhere = left_behind(tmp_path)
    (place / "omniavatar-upload-linklink").symlink_to(elsewhere)
    (place / "omniavatar-upload-filefile").write_text("x")
    young = place / "omniavatar-upload-youngone"
    young.mkdir()
    if os.getuid() == 0:
        other = left_behind(place, "omniavatar-upload-otheruse")
        os.chown(other, 12345, 12345)
    before = sorted(place.iterdir())
    assert remove_abandoned() == 0 and sorted(place.iterdir()) == before and elsewhere.exists()


@pytest.mark.parametrize(
    ("name", "days", "removed"),
    [
        ("omniavatar-upload-abcdefgh", 2, 1),
        ("omniavatar-upload-abcdefgh", 0, 0),
        ("omniavatar-queue-abcdefgh", 2, 0),
    ],
)
def test_folders_of_versions_without_leases_go_after_a_day(
    place: Path, name: str, days: int, removed: int
) -> None:
    folder = place / name
    folder.mkdir()
    at = time.time() - days * 86400 - 60
    os.utime(folder, (at, at))
    assert remove_abandoned() == removed and folder.exists() != bool(removed)


def test_programs_that_start_at_the_same_time_do_not_disturb_each_other(place: Path) -> None:
    def use(number: int) -> bool:
        removed = remove_abandoned()
        with temporary_folder() as folder:
            (folder / "portrait").write_text(str(number))
            removed += remove_abandoned()
            return (folder / "portrait").read_text() == str(number)

    dead = [left_behind(place, f"omniavatar-upload-abcdefg{number}") for number in range(4)]
    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(use, range(200)))
    assert not any(folder.exists() for folder in dead) and not list(place.iterdir())


def test_a_folder_whose_lease_is_being_taken_is_left_alone_for_a_day(place: Path) -> None:
    folder = place / "omniavatar-upload-abcdefgh"
    folder.mkdir()
    (folder / LOCK).touch()
    assert remove_abandoned() == 0 and folder.exists()
    at = time.time() - 86400 - 60
    os.utime(folder, (at, at))
    assert remove_abandoned() == 1 and not folder.exists()


def test_a_missing_folder_is_named(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(place / "missing"))
    with pytest.raises(OutputError, match=r"missing: the folder does not exist"), temporary_folder():
        pass


def test_a_server_that_starts_removes_them(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = left_behind(place)
    monkeypatch.setenv("OMNIAVATAR_SERVE_DATA_DIR", str(tmp_path / "data"))
    assert run("serve", "keys", "list").exit_code == 0
    assert not folder.exists()
