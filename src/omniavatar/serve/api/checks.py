"""Decodes uploads with the engine's own readers, in processes that a hostile file may crash."""

from __future__ import annotations

import concurrent.futures
import multiprocessing
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

import pebble

from omniavatar.errors import InputError, OmniAvatarError
from omniavatar.media.audio_source import open_audio
from omniavatar.media.image import Reduction, load_image
from omniavatar.serve.api.errors import ApiError, field_error

PORTRAIT, VOICE = "input_reference", "audio_reference"
Result = TypeVar("Result")
_MEMORY = 6 * 2**30


@dataclass(frozen=True)
class _Bounded(Reduction):
    """Refuses a picture by the size in its header, before it is decoded."""

    most: int = 0

    def draft_size(self, width: int, height: int) -> tuple[int, int] | None:
        if width * height > self.most:
            raise InputError(f"the image has {width} x {height} pixels, above {self.most}; make it smaller")
        return super().draft_size(width, height)


def portrait_size(path: str, most_pixels: int) -> tuple[int, int]:
    """(height, width) of a portrait, decoded whole. Raises InputError."""
    height, width = load_image(path, _Bounded(most=most_pixels)).shape[:2]
    return height, width


def voice_seconds(path: str, most_seconds: float) -> float:
    """Seconds of a voice, decoded whole, but no further than the limit. Raises InputError."""
    with open_audio(path) as audio:
        samples = 0
        for block in audio.blocks:
            samples += block.shape[1]
            if samples > most_seconds * audio.sample_rate:
                raise InputError(f"the sound is longer than {most_seconds:g} s; cut it")
        return samples / audio.sample_rate


class Checker(Protocol):
    """Checks inputs before a job is accepted."""

    def start(self) -> None: ...

    def portrait(self, path: Path) -> tuple[int, int]:
        """(height, width). Raises ApiError that names the field."""
        ...

    def voice(self, path: Path) -> float:
        """Seconds. Raises ApiError that names the field."""
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
        """Start the processes, so that the first upload does not wait for them."""
        for started in [self._started().schedule(bound) for _ in range(self._processes)]:
            started.result()

    def portrait(self, path: Path) -> tuple[int, int]:
        return self._run(PORTRAIT, path, portrait_size, self._pixels)

    def voice(self, path: Path) -> float:
        return self._run(VOICE, path, voice_seconds, self._length)

    def close(self) -> None:
        with self._lock:
            if self._pool is not None:
                self._pool.stop()
                self._pool.join()
                self._pool = None

    def _run(self, field: str, path: Path, check: Callable[[str, Any], Result], limit: float) -> Result:
        pool = self._started()
        future: concurrent.futures.Future[Result] = pool.schedule(
            check, args=[str(path), limit], timeout=self._seconds
        )
        try:
            return future.result()
        except OmniAvatarError as error:
            raise refused(field, error, path) from None
        except concurrent.futures.TimeoutError:
            raise field_error(field, "takes too long to decode; convert it to PNG, JPEG or WAV") from None
        except (pebble.ProcessExpired, MemoryError):
            raise field_error(field, "cannot be decoded; convert it to PNG, JPEG or WAV") from None

    def _started(self) -> pebble.ProcessPool:
        with self._lock:
            if self._pool is None:
                methods = multiprocessing.get_all_start_methods()
                context = multiprocessing.get_context("forkserver" if "forkserver" in methods else "spawn")
                self._pool = pebble.ProcessPool(self._processes, initializer=bound, context=context)
            return self._pool


class DirectChecker:
    """A `Checker` in this process, for files that are trusted."""

    def __init__(self, most_pixels: int, most_seconds: float) -> None:
        self._pixels, self._length = most_pixels, most_seconds

    def start(self) -> None:
        pass

    def portrait(self, path: Path) -> tuple[int, int]:
        try:
            return portrait_size(str(path), self._pixels)
        except OmniAvatarError as error:
            raise refused(PORTRAIT, error, path) from None

    def voice(self, path: Path) -> float:
        try:
            return voice_seconds(str(path), self._length)
        except OmniAvatarError as error:
            raise refused(VOICE, error, path) from None

    def close(self) -> None:
        pass


def refused(field: str, error: OmniAvatarError, path: Path) -> ApiError:
    """The reader's message with the field in place of the path."""
    text = str(error).replace(f" {path}", "").replace(str(path), "the file").strip()
    return field_error(field, text, "invalid_input")


def bound() -> None:
    """Limit the memory of a process that decodes."""
    import resource

    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY, _MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
