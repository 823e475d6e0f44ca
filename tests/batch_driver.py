"""A batch driver in its own process, which tests kill: `python batch_driver.py '{"folder": ...}'`."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

from batch_stub import StubEngines, make_items
from omniavatar.serve.batch.destination import make_destination
from omniavatar.serve.batch.ray_crew import RayCrew, Seats, ray_environment
from omniavatar.serve.batch.rules import Rules
from omniavatar.serve.batch.run import BatchResult, run_batch
from omniavatar.types import Event


def ray_cluster(cpus: int) -> Any:
    """A Ray cluster of this machine with one node.

    Ray reads its environment when it is imported. This may be the first import, so it gets the product's.
    """
    for name, value in ray_environment(None).items():
        os.environ.setdefault(name, value)
    from ray.cluster_utils import Cluster

    return Cluster(initialize_head=True, head_node_args={"num_cpus": cpus, "include_dashboard": False})


def drive(
    folder: Path,
    prompts: list[str],
    *,
    engines: Any = None,
    workers: int | None = 2,
    address: str | None = None,
    devices: int = 1,
    output: str | None = None,
    event: Any = None,
    **rules: Any,
) -> BatchResult:
    """Run a batch of stub items in `folder`: videos in out/, states in run/, the engines' log in notes/."""
    (folder / "notes").mkdir(parents=True, exist_ok=True)
    destination = make_destination(output or str(folder / "out"), folder / "run" / "work")
    engines = engines or StubEngines(folder / "notes")
    rules = {"retry_wait_s": 0.05, "busy_wait_s": 0.2, "poll_s": 0.1, **rules}
    return run_batch(
        make_items(prompts),
        lambda: RayCrew(Seats((), 0, devices, address, devices), workers, engines, destination),
        destination,
        folder / "run",
        Rules(**rules),
        event or (lambda event: None),
    )


if __name__ == "__main__":
    options = json.loads(sys.argv[1])
    path = Path(options.pop("folder"))
    settings = options.pop("engine", {})

    def show(event: Event) -> None:
        print(json.dumps({"event": event.kind, **event.as_dict()}), flush=True)

    made = drive(
        path, options.pop("prompts"), engines=StubEngines(path / "notes", **settings), event=show, **options
    )
    if made.ledger.error:
        print(made.ledger.error, file=sys.stderr)
