"""Decodes uploads with the engine's own readers, in processes that a hostile file may crash."""

from __future__ import annotations

import concurrent.futures
import logging
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol, TypeVar

import pebble

from omniavatar.errors import OmniAvatarError
from omniavatar.serve.api.decoding import bound, portrait_size, voice_seconds, warm_up
from omniavatar.serve.api.errors import ApiError, field_error
from omniavatar.serve.api.reader_processes import reader_context

_log = logging.getLogger("omniavatar.serve")

PORTRAIT, VOICE = "input_reference", "audio_reference"
Result = TypeVar("Result")


class Checker(Protocol):
    """Checks inputs before a job is accepted."""

    def start(self) -> None: ...

    def check(self, portrait: Path | None, voice: Path | None) -> tuple[tuple[int, int] | None, float | None]:
        """(height, width) of the portrait, and seconds of the voice; None for one that is not given.

        Raises ApiError that names the field.
        """
        ...

    def close(self) -> None: ...


class ProcessChecker:
    """A `Checker` with processes of limited memory and time; one that dies costs only its own file."""

    def __init__(self, processes: int, seconds: float, most_pixels: int, most_seconds: float) -> None:
        self._processes, self._seconds = processes, seconds
        self._pixels, self._length = most_pixels, most_seconds
        self._lock = threading.Lock()
        self._pool: pebble.ProcessPool | None = None

    def start(self) -> None:
        """Start the processes and let them decode once, so that no upload waits for them."""
        for started in [self._started().schedule(warm_up) for _ in range(self._processes)]:
            started.result()

    def check(self, portrait: Path | None, voice: Path | None) -> tuple[tuple[int, int] | None, float | None]:
        size = None if portrait is None else self._given(portrait_size, portrait, self._pixels)
        seconds = None if voice is None else self._given(voice_seconds, voice, self._length)
        try:
            return (
                None if size is None else self._answer(PORTRAIT, size, portrait),
                None if seconds is None else self._answer(VOICE, seconds, voice),
            )
        except ApiError:
            if seconds is not None:
                seconds.cancel()
            raise

    def close(self) -> None:
        with self._lock:
            if self._pool is not None:
                self._pool.stop()
                self._pool.join()
                self._pool = None

    def _given(
        self, check: Callable[[str, Any], Result], path: Path, limit: float
    ) -> concurrent.futures.Future[Result]:
        """What a process will answer."""
        future: concurrent.futures.Future[Result] = self._started().schedule(
            check, args=[str(path), limit], timeout=self._seconds
        )
        return future

    def _answer(self, field: str, future: concurrent.futures.Future[Result], path: Path | None) -> Result:
        try:
            return future.result()
        except OmniAvatarError as error:
            raise refused(field, error, path) from None
        except concurrent.futures.TimeoutError:
            raise field_error(field, "takes too long to decode; convert it to PNG, JPEG or WAV") from None
        except (pebble.ProcessExpired, MemoryError):
            raise field_error(field, "cannot be decoded; convert it to PNG, JPEG or WAV") from None
        except Exception as error:  # the file is at fault for the client, and the reader for us
            _log.error("a bug in this server: its reader of %s", field, exc_info=error)
            raise field_error(field, "cannot be decoded; convert it to PNG, JPEG or WAV") from None

    def _started(self) -> pebble.ProcessPool:
        with self._lock:
            if self._pool is None:
                self._pool = pebble.ProcessPool(self._processes, initializer=bound, context=reader_context())
            return self._pool


class DirectChecker:
    """A `Checker` in this process, for files that are trusted."""

    def __init__(self, most_pixels: int, most_seconds: float) -> None:
        self._pixels, self._length = most_pixels, most_seconds

    def start(self) -> None:
        pass

    def check(self, portrait: Path | None, voice: Path | None) -> tuple[tuple[int, int] | None, float | None]:
        size, seconds, field, path = None, None, PORTRAIT, portrait
        try:
            if portrait is not None:
                size = portrait_size(str(portrait), self._pixels)
            field, path = VOICE, voice
            if voice is not None:
                seconds = voice_seconds(str(voice), self._length)
        except OmniAvatarError as error:
            raise refused(field, error, path) from None
        return size, seconds

    def close(self) -> None:
        pass


def refused(field: str, error: OmniAvatarError, path: Path | None) -> ApiError:
    """The reader's message with the field in place of the path."""
    text = str(error).replace(f" {path}", "").replace(str(path), "the file").strip()
    return field_error(field, text, "invalid_input")
