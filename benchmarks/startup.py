"""Seconds from the command to the first denoising step, for a converted checkpoint in the page cache.

    python -m benchmarks startup [--scale 14B] [--quantize fp8|none] [--repeats 5] [--folder DIR]

Makes a folder in the official layout: the DiT converted from random weights, a random VAE and wav2vec 2.0,
and cached embeddings of the prompts (their encoder is not loaded, as after the first run of a prompt). Then
runs `omniavatar generate` as a process, once to warm the caches, and reads its events. The first step counts
when the process reports it. Prints a table, then one line of JSON.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.shared.options import add_repeats, make_parser
from benchmarks.shared.report import print_result, print_table, spread
from omniavatar.assets import PORTRAIT, SPEECH
from omniavatar.checkpoint.layout import scale_spec
from omniavatar.checkpoint.layout_files import TEXT_ENCODER, TOKENIZER, VAE, WAV2VEC, checkpoint_layout
from omniavatar.checkpoint.synthetic import wav2vec_config
from omniavatar.checkpoint.tensor_writer import write_random
from omniavatar.config.load import load_config
from omniavatar.config.values import NEGATIVE_PROMPT
from omniavatar.encoders.text_cache import TextCache, encoder_identity
from omniavatar.engine.convert import convert_checkpoint

EVENTS = ("request_started", "window_started", "step")
PROMPT = "A person speaks to the camera."


def make_files(root: Path, scale: str, quantize: str) -> dict[str, str]:
    """Write everything a run reads; returns the settings that name it."""
    spec = scale_spec(scale)
    random = load_config(None, {"weights": "random", "scale": scale, "quantize": quantize}).config
    converted = convert_checkpoint(random, root / "converted.safetensors")
    for layout in checkpoint_layout(spec):
        if layout.path.endswith(VAE) or layout.path.startswith(WAV2VEC):
            write_random(root, layout, 0, lambda _: None)
    (root / WAV2VEC / "config.json").write_text(json.dumps(wav2vec_config(spec.wav2vec)))
    extractor = {"do_normalize": True, "feature_size": 1, "padding_value": 0.0, "sampling_rate": 16000}
    (root / WAV2VEC / "preprocessor_config.json").write_text(json.dumps(extractor))
    base = root / f"Wan2.1-T2V-{scale}"
    (base / TOKENIZER).mkdir(parents=True)
    (base / TOKENIZER / "tokenizer.json").write_text("{}")
    (base / TEXT_ENCODER).write_bytes(b"not read: the embeddings are cached")
    cache = TextCache(root / "cache", encoder_identity(base / TEXT_ENCODER, base / TOKENIZER, torch.bfloat16))
    for prompt in (PROMPT, NEGATIVE_PROMPT):
        cache.put(prompt, torch.randn(512, spec.text.dim, dtype=torch.bfloat16))
    return {
        "dit_path": str(converted.path),
        "vae_path": str(base / VAE),
        "text_encoder_path": str(base / TEXT_ENCODER),
        "wav2vec_path": str(root / WAV2VEC),
        "text_cache_dir": str(root / "cache"),
        "quantize": quantize,
        "num_steps": "4",
        "guidance_scale": "1",
    }


def start(settings: dict[str, str], out: Path, finish: bool = False) -> dict[str, float]:
    """Seconds from the start of a process to each of `EVENTS`. finish: let it finish its video."""
    config = out.with_name("run.yaml")
    config.write_text("".join(f"{key}: {value}\n" for key, value in settings.items()))
    command = [sys.executable, "-m", "omniavatar.cli", "generate"]
    command += ["--config", str(config), "--prompt", PROMPT]
    command += ["--image", str(PORTRAIT), "--audio", str(SPEECH)]
    command += ["--output", str(out), "--log-format", "json", "--no-resume"]
    begun, seen = time.time(), {}
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        lines = []
        for line in process.stderr:
            lines.append(line)
            event = json.loads(line) if line.startswith("{") else {}
            if event.get("event") in EVENTS:
                seen.setdefault(event["event"], event["time"] - begun)
            if event.get("event") == "step" and not finish:
                process.kill()
                break
    if "step" not in seen:
        raise SystemExit("".join(lines))
    return seen


def main(arguments: Sequence[str] | None = None) -> None:
    parser = make_parser(__name__, __doc__)
    parser.add_argument("--scale", default="14B")
    parser.add_argument("--quantize", default="fp8", choices=["fp8", "none"])
    add_repeats(parser)
    parser.add_argument("--folder", type=Path, help="where the temporary files go")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        root = Path(name)
        begun = time.perf_counter()
        settings = make_files(root, options.scale, options.quantize)
        print(f"files made in {time.perf_counter() - begun:.0f} s", flush=True)
        cold = start(settings, root / "video.mp4")
        runs = [start(settings, root / "video.mp4") for _ in range(options.repeats)]
        start(settings, root / "whole.mp4", finish=True)
        stages = json.loads((root / "whole.json").read_text())["stages"]
        size = Path(settings["dit_path"]).stat().st_size
    events = {event: rounded([run[event] for run in runs]) for event in EVENTS}
    rounded_stages = {name: round(seconds, 2) for name, seconds in stages.items()}
    print({name: seconds for name, seconds in rounded_stages.items() if seconds})
    print_table(
        ["event", "s after the start of the command"],
        [[event, spread(*times.values(), digits=2)] for event, times in events.items()],
    )
    print_result(
        "startup",
        scale=options.scale,
        quantize=options.quantize,
        dit_file_gb=round(size / 1e9, 2),
        first_run_s=round(cold["step"], 2),
        repeats=options.repeats,
        stages_s=rounded_stages,
        **events,
    )


def rounded(seconds: list[float]) -> dict[str, float]:
    """Median, fastest and slowest to hundredths."""
    values = {"median_s": statistics.median(seconds), "min_s": min(seconds), "max_s": max(seconds)}
    return {name: round(value, 2) for name, value in values.items()}
