"""A job whose unfinished work cannot be continued, as after an upgrade, starts over instead of failing."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from media_files import segments
from omniavatar.errors import ResumeError
from omniavatar.serve.batch.items import Made, Outcome, Seat, Verdict
from omniavatar.serve.jobs.files import JobFiles
from omniavatar.serve.jobs.records import VIDEO, JobSpec, new_job_id
from omniavatar.serve.jobs.worker import JobTask, JobWorker
from omniavatar.types import AvatarRequest


class PickyEngine:
    """Refuses to go on from work that it finds; `always` refuses in any case."""

    def __init__(self, video: Path, always: bool) -> None:
        self.video, self.always, self.runs = video, always, 0

    def run(self, model: str, request: AvatarRequest, output: Path, *rest: Any) -> Made:
        self.runs += 1
        job = output.with_name("video.mp4.job")
        if self.always or job.exists():
            raise ResumeError(f"{job} holds 2 finished windows of another run; changed: omniavatar: 1 -> 2")
        assert Path(str(request.image)).read_bytes() == b"picture"
        shutil.copy(self.video, output)
        values = {"bytes": output.stat().st_size, "windows": 1, "frames": 9, "resumed_windows": 0}
        output.with_suffix(".json").write_text(json.dumps(values))
        return Made(9, 1, 0, 0.36)

    def device(self) -> str:
        return "none"

    def intact(self) -> bool:
        return True


@pytest.mark.parametrize("always", [False, True])
@pytest.mark.parametrize("url", [False, True])
def test_work_of_another_version_is_made_again(tmp_path: Path, always: bool, url: bool) -> None:
    place = f"memory://start-over-{always}" if url else str(tmp_path / "files")
    files, id = JobFiles(place, tmp_path / "staging"), new_job_id()
    files.check()
    files.put(id, "input/portrait.png", io.BytesIO(b"picture"))
    job = files.work(id).with_name("video.mp4.job")
    job.mkdir(parents=True)
    (job / "job.json").write_text("{}")
    engine = PickyEngine(segments(tmp_path, [9])[0], always)
    worker = JobWorker(lambda seat: engine, Seat(("cpu",)), files, str(Path.cwd()))
    worker.start()
    outcome = worker.run(JobTask(id, JobSpec("pocket", "A man talks", "input/portrait.png", None)))
    assert isinstance(outcome, Outcome) and engine.runs == 2
    if always:
        assert outcome.verdict is Verdict.failed and outcome.error_class == "ResumeError"
    else:
        assert outcome.verdict is Verdict.done
        assert files.size(id, VIDEO) == outcome.size > 0
