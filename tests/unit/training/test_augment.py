import numpy as np
import pytest
import torch
from training.augment import move_formants

RATE = 16000
PITCH = 125


def vowel(resonances):
    """Two seconds of pulses at `PITCH` through resonances in Hz."""
    signal = np.zeros(2 * RATE)
    signal[:: RATE // PITCH] = 1
    for hertz in resonances:
        radius, angle = 0.92, 2 * np.pi * hertz / RATE
        first, second, made = 2 * radius * np.cos(angle), -(radius**2), np.zeros_like(signal)
        for n in range(len(signal)):
            made[n] = signal[n] + first * made[n - 1] + second * made[n - 2]
        signal = made
    return torch.from_numpy(signal / np.abs(signal).max()).float()[None]


def harmonics(sound):
    """Frequencies and levels of the multiples of `PITCH` below 3 kHz, and the level between them."""
    spectrum = torch.fft.rfft(sound[0] * torch.hann_window(sound.shape[1])).abs()
    places = torch.arange(1, 3000 // PITCH) * PITCH * 2
    return places / 2, spectrum[places], spectrum[places + PITCH]


@pytest.mark.parametrize("factor", [0.85, 1.0, 1.2])
def test_resonances_move_and_the_pitch_stays(factor):
    moved = move_formants(vowel([1000]), torch.tensor([factor]))
    frequency, level, between = harmonics(moved)
    peak = float((frequency * level.square()).sum() / level.square().sum())
    start, before, _ = harmonics(vowel([1000]))
    at_first = float((start * before.square()).sum() / before.square().sum())
    assert peak == pytest.approx(at_first * factor, rel=0.08)
    assert between.max() < 0.05 * level.max(), "energy lies at the multiples of the same pitch"
    assert moved.shape == (1, 2 * RATE)


def test_nothing_moves_in_time_or_in_silence():
    sound = torch.zeros(2, RATE)
    sound[0, 8000:8400] = torch.randn(400, generator=torch.Generator().manual_seed(0))
    moved = move_formants(sound, torch.tensor([1.2, 0.9]))
    assert moved[1].abs().max() == 0
    energy = moved[0].square()
    assert energy[7700:8700].sum() > 0.98 * energy.sum()
