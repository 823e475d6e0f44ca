"""The queue on a Ray cluster of two nodes, one of which is killed; run by `make stress`."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import psutil
import pytest

from batch_driver import ray_cluster
from job_driver import RULES
from job_stub import noted
from omniavatar.serve.batch.ray_crew import RayCrew, Seats
from omniavatar.serve.jobs.engines import JobGroupWorker
from omniavatar.serve.jobs.worker import JobWorker
from omniavatar.serve.jobs.workers import WorkerRules, Workers
from queue_place import WAIT_S, Place

pytestmark = pytest.mark.slow


def test_a_killed_node_costs_no_job_and_no_finished_window(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
    place = Place(tmp_path)
    cluster = ray_cluster(1)
    second = cluster.add_node(num_cpus=1)
    cluster.wait_for_nodes()
    place.hold(1)

    def crew() -> RayCrew:
        seats = Seats((), 0, 1, cluster.address)
        return RayCrew(seats, None, place.engines, place.files, kinds=(JobWorker, JobGroupWorker))

    workers = Workers(place.store, place.files, crew, ["pocket"], WorkerRules(**RULES))
    ids = [place.submit() for _ in range(6)]
    workers.start()
    try:
        for id in ids[:2]:
            place.until(id, lambda job: job.window == 1)
        pids = {int(words[2]) for words in noted(place.notes, "begin")}
        lost = set()
        for processes in second.all_processes.values():
            for each in processes:
                root = psutil.Process(each.process.pid)
                for process in (*root.children(recursive=True), root):
                    lost.add(process.pid)
                    process.kill()
        assert len(pids & lost) == 1, "one of the two workers was on the killed node"
        place.go()
        jobs = [place.finished(id) for id in ids]
    finally:
        workers.stop()
        assert workers.join(WAIT_S)
        cluster.shutdown()
        place.store.close()
    assert sorted(job.attempt for job in jobs) == [1, 1, 1, 1, 1, 2]
    assert sum(job.resumed_windows for job in jobs) == 1
    for id in ids:
        place.made_once(id)
