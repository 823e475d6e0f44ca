"""Augments training speech in batches on the device: room, microphone, noise and level.

No augmentation shifts the sound in time: the response of the room begins with the direct sound.
Shapes: B clips, S samples.
"""

from __future__ import annotations

import torch
from torch import Tensor


def roughen(sound: Tensor, generator: torch.Generator) -> Tensor:
    """Waveforms (B, S) float32 of about +-1, each with a random room, equaliser, noise and gain."""
    batch, samples = sound.shape
    device = sound.device

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(batch, *shape, device=device, generator=generator)

    def noise(*shape: int) -> Tensor:
        return torch.randn(batch, *shape, device=device, generator=generator)

    size = 1 << (samples + 8000 - 1).bit_length()
    frequency = torch.fft.rfftfreq(size, 1 / 16000, device=device)
    octaves = (frequency.clamp_min(30) / 1000).log2()
    tail_time = torch.arange(8000, device=device) / 16000
    decay = uniform(0.02, 0.12, 1)
    response = noise(8000) * torch.exp(-tail_time / decay) * (tail_time > 0.002)
    level = uniform(0.0, 0.7, 1) * (uniform(0, 1, 1) < 0.5)
    response = response * level / response.square().sum(1, keepdim=True).sqrt()
    response[:, 0] = 1
    tilt = uniform(-4, 4, 1) * octaves
    bump = uniform(-8, 8, 1) * torch.exp(-(octaves - uniform(-3, 3, 1)).square())
    low_cut = uniform(20, 300, 1)
    high_cut = torch.where(uniform(0, 1, 1) < 0.3, uniform(2800, 5000, 1), uniform(5500, 9000, 1))
    gain = 10 ** ((tilt + bump).clamp(-18, 18) / 20)
    band = (1 / (1 + (low_cut / frequency.clamp_min(1)) ** 4)) * (1 / (1 + (frequency / high_cut) ** 12))
    spectrum = torch.fft.rfft(sound, size) * torch.fft.rfft(response, size) * gain * band
    wet = torch.fft.irfft(spectrum, size)[:, :samples]
    colour = 10 ** (uniform(-6, 1, 1) * octaves.clamp(-4, 3) / 20)
    hiss = torch.fft.irfft(torch.fft.rfft(noise(samples), size) * colour, size)[:, :samples]
    speech = wet.square().mean(1, keepdim=True).sqrt().clamp_min(1e-5)
    hiss = hiss / hiss.square().mean(1, keepdim=True).sqrt()
    ratio = 10 ** (-uniform(5, 45, 1) / 20) * (uniform(0, 1, 1) < 0.8)
    mixed = (wet + hiss * speech * ratio) / speech * 0.1
    drive = torch.where(uniform(0, 1, 1) < 0.1, uniform(3, 12, 1), torch.full_like(speech, 0.3))
    return torch.tanh(mixed * drive) / drive
