"""Workers of the queue: `python -m stress.workers FOLDER NUMBER [DATABASE]`. They end with the stress."""

from __future__ import annotations

import os
import sys
import threading
import time
from pathlib import Path

from job_stub import StubJobEngines
from omniavatar.serve.jobs.files import JobFiles
from omniavatar.serve.jobs.process_crew import ProcessCrew
from omniavatar.serve.jobs.store import JobStore
from omniavatar.serve.jobs.workers import WorkerRules, Workers
from omniavatar.serve.settings import ServeSettings

RULES = WorkerRules(lease=5.0, poll=0.2)
WINDOWS, WINDOW_S = 2, 0.04


def end_with_parent(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)


def main(folder: Path, number: int, database: str) -> None:
    settings = ServeSettings(data_dir=folder, database=database)
    engines = StubJobEngines(folder / "notes", folder / "made.mp4", WINDOWS, WINDOW_S)
    files = JobFiles(settings.files_place)
    with JobStore.open(settings.database_url) as store:
        threading.Thread(target=end_with_parent, args=(os.getppid(),), daemon=True).start()
        Workers(store, files, lambda: ProcessCrew(number, engines, files), ["pocket"], RULES).run()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), *sys.argv[3:4] or [""])
