"""Chunks: which frames they show, which sound they hear, and the noise levels of distilled steps."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from omniavatar.encoders.chunk_audio import chunk_sound
from omniavatar.sampling.chunks import ChunkRule, chunk_windows, plan_chunks
from omniavatar.sampling.denoise import denoise, noises_drawn
from omniavatar.sampling.samplers import bridge_step
from omniavatar.sampling.schedule import Schedule, distilled_schedule

RULE = ChunkRule()


@pytest.mark.parametrize(("frames", "chunks", "last"), [(1, 1, 1), (28, 1, 28), (29, 2, 1), (7500, 268, 24)])
def test_every_frame_is_shown_once(frames: int, chunks: int, last: int) -> None:
    windows = plan_chunks(frames, RULE)
    assert len(windows) == chunks and windows[-1].new_frames == last
    assert [window.first_new_frame for window in windows] == [28 * index for index in range(chunks)]
    assert [window.given_latents for window in windows] == [1, *[2] * (chunks - 1)]
    assert all(window.skipped_frames == 5 and window.latent_frames == 9 for window in windows)


def test_a_chunk_hears_the_eight_seconds_that_end_with_it() -> None:
    wave = np.arange(1, 200_001, dtype=np.float32)
    first, later = chunk_sound(wave, 0, RULE), chunk_sound(wave, 9, RULE)
    assert len(first) == len(later) == 128_000
    assert not first[:-17_920].any() and first[-1] == 17_920
    assert later[0] == 10 * 17_920 - 128_000 + 1 and later[-1] == 10 * 17_920
    beyond = chunk_sound(wave, 11, RULE)
    assert beyond[-1] == 0 and 200_000 in beyond


def test_only_the_last_two_frames_hear_the_last_row_twice() -> None:
    heard = chunk_windows(RULE)
    assert heard[0] == [0, 1, 2, 3, 4] and heard[30] == [30, 31, 32, 33, 34]
    assert heard[31] == [31, 32, 33, 34, 34] and heard[32] == [32, 33, 34, 34, 34]


def test_one_step_of_the_bridge_needs_no_noise() -> None:
    """It starts from the given latents and the portrait's, and goes a thousandth beyond level 0."""
    given, portrait = torch.full((1, 2, 2, 1, 1), 5.0), torch.arange(10.0).view(1, 2, 5, 1, 1)
    seen: list[torch.Tensor] = []

    def velocity(sample: torch.Tensor, step: int) -> torch.Tensor:
        seen.append(sample.clone())
        return torch.ones_like(sample)

    def no_noise() -> torch.Tensor:
        raise AssertionError("one step draws no noise")

    schedule = distilled_schedule(1, 5.0, whole=True)
    out = denoise(velocity, schedule, given, no_noise, "bridge", portrait=portrait)
    assert torch.equal(seen[0][:, :, 2:], portrait[:, :, 2:]) and torch.equal(seen[0][:, :, :2], given)
    assert torch.allclose(out[:, :, 2:], portrait[:, :, 2:] - 1.001) and torch.equal(out[:, :, :2], given)
    assert noises_drawn(schedule, "bridge") == 0
    assert noises_drawn(distilled_schedule(4, 5.0, whole=True), "bridge") == 3


def test_the_bridge_adds_the_noise_of_its_level() -> None:
    zero, one = torch.zeros(1), torch.ones(1)
    moved = bridge_step(zero, zero, 1.0, 0.5, one)
    assert float(moved) == pytest.approx((0.5 * 0.501 / 1.001) ** 0.5)
    assert float(bridge_step(zero, one, 0.5, 0.0, None)) == pytest.approx(-0.501)


def test_distilled_levels() -> None:
    assert distilled_schedule(4, 5.0, whole=False).timesteps == pytest.approx((1000, 937.5, 833.3333, 625))
    assert distilled_schedule(2, 5.0, whole=False) == Schedule((1.0, 5 / 6))
    spread, whole = (distilled_schedule(3, 5.0, whole=flag).timesteps for flag in (False, True))
    assert spread[1] != whole[1] == pytest.approx(833.3333)
