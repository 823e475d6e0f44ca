"""Seconds a forward and peak memory of the full-size models with random weights, on one CUDA device.

    python benchmarks/engine.py [--scales 1.3B,14B] [--tokens 30000,15000] [--repeats 5]

`--tokens` are `max_tokens` values at 400x720 (30000: 30,375 tokens; 15000: 15,750). Warm-up, synchronisation,
median and spread; a table, then one line of JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time

import torch
from timing import timed, where

from omniavatar.accel.attention.registry import create_attention
from omniavatar.checkpoint.dit import random_dit
from omniavatar.checkpoint.layout import scale_spec
from omniavatar.checkpoint.vae import random_vae
from omniavatar.sampling.windows import window_length

SIZE = (400, 720)


@torch.inference_mode()
def measure(scale: str, max_tokens: list[int], repeats: int, backend: str) -> list[dict]:
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
                "forward_s": statistics.median(forward),
                "forward_min_s": min(forward),
                "forward_max_s": max(forward),
                "decode_s": statistics.median(decoding),
                "decode_min_s": min(decoding),
                "decode_max_s": max(decoding),
                "peak_gib": peak / 2**30,
                "decode_peak_gib": torch.cuda.max_memory_allocated() / 2**30,
                "weights_made_s": made,
                "finite": finite,
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--scales", default="1.3B,14B")
    parser.add_argument("--tokens", default="30000,15000")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--attention", default="auto")
    arguments = parser.parse_args()
    tokens = [int(value) for value in arguments.tokens.split(",")]
    rows: list[dict] = []
    for scale in arguments.scales.split(","):
        rows += measure(scale, tokens, arguments.repeats, arguments.attention)
        torch.cuda.empty_cache()
    print("| model | tokens | attention | forward s (min..max) | decode s (min..max) | peak GiB |")
    print("|---|---|---|---|---|---|")
    for row in rows:
        print(
            f"| {row['scale']} | {row['tokens']:,} | {row['attention']} "
            f"| {row['forward_s']:.3f} ({row['forward_min_s']:.3f}..{row['forward_max_s']:.3f}) "
            f"| {row['decode_s']:.2f} ({row['decode_min_s']:.2f}..{row['decode_max_s']:.2f}) "
            f"| {row['peak_gib']:.1f} |"
        )
    print(json.dumps({"benchmark": "engine", "repeats": arguments.repeats, **where(), "rows": rows}))


if __name__ == "__main__":
    main()
