"""The page's worker on a machine's only GPU, without Ray, with the packaged model."""

from __future__ import annotations

import pickle
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from omniavatar.assets import SPEECH, pocket
from omniavatar.config.change import changed
from omniavatar.config.load import load_config
from omniavatar.measure.times import PartTimes
from omniavatar.plan.run import plan_run
from omniavatar.serve.batch.crew import Answered, Started
from omniavatar.serve.batch.items import Seat, Verdict, WorkerInfo
from omniavatar.serve.jobs.engines import JobEngines
from omniavatar.serve.jobs.files import JobFiles
from omniavatar.serve.jobs.process_crew import ProcessCrew
from omniavatar.serve.jobs.records import VIDEO, JobSpec, new_job_id
from omniavatar.serve.jobs.worker import JobTask

pytestmark = pytest.mark.gpu
WAIT_S = 240.0
SIZE = (192, 192)


def test_a_worker_makes_videos_on_the_gpu(tmp_path: Path) -> None:
    config = load_config(Path("pocket"), [f"text_cache_dir={tmp_path / 'cache'}"]).config
    files = JobFiles(str(tmp_path / "files"))
    crew = ProcessCrew(1, JobEngines({"pocket": config}), files, Seat(("cuda:0",)))
    try:
        begun = time.monotonic()
        crew.hire(0)
        started = news(crew)
        assert isinstance(started, Started) and isinstance(started.answer, WorkerInfo), started
        assert started.answer.device == torch.cuda.get_device_name(0)
        print(f"ready after {time.monotonic() - begun:.1f} s on {started.answer.device}")
        sizes = []
        for _ in range(2):
            id = new_job_id()
            for name, path in (("input/portrait", pocket.PORTRAIT), ("input/voice", SPEECH)):
                with path.open("rb") as stream:
                    files.put(id, name, stream)
            begun = time.monotonic()
            crew.give(0, JobTask(id, JobSpec("pocket", pocket.PROMPT, "input/portrait", "input/voice")))
            answer = news(crew)
            assert isinstance(answer, Answered) and answer.outcome.verdict is Verdict.done, answer
            assert not crew.progress([0])[0].warnings
            sizes.append(files.local(id, VIDEO).read_bytes())
            print(f"video of {answer.outcome.made.video_seconds:g} s in {time.monotonic() - begun:.1f} s")
        assert sizes[0] == sizes[1]
    finally:
        crew.close()


def news(crew: ProcessCrew) -> object:
    ends = time.monotonic() + WAIT_S
    while not (found := crew.wait(1.0)):
        assert time.monotonic() < ends
    return found[0]


def test_the_parts_of_the_model_are_timed_on_the_gpu() -> None:
    config = changed(load_config(Path("pocket")).config, runtime={"device": "cuda"})
    done = subprocess.run(
        [sys.executable, "-m", "omniavatar.measure.times"],
        input=pickle.dumps(config),
        capture_output=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr.decode()
    times = PartTimes.parse(done.stdout.decode())
    seconds = times.seconds(plan_run(config, SIZE, 16000 * 6))
    print(f"6 s of voice: {seconds:.2f} s predicted, {times}")
    assert 0 < seconds < 60
