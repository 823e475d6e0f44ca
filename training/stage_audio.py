"""Stage 2, the audio encoder: wav2vec 2.0 learns the phone and the articulators of each frame.

Speech is augmented differently in every step (`augment`), so that rooms, microphones and noise do not matter.
The two heads are dropped after training; the DiT uses the hidden states.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from training.augment import roughen
from training.loop import Budget, Log, Optimiser, Pool, mixed
from training.nets import AudioTrainer, normalise_sound
from training.phones import ARTICULATORS, frame_phones, smooth_articulate
from training.settings import AudioSettings
from training.speech import SpeechSet
from training.takes import SAMPLES_A_FRAME, Take


def clip_of(takes: list[Take], device: torch.device) -> dict[str, Tensor]:
    """Sound, and the labels of the frames after the portrait."""
    arrays = {
        "sound": np.stack([take.sound for take in takes]),
        "phones": np.stack([take.phones[1:] for take in takes]),
        "shape": np.stack([take.shape[1:] for take in takes]),
    }
    return {name: torch.from_numpy(array).to(device) for name, array in arrays.items()}


def audio_loss(
    net: AudioTrainer, clips: dict[str, Tensor], sound: Tensor, weight: float
) -> tuple[Tensor, ...]:
    """Loss, frame accuracy and squared error of the articulators, for normalised sound (B, S)."""
    frames = clips["phones"].shape[1]
    states = net.states(sound, frames)
    hidden = states[-1]
    named = net.phones(hidden).float()
    placed = net.shapes(hidden).float()
    cross = F.cross_entropy(named.flatten(0, 1), clips["phones"].flatten())
    square = (placed - clips["shape"]).square().mean()
    accuracy = (named.argmax(-1) == clips["phones"]).float().mean()
    return cross + weight * square, accuracy, square


@torch.no_grad()
def measure(net: AudioTrainer, clips: dict[str, Tensor]) -> dict[str, float]:
    """Accuracy of phones and median correlation of the jaw on clips without augmentation."""
    sound = normalise_sound(clips["sound"].float() / 32768)
    hidden = net.states(sound, clips["phones"].shape[1])[-1]
    jaw = net.shapes(hidden)[..., ARTICULATORS.index("jaw")].float()
    truth = clips["shape"][..., ARTICULATORS.index("jaw")]
    centred = [value - value.mean(1, keepdim=True) for value in (jaw, truth)]
    r = (centred[0] * centred[1]).sum(1) / (centred[0].norm(dim=1) * centred[1].norm(dim=1)).clamp_min(1e-6)
    accuracy = (net.phones(hidden).argmax(-1) == clips["phones"]).float().mean()
    return {"accuracy": float(accuracy), "jaw_r": float(r.median())}


@torch.no_grad()
def measure_speech(net: AudioTrainer, speech: SpeechSet) -> dict[str, float]:
    """Mean accuracy of phones and median correlation of the jaw on whole utterances of people, one by one."""
    device = next(net.parameters()).device
    accuracies, correlations = [], []
    for number in range(len(speech)):
        samples, phones = speech.utterance(number)
        frames = len(samples) // SAMPLES_A_FRAME
        clip = {
            "sound": samples[None, : frames * SAMPLES_A_FRAME],
            "phones": frame_phones(phones, frames + 1)[None, 1:],
            "shape": smooth_articulate(phones, frames + 1)[None, 1:].astype(np.float32),
        }
        reached = measure(
            net, {name: torch.from_numpy(array.copy()).to(device) for name, array in clip.items()}
        )
        accuracies.append(reached["accuracy"])
        correlations.append(reached["jaw_r"])
    return {"real_accuracy": float(np.mean(accuracies)), "real_jaw_r": float(np.median(correlations))}


def train_audio(
    net: AudioTrainer,
    takes: Iterator[Take],
    held_out: list[Take],
    real: SpeechSet | None,
    settings: AudioSettings,
    budget: Budget,
    log: Log,
    device: torch.device,
    seed: int,
) -> int:
    """Train until the budget is over and leave the averaged weights in `net`; returns the number of takes."""
    generator = torch.Generator(device).manual_seed(seed)
    optimiser = Optimiser({"audio": net}, settings, budget)
    pool = Pool(settings.pool)
    used = 0

    def make(count: int) -> dict[str, Tensor]:
        nonlocal used
        used += count
        return clip_of([next(takes) for _ in range(count)], device)

    pool.fill(make, 64, budget, settings.fill_share)
    test = clip_of(held_out, device)
    log.add("audio", budget, 0, clips=pool.filled)
    measured = budget.spent
    while True:
        clips = pool.draw(settings.batch, generator)
        sound = normalise_sound(roughen(clips["sound"].float() / 32768, generator))
        with mixed(device):
            loss, accuracy, square = audio_loss(net, clips, sound, settings.shape)
        optimiser.step(loss)
        if settings.fresh and optimiser.steps % settings.fresh_every == 0:
            pool.add(make(settings.fresh))
        if budget.measuring(measured, settings.measure_seconds, optimiser.steps):
            measured = budget.spent
            optimiser.average.swap()
            reached = measure(net, test)
            if real is not None:
                reached |= measure_speech(net, real)
            optimiser.average.swap()
            values = {"loss": loss.item(), "train_accuracy": accuracy.item(), "square": square.item()}
            log.add("audio", budget, optimiser.steps, **values, **reached)
        if budget.over:
            break
    optimiser.average.swap()
    return used
