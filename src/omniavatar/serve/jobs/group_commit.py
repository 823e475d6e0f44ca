"""Several writes of one process in one transaction, when they come at the same time.

Each commit waits for the disk while it keeps all other writers out. So the first thread that gets its turn
carries out what the waiting ones ask for too, and they find their answers.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from sqlalchemy.engine import Connection

from omniavatar.errors import OmniAvatarError
from omniavatar.serve.jobs.database import Database
from omniavatar.serve.jobs.errors import StoreError

MOST = 32
"""Writes of one transaction."""
Result = TypeVar("Result")


@dataclass(eq=False)
class _Asked(Generic[Result]):
    """A write and its answer."""

    write: Callable[[Connection], Result]
    is_done: bool = False
    result: Result | None = None
    error: Exception | None = None

    def answer(self) -> Result:
        if self.error is not None:
            raise self.error
        return self.result  # type: ignore[return-value]


class GroupCommit(Generic[Result]):
    """Carries out writes under the database's lock `lock`, in the order in which they came."""

    def __init__(self, database: Database, lock: int) -> None:
        self._database, self._lock = database, lock
        self._waiting: deque[_Asked[Result]] = deque()
        self._turn = threading.Lock()

    @property
    def waiting(self) -> int:
        """Writes that no thread carries out yet."""
        return len(self._waiting)

    def write(self, write: Callable[[Connection], Result]) -> Result:
        """What `write` returns, when it is on the disk.

        write: must change nothing before it raises an OmniAvatarError, and may be called again after any
        other error.

        Raises what `write` raises, StoreError.
        """
        asked = _Asked(write)
        self._waiting.append(asked)
        with self._turn:
            while not asked.is_done:
                count = min(len(self._waiting), MOST)
                self._carry_out([self._waiting.popleft() for _ in range(count)])
        return asked.answer()

    def _carry_out(self, group: Sequence[_Asked[Result]]) -> None:
        try:
            with self._database.writing(self._lock) as connection:
                for asked in group:
                    asked.result = asked.error = None
                    try:
                        asked.result = asked.write(connection)
                    except OmniAvatarError as error:
                        asked.error = error
        except Exception as error:
            if len(group) > 1 and not isinstance(error, StoreError):  # only the one at fault must not be kept
                for asked in group:
                    self._carry_out([asked])
                return
            for asked in group:
                asked.error = error
        except BaseException:  # of this thread; the others must not wait for it
            for asked in group:
                asked.error = StoreError("the write was interrupted; send it again")
                asked.is_done = True
            raise
        for asked in group:
            asked.is_done = True
