"""Files of jobs in a folder, and on an S3-compatible server."""

from __future__ import annotations

import io
import os
import pickle
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
import s3fs

from job_stub import StubJobEngines
from media_files import segments
from omniavatar.errors import ConfigError, OutputError
from omniavatar.serve.batch.items import Progress, Seat, Stop, WorkerInfo
from omniavatar.serve.jobs.errors import FileMissingError, FileNameError, FileTooLargeError
from omniavatar.serve.jobs.files import JobFiles
from omniavatar.serve.jobs.records import VIDEO, JobSpec, new_job_id
from omniavatar.serve.jobs.worker import JobTask, JobWorker
from s3_server import s3_server

NAME = "input/portrait.png"


@pytest.fixture(scope="module")
def s3() -> Iterator[str]:
    with s3_server() as address:
        yield address


@pytest.fixture(params=["folder", pytest.param("s3", marks=pytest.mark.slow)])
def files(request: pytest.FixtureRequest, tmp_path: Path) -> JobFiles:
    if request.param == "folder":
        made = JobFiles(str(tmp_path / "files"))
    else:
        request.getfixturevalue("s3")
        made = JobFiles(f"s3://videos/{uuid.uuid4().hex}", tmp_path / "staging", wait_s=0.01)
    made.check()
    return made


def elsewhere(files: JobFiles, tmp_path: Path) -> JobFiles:
    """The same files as another machine sees them."""
    if not files.is_url:
        return pickle.loads(pickle.dumps(files))
    return JobFiles(files.place, tmp_path / "staging of another machine", wait_s=0.01)


def test_a_file_is_read_here_and_on_another_machine(files: JobFiles, tmp_path: Path) -> None:
    id, content = new_job_id(), os.urandom(3000)
    assert files.size(id, NAME) is None
    assert files.put(id, NAME, io.BytesIO(content), limit=3000) == 3000
    for each in (files, elsewhere(files, tmp_path)):
        assert each.size(id, NAME) == 3000
        assert each.local(id, NAME).read_bytes() == content
        with each.open(id, NAME) as file:
            file.seek(1000)
            assert file.read() == content[1000:]
    other = new_job_id()
    files.copy(id, NAME, other, "input/copy.png")
    assert elsewhere(files, tmp_path).local(other, "input/copy.png").read_bytes() == content


def test_a_file_above_the_limit_leaves_nothing(files: JobFiles) -> None:
    id = new_job_id()
    with pytest.raises(FileTooLargeError, match=r"input/portrait.png: has more than 99 bytes"):
        files.put(id, NAME, io.BytesIO(b"x" * 100), limit=99)
    assert files.size(id, NAME) is None
    assert [path for path in files._local_root.rglob("*") if path.is_file()] == []


def test_a_missing_file_is_one_line(files: JobFiles) -> None:
    for read in (files.open, files.local):
        with pytest.raises(FileMissingError, match=r"input/portrait.png: job video_\w+ has no such file"):
            read(new_job_id(), NAME)


@pytest.mark.parametrize(
    "name",
    [
        "",
        "portrait.png",
        "input/",
        "input/../x",
        "input/..",
        "../input/x",
        "/etc/passwd",
        "input/a/b",
        "input/a\0b",
        "input/.hidden",
        "input\\x",
        "output/a\n",
        "secret/x",
        "input/" + "x" * 101,
        "input/ü",
    ],
)
def test_a_name_becomes_no_other_path(tmp_path: Path, name: str) -> None:
    files, id = JobFiles(str(tmp_path / "files")), new_job_id()
    for action in (files.open, files.size, files.local):
        with pytest.raises(FileNameError, match="the name is none of a job's file"):
            action(id, name)
    with pytest.raises(FileNameError):
        files.put(id, name, io.BytesIO(b"x"))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "id", ["", "..", "video_", "video_" + "g" * 32, "video_" + "0" * 33, "a/../video_" + "0" * 32]
)
def test_an_id_becomes_no_other_path(tmp_path: Path, id: str) -> None:
    files = JobFiles(str(tmp_path / "files"))
    for action in (files.delete, files.work, files.partial, files.drop_work):
        with pytest.raises(FileNameError, match="the id is none of a job"):
            action(id)
    with pytest.raises(FileNameError):
        files.open(id, NAME)


def test_delete_removes_the_job_and_no_other(files: JobFiles, tmp_path: Path) -> None:
    one, two = new_job_id(), new_job_id()
    for id in (one, two):
        files.put(id, NAME, io.BytesIO(b"x"))
    assert set(files.ids(older_than_s=-1e6)) == {one, two}
    assert set(files.ids(older_than_s=3600)) == set()
    files.delete(one)
    files.delete(one)
    assert set(elsewhere(files, tmp_path).ids(older_than_s=-1e6)) == {two}
    assert files.size(one, NAME) is None and files.size(two, NAME) == 1


def begin_work(files: JobFiles, id: str, done: int) -> Path:
    """A job folder with `done` windows, as the engine leaves it."""
    video = files.work(id)
    folder = video.with_name("video.mp4.job")
    folder.mkdir(parents=True, exist_ok=True)
    for window in range(done):
        (folder / f"segment_{window:05d}.mp4").write_bytes(b"segment %d" % window)
        (folder / f"given_{window + 1:05d}.safetensors").write_bytes(b"given %d" % (window + 1))
    (folder / "audio_16k.f32").write_bytes(b"made again anywhere")
    (folder / "job.json").write_text(f'{{"done": {done}}}')
    video.with_name("video.partial.mp4").write_bytes(b"growing")
    return folder


def test_another_machine_goes_on_with_an_unfinished_job(files: JobFiles, tmp_path: Path) -> None:
    id = new_job_id()
    begin_work(files, id, 1)
    files.save_work(id)
    folder = begin_work(files, id, 3)
    files.save_work(id)
    assert files.partial(id) is not None
    other = elsewhere(files, tmp_path)
    other.restore_work(id)
    restored = other.work(id).with_name("video.mp4.job")
    needed = {path.name for path in folder.iterdir()} - {"audio_16k.f32"}
    assert {path.name for path in restored.iterdir()} >= needed
    for name in needed:
        assert (restored / name).read_bytes() == (folder / name).read_bytes()
    other.restore_work(id)  # it has begun: nothing changes
    files.drop_work(id)
    assert not folder.exists() and files.partial(id) is None
    assert elsewhere(files, tmp_path / "third").size(id, "work/job.json") is None


def test_a_job_without_saved_work_begins(files: JobFiles) -> None:
    files.restore_work(new_job_id())
    files.save_work(new_job_id())


@pytest.mark.slow
def test_a_server_that_is_away_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "test")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    s3fs.S3FileSystem.clear_instance_cache()
    files = JobFiles("s3://away/x", tmp_path / "staging", tries=2, wait_s=0.01)
    with pytest.raises(
        OutputError, match=r"s3://away/x: cannot upload input/portrait.png after 2 attempts"
    ) as error:
        files.put(new_job_id(), NAME, io.BytesIO(b"x"))
    assert "\n" not in str(error.value)
    s3fs.S3FileSystem.clear_instance_cache()


def test_a_url_needs_a_staging_folder_and_a_known_protocol(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="needs a local folder"):
        JobFiles("s3://videos/x")
    with pytest.raises(ConfigError, match="files nosuch://x"):
        JobFiles("nosuch://x", tmp_path).check()


def test_a_job_begun_here_is_finished_on_another_machine(files: JobFiles, tmp_path: Path) -> None:
    """Workers with their own disks and one object store; with a folder, both see the same disk."""
    notes = tmp_path / "notes"
    notes.mkdir()
    engines = StubJobEngines(notes, segments(tmp_path, [9])[0])
    id = new_job_id()
    for name in ("input/a.png", "input/b.wav"):
        files.put(id, name, io.BytesIO(b"x"))
    task = JobTask(id, JobSpec("pocket", "a person speaks", "input/a.png", "input/b.wav"))

    def stop_after(progress: Progress) -> None:
        if progress.window == 2:
            first.stop(Stop.now)

    first = JobWorker(engines, Seat(("cpu",)), files, str(tmp_path), stop_after)
    second = JobWorker(engines, Seat(("cpu",)), elsewhere(files, tmp_path), str(tmp_path))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)
        assert isinstance(first.start(), WorkerInfo) and isinstance(second.start(), WorkerInfo)
        assert first.run(task).error_class == "StoppedError"
        outcome = second.run(task)
    assert outcome.made is not None and outcome.made.resumed_windows in (1, 2), outcome
    assert files.size(id, VIDEO) == outcome.size
    assert elsewhere(files, tmp_path / "third").local(id, VIDEO).read_bytes() == engines.video.read_bytes()
