"""Stage 3, the diffusion transformer with the prompt encoder: flow matching on latents of talking heads.

A clip in the pool is a story: the portrait, sound and prompt, and windows of the story as latents. The first
window starts at the portrait, the others at random frames. Each window is encoded separately, as in the
hand-over of the engine. In a later window the given latents often come from a double (`training.handover`) or
are disturbed (noise, and an offset and gain per channel). The model thus learns to return to the portrait
instead of drifting. For guidance, speech and prompt are dropped at random: speech becomes zero vectors, the
prompt becomes empty. Noise levels follow the engine's schedule with shift 5.

Shapes: B stories, W windows per story, T latent frames, N = 4T-3 video frames, D audio width, h w latent
pixels.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace

import torch
from torch import Tensor

from omniavatar.model.dit import RunBlocks, WanDiT
from omniavatar.model.layers import BlockInputs
from training.augment import roughen
from training.graphed import GraphedStep
from training.handover import GIVEN, film_doubles
from training.loop import Budget, Log, Optimiser, Pool
from training.nets import Nets, PromptEncoder, normalise_sound, normalised_latents
from training.scale import LATENTS, SIZE, WINDOW
from training.settings import DitSettings
from training.stage_vae import to_pixels
from training.studio import Film, Studio, mouth_weight
from training.supply import Supply

SHIFT = 5.0
PROMPT_TOKENS = 160
GIVEN_ODDS = (0.15, 0.60, 0.15, 0.10)


def mirrored(film: Film, handed: Tensor | None, generator: torch.Generator) -> tuple[Film, Tensor | None]:
    """The clips and their handed frames (B, W-1, F, 3, H, W), mirrored and in other light.

    Each clip has its own gain and offset per channel. This reuses clips, because rendering one takes three
    times as long as encoding its windows.
    """
    width = film.frames.shape[-1]
    count, device = len(film.frames), film.frames.device
    gain = 1 + 0.08 * torch.randn(count, 3, generator=generator, device=device)
    offset = 10 * torch.randn(count, 3, generator=generator, device=device)

    def seen(frames: Tensor) -> Tensor:
        shape = (count, *[1] * (frames.dim() - 4), 3, 1, 1)
        lit = frames.flip(-1) * gain.view(shape) + offset.view(shape)
        return lit.round_().clamp_(0, 255).to(torch.uint8)

    mouth = torch.stack([width - 1 - film.mouth[..., 0], film.mouth[..., 1]], -1)
    made = replace(film, frames=seen(film.frames), mouth=mouth)
    return made, None if handed is None else seen(handed)


def draw_starts(count: int, windows: int, frames: int, generator: torch.Generator) -> Tensor:
    """First frames (count, windows) of the windows in stories of `frames` frames; the first one is 0."""
    device = generator.device
    starts = torch.randint(1, frames - WINDOW + 1, (count, windows), generator=generator, device=device)
    starts[:, 0] = 0
    return starts


@torch.no_grad()
def stories_of(
    film: Film, starts: Tensor, handed: Tensor | None, nets: Nets, generator: torch.Generator
) -> dict[str, Tensor]:
    """The tensors of a film for the pool.

    Latents (B, W, 16, T, h, w), loss weights (B, W, T, h, w), first frames of the windows, audio vectors of
    the whole sound (B, frames - 1, D), prompt tokens and, if `handed` is given, latents of these frames
    (B, W-1, 16, GIVEN, h, w).

    starts: (B, W), first frames of the windows.
    """
    frames = film.frames.shape[1]
    device = film.frames.device
    count, windows = starts.shape
    rows = starts[..., None] + torch.arange(WINDOW, device=device)
    picked = film.frames[torch.arange(count, device=device)[:, None, None], rows].flatten(0, 1)
    mouths = film.mouth[torch.arange(count, device=device)[:, None, None], rows].flatten(0, 1)

    def coded(clips: Tensor) -> Tensor:
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            parts = clips.split(8 if device.type == "cuda" else 1)
            return torch.cat([normalised_latents(nets.vae, to_pixels(part)).half() for part in parts])

    groups = torch.cat([mouths[:, :1].expand(-1, 3, -1), mouths], 1).unflatten(1, (LATENTS, 4)).mean(2)
    weight = mouth_weight(groups, (SIZE // 8, SIZE // 8), 1 / 8, 1.0, 20.0) - 1
    sound = normalise_sound(roughen(film.sound, generator))
    ids, mask = nets.text.tokens(list(film.prompts))
    if ids.shape[1] > PROMPT_TOKENS:
        raise ValueError(f"a prompt has {ids.shape[1]} tokens; the maximum is {PROMPT_TOKENS}")
    room = (0, PROMPT_TOKENS - ids.shape[1])
    given = {} if handed is None else {"handed": coded(handed.flatten(0, 1)).unflatten(0, handed.shape[:2])}
    return given | {
        "latents": coded(picked).unflatten(0, (count, windows)),
        "weight": weight.half().unflatten(0, (count, windows)),
        "starts": starts,
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
    """Given latents (B, 16, G, h, w), most of them with noise and an offset and gain per channel."""
    batch, channels = given.shape[:2]

    def normal(*shape: int) -> Tensor:
        return torch.randn(batch, *shape, device=given.device, generator=generator)

    hit = (torch.rand(batch, 1, 1, 1, 1, device=given.device, generator=generator) < share).float()
    strength = hit * torch.rand(batch, 1, 1, 1, 1, device=given.device, generator=generator)
    coarse = torch.nn.functional.interpolate(
        normal(channels * given.shape[2], 6, 6), size=given.shape[-2:], mode="bilinear"
    ).view_as(given)
    fine = torch.randn(given.shape, device=given.device, generator=generator)
    offset, gain = normal(channels, 1, 1, 1), normal(channels, 1, 1, 1)
    return given * (1 + 0.08 * strength * gain) + strength * (0.1 * offset + 0.12 * fine + 0.12 * coarse)


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
    u = uniform()
    sigma = SHIFT * u / (1 + (SHIFT - 1) * u)
    noise = torch.randn(clean.shape, device=device, generator=generator)
    level = sigma.view(-1, 1, 1, 1, 1)
    known = (torch.arange(clean.shape[2], device=device)[None] < given[:, None])[:, None, :, None, None]
    later = (starts > 0).view(-1, 1, 1, 1, 1)
    shown = clean
    if "handed" in stories:
        doubled = (uniform() < settings.doubles).view(-1, 1, 1, 1, 1)
        handed = stories["handed"][every, (which - 1).clamp_min(0)].float()
        shown = torch.cat([torch.where(doubled, handed, clean[:, :, :GIVEN]), clean[:, :, GIVEN:]], 2)
    shown = torch.where(later, disturb(shown, settings.corrupt, generator), clean)
    sample = torch.where(known, shown, (1 - level) * clean + level * noise)
    mask = (~known).float().expand(-1, -1, -1, *clean.shape[3:])
    y = torch.cat([reference.expand_as(clean), mask], 1)
    weight = (1 + settings.mouth * stories["weight"][every, which].float())[:, None] * mask
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
    dit: WanDiT, text: PromptEncoder, batch: dict[str, Tensor], run_blocks: RunBlocks | None = None
) -> Tensor:
    """Weighted squared error of the velocity."""
    embedding = text(batch["ids"], batch["mask"])
    made = dit(
        batch["sample"],
        batch["y"],
        batch["timestep"],
        dit.prepare_text(embedding),
        dit.prepare_audio(batch["audio"]),
        run_blocks,
    )
    return ((made - batch["target"]).square() * batch["weight"]).mean()


@torch.no_grad()
def measure(nets: Nets, stories: dict[str, Tensor], settings: DitSettings, device: torch.device) -> float:
    """Loss on held-out stories, with the same noise in every call."""
    generator = torch.Generator(device).manual_seed(5)
    total = 0.0
    for _ in range(4):
        batch = dit_batch(stories, settings, generator)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            total += float(dit_loss(nets.dit, nets.text, batch)) / 4
    return total


def train_dit(
    nets: Nets,
    studio: Studio,
    held_out: Film,
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
        film = studio.film_people(takes, looks)
        starts = draw_starts(count, settings.windows, settings.frames, others)
        handed = film_doubles(studio, takes, looks, people_seed, starts) if settings.doubles else None
        if settings.mirror:
            seen, given = mirrored(film, handed, others)
            film, starts = Film.join([film, seen]), torch.cat([starts, starts])
            handed = None if given is None else torch.cat([handed, given])
        return stories_of(film, starts, handed, nets, others)

    def loss_of(batch: dict[str, Tensor]) -> Tensor:
        mixed = torch.autocast(
            device.type, torch.bfloat16, enabled=device.type == "cuda", cache_enabled=False
        )
        with mixed:
            return dit_loss(nets.dit, nets.text, batch, run_blocks)

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
    test = stories_of(held_out, starts, None, nets, same)
    measured_now()
    graphed = GraphedStep(loss_of, draw(), optimiser.parameters) if settings.graph else None
    measured, mean = budget.spent, None
    with Supply(make, settings.fresh, device) if settings.fresh else nullcontext() as supply:
        while not budget.over:
            if graphed is not None:
                loss = graphed(draw())
                optimiser.update()
            else:
                loss = loss_of(draw())
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
