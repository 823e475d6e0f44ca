"""What the block-causal student sees in training, and what it should make of it.

An example is a run of blocks of a story: the run as it looks when it is finished, and noisy. The target is
the film, whatever the past looks like: chance enters through the noise of each block alone
(`training.live_drive`), so the past is needed only for the pose that a block begins with.

Shapes: B stories, T latents of a story, R of a run, N = 4T-3 video frames, D audio width, K signals, h w
latent pixels.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import avg_pool3d, pad

from omniavatar.encoders.live_audio import AHEAD_FRAMES, PAST_SECONDS
from omniavatar.sampling.causal import CausalWindow
from omniavatar.sampling.schedule import Schedule, make_schedule
from omniavatar.sampling.windows import block_frames
from training.augment import roughen
from training.drive import FRAMES_A_LATENT
from training.live_drive import blinking, carried_noise
from training.loop import mixed
from training.nets import AudioTrainer, Nets, normalise_sound, normalised_latents
from training.phones import FPS
from training.scale import SIZE
from training.settings import StudentSettings
from training.stage_dit import PROMPT_TOKENS, SHIFT, disturb, face_weight, unsteadiness
from training.stage_vae import to_pixels
from training.studio import Film
from training.takes import SAMPLES_A_FRAME

TINT = 0.05
"""Standard deviation of a constant added to each channel of disturbed latents, which changes colours."""
SOFTEST = 0.8
"""Most of the mean of its neighbours in a disturbed latent pixel."""


def window_of(settings: StudentSettings) -> CausalWindow:
    """The attention window of the student."""
    return CausalWindow(settings.block, settings.window, settings.sink)


def schedule_of(settings: StudentSettings, steps: int) -> Schedule:
    """The noise levels of its first `steps` steps."""
    return make_schedule(steps, SHIFT, tuple(settings.timesteps[:steps]))


def heard_live(audio: AudioTrainer, sound: Tensor, frames: int, block: int) -> Tensor:
    """Audio vectors (B, N-1, D) of waveforms (B, S), each block encoded from the sound until its end.

    It is what `omniavatar.encoders.live_audio` makes, except that loudness is that of the sound it hears.

    frames: N.
    block: latents of a block.
    """
    rows, begun = [], 0
    while begun < frames - 1:
        end = begun + block_frames(len(rows), block) - (not rows)
        first, until = max(0, begun - int(PAST_SECONDS * FPS)), min(end + AHEAD_FRAMES, frames - 1)
        heard = normalise_sound(sound[:, first * SAMPLES_A_FRAME : until * SAMPLES_A_FRAME])
        rows.append(audio.features(heard, until - first)[:, begun - first : end - first])
        begun = end
    return torch.cat(rows, 1)


@torch.no_grad()
def told(
    film: Film, drive: Tensor, nets: Nets, settings: StudentSettings, generator: torch.Generator
) -> dict[str, Tensor]:
    """The tensors of filmed stories for the pool.

    Latents (B, 16, T, h, w), what the student makes of them (`own`) and whether it did (B,), loss weights
    (B, T, h, w), drive (B, T, K), eyes (B, 2, 2), audio (B, N, D), prompt tokens.
    """
    count, frames = film.frames.shape[:2]
    device = film.frames.device
    with mixed(device, cached=False):
        parts = film.frames.split(2 if device.type == "cuda" else 1)
        latents = torch.cat([normalised_latents(nets.vae, to_pixels(part)).half() for part in parts])
    places = torch.cat([film.mouth[:, :, None], film.eyes], 2)[:, None]
    sound = roughen(film.sound, generator)
    live = heard_live(nets.audio, sound, frames, settings.block)
    whole = nets.audio.features(normalise_sound(sound), frames - 1)
    choice = torch.rand(count, 1, 1, device=device, generator=generator) < settings.whole_sound
    heard = torch.where(choice, whole, live)
    ids, mask = nets.text.tokens(list(film.prompts))
    weight = face_weight(places, settings.mouth, settings.eyes)[:, 0]
    lids = face_weight(places, 0.0, settings.blinks)[:, 0]
    weight = weight + lids * blinking(drive)[:, : lids.shape[1], None, None]
    room = (0, PROMPT_TOKENS - ids.shape[1])
    return {
        "latents": latents,
        "own": latents,
        "made": torch.zeros(count, device=device),
        "weight": weight.half(),
        "drive": drive,
        "eyes": film.eyes[:, 0] / (SIZE / latents.shape[-1]),
        "audio": torch.cat([torch.zeros_like(heard[:, :1]), heard], 1).half(),
        "ids": pad(ids, room).to(device),
        "mask": pad(mask, room).to(device),
    }


def worn(latents: Tensor, share: float, generator: torch.Generator) -> Tensor:
    """Latents (B, 16, T, h, w), most of them disturbed (`disturb`), in other colours and softer."""
    batch, channels = latents.shape[:2]
    hit, softness = torch.rand(2, batch, 1, 1, 1, 1, device=latents.device, generator=generator)
    colour = torch.randn(batch, channels, 1, 1, 1, device=latents.device, generator=generator)
    soft = avg_pool3d(latents, (1, 3, 3), 1, (0, 1, 1), count_include_pad=False)
    changed = torch.lerp(latents, soft, SOFTEST * softness) + TINT * colour
    return disturb(torch.where(hit < share, changed, latents), share, generator)


def seen_blocks(stories: dict[str, Tensor], settings: StudentSettings, generator: torch.Generator) -> Tensor:
    """Finished blocks (B, 16, R, h, w) of runs.

    They are the student's own, the film's, both mixed, or (few) only noise, from which it must recover.
    """
    true = stories["latents"].float()
    batch, latents = true.shape[0], true.shape[2]
    luck, kind = torch.rand(2, batch, latents // settings.block, device=true.device, generator=generator)
    kind = kind[:, :1]
    own = (kind < settings.own_share) | ((kind < settings.own_share + settings.mixed_share) & (luck < 0.5))
    own = (own & (stories["made"] > 0)[:, None]).repeat_interleave(settings.block, 1)
    seen = torch.where(
        own[:, None, :, None, None], stories["own"].float(), worn(true, settings.corrupt, generator)
    )
    lost = (kind > 1 - settings.lost_share)[:, :, None, None, None]
    seen = torch.where(lost, torch.randn(true.shape, device=true.device, generator=generator), seen)
    first = stories["first"].view(-1, 1, 1, 1, 1)
    seen[:, :, :1] = torch.where(first, true[:, :, :1], seen[:, :, :1])
    return seen


def cut(
    stories: dict[str, Tensor], settings: StudentSettings, generator: torch.Generator
) -> dict[str, Tensor]:
    """A run of `settings.run` latents of each story.

    Adds the portrait (B, 16, 1, h, w) and whether the run begins with it (B,). Audio: (B, 4R, D).
    """
    count, total = len(stories["latents"]), stories["latents"].shape[2]
    device = stories["latents"].device
    places = (total - settings.run) // settings.block + 1
    block = torch.randint(places, (count,), device=device, generator=generator)
    begins = torch.rand(count, device=device, generator=generator) < settings.begins
    start = settings.block * torch.where(begins, 0, block)

    def rows(values: Tensor, dim: int, each: int = 1) -> Tensor:
        which = each * start[:, None] + torch.arange(each * settings.run, device=device)
        moved = values.movedim(dim, 1)
        return moved[torch.arange(count, device=device)[:, None], which].movedim(1, dim)

    audio = stories["audio"]
    audio = torch.cat([audio[:, :1].expand(-1, FRAMES_A_LATENT - 1, -1), audio], 1)
    return {
        **stories,
        "latents": rows(stories["latents"], 2),
        "own": rows(stories["own"], 2),
        "weight": rows(stories["weight"], 1),
        "drive": rows(stories["drive"], 1),
        "audio": rows(audio, 1, FRAMES_A_LATENT).float(),
        "portrait": stories["latents"][:, :, :1].float(),
        "first": start == 0,
    }


def student_batch(
    stories: dict[str, Tensor], settings: StudentSettings, generator: torch.Generator
) -> dict[str, Tensor]:
    """One training example per story: a run at the noise level of one of the steps.

    Only the first level, pure noise, carries the drive. Later levels begin with the noisy film, or with the
    student's own blocks.
    """
    stories = cut(stories, settings, generator)
    true = stories["latents"].float()
    batch, device = len(true), true.device
    later = torch.tensor(settings.timesteps[1:] or settings.timesteps, device=device) / 1000
    choice, luck = torch.rand(2, batch, device=device, generator=generator)
    drawn = torch.randint(len(later), (batch,), device=device, generator=generator)
    sigma = torch.where(choice < settings.at_first, 1.0, later[drawn])
    level = sigma.view(-1, 1, 1, 1, 1)
    carried = carried_noise(stories["drive"], stories["eyes"], *true.shape[3:], generator)
    fresh = torch.randn(true.shape, device=device, generator=generator)
    noise = torch.where(level == 1, carried, fresh)
    own = (luck < settings.from_own) & (stories["made"] > 0)
    base = torch.where(own.view(-1, 1, 1, 1, 1), stories["own"].float(), true)
    sample = (1 - level) * base + level * noise
    target = (sample - true) / level
    first = stories["first"].view(-1, 1, 1, 1, 1)
    sample[:, :, :1] = torch.where(first, true[:, :, :1], sample[:, :, :1])
    weight = (1 + stories["weight"].float())[:, None].clone()
    weight[:, :, 0] = 0
    weight[:, :, 1 : settings.block] *= first
    return {
        "finished": seen_blocks(stories, settings, generator),
        "sample": sample,
        "timestep": 1000 * sigma,
        "target": target,
        "weight": weight / weight.mean(),
        **{name: stories[name] for name in ("portrait", "first", "audio", "ids", "mask")},
    }


def robust_loss(error: Tensor, weight: Tensor, settings: StudentSettings) -> Tensor:
    """Weighted error (B, 16, R, h, w): squared where it is small, its size where it is large.

    The mean of two pictures is a blurred one; the size of the error is least at one of them. Differences
    between neighbours in a picture count extra, and those from latent to latent, against flicker.
    """
    limit = settings.robust
    squares = error.square()
    size = (squares.mean(1, keepdim=True) + limit**2).sqrt() - limit
    loss = (2 * limit * size * weight).mean()
    for dim in (3, 4):
        loss = loss + settings.edges * 0.25 * unsteadiness(error, weight, dim)
    return loss + settings.steady * 0.5 * unsteadiness(error, weight, 2)


def roughness(latents: Tensor) -> Tensor:
    """Mean square difference of neighbours in latents (B, 16, T, h, w); blurred faces have little."""
    latents = latents.float()
    return latents.diff(dim=-1).square().mean() + latents.diff(dim=-2).square().mean()
