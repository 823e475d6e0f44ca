"""Chance in a live performance: the pose is a function of numbers that change slowly."""

import numpy as np
import pytest
import torch
from training.drive import BLINK, SIDEWAYS, SIGNALS, latents_of, mirrored_drive
from training.live_drive import (
    BLINK_ABOVE,
    MOVING,
    SPAN,
    SURE,
    WHITE,
    blinking,
    draw_live_drive,
    follow_live,
    smooth,
)
from training.phones import FPS

from omniavatar.sampling.noise import span_weights

MINUTES = 20
LONG = MINUTES * 60 * FPS + 5
BLINKING = SIGNALS.index("blink")


@pytest.fixture(scope="module")
def drive():
    return draw_live_drive(np.random.default_rng(0), LONG)


@pytest.fixture(scope="module")
def long(drive):
    return follow_live(drive, LONG)


def test_numbers_are_standard_normal_and_slow(drive):
    assert drive.shape == (latents_of(LONG), len(SIGNALS))
    assert drive.mean(0) == pytest.approx(0, abs=0.2) and drive.std(0) == pytest.approx(1, abs=0.15)
    steps = np.diff(drive, axis=0).std(0)
    assert ((steps[WHITE:] > 0.33) & (steps[WHITE:] < 0.47)).all()
    assert steps[BLINKING] == pytest.approx(2**0.5, abs=0.05), "blinks do not follow from one another"


def test_the_pose_at_the_end_of_a_latent_is_its_number(drive, long):
    for name in MOVING:
        numbers = drive[:, SIGNALS.index(name)]
        np.testing.assert_allclose(long[name][12::4], numbers[3:], rtol=1e-6)
        np.testing.assert_allclose(long[name][14::4], (numbers[3:-1] + numbers[4:]) / 2, rtol=1e-5, atol=1e-6)
        assert long[name][0] == 0


def test_only_a_blocks_numbers_and_the_last_one_before_matter(drive):
    frames = 101
    one, two = drive[: latents_of(frames)].copy(), drive[: latents_of(frames)].copy()
    two[:11], two[14:] = 0.3, -0.2
    first, second = follow_live(one, frames), follow_live(two, frames)
    for name in first:
        np.testing.assert_allclose(first[name][45:53], second[name][45:53], err_msg=name)
        assert not np.array_equal(first[name], second[name]) or name == "blink"


def test_blinks_come_as_often_as_people_blink_and_most_shut_the_eyes(long):
    closed = (np.diff((long["blink"] > 0.5).astype(int)) > 0).sum()
    assert 14 < closed / MINUTES < 20
    tops = [part.max() for part in long["blink"][5:].reshape(-1, 8) if part.any()]
    assert np.mean(np.array(tops) > 0.9) > 0.75


def test_a_blink_lies_inside_its_block():
    frames = 61
    drive = np.zeros((latents_of(frames), len(SIGNALS)), np.float32)
    drive[6, BLINKING] = BLINK_ABOVE + SURE / 2
    closure = follow_live(drive, frames)["blink"]
    np.testing.assert_allclose(closure[21:27], 0.5 * np.array(BLINK), rtol=1e-4)
    assert not closure[:21].any() and not closure[27:].any()
    called = blinking(torch.from_numpy(drive)[None])[0]
    assert called.nonzero().flatten().tolist() == [6, 7]
    shifted = np.roll(drive, 1, 0)
    assert not follow_live(shifted, frames)["blink"].any(), "only a block's first latent counts"
    assert not blinking(torch.from_numpy(shifted)[None]).any()


@pytest.mark.parametrize("frames", [61, 65])
def test_the_latents_with_a_blink_are_those_of_the_film(frames):
    drive = draw_live_drive(np.random.default_rng(4), frames) + 1.0
    closure = follow_live(drive, frames)["blink"][1:].reshape(-1, 4).max(1) > 0
    assert closure.any()
    assert blinking(torch.from_numpy(drive)[None])[0, 1:].bool().tolist() == closure.tolist()


def test_gaze_rests_ahead_and_goes_aside(long):
    ahead = (np.abs(long["gaze"]) < 1e-9).mean()
    assert 0.45 < ahead < 0.7
    moving = np.abs(np.diff(long["gaze"], axis=0)) > 0.01
    assert moving.mean() < 0.2


def test_a_mirror_turns_what_goes_sideways(drive):
    frames = 101
    part = drive[: latents_of(frames)]
    one, two = (follow_live(each, frames) for each in (part, mirrored_drive(torch.from_numpy(part)).numpy()))
    for name in MOVING:
        np.testing.assert_allclose(two[name], (-1 if name in SIDEWAYS else 1) * one[name])
    np.testing.assert_allclose(two["gaze"], one["gaze"] * (-1, 1))
    assert np.array_equal(one["blink"], two["blink"])


def test_noise_is_smoothed_like_the_numbers():
    white = torch.randn(1, 1, 20, 1, 1, generator=torch.Generator().manual_seed(0))
    expected = np.convolve(white.flatten().numpy(), span_weights(SPAN), "valid")
    both = smooth(white.repeat(1, WHITE + 1, 1, 1, 1), SPAN)[0, :, :, 0, 0].numpy()
    np.testing.assert_allclose(both[WHITE], expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(both[0], white.flatten().numpy()[SPAN - 1 :])
