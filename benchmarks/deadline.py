"""Does a run take as long as `omniavatar plan --deadline` says?

    python benchmarks/deadline.py --config configs/pocket.yaml --minutes 0.2 --deadlines 90s [--hp ...]

For each deadline: the command proposes settings for this machine, then `omniavatar generate` makes that video
with them, loading included, the packaged speech repeated to `--minutes`. Random decoders paint faint pictures
in both (`faint_command.py`). A table, then one line of JSON, with the parts of the predicted loading and the
stages of the run, so that it shows where the two differ.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

from scaling_video import request_files
from timing import where


def command(*arguments: str) -> str:
    """Standard output of one `omniavatar` command."""
    line = [sys.executable, str(Path(__file__).with_name("faint_command.py")), *arguments]
    done = subprocess.run(line, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(arguments)}: exit {done.returncode}")
    return done.stdout


def measure(arguments: argparse.Namespace, deadline: str, folder: Path, portrait: Path) -> dict[str, object]:
    """What was proposed for one deadline, and what it took."""
    given = [part for value in arguments.hp for part in ("--hp", value)]
    told = json.loads(
        command(
            "plan", "--config", arguments.config, *given, "--minutes", str(arguments.minutes),
            "--deadline", deadline, "--json",
        )
    )  # fmt: skip
    chosen = told["chosen"] or told["as_configured"]
    values = [f"{key}={json.dumps(value)}" for key, value in chosen["settings"].items()]
    settings = [part for value in values for part in ("--hp", value)]
    sound, output = folder / "speech.wav", folder / "video.mp4"
    begun = time.perf_counter()
    command(
        "generate", "--config", arguments.config, *given, *settings, "--prompt", "a person speaks",
        "--image", str(portrait), "--audio", str(sound), "--output", str(output), "--no-resume", "--quiet",
    )  # fmt: skip
    seconds = time.perf_counter() - begun
    return {
        "deadline": deadline,
        "settings": chosen["settings"],
        "predicted": chosen["seconds"],
        "loading": {"sum": told["loading"], **told["loading_parts"]},
        "stages": json.loads(output.with_suffix(".json").read_text())["stages"],
        "seconds": seconds,
        "error": chosen["seconds"] / seconds - 1,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", required=True)
    parser.add_argument("--minutes", type=float, default=1.0)
    parser.add_argument("--deadlines", nargs="+", required=True)
    parser.add_argument("--hp", nargs="*", default=[])
    arguments = parser.parse_args()
    rows = []
    with request_files(arguments.minutes) as (folder, portrait):
        for deadline in arguments.deadlines:
            rows.append(measure(arguments, deadline, folder, portrait))
            print(rows[-1], flush=True)
    print("| deadline | settings | predicted, s | taken, s | error |")
    print("|---|---|---|---|---|")
    for row in rows:
        print(
            f"| {row['deadline']} | {row['settings']} | {row['predicted']:.1f} | {row['seconds']:.1f} | "
            f"{row['error']:+.1%} |"
        )
    print(json.dumps({"benchmark": "deadline", **vars(arguments), **where(), "rows": rows}))


if __name__ == "__main__":
    main()
