"""One minute of video by the whole command, on one GPU and on several together.

    python benchmarks/scaling_video.py [--gpus 0 0,1] [--config configs/inference_1.3B_4steps.yaml] [--hp ...]

`omniavatar generate` for each entry of `--gpus`, by torchrun for several, full-size random weights, 400x720,
the packaged speech repeated to `--minutes`. Compared is the time from the end of the first window, which
compiles, to the last, and the whole command beside it, loading included. Pictures are faint
(`faint_command.py`): with noise x264 was what two GPUs waited for. A table, then one line of JSON.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import wave
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.resources import as_file, files
from pathlib import Path

import numpy as np
from timing import where
from whole_video import RATE, speech


def write_speech(path: Path, seconds: float) -> None:
    """The packaged speech, repeated, as a WAV file."""
    whole = (speech(path.parent, seconds).samples * 32767).astype(np.int16)
    with wave.open(str(path), "wb") as sound:
        sound.setnchannels(1)
        sound.setsampwidth(2)
        sound.setframerate(RATE)
        sound.writeframes(whole.tobytes())


@contextmanager
def request_files(minutes: float) -> Iterator[tuple[Path, Path]]:
    """A temporary folder with the packaged speech, repeated to `minutes`, as `speech.wav`; the portrait."""
    with tempfile.TemporaryDirectory() as name, as_file(files("omniavatar.assets")) as assets:
        write_speech(Path(name) / "speech.wav", minutes * 60)
        yield Path(name), assets / "portrait.png"


def run(arguments: argparse.Namespace, gpus: str, folder: Path, portrait: Path) -> dict[str, object]:
    """One command: seconds of it, of its windows, and what it says of itself."""
    output = folder / f"{gpus.replace(',', '_')}.mp4"
    count = len(gpus.split(","))
    command = [sys.executable]
    if count > 1:
        command += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={count}"]
    command += [str(Path(__file__).with_name("faint_command.py")), "generate", "--config", arguments.config]
    command += ["--prompt", "a person speaks", "--image", str(portrait)]
    command += ["--audio", str(folder / "speech.wav"), "--output", str(output)]
    command += ["--log-format", "json", "--no-resume"]
    shared = [f"sp_size={count}"] if count > 1 else []
    for value in ["weights=random", f"scale={arguments.scale}", *shared, *arguments.hp]:
        command += ["--hp", value]
    begun = time.time()
    ends, lines = [], []
    seen = {**os.environ, "CUDA_VISIBLE_DEVICES": gpus}
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=seen) as process:
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


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--gpus", nargs="+", default=["0", "0,1"])
    parser.add_argument("--config", default="configs/inference_1.3B_4steps.yaml")
    parser.add_argument("--scale", default="1.3B")
    parser.add_argument("--minutes", type=float, default=1.0)
    parser.add_argument("--hp", nargs="*", default=["loras=[]", "image_sizes_720=[[400,720]]"])
    arguments = parser.parse_args()
    rows = []
    with request_files(arguments.minutes) as (folder, portrait):
        for gpus in arguments.gpus:
            rows.append(run(arguments, gpus, folder, portrait))
            print(rows[-1], flush=True)
    print("| GPUs | a window, s | windows after the first, s | times the first row | whole command, s |")
    print("|---|---|---|---|---|")
    for row in rows:
        low, high = row["window_spread"]
        print(
            f"| {row['gpus']} | {row['window_s']:.3f} ({low:.3f}..{high:.3f}) | {row['windows_s']:.1f} | "
            f"{rows[0]['windows_s'] / row['windows_s']:.3f} | {row['command_s']:.1f} |"
        )
    print(json.dumps({"benchmark": "scaling_video", **vars(arguments), **where(), "rows": rows}))


if __name__ == "__main__":
    main()
