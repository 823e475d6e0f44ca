"""Frame differences where speech begins in a live session, against those of silence, speech and blocks.

    python -m benchmarks live_onset [--config pocket-live] [--times 8] [--silence 5] [--talk 3]

A session hears silence and speech in turn; speech is pushed in pieces of 20 ms, as a microphone does. Its
player runs on a clock that waits for every block, so a slow machine changes nothing.
A frame difference is the mean over pixels and colours of |frame - frame before|, in grey levels of 255.
`where speech begins`: the largest of the frames from 2 before the first one that has speech (the look-ahead
of its features) to 4 after it. Silence and speech have a row for the largest of as many frames too.
Prints the table, then one line of JSON.
"""

from __future__ import annotations

import statistics
import tempfile
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from benchmarks.shared.options import add_config, make_parser
from benchmarks.shared.report import print_result, print_table
from benchmarks.shared.timing import quantile
from omniavatar import AvatarPipeline
from omniavatar.assets import SPEECH, pocket
from omniavatar.config.load import load_config
from omniavatar.live.chunk import LiveChunk
from omniavatar.live.maker import MODEL_RATE, BlockMaker
from omniavatar.live.makers import maker_of
from omniavatar.live.player import Player
from omniavatar.media.audio import decode_mono

PIECE_S = 0.02
BEFORE, AFTER = 2, 4
"""Frames around the first one that has speech in which a jump would show."""


@dataclass
class Watched:
    """What a session showed. borders: first frames of blocks; spoken: whether each frame has speech."""

    steps: list[float] = field(default_factory=list)
    borders: set[int] = field(default_factory=set)
    spoken: list[bool] = field(default_factory=list)
    newest: np.ndarray | None = None

    def add(self, chunk: LiveChunk) -> None:
        """Measure a chunk's frames."""
        sound = np.array_split(chunk.audio, len(chunk.frames))
        for frame, piece in zip(chunk.frames.astype(np.int16), sound, strict=True):
            if self.newest is not None:
                self.steps.append(float(np.abs(frame - self.newest).mean()))
            self.newest = frame
            self.spoken.append(bool(piece.any()))

    @property
    def onsets(self) -> list[int]:
        """Frames where speech begins after at least a second of silence."""
        return [
            frame
            for frame in range(25, len(self.spoken))
            if self.spoken[frame] and not any(self.spoken[frame - 25 : frame])
        ]

    def largest(self, first: int) -> float:
        """The largest difference of the frames that belong to a change at `first`."""
        return max(self.steps[first - BEFORE - 1 : first + AFTER])


def watch(maker: BlockMaker, sound: np.ndarray) -> Watched:
    """Show what a session with `maker` shows for `sound` (n,) float32, pushed where it is not zero."""
    now = 0.0
    player = Player(maker, threading.Condition(), MODEL_RATE, lambda: now)
    seen, size = Watched(), round(PIECE_S * MODEL_RATE)
    for start in range(0, len(sound), size):
        piece = sound[start : start + size]
        now = (start + len(piece)) / MODEL_RATE
        if piece.any():
            player.push(piece, MODEL_RATE)
        while player.start_at(now) <= now:
            seen.borders.add(player.stats().frames)
            player.perform()
        while isinstance(chunk := player.take(), LiveChunk):
            seen.add(chunk)
    player.close()
    return seen


def speech_and_silence(times: int, silence: float, talk: float) -> np.ndarray:
    """Silence and speech in turn, (n,) float32; each turn has other words, faded in and out over 10 ms."""
    with tempfile.TemporaryDirectory() as folder:
        decode_mono(SPEECH, Path(folder) / "speech", MODEL_RATE, 0.0)
        speech = np.fromfile(Path(folder) / "speech", "<f4")
    length, fade = round(talk * MODEL_RATE), MODEL_RATE // 100
    loud = np.flatnonzero(np.abs(speech) > 0.05)
    pieces = []
    for number in range(times):
        start = int(loud[len(loud) * number // (times + 1)])
        words = np.resize(np.roll(speech, -start), length)
        words[:fade] *= np.linspace(0, 1, fade, dtype=np.float32)
        words[-fade:] *= np.linspace(1, 0, fade, dtype=np.float32)
        pieces += [np.zeros(round(silence * MODEL_RATE), np.float32), words]
    return np.concatenate(pieces)


def kinds(seen: Watched) -> dict[str, list[float]]:
    """Frame differences by what they are of."""
    steps, onsets = seen.steps, seen.onsets
    near = {at for first in onsets for at in range(first - BEFORE, first + AFTER + 1)}
    calm = [at for at in range(1, len(steps) + 1) if at not in near]
    settled = [at for at in calm if at > 25 and len(set(seen.spoken[at - 12 : at + 1])) == 1]
    found = {
        "silence": [steps[at - 1] for at in settled if not seen.spoken[at]],
        "speech": [steps[at - 1] for at in settled if seen.spoken[at]],
        "first frame of a block, silence": [
            steps[at - 1] for at in settled if at in seen.borders and not seen.spoken[at]
        ],
        "first frame of a block, speech": [
            steps[at - 1] for at in settled if at in seen.borders and seen.spoken[at]
        ],
    }
    span = BEFORE + AFTER + 1
    for name, speaking in (("silence", False), ("speech", True)):
        firsts = [at for at in settled[::span] if seen.spoken[at] is speaking and at + AFTER <= len(steps)]
        found[f"{name}, largest of {span}"] = [seen.largest(at) for at in firsts]
    found["where speech begins"] = [seen.largest(at) for at in onsets if at + AFTER <= len(steps)]
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    parser = make_parser(__name__, __doc__)
    add_config(parser, "pocket-live")
    parser.add_argument("--times", type=int, default=8, help="how often speech begins (default: 8)")
    parser.add_argument("--silence", type=float, default=5.0, help="seconds before each (default: 5)")
    parser.add_argument("--talk", type=float, default=3.0, help="seconds of speech (default: 3)")
    options = parser.parse_args(arguments)
    with AvatarPipeline.from_config(load_config(Path(options.config)).config) as pipeline:
        maker = maker_of(pipeline, pocket.PORTRAIT, pocket.PROMPT, None)
        seen = watch(maker, speech_and_silence(options.times, options.silence, options.talk))
        maker.close()
    rows = {
        name: (len(values), statistics.median(values), quantile(values, 0.95), max(values))
        for name, values in kinds(seen).items()
        if values
    }
    print_table(
        ["frame difference, grey levels", "count", "median", "95 %", "largest"],
        [[name, count, *(f"{value:.2f}" for value in rest)] for name, (count, *rest) in rows.items()],
    )
    print_result("live_onset", frames=len(seen.spoken), **vars(options), kinds=rows)


if __name__ == "__main__":
    main()
