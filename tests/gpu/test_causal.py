"""Block-causal videos on CUDA: captured passes, no wait inside a block, resumed byte for byte."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from engine import causal_pipeline, portrait, request
from omniavatar.engine.events import StepFinished
from omniavatar.engine.recorder import RunRecorder
from omniavatar.sampling.causal import CausalWindow

pytestmark = pytest.mark.gpu


def pipeline(nano_checkpoint, cache, **changes):
    return causal_pipeline(nano_checkpoint, cache, **{"device": "cuda", "dtype": "bf16", **changes})


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("text-cache")


@pytest.mark.parametrize("quantize", ["none", "fp8"])
def test_captured_passes_make_the_same_video(nano_checkpoint, cache, quantize):
    asked = request(12.0)
    plain, graphed = (
        np.concatenate([chunk.frames for chunk in made.stream(asked)])
        for made in (
            pipeline(nano_checkpoint, cache, quantize=quantize, cuda_graphs=graphs)
            for graphs in (False, True)
        )
    )
    assert np.array_equal(plain, graphed)


def test_videos_of_one_pipeline_use_the_memory_of_earlier_captures(nano_checkpoint, cache):
    made, asked, films, held = pipeline(nano_checkpoint, cache, cuda_graphs=True), request(8.0), [], []
    for _ in range(4):
        films.append(np.concatenate([chunk.frames for chunk in made.stream(asked)]))
        torch.cuda.synchronize()
        held.append((torch.cuda.memory_allocated(), torch.cuda.memory_reserved()))
    assert all(np.array_equal(film, films[0]) for film in films)
    assert held[1] == held[2] == held[3]


def test_a_block_is_queued_without_a_synchronising_call(nano_checkpoint, cache):
    """Blocks whose passes are captured; earlier ones compile kernels and allocate memory."""
    made = pipeline(nano_checkpoint, cache, cuda_graphs=True).begin_video(portrait(), "a person speaks")
    window: CausalWindow = made.window
    rows = torch.zeros(1, made.frames_of(1), made.audio_width, device="cuda")
    made.frames(made.make(rows[:, : made.frames_of(0)]))
    for _ in range(window.slots + 4 * (window.rolling + 1)):
        made.frames(made.make(rows))
    made.arrived()()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):
            made.frames(made.make(rows))
            finish = made.arrived()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    finish()


def test_an_interrupted_video_is_resumed_byte_for_byte(nano_checkpoint, cache, tmp_path):
    def interrupt(event: object) -> None:
        if isinstance(event, StepFinished) and event.window == 22:
            raise KeyboardInterrupt

    whole = pipeline(nano_checkpoint, cache)
    whole.generate(request(12.0), tmp_path / "whole.mp4")
    stopped = pipeline(nano_checkpoint, cache)
    with pytest.raises(KeyboardInterrupt):
        type(stopped)(stopped.config, RunRecorder([interrupt])).generate(request(12.0), tmp_path / "out.mp4")
    result = stopped.generate(request(12.0), tmp_path / "out.mp4")
    assert result.resumed_windows > 15
    assert (tmp_path / "out.mp4").read_bytes() == (tmp_path / "whole.mp4").read_bytes()


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("changes", [{}, {"quantize": "fp8", "decoder": "taehv"}], ids=["full", "fp8-taehv"])
def test_a_vae_on_another_gpu_makes_the_same_video(nano_checkpoint, cache, tmp_path, changes):
    """Also as a file, whose frames come from the other GPU while the next block is computed."""
    asked, before = request(12.0), torch.cuda.memory_allocated(1)
    one, two = (pipeline(nano_checkpoint, cache, vae_device=device, **changes) for device in (None, "cuda:1"))
    films = [np.concatenate([chunk.frames for chunk in made.stream(asked)]) for made in (one, two)]
    assert np.array_equal(*films)
    assert torch.cuda.memory_allocated(1) > before, "its weights must lie on the other GPU"
    names = ("one", "two")
    for made, name in zip((one, two), names, strict=True):
        made.generate(asked, tmp_path / f"{name}.mp4")
    written = [(tmp_path / f"{name}.mp4").read_bytes() for name in names]
    assert written[0] == written[1]
    two.close()
    del films
    torch.cuda.synchronize(1)
    assert torch.cuda.memory_allocated(1) <= before + 2**20
