"""Features of sound in pieces against those of the whole recording."""

from __future__ import annotations

import resource
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from omniavatar.encoders.audio import AudioEncoder
from omniavatar.encoders.live_audio import LiveAudioEncoder
from omniavatar.errors import InputError

RATE = 16000


@pytest.fixture(scope="module")
def encoder() -> AudioEncoder:
    return AudioEncoder.random(
        hidden=24, layers=3, heads=2, intermediate=48, conv_dim=16, pos_kernel=16, pos_groups=4,
        device="cpu", seed=0,
    )  # fmt: skip


def sound(seconds: float, seed: int = 0) -> np.ndarray:
    """Noise whose loudness and colour change, as those of speech do."""
    dice = np.random.default_rng(seed)
    count = round(seconds * RATE)
    noise = dice.standard_normal(count)
    rough = np.repeat(dice.uniform(0, 0.3, count // 1600 + 1), 1600)[:count]
    return (rough * (noise + np.roll(noise, 1) * np.sin(np.arange(count) / 9000))).astype(np.float32)


def test_all_frames_in_one_block_equal_the_whole_recording(encoder: AudioEncoder, tmp_path: Path) -> None:
    waveform = sound(4)
    whole = encoder.encode(waveform, 100, 25, tmp_path / "whole.npy")
    live = LiveAudioEncoder(encoder, 25, ahead_frames=0)
    live.push(waveform)
    made = live.encode(100)[0].numpy()
    assert made.shape == (100, live.width)
    assert np.abs(made - whole).max() / np.abs(whole).max() <= 1e-4


def test_blocks_come_close_to_the_whole_recording_when_they_see_more(
    encoder: AudioEncoder, tmp_path: Path
) -> None:
    waveform = sound(6)
    whole = np.asarray(encoder.encode(waveform, 150, 25, tmp_path / "whole.npy"))

    def error(past: float, ahead: int) -> float:
        live = LiveAudioEncoder(encoder, 25, past, ahead)
        live.push(waveform)
        made = np.concatenate([live.encode(12)[0].numpy() for _ in range(11)])
        late = slice(60, 132)
        return float(np.linalg.norm(made[late] - whole[late]) / np.linalg.norm(whole[late]))

    short, longer, ahead = error(0.5, 0), error(4, 0), error(4, 10)
    assert ahead < longer < short
    assert ahead < 0.1


@pytest.mark.parametrize("sizes", [[1], [37, 1600], [48000]])
def test_pieces_of_any_size_give_the_same_bits(encoder: AudioEncoder, sizes: list[int]) -> None:
    waveform = sound(2)
    once = LiveAudioEncoder(encoder, 25)
    once.push(waveform)
    expected = [once.encode(12) for _ in range(3)]

    live, made, start, turn = LiveAudioEncoder(encoder, 25), [], 0, 0
    while len(made) < 3:
        if live.ready(12):
            made.append(live.encode(12))
            continue
        size = sizes[turn % len(sizes)] if sizes != [1] else max(1, live.needed(12) // 2)
        live.push(waveform[start : start + size])
        start, turn = start + size, turn + 1
    for block, other in zip(made, expected, strict=True):
        assert torch.equal(block, other)


def test_a_block_waits_for_its_sound_and_the_look_ahead(encoder: AudioEncoder) -> None:
    live = LiveAudioEncoder(encoder, 25, ahead_frames=2)
    assert live.needed(12) == 14 * 640 and not live.ready(12)
    live.push(sound(14 * 640 / RATE)[:-1])
    assert live.needed(12) == 1
    with pytest.raises(ValueError, match="12 frames need 1 more samples"):
        live.encode(12)
    live.push(np.zeros(1, np.float32))
    assert live.ready(12) and live.encode(12).shape == (1, 12, live.width)
    assert live.needed(12) == 12 * 640


@pytest.mark.slow
def test_an_hour_of_sound_takes_no_more_memory_or_time_a_block() -> None:
    """The same 9.6 s, 375 times: what is heard in the last one is what was heard before."""
    smallest = AudioEncoder.random(
        hidden=8, layers=1, heads=1, intermediate=8, conv_dim=2, pos_kernel=4, pos_groups=2,
        device="cpu", seed=0,
    )  # fmt: skip
    live, piece, frames = LiveAudioEncoder(smallest, 25, past_seconds=1.0), sound(9.6), 240
    times, held, kept = [], [], []
    for block in range(376):  # the last one is the look-ahead
        begun = time.process_time()
        live.push(piece)
        if live.ready(frames):
            heard = live.encode(frames)
        times.append(time.process_time() - begun)
        held.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
        kept.append(sum(each.numel() * each.element_size() for each in live.state().values()))
        if block == 60:
            early = heard
    assert live.frames == 3600 * 25 and live.samples == 376 * len(piece)
    assert len(set(kept[1:])) == 1 and kept[-1] < 4 * RATE * (9.6 + 1.2) + 1000
    grown = (held[-1] - held[40]) * 1024
    assert grown < 4e6, f"{grown / 1e6:.1f} MB more after an hour"
    first, last = min(times[5:45]), min(times[-40:])  # other work on the machine only adds
    assert last < 1.5 * first, (first, last)
    assert (heard - early).abs().max() < 2e-3 * early.std()


def test_silence_has_features(encoder: AudioEncoder) -> None:
    live = LiveAudioEncoder(encoder, 25)
    live.push(np.zeros(2 * RATE, np.float32))
    assert torch.isfinite(live.encode(12)).all()


@pytest.mark.parametrize(
    "piece",
    [np.zeros((2, 5), np.float32), np.zeros(5), np.array([0, np.nan], np.float32)],
    ids=["stereo", "float64", "nan"],
)
def test_bad_pieces_are_refused_and_change_nothing(encoder: AudioEncoder, piece: np.ndarray) -> None:
    live = LiveAudioEncoder(encoder, 25)
    with pytest.raises(InputError, match="audio: "):
        live.push(piece)
    assert live.samples == 0


def test_speech_after_a_long_silence_has_the_features_of_speech(encoder: AudioEncoder) -> None:
    """With a past of half a second, blocks two seconds into the speech see no silence."""
    speech = sound(4)

    def late_block(silence: int) -> np.ndarray:
        live = LiveAudioEncoder(encoder, 25, past_seconds=0.5)
        live.push(np.concatenate([np.zeros(silence * RATE, np.float32), speech]))
        blocks = [live.encode(25)[0].numpy() for _ in range(silence + 3)]
        return blocks[-1]

    expected = late_block(0)
    assert np.linalg.norm(late_block(30) - expected) / np.linalg.norm(expected) < 0.01


def test_a_saved_encoder_continues_with_the_same_bits(encoder: AudioEncoder) -> None:
    waveform = sound(4)
    live, resumed = LiveAudioEncoder(encoder, 25), LiveAudioEncoder(encoder, 25)
    live.push(waveform[: 2 * RATE])
    live.encode(25)
    resumed.restore({name: value.clone() for name, value in live.state().items()})
    for each in (live, resumed):
        each.push(waveform[2 * RATE :])
    assert torch.equal(live.encode(50), resumed.encode(50))
