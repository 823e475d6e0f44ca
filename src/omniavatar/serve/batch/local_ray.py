"""A Ray of its own on this machine: started for one batch, watched, and ended with it.

It gets no dashboard. Its temporary folder has a short name, because a Unix socket path may have about 100
characters.
"""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

from omniavatar.errors import ResourceError
from omniavatar.media.lease import try_lease
from omniavatar.media.temporary import LOCK, RAY, remove_abandoned
from omniavatar.serve.batch.crew import CrewLost

SERVICES = ("raylet", "gcs_server")
"""Without one of these, Ray waits for minutes without a word. An agent that ends takes the raylet with it."""
END_S = 5.0
"""Processes of Ray that still run so long after its end are killed."""

_OBJECT_STORE_BYTES = 100 * 2**20
_MAX_TEMP_PATH = 40


class LocalRay:
    """Starts Ray for this process; call `close` at the end.

    - ray: the module.
    - gpus: GPUs of this machine, as in `CUDA_VISIBLE_DEVICES`.
    - cpus: threads of all workers together.

    Raises CrewLost if a process of Ray ended, ResourceError.
    """

    def __init__(self, ray: Any, gpus: Sequence[str], cpus: int) -> None:
        self._ray = ray
        root = Path(tempfile.gettempdir())
        if len(str(root)) >= _MAX_TEMP_PATH:
            root = Path("/tmp")
        remove_abandoned(root)
        self._folder = tempfile.mkdtemp(prefix=RAY, dir=root)
        self._lease = try_lease(Path(self._folder) / LOCK)
        self._before = {child.pid for child in psutil.Process().children()}
        self._begun: dict[int, psutil.Process] = {}
        self._ended: str | None = None
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(gpus)
        try:
            ray.init(
                num_cpus=cpus,
                num_gpus=len(gpus),
                object_store_memory=_OBJECT_STORE_BYTES,
                include_dashboard=False,
                log_to_driver=False,
                logging_level=logging.ERROR,
                _temp_dir=self._folder,
            )
        except Exception as error:
            try:
                self.check()
            finally:
                self.close()
            raise ResourceError(
                f"Ray did not start on this machine ({' '.join(str(error).split())[:300]}); stop other Ray "
                "processes with `ray stop` and try again"
            ) from error
        finally:
            if visible is None:
                del os.environ["CUDA_VISIBLE_DEVICES"]
            else:
                os.environ["CUDA_VISIBLE_DEVICES"] = visible

    def check(self) -> None:
        """Raise CrewLost if a service of Ray ended."""
        if self.has_ended():
            raise CrewLost(f"Ray's process {self._ended} on this machine ended")

    def has_ended(self) -> bool:
        """Whether a service of Ray does not run any more."""
        if self._ended is None:
            self._ended = self._look()
        return self._ended is not None

    def _look(self) -> str | None:
        """The name of a service that does not run; None while all do. Remembers Ray's processes."""
        running = set()
        for child in psutil.Process().children():
            if child.pid in self._before:
                continue
            with suppress(psutil.NoSuchProcess):
                self._begun |= {each.pid: each for each in (child, *child.children(recursive=True))}
                if child.status() != psutil.STATUS_ZOMBIE:
                    running.add(Path(child.name()).stem)
        return next((name for name in SERVICES if name not in running), None)

    def close(self) -> None:
        """Stop Ray, kill what is left of it after `END_S`, and delete its folder."""
        self.has_ended()
        self._ray.shutdown()
        _, left = psutil.wait_procs(list(self._begun.values()), END_S)
        for process in left:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        shutil.rmtree(self._folder, ignore_errors=True)
        if self._lease is not None:
            self._lease.release()
