"""A job has one owner, and nothing that is not ours is replaced or deleted."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from begun_jobs import VALUES, begun
from media_files import FPS, segments
from omniavatar.config.load import load_config
from omniavatar.engine.job import Job
from omniavatar.engine.marks import PREVIEW_MARK
from omniavatar.engine.targets import Identified, Target
from omniavatar.errors import BusyError, OmniAvatarError, OutputError, ResumeError, TargetError
from omniavatar.media.check import check_video
from omniavatar.media.video import GrowingVideo
from omniavatar.plan.placement import Placement
from omniavatar.sampling.windows import KEPT
from omniavatar.types import AvatarRequest

SIDECAR = {"output": "talk.mp4", "bytes": 5, "fingerprint": VALUES, "versions": {"omniavatar": "0.1.0"}}
HOLD = """
import sys, time
from pathlib import Path
from omniavatar.engine.marks import PREVIEW_MARK
from omniavatar.engine.job import Job
job = Job(Path(sys.argv[1]))
with job.owned():
    job.open({"request.prompt": '"a"'}, True)
    print("held", flush=True)
    time.sleep(60)
"""


def hold(output: Path) -> subprocess.Popen[str]:
    process = subprocess.Popen([sys.executable, "-c", HOLD, output], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    return process


def finished(output: Path) -> None:
    output.write_bytes(b"video")
    output.with_suffix(".json").write_text(json.dumps({**SIDECAR, "output": output.name}))


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


# one owner


@pytest.mark.slow
def test_a_second_owner_is_refused_until_the_first_is_killed(tmp_path: Path) -> None:
    output = tmp_path / "talk.mp4"
    process = hold(output)
    command = rf"process {process.pid} on \S+ \(-c {output}, since \d{{4}}-\d\d-\d\d \d\d:\d\d:\d\d\)"
    for resume in (True, False):
        with pytest.raises(BusyError, match=f"{output}: {command} is making it; wait until") as refused:
            target(output, tmp_path).check()
            with Job(output).owned():
                Job(output).open(VALUES, resume)
        assert refused.value.exit_code == 5 and "\n" not in str(refused.value)
    assert json.loads((tmp_path / "talk.mp4.job" / "job.json").read_text())["done"] == 0
    process.send_signal(signal.SIGKILL)
    process.communicate()
    with Job(output).owned():
        pass
    assert names(tmp_path / "talk.mp4.job") == {"job.json"}


def test_a_second_thread_is_refused_and_nothing_is_left(tmp_path: Path) -> None:
    output = tmp_path / "talk.mp4"
    refused: list[str] = []

    def other() -> None:
        try:
            with Job(output).owned():
                refused.append("not refused")
        except BusyError as error:
            refused.append(str(error))

    with Job(output).owned():
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
    assert f"process {os.getpid()} on " in refused[0] and "another thread of this process" in refused[0]
    assert names(tmp_path) == set()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_child_does_not_keep_the_lock_of_its_parent(tmp_path: Path) -> None:
    output = tmp_path / "talk.mp4"
    with Job(output).owned():
        read, write = os.pipe()
        child = os.fork()
        if not child:
            os.close(write)
            os.read(read, 1)
            os._exit(0)
        os.close(read)
    with Job(output).owned():  # while the child lives
        assert os.waitpid(child, os.WNOHANG) == (0, 0)
    os.close(write)
    os.waitpid(child, 0)


# what is not ours


def user_file(name: str, content: str = "mine") -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(content)

    return write


FOREIGN = {
    "his JSON": (user_file("talk.json", '{"a": 1}'), "talk.json: was not written by omniavatar"),
    "his text": (user_file("talk.json"), "talk.json: was not written by omniavatar"),
    "a list": (user_file("talk.json", "[1]"), "talk.json: was not written by omniavatar"),
    "his preview": (user_file("talk.partial.mp4"), "talk.partial.mp4: is not a preview"),
    "his empty preview": (user_file("talk.partial.mp4", ""), "talk.partial.mp4: is not a preview"),
    "his folder": (user_file("talk.mp4.job/notes.txt"), "talk.mp4.job: is not a job folder"),
    "his state": (user_file("talk.mp4.job/job.json", "{}"), "talk.mp4.job: is not a job folder"),
    "his broken state": (user_file("talk.mp4.job/job.json"), "talk.mp4.job: is not a job folder"),
    "his sound": (user_file("talk.mp4.job/sound.mp4"), "talk.mp4.job: is not a job folder"),
    "a file": (user_file("talk.mp4.job"), "talk.mp4.job: is not a job folder"),
    "his lock": (user_file("talk.mp4.job/owner.lock"), "owner.lock: is not a lock file"),
    "his video": (user_file("talk.mp4"), "talk.mp4: exists, and no talk.json of omniavatar"),
    "another's sidecar": (lambda folder: finished(folder / "talk.MP4"), "talk.json: belongs to talk.MP4"),
    "a link": (lambda folder: (folder / "talk.json").symlink_to("x"), "talk.json: was not written"),
    "a pipe": (lambda folder: os.mkfifo(folder / "talk.mp4"), "talk.mp4: is not a regular file"),
}


def content(folder: Path) -> dict[str, bytes | None]:
    paths = [path for path in folder.rglob("*") if path.is_symlink() or not path.is_dir()]
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None for path in paths}


@pytest.mark.parametrize("case", FOREIGN)
@pytest.mark.parametrize("resume", [True, False])
def test_what_is_not_ours_stays_and_is_named(tmp_path: Path, case: str, resume: bool) -> None:
    make, message = FOREIGN[case]
    make(tmp_path)
    before = content(tmp_path)
    with pytest.raises(TargetError, match=message) as refused, Job(tmp_path / "talk.mp4").owned():
        Job(tmp_path / "talk.mp4").open(VALUES, resume)
    assert content(tmp_path) == before
    assert refused.value.exit_code == 5 and "choose another output" in str(refused.value)


def test_a_video_with_the_name_of_a_preview_stays(tmp_path: Path) -> None:
    begun(tmp_path / "talk.mp4").partial.unlink()
    finished(tmp_path / "talk.partial.mp4")
    with pytest.raises(TargetError, match=r"talk\.partial\.mp4: is a finished video"):
        Job(tmp_path / "talk.mp4").refuse_foreign()


def test_a_users_file_in_our_folder_stays(tmp_path: Path) -> None:
    job = begun(tmp_path / "talk.mp4")
    (job.folder / "notes.txt").write_text("mine")
    with job.owned():
        job.open(VALUES, False)
        job.discard()
    assert content(tmp_path) == {"talk.mp4.job/notes.txt": b"mine"}


def test_a_file_that_appears_meanwhile_is_not_replaced(tmp_path: Path) -> None:
    output = tmp_path / "talk.mp4"
    (part,) = segments(tmp_path, [2])
    job = Job(output)
    with job.owned():
        job.open(VALUES, True)
        with GrowingVideo(job.partial, output, FPS) as video:
            video.append(part)
            output.write_text("mine")
            with pytest.raises(TargetError, match=r"talk\.mp4: exists, and no talk\.json"):
                video.finish(job.before_naming, job.folder)
    assert output.read_text() == "mine"
    output.unlink()
    assert job.partial.is_file() and Job(output).folder.is_dir(), "the work is kept"


def test_a_refused_video_gets_no_name_and_the_work_stays(tmp_path: Path) -> None:
    (part,) = segments(tmp_path, [4])

    def refuse(path: Path) -> None:
        check_video(path, 5, FPS, None, output=tmp_path / "f.mp4")

    with GrowingVideo(tmp_path / "p.mp4", tmp_path / "f.mp4", FPS) as video:
        video.append(part)
        with pytest.raises(OutputError, match=r"f\.mp4: the finished video has 4 frames instead of 5"):
            video.finish(refuse)
    assert names(tmp_path) == {"p.mp4", part.name}


def test_a_preview_without_its_folder_is_ours(tmp_path: Path) -> None:
    """A user deletes the job folder by hand to start over."""
    (part,) = segments(tmp_path, [2])
    job = Job(tmp_path / "talk.mp4")
    with GrowingVideo(job.partial, job.output, FPS, None, PREVIEW_MARK) as video:
        video.append(part)
    with job.owned():
        job.open(VALUES, True)
    assert not job.partial.exists()


def test_another_requests_video_needs_a_word(tmp_path: Path) -> None:
    output = tmp_path / "talk.mp4"
    finished(output)
    job = Job(output)
    with pytest.raises(ResumeError, match=r'request\.prompt: "a" -> "b".*--no-resume'), job.owned():
        job.open({"request.prompt": '"b"'}, True)
    assert output.read_bytes() == b"video" and names(tmp_path) == {"talk.mp4", "talk.json"}
    with job.owned():
        assert job.open({"request.prompt": '"b"'}, False) == 0


def test_a_job_written_before_there_were_owners_is_resumed(tmp_path: Path) -> None:
    folder = tmp_path / "talk.mp4.job"
    folder.mkdir()
    (folder / "job.json").write_text(json.dumps({"format": 1, "done": 2, "fingerprint": VALUES}))
    for name in ("segment_00000.mp4", "segment_00001.mp4", "given_00002.safetensors", "audio_16k.f32"):
        (folder / name).write_bytes(b"x")
    (tmp_path / "talk.partial.mp4").write_bytes(b"growing, without a mark")
    job = Job(tmp_path / "talk.mp4")
    with job.owned():
        assert job.open(VALUES, True) == 2
        job.discard()
    assert names(tmp_path) == set()


@pytest.mark.parametrize("done", ["2", -1, None, 1.5, [2]])
def test_a_record_with_wrong_types_is_one_line(tmp_path: Path, done: object) -> None:
    job = begun(tmp_path / "talk.mp4")
    (job.folder / "job.json").write_text(json.dumps({"format": 1, "done": done, "fingerprint": VALUES}))
    with (
        pytest.raises(
            ResumeError, match=r"job\.json is damaged: done, sums or fingerprint is wrong; use --no-resume"
        ),
        job.owned(),
    ):
        job.open(VALUES, True)
    with job.owned():
        assert job.open(VALUES, False) == 0


def test_hand_overs_of_the_last_windows_and_some_before_are_kept(tmp_path: Path) -> None:
    job = Job(tmp_path / "talk.mp4")
    with job.owned():
        job.open(VALUES, True)
        for window in range(40):
            job.segment_path(window).write_bytes(b"segment")
            job.finish_window(b"given")
        kept = sorted(int(path.stem.removeprefix("given_")) for path in job.folder.glob("given_*"))
    assert kept == [16, *range(40 - KEPT + 1, 41)]


# names and places


def target(output: Path | None, folder: Path, **files: Path) -> Target:
    config = load_config("pocket", {"output_dir": str(folder)}).config
    image = files.get("image", np.zeros((4, 4, 3), np.uint8))
    return Target(output, config, AvatarRequest("a", image, files.get("audio")))


@contextmanager
def owned(wanted: Target, prompt: str = '"a"') -> Iterator[Job]:
    placement = Placement.__new__(Placement)
    with wanted.owned(lambda job: Identified(placement, {"request.prompt": prompt})) as (job, _):
        yield job


@pytest.mark.parametrize("length", [247, 248, 251, 252, 255])
@pytest.mark.parametrize("letter", ["a", "é", "\udce9"])
def test_longest_names(tmp_path: Path, length: int, letter: str) -> None:
    size = len(os.fsencode(letter))
    name = letter * ((length - 4) // size) + "x" * ((length - 4) % size) + ".mp4"
    job = Job(tmp_path / name)
    others = {Job(tmp_path / f"b{name[1:]}").folder, Job(tmp_path / f"b{name[1:]}").partial}
    assert len(set(job.paths.values()) | others) == 6
    (part,) = segments(tmp_path, [2])
    with job.owned():
        job.open(VALUES, True)
        job.partial.write_bytes(b"")
        job.output.write_bytes(part.read_bytes())
        result = job.close({**SIDECAR, "output": name, "frames": 2, "windows": 1, "resumed_windows": 0,
                            "seconds": 0.0, "bytes": part.stat().st_size}, False)  # fmt: skip
    assert Job(tmp_path / name).finished(VALUES) is not None
    part.unlink()
    assert {path.name for path in tmp_path.iterdir()} == {name, result.sidecar.name}


@pytest.mark.parametrize(
    ("output", "message"),
    [
        ("x" * 252 + ".mp4", "the file name is too long"),
        ("x\0.mp4", "NUL"),
        (".mp4", "give the output that ending"),
        ("talk.mov", "give the output that ending"),
        ("link.mp4", "is a link to .*text.txt: the video is written as .mp4"),
        ("circle.mp4", "circle"),
    ],
)
def test_impossible_outputs_are_one_line_before_any_work(tmp_path: Path, output: str, message: str) -> None:
    (tmp_path / "link.mp4").symlink_to("text.txt")
    (tmp_path / "circle.mp4").symlink_to("circle.mp4")
    with pytest.raises(TargetError, match=message) as refused:
        target(tmp_path / output, tmp_path).check()
    assert "\n" not in str(refused.value) and "\0" not in str(refused.value)


@pytest.mark.parametrize("exists", [True, False])
def test_a_link_stays_and_its_target_is_written(tmp_path: Path, exists: bool) -> None:
    (tmp_path / "real").mkdir()
    link, real = tmp_path / "link.mp4", tmp_path / "real" / "talk.mp4"
    link.symlink_to(Path("real") / "talk.mp4")
    if exists:
        finished(real)
    with owned(target(link, tmp_path)) as job:
        assert job.output == real
        with pytest.raises(BusyError):
            target(real, tmp_path).check()
            with owned(target(real, tmp_path)):
                pass
    assert link.is_symlink()


@pytest.mark.parametrize("kind", ["image", "audio"])
@pytest.mark.parametrize("made", ["same", "symlink", "hard link", "sidecar", "preview", "in the job folder"])
def test_inputs_are_never_outputs(tmp_path: Path, kind: str, made: str) -> None:
    output, source = tmp_path / "talk.mp4", tmp_path / "source.mp4"
    if made == "same":
        source = output
    if made in ("sidecar", "preview", "in the job folder"):
        job = begun(output)
        source = {"sidecar": job.sidecar, "preview": job.partial}.get(made, job.segment_path(0))
    source.write_bytes(b"source")
    if made == "symlink":
        output.symlink_to(source)
    if made == "hard link":
        output.hardlink_to(source)
    before = content(tmp_path)
    with pytest.raises(TargetError, match=f"{kind}.*choose another output"):
        target(output, tmp_path, **{kind: source}).check()
    assert content(tmp_path) == before


def test_default_names_take_a_free_number(tmp_path: Path) -> None:
    finished(tmp_path / "000_a.mp4")
    user_file("001_a.mp4")(tmp_path)
    user_file("002_a.partial.mp4")(tmp_path)
    user_file("003_a.mp4.job/x")(tmp_path)
    for output in (None, tmp_path):
        with owned(target(output, tmp_path)) as job:
            assert job.output.name == "000_a.mp4", "its own finished video"
        with owned(target(output, tmp_path), '"b"') as job:
            assert job.output.name == "004_a.mp4"
    begun(tmp_path / "004_a.mp4")
    with owned(target(None, tmp_path), '"b"') as job:
        assert job.output.name == "005_a.mp4"


@contextmanager
def nobody() -> Iterator[None]:
    """Another user than the one who made the files."""
    before = os.geteuid()
    if before == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(before)


def forbidden(job: Job) -> None:
    job.folder.chmod(0o500)


def unreadable(job: Job) -> None:
    job.folder.chmod(0)


def sticky(job: Job) -> None:
    for path in (job.output.parent, job.folder):
        path.chmod(0o1777)


@pytest.mark.skipif(not hasattr(os, "seteuid"), reason="needs users")
@pytest.mark.parametrize("leave", [forbidden, unreadable, sticky])
def test_leftovers_of_another_user_are_one_line(leave: Callable[[Job], None]) -> None:
    if leave is sticky and os.geteuid() != 0:
        pytest.skip("only root can be another user")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o777)
        job = begun(folder / "talk.mp4")
        leave(job)
        wanted = target(folder / "talk.mp4", folder)  # the other user may not read this repository
        with nobody(), pytest.raises(OutputError, match=r"talk\.mp4\.job") as refused:
            wanted.check()
        assert "\n" not in str(refused.value) and isinstance(refused.value, OmniAvatarError)
        job.folder.chmod(0o700)
