"""All measurements on the GPUs of one host in one call, the prediction beside each figure.

    python -m benchmarks one_host [--gpus 8] [--seconds 560] [--parts forward,video] [--out results.jsonl]
    python -m benchmarks one_host --rehearse [--gpus 8]

The parts run in this order; a part whose expected time is not left is named and skipped:
`forward`: 14B and 1.3B at 30,375 tokens by sequence parallelism over all GPUs; the 14B also through NCCL, and
by guidance over two groups. `vae`: decode and encode by rows. `batch`: workers on 1, 2, 4, ... GPUs.
`video`: one minute by the whole command, on one GPU and on all.
Each part is a benchmark of its own (`scaling`, `scaling_vae`, `batch`, `scaling_video`); its line of JSON is
appended to `--out`. --rehearse runs the same with nano models on CPUs, one process a GPU.
Prints a table of measured and predicted times-one-GPU (docs/many_gpus.md). Exits with 1 if a part failed.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.shared import prediction
from benchmarks.shared.inputs import ROOT, module_environment
from benchmarks.shared.options import make_parser, words
from benchmarks.shared.report import print_table

Figures = Callable[[dict[str, Any], int], Iterator[tuple[str, float, float]]]
"""(what, times one GPU, the same predicted) from a part's line of JSON and the number of GPUs."""
PARTS = ("forward", "vae", "batch", "video")


@dataclass(frozen=True)
class Part:
    """A benchmark to run. expected_s: on H100s. ranks: by torchrun."""

    kind: str
    name: str
    arguments: tuple[str, ...]
    expected_s: float
    figures: Figures
    ranks: bool = True


def main(arguments: Sequence[str] | None = None) -> None:
    parser = make_parser(__name__, __doc__)
    parser.add_argument("--gpus", type=int, default=8)
    parser.add_argument(
        "--seconds", type=float, default=560, help="no part begins that would not end by then"
    )
    parser.add_argument("--parts", type=words, default=list(PARTS))
    parser.add_argument("--out", type=Path, default=Path("one_host.jsonl"))
    parser.add_argument("--rehearse", action="store_true", help="nano models on CPUs")
    options = parser.parse_args(arguments)
    if unknown := set(options.parts) - set(PARTS):
        raise SystemExit(f"error: --parts: {', '.join(sorted(unknown))} is none of {', '.join(PARTS)}")
    end, rows, failed = time.monotonic() + options.seconds, [], []
    for part in (rehearsed if options.rehearse else planned)(options.gpus):
        if part.kind not in options.parts:
            continue
        left = end - time.monotonic()
        if left < part.expected_s:
            print(f"skipped: {part.name} needs {part.expected_s:.0f} s, {left:.0f} s are left", flush=True)
            continue
        begun = time.monotonic()
        line = result_of(part, options.gpus, left)
        print(f"{part.name}: {time.monotonic() - begun:.0f} s", flush=True)
        if line is None:
            failed.append(part.name)
            continue
        with options.out.open("a") as out:
            out.write(json.dumps(line) + "\n")
        rows += [
            (what, f"{found:.3f}", f"{wanted:.3f}")
            for what, found, wanted in part.figures(line, options.gpus)
        ]
    print_table(["what", "times one GPU", "predicted"], rows)
    if failed:
        raise SystemExit(f"error: {', '.join(failed)} failed; the output is above")


def result_of(part: Part, gpus: int, seconds: float) -> dict[str, Any] | None:
    """The part's line of JSON; None, and its output printed, if it failed or took longer than `seconds`."""
    command = [sys.executable, "-m", "benchmarks"]
    if part.ranks:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={gpus}"]
        command += ["-m", "benchmarks"]
    try:
        done = subprocess.run(
            [*command, *part.arguments],
            capture_output=True,
            text=True,
            timeout=seconds,
            cwd=ROOT,
            env=module_environment(),
        )
    except subprocess.TimeoutExpired as error:
        print(f"{part.name}: ended after {seconds:.0f} s\n{error.stdout}\n{error.stderr}")
        return None
    lines = [line for line in done.stdout.splitlines() if line.startswith('{"benchmark"')]
    if done.returncode or not lines:
        print(done.stdout, done.stderr, sep="\n")
        return None
    found: dict[str, Any] = json.loads(lines[-1])
    return {**found, "command": " ".join(["python -m benchmarks", *part.arguments])}


def planned(gpus: int) -> Iterator[Part]:
    """The parts on GPUs."""
    everyone = ",".join(map(str, range(gpus)))
    for scale, seconds in (("14B", 60), ("1.3B", 30)):
        yield Part("forward", f"{scale}, sp {gpus}", ("scaling", "--scale", scale), seconds, forward(scale))
    nccl = ("scaling", "--scale", "14B", "--exchange", "collective")
    yield Part("forward", f"14B, sp {gpus}, NCCL", nccl, 60, forward("14B"))
    if gpus % 2 == 0:
        yield Part("forward", f"14B, cfg 2 x sp {gpus // 2}", ("scaling", "--cfg", "2"), 60, step("14B"))
    yield Part("vae", "VAE by rows", ("scaling_vae",), 30, coding)
    config = "configs/inference_1.3B_4steps.yaml"
    random = ("weights=random", "scale=1.3B", "loras=[]", "seq_len=105")
    workers = [str(count) for count in (1, 2, 4, 8, 16) if count <= gpus]
    batch = ("batch", "throughput", "--config", config, "--gpus", everyone, "--workers", ",".join(workers))
    yield Part(
        "batch",
        "workers",
        (*batch, "--items", str(4 * gpus), "--repeats", "1", "--hp", *random),
        150,
        throughput,
        False,
    )
    for scale, name in (("1.3B", "1.3B"), ("14B", "14B")):
        video = ("scaling_video", "--gpus", "0", everyone, "--scale", scale)
        video += ("--config", f"configs/inference_{name}_4steps.yaml")
        yield Part(
            "video", f"{scale}, a minute", video, 120 if scale == "1.3B" else 200, minute(scale), False
        )


def rehearsed(gpus: int) -> Iterator[Part]:
    """The parts on CPUs, as small as they can be."""
    small = ("--device", "cpu", "--scale", "nano", "--repeats", "2")
    yield Part("forward", f"nano, sp {gpus}", ("scaling", *small, "--tokens", "60"), 0, forward("14B"))
    if gpus % 2 == 0:
        cfg = ("scaling", *small, "--tokens", "60", "--cfg", "2")
        yield Part("forward", f"nano, cfg 2 x sp {gpus // 2}", cfg, 0, step("14B"))
    yield Part("vae", "VAE by rows", ("scaling_vae", *small, "--size", "64x96"), 0, coding)
    tiny = ("weights=random", "scale=nano", "device=cpu", "max_tokens=56", "image_sizes_720=[[64,64]]")
    batch = ("batch", "throughput", "--config", "configs/nano.yaml", "--workers", "1,2", "--items", "4")
    yield Part("batch", "workers", (*batch, "--repeats", "1", "--hp", *tiny), 0, throughput, False)
    everyone = ",".join(map(str, range(gpus)))
    video = ("scaling_video", "--gpus", "0", everyone, "--scale", "nano", "--minutes", "0.02")
    video += ("--config", "configs/nano.yaml", "--hp", *tiny)
    yield Part("video", "nano, 1.2 s", video, 0, minute("14B"), False)


def forward(scale: str) -> Figures:
    def figures(line: dict[str, Any], gpus: int) -> Iterator[tuple[str, float, float]]:
        wanted = prediction.forward_s(scale, 1) / prediction.forward_s(scale, gpus)
        yield f"{line['scale']} forward, {line['heads']}", line["speedup"], wanted

    return figures


def step(scale: str) -> Figures:
    def figures(line: dict[str, Any], gpus: int) -> Iterator[tuple[str, float, float]]:
        wanted = prediction.step_s(scale, 1) / prediction.step_s(scale, gpus)
        yield f"{line['scale']} guided step", line["speedup"], wanted

    return figures


def coding(line: dict[str, Any], gpus: int) -> Iterator[tuple[str, float, float]]:
    wanted = prediction.coding_s(1) / prediction.coding_s(gpus)
    one, shared = (
        sum(line["seconds"][f"{what}, {how}"][0] for what in ("decode", "encode"))
        for how in ("one GPU", "shared")
    )
    yield "VAE, decode and encode", one / shared, wanted


def throughput(line: dict[str, Any], gpus: int) -> Iterator[tuple[str, float, float]]:
    rows = line["rows"]
    for row in rows[1:]:
        times = row["items_per_second"] / rows[0]["items_per_second"]
        yield f"videos a second, {row['workers']} workers", times, row["workers"] / rows[0]["workers"]


def minute(scale: str) -> Figures:
    def figures(line: dict[str, Any], gpus: int) -> Iterator[tuple[str, float, float]]:
        one, shared = line["rows"]
        wanted = prediction.window_s(scale, 1, 4) / prediction.window_s(scale, gpus, 4)
        yield f"{line['scale']}, windows of a minute", one["windows_s"] / shared["windows_s"], wanted

    return figures
