"""Measures how fast this machine renders, encodes and trains.

`python -m training.speed` prints one line per part with its peak memory: rendering and its parts, VAE steps,
VAE encoding, DiT steps plain and compiled.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import torch

from omniavatar.checkpoint.layout_files import TOKENIZER
from training.drive import SIGNALS
from training.head import Head
from training.looks import draw_looks
from training.loop import mixed
from training.nets import Nets, channels_last, normalised_latents
from training.render import Performance, Renderer
from training.scale import LATENTS, POCKET, SIZE, WINDOW
from training.settings import Settings, read_settings
from training.stage_dit import compiled_blocks, dit_batch, dit_loss
from training.stage_vae import to_pixels, vae_loss

FOLDER = Path(__file__).parent


def timed(name: str, unit: str, amount: float, repeats: int, work: Callable[[], object]) -> None:
    """Print the seconds of `work` and `amount` per second, after one warm-up call."""
    cuda = torch.cuda.is_available()
    work()
    if cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    began = time.perf_counter()
    for _ in range(repeats):
        work()
    if cuda:
        torch.cuda.synchronize()
    seconds = (time.perf_counter() - began) / repeats
    peak = f", peak {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB" if cuda else ""
    print(f"{name:24} {seconds * 1000:9.1f} ms   {amount / seconds:9.1f} {unit}/s{peak}", flush=True)


def kernels(name: str, work: Callable[[], object], rows: int = 14) -> None:
    """Print the kernels that take most of the GPU time of `work`."""
    work()
    activities = [torch.profiler.ProfilerActivity.CUDA, torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities) as trace:
        work()
        torch.cuda.synchronize()
    table = trace.key_averages().table(
        sort_by="self_device_time_total", row_limit=rows, max_name_column_width=60
    )
    print(f"{name}\n{table}", flush=True)


def measure(settings: Settings, device: torch.device, repeats: int, profile: bool) -> None:
    """Print all timings for the batch sizes in `settings`."""
    head = Head(device)
    renderer = Renderer(head, SIZE)
    clips = settings.vae.batch
    looks = draw_looks(head, clips, 0)
    length = settings.vae.clip
    coefficients = torch.rand(clips, length, 52, device=device) * 0.2
    still = torch.zeros(clips, length, 2, device=device)
    performance = Performance(coefficients, torch.zeros(clips, length, 3, device=device), still, still)
    timed("looks", "people", clips, repeats, lambda: draw_looks(head, clips, 0))
    timed("render", "frames", clips * length, repeats, lambda: renderer.frames(looks, performance))
    if profile:
        kernels("render", lambda: renderer.frames(looks, performance))
    frames, _ = renderer.frames(looks, performance)
    nets = Nets.fresh(0, FOLDER / "assets" / TOKENIZER).to(device)
    if device.type == "cuda":
        channels_last(nets.vae)
    pixels = to_pixels(frames[..., : settings.vae.crop, : settings.vae.crop])
    weight = torch.ones(clips, length, *pixels.shape[-2:], device=device)

    def vae_step() -> None:
        with mixed(device):
            loss, _ = vae_loss(nets.vae, pixels, weight, settings.vae)
        loss.backward()

    timed("VAE step", "clips", clips, repeats, vae_step)
    window = torch.zeros(min(8, clips), 3, WINDOW, SIZE, SIZE, device=device)

    def encode() -> None:
        with torch.no_grad(), mixed(device):
            normalised_latents(nets.vae, window)

    timed("VAE encode", "windows", len(window), repeats, encode)
    batch = settings.dit.batch
    cells = SIZE // 8
    ids = torch.full((batch, 160), 5, device=device)
    stories = {
        "latents": torch.randn(batch, 2, 16, LATENTS, cells, cells, device=device).half(),
        "weight": torch.ones(batch, 2, LATENTS, cells, cells, device=device).half(),
        "starts": torch.tensor([[0, 9]] * batch, device=device),
        "drive": torch.randn(batch, 2, LATENTS, len(SIGNALS), device=device),
        "eyes": torch.tensor([[8.0, 9.0], [15.0, 9.0]], device=device).expand(batch, -1, -1),
        "audio": torch.randn(batch, settings.dit.frames - 1, POCKET.dit.audio_dim, device=device).half(),
        "ids": ids,
        "mask": (ids > 0).long(),
    }
    examples = dit_batch(stories, settings.dit, torch.Generator(device).manual_seed(0))
    for name, run_blocks in (("plain", None), ("compiled", compiled_blocks(nets.dit))):
        if name == "compiled" and not settings.dit.compile:
            continue

        def dit_step(run_blocks=run_blocks) -> None:  # type: ignore[no-untyped-def]
            with mixed(device):
                loss = dit_loss(nets.dit, nets.text, examples, settings.dit.steady, run_blocks)
            loss.backward()

        timed(f"DiT step, {name}", "windows", batch, repeats, dit_step)
        if profile:
            kernels(f"DiT step, {name}", dit_step)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", type=Path, default=FOLDER / "configs" / "pocket.yaml")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--profile", action="store_true", help="also print the slowest GPU kernels")
    arguments = parser.parse_args()
    torch.backends.cudnn.benchmark = True
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    measure(read_settings(arguments.config), device, arguments.repeats, arguments.profile)


if __name__ == "__main__":
    main()
