"""The block-causal student of the DiT, for live use: few steps, no guidance, blocks from a cache.

It starts as the packaged DiT and learns the film itself. That is possible because the noise carries what
happens by chance (`training.drive`): what is left to average over is small, so few steps are enough, and what
the sampler's seed decides still happens. Only pure noise carries it: later steps add fresh noise, so there
the model must go by what is left of the picture.

What it sees of earlier blocks is the film's or its own, block by block at random. Its own are made from such
a mixture again, so errors of several blocks occur, but the film's blocks between them keep what follows in
step with the film. Whole stories of its own do not: once it has left the film's pose, the film says nothing
about what should follow, and the mean of all poses is a blurred face, which leads to more blur
(docs/lab_notes.md). For the same reason later steps start from the noisy film and not from its own first
step: that teaches them to make a picture sharp, not to average.
Sound is encoded block by block, as in a live session: a block hears two frames beyond its end.
Sources: Self Forcing (arXiv 2506.08009), diffusion forcing (arXiv 2407.01392), DAgger (arXiv 1011.0686).

Shapes: B stories, T latent frames, N = 4T-3 video frames, D audio width, K signals, h w latent pixels.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext

import torch
from torch import Tensor

from omniavatar.encoders.live_audio import AHEAD_FRAMES
from omniavatar.model.dit import RunBlocks, TextState, WanDiT
from omniavatar.sampling.causal import CausalWindow
from omniavatar.sampling.denoise import denoise
from omniavatar.sampling.schedule import Schedule, make_schedule
from omniavatar.sampling.windows import block_frames
from training.augment import roughen
from training.causal import block_causal, blocks_runner, roll_out, velocity
from training.drive import write
from training.loop import Budget, Log, Optimiser, Pool, mixed
from training.nets import AudioTrainer, Nets, PromptEncoder, normalise_sound, normalised_latents, pixels_of
from training.sample import Sampled, compared
from training.scale import SIZE
from training.settings import StudentSettings
from training.stage_dit import (
    PROMPT_TOKENS,
    SHIFT,
    Story,
    disturb,
    drive_of,
    face_weight,
    mirrored,
    weighted_loss,
)
from training.stage_vae import to_pixels
from training.studio import Film, Studio
from training.supply import Supply
from training.takes import SAMPLES_A_FRAME, Take

TINT = 0.05
"""Standard deviation of a constant added to each channel of disturbed latents, which changes colours."""
SOFTEST = 0.6
"""Most of the mean of its neighbours in a disturbed latent pixel."""
TOKENS = (SIZE // 16) ** 2
"""Of one latent frame."""


def window_of(settings: StudentSettings) -> CausalWindow:
    """The attention window of the student."""
    return CausalWindow(settings.block, settings.window, settings.sink)


def schedule_of(settings: StudentSettings) -> Schedule:
    """The noise levels of its steps."""
    return make_schedule(len(settings.timesteps), SHIFT, tuple(settings.timesteps))


def heard_live(audio: AudioTrainer, sound: Tensor, frames: int, block: int) -> Tensor:
    """Audio vectors (B, N-1, D) of waveforms (B, S), each block encoded from the sound until its end.

    It is what `omniavatar.encoders.live_audio` makes, for stories shorter than its memory.

    frames: N.
    block: latents of a block.
    """
    rows, number = [], 0
    while (begun := sum(part.shape[1] for part in rows)) < frames - 1:
        end = begun + block_frames(number, block) - (not number)
        until = min(end + AHEAD_FRAMES, frames - 1)
        states = audio.features(normalise_sound(sound[:, : until * SAMPLES_A_FRAME]), until)
        rows.append(states[:, begun:end])
        number += 1
    return torch.cat(rows, 1)


@torch.no_grad()
def told(
    film: Film, drive: Tensor, nets: Nets, settings: StudentSettings, generator: torch.Generator
) -> dict[str, Tensor]:
    """The tensors of filmed stories for the pool.

    Latents (B, 16, T, h, w), what the student makes of them (`own_blocks`) and whether it did (B,), loss
    weights (B, T, h, w), drive (B, T, K), eyes (B, 2, 2), audio (B, N, D), prompt tokens.
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
    room = (0, PROMPT_TOKENS - ids.shape[1])
    return {
        "latents": latents,
        "own": latents,
        "made": torch.zeros(count, device=device),
        "weight": face_weight(places, settings.mouth, settings.eyes)[:, 0].half(),
        "drive": drive,
        "eyes": film.eyes[:, 0] / (SIZE / latents.shape[-1]),
        "audio": torch.cat([torch.zeros_like(heard[:, :1]), heard], 1).half(),
        "ids": torch.nn.functional.pad(ids, room).to(device),
        "mask": torch.nn.functional.pad(mask, room).to(device),
    }


def worn(latents: Tensor, share: float, generator: torch.Generator) -> Tensor:
    """Latents (B, 16, T, h, w), most of them disturbed (`disturb`), in other colours and softer."""
    batch, channels = latents.shape[:2]
    hit, softness = torch.rand(2, batch, 1, 1, 1, 1, device=latents.device, generator=generator)
    colour = torch.randn(batch, channels, 1, 1, 1, device=latents.device, generator=generator)
    soft = torch.nn.functional.avg_pool3d(latents, (1, 3, 3), 1, (0, 1, 1), count_include_pad=False)
    changed = torch.lerp(latents, soft, SOFTEST * softness) + TINT * colour
    return disturb(torch.where(hit < share, changed, latents), share, generator)


def seen_blocks(stories: dict[str, Tensor], settings: StudentSettings, generator: torch.Generator) -> Tensor:
    """Finished blocks (B, 16, T, h, w), each the film's or the student's own."""
    true = stories["latents"].float()
    batch, latents = true.shape[0], true.shape[2]
    luck = torch.rand(batch, latents // settings.block, device=true.device, generator=generator)
    own = (luck >= settings.true_share) & (stories["made"] > 0)[:, None]
    chosen = own.repeat_interleave(settings.block, 1)[:, None, :, None, None]
    made = torch.where(chosen, stories["own"].float(), worn(true, settings.corrupt, generator))
    made[:, :, :1] = true[:, :, :1]
    return made


def student_batch(
    stories: dict[str, Tensor], settings: StudentSettings, generator: torch.Generator
) -> dict[str, Tensor]:
    """One training example per story, at one of the steps or any other noise level."""
    true = stories["latents"].float()
    batch, device = len(true), true.device
    steps = torch.tensor(schedule_of(settings).sigmas, device=device)
    u, choice = torch.rand(2, batch, device=device, generator=generator)
    drawn = torch.randint(len(steps), (batch,), device=device, generator=generator)
    sigma = torch.where(choice < settings.at_steps, steps[drawn], SHIFT * u / (1 + (SHIFT - 1) * u))
    level = sigma.view(-1, 1, 1, 1, 1)
    noise = torch.randn(true.shape, device=device, generator=generator)
    noise = torch.where(level == 1, write(noise, stories["drive"], stories["eyes"]), noise)
    sample = (1 - level) * true + level * noise
    sample[:, :, :1] = true[:, :, :1]
    weight = (1 + stories["weight"].float())[:, None].clone()
    weight[:, :, 0] = 0
    return {
        "finished": seen_blocks(stories, settings, generator),
        "sample": sample,
        "timestep": 1000 * sigma,
        "target": noise - true,
        "weight": weight / weight.mean(),
        **{name: stories[name] for name in ("audio", "ids", "mask")},
    }


@torch.no_grad()
def own_blocks(
    nets: Nets,
    stories: dict[str, Tensor],
    settings: StudentSettings,
    generator: torch.Generator,
    run_blocks: RunBlocks,
) -> Tensor:
    """What the student makes of all blocks (B, 16, T, h, w) at once, each after `seen_blocks`."""
    true = stories["latents"].float()
    finished, schedule = seen_blocks(stories, settings, generator), schedule_of(settings)
    signals = iter([stories["drive"]])

    def draw() -> Tensor:
        noise = torch.randn(true.shape, device=true.device, generator=generator)
        carried = next(signals, None)
        return noise if carried is None else write(noise, carried, stories["eyes"])

    with mixed(true.device, cached=False):
        text = nets.dit.prepare_text(nets.text(stories["ids"], stories["mask"]))

        def forward(sample: Tensor, step: int) -> Tensor:
            timestep = torch.full((len(true),), schedule.timesteps[step], device=true.device)
            return velocity(nets.dit, finished, sample, timestep, text, stories["audio"].float(), run_blocks)

        return denoise(forward, schedule, true[:, :, :1], draw, "causal")


def student_loss(
    dit: WanDiT, text: PromptEncoder, batch: dict[str, Tensor], steady: float, run_blocks: RunBlocks
) -> Tensor:
    """Weighted squared error of the velocity, and `steady` times that of its change from latent to latent."""
    with torch.no_grad():
        embedding = text(batch["ids"], batch["mask"])
    made = velocity(
        dit,
        batch["finished"],
        batch["sample"],
        batch["timestep"],
        dit.prepare_text(embedding),
        batch["audio"].float(),
        run_blocks,
    )
    error = made - batch["target"]
    return weighted_loss(error, batch["weight"], steady)


@torch.no_grad()
def rolled(
    nets: Nets, stories: dict[str, Tensor], settings: StudentSettings, generator: torch.Generator
) -> Tensor:
    """What the student makes of stories of the pool on its own (B, 16, T, h, w), as in a live session."""
    device = stories["latents"].device
    with mixed(device, cached=False):
        text: TextState = nets.dit.prepare_text(nets.text(stories["ids"], stories["mask"]))
        return roll_out(
            nets.dit,
            window_of(settings),
            schedule_of(settings),
            stories["latents"][:, :, :1].float(),
            text,
            stories["audio"].float(),
            stories["drive"],
            stories["eyes"],
            generator,
            text[0][0].dtype,
        )


def roughness(latents: Tensor) -> Tensor:
    """Mean square difference of neighbours in the last latents of stories; blurred faces have little."""
    last = latents[:, :, -1].float()
    return last.diff(dim=-1).square().mean() + last.diff(dim=-2).square().mean()


@torch.no_grad()
def show(nets: Nets, film: Film, made: Tensor) -> Sampled:
    """Frames of rolled-out stories beside the film's."""
    pixels = torch.cat([pixels_of(nets.vae, row[None]).clamp(-1, 1) for row in made.float()])
    return compared(((pixels.transpose(1, 2) + 1) * 127.5).round().to(torch.uint8), film)


def train_student(
    nets: Nets,
    studio: Studio,
    held_out: Film,
    takes_held_out: list[Take],
    settings: StudentSettings,
    budget: Budget,
    log: Log,
    seed: int,
    keep: Callable[[], None],
) -> None:
    """Train `nets.dit` as the student until the budget is over and leave the averaged weights in it.

    keep: called at each measurement, while `nets` hold the averaged weights.
    """
    device = studio.device
    generator, others = (torch.Generator(device).manual_seed(seed + n) for n in (0, 1))
    for fixed in (nets.vae, nets.audio, nets.text):
        fixed.eval().requires_grad_(False)
    blocks = (settings.frames + 3) // 4 // settings.block
    attend = block_causal(window_of(settings), settings.block * TOKENS, blocks)
    plain = blocks_runner(nets.dit, attend, False)
    run_blocks = blocks_runner(nets.dit, attend, True) if settings.compile else plain
    optimiser = Optimiser({"dit": nets.dit}, settings, budget)
    pool = Pool(settings.pool)

    def make(count: int) -> dict[str, Tensor]:
        takes, people_seed = studio.cast(count)
        film = studio.film_takes(takes, people_seed)
        drive = drive_of(takes, device)
        if settings.mirror:
            one = Story(film, torch.zeros(count, 1, dtype=torch.long, device=device), drive, None)
            both = Story.join(one, mirrored(one, others))
            film, drive = both.film, both.drive
        return told(film, drive, nets, settings, others)

    def loss_of(batch: dict[str, Tensor]) -> Tensor:
        with mixed(device, cached=False):
            return student_loss(nets.dit, nets.text, batch, settings.steady, run_blocks)

    def renew_own() -> None:
        rows = torch.randperm(pool.filled, device=device, generator=generator)[: settings.own]
        stories = {name: value[rows] for name, value in pool.tensors.items()}
        pool.tensors["own"][rows] = own_blocks(nets, stories, settings, generator, plain).half()
        pool.tensors["made"][rows] = 1

    def measured_now(**values: float) -> None:
        optimiser.average.swap()
        made = rolled(nets, test, settings, torch.Generator(device).manual_seed(5))
        true = test["latents"].float()
        weight = 1 + test["weight"].float()[:, None]
        error = float(((made - true).square() * weight).mean() / weight.mean())
        tail = float((made - true)[:, :, -settings.block :].square().mean())
        sharp = float(roughness(made) / roughness(true))
        shown = show(nets, held_out, made)
        log.add(
            "student", budget, optimiser.steps, rolled=error, tail=tail, sharp=sharp, mouth_r=shown.mouth_r,
            eyes_r=shown.eyes_r, psnr=shown.psnr, clips=pool.filled, **values,
        )  # fmt: skip
        keep()
        optimiser.average.swap()

    pool.fill(make, 4, budget, settings.fill_share)
    same = torch.Generator(device).manual_seed(6)
    test = told(held_out, drive_of(takes_held_out, device), nets, settings, same)
    measured_now()
    measured, mean = budget.spent, None
    with Supply(make, settings.fresh, device) if settings.fresh else nullcontext() as supply:
        while not budget.over:
            if optimiser.steps % settings.own_every == 0:
                renew_own()
            loss = loss_of(student_batch(pool.draw(settings.batch, generator), settings, generator))
            optimiser.step(loss)
            loss = loss.detach()
            mean = loss.clone() if mean is None else mean.lerp_(loss, 0.02)
            if supply is not None and optimiser.steps % settings.fresh_every == 0:
                clips = supply.take()
                if clips is not None:
                    pool.add(clips)
            if budget.measuring(measured, settings.measure_seconds, optimiser.steps):
                measured = budget.spent
                measured_now(loss=mean.item())
    optimiser.average.swap()
