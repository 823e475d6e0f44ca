"""Where live sessions take turns: one thread that makes the blocks of all sessions of a pipeline.

The sessions share the model's weights. The block that is due first is made first. A new session is let in
when the measured times of the others leave room for it (`MOST_SHARE`), and the memory too. The thread runs
while sessions are open.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from math import inf
from typing import TypeVar

from omniavatar.errors import OmniAvatarError, ResourceError
from omniavatar.live.maker import BlockMaker
from omniavatar.live.player import Player

MOST_SHARE = 0.9
"""Part of the machine's time that sessions may take together."""
ROOM = 1.2
"""Free memory that a further session must find, as a multiple of what the largest one took."""
T = TypeVar("T")


class SessionsFullError(ResourceError):
    """The open sessions leave no time or memory for another one."""

    public = "server: its open sessions leave no time or memory for another one; try again when one has ended"


def unknown_memory() -> int | None:
    """The free memory of a device that is not measured."""
    return None


class LiveStage:
    """Makes the blocks of all live sessions of one pipeline.

    - clock: seconds, as `time.monotonic`.
    - free_memory: bytes that are free on the device; None if that is not measured.
    """

    def __init__(
        self,
        clock: Callable[[], float] = time.monotonic,
        free_memory: Callable[[], int | None] = unknown_memory,
    ) -> None:
        self._clock, self._free_memory = clock, free_memory
        self._condition = threading.Condition()
        self._players: list[Player] = []
        self._jobs: deque[Callable[[], None]] = deque()
        self._opening: deque[Callable[[], None]] = deque()
        self._thread: threading.Thread | None = None

    @property
    def sessions(self) -> int:
        """Open sessions."""
        with self._condition:
            return len(self._players)

    def open(
        self,
        build: Callable[[], BlockMaker],
        rate: int,
        prepare: Callable[[Player], None] = lambda player: None,
    ) -> Future[Player]:
        """A session for the maker that `build` returns; it is built in the stage's thread.

        Its future raises ResourceError if the machine has no room, and what `build` raises. It waits until
        the blocks of the sessions before it are measured.

        - rate: samples a second of the sound that leaves.
        - prepare: called with the session before its first block.
        """
        return self._submit(lambda: self._admit(build, rate, prepare), self._opening)

    def call(self, function: Callable[[], T]) -> Future[T]:
        """Run `function` in the stage's thread, between two blocks."""
        return self._submit(function, self._jobs)

    def leave(self, player: Player) -> Future[None]:
        """End a session and free what it has; a block in the making stops at its next step."""
        player.close()
        return self.call(lambda: self._dismiss(player))

    def close(self) -> None:
        """End all sessions."""
        with self._condition:
            players = list(self._players)
        for future in [self.leave(player) for player in players]:
            future.result()

    def _submit(self, function: Callable[[], T], jobs: deque[Callable[[], None]]) -> Future[T]:
        future: Future[T] = Future()

        def job() -> None:
            if not future.set_running_or_notify_cancel():
                return
            try:
                future.set_result(function())
            except BaseException as error:
                future.set_exception(error)

        with self._condition:
            jobs.append(job)
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="omniavatar-live", daemon=True)
                self._thread.start()
            self._condition.notify_all()
        return future

    def _run(self) -> None:
        while True:
            with self._condition:
                job, player, wait = self._next()
                if job is None and player is None:
                    if not self._players and not self._opening:
                        self._thread = None
                        return
                    self._condition.wait(None if wait == inf else wait)
                    continue
            if job is not None:
                job()
            elif player is not None:
                self._perform(player)
            job = player = None

    def _next(self) -> tuple[Callable[[], None] | None, Player | None, float]:
        """A job, or the player whose block is to be begun, or the seconds until then."""
        if self._jobs:
            return self._jobs.popleft(), None, 0.0
        if self._opening and all(player.judged for player in self._players):
            return self._opening.popleft(), None, 0.0
        now = self._clock()
        starts = [(player.start_at(now), player) for player in self._players]
        ready = [player for start, player in starts if start <= now]
        if ready:
            return None, min(ready, key=lambda player: player.due), 0.0
        return None, None, min((start for start, _ in starts), default=inf) - now

    def _perform(self, player: Player) -> None:
        try:
            player.perform()
        except Exception as error:  # the session's reader raises it; the others go on
            player.fail(error)

    def _admit(self, build: Callable[[], BlockMaker], rate: int, prepare: Callable[[Player], None]) -> Player:
        self._check_memory()
        before = self._free_memory()
        maker = build()
        player = Player(maker, self._condition, rate, self._clock)
        try:
            self._check_time(maker)
            prepare(player)
        except OmniAvatarError:
            maker.close()
            raise
        after = self._free_memory()
        if before is not None and after is not None:
            player.memory = max(0, before - after)
        with self._condition:
            self._players.append(player)
        return player

    def _check_memory(self) -> None:
        free = self._free_memory()
        largest = max((player.memory or 0 for player in self._players), default=0)
        if free is not None and free < ROOM * largest:
            raise SessionsFullError(
                f"live: {len(self._players)} sessions leave {free / 1e9:.1f} GB of GPU memory free "
                f"and another one takes {largest / 1e9:.1f} GB; close one"
            )

    def _check_time(self, maker: BlockMaker) -> None:
        pixels = maker.size[0] * maker.size[1]
        shares, most = 0.0, 0.0
        for player in self._players:
            share = player.share or 0.0
            height, width = player.maker.size
            shares += share
            most = max(most, share * pixels / (height * width))
        if self._players and shares + most > MOST_SHARE:
            raise SessionsFullError(
                f"live: the open sessions take {shares:.0%} of this machine's time and another one needs "
                f"{most:.0%}, the most is {MOST_SHARE:.0%}; close one, or use fewer steps or a smaller size"
            )

    def _dismiss(self, player: Player) -> None:
        with self._condition:
            if player not in self._players:
                return
            self._players.remove(player)
        player.maker.close()
