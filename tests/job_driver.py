"""The workers of a queue in their own process, which tests kill: `python job_driver.py '{"url": ...}'`.

SIGTERM drains them. It prints `ready`, and each ended job.
"""

from __future__ import annotations

import json
import signal
import sys
from pathlib import Path
from typing import Any

from omniavatar.serve.jobs.files import JobFiles
from omniavatar.serve.jobs.process_crew import ProcessCrew
from omniavatar.serve.jobs.store import JobStore
from omniavatar.serve.jobs.workers import WorkerRules, Workers

RULES = {"lease": 2.0, "beat": 0.05, "poll": 0.05, "busy_pause": 0.1, "retry_pause": 0.05, "hire_pause": 0.05}


def stub_engines(options: dict[str, Any]) -> Any:
    from job_stub import StubJobEngines

    return StubJobEngines(**{name: Path(value) for name, value in options.items()})


def nano_engines(options: dict[str, Any]) -> Any:
    from omniavatar.config.load import load_config
    from omniavatar.serve.jobs.engines import JobEngines

    return JobEngines({"nano": load_config(None, options).config})


def main(options: dict[str, Any]) -> None:
    engines = {"stub": stub_engines, "nano": nano_engines}[options.get("kind", "stub")](options["engines"])
    files = JobFiles(options["files"])
    with JobStore.open(options["url"]) as store:
        workers = Workers(
            store,
            files,
            lambda: ProcessCrew(options.get("workers", 1), engines, files),
            list(engines.configs),
            WorkerRules(**{**RULES, **options.get("rules", {})}),
            on_end=lambda id: print("ended", id, flush=True),
        )
        signal.signal(signal.SIGTERM, lambda *_: workers.drain())
        print("running", flush=True)
        workers.run()


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
