"""Stage 3, the diffusion transformer with the prompt encoder: flow matching on latents of talking heads.

A clip in the pool is a story: the portrait, sound and prompt, and windows of the story as latents. The first
window starts at the portrait, the others at random frames, and the last one may begin with a double
(`training.handover`). Each window is encoded separately, as in the hand-over of the engine. The noise of a
window carries what happens in it by chance (`training.drive`), so a sampler of few steps need not average
over it. Given latents are often noisy. For guidance, speech and prompt are dropped at random: speech becomes
zero vectors, the prompt becomes empty. Noise levels follow the engine's schedule with shift 5; part of them
are those of the packaged number of steps.

Shapes: B stories, W windows per story, T latent frames, N = 4T-3 video frames, D audio width, K signals, h w
latent pixels.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from omniavatar.model.dit import RunBlocks, WanDiT
from omniavatar.model.layers import BlockInputs
from omniavatar.sampling.schedule import make_schedule
from training.augment import roughen
from training.drive import FRAMES_A_LATENT, mirrored_drive, windows_of, write
from training.graphed import stepper
from training.handover import film_doubles
from training.loop import Budget, Log, Optimiser, Pool, mixed
from training.nets import Nets, PromptEncoder, normalise_sound, normalised_latents
from training.scale import LATENTS, SIZE, WINDOW
from training.settings import DitSettings
from training.stage_vae import to_pixels
from training.studio import Film, Studio, mouth_weight
from training.supply import Supply
from training.takes import Take

SHIFT = 5.0
STEPS = 4
"""Of the packaged configuration."""
PROMPT_TOKENS = 160
EYE_SPREAD = 7.0
GIVEN_ODDS = (0.15, 0.60, 0.15, 0.10)


@dataclass(frozen=True, eq=False)
class Story:
    """B filmed stories and their windows.

    starts: (B, W), first frame of each window, multiples of four.
    drive: (B, L, K), of the whole story.
    last: instead of the film's frames, those of the last window, uint8 (B, N, 3, H, W), and their places
    (B, N, 3, 2) of mouth and eyes.
    """

    film: Film
    starts: Tensor
    drive: Tensor
    last: tuple[Tensor, Tensor] | None

    @classmethod
    def join(cls, one: Story, other: Story) -> Story:
        """The stories of both."""
        both = None
        if one.last is not None and other.last is not None:
            both = (torch.cat([one.last[0], other.last[0]]), torch.cat([one.last[1], other.last[1]]))
        return cls(
            Film.join([one.film, other.film]),
            torch.cat([one.starts, other.starts]),
            torch.cat([one.drive, other.drive]),
            both,
        )


def mirrored(story: Story, generator: torch.Generator) -> Story:
    """The stories, mirrored and in other light.

    Each story has its own gain and offset per channel. This reuses clips, because rendering one takes three
    times as long as encoding its windows.
    """
    film = story.film
    width = film.frames.shape[-1]
    count, device = len(film.frames), film.frames.device
    gain = 1 + 0.08 * torch.randn(count, 1, 3, 1, 1, generator=generator, device=device)
    offset = 10 * torch.randn(count, 1, 3, 1, 1, generator=generator, device=device)

    def seen(frames: Tensor) -> Tensor:
        return (frames.flip(-1) * gain + offset).round_().clamp_(0, 255).to(torch.uint8)

    def moved(places: Tensor) -> Tensor:
        return torch.stack([width - 1 - places[..., 0], places[..., 1]], -1)

    def swapped(places: Tensor) -> Tensor:
        mouth, left, right = moved(places).unbind(2)
        return torch.stack([mouth, right, left], 2)

    made = replace(film, frames=seen(film.frames), mouth=moved(film.mouth), eyes=moved(film.eyes).flip(2))
    last = None if story.last is None else (seen(story.last[0]), swapped(story.last[1]))
    return Story(made, story.starts, mirrored_drive(story.drive), last)


def draw_starts(count: int, windows: int, frames: int, generator: torch.Generator) -> Tensor:
    """First frames (count, windows) of the windows in stories of `frames` frames; the first one is 0.

    They are multiples of four, as in the engine.
    """
    device = generator.device
    latest = (frames - WINDOW) // FRAMES_A_LATENT
    starts = torch.randint(1, latest + 1, (count, windows), generator=generator, device=device)
    starts[:, 0] = 0
    return FRAMES_A_LATENT * starts


def face_weight(places: Tensor, mouth: float, eyes: float) -> Tensor:
    """Extra loss weights (B, W, T, h, w) around places (B, W, N, 3, 2) of mouth and eyes, in latent pixels.

    mouth, eyes: heights of the bumps.
    """
    groups = torch.cat([places[:, :, :1].expand(-1, -1, 3, -1, -1), places], 2)
    centres = groups.unflatten(2, (-1, 4)).mean(3)

    def around(place: Tensor, strength: float, spread: float) -> Tensor:
        return mouth_weight(place, (SIZE // 8, SIZE // 8), 1 / 8, strength, spread) - 1

    weight = around(centres[..., 0, :], mouth, 20.0)
    for eye in (1, 2):
        weight = weight + around(centres[..., eye, :], eyes, EYE_SPREAD)
    return weight


@torch.no_grad()
def stories_of(
    story: Story, nets: Nets, settings: DitSettings, generator: torch.Generator
) -> dict[str, Tensor]:
    """The tensors of stories for the pool.

    Latents (B, W, 16, T, h, w), loss weights (B, W, T, h, w), first frames of the windows (B, W), their drive
    (B, W, T, K), the portrait's eyes in latent pixels (B, 2, 2), audio vectors of the whole sound
    (B, frames - 1, D), prompt tokens.
    """
    film, starts = story.film, story.starts
    frames = film.frames.shape[1]
    device = film.frames.device
    count = len(starts)
    rows = starts[..., None] + torch.arange(WINDOW, device=device)
    which = torch.arange(count, device=device)[:, None, None]
    picked = film.frames[which, rows]
    places = torch.cat([film.mouth[:, :, None], film.eyes], 2)[which, rows]
    if story.last is not None:
        picked[:, -1], places[:, -1] = story.last

    def coded(clips: Tensor) -> Tensor:
        with mixed(device):
            parts = clips.split(8 if device.type == "cuda" else 1)
            return torch.cat([normalised_latents(nets.vae, to_pixels(part)).half() for part in parts])

    weight = face_weight(places, settings.mouth, settings.eyes)
    sound = normalise_sound(roughen(film.sound, generator))
    ids, mask = nets.text.tokens(list(film.prompts))
    if ids.shape[1] > PROMPT_TOKENS:
        raise ValueError(f"a prompt has {ids.shape[1]} tokens; the maximum is {PROMPT_TOKENS}")
    room = (0, PROMPT_TOKENS - ids.shape[1])
    clean = coded(picked.flatten(0, 1)).unflatten(0, starts.shape)
    return {
        "latents": clean,
        "weight": weight.half(),
        "starts": starts,
        "drive": windows_of(story.drive, starts, LATENTS),
        "eyes": film.eyes[:, 0] / (SIZE / clean.shape[-1]),
        "audio": nets.audio.features(sound, frames - 1).half(),
        "ids": torch.nn.functional.pad(ids, room).to(device),
        "mask": torch.nn.functional.pad(mask, room).to(device),
    }


def window_audio(audio: Tensor, starts: Tensor) -> Tensor:
    """Audio vectors (B, N, D) of windows that begin at frames `starts` (B,).

    Frame f gets row f-1; the portrait gets zeros.
    """
    padded = torch.cat([torch.zeros_like(audio[:, :1]), audio], 1)
    rows = starts[:, None] + torch.arange(WINDOW, device=audio.device)
    return padded.gather(1, rows[..., None].expand(-1, -1, audio.shape[-1])).float()


def disturb(given: Tensor, share: float, generator: torch.Generator) -> Tensor:
    """Given latents (B, 16, G, h, w), most of them with fine and coarse noise."""
    batch, channels = given.shape[:2]

    def normal(*shape: int) -> Tensor:
        return torch.randn(batch, *shape, device=given.device, generator=generator)

    hit = (torch.rand(batch, 1, 1, 1, 1, device=given.device, generator=generator) < share).float()
    strength = hit * torch.rand(batch, 1, 1, 1, 1, device=given.device, generator=generator)
    coarse = torch.nn.functional.interpolate(
        normal(channels * given.shape[2], 6, 6), size=given.shape[-2:], mode="bilinear"
    ).view_as(given)
    fine = torch.randn(given.shape, device=given.device, generator=generator)
    return given + strength * (0.12 * fine + 0.12 * coarse)


def draw_levels(count: int, at_steps: float, device: torch.device, generator: torch.Generator) -> Tensor:
    """Noise levels (B,): a share `at_steps` of them are levels of the packaged steps."""
    u, choice = torch.rand(2, count, device=device, generator=generator)
    levels = torch.tensor(make_schedule(STEPS, SHIFT).sigmas, device=device)
    drawn = torch.randint(STEPS, (count,), device=device, generator=generator)
    return torch.where(choice < at_steps, levels[drawn], SHIFT * u / (1 + (SHIFT - 1) * u))


def dit_batch(
    stories: dict[str, Tensor], settings: DitSettings, generator: torch.Generator
) -> dict[str, Tensor]:
    """One training example per story: noisy sample, y, timestep, target with weight, audio, prompt tokens."""
    batch, windows = stories["starts"].shape
    device = stories["starts"].device

    def uniform() -> Tensor:
        return torch.rand(batch, device=device, generator=generator)

    every = torch.arange(batch, device=device)
    which = torch.randint(windows, (batch,), device=device, generator=generator)
    clean = stories["latents"][every, which].float()
    starts = stories["starts"][every, which]
    reference = stories["latents"][:, 0, :, :1].float()
    given = 1 + torch.multinomial(
        torch.tensor(GIVEN_ODDS, device=device), batch, replacement=True, generator=generator
    )
    given = torch.where(starts == 0, 1, given)
    sigma = draw_levels(batch, settings.at_steps, device, generator)
    noise = torch.randn(clean.shape, device=device, generator=generator)
    noise = write(noise, stories["drive"][every, which], stories["eyes"])
    level = sigma.view(-1, 1, 1, 1, 1)
    known = (torch.arange(clean.shape[2], device=device)[None] < given[:, None])[:, None, :, None, None]
    later = (starts > 0).view(-1, 1, 1, 1, 1)
    shown = torch.where(later, disturb(clean, settings.corrupt, generator), clean)
    sample = torch.where(known, shown, (1 - level) * clean + level * noise)
    mask = (~known).float().expand(-1, -1, -1, *clean.shape[3:])
    y = torch.cat([reference.expand_as(clean), mask], 1)
    weight = (1 + stories["weight"][every, which].float())[:, None] * mask
    keep_audio = (uniform() >= settings.drop_audio).float()[:, None, None]
    keep_text = uniform() >= settings.drop_text
    nothing = torch.zeros_like(stories["ids"])
    nothing[:, 0] = 1
    first = torch.zeros_like(stories["mask"])
    first[:, 0] = 1
    return {
        "sample": sample,
        "y": y,
        "timestep": 1000 * sigma,
        "target": noise - clean,
        "weight": weight / weight.mean(),
        "audio": window_audio(stories["audio"], starts) * keep_audio,
        "ids": torch.where(keep_text[:, None], stories["ids"], nothing),
        "mask": torch.where(keep_text[:, None], stories["mask"], first),
    }


def compiled_blocks(dit: WanDiT) -> RunBlocks:
    """`WanDiT.run_blocks` with compiled blocks: two graphs, with and without audio."""
    blocks = [torch.compile(block) for block in dit.blocks]

    def run_blocks(tokens: Tensor, inputs: BlockInputs) -> Tensor:
        for block, text, audio in zip(blocks, inputs.text, inputs.audio, strict=True):
            tokens = block(tokens, inputs.modulation, inputs.rope, text, audio, dit.attention)
        return tokens

    return run_blocks


def dit_loss(
    dit: WanDiT,
    text: PromptEncoder,
    batch: dict[str, Tensor],
    steady: float,
    run_blocks: RunBlocks | None = None,
) -> Tensor:
    """Weighted squared error of the velocity, and `steady` times that of its change from latent frame to
    latent frame."""
    embedding = text(batch["ids"], batch["mask"])
    made = dit(
        batch["sample"],
        batch["y"],
        batch["timestep"],
        dit.prepare_text(embedding),
        dit.prepare_audio(batch["audio"]),
        run_blocks,
    )
    error = made.float() - batch["target"]
    return weighted_loss(error, batch["weight"], steady)


def weighted_loss(error: Tensor, weight: Tensor, steady: float) -> Tensor:
    """Weighted squared error (B, C, T, h, w), and `steady` times that of its change from latent to latent."""
    loss = (error.square() * weight).mean()
    return loss + steady * 0.5 * unsteadiness(error, weight, 2) if steady else loss


def unsteadiness(error: Tensor, weight: Tensor, dim: int) -> Tensor:
    """Weighted square of the change of an error (B, C, T, h, w) between neighbours along `dim`."""
    count = weight.shape[dim] - 1
    both = torch.minimum(weight.narrow(dim, 1, count), weight.narrow(dim, 0, count))
    return (error.diff(dim=dim).square() * both).mean()


def drive_of(takes: list[Take], device: torch.device) -> Tensor:
    """The drive (B, L, K) of takes of equal length."""
    return torch.from_numpy(np.stack([take.drive for take in takes])).to(device)


@torch.no_grad()
def measure(nets: Nets, stories: dict[str, Tensor], settings: DitSettings, device: torch.device) -> float:
    """Loss on held-out stories, with the same noise in every call."""
    generator = torch.Generator(device).manual_seed(5)
    total = 0.0
    for _ in range(4):
        batch = dit_batch(stories, settings, generator)
        with mixed(device):
            total += float(dit_loss(nets.dit, nets.text, batch, 0.0)) / 4
    return total


def train_dit(
    nets: Nets,
    studio: Studio,
    held_out: Film,
    takes_held_out: list[Take],
    settings: DitSettings,
    budget: Budget,
    log: Log,
    seed: int,
    keep: Callable[[], None],
) -> None:
    """Train the DiT and the prompt encoder until the budget is over and leave the averaged weights in `nets`.

    keep: called at each measurement, while `nets` hold the averaged weights.
    """
    device = studio.device
    generator, others = (torch.Generator(device).manual_seed(seed + n) for n in (0, 1))
    nets.vae.eval()
    nets.audio.eval()
    optimiser = Optimiser({"dit": nets.dit, "text": nets.text}, settings, budget)
    run_blocks = compiled_blocks(nets.dit) if settings.compile else None
    pool = Pool(settings.pool)

    def make(count: int) -> dict[str, Tensor]:
        takes, people_seed = studio.cast(count)
        looks = studio.people(count, people_seed)
        starts = draw_starts(count, settings.windows, settings.frames, others)
        last = film_doubles(studio, takes, looks, people_seed, starts[:, -1]) if settings.doubles else None
        story = Story(studio.film_people(takes, looks), starts, drive_of(takes, device), last)
        if settings.mirror:
            story = Story.join(story, mirrored(story, others))
        return stories_of(story, nets, settings, others)

    def loss_of(batch: dict[str, Tensor]) -> Tensor:
        with mixed(device, cached=False):
            return dit_loss(nets.dit, nets.text, batch, settings.steady, run_blocks)

    def draw() -> dict[str, Tensor]:
        return dit_batch(pool.draw(settings.batch, generator), settings, generator)

    def measured_now(**values: float) -> None:
        optimiser.average.swap()
        reached = measure(nets, test, settings, device)
        log.add("dit", budget, optimiser.steps, held_out=reached, clips=pool.filled, **values)
        keep()
        optimiser.average.swap()

    pool.fill(make, 8, budget, settings.fill_share)
    same = torch.Generator(device).manual_seed(6)
    starts = draw_starts(len(held_out.frames), settings.windows, held_out.frames.shape[1], same)
    told = Story(held_out, starts, drive_of(takes_held_out, device), None)
    test = stories_of(told, nets, settings, same)
    measured_now()
    step = stepper(loss_of, draw, optimiser, settings.graph)
    measured, mean = budget.spent, None
    with Supply(make, settings.fresh, device) if settings.fresh else nullcontext() as supply:
        while not budget.over:
            loss = step()
            mean = loss.clone() if mean is None else mean.lerp_(loss, 0.02)
            if supply is not None and optimiser.steps % settings.fresh_every == 0:
                clips = supply.take()
                if clips is not None:
                    pool.add(clips)
            if budget.measuring(measured, settings.measure_seconds, optimiser.steps):
                measured = budget.spent
                measured_now(loss=mean.item())
    optimiser.average.swap()
