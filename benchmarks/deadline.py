"""Does a run take as long as `omniavatar plan --deadline` predicts?

    python -m benchmarks deadline --config configs/pocket.yaml --minutes 0.2 --deadlines 90s [--hp ...]

For each deadline the command proposes settings for this machine; then `omniavatar generate` makes that video
with them, loading included, the packaged speech repeated to `--minutes`. Random decoders paint faint pictures
in both (`shared/inputs.py` says why). Prints a table, then one line of JSON with the parts of the predicted
loading and the stages of the run, which show where the two differ.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks.shared.inputs import FAINT_COMMAND, module_environment, speech_folder
from benchmarks.shared.options import add_config, add_hp, make_parser
from benchmarks.shared.report import print_result, print_table
from omniavatar.assets import PORTRAIT


def command(*arguments: str) -> str:
    """Standard output of one `omniavatar` command. Raises SystemExit where it fails."""
    line = [sys.executable, "-m", FAINT_COMMAND, *arguments]
    done = subprocess.run(line, stdout=subprocess.PIPE, text=True, env=module_environment())
    if done.returncode:
        raise SystemExit(f"error: `omniavatar {' '.join(arguments)}` ended with code {done.returncode}")
    return done.stdout


def measure(options: argparse.Namespace, deadline: str, folder: Path) -> dict[str, object]:
    """What was proposed for one deadline, and the seconds it took."""
    given = [part for value in options.hp for part in ("--hp", value)]
    proposal = json.loads(
        command(
            "plan", "--config", options.config, *given, "--minutes", str(options.minutes),
            "--deadline", deadline, "--json",
        )
    )  # fmt: skip
    chosen = proposal["chosen"] or proposal["as_configured"]
    values = [f"{key}={json.dumps(value)}" for key, value in chosen["settings"].items()]
    settings = [part for value in values for part in ("--hp", value)]
    sound, output = folder / "speech.wav", folder / "video.mp4"
    begun = time.perf_counter()
    command(
        "generate", "--config", options.config, *given, *settings, "--prompt", "a person speaks",
        "--image", str(PORTRAIT), "--audio", str(sound), "--output", str(output), "--no-resume", "--quiet",
    )  # fmt: skip
    seconds = time.perf_counter() - begun
    return {
        "deadline": deadline,
        "settings": chosen["settings"],
        "predicted": chosen["seconds"],
        "loading": {"sum": proposal["loading"], **proposal["loading_parts"]},
        "stages": json.loads(output.with_suffix(".json").read_text())["stages"],
        "seconds": seconds,
        "error": chosen["seconds"] / seconds - 1,
    }


def main(arguments: Sequence[str] | None = None) -> None:
    parser = make_parser(__name__, __doc__)
    add_config(parser)
    parser.add_argument("--minutes", type=float, default=1.0)
    parser.add_argument("--deadlines", nargs="+", required=True)
    add_hp(parser)
    options = parser.parse_args(arguments)
    rows = []
    with speech_folder(options.minutes) as folder:
        for deadline in options.deadlines:
            rows.append(measure(options, deadline, folder))
            print(rows[-1], flush=True)
    print_table(
        ["deadline", "settings", "predicted, s", "taken, s", "error"],
        [
            [
                row["deadline"],
                row["settings"],
                f"{row['predicted']:.1f}",
                f"{row['seconds']:.1f}",
                f"{row['error']:+.1%}",
            ]
            for row in rows
        ],
    )
    print_result("deadline", **vars(options), rows=rows)
