"""One worker of a `ProcessCrew`: `python -m ... <socket>`. It ends at once when the starting process dies."""

from __future__ import annotations

import os
import sys
import threading
from multiprocessing.connection import Connection
from queue import SimpleQueue
from typing import Any

from omniavatar.serve.batch.items import Outcome, Stop
from omniavatar.serve.jobs.worker import JobTask, JobWorker


def main(socket: int) -> None:
    connection: Connection = Connection(socket)
    try:
        factory, seat, files, folder = connection.recv()
    except EOFError:  # the starting process died
        return
    worker = JobWorker(factory, seat, files, folder, connection.send)
    tasks: SimpleQueue[JobTask] = SimpleQueue()
    threading.Thread(target=_receive, args=(connection, worker, tasks), daemon=True).start()
    answer: Any = worker.start()
    connection.send(answer)
    while not (isinstance(answer, Outcome) and answer.replace):
        answer = worker.run(tasks.get())
        connection.send(answer)


def _receive(connection: Connection, worker: JobWorker, tasks: SimpleQueue[JobTask]) -> None:
    try:
        while True:
            message = connection.recv()
            if isinstance(message, Stop):
                worker.stop(message)
            else:
                tasks.put(message)
    except (EOFError, OSError):
        os._exit(1)  # without waiting for a step: nobody holds the job's lease any more


if __name__ == "__main__":
    main(int(sys.argv[1]))
