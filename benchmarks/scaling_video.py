"""One minute of video by the whole command, on one GPU and on several together.

    python -m benchmarks scaling_video [--gpus 0 0,1] [--config configs/inference_1.3B_4steps.yaml] [--hp ...]

Runs `omniavatar generate` for each entry of `--gpus`, by torchrun for several: full-size random weights,
400x720, the packaged speech repeated to `--minutes`. It compares the time from the end of the first window,
which compiles, to the end of the last; the time of the whole command, loading included, stands beside it.
Pictures are faint (`shared/inputs.py` says why). Prints a table, then one line of JSON.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks.shared.inputs import FAINT_COMMAND, module_environment, speech_folder
from benchmarks.shared.options import add_config, add_hp, make_parser
from benchmarks.shared.report import print_result, print_table, spread
from omniavatar.assets import PORTRAIT


def run(options: argparse.Namespace, gpus: str, folder: Path) -> dict[str, object]:
    """One command: its seconds, and those of its windows as its events report them."""
    output = folder / f"{gpus.replace(',', '_')}.mp4"
    count = len(gpus.split(","))
    command = [sys.executable]
    if count > 1:
        command += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={count}"]
    command += ["-m", FAINT_COMMAND, "generate", "--config", options.config]
    command += ["--prompt", "a person speaks", "--image", str(PORTRAIT)]
    command += ["--audio", str(folder / "speech.wav"), "--output", str(output)]
    command += ["--log-format", "json", "--no-resume"]
    shared = [f"sp_size={count}"] if count > 1 else []
    for value in ["weights=random", f"scale={options.scale}", *shared, *options.hp]:
        command += ["--hp", value]
    begun = time.time()
    ends, lines = [], []
    environment = module_environment(CUDA_VISIBLE_DEVICES=gpus)
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stderr is not None
        for line in process.stderr:
            lines.append(line)
            event = json.loads(line) if line.startswith("{") else {}
            if event.get("event") == "window_finished":
                ends.append(event["time"])
    if process.returncode:
        raise SystemExit("".join(lines[-20:]))
    windows = [later - earlier for earlier, later in itertools.pairwise(ends)]
    return {
        "gpus": gpus,
        "command_s": time.time() - begun,
        "windows_s": ends[-1] - ends[0],
        "windows": len(ends),
        "window_s": statistics.median(windows),
        "window_spread": [min(windows), max(windows)],
        "each_window_s": [round(each, 3) for each in windows],
    }


def main(arguments: Sequence[str] | None = None) -> None:
    parser = make_parser(__name__, __doc__)
    parser.add_argument("--gpus", nargs="+", default=["0", "0,1"])
    add_config(parser, "configs/inference_1.3B_4steps.yaml")
    parser.add_argument("--scale", default="1.3B")
    parser.add_argument("--minutes", type=float, default=1.0)
    add_hp(parser, ["loras=[]", "image_sizes_720=[[400,720]]"])
    options = parser.parse_args(arguments)
    rows = []
    with speech_folder(options.minutes) as folder:
        for gpus in options.gpus:
            rows.append(run(options, gpus, folder))
            print(rows[-1], flush=True)
    print_table(
        ["GPUs", "a window, s", "windows after the first, s", "times the first row", "whole command, s"],
        [
            [
                row["gpus"],
                spread(row["window_s"], *row["window_spread"]),
                f"{row['windows_s']:.1f}",
                f"{rows[0]['windows_s'] / row['windows_s']:.3f}",
                f"{row['command_s']:.1f}",
            ]
            for row in rows
        ],
    )
    print_result("scaling_video", **vars(options), rows=rows)
