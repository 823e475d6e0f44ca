"""Where live sound comes from: a file at the pace of real time, raw samples on a pipe, a microphone."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import numpy as np

from omniavatar.errors import InputError, ResourceError
from omniavatar.live.sound import check_rate
from omniavatar.media.temporary import temporary_folder

if TYPE_CHECKING:
    from omniavatar.live.session import LiveSession

PIECE_S = 0.02
MOST_AHEAD_S = 5.0
"""Seconds of a file or pipe that wait in the session; the rest waits where it is."""
MOST_SPOKEN_S = 100.0
"""Seconds of a microphone that wait in the session; speech beyond them is left out."""
_log = logging.getLogger("omniavatar.live")


class SoundSource:
    """Sound that is pushed by a thread while a session runs, as a context manager.

    `error` is what ended it early; the session ends when the sound does.
    """

    def __init__(self, session: LiveSession) -> None:
        self.session = session
        self.error: Exception | None = None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="live-sound", daemon=True)

    def __enter__(self) -> SoundSource:
        self.open()
        self._thread.start()
        return self

    def open(self) -> None:
        """Make sure that the sound can be used, before any of it is pushed."""

    def __exit__(self, *error: object) -> None:
        self._stop.set()

    def _run(self) -> None:
        try:
            self.push_all(self._stop)
        except Exception as error:
            if not self._stop.is_set():
                self.error = error
        finally:
            self.session.end()

    def push_all(self, stop: threading.Event) -> None:
        """Push sound until it ends or `stop` is set."""
        raise NotImplementedError

    def await_room(self, stop: threading.Event) -> None:
        """Wait while the session is `MOST_AHEAD_S` behind, as with a model that is too slow."""
        while self.session.stats().waiting > MOST_AHEAD_S and not stop.wait(0.1):
            continue


class FileSound(SoundSource):
    """A sound file, played at the pace of real time.

    clock: seconds, as `time.monotonic`.
    """

    def __init__(self, session: LiveSession, path: Path, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__(session)
        self._path, self._clock = path, clock
        self._sound = np.zeros(0, np.float32)

    def open(self) -> None:
        """See `SoundSource.open`. Raises InputError."""
        from omniavatar.media.audio import decode_mono

        with temporary_folder() as folder:
            decoded = folder / "sound.f32"
            decode_mono(self._path, decoded, self.session.rate, 0.0)
            self._sound = np.memmap(decoded, np.float32, "r")  # stays readable without its name

    def push_all(self, stop: threading.Event) -> None:
        """See `SoundSource.push_all`."""
        rate, sound = self.session.rate, self._sound
        count, begun = round(PIECE_S * rate), self._clock()
        for start in range(0, len(sound), count):
            self.await_room(stop)
            self.session.push_audio(np.array(sound[start : start + count]), rate)
            ahead = begun + (start + count) / rate - self._clock()
            if stop.wait(max(0.0, ahead)):
                return


class PipeSound(SoundSource):
    """Raw int16 samples, little-endian, from a pipe; they are pushed as they come."""

    def __init__(self, session: LiveSession, pipe: BinaryIO, rate: int, channels: int = 1) -> None:
        super().__init__(session)
        self._pipe, self._rate, self._channels = pipe, check_rate(rate), channels

    def push_all(self, stop: threading.Event) -> None:
        """See `SoundSource.push_all`."""
        width, rest = 2 * self._channels, b""
        most = round(self._rate * PIECE_S) * width * 50
        read = getattr(self._pipe, "read1", self._pipe.read)
        while not stop.is_set() and (data := read(most)):
            data = rest + data
            whole = len(data) - len(data) % width
            rest = data[whole:]
            samples = np.frombuffer(data[:whole], "<i2").reshape(-1, self._channels)
            self.await_room(stop)
            self.session.push_audio(samples, self._rate)
        if rest:
            raise InputError(f"--audio -: ends within a sample; send int16 of {self._channels} channels")


class MicrophoneSound(SoundSource):
    """The machine's microphone, by the package sounddevice."""

    _left_out = False

    def open(self) -> None:
        """See `SoundSource.open`. Raises ResourceError."""
        try:
            import sounddevice
        except (ImportError, OSError) as error:  # OSError: the library PortAudio is missing
            raise ResourceError(
                f"microphone: {error}; install 'omniavatar[live]' by pip and libportaudio2 by apt"
            ) from None
        try:
            self._rate = int(sounddevice.query_devices(kind="input")["default_samplerate"])
            self._stream = sounddevice.InputStream(
                self._rate, round(self._rate * PIECE_S), channels=1, dtype="int16"
            )
        except (sounddevice.PortAudioError, ValueError) as error:
            raise ResourceError(f"microphone: cannot be opened ({error}); use a file") from None

    def hear(self, samples: np.ndarray, rate: int) -> None:
        """Push a piece, or leave it out if too much waits, and say so once."""
        left_out = self.session.stats().waiting > MOST_SPOKEN_S
        if not left_out:
            self.session.push_audio(samples, rate)
        elif not self._left_out:
            _log.warning(
                "microphone: %.0f s of sound wait for their frames; speech is left out until "
                "fewer wait; use a faster configuration",
                MOST_SPOKEN_S,
            )
        self._left_out = left_out

    def push_all(self, stop: threading.Event) -> None:
        """See `SoundSource.push_all`."""
        with self._stream as stream:
            while not stop.is_set():
                samples, _ = stream.read(round(self._rate * PIECE_S))
                self.hear(samples, self._rate)
