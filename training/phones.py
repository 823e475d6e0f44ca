"""Turns timed phones into mouth shapes: targets for each ARPABET phone, blended by dominance.

Every phone pulls ten articulators towards its targets, each with its own strength. The pull is constant
inside the core of the phone and decays around it: slowly for rounding (which is anticipated), fast for lip
closure. The shape at a moment is the mean of all targets, weighted by their pulls (Cohen and Massaro 1993).
The targets were set by eye for this project.

Shapes: S phones, T moments, A articulators.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

FPS = 25
ARTICULATORS = ("jaw", "close", "wide", "round", "funnel", "upper", "lower", "bite", "tongue", "press")
REACH = (0.042, 0.022, 0.055, 0.080, 0.065, 0.040, 0.040, 0.026, 0.028, 0.026)  # seconds
SILENCE = "SIL"

# phone: (targets, strengths); an articulator that is not listed has target 0 and strength 0.35
_TARGETS: dict[str, tuple[dict[str, float], dict[str, float]]] = {
    SILENCE: ({}, {"jaw": 1.2, "close": 0.3, "round": 0.5, "wide": 0.5}),
    "AA": ({"jaw": 0.58, "lower": 0.12}, {"jaw": 1.0}),
    "AE": ({"jaw": 0.50, "wide": 0.35, "lower": 0.18, "upper": 0.08}, {"jaw": 1.0, "wide": 0.7}),
    "AH": ({"jaw": 0.34}, {"jaw": 0.7}),
    "AO": ({"jaw": 0.46, "funnel": 0.40, "round": 0.12}, {"jaw": 1.0, "funnel": 0.9}),
    "EH": ({"jaw": 0.38, "wide": 0.28, "lower": 0.14}, {"jaw": 0.9, "wide": 0.7}),
    "ER": ({"jaw": 0.20, "round": 0.22, "funnel": 0.28}, {"jaw": 0.8, "round": 0.7, "funnel": 0.7}),
    "IH": ({"jaw": 0.21, "wide": 0.28, "lower": 0.06}, {"jaw": 0.6, "wide": 0.6}),
    "IY": ({"jaw": 0.14, "wide": 0.58, "lower": 0.16, "upper": 0.06}, {"jaw": 0.8, "wide": 1.0}),
    "UH": ({"jaw": 0.20, "round": 0.45, "funnel": 0.25}, {"jaw": 0.7, "round": 1.2, "funnel": 0.7}),
    "UW": ({"jaw": 0.14, "round": 0.9, "funnel": 0.25}, {"jaw": 0.8, "round": 2.2, "funnel": 0.8}),
    "B": ({"jaw": 0.06, "close": 1.0, "press": 0.5}, {"jaw": 0.6, "close": 6.0, "press": 3.0}),
    "F": ({"jaw": 0.08, "bite": 0.9, "upper": 0.12}, {"jaw": 1.0, "bite": 4.0, "lower": 1.5}),
    "TH": ({"jaw": 0.17, "tongue": 0.5, "lower": 0.12}, {"jaw": 0.8, "tongue": 2.0}),
    "T": ({"jaw": 0.11, "wide": 0.12, "lower": 0.14}, {"jaw": 0.7, "lower": 0.5}),
    "S": (
        {"jaw": 0.05, "wide": 0.22, "lower": 0.28, "upper": 0.16},
        {"jaw": 1.5, "lower": 1.0, "upper": 1.0},
    ),
    "L": ({"jaw": 0.22, "tongue": 0.12, "lower": 0.10}, {"jaw": 0.5}),
    "SH": (
        {"jaw": 0.07, "funnel": 0.62, "round": 0.16, "lower": 0.22, "upper": 0.2},
        {"jaw": 1.4, "funnel": 1.4, "lower": 0.8, "upper": 0.8},
    ),
    "R": ({"jaw": 0.13, "round": 0.34, "funnel": 0.28}, {"jaw": 0.6, "round": 0.8, "funnel": 0.7}),
    "W": ({"jaw": 0.07, "round": 1.0, "funnel": 0.05}, {"jaw": 1.0, "round": 2.6}),
    "Y": ({"jaw": 0.12, "wide": 0.36}, {"jaw": 0.6, "wide": 0.7}),
    "K": ({"jaw": 0.19}, {"jaw": 0.4}),
    "HH": ({"jaw": 0.24}, {"jaw": 0.25}),
}  # fmt: skip
_ALIKE = {
    "P": "B", "M": "B", "V": "F", "DH": "TH", "D": "T", "N": "T", "Z": "S", "ZH": "SH", "CH": "SH",
    "JH": "SH", "G": "K", "NG": "K", "AX": "AH", "DX": "T", "AXR": "ER",
}  # fmt: skip
_GLIDES = {"AW": ("AA", "UH"), "AY": ("AA", "IH"), "OY": ("AO", "IH"), "EY": ("EH", "IY"), "OW": ("AO", "UW")}
VOWELS = frozenset({"AA", "AE", "AH", "AO", "EH", "ER", "IH", "IY", "UH", "UW", *_GLIDES})
PHONES = (SILENCE, *sorted(({*_TARGETS, *_ALIKE, *_GLIDES}) - {SILENCE, "AX", "DX", "AXR"}))


@dataclass(frozen=True)
class Phone:
    """One phone of an utterance; times in seconds."""

    name: str
    start: float
    end: float


def canonical(name: str) -> str:
    """The phone in `PHONES` for an ARPABET name in any case, with or without a stress digit.

    Raises KeyError for an unknown name.
    """
    plain = name.upper().rstrip("012")
    if plain in ("PAU", "SIL", "SP", "H#", "+SPN+", "+NSN+", "<S>", "</S>"):
        return SILENCE
    plain = {"AX": "AH", "DX": "T", "AXR": "ER"}.get(plain, plain)
    if plain not in PHONES:
        raise KeyError(f"{name!r} is not an ARPABET phone")
    return plain


def _tables() -> tuple[dict[str, int], np.ndarray, np.ndarray]:
    rows = {name: row for row, name in enumerate(_TARGETS)}
    targets = np.zeros((len(rows), len(ARTICULATORS)))
    strengths = np.full_like(targets, 0.35)
    for name, row in rows.items():
        for table, values in zip((targets, strengths), _TARGETS[name], strict=True):
            for articulator, value in values.items():
                table[row, ARTICULATORS.index(articulator)] = value
    return rows, targets, strengths


def articulate(phones: list[Phone], times: np.ndarray) -> np.ndarray:
    """Articulators (T, A) at `times` (T,) in seconds; outside the phones is silence."""
    rows, targets, strengths = _tables()
    pieces = [(SILENCE, -10.0, phones[0].start if phones else 1e9)]
    for phone in phones:
        name = canonical(phone.name)
        if phone.start > pieces[-1][2]:
            pieces.append((SILENCE, pieces[-1][2], phone.start))
        if name in _GLIDES:
            middle = phone.start + 0.55 * (phone.end - phone.start)
            first, second = _GLIDES[name]
            pieces += [(first, phone.start, middle), (second, middle, phone.end)]
        else:
            pieces.append((_ALIKE.get(name, name), phone.start, phone.end))
    pieces.append((SILENCE, phones[-1].end if phones else 1e9, 1e10))
    index = np.array([rows[name] for name, _, _ in pieces])
    start = np.array([begin for _, begin, _ in pieces])
    end = np.array([stop for _, _, stop in pieces])
    inset = np.minimum(0.25 * (end - start), 0.05)
    core_start, core_end = start + inset, end - inset
    vowel = np.isin([name for name, _, _ in pieces], sorted(VOWELS))
    effort = np.where(vowel, np.clip(0.72 + 2.2 * (end - start), 0.75, 1.15), 1.0)
    reach = np.array(REACH)
    result = np.empty((len(times), len(ARTICULATORS)))
    for begin in range(0, len(times), 64):
        moment = times[begin : begin + 64, None]
        near = (end > moment.min() - 0.6) & (start < moment.max() + 0.6)
        away = np.maximum(np.maximum(core_start[near] - moment, moment - core_end[near]), 0)
        pull = strengths[index[near]] * np.exp(-away[..., None] / reach)
        weighted = targets[index[near]] * effort[near][:, None]
        result[begin : begin + 64] = (pull * weighted).sum(1) / pull.sum(1)
    return result


def frame_times(frames: int) -> np.ndarray:
    """Audio time in seconds of each video frame: frame 0 is the portrait, frame f the middle of row f-1."""
    return (np.arange(frames) - 0.5) / FPS


def frame_phones(phones: list[Phone], frames: int) -> np.ndarray:
    """Index in `PHONES` of the phone in the middle of each video frame's 40 ms: (frames,) int64."""
    labels = np.zeros(frames, np.int64)
    for phone in phones:
        first, last = np.searchsorted(frame_times(frames), (phone.start, phone.end))
        labels[first:last] = PHONES.index(canonical(phone.name))
    return labels


def smooth_articulate(phones: list[Phone], frames: int, oversample: int = 4) -> np.ndarray:
    """Articulators (frames, A) at the video frames: `articulate` on a finer grid, then a short low-pass."""
    fine = (np.arange(-4 * oversample, (frames + 4) * oversample) / oversample - 0.5) / FPS
    values = articulate(phones, fine)
    kernel = np.exp(-0.5 * np.square(np.arange(-3, 4) / 1.3))
    kernel /= kernel.sum()
    for column in range(values.shape[1]):
        values[:, column] = np.convolve(values[:, column], kernel, "same")
    return values[4 * oversample : (frames + 4) * oversample : oversample]


def mouth_coefficients(shape: np.ndarray, names: list[str], smile: np.ndarray | float = 0.0) -> np.ndarray:
    """ARKit coefficients (T, 52) in the order `names`, from articulators (T, A).

    smile: 0..1, one value or (T,), added to the speech.
    """
    value = dict(zip(ARTICULATORS, shape.T, strict=True))
    rounded = np.clip(value["round"] + value["funnel"], 0, 1)
    grin = smile * (1 - 0.65 * rounded)
    both = {
        "mouthPress": 0.35 * value["press"],
        "mouthStretch": 0.5 * value["wide"],
        "mouthSmile": 0.22 * value["wide"] + 0.62 * grin,
        "mouthDimple": 0.25 * grin,
        "cheekSquint": 0.35 * grin,
        "mouthUpperUp": 0.8 * value["upper"] + 0.1 * value["bite"],
        "mouthLowerDown": 0.9 * value["lower"],
    }
    single = {
        "jawOpen": 1.35 * value["jaw"],
        "mouthClose": 1.35 * value["close"] * value["jaw"],
        "mouthRollLower": 0.22 * value["close"] + 0.7 * value["bite"],
        "mouthRollUpper": 0.18 * value["close"],
        "mouthShrugLower": 0.25 * value["bite"],
        "mouthPucker": 1.05 * value["round"],
        "mouthFunnel": 0.95 * value["funnel"],
        "tongueOut": value["tongue"],
    }
    coefficients = np.zeros((len(shape), len(names)), np.float32)
    for name, track in single.items():
        coefficients[:, names.index(name)] = track
    for name, track in both.items():
        for side in ("Left", "Right"):
            coefficients[:, names.index(name + side)] = track
    return coefficients
