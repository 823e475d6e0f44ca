"""Blocks of a block-causal video at full size with random weights: the DiT's passes, decoding, both at once.

    python -m benchmarks live [--scale 1.3B] [--size 512x512] [--blocks 20] [--variants bf16,fp8]

The released student's form: blocks of 3 latents (12 frames), a window of 15, a sink of 9, four steps and the
pass that writes the cache. A block is timed from audio vectors on the device to frames (uint8) on the host.
`passes`: the DiT's alone. `in turn`: then decoded. `beside`: decoded on another stream beside the next block.
`beside` gives the frames a second of an endless video; `in turn` the delay of a block.
Error: relative L2 of the sixth block's latents against the same weights, eager and in float32.
Prints a table, then one line of JSON.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.shared.options import make_parser, size_of, words
from benchmarks.shared.report import print_result, print_table, spread
from benchmarks.shared.timing import quantile, require_cuda
from omniavatar.accel.apply import AccelConfig, apply_accelerations, row_dtype
from omniavatar.accel.attention.registry import ATTENTION, create_attention
from omniavatar.accel.decoder import apply_decoder
from omniavatar.accel.graphs import CudaCapture, GraphedBlocks
from omniavatar.accel.kernels.fused import create_fused
from omniavatar.accel.vae import FastVAEConfig, apply_fast_vae
from omniavatar.checkpoint.dit import random_dit
from omniavatar.checkpoint.layout import scale_spec
from omniavatar.checkpoint.tiny_decoder import random_tiny_decoder
from omniavatar.checkpoint.vae import random_vae
from omniavatar.engine.block_loop import BlockGenerator
from omniavatar.model.dit import WanDiT
from omniavatar.model.sizes import VAEConfig
from omniavatar.model.tiny_decoder import TinyDecoderConfig
from omniavatar.model.vae import DecodeMore, VideoDecoder
from omniavatar.sampling.causal import CausalWindow
from omniavatar.sampling.schedule import make_schedule

CUDA, DTYPE = torch.device("cuda"), torch.bfloat16
WINDOW = CausalWindow(block=3, window=15, sink=9)
SCHEDULE = make_schedule(4, 5.0)
FRAMES = 4 * WINDOW.block
VARIANTS = {"bf16": AccelConfig("none", True), "fp8": AccelConfig("fp8", True)}
CHECKED = 6


def random(shape: Sequence[int], seed: int) -> Tensor:
    return torch.randn(tuple(shape), generator=torch.Generator(CUDA).manual_seed(seed), device=CUDA)


class Video:
    """A generator with the inputs of its blocks."""

    def __init__(self, dit: WanDiT, size: tuple[int, int], dtype: torch.dtype, graphs: bool) -> None:
        self.dit = dit
        reference = random((1, 16, 1, size[0] // 8, size[1] // 8), 1)
        capture = CudaCapture() if graphs else None
        options: dict[str, Any] = {}
        if capture is not None:
            options["wrap"] = lambda run: GraphedBlocks(run, capture)
        text = dit.prepare_text(random((1, 512, dit.config.text_dim), 2))
        self.generator = BlockGenerator(dit, reference, text, SCHEDULE, WINDOW, dtype, **options)

    def block(self) -> Tensor:
        """The latents of the next block."""
        made = self.generator
        audio = random((1, made.audio_rows(made.done), self.dit.config.audio_dim), 10 + made.done)
        noise = (random(made.shape, 1000 * made.done + number) for number in range(len(SCHEDULE)))
        return made.make(audio, lambda: next(noise))


def to_host(clip: DecodeMore, latent: Tensor) -> list[Tensor]:
    """Frames (n, H, W, 3) uint8 on the host; the copies are queued."""
    frames = []
    for pixels in clip(latent):
        shown = pixels[0].permute(1, 2, 3, 0).add(1).mul_(127.5).round_().clamp_(0, 255).to(torch.uint8)
        host = torch.empty(shown.shape, dtype=torch.uint8, pin_memory=True)
        frames.append(host.copy_(shown, non_blocking=True))
    return frames


def in_turn(video: Video, clip: DecodeMore) -> list[Tensor]:
    """The next block's frames, decoded after its passes."""
    return to_host(clip, video.block())


def times_of(step: Callable[[], object], blocks: int) -> list[float]:
    """Seconds of each of `blocks` calls, the device waited for."""
    times = []
    for _ in range(blocks):
        torch.cuda.synchronize()
        begun = time.perf_counter()
        step()
        torch.cuda.synchronize()
        times.append(time.perf_counter() - begun)
    return times


def beside(video: Video, clip: DecodeMore, blocks: int) -> list[float]:
    """Seconds from block to block while each is decoded on another stream beside the next one's passes."""
    decoding, finished = torch.cuda.Stream(), []
    torch.cuda.synchronize()
    times, before, waiting = [], time.perf_counter(), None
    for _ in range(blocks + 1):
        latent = video.block()
        made = torch.cuda.Event()
        made.record()
        with torch.cuda.stream(decoding):
            decoding.wait_event(made)
            latent.record_stream(decoding)
            finished.append(to_host(clip, latent))
            shown = torch.cuda.Event()
            shown.record()
        if waiting is not None:  # at most one block is queued ahead
            waiting.synchronize()
            now = time.perf_counter()
            times.append(now - before)
            before = now
        waiting = shown
        finished = finished[-2:]
    torch.cuda.synchronize()
    return times[1:]


def decoders() -> dict[str, VideoDecoder]:
    """The full VAE and the small decoder, in bf16."""
    vae = random_vae(VAEConfig(), dtype=DTYPE, device=CUDA, seed=0)
    full = apply_fast_vae(vae, FastVAEConfig(latents_at_once=WINDOW.block))
    small = random_tiny_decoder(
        TinyDecoderConfig(latents_at_once=WINDOW.block), dtype=DTYPE, device=CUDA, seed=0
    )
    return {"full": full, "taehv": apply_decoder(full, small)}


def expected_latent(scale: str, size: tuple[int, int]) -> Tensor:
    """The checked block of the same weights in float32, eager."""
    _, attention = create_attention("efficient", CUDA, torch.float32)
    dit = random_dit(scale_spec(scale).dit, attention=attention, dtype=DTYPE, device=CUDA, seed=0).float()
    video = Video(dit, size, torch.float32, graphs=False)
    return [video.block() for _ in range(CHECKED)][-1]


@torch.inference_mode()
def measure(scale: str, size: tuple[int, int], blocks: int, variants: Sequence[str]) -> list[dict[str, Any]]:
    expected = expected_latent(scale, size)
    torch.cuda.empty_cache()
    backend = "fa3" if "fa3" in ATTENTION.available(CUDA) else "cudnn"
    rows = []
    for name in variants:
        config = VARIANTS[name]
        _, attention = create_attention(backend, CUDA, DTYPE)
        dit = random_dit(scale_spec(scale).dit, attention=attention, dtype=DTYPE, device=CUDA, seed=0)
        apply_accelerations(dit, config, create_fused(CUDA, row_dtype(config.quantize)))
        video = Video(dit, size, DTYPE, graphs=True)
        made = [video.block() for _ in range(CHECKED)][-1]
        error = ((made - expected).norm() / expected.norm()).item()
        for _ in range(4):  # both slots' passes are captured
            video.block()
        torch.cuda.reset_peak_memory_stats()
        passes = times_of(video.block, blocks)
        for decoder, vae in decoders().items():
            clip = vae.begin_clip()
            to_host(clip, video.block())
            turn = times_of(partial(in_turn, video, clip), blocks)
            along = beside(video, clip, blocks)
            row = {
                "variant": name,
                "attention": backend,
                "decoder": decoder,
                "error": error,
                "passes_s": summary(passes),
                "in_turn_s": summary(turn),
                "beside_s": summary(along),
                "frames_per_second": FRAMES / statistics.median(along),
                "p99_over_median": quantile(along, 0.99) / statistics.median(along),
                "peak_gib": torch.cuda.max_memory_allocated() / 2**30,
            }
            rows.append(row)
            print(row, flush=True)
        dit = video = clip = None
        torch.cuda.empty_cache()
    return rows


def summary(times: list[float]) -> list[float]:
    return [statistics.median(times), min(times), max(times)]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = make_parser(__name__, __doc__)
    parser.add_argument("--scale", default="1.3B")
    parser.add_argument("--size", type=size_of, default="512x512", help="height x width")
    parser.add_argument("--blocks", type=int, default=20, help="timed blocks of each kind")
    parser.add_argument("--variants", type=words, default=list(VARIANTS))
    options = parser.parse_args(arguments)
    require_cuda()
    rows = measure(options.scale, options.size, options.blocks, options.variants)
    heads = ["layers", "attention", "decoder", "error", "passes, s", "in turn, s", "beside, s", "frames/s",
             "p99/median", "peak GiB"]  # fmt: skip
    print_table(heads, map(cells, rows))
    print_result("live", scale=options.scale, size=options.size, blocks=options.blocks, rows=rows)


def cells(row: dict[str, Any]) -> list[str]:
    """A row of the table."""
    times = [spread(*row[key], digits=4) for key in ("passes_s", "in_turn_s", "beside_s")]
    return [
        row["variant"], row["attention"], row["decoder"], f"{row['error']:.1e}", *times,
        f"{row['frames_per_second']:.1f}", f"{row['p99_over_median']:.2f}", f"{row['peak_gib']:.1f}",
    ]  # fmt: skip
