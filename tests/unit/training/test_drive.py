"""Chance in a performance: what the numbers do, and how noise carries them."""

import numpy as np
import pytest
import torch
from training.drive import (
    BLINK,
    FIRST_BLINK,
    HERTZ,
    SIDEWAYS,
    SIGNALS,
    carriers,
    draw_drive,
    follow,
    latents_of,
    mirrored_drive,
    read,
    windows_of,
    write,
)
from training.head import Head
from training.motion import Manner, perform
from training.phones import FPS
from training.studio import still
from training.takes import Take

MINUTES = 10
LONG = MINUTES * 60 * FPS + 1


@pytest.fixture(scope="module")
def long():
    return follow(draw_drive(np.random.default_rng(0), LONG), LONG)


def events(track):
    return int((np.diff((track > 0.5).astype(int)) > 0).sum())


def test_blinks_come_as_often_as_people_blink(long):
    assert 15 < events(long["blink"]) / MINUTES < 25
    assert long["blink"].max() == 1
    assert (long["blink"] > 0.5).mean() < 0.1


def test_a_number_above_the_threshold_is_one_blink_where_its_latent_begins():
    frames = 81
    drive = np.zeros((latents_of(frames), len(SIGNALS)), np.float32)
    for latent in (1, 8, 9, 20):
        drive[latent, SIGNALS.index("blink")] = 3
    closure = follow(drive, frames)["blink"]
    assert FIRST_BLINK > 1, "eyes are open at the start"
    assert closure[29 : 29 + len(BLINK)].tolist() == list(BLINK)
    assert events(closure) == 2 and np.flatnonzero(closure)[-1] == 80, "the one of latent 20 is cut off"
    assert closure[77:81].tolist() == list(BLINK[:4])


def test_the_future_changes_nothing():
    frames = 101
    drive = draw_drive(np.random.default_rng(1), frames)
    other = drive.copy()
    other[13:] += 5
    one, two = follow(drive, frames), follow(other, frames)
    for name in one:
        assert np.array_equal(one[name][:49], two[name][:49]), name
        assert one[name].shape == two[name].shape


@pytest.mark.parametrize("name", HERTZ)
def test_motion_is_smooth_and_of_unit_size(long, name):
    assert long[name][0] == 0
    assert long[name].std() == pytest.approx(1, abs=0.15)
    assert np.abs(np.diff(long[name], 2)).max() < 0.3


def test_gaze_jumps_and_rests(long):
    moves = np.abs(np.diff(long["gaze"], axis=0)).max(1) > 0
    assert 0.3 < moves.mean() * FPS < 0.8
    assert 0.3 < (long["gaze"] == 0).mean() < 0.7


def test_noise_carries_a_drive_and_stays_white():
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(64, 16, 5, 24, 24, generator=generator)
    drive = torch.randn(64, 5, len(SIGNALS), generator=generator)
    eyes = 6 + 12 * torch.rand(64, 2, 2, generator=generator)
    made = write(noise, drive, eyes)
    torch.testing.assert_close(read(made, eyes), drive, atol=1e-4, rtol=0)
    torch.testing.assert_close(made[:, len(SIGNALS) :], noise[:, len(SIGNALS) :])
    assert made.std() == pytest.approx(1, abs=0.01)
    neighbours = (made[..., 1:] * made[..., :-1]).mean()
    assert abs(neighbours) < 0.005
    own = read(noise, eyes)
    assert own.mean().abs() < 0.1 and own.std() == pytest.approx(1, abs=0.05)


def test_the_eyes_signals_lie_near_the_eyes():
    patterns = carriers(torch.tensor([[[6.5, 9.5], [14.5, 9.5]]]), 24, 24)[0]
    torch.testing.assert_close(patterns.flatten(1).norm(dim=1), torch.ones(len(SIGNALS)))
    blink, yaw = (patterns[SIGNALS.index(name)].abs() for name in ("blink", "yaw"))
    assert blink[9, 6] == blink.max() and blink[20:].max() < 1e-3
    assert yaw.max() == yaw.min()


def test_windows_take_their_part_of_the_drive():
    drive = torch.arange(2 * 20 * len(SIGNALS)).view(2, 20, -1)
    parts = windows_of(drive, torch.tensor([[0, 32], [0, 4]]), 11)
    assert torch.equal(parts[0, 1], drive[0, 8:19]) and torch.equal(parts[1, 1], drive[1, 1:12])


def test_a_still_take_is_told_to_be_still():
    frames = 41
    drive = draw_drive(np.random.default_rng(3), frames)
    manner = Manner("neutral", "lively", "")
    tracks = perform(Head("cpu").names, [], frames, manner, np.random.default_rng(4), drive)
    calm = still(Take(np.zeros(0), np.zeros(frames), np.zeros((frames, 1)), manner, tracks, drive))
    told, before = follow(calm.drive, frames), follow(drive, frames)
    assert not calm.tracks["head"].any() and not told["yaw"].any() and not told["gaze"].any()
    assert before["yaw"].any() and np.array_equal(told["blink"], before["blink"])


def test_a_mirror_turns_what_goes_sideways():
    frames = 101
    drive = draw_drive(np.random.default_rng(2), frames)
    one, two = (follow(each, frames) for each in (drive, mirrored_drive(torch.from_numpy(drive)).numpy()))
    for name in HERTZ:
        np.testing.assert_allclose(two[name], (-1 if name in SIDEWAYS else 1) * one[name])
    np.testing.assert_allclose(two["gaze"], one["gaze"] * (-1, 1))
    assert np.array_equal(one["blink"], two["blink"])
