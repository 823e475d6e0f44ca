"""A live session on the nano checkpoint that is saved, and one that goes on from it in a process of its own.

`python live_process.py CHECKPOINT FOLDER` continues FOLDER/state and writes its frames to FOLDER/shown.npz.
"""

from __future__ import annotations

import sys
import threading
from functools import partial
from pathlib import Path

import numpy as np

from engine import causal_pipeline, portrait, voice
from omniavatar import AvatarPipeline
from omniavatar.live import LiveSession, LiveStage
from omniavatar.live.maker import BlockMaker
from omniavatar.live.makers import maker_of

RATE = 24000
Shown = dict[int, np.ndarray]
"""Frames by their number on the session's clock."""


def take(session: LiveSession, until_s: float = float("inf")) -> Shown:
    """Frames until a time on the session's clock, or its end."""
    shown: Shown = {}
    for chunk in session:
        first = round(chunk.time * session.exact_fps)
        shown |= {first + at: frame for at, frame in enumerate(chunk.frames)}
        if chunk.time >= until_s:
            break
    return shown


def say_the_rest(session: LiveSession) -> None:
    session.push_audio(voice(1.0, seed=1).samples, 16000)
    session.end()


def maker(pipeline: AvatarPipeline) -> BlockMaker:
    return maker_of(pipeline, portrait(), "a person speaks", 1)


def not_stopped(checkpoint: Path, folder: Path) -> Shown:
    """Frames of a session that goes on after it was saved to FOLDER/state."""
    stage = LiveStage()
    with (
        causal_pipeline(checkpoint, folder) as pipeline,
        LiveSession.on(stage, lambda: maker(pipeline), RATE) as session,
    ):
        session.push_audio(voice(0.5).samples, 16000)
        session.end_speech()
        shown = take(session, 1.0)

        def between_two_blocks() -> None:
            session.save(folder / "state")
            say_the_rest(session)

        stage.call(between_two_blocks).result()
        return shown | take(session)


def gone_on(checkpoint: Path, folder: Path) -> Shown:
    """Frames of a session that continues FOLDER/state, and hears the rest before its first block."""
    stage, pushed = LiveStage(), threading.Event()
    with causal_pipeline(checkpoint, folder) as pipeline:

        def build() -> BlockMaker:
            stage.call(partial(pushed.wait, 60.0))  # runs after the opening, before a block
            return maker(pipeline)

        with LiveSession.on(stage, build, RATE, folder / "state") as session:
            say_the_rest(session)
            pushed.set()
            return take(session)


if __name__ == "__main__":
    shown = gone_on(Path(sys.argv[1]), Path(sys.argv[2]))
    np.savez(Path(sys.argv[2]) / "shown.npz", **{str(number): frame for number, frame in shown.items()})
