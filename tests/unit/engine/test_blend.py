"""blend_frames: a window begins as the picture shown last, and the model's own frames are untouched."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from engine import head_pipeline, interrupt_in, make_pipeline, portrait, request, voice
from omniavatar import AvatarPipeline
from omniavatar.config.load import load_config
from omniavatar.engine.blend import SeamBlend, bytes_of, to_unit
from omniavatar.errors import ConfigError, ResumeError
from omniavatar.live.makers import maker_of

SECONDS = 1.0


def still(count: int, level: float) -> torch.Tensor:
    return torch.full((1, 3, count, 16, 16), level)


def test_a_picture_that_stands_still_goes_over_evenly() -> None:
    """Frames 2 to 4 are new; the frame before them was shown darker."""
    pixels = torch.cat([still(2, 0.5), still(4, 0.501)], 2)
    SeamBlend(still(1, 0.46), 2, 3).apply(pixels, 0)
    gate = torch.exp(torch.tensor(-((0.001 * 255) ** 2))).item()
    difference = 0.46 - 0.5 - gate * 0.001
    expected = [0.5, 0.5, *(0.501 + weight * difference for weight in (0.75, 0.5, 0.25)), 0.501]
    assert pixels[0, 0, :, 8, 8].tolist() == pytest.approx(expected, abs=1e-6)


def test_what_moves_keeps_its_motion() -> None:
    """Only the difference of the frame that both windows have is added."""
    pixels = torch.cat([still(1, 0.2), still(2, 0.8)], 2)
    SeamBlend(still(1, 0.21), 1, 1).apply(pixels, 0)
    assert pixels[0, 0, :, 8, 8].tolist() == pytest.approx([0.2, 0.805, 0.8], abs=1e-6)


@pytest.mark.parametrize("cuts", [(1, 4, 4), (5, 4), (1, 8), (9,)])
def test_pieces_change_nothing(cuts: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(1)
    pixels = torch.rand((1, 3, 9, 16, 16), generator=generator)
    shown = torch.rand((1, 3, 1, 16, 16), generator=generator)
    whole, original = pixels.clone(), pixels.clone()
    SeamBlend(shown, 5, 3).apply(whole, 0)
    blend, done = SeamBlend(shown, 5, 3), 0
    for piece in pixels.split(cuts, dim=2):
        blend.apply(piece, done)
        done += piece.shape[2]
    assert torch.equal(pixels, whole)
    assert torch.equal(whole[:, :, :5], original[:, :, :5]) and torch.equal(
        whole[:, :, 8:], original[:, :, 8:]
    )
    assert not torch.equal(whole[:, :, 5:8], original[:, :, 5:8])


def test_bytes_survive_a_file() -> None:
    levels = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(bytes_of(to_unit(levels, torch.device("cpu"))), levels)


@pytest.fixture(scope="module")
def blended(nano_checkpoint, cache) -> AvatarPipeline:
    return make_pipeline(nano_checkpoint, cache, blend_frames=3, num_steps=1)


def windows(pipeline: AvatarPipeline) -> list:
    with pipeline.prepare(request(SECONDS)) as ready:
        return list(pipeline.windows(ready))


def test_only_shown_frames_change(blended, nano_checkpoint, cache) -> None:
    """Three at the start of each window after the first; what is handed over is the same."""
    plain = windows(make_pipeline(nano_checkpoint, cache, num_steps=1))
    for number, (one, other) in enumerate(zip(windows(blended), plain, strict=True)):
        a, b = np.concatenate(one.frames), np.concatenate(other.frames)
        assert torch.equal(one.latent, other.latent)
        assert (one.next_given is None) == (other.next_given is None) == (one.shown is None)
        if one.next_given is not None:
            assert torch.equal(one.next_given, other.next_given)
            assert np.array_equal(one.shown.last[0, :, 0].permute(1, 2, 0).numpy(), a[-1])
        changed = [not np.array_equal(x, y) for x, y in zip(a, b, strict=True)]
        assert changed == [number > 0 and frame < 3 for frame in range(len(a))]
        assert other.shown is None


def test_a_resumed_run_blends_with_the_stored_frame(blended, tmp_path: Path) -> None:
    interrupt_in(2, blended, request(SECONDS), tmp_path / "out.mp4")
    assert blended.generate(request(SECONDS), tmp_path / "out.mp4").resumed_windows == 2
    blended.generate(request(SECONDS), tmp_path / "whole.mp4")
    assert (tmp_path / "out.mp4").read_bytes() == (tmp_path / "whole.mp4").read_bytes()


def test_a_hand_over_without_the_frame_is_refused(tmp_path: Path) -> None:
    import safetensors.torch

    from omniavatar.engine.handover import load_shown

    path = tmp_path / "given_00001.safetensors"
    safetensors.torch.save_file({"given": torch.zeros(1)}, path)
    with pytest.raises(ResumeError, match="no last frame of 64x32 pixels; use --no-resume"):
        load_shown(path, (32, 64), True, False)


def test_live_chunks_are_blended_alike(heads_checkpoint, cache) -> None:
    """Also after a session was saved and restored."""
    pipeline = head_pipeline(heads_checkpoint, cache, blend_frames=4, num_steps=1)
    seconds = 28 / 25 * 3
    chunks = [chunk.frames for chunk in pipeline.stream(request(seconds, prompt=""))]
    maker, sound = maker_of(pipeline, portrait(), "", None), voice(seconds).samples
    for number, chunk in enumerate(chunks):
        count = maker.missing
        maker.push(sound[:count])
        sound = sound[count:]
        assert np.array_equal(np.concatenate(list(maker.make(lambda: False))), chunk)
        if number == 0:
            state = maker.state()
            maker = maker_of(pipeline, portrait(), "", None)
            maker.restore(state)


def test_blocks_refuse_it() -> None:
    with pytest.raises(ConfigError, match="leave blend_frames out"):
        load_config(Path("configs/livetalk.yaml"), ["blend_frames=4"])
