"""Makes videos of the test clips by the path of a live session: sound is pushed, blocks are made one by one.

The maker of a live session gets the sound just when it asks for it, without the session's clock, so no frame
is dropped on a slow machine. A live session does not show the portrait; it is put before the first frame, so
that frame f of a video is frame f of its film.

Files: `made/live/NAME.mp4`, and `made/live.json` with the frames a second of all blocks.
"""

from __future__ import annotations

import json
import time
import wave
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np
from PIL import Image

from benchmarks.pocket.generate import WARNINGS
from benchmarks.pocket.material import Clip
from benchmarks.pocket.video_files import write_video
from omniavatar import AvatarPipeline
from omniavatar.live.maker import BlockMaker
from omniavatar.live.makers import maker_of

NAME = "live"


def read_sound(path: Path) -> np.ndarray:
    """Samples (n,) float32 of a 16-bit mono file."""
    with wave.open(str(path)) as file:
        return np.frombuffer(file.readframes(file.getnframes()), np.int16).astype(np.float32) / 32768


def spoken(maker: BlockMaker, sound: np.ndarray, frames: int) -> Iterator[np.ndarray]:
    """The first `frames` frames (n, H, W, 3) of a session that hears `sound`, then silence."""
    heard = made = 0
    while made < frames:
        wanted = maker.missing
        piece = sound[heard : heard + wanted]
        maker.push(np.pad(piece, (0, wanted - len(piece))))
        heard += wanted
        for part in maker.make(lambda: False):
            yield part[: frames - made]
            made += len(part)
            if made >= frames:
                break


def make_clip(pipeline: AvatarPipeline, folder: Path, clip: Clip) -> tuple[int, float]:
    """Frames of a clip and the seconds that they took. A video that exists is kept."""
    inputs, video = folder / "inputs", folder / "made" / NAME / f"{clip.name}.mp4"
    if video.exists():
        return 0, 0.0
    portrait = inputs / f"{clip.name}.png"
    maker = maker_of(pipeline, portrait, clip.prompt, None)
    try:
        first = np.asarray(Image.open(portrait).convert("RGB"))[None]
        began = time.perf_counter()
        parts = spoken(maker, read_sound(inputs / f"{clip.name}.wav"), len(clip.opening) - 1)
        frames = np.concatenate([first, *parts])
        seconds = time.perf_counter() - began
    finally:
        maker.close()
    write_video(video, frames)
    video.with_suffix(WARNINGS).write_text("[]\n")
    return len(frames) - 1, seconds


def _work(config: Path, folder: Path, clips: list[Clip], threads: int | None) -> tuple[int, float]:
    changes = {} if threads is None else {"threads": threads}
    frames, seconds = 0, 0.0
    with AvatarPipeline.from_config(config, changes) as pipeline:
        for clip in clips:
            made, taken = make_clip(pipeline, folder, clip)
            print(f"{NAME} {clip.name}: {made} frames in {taken:.1f} s", flush=True)
            frames, seconds = frames + made, seconds + taken
    return frames, seconds


def generate(config: Path, folder: Path, clips: list[Clip], workers: int) -> None:
    """Make all clips. workers: processes; several have one thread each."""
    longest_first = sorted(clips, key=lambda clip: -len(clip.opening))
    parts = [longest_first[part::workers] for part in range(min(workers, len(clips)))]
    if workers == 1:
        done = [_work(config, folder, longest_first, None)]
    else:
        with ProcessPoolExecutor(workers, get_context("spawn")) as pool:
            waiting = [pool.submit(_work, config, folder, part, 1) for part in parts]
            done = [each.result() for each in waiting]
    frames, seconds = (sum(column) for column in zip(*done, strict=True))
    if frames:
        rate = {"frames": frames, "frames_a_second": frames / seconds, "workers": workers}
        (folder / "made" / f"{NAME}.json").write_text(json.dumps(rate) + "\n")
        print(json.dumps(rate), flush=True)
