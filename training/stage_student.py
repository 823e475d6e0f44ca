"""The block-causal student of the DiT, for live use: one step or two, no guidance, blocks from a cache.

It starts as the packaged DiT and learns the film itself. That is possible because the noise carries what
happens by chance, and because the pose is a function of the noise in hand (`training.live_drive`): the film
is what should follow, whatever the student made before. So it learns from its own roll-outs without the film
leaving them behind, and one step has little to average over (docs/lab_notes.md says what went wrong with the
drive of the packaged model). `student_batch` says what an example is.
Sound is encoded block by block, as in a live session: a block hears two frames beyond its end.
Sources: Self Forcing (arXiv 2506.08009), diffusion forcing (arXiv 2407.01392), DAgger (arXiv 1011.0686).

Shapes: B stories, T latent frames.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext

import torch
from torch import Tensor

from omniavatar.model.dit import RunBlocks, TextState, WanDiT
from training.causal import block_causal, blocks_runner, roll_out, velocity
from training.graphed import stepper
from training.live_drive import carried_noise
from training.loop import Budget, Log, Optimiser, Pool, mixed
from training.nets import Nets, PromptEncoder, pixels_of
from training.sample import Sampled, compared
from training.scale import SIZE
from training.settings import StudentSettings
from training.stage_dit import Story, drive_of, mirrored
from training.student_batch import (
    robust_loss,
    roughness,
    schedule_of,
    student_batch,
    told,
    window_of,
)
from training.studio import Film, Studio
from training.supply import Supply
from training.takes import Take

TOKENS = (SIZE // 16) ** 2
"""Of one latent frame."""


def student_loss(
    dit: WanDiT,
    text: PromptEncoder,
    batch: dict[str, Tensor],
    settings: StudentSettings,
    run_blocks: RunBlocks,
) -> Tensor:
    """Loss of a batch of `student_batch`, see `robust_loss`."""
    with torch.no_grad():
        embedding = text(batch["ids"], batch["mask"])
    made = velocity(
        dit,
        batch["finished"],
        batch["sample"],
        batch["portrait"],
        batch["first"],
        batch["timestep"],
        dit.prepare_text(embedding),
        batch["audio"],
        run_blocks,
    )
    return robust_loss(made - batch["target"], batch["weight"], settings)


@torch.no_grad()
def rolled(
    nets: Nets,
    stories: dict[str, Tensor],
    settings: StudentSettings,
    steps: int,
    generator: torch.Generator,
) -> Tensor:
    """What the student makes of stories of the pool on its own (B, 16, T, h, w), as in a live session."""
    latents = stories["latents"]
    noise = carried_noise(stories["drive"], stories["eyes"], *latents.shape[3:], generator)
    with mixed(latents.device, cached=False):
        text: TextState = nets.dit.prepare_text(nets.text(stories["ids"], stories["mask"]))
        return roll_out(
            nets.dit,
            window_of(settings),
            schedule_of(settings, steps),
            latents[:, :, :1].float(),
            text,
            stories["audio"].float(),
            noise,
            generator,
            text[0][0].dtype,
        )


@torch.no_grad()
def show(nets: Nets, film: Film, made: Tensor) -> Sampled:
    """Frames of rolled-out stories beside the film's."""
    with mixed(made.device, cached=False):
        pixels = torch.cat([pixels_of(nets.vae, row[None]).float().clamp(-1, 1) for row in made.float()])
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
    attend = block_causal(window_of(settings), settings.block * TOKENS, settings.run // settings.block)
    run_blocks = blocks_runner(nets.dit, attend, settings.compile)
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
            return student_loss(nets.dit, nets.text, batch, settings, run_blocks)

    def draw() -> dict[str, Tensor]:
        return student_batch(pool.draw(settings.batch, generator), settings, generator)

    def renew_own() -> None:
        rows = torch.randperm(pool.filled, device=device, generator=generator)[: settings.own]
        stories = {name: value[rows] for name, value in pool.tensors.items()}
        pool.tensors["own"][rows] = rolled(nets, stories, settings, 1, generator).half()
        pool.tensors["made"][rows] = 1

    def measured_now(**values: float) -> None:
        optimiser.average.swap()
        true, weight = test["latents"].float(), 1 + test["weight"].float()[:, None]
        lids = (test["weight"] > settings.blinks / 2).float()[:, None]
        unmoved = ((true - true.roll(settings.block, 2)).square() * lids).sum()
        reached = {}
        for steps in range(1, len(settings.timesteps) + 1):
            made = rolled(nets, test, settings, steps, torch.Generator(device).manual_seed(5))
            error = ((made - true).square() * weight).mean() / weight.mean()
            last = slice(-settings.block, None)
            reached |= {
                f"rolled{steps}": float(error),
                f"blinks{steps}": float(((made - true).square() * lids).sum() / unmoved),
                f"tail{steps}": float((made - true)[:, :, last].square().mean()),
                f"sharp{steps}": float(roughness(made[:, :, last]) / roughness(true[:, :, last])),
            }
            if steps == 1:
                shown = show(nets, held_out, made)
                reached |= {"mouth_r": shown.mouth_r, "eyes_r": shown.eyes_r, "psnr": shown.psnr}
        log.add("student", budget, optimiser.steps, **reached, clips=pool.filled, **values)
        keep()
        optimiser.average.swap()

    pool.fill(make, 4, budget, settings.fill_share)
    same = torch.Generator(device).manual_seed(6)
    test = told(held_out, drive_of(takes_held_out, device), nets, settings, same)
    if budget.ranks.leads:
        measured_now()
    step = stepper(loss_of, draw, optimiser, settings.graph)
    measured, mean = budget.spent, None
    with Supply(make, settings.fresh, device) if settings.fresh else nullcontext() as supply:
        while not budget.over:
            if optimiser.steps % settings.own_every == 0 and optimiser.steps:
                renew_own()
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
