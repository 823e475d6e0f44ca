"""How well OmniAvatar-Pocket talks, on people and speech it never saw: its table and its trade-offs.

Files lie below --work, default benchmarks/build/pocket:

    python -m benchmarks pocket_quality prepare --recordings ../shared/examples/speech
    python -m benchmarks pocket_quality measure --truth-only     # the ceiling: the renderer's own films
    python -m benchmarks pocket_quality generate --config configs/pocket.yaml --workers 2
    python -m benchmarks pocket_quality measure
    python -m benchmarks pocket_quality generate --config configs/pocket.yaml --tradeoff  # better on a GPU
    python -m benchmarks pocket_quality measure --tradeoff      # with --minute on the clips of a minute
    python -m benchmarks pocket_quality generate --live --config pocket-live  # the path of a live session
    python -m benchmarks pocket_quality measure --made live --config pocket-live

`prepare` needs the synthesisers (`training/fetch_tools.sh`) and renders for some minutes. `generate` runs on
any machine that runs the engine; it needs only `inputs` of --work. `measure` needs only what `generate` wrote
to `made`, and makes an environment for MediaPipe (Python up to 3.12).
It prints the table in Markdown, then one line of JSON.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.pocket import faces, generate, live_path, material, quality, steadiness, tradeoff, viewer
from benchmarks.shared.options import make_parser
from omniavatar.config.load import load_config

WORK = Path("benchmarks/build/pocket")
TRADEOFF_CLIPS = 4


def prepare(arguments: argparse.Namespace) -> None:
    from training.speech import SpeechSet

    recorded = None
    if arguments.aligned is not None:
        recorded = SpeechSet.load(arguments.aligned)
    elif arguments.recordings is not None:
        faces.align_recordings(arguments.recordings, arguments.work / "recorded.npz")
        recorded = SpeechSet.load(arguments.work / "recorded.npz")
    length = arguments.long_seconds
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    clips = material.prepare(
        arguments.work,
        arguments.clips,
        recorded,
        arguments.long_clips,
        length,
        arguments.hard_clips,
        device,
        arguments.first_person,
    )
    for clip in clips:
        print(f"{clip.name}: {len(clip.opening)} frames, {clip.prompt!r}")


def tradeoff_clips(clips: list[material.Clip], count: int) -> list[material.Clip]:
    """`count` clips, alternately synthetic and recorded while there are both."""
    kinds = [[clip for clip in clips if clip.kind == kind] for kind in ("synthetic", "recorded")]
    mixed = [clip for pair in itertools.zip_longest(*kinds) for clip in pair if clip is not None]
    return mixed[:count]


def compared_clips(clips: list[material.Clip], arguments: argparse.Namespace) -> list[material.Clip]:
    """The clips on which variants are compared: short ones, or those of a minute for identity.

    Raises SystemExit where `prepare` wrote none of a minute.
    """
    if not arguments.minute:
        return tradeoff_clips(clips, arguments.clips or TRADEOFF_CLIPS)
    long = [clip for clip in clips if clip.kind == "long"][: arguments.clips]
    if not long:
        raise SystemExit(f"error: {arguments.work}: no clips of a minute; run `prepare` with --long-clips")
    return long


def chosen_variants(names: list[str] | None, device: str) -> list[generate.Variant]:
    """The variants called `names`, or all variants for a device (cpu or cuda).

    Raises SystemExit for an unknown name.
    """
    known = {variant.name: variant for variant in tradeoff.variants()}
    unknown = sorted(set(names or ()) - set(known))
    if unknown:
        raise SystemExit(f"error: no variant is called {unknown[0]}; known: {', '.join(known)}")
    return [known[name] for name in names or known if names or known[name].device in ("", device)]


def make(arguments: argparse.Namespace) -> None:
    clips = material.read_clips(arguments.work)
    if arguments.tradeoff:
        chosen = compared_clips(clips, arguments)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        variants = chosen_variants(arguments.variants, device)
        generate.generate(arguments.config, arguments.work, variants, chosen, arguments.workers)
        return
    if arguments.clips:
        clips = clips[: arguments.clips]
    print(json.dumps(generate.measure_vae(arguments.config, arguments.work)), flush=True)
    if arguments.live:
        live_path.generate(arguments.config, arguments.work, clips, arguments.workers)
    else:
        generate.generate(arguments.config, arguments.work, [generate.DEFAULT], clips, arguments.workers)


def what_is_seen(
    work: Path, clips: list[material.Clip], where: str | None, config: Path
) -> tuple[dict[str, float] | None, dict[str, float]]:
    """The figures of `viewer` of the videos in `where` that `config` made, if any, and of the films."""
    films = quality.watch(work, "truth", clips)
    portraits = quality.read_portraits(work, clips) if len(clips) > 1 else None
    ceiling = viewer.look(films, films, portraits, None)
    if where is None:
        return None, ceiling
    seams = partial(steadiness.seam_frames, load_config(config).config)
    seen = viewer.look(quality.watch(work, where, clips), films, portraits, seams)
    silent = [clip for clip in clips if clip.kind == "wordless"]
    return seen | {"warned": viewer.warned(work, where, silent)}, ceiling


def without_nan(value: Any) -> Any:
    """`value` with None for every nan, which JSON does not have."""
    if isinstance(value, dict):
        return {key: without_nan(each) for key, each in value.items()}
    if isinstance(value, list):
        return [without_nan(each) for each in value]
    return None if isinstance(value, float) and math.isnan(value) else value


def measure(arguments: argparse.Namespace) -> None:
    clips = material.read_clips(arguments.work)
    result: dict[str, Any] = {"benchmark": "pocket_quality", "seeds": generate.seeds_used()}
    if arguments.tradeoff:
        chosen = compared_clips(clips, arguments)
        device = "cuda" if (arguments.work / "made" / "bf16").exists() else "cpu"  # where `generate` ran
        portraits = quality.read_portraits(arguments.work, clips) if arguments.minute else None
        variants = chosen_variants(arguments.variants, device)
        rows = tradeoff.measure(arguments.work, chosen, variants, portraits)
        front, choice = tradeoff.pareto(rows), tradeoff.recommended(rows)
        result["tradeoff"] = {"rows": rows, "front": front, "recommended": choice}
        print(tradeoff.markdown(rows))
    else:
        if arguments.clips:
            clips = clips[: arguments.clips]
        where = None if arguments.truth_only else f"made/{arguments.made}"
        made = None if where is None else quality.main_table(arguments.work, clips, where)
        ceiling = quality.main_table(arguments.work, clips, "truth")
        result |= {"made": made, "truth": ceiling}
        print(quality.markdown(made, ceiling))
        seen, films = what_is_seen(arguments.work, clips, where, arguments.config)
        result["seen"] = {"made": seen, "truth": films}
        print(viewer.markdown(seen, films))
    name = "tradeoff" if arguments.tradeoff else "truth" if arguments.truth_only else "table"
    if name == "table" and arguments.made == live_path.NAME:
        name = "live_table"
    file = arguments.work / f"{name}.json"
    result = without_nan(result)
    file.write_text(json.dumps(result) + "\n")
    if arguments.plots is not None:
        faces.run_in_environment([faces.HERE / "plot.py", file.resolve(), arguments.plots.resolve()])
    print(json.dumps(result))


def main(arguments: Sequence[str] | None = None) -> None:
    parser = make_parser(__name__, __doc__)
    commands = parser.add_subparsers(required=True)
    for name, run, words in (
        ("prepare", prepare, "render the test clips"),
        ("generate", make, "make videos of the clips with the engine"),
        ("measure", measure, "measure the videos and print tables"),
    ):
        command = commands.add_parser(name, help=words)
        command.set_defaults(run=run)
        command.add_argument("--work", type=Path, default=WORK)
        command.add_argument("--clips", type=int, default=8 if name == "prepare" else None)
        if name == "prepare":
            command.add_argument("--recordings", type=Path, help="folder of recordings with a transcription")
            command.add_argument("--aligned", type=Path, help="the recordings as a file of training.record")
            command.add_argument(
                "--hard-clips", type=int, default=2, help="clips of each hard kind: music, noise, languages"
            )
            command.add_argument(
                "--first-person",
                type=int,
                default=material.LOOKS_SEED,
                help="seed of the first clip's person",
            )
            command.add_argument("--long-clips", type=int, default=4, help="clips of a minute, for the drift")
            command.add_argument("--long-seconds", type=int, default=material.LONG_SECONDS)
            continue
        command.add_argument("--tradeoff", action="store_true", help="the variants instead of the default")
        command.add_argument("--variants", nargs="+", help="only these variants")
        command.add_argument(
            "--minute", action="store_true", help="variants on the clips of a minute: also identity"
        )
        command.add_argument("--config", type=Path, default=Path("configs/pocket.yaml"))
        if name == "generate":
            command.add_argument("--live", action="store_true", help="by the path of a live session")
            command.add_argument(
                "--workers", type=int, default=1, help=f"processes; this machine: {os.cpu_count()}"
            )
        else:
            command.add_argument("--truth-only", action="store_true", help="only the renderer's films")
            command.add_argument("--made", choices=("default", live_path.NAME), default="default")
            command.add_argument("--plots", type=Path, help="folder for the plots, such as docs/images")
    options = parser.parse_args(arguments)
    options.run(options)
