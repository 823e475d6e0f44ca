"""Seconds, memory and error of the video VAE on one CUDA device: plain, and each idea of the fast one added.

    python -m benchmarks vae [--repeats 5] [--budget 80] [--profile 15]

Released sizes, random weights, bf16, 400x720: decode of 105 and 53 frames, encode of 13. Errors are relative
L2 of the 53 frames and of the encoded latents against the plain VAE in float32 (no TF32) and in bf16.
Variants that let cuDNN search run in a second process, because cuDNN keeps the plan it has chosen for a
shape until the process ends. Variants beyond the budget of seconds are left out and named.
Prints a table, the kernels of the default variant by time, then one line of JSON.
"""

from __future__ import annotations

import argparse
import functools
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path

import torch

from benchmarks.shared.inputs import module_environment
from benchmarks.shared.options import add_repeats, make_parser
from benchmarks.shared.report import print_result, print_table, spread
from benchmarks.shared.timing import require_cuda, timed
from omniavatar.accel.vae import FastVAEConfig, apply_fast_vae
from omniavatar.checkpoint.vae import random_vae
from omniavatar.model.sizes import VAEConfig
from omniavatar.model.vae import VideoDecoder, VideoVAE

HEIGHT, WIDTH = 400, 720
LATENTS = {"decode_105": 27, "decode_53": 14}

FIRST = FastVAEConfig("eager", False, False, False, False, latents_at_once=1, frames_at_once=4)
TRITON = replace(FIRST, kernels="triton")
MATMUL = replace(TRITON, matmul_attention=True)
MERGED = replace(MATMUL, merged_upsample=True)
PAIRED = replace(MERGED, paired_columns=True)
DEFAULT = FastVAEConfig()
WITHOUT_SEARCH: dict[str, FastVAEConfig | None] = {
    "plain": None,
    "default": DEFAULT,
    "frames, eager kernels": FIRST,
    "+ Triton kernel": TRITON,
    "+ attention by products": MATMUL,
    "+ merged upsampling (1 latent)": MERGED,
    "+ paired columns (1 latent)": PAIRED,
    "3 latents": replace(DEFAULT, latents_at_once=3),
    "4 latents": replace(DEFAULT, latents_at_once=4),
    "plain, weights channels-last": None,
}
WITH_SEARCH: dict[str, FastVAEConfig | None] = {
    "cuDNN search, default": replace(DEFAULT, search_convolutions=True),
    "cuDNN search, 1 latent": replace(PAIRED, search_convolutions=True),
    "cuDNN search, 3 latents": replace(DEFAULT, search_convolutions=True, latents_at_once=3),
}


def coding_times(run: Callable[[], object], repeats: int) -> dict[str, float]:
    """Seconds of `repeats` runs after the warm-up, of the first run, and peak memory of the repeats."""
    times = timed(run, repeats, torch.cuda.reset_peak_memory_stats)
    return {
        "s": times.median,
        "min_s": times.fastest,
        "max_s": times.slowest,
        "first_s": times.first,
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30,
    }


def stream(vae: VideoDecoder, latent: torch.Tensor) -> None:
    """Decode all of `latent` and drop the frames."""
    for _ in vae.decode_stream(latent):
        pass


def results(vae: VideoVAE, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The frames and latents that errors are measured on, in CPU memory."""
    frames = torch.cat(list(vae.decode_stream(inputs["decode_53"])), dim=2)
    return {"decode": frames.cpu(), "encode": vae.encode(inputs["encode_13"]).cpu()}


def error(got: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> dict[str, float]:
    """Relative L2 of each result."""
    out = {}
    for name, tensor in got.items():
        a, b = tensor.cuda().double(), expected[name].cuda().double()
        out[name] = ((a - b).norm() / b.norm()).item()
    return out


def make_inputs() -> dict[str, torch.Tensor]:
    """Random latents and frames of each case."""
    generator = torch.Generator(device="cuda").manual_seed(1)
    shape = HEIGHT // 8, WIDTH // 8
    inputs = {
        name: torch.randn(1, 16, latents, *shape, device="cuda", generator=generator)
        for name, latents in LATENTS.items()
    }
    video = torch.rand(1, 3, 13, HEIGHT, WIDTH, device="cuda", generator=generator)
    return {**inputs, "encode_13": video * 2 - 1}


def exact_results(half: torch.nn.Module, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The results of the same weights in float32 through the plain VAE."""
    exact = random_vae(VAEConfig(), dtype=torch.float32, device="cuda", seed=0)
    exact.load_state_dict({key: value.float() for key, value in half.state_dict().items()})
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    return results(exact, inputs)


@torch.inference_mode()
def measure(search: bool, reference: Path, repeats: int, deadline: float, top: int) -> dict:
    """The rows of one process. The first process writes the references that the second reads.

    deadline: time.time() after which no variant begins. top: kernels to list.
    """
    plain = random_vae(VAEConfig(), dtype=torch.bfloat16, device="cuda", seed=0)
    inputs = make_inputs()
    if not search:
        torch.save({"float32": exact_results(plain, inputs), "bf16": results(plain, inputs)}, reference)
        torch.cuda.empty_cache()
    expected = torch.load(reference)
    rows, left_out = [], []
    for name, config in (WITH_SEARCH if search else WITHOUT_SEARCH).items():
        if time.time() > deadline:
            left_out.append(name)
            continue
        vae: VideoVAE = plain if config is None else apply_fast_vae(plain, config)
        row: dict = {"variant": name, "config": None if config is None else asdict(config)}
        cases = ["decode_105", "encode_13"] + (["decode_53"] if name in ("plain", "default") else [])
        for case in cases:
            run = vae.encode if case == "encode_13" else functools.partial(stream, vae)
            row[case] = coding_times(functools.partial(run, inputs[case]), repeats)
        got = results(vae, inputs)
        row["error_float32"] = error(got, expected["float32"])
        row["error_bf16"] = error(got, expected["bf16"])
        rows.append(row)
        torch.cuda.empty_cache()
    kernels = [] if search or not top else profile(apply_fast_vae(plain, DEFAULT), inputs["decode_105"], top)
    return {"rows": rows, "left_out": left_out, "kernels": kernels}


def profile(vae: VideoVAE, latent: torch.Tensor, top: int) -> list[dict]:
    """Kernels of one decode by the time they take."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as record

    stream(vae, latent)
    torch.cuda.synchronize()
    with record(activities=[ProfilerActivity.CUDA]) as trace:
        stream(vae, latent)
        torch.cuda.synchronize()
    events = sorted(trace.key_averages(), key=lambda event: -event.self_device_time_total)
    rows = [
        {"kernel": event.key[:90], "calls": event.count, "ms": event.self_device_time_total / 1e3}
        for event in events
    ]
    total = {
        "kernel": "all kernels",
        "calls": sum(r["calls"] for r in rows),
        "ms": sum(r["ms"] for r in rows),
    }
    return [total, *rows[:top]]


HEADS = (
    "variant",
    "decode 105, s (min..max)",
    "decode 53, s",
    "encode 13, s (min..max)",
    "peak GiB dec / enc",
    "error vs float32 dec / enc",
    "vs plain bf16",
    "first run, s",
)


def cells(row: dict) -> list[str]:
    """A row of the table."""
    decode, encode = row["decode_105"], row["encode_13"]
    errors = [
        f"{each['decode']:.1e} / {each['encode']:.1e}" for each in (row["error_float32"], row["error_bf16"])
    ]
    return [
        row["variant"],
        spread(decode["s"], decode["min_s"], decode["max_s"]),
        f"{row['decode_53']['s']:.3f}" if "decode_53" in row else "",
        spread(encode["s"], encode["min_s"], encode["max_s"]),
        f"{decode['peak_gib']:.2f} / {encode['peak_gib']:.2f}",
        *errors,
        f"{decode['first_s']:.2f}",
    ]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = make_parser(__name__, __doc__)
    add_repeats(parser)
    parser.add_argument("--budget", type=float, default=80, help="seconds after which no variant begins")
    parser.add_argument("--profile", type=int, default=15, help="kernels to list; 0: none")
    parser.add_argument(
        "--part", nargs=3, metavar=("SEARCH", "REFERENCE", "DEADLINE"), help=argparse.SUPPRESS
    )
    options = parser.parse_args(arguments)
    require_cuda()
    if options.part:
        search, reference, deadline = options.part
        part = measure(search == "on", Path(reference), options.repeats, float(deadline), options.profile)
        print(json.dumps(part))
        return
    parts = both_parts(options)
    rows = [row for part in parts for row in part["rows"]]
    left_out = [name for part in parts for name in part["left_out"]]
    print_table(HEADS, map(cells, rows))
    if left_out:
        print(f"left out, beyond the budget: {', '.join(left_out)}")
    kernels = parts[0]["kernels"]
    if kernels:
        print()
        print_table(
            ["kernel of the default variant, decode of 105 frames", "calls", "ms"],
            [(kernel["kernel"], kernel["calls"], f"{kernel['ms']:.1f}") for kernel in kernels],
        )
    print_result(
        "vae",
        size=[HEIGHT, WIDTH],
        repeats=options.repeats,
        rows=rows,
        left_out=left_out,
        kernels=kernels,
    )


def both_parts(options: argparse.Namespace) -> list[dict]:
    """The results of the process without cuDNN's search and of the one with it."""
    deadline = time.time() + options.budget
    command = [sys.executable, "-m", "benchmarks", "vae"]
    command += ["--repeats", str(options.repeats), "--profile", str(options.profile)]
    parts = []
    with tempfile.TemporaryDirectory() as folder:
        for search, until in (("off", deadline - options.budget / 3), ("on", deadline)):
            part = ["--part", search, f"{folder}/reference.pt", str(until)]
            done = subprocess.run(
                [*command, *part], stdout=subprocess.PIPE, text=True, check=True, env=module_environment()
            )
            parts.append(json.loads(done.stdout.splitlines()[-1]))
    return parts
