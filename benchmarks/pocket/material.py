"""The test clips of the pocket model: people never trained on who say things never trained on.

Every clip is a take of `training.takes` or an aligned recording of a person, filmed by the renderer with its
own person (seeds below `HELD_OUT_SEEDS`). A clip keeps its portrait (the first frame), its sound, its film
(the ceiling of every measure), and for each frame the opening that the phones call for: that of this face
with the mouth shapes of the phones alone, without a smile. Clips of a minute keep only the film around the
first second and of the last second.

Files below a folder: `inputs/NAME.png, .wav, .json` (small, they travel to a GPU machine) and
`truth/NAME.mp4`.
"""

from __future__ import annotations

import json
import wave
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from training.drive import draw_drive
from training.head import Head
from training.looks import draw_looks
from training.motion import Manner, draw_manner, perform
from training.music import music
from training.phones import FPS, Phone, frame_phones, mouth_coefficients, smooth_articulate
from training.scale import SIZE
from training.speech import SAMPLE_RATE, SpeechSet, foreign_speech, synthesise
from training.studio import HELD_OUT_SEEDS, MOST_TRAINED_SEED, Studio
from training.takes import SAMPLES_A_FRAME, Take, make_take

from benchmarks.pocket import measures
from benchmarks.pocket.video_files import write_video

FRAMES = 126
LONG_SECONDS = 60
SPEECH_SEED = 60_000
TAKE_SEED = 20_000
LOOKS_SEED = 30_000
HARD_SEED = 21_000
HARD = ("music", "noise", "french", "german", "wordless")
HELD_OUT_VOICES = ("Hugo", "Storm", "gustave", "miguel", "Denis", "announcer", "aunty", "pedro")
"""Of eSpeak NG, none of them in `training.speech.VARIANTS`."""
LEAD = 0.24
STILL = Manner("neutral", "still", "A person is talking to the camera, neutral, still")


@dataclass(frozen=True)
class Clip:
    """One test clip.

    kind: synthetic, recorded, long or one of HARD.
    opening: of the mouth as the phones call for it, over the distance of the eyes.
    speaking: whether a phone is heard.
    Both have one value for each frame; frame 0 is the portrait.
    """

    name: str
    kind: str
    voice: str
    prompt: str
    opening: tuple[float, ...]
    speaking: tuple[bool, ...]


def read_clips(folder: Path) -> list[Clip]:
    """The clips that `prepare` wrote, by name, those of a minute last.

    Raises FileNotFoundError without any.
    """
    files = sorted((folder / "inputs").glob("*.json"))
    if not files:
        raise FileNotFoundError(
            f"{folder / 'inputs'}: no clips; run `python -m benchmarks pocket_quality prepare` first"
        )
    tables = [json.loads(file.read_text()) for file in files]
    clips = [
        Clip(**{**table, "opening": tuple(table["opening"]), "speaking": tuple(table["speaking"])})
        for table in tables
    ]
    return sorted(clips, key=lambda clip: clip.kind == "long")


def prepare(
    folder: Path,
    synthetic: int,
    recorded: SpeechSet | None,
    long: int,
    long_seconds: int,
    hard: int = 0,
    device: torch.device | None = None,
    first_person: int = LOOKS_SEED,
) -> list[Clip]:
    """Write `synthetic` takes, the pieces of each recording, `hard` clips of each kind of HARD, and `long`
    clips of `long_seconds` each.

    first_person: seed of the first clip's looks; each clip has the next one.
    """
    studio = Studio(iter(()), 0, device or torch.device("cpu"))
    names = studio.head.names
    speech = synthesise(160, SPEECH_SEED, 2)
    cast: list[tuple[str, str, str, Take]] = []
    seed = TAKE_SEED
    while len(cast) < synthetic:
        take = make_take(speech, names, FRAMES, seed, speech_alone=True)
        if np.count_nonzero(take.phones) > FRAMES / 2:
            cast.append((f"synthetic{len(cast):02d}", "synthetic", "", take))
        seed += 1
    for number in range(0 if recorded is None else len(recorded)):
        assert recorded is not None
        rng = np.random.default_rng((TAKE_SEED, number))
        for part, take in enumerate(_recorded_takes(recorded, number, names, rng)):
            voice = str(recorded.voices[number])
            cast.append((f"recorded{number:02d}{'abcdef'[part]}", "recorded", voice, take))
    if hard:
        for kind, takes in hard_takes(speech, names, hard).items():
            cast += [(f"{kind}{number}", kind, "", take) for number, take in enumerate(takes)]
    for number in range(long):
        take = make_take(speech, names, long_seconds * FPS + 1, seed + number, speech_alone=True)
        cast.append((f"long{number}", "long", "", replace(take, manner=STILL)))
    return [
        _write(folder, studio, name, kind, voice, take, first_person + number)
        for number, (name, kind, voice, take) in enumerate(cast)
    ]


def hard_takes(speech: SpeechSet, names: list[str], count: int) -> dict[str, list[Take]]:
    """`count` takes of each kind of HARD.

    Music is 6 dB and noise 10 dB below the speech; French and German are spoken by voices of eSpeak NG that
    training never uses; wordless is music alone.
    """
    takes = {
        kind: [
            make_take(speech, names, FRAMES, HARD_SEED + 100 * place + number, speech_alone=True)
            for number in range(count)
        ]
        for place, kind in enumerate(HARD)
    }
    foreign = foreign_speech(HARD_SEED, 8 * count, HELD_OUT_VOICES)
    for kind, language in (("french", "fr"), ("german", "de")):
        part = SpeechSet.of([each for each in foreign if each[0].startswith(f"espeak-{language}")])
        takes[kind] = [
            make_take(part, names, FRAMES, HARD_SEED + 1000 + number, speech_alone=True)
            for number in range(count)
        ]
    rng = np.random.default_rng(HARD_SEED)
    total = (FRAMES - 1) * SAMPLES_A_FRAME
    takes["music"] = [
        replace(take, sound=beside(take.sound, music(rng, total), 6)) for take in takes["music"]
    ]
    takes["noise"] = [
        replace(take, sound=beside(take.sound, rng.normal(0, 1, total), 10)) for take in takes["noise"]
    ]
    takes["wordless"] = [
        replace(
            take,
            sound=(2000 * music(rng, total)).clip(-32768, 32767).astype(np.int16),
            phones=np.zeros_like(take.phones),
            shape=np.zeros_like(take.shape),
            tracks=perform(names, [], FRAMES, STILL, np.random.default_rng(HARD_SEED), take.drive),
            manner=STILL,
        )
        for take in takes["wordless"]
    ]
    return takes


def beside(sound: np.ndarray, other: np.ndarray, decibels: float) -> np.ndarray:
    """int16 sound with another one of unit power, which is `decibels` weaker than its sounding part."""
    heard = sound[sound != 0].astype(np.float64)
    level = float(np.sqrt(np.square(heard).mean()))
    mixed = sound + level * 10 ** (-decibels / 20) * other
    return (mixed * min(1.0, 32000 / float(np.abs(mixed).max()))).astype(np.int16)


def _recorded_takes(speech: SpeechSet, number: int, names: list[str], rng: np.random.Generator) -> list[Take]:
    """One recording after a short silence, in pieces of at most `FRAMES` frames and at least half as many."""
    samples, phones = speech.utterance(number)
    total = FRAMES * SAMPLES_A_FRAME - SAMPLES_A_FRAME
    lead = int(LEAD * SAMPLE_RATE)
    takes = []
    for begin in range(0, len(samples), total - 2 * lead):
        piece = samples[begin : begin + total - 2 * lead]
        if begin and len(piece) < total / 2:
            break
        frames = -(-(len(piece) + 2 * lead) // SAMPLES_A_FRAME) + 1
        sound = np.zeros((frames - 1) * SAMPLES_A_FRAME, np.int16)
        sound[lead : lead + len(piece)] = piece
        shift = LEAD - begin / SAMPLE_RATE
        spoken = [
            Phone(phone.name, max(phone.start + shift, 0.0), phone.end + shift)
            for phone in phones
            if phone.end + shift > LEAD - 0.02 and phone.start + shift < LEAD + len(piece) / SAMPLE_RATE
        ]
        manner, drive = draw_manner(rng), draw_drive(rng, frames)
        takes.append(
            Take(
                sound=sound,
                phones=frame_phones(spoken, frames),
                shape=smooth_articulate(spoken, frames).astype(np.float32),
                manner=manner,
                tracks=perform(names, spoken, frames, manner, rng, drive),
                drive=drive,
            )
        )
    return takes


def expected_opening(head: Head, identity: torch.Tensor, take: Take) -> np.ndarray:
    """(T,) opening of the face `identity` (1, K) with the mouth shapes of the take's phones alone."""
    coefficients = torch.from_numpy(mouth_coefficients(take.shape, head.names))
    face = head.shape(identity).expand(len(coefficients), -1, -1)
    return head.mouth_opening(face, coefficients.to(head.device)).cpu().numpy()


def _write(folder: Path, studio: Studio, name: str, kind: str, voice: str, take: Take, seed: int) -> Clip:
    if HELD_OUT_SEEDS <= seed < MOST_TRAINED_SEED:
        raise ValueError(
            f"people with seed {seed} may have been trained on; choose one below {HELD_OUT_SEEDS}"
        )
    frames = studio.film_takes([take], seed, slice(0, 1) if kind == "long" else None).frames[0]
    looks = draw_looks(studio.head, 1, seed, SIZE)
    pictures = frames.permute(0, 2, 3, 1).cpu().numpy()
    clip = Clip(
        name=name,
        kind=kind,
        voice=voice,
        prompt=take.manner.prompt,
        opening=tuple(
            round(float(value), 5) for value in expected_opening(studio.head, looks.identity, take)
        ),
        speaking=tuple(bool(value) for value in take.phones),
    )
    inputs = folder / "inputs"
    inputs.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pictures[0]).save(inputs / f"{name}.png")
    with wave.open(str(inputs / f"{name}.wav"), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(SAMPLE_RATE)
        file.writeframes(take.sound.tobytes())
    (inputs / f"{name}.json").write_text(json.dumps(asdict(clip)) + "\n")
    if kind == "long":
        moments = measures.moments(take.phones)
        ends = [measures.seconds_of(take.phones, moment) for moment in (moments[0], moments[-1])]
        films = [studio.film_takes([take], seed, part).frames[0] for part in ends]
        pictures = torch.cat(films).permute(0, 2, 3, 1).cpu().numpy()
    write_video(folder / "truth" / f"{name}.mp4", pictures)
    return clip
