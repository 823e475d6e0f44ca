"""One rank of a worker that makes videos on several devices: `python -m ... <socket> <pipe>`.

`group.GroupWorker` starts it, sends its rank over the socket and receives its answers there. Rank 0 runs the
worker and alone holds leases and writes outputs, so these end with it. The other ranks follow the leader's
orders and report only errors. Nothing is written to the pipe: it closes when the starting process dies, and
then this process exits at once, even while blocked.
"""

from __future__ import annotations

import os
import pickle
import sys
import threading
import time
from functools import partial
from multiprocessing.connection import Connection
from queue import SimpleQueue
from typing import Any

from omniavatar.serve.batch.items import Engine, GroupFactory, Member, Outcome, Seat, Stop
from omniavatar.serve.batch.worker import error_outcome


def main(socket: int, pipe: int) -> None:
    threading.Thread(target=_end_with_starter, args=(pipe,), daemon=True).start()
    connection: Connection = Connection(socket)
    member, factory, destination, folder, kind = connection.recv()
    began = time.time()
    try:
        if member.rank:
            _unpickled(factory).follow(member)
        else:
            _lead(
                connection,
                kind(partial(_engine, factory, member), member.seat, destination, folder, connection.send),
            )
    except EOFError:  # the starting process died
        pass
    except Exception as error:
        connection.send(error_outcome(error, began))
    os._exit(1)  # without waiting for threads, queues or the other processes


def _lead(connection: Connection, worker: Any) -> None:
    """Carry out what arrives: tasks one after the other, and at once how to stop (`worker.stop`)."""
    tasks: SimpleQueue[Any] = SimpleQueue()
    answer = worker.start()
    connection.send(answer)
    threading.Thread(target=_receive, args=(connection, worker, tasks), daemon=True).start()
    while not (isinstance(answer, Outcome) and answer.replace):
        task = tasks.get()
        if task is None:
            raise EOFError
        answer = worker.run(task)
        connection.send(answer)


def _receive(connection: Connection, worker: Any, tasks: SimpleQueue[Any]) -> None:
    try:
        while True:
            message = connection.recv()
            if isinstance(message, Stop):
                worker.stop(message)
            else:
                tasks.put(message)
    except (EOFError, OSError):  # the starting process died
        tasks.put(None)


def _engine(factory: bytes, member: Member, seat: Seat) -> Engine:
    return _unpickled(factory).lead(member)


def _unpickled(factory: bytes) -> GroupFactory:
    result: GroupFactory = pickle.loads(factory)
    return result


def _end_with_starter(pipe: int) -> None:
    os.read(pipe, 1)
    os._exit(1)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
