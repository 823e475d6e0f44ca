"""What the processes that check uploads run. It imports the readers and nothing of the API."""

from __future__ import annotations

from dataclasses import dataclass

from omniavatar import assets
from omniavatar.errors import InputError
from omniavatar.media.image import Reduction, load_image

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
    from omniavatar.media.audio_source import open_audio  # the server's own process needs no FFmpeg

    with open_audio(path) as audio:
        samples = 0
        for block in audio.blocks:
            samples += block.shape[1]
            if samples > most_seconds * audio.sample_rate:
                raise InputError(f"the sound is longer than {most_seconds:g} s; cut it")
        return samples / audio.sample_rate


def bound() -> None:
    """Limit the memory of a process that decodes."""
    import resource

    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY, _MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def warm_up() -> None:
    """Import the readers and decode the package's portrait and speech with them."""
    portrait_size(str(assets.PORTRAIT), 10**9)
    voice_seconds(str(assets.SPEECH), 10.0**9)
