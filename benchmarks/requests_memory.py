"""Memory of one pipeline over many requests, each with another prompt, picture and sound.

Uses the nano checkpoint at 32x32 with one step, so that a request takes a fraction of a second on a CPU; on a
GPU, `--config` names a full-size configuration. Prints host memory, device memory, threads, open files and
objects as the requests run, and ends with one line of JSON that has the growth over the second half.

    python -m benchmarks requests_memory --requests 2000
"""

from __future__ import annotations

import gc
import tempfile
import threading
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import psutil
import torch

from benchmarks.shared.options import make_parser
from benchmarks.shared.report import print_result
from omniavatar import AvatarPipeline, AvatarRequest, Waveform
from omniavatar.checkpoint.synthetic import make_checkpoint
from omniavatar.config.load import load_config

RATE = 16000


@dataclass(frozen=True)
class Held:
    """What the process holds after `requests` requests. device_bytes: allocated by torch; 0 on a CPU."""

    requests: int
    host_bytes: int
    device_bytes: int
    threads: int
    files: int
    objects: int


def held(requests: int, device: torch.device) -> Held:
    gc.collect()
    process = psutil.Process()
    return Held(
        requests,
        process.memory_info().rss,
        torch.cuda.memory_allocated(device) if device.type == "cuda" else 0,
        threading.active_count(),
        process.num_fds(),
        len(gc.get_objects()),
    )


def nano_pipeline(folder: Path, cache: Path) -> AvatarPipeline:
    """The smallest pipeline that uses every model: 32x32, windows of 9 frames, one step.

    - folder: the nano checkpoint. cache: folder of text embeddings.
    """
    base = folder / "Wan2.1-T2V-nano"
    settings = {
        "dit_path": str(base / "diffusion_pytorch_model.safetensors"),
        "text_encoder_path": str(base / "models_t5_umt5-xxl-enc-bf16.pth"),
        "vae_path": str(base / "Wan2.1_VAE.pth"),
        "wav2vec_path": str(folder / "wav2vec2-base-960h"),
        "exp_path": str(folder / "OmniAvatar-nano"),
        "dtype": "fp32",
        "num_steps": 1,
        "guidance_scale": 1.0,
        "image_sizes_720": [[32, 32]],
        "max_tokens": 12,
        "overlap_frame": 5,
        "silence_duration_s": 0,
        "preset": "ultrafast",
        "text_cache_dir": str(cache),
    }
    return AvatarPipeline(load_config(None, settings).config)


def distinct_request(number: int, seconds: float) -> AvatarRequest:
    """A request whose prompt, picture and sound no other number has."""
    generator = np.random.default_rng(number)
    height, width = generator.integers(40, 90, 2)
    picture = generator.integers(0, 256, (height, width, 3), dtype=np.uint8)
    samples = generator.standard_normal(round((seconds + number % 7 / 100) * RATE)).astype(np.float32)
    return AvatarRequest(f"person number {number} speaks", picture, Waveform(0.1 * samples, RATE))


def run(pipeline: AvatarPipeline, requests: int, every: int, seconds: float, output: Path) -> list[Held]:
    """What is held after each `every` requests."""
    rows = []
    for number in range(requests):
        pipeline.generate(distinct_request(number, seconds), output, resume=False)
        if (number + 1) % every == 0:
            rows.append(held(number + 1, pipeline.models.device))
            print(*asdict(rows[-1]).values(), sep="\t", flush=True)
    return rows


def main(arguments: Sequence[str] | None = None) -> None:
    parser = make_parser(__name__, __doc__)
    parser.add_argument("--requests", type=int, default=2000)
    parser.add_argument("--every", type=int, default=100)
    parser.add_argument("--seconds", type=float, default=0.25, help="of each sound")
    parser.add_argument("--config", help="YAML file; default: the nano checkpoint, made now")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        if options.config:
            pipeline = AvatarPipeline.from_config(options.config)
        else:
            make_checkpoint("nano", Path(folder) / "nano")
            pipeline = nano_pipeline(Path(folder) / "nano", Path(folder) / "text")
        print(*Held.__dataclass_fields__, sep="\t")
        with pipeline:
            rows = run(pipeline, options.requests, options.every, options.seconds, Path(folder) / "video.mp4")
    half, last = rows[len(rows) // 2 - 1] if len(rows) > 1 else rows[0], rows[-1]
    growth = {name: value - getattr(half, name) for name, value in asdict(last).items()}
    print_result("requests_memory", growth=growth, last=asdict(last))
