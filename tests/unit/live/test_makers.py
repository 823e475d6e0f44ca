"""Live blocks of real models, at nano size."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import live_process
from engine import causal_pipeline, head_pipeline, make_pipeline, portrait, voice
from omniavatar import AvatarPipeline
from omniavatar.errors import ResumeError
from omniavatar.live import LiveSession
from omniavatar.live.maker import BlockMaker
from omniavatar.live.makers import maker_of, stage_of
from omniavatar.live.session import LiveChunk


def frames_of(maker: BlockMaker, sound: np.ndarray, blocks: int) -> list[np.ndarray]:
    """`blocks` blocks, pushed as they need it."""
    made = []
    for _ in range(blocks):
        count = maker.missing
        maker.push(sound[:count])
        sound = sound[count:]
        expected = maker.frames
        frames = np.concatenate(list(maker.make(lambda: False)))
        assert len(frames) == expected and frames.dtype == np.uint8 and frames.shape[1:3] == maker.size
        made.append(frames)
    return made


@pytest.fixture(
    scope="module",
    params=[causal_pipeline, make_pipeline, head_pipeline],
    ids=["causal", "windows", "chunks"],
)
def pipeline(
    nano_checkpoint: Path,
    heads_checkpoint: Path,
    tmp_path_factory: pytest.TempPathFactory,
    request: pytest.FixtureRequest,
) -> AvatarPipeline:
    checkpoint = heads_checkpoint if request.param is head_pipeline else nano_checkpoint
    return request.param(checkpoint, tmp_path_factory.mktemp("cache"))


def test_a_saved_maker_continues_with_the_same_bits(pipeline: AvatarPipeline) -> None:
    sound = voice(6.0).samples
    whole = maker_of(pipeline, portrait(), "a person speaks", 1)
    first = frames_of(whole, sound, 2)
    needed = sum(len(block) for block in first)
    state = {name: value.clone() for name, value in whole.state().items()}
    rest = frames_of(whole, sound[::-1], 2)
    resumed = maker_of(pipeline, portrait(), "a person speaks", 1)
    resumed.restore(state)
    again = frames_of(resumed, sound[::-1], 2)
    assert needed > 0 and all(np.array_equal(a, b) for a, b in zip(rest, again, strict=True))
    assert not np.array_equal(rest[0], rest[1])
    other = maker_of(pipeline, portrait(), "a person speaks", 2)
    with pytest.raises(ResumeError, match="seed"):
        other.restore(state)


def test_a_session_of_a_pipeline(pipeline: AvatarPipeline) -> None:
    with LiveSession(pipeline, image=portrait(), prompt="a person speaks", rate=16000) as session:
        session.push_audio(voice(0.5).samples, 16000)
        session.end()
        chunks: list[LiveChunk] = list(session)
    assert chunks[0].frames.shape[1:] == (*pipeline.config.video.sizes[0], 3)
    assert np.abs(np.concatenate([chunk.audio for chunk in chunks])).max() > 100
    assert session.stats().dropped == 0


def test_a_closed_pipeline_ends_its_sessions(nano_checkpoint: Path, tmp_path: Path) -> None:
    pipeline = causal_pipeline(nano_checkpoint, tmp_path)
    with LiveSession(pipeline, image=portrait(), prompt="a person speaks", rate=16000) as session:
        stage = stage_of(pipeline)
        assert stage is stage_of(pipeline) and stage.sessions == 1
        pipeline.close()
        assert stage.sessions == 0
        for _ in session:
            pass


def test_a_saved_session_goes_on_with_the_same_frames_in_another_process(
    nano_checkpoint: Path, tmp_path: Path
) -> None:
    """As if it had not been stopped: speech, silence, then speech again."""
    expected = live_process.not_stopped(nano_checkpoint, tmp_path)
    command = [sys.executable, live_process.__file__, str(nano_checkpoint), str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run(command, check=True, env=environment, timeout=300)
    with np.load(tmp_path / "shown.npz") as shown:
        resumed = {int(number): shown[number] for number in shown.files}
    assert len(resumed) >= 16 and min(resumed) > min(expected) + 12 and max(resumed) == max(expected)
    common = sorted(set(resumed) & set(expected))
    assert len(common) >= 16
    assert all(np.array_equal(resumed[number], expected[number]) for number in common)
    assert not np.array_equal(expected[common[0]], expected[common[-1]])
