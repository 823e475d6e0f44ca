"""One process of a worker whose videos are made on several devices: `python -m ... <socket> <pipe>`.

It is started by `group.GroupWorker`, hears over the socket who it is, and answers there. Rank 0 holds the
`Worker`: leases and outputs are its alone, so they end with it. The others follow the leader's orders and say
only what went wrong. Nothing is ever written to the pipe; its end is the end of whoever started this process,
and of this process at once, whatever it waits for.
"""

from __future__ import annotations

import os
import pickle
import sys
import threading
import time
from functools import partial
from multiprocessing.connection import Connection

from omniavatar.serve.batch.destination import Destination
from omniavatar.serve.batch.items import Engine, GroupFactory, Member, Outcome, Place
from omniavatar.serve.batch.worker import Worker, problem


def main(socket: int, pipe: int) -> None:
    threading.Thread(target=_end_with_starter, args=(pipe,), daemon=True).start()
    talk: Connection = Connection(socket)
    member, factory, destination, folder = talk.recv()
    began = time.time()
    try:
        if member.rank:
            _made(factory).follow(member)
        else:
            _lead(talk, member, factory, destination, folder)
    except EOFError:  # whoever started this process is gone
        pass
    except Exception as error:
        talk.send(problem(error, began))
    os._exit(1)  # without waiting for threads, queues or the other processes


def _lead(talk: Connection, member: Member, factory: bytes, destination: Destination, folder: str) -> None:
    engines = partial(_engine, factory, member)
    worker = Worker(engines, member.place, destination, folder, tell=talk.send)
    answer = worker.start()
    talk.send(answer)
    while not (isinstance(answer, Outcome) and answer.replace):
        answer = worker.run(talk.recv())
        talk.send(answer)


def _engine(factory: bytes, member: Member, place: Place) -> Engine:
    return _made(factory).lead(member)


def _made(factory: bytes) -> GroupFactory:
    made: GroupFactory = pickle.loads(factory)
    return made


def _end_with_starter(pipe: int) -> None:
    os.read(pipe, 1)
    os._exit(1)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
