"""Seconds a forward and peak memory of the full-size models with random weights, on one CUDA device.

    python -m benchmarks engine [--scales 1.3B,14B] [--tokens 30000,15000] [--repeats 5]

`--tokens` are `max_tokens` values at 400x720 (30000: 30,375 tokens; 15000: 15,750). Prints a table with
medians and spreads, then one line of JSON.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch

from benchmarks.shared.options import add_repeats, make_parser, numbers, words
from benchmarks.shared.report import print_result, print_table, spread
from benchmarks.shared.timing import require_cuda, timed
from omniavatar.accel.attention.registry import create_attention
from omniavatar.checkpoint.dit import random_dit
from omniavatar.checkpoint.layout import scale_spec
from omniavatar.checkpoint.vae import random_vae
from omniavatar.sampling.windows import window_length

SIZE = (400, 720)


@torch.inference_mode()
def measure(scale: str, max_tokens: list[int], repeats: int, backend: str) -> list[dict]:
    """One row for each number of tokens."""
    device, dtype = torch.device("cuda"), torch.bfloat16
    name, attention = create_attention(backend, device, dtype)
    spec = scale_spec(scale)
    begun = time.perf_counter()
    dit = random_dit(spec.dit, attention=attention, dtype=dtype, device=device, seed=0)
    vae = random_vae(spec.vae, dtype=dtype, device=device, seed=0)
    torch.cuda.synchronize()
    made = time.perf_counter() - begun
    rows = []
    for tokens in max_tokens:
        torch.cuda.reset_peak_memory_stats()
        length = window_length(tokens, *SIZE)
        latents = (length + 3) // 4
        shape = (latents, SIZE[0] // 8, SIZE[1] // 8)
        sample = torch.randn(1, 16, *shape, device=device)
        y = torch.randn(1, 17, *shape, device=device)
        text = dit.prepare_text(torch.randn(1, 512, spec.dit.text_dim, device=device))
        audio = dit.prepare_audio(torch.randn(1, length, spec.dit.audio_dim, device=device))
        timestep = torch.tensor([800.0], device=device)
        forward = timed(lambda: dit(sample, y, timestep, text, audio), repeats)  # noqa: B023
        peak = torch.cuda.max_memory_allocated()
        finite = bool(dit(sample, y, timestep, text, audio).isfinite().all())
        torch.cuda.reset_peak_memory_stats()

        def decode() -> None:
            for _ in vae.decode_stream(sample):  # noqa: B023
                pass

        decoding = timed(decode, repeats)
        rows.append(
            {
                "scale": scale,
                "frames": length,
                "tokens": latents * (SIZE[0] // 16) * (SIZE[1] // 16),
                "attention": name,
                "forward_s": forward.median,
                "forward_min_s": forward.fastest,
                "forward_max_s": forward.slowest,
                "decode_s": decoding.median,
                "decode_min_s": decoding.fastest,
                "decode_max_s": decoding.slowest,
                "peak_gib": peak / 2**30,
                "decode_peak_gib": torch.cuda.max_memory_allocated() / 2**30,
                "weights_made_s": made,
                "finite": finite,
            }
        )
    return rows


def main(arguments: Sequence[str] | None = None) -> None:
    parser = make_parser(__name__, __doc__)
    parser.add_argument("--scales", type=words, default=["1.3B", "14B"])
    parser.add_argument("--tokens", type=numbers, default=[30000, 15000])
    add_repeats(parser)
    parser.add_argument("--attention", default="auto")
    options = parser.parse_args(arguments)
    require_cuda()
    rows: list[dict] = []
    for scale in options.scales:
        rows += measure(scale, options.tokens, options.repeats, options.attention)
        torch.cuda.empty_cache()
    heads = ["model", "tokens", "attention", "forward s (min..max)", "decode s (min..max)", "peak GiB"]
    print_table(heads, map(cells, rows))
    print_result("engine", repeats=options.repeats, rows=rows)


def cells(row: dict) -> list[str]:
    """A row of the table."""
    forward = spread(row["forward_s"], row["forward_min_s"], row["forward_max_s"])
    decode = spread(row["decode_s"], row["decode_min_s"], row["decode_max_s"], digits=2)
    return [row["scale"], f"{row['tokens']:,}", row["attention"], forward, decode, f"{row['peak_gib']:.1f}"]
