"""Synthesises training speech with phone times: two synthesisers, many voices, on all cores in seconds.

- flite (CMU, free licence): four voices, three of them built from recorded speech; it reports its phones.
- eSpeak NG (a program under GPL 3; its output is not): formant synthesis with dozens of variants and accents;
  it reports phones as events.
Both are below `build/tts` (see `fetch_tools.sh`), so they run on a machine without network. Recordings of
people with times from forced alignment can be added as files of the same format (`SpeechSet.join`).

A `SpeechSet` holds utterances one after the other: 16 kHz int16 samples, and phones as (index in PHONES,
start, end).
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from types import MappingProxyType

import numpy as np

from training.languages import LANGUAGES, foreign_sentence
from training.languages import PHONES as FOREIGN_PHONES
from training.phones import PHONES, SILENCE, Phone, canonical
from training.texts import sentence

SAMPLE_RATE = 16000
TOOLS = Path(__file__).parent / "build" / "tts"
FLITE_VOICES = ("slt", "rms", "awb", "kal16")
ACCENTS = ("en-us", "en-us", "en-gb-x-rp", "en-gb-scotland", "en-029", "en-us-nyc", "en-gb-x-gbclan")
VARIANTS = (
    "m1", "m2", "m3", "m4", "m5", "m6", "m7", "m8", "f1", "f2", "f3", "f4", "f5", "klatt", "klatt2",
    "klatt3", "Alex", "Andy", "Annie", "Gene", "Lee", "Mario", "Michael", "Mike", "Reed", "adam",
    "anika", "antonio", "belinda", "benjamin", "boris", "caleb", "david", "ed", "grandma", "grandpa",
    "ian", "iven", "john", "linda", "marcelo", "max", "michel", "norbert", "pablo", "paul", "quincy",
    "rob", "robert", "sandro", "shelby", "steph", "travis", "victor", "zac",
)  # fmt: skip
_ESPEAK_PHONES = {
    "@": "AH", "@2": "AH", "@L": "AH L", "3": "ER", "3:": "ER", "a": "AE", "aa": "AE", "A": "AA",
    "A:": "AA", "A@": "AA R", "0": "AA", "O": "AO", "O:": "AO", "O@": "AO R", "o@": "AO R", "o": "OW",
    "oU": "OW", "aU": "AW", "aI": "AY", "aI2": "AY", "aI3": "AY", "aI@": "AY AH", "aU@": "AW AH",
    "OI": "OY", "eI": "EY", "e": "EH", "E": "EH", "E2": "EH", "e@": "EH R", "I": "IH", "I2": "IH",
    "I#": "IH", "IR": "ER", "i": "IY", "i:": "IY", "i@": "IY AH", "i@3": "IY R", "U": "UH", "u": "UW",
    "u:": "UW", "U@": "UH R", "V": "AH", "VR": "ER", "V3": "ER", "a#": "AH", "ju:": "Y UW", "D": "DH",
    "T": "TH", "S": "SH", "Z": "ZH", "tS": "CH", "dZ": "JH", "N": "NG", "j": "Y", "h": "HH", "t#": "T",
    "t2": "T", "w#": "W", "n-": "N", "l-": "L", "L": "L", "r-": "R", "R": "R", "x": "K", "C": "HH",
    "?": "", ";": "", "_": SILENCE, "_:": SILENCE, "_|": "", "_^_": "", "p": "P", "b": "B", "t": "T",
    "d": "D", "k": "K", "g": "G", "f": "F", "v": "V", "s": "S", "z": "Z", "m": "M", "n": "N", "l": "L",
    "r": "R", "w": "W", "r/": "R", "aI#": "AY", "E#": "EH", "O2": "AO", "i2": "IY", "3r": "ER",
    "e:": "EY", "o:": "OW", "Y": "UW", "E:": "EH", "u2": "UW", "I3": "IH", "I@": "IH AH", "t[": "T",
    "@5": "AH",
}  # fmt: skip


@dataclass(frozen=True, eq=False)
class SpeechSet:
    """Utterances with phones.

    samples: (S,) int16.
    utterances: (U, 4) int64: first sample, number of samples, first phone, number of phones.
    phones: (P, 3) float32: index in PHONES, start and end in seconds from the start of the utterance.
    voices: (U,) names.
    """

    samples: np.ndarray
    utterances: np.ndarray
    phones: np.ndarray
    voices: np.ndarray

    def __len__(self) -> int:
        return len(self.utterances)

    @property
    def seconds(self) -> float:
        return len(self.samples) / SAMPLE_RATE

    def utterance(self, number: int) -> tuple[np.ndarray, list[Phone]]:
        """Samples and phones of one utterance."""
        start, count, first, phones = (int(value) for value in self.utterances[number])
        rows = self.phones[first : first + phones]
        return self.samples[start : start + count], [
            Phone(PHONES[int(index)], float(begin), float(end)) for index, begin, end in rows
        ]

    @classmethod
    def of(cls, parts: Iterable[tuple[str, np.ndarray, list[Phone]]]) -> SpeechSet:
        """A set from (voice, int16 samples, phones)."""
        samples, utterances, rows, voices = [], [], [], []
        start = first = 0
        for voice, sound, phones in parts:
            samples.append(sound)
            utterances.append((start, len(sound), first, len(phones)))
            rows += [(PHONES.index(phone.name), phone.start, phone.end) for phone in phones]
            voices.append(voice)
            start, first = start + len(sound), first + len(phones)
        return cls(
            np.concatenate(samples), np.array(utterances), np.array(rows, np.float32), np.array(voices)
        )

    @classmethod
    def join(cls, sets: Iterable[SpeechSet]) -> SpeechSet:
        """All utterances of several sets."""
        parts = [(str(each.voices[row]), *each.utterance(row)) for each in sets for row in range(len(each))]
        return cls.of(parts)

    def save(self, path: Path) -> None:
        """Write an `.npz` with samples as 8-bit mu-law: half the size; augmentation hides the difference."""
        np.savez_compressed(
            path,
            codes=mu_law(self.samples),
            utterances=self.utterances,
            phones=self.phones,
            voices=self.voices,
        )

    @classmethod
    def load(cls, path: Path) -> SpeechSet:
        """The set in a file written by `save`."""
        arrays = np.load(path)
        return cls(from_mu_law(arrays["codes"]), arrays["utterances"], arrays["phones"], arrays["voices"])

    def keep(self, folder: Path) -> Path:
        """Write arrays that several processes can map, to `folder`; returns `folder`."""
        folder.mkdir(parents=True, exist_ok=True)
        for name in ("samples", "utterances", "phones", "voices"):
            np.save(folder / f"{name}.npy", getattr(self, name))
        return folder

    @classmethod
    def open(cls, folder: Path) -> SpeechSet:
        """The set in a folder written by `keep`; samples are mapped from the file."""
        rest = (np.load(folder / f"{name}.npy") for name in ("utterances", "phones", "voices"))
        return cls(np.load(folder / "samples.npy", mmap_mode="r"), *rest)


def mu_law(samples: np.ndarray) -> np.ndarray:
    """int16 to uint8 with the continuous form of ITU-T G.711's curve."""
    value = samples.astype(np.float32) / 32768
    coded = np.sign(value) * np.log1p(255 * np.abs(value)) / np.log(256)
    return np.round((coded + 1) * 127.5).astype(np.uint8)


def from_mu_law(codes: np.ndarray) -> np.ndarray:
    """uint8 back to int16."""
    coded = codes.astype(np.float32) / 127.5 - 1
    value = np.sign(coded) * np.expm1(np.abs(coded) * np.log(256)) / 255
    return np.round(value * 32767).astype(np.int16)


def resample(samples: np.ndarray, rate: float, to: float = SAMPLE_RATE) -> np.ndarray:
    """float32 samples at another rate, by truncating or padding the spectrum."""
    count = max(1, round(len(samples) * to / rate))
    spectrum = np.fft.rfft(samples)
    return (np.fft.irfft(spectrum[: count // 2 + 1], count) * (count / len(samples))).astype(np.float32)


class _Wave(ctypes.Structure):
    _fields_ = (
        ("type", ctypes.c_char_p),
        ("rate", ctypes.c_int),
        ("count", ctypes.c_int),
        ("channels", ctypes.c_int),
        ("samples", ctypes.POINTER(ctypes.c_short)),
    )


class _Voice(ctypes.Structure):
    _fields_ = (("name", ctypes.c_char_p), ("features", ctypes.c_void_p))


class Flite:
    """libflite in this process with one voice; `duration_stretch` is set before each sentence."""

    def __init__(self, voice: str, folder: Path = TOOLS / "lib") -> None:
        for name in ("asound.so.2", "flite.so.1", "flite_usenglish.so.1", "flite_cmulex.so.1"):
            loaded = ctypes.CDLL(str(folder / f"lib{name}"), ctypes.RTLD_GLOBAL)
            if name == "flite.so.1":
                self.library = loaded
        voices = ctypes.CDLL(str(folder / f"libflite_cmu_us_{voice}.so.1"), ctypes.RTLD_GLOBAL)
        library = self.library
        pointer, text, number = ctypes.c_void_p, ctypes.c_char_p, ctypes.c_float
        for name, result, arguments in (
            ("feat_set_float", None, (pointer, text, number)),
            ("flite_synth_text", pointer, (text, pointer)),
            ("utt_wave", ctypes.POINTER(_Wave), (pointer,)),
            ("utt_relation", pointer, (pointer, text)),
            ("relation_head", pointer, (pointer,)),
            ("item_next", pointer, (pointer,)),
            ("item_feat_string", text, (pointer, text)),
            ("item_feat_float", number, (pointer, text)),
            ("delete_utterance", None, (pointer,)),
        ):
            function = getattr(library, name)
            function.restype, function.argtypes = result, arguments
        library.flite_init()
        register = getattr(voices, f"register_cmu_us_{voice}")
        register.restype, register.argtypes = ctypes.POINTER(_Voice), (pointer,)
        self.voice = register(None)

    def speak(self, text: str, stretch: float) -> tuple[np.ndarray, list[Phone]]:
        """int16 samples at 16 kHz and phones."""
        library = self.library
        library.feat_set_float(self.voice.contents.features, b"duration_stretch", stretch)
        utterance = library.flite_synth_text(text.encode(), ctypes.cast(self.voice, ctypes.c_void_p))
        wave = library.utt_wave(utterance).contents
        samples = np.ctypeslib.as_array(wave.samples, (wave.count,)).copy()
        phones, start = [], 0.0
        item = library.relation_head(library.utt_relation(utterance, b"Segment"))
        while item:
            name = library.item_feat_string(item, b"name").decode()
            end = float(library.item_feat_float(item, b"end"))
            phones.append(Phone(canonical(name), start, end))
            start = end
            item = library.item_next(item)
        rate = wave.rate
        library.delete_utterance(utterance)
        if rate != SAMPLE_RATE:
            samples = resample(samples.astype(np.float32), rate).round().astype(np.int16)
        return samples, phones


class _Id(ctypes.Union):
    _fields_ = (("number", ctypes.c_int), ("name", ctypes.c_char_p), ("string", ctypes.c_char * 8))


class _Event(ctypes.Structure):
    _fields_ = (
        ("type", ctypes.c_int), ("unique", ctypes.c_uint), ("text", ctypes.c_int), ("length", ctypes.c_int),
        ("milliseconds", ctypes.c_int), ("sample", ctypes.c_int), ("user", ctypes.c_void_p), ("id", _Id),
    )  # fmt: skip


class Espeak:
    """libespeak-ng in this process; the library allows only one instance."""

    RETRIEVAL, PHONEME_EVENTS, PHONEME = 1, 1, 7
    RATE, PITCH, RANGE = 1, 3, 4

    def __init__(self, folder: Path = TOOLS / "espeakng_loader") -> None:
        self.library = ctypes.CDLL(str(folder / "libespeak-ng.so.1"))
        self.rate = self.library.espeak_Initialize(
            self.RETRIEVAL, 200, str(folder).encode(), self.PHONEME_EVENTS
        )
        if self.rate <= 0:
            raise RuntimeError(f"{folder}: eSpeak NG did not start; run training/fetch_tools.sh")
        self.sound: list[np.ndarray] = []
        self.events: list[tuple[float, str]] = []
        kind = ctypes.CFUNCTYPE(
            ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.POINTER(_Event)
        )
        self.callback = kind(self._receive)
        self.library.espeak_SetSynthCallback(self.callback)

    def _receive(self, samples: ctypes._Pointer, count: int, events: ctypes._Pointer) -> int:
        if samples and count > 0:
            self.sound.append(np.ctypeslib.as_array(samples, (count,)).copy())
        number = 0
        while events[number].type:
            if events[number].type == self.PHONEME:
                self.events.append((events[number].milliseconds / 1000, events[number].id.string.decode()))
            number += 1
        return 0

    def speak(
        self,
        text: str,
        voice: str,
        rate: int,
        pitch: int,
        span: int,
        names: Mapping[str, str] = MappingProxyType({}),
    ) -> tuple[np.ndarray, list[Phone]]:
        """int16 samples at 16 kHz and phones. Raises ValueError for an unknown voice.

        names: phones of eSpeak's names that differ from English (`training.languages`).
        """
        table = {**_ESPEAK_PHONES, **names}
        if self.library.espeak_SetVoiceByName(voice.encode()):
            raise ValueError(f"eSpeak NG has no voice {voice!r}")
        for number, value in ((self.RATE, rate), (self.PITCH, pitch), (self.RANGE, span)):
            self.library.espeak_SetParameter(number, value, 0)
        self.sound, self.events = [], []
        data = text.encode()
        self.library.espeak_Synth(data, len(data) + 1, 0, 0, 0, 1, None, None)
        self.library.espeak_Synchronize()
        sound = np.concatenate(self.sound).astype(np.float32)
        end = len(sound) / self.rate
        starts = [(moment, name) for moment, name in self.events if table[_bare(name)]]
        phones = []
        for (start, name), (stop, _) in zip(starts, [*starts[1:], (end, "")], strict=True):
            spoken = table[_bare(name)].split()
            for number, each in enumerate(spoken):
                length = (stop - start) / len(spoken)
                phones.append(Phone(each, start + number * length, start + (number + 1) * length))
        samples = resample(sound, self.rate)
        return samples.clip(-32768, 32767).round().astype(np.int16), phones


def _bare(name: str) -> str:
    return name.lstrip("',%=")


def _flite_batch(job: tuple[int, int]) -> list[tuple[str, np.ndarray, list[Phone]]]:
    seed, count = job
    rng = np.random.default_rng((seed, 1))
    voice = str(rng.choice(FLITE_VOICES, p=(0.3, 0.3, 0.3, 0.1)))
    flite = Flite(voice)
    return [(f"flite-{voice}", *flite.speak(sentence(rng), rng.uniform(0.8, 1.3))) for _ in range(count)]


def _espeak_batch(job: tuple[int, int]) -> list[tuple[str, np.ndarray, list[Phone]]]:
    seed, count = job
    rng = np.random.default_rng((seed, 2))
    espeak = Espeak()
    parts = []
    for _ in range(count):
        voice = f"{rng.choice(ACCENTS)}+{rng.choice(VARIANTS)}"
        rate, pitch, span = int(rng.integers(120, 205)), int(rng.integers(15, 85)), int(rng.integers(20, 80))
        parts.append((f"espeak-{voice}", *espeak.speak(sentence(rng), voice, rate, pitch, span)))
    return parts


def _foreign_batch(job: tuple[int, int]) -> list[tuple[str, np.ndarray, list[Phone]]]:
    seed, count = job
    return foreign_speech(seed, count, VARIANTS)


def foreign_speech(
    seed: int, count: int, variants: Sequence[str]
) -> list[tuple[str, np.ndarray, list[Phone]]]:
    """`count` sentences of eSpeak NG, in turn in each of LANGUAGES, by voices of `variants`."""
    rng = np.random.default_rng((seed, 3))
    espeak = Espeak()
    parts = []
    for number in range(count):
        language = LANGUAGES[number % len(LANGUAGES)]
        voice = f"{language}+{rng.choice(variants)}"
        rate, pitch, span = int(rng.integers(120, 205)), int(rng.integers(15, 85)), int(rng.integers(20, 80))
        text = foreign_sentence(rng, language)
        parts.append((f"espeak-{voice}", *espeak.speak(text, voice, rate, pitch, span, FOREIGN_PHONES)))
    return parts


def synthesise(utterances: int, seed: int, workers: int, batch: int = 40, foreign: float = 0.0) -> SpeechSet:
    """`utterances` sentences, half by flite and half by eSpeak NG, and a share `foreign` of more in French
    and German.

    The result depends only on `seed`, not on the number of workers.
    """
    jobs = [(seed * 100003 + number, batch) for number in range(max(1, utterances // (2 * batch)))]
    others = [(seed * 100003 + number, batch) for number in range(round(foreign * utterances / batch))]
    parts = []
    with ProcessPoolExecutor(workers, get_context("spawn"), max_tasks_per_child=1) as pool:
        for result in (
            *pool.map(_flite_batch, jobs),
            *pool.map(_espeak_batch, jobs),
            *pool.map(_foreign_batch, others),
        ):
            parts += result
    return SpeechSet.of(parts)
