"""One call of `training.run`: a list of stages, each for some minutes, continued from earlier files.

Speech is synthesised first, on all cores. The output is small: `pocket-*.safetensors` and `state.json` (read
by `--resume`, with the log), `curves.png` and, after a DiT stage, sheets of samples.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw

from omniavatar.checkpoint.layout_files import TOKENIZER
from training.export import load_files
from training.head import Head
from training.loop import Budget, Log
from training.nets import Nets, load_state, save_state
from training.ranks import TrainingRanks
from training.sample import sample, sheet
from training.scale import WINDOW
from training.settings import LiveSettings, Settings, StageSettings, VaeSettings, read_settings
from training.speech import SpeechSet, synthesise
from training.stage_audio import train_audio
from training.stage_dit import STEPS, drive_of, train_dit
from training.stage_vae import train_vae
from training.studio import HELD_OUT_SEEDS, Studio, still
from training.takes import TakeFactory, make_take

FOLDER = Path(__file__).parent
STAGES = ("vae", "audio", "decoder", "dit")
AFTER_DIT = ("decoder", "dit")
"""Stages that do not change the inputs of a DiT."""
BEFORE_MORE_DIT = "audio"
"""A stage that changes them a little, so that the DiT must be trained on afterwards."""
AUDIO_SCALE = 2.0
"""Of the packaged configuration, for samples."""
OVERSHOOT = 0.05
"""Minutes: a stage ends after the step in which its time is over."""
HELD_OUT_CLIPS = {"cuda": 8, "cpu": 1}


def parse_stages(words: list[str]) -> list[tuple[str, float]]:
    """Names and minutes from `name=minutes` words. Raises ValueError for an invalid word."""
    stages = []
    for word in words:
        name, _, minutes = word.partition("=")
        if name not in STAGES or not minutes:
            raise ValueError(f"--stages: {word!r} is not NAME=MINUTES; names are {', '.join(STAGES)}")
        stages.append((name, float(minutes)))
    return stages


def check_order(stages: list[tuple[str, float]], trained: bool) -> None:
    """Raise ValueError if the stages would leave a trained DiT with other inputs than it was trained on."""
    names = [name for name, _ in stages]
    for place, name in enumerate(names if trained else []):
        if name in AFTER_DIT or (name == BEFORE_MORE_DIT and "dit" in names[place:]):
            continue
        remedy = "add a dit stage after it" if name == BEFORE_MORE_DIT else "train it without --resume"
        raise ValueError(f"{name}: the DiT was trained on the output of this network; {remedy}")


def gather_speech(
    settings: Settings | LiveSettings, session: int, ranks: TrainingRanks, workers: int, folder: Path
) -> SpeechSet:
    """The speech of this session and rank, mapped from files in `folder`; every rank has other sentences."""
    began = time.monotonic()
    source = settings.speech
    sets = [SpeechSet.load(Path(name)) for name in source.recorded_files] * source.copies
    if source.utterances:
        seed = settings.seed + 1 + session + 1000 * ranks.index
        sets.insert(0, synthesise(source.utterances // ranks.count, seed, workers, foreign=source.foreign))
    speech = SpeechSet.join(sets)
    taken = time.monotonic() - began
    print(
        f"speech: {len(speech)} utterances, {speech.seconds / 60:.1f} minutes, made in {taken:.0f} s",
        flush=True,
    )
    return SpeechSet.open(speech.keep(folder))


def resume_from(nets: Nets, folder: Path) -> dict[str, Any]:
    """Load the weights of an earlier session into `nets`; returns its facts.

    folder: written by `training.run`, or exported files with `state.json`.
    """
    if any(folder.glob("pocket-*.safetensors")):
        return load_state(nets, folder)
    read = load_files(nets, folder)
    facts: dict[str, Any] = json.loads((folder / "state.json").read_text())
    print(f"{folder}: {', '.join(read)}", flush=True)
    return facts


class Session:
    """One call of the script: the networks, the log of earlier sessions, and the stages of this one."""

    def __init__(
        self,
        settings: Settings,
        resume: Path | None,
        ranks: TrainingRanks,
        device: torch.device,
        folder: Path,
        out: Path,
    ) -> None:
        """`folder` is for speech, `out` for the results."""
        self.settings, self.ranks, self.device, self.out = settings, ranks, device, out
        self.nets = Nets.fresh(settings.seed, FOLDER / "assets" / TOKENIZER)
        self.facts: dict[str, Any] = {"sessions": 0, "minutes": dict.fromkeys(STAGES, 0.0), "log": []}
        if resume is not None:
            self.facts = resume_from(self.nets, resume)
            self.facts["minutes"] = dict.fromkeys(STAGES, 0.0) | self.facts["minutes"]
        self.nets.to(device)
        self.log = Log(self.facts["log"])
        self.workers = max(1, (os.cpu_count() or 2) // ranks.count - 1)
        self.speech = gather_speech(settings, self.facts["sessions"], ranks, self.workers, folder)
        self.names = Head("cpu").names
        self.factory = TakeFactory(folder, self.names, self.workers)
        file = settings.speech.held_out
        self.spoken_elsewhere = SpeechSet.load(Path(file)) if file else None
        self.held_out = [  # from a file, so that errors of all sessions are measured on the same speech
            make_take(self.spoken_elsewhere or self.speech, self.names, 2 * WINDOW, seed, speech_alone=True)
            for seed in range(HELD_OUT_CLIPS[device.type])
        ]
        self.seeds = itertools.count(HELD_OUT_SEEDS * (1 + 10 * self.facts["sessions"]), HELD_OUT_SEEDS)

    def run(self, name: str, minutes: float) -> None:
        """Run one stage for `minutes`.

        Raises ValueError if the learning rate would reach zero before its end.
        """
        settings = self.settings
        stage: StageSettings = getattr(settings, name)
        before = self.facts["minutes"][name]
        if before + minutes > stage.planned_minutes + OVERSHOOT:
            raise ValueError(
                f"{name}: planned_minutes is {stage.planned_minutes:g}, but earlier sessions took "
                f"{before:.2f} and this one adds {minutes:g}; set it to {before + minutes:.2f} or more"
            )
        budget = Budget(minutes, stage.planned_minutes, before, self.ranks)
        seed = next(self.seeds) + self.ranks.index * (HELD_OUT_SEEDS // self.ranks.count)
        torch.manual_seed(seed)
        takes = self.factory.stream(stage.frames, seed)  # type: ignore[attr-defined]
        studio = Studio(takes, seed, self.device)
        if name == "audio":
            held_out = [
                make_take(self.speech, self.names, settings.audio.frames, 1000 + n, speech_alone=True)
                for n in range(32)
            ]
            net, device, real = self.nets.audio, self.device, self.spoken_elsewhere
            train_audio(net, takes, held_out, real, settings.audio, budget, self.log, device, seed)
        elif isinstance(stage, VaeSettings):
            film = studio.film_takes(self.held_out, 0, slice(20, 20 + stage.clip))
            train_vae(self.nets.vae, studio, film, stage, budget, self.log, seed)
        else:
            film = studio.film_takes(self.held_out, 0)
            keep = functools.partial(self.keep, name, budget)
            train_dit(self.nets, studio, film, self.held_out, settings.dit, budget, self.log, seed, keep)
        self.facts["minutes"][name] += budget.spent

    def keep(self, name: str, budget: Budget) -> None:
        """Write the state in the middle of a stage (first rank only), so that an interrupted run loses only
        a minute."""
        if self.ranks.leads:
            minutes = self.facts["minutes"] | {name: self.facts["minutes"][name] + budget.spent}
            save_state(self.nets, self.facts | {"minutes": minutes}, self.out)

    def close(self) -> None:
        """End the workers and disconnect from the other ranks."""
        self.factory.close()
        self.ranks.leave()

    def finish(self, steps: int) -> None:
        """Write the state, the curves and, after a DiT stage, a sheet of samples (first rank only)."""
        self.facts["sessions"] += 1
        out = self.out
        save_state(self.nets, self.facts, out)
        _draw_curves(self.log.rows, out / "curves.png")
        if self.facts["minutes"]["dit"]:
            studio = Studio(iter(()), 0, self.device)
            for name, takes in (
                ("still", [still(take) for take in self.held_out]),
                ("moving", self.held_out),
            ):
                drive = drive_of(takes, self.device)
                sampled = sample(self.nets, studio.film_takes(takes, 0), drive, steps, AUDIO_SCALE)
                print(
                    f"samples, {name}: {steps} steps: mouth_r {sampled.mouth_r:.3f}, "
                    f"eyes_r {sampled.eyes_r:.3f}, {sampled.psnr:.2f} dB",
                    flush=True,
                )
                sheet(sampled).save(out / f"sheet_{name}.jpg", quality=80)


def _draw_curves(rows: list[dict[str, Any]], path: Path) -> None:
    """One small plot per measurement, from its minimum to its maximum, over the minutes of the stage."""
    shown = (
        ("vae", "psnr"),
        ("decoder", "psnr"),
        ("audio", "accuracy"),
        ("audio", "jaw_r"),
        ("dit", "loss"),
        ("dit", "held_out"),
    )
    width, height = 260, 160
    image = Image.new("RGB", (width * len(shown), height + 30), "white")
    draw = ImageDraw.Draw(image)
    for number, (stage, name) in enumerate(shown):
        points = [(row["minutes"], row[name]) for row in rows if row["stage"] == stage and name in row]
        if len(points) < 2:
            continue
        (left, right), (low, high) = ((min(values), max(values)) for values in zip(*points, strict=True))
        place = [
            (
                number * width + 15 + (width - 30) * (x - left) / max(right - left, 1e-9),
                25 + height - (height - 20) * (y - low) / max(high - low, 1e-9),
            )
            for x, y in points
        ]
        draw.line(place, fill="navy", width=2)
        draw.text(
            (number * width + 15, 4), f"{stage} {name} {low:.3g}..{high:.3g}, {right:.1f} min", fill="black"
        )
    image.save(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--stages", nargs="+", required=True, help="such as vae=5 audio=3 dit=12 (minutes)")
    parser.add_argument("--config", type=Path, default=FOLDER / "configs" / "pocket.yaml")
    parser.add_argument("--resume", type=Path, help="folder written by an earlier session")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--sample-steps", type=int, default=STEPS)
    arguments = parser.parse_args()
    stages = parse_stages(arguments.stages)
    ranks, device = TrainingRanks.join()
    torch.backends.cudnn.benchmark = True
    settings = read_settings(arguments.config)
    with tempfile.TemporaryDirectory() as folder:
        session = Session(settings, arguments.resume, ranks, device, Path(folder), arguments.out)
        check_order(stages, session.facts["minutes"]["dit"] > 0)
        for name, minutes in stages:
            session.run(name, minutes)
            if ranks.leads:
                save_state(session.nets, session.facts, arguments.out)
        if ranks.leads:
            session.finish(arguments.sample_steps)
        session.close()
    if ranks.leads:
        print(json.dumps({"minutes": session.facts["minutes"], "sessions": session.facts["sessions"]}))
