"""Jobs with the real engine and a nano checkpoint: a kill and a drain change no byte of the video."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image

import job_driver
from engine import make_pipeline, overrides, portrait, voice
from media_files import write_audio
from omniavatar import AvatarRequest
from omniavatar.config.load import load_config
from omniavatar.media.inspect import read_frames
from omniavatar.serve.batch.items import Progress, Seat, Stop, WorkerInfo
from omniavatar.serve.jobs.engines import JobEngines
from omniavatar.serve.jobs.extensions import prepare_extension
from omniavatar.serve.jobs.files import JobFiles
from omniavatar.serve.jobs.records import (
    SIDECAR,
    SOURCE_VIDEO,
    VIDEO,
    JobRecord,
    JobResult,
    JobSpec,
    JobStatus,
    new_job_id,
)
from omniavatar.serve.jobs.store import JobStore
from omniavatar.serve.jobs.worker import JobTask, JobWorker
from processes import start as start_process

WAIT_S = 120.0
SETTINGS = {"seed": 5, "num_steps": 2}


def test_a_killed_and_a_drained_job_has_the_bytes_of_an_uninterrupted_one(
    nano_checkpoint: Path, tmp_path: Path
) -> None:
    face, speech = tmp_path / "face.png", tmp_path / "voice.wav"
    PIL.Image.fromarray(portrait()).save(face)
    sound = voice(2.0)
    write_audio(speech, sound.samples[None], 16000, "pcm_s16le", "mono")
    files, url = JobFiles(str(tmp_path / "files")), f"sqlite:///{tmp_path}/jobs.db"
    id = new_job_id()
    files.put(id, "input/face.png", io.BytesIO(face.read_bytes()))
    files.put(id, "input/voice.wav", io.BytesIO(speech.read_bytes()))
    with JobStore.open(url) as store:
        spec = JobSpec("nano", "a person speaks", "input/face.png", "input/voice.wav", (64, 64), SETTINGS)
        store.submit("key", spec, id=id)
        engines = overrides(nano_checkpoint, tmp_path / "cache", threads=1)

        killed = start(url, files, engines)
        until(store, id, lambda job: job.window >= 1)
        killed.kill()
        killed.wait()
        assert store.get(id).status is JobStatus.in_progress
        assert (files.work(id).parent / "video.mp4.job" / "job.json").exists()

        while not store.requeue_expired():
            time.sleep(0.05)
        claim = store.claim("here", ["nano"], 600)
        assert claim is not None and claim.attempt == 2 and claim.job.window >= 1
        config = load_config(None, engines).config
        seen: list[Progress] = []

        def watch(progress: Progress) -> None:
            seen.append(progress)
            if progress.step:
                worker.stop(Stop.after_window)

        worker = JobWorker(JobEngines({"nano": config}), Seat(("cpu",)), files, str(Path.cwd()), watch)
        assert isinstance(worker.start(), WorkerInfo)
        drained = worker.run(JobTask(id, spec))
        assert drained.error_class == "StoppedError", drained
        done = json.loads((files.work(id).parent / "video.mp4.job" / "job.json").read_text())["done"]
        assert seen[0].resumed >= 1 and done > seen[0].resumed and seen[-1].window == done
        worker = JobWorker(JobEngines({"nano": config}), Seat(("cpu",)), files, str(Path.cwd()))
        assert isinstance(worker.start(), WorkerInfo)
        outcome = worker.run(JobTask(id, spec))
        assert outcome.made is not None, outcome
        assert outcome.made.resumed_windows == done
        again = worker.run(JobTask(id, spec))  # as if it had died before it could report
        assert again.made == outcome.made and again.size == outcome.size
        result = JobResult(VIDEO, outcome.size, outcome.made.video_seconds, outcome.made.windows)
        store.complete(claim, result)
        job = store.get(id)

    with make_pipeline(nano_checkpoint, tmp_path / "cache", threads=1, **SETTINGS) as pipeline:
        request = AvatarRequest("a person speaks", face, speech)
        made = pipeline.generate(request, tmp_path / "whole.mp4")
    assert made.windows == job.windows
    assert files.local(id, VIDEO).read_bytes() == made.output.read_bytes()
    sidecar = json.loads(files.local(id, SIDECAR).read_text())
    assert (sidecar["seed"], sidecar["bytes"], sidecar["frames"]) == (5, job.size_bytes, made.frames)

    new_id = new_job_id()
    assert prepare_extension(files, job, new_id) == "input/face.png"
    assert files.local(new_id, SOURCE_VIDEO).read_bytes() == made.output.read_bytes()
    files.put(new_id, "input/more.wav", io.BytesIO(speech.read_bytes()))
    longer = replace(spec, extends=id, audio="input/more.wav")
    outcome = worker.run(JobTask(new_id, longer))
    assert outcome.made is not None, outcome
    old, new = (list(read_frames(files.local(each, VIDEO))) for each in (id, new_id))
    assert len(new) == outcome.made.frames > len(old) and np.array_equal(new[: len(old)], old)


def start(url: str, files: JobFiles, engines: dict[str, Any]) -> subprocess.Popen[str]:
    options = {"kind": "nano", "url": url, "files": files.place, "engines": engines, "rules": {"lease": 3.0}}
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    process = start_process(
        [sys.executable, job_driver.__file__, json.dumps(options)], stdout=subprocess.PIPE, env=environment
    )
    assert process.stdout is not None and process.stdout.readline() == "running\n"
    threading.Thread(target=process.stdout.read, daemon=True).start()
    return process


def until(store: JobStore, id: str, true: Any) -> JobRecord:
    end = time.monotonic() + WAIT_S
    while not true(job := store.get(id)):
        assert time.monotonic() < end, job
        time.sleep(0.01)
    return job
