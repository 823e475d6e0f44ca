"""The judge's videos of the live path: the maker hears just what it asks for, frame f stays frame f."""

import wave

import numpy as np
import pytest
from benchmarks.pocket.live_path import read_sound, spoken


class Echo:
    """Blocks of 8 frames, the first one of 4, in two pieces; a frame shows the first sample of its sound."""

    ahead = 1280

    def __init__(self):
        self.heard, self.done, self.asked = np.zeros(0, np.float32), 0, []

    @property
    def frames(self):
        return 8 if self.done else 4

    @property
    def missing(self):
        return max(0, (self.done + self.frames) * 640 + self.ahead - len(self.heard))

    def push(self, samples):
        assert samples.dtype == np.float32
        self.asked.append(len(samples))
        self.heard = np.concatenate([self.heard, samples])

    def make(self, stop):
        assert not stop()
        made = self.heard[640 * self.done :: 640][: self.frames]
        self.done += len(made)
        frames = (made * 255).astype(np.uint8)[:, None, None, None].repeat(3, 3)
        yield frames[:3]
        yield frames[3:]


@pytest.mark.parametrize("frames", [1, 3, 4, 12, 19])
def test_each_frame_has_its_own_sound_and_silence_follows(frames):
    sound = np.repeat(np.linspace(0, 1, 15, dtype=np.float32), 640)
    maker = Echo()
    made = np.concatenate(list(spoken(maker, sound, frames)))[:, 0, 0, 0]
    wanted = (np.pad(np.linspace(0, 1, 15, dtype=np.float32), (0, 10)) * 255).astype(np.uint8)
    assert made.tolist() == wanted[:frames].tolist()
    assert sum(maker.asked) == maker.done * 640 + maker.ahead


def test_sound_files_become_numbers_of_about_one(tmp_path):
    path = tmp_path / "a.wav"
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(16000)
        file.writeframes(np.array([0, 16384, -32768], np.int16).tobytes())
    assert read_sound(path).tolist() == [0.0, 0.5, -1.0]
