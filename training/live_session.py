"""One call of `training.live`: the block-causal student or the small decoder, beside the packaged model.

The folder of the result gets `student-000k.safetensors` (below 16 MiB each) or `tiny-0000.safetensors`, in
float16, and `live.json` (minutes and log), from which `--resume` continues; the student also what
`training.roll_outs` writes. Under torchrun, all GPUs train one student.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import os
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import nn

from omniavatar.checkpoint.layout_files import TOKENIZER
from omniavatar.config.values import POCKET_WEIGHTS
from omniavatar.model.tiny_decoder import TinyDecoder, TinyDecoderConfig
from training.head import Head
from training.loop import Budget, Log
from training.nets import Nets, load_shards, save_shards
from training.ranks import TrainingRanks
from training.roll_outs import long_roll_outs, long_takes
from training.session import OVERSHOOT, gather_speech, resume_from
from training.settings import LiveSettings, read_live_settings
from training.speech import SpeechSet
from training.stage_student import train_student
from training.stage_tiny import fill_in, train_tiny
from training.studio import HELD_OUT_SEEDS, Studio
from training.takes import Take, TakeFactory, make_take

FOLDER = Path(__file__).parent
STAGES = ("student", "tiny")
HELD_OUT_CLIPS = {"cuda": 8, "cpu": 1}
SEED_OF_LIVE = 900_000_000
"""Seeds that no session of `training.run` reaches."""


def tiny_of(settings: LiveSettings) -> TinyDecoder:
    """A small decoder with its start weights."""
    first, second, third, last = settings.tiny.widths
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        tiny = TinyDecoder(TinyDecoderConfig((first, second, third, last)))
        fill_in(tiny)
    return tiny


def workers_of_a_process() -> int:
    """Processes that make takes for one training process; a decoder is trained beside a student."""
    cores = os.cpu_count() or 2
    if not torch.cuda.is_available():
        return max(1, cores - 1)
    return max(1, cores // (1 + int(os.environ.get("LOCAL_WORLD_SIZE", "1"))) - 2)


class LiveTraining:
    """One call: the networks, what earlier calls left, and one stage.

    folder: for speech.
    """

    def __init__(
        self,
        stage: str,
        settings: LiveSettings,
        weights: Path,
        resume: Path | None,
        ranks: TrainingRanks,
        device: torch.device,
        folder: Path,
        out: Path,
    ) -> None:
        self.stage, self.settings, self.ranks, self.device, self.out = stage, settings, ranks, device, out
        self.nets = Nets.fresh(settings.seed, FOLDER / "assets" / TOKENIZER)
        resume_from(self.nets, weights)
        self.tiny = tiny_of(settings)
        self.facts: dict[str, Any] = {"calls": 0, "minutes": dict.fromkeys(STAGES, 0.0), "log": []}
        if resume is not None:
            self.trained.load_state_dict(load_shards(resume, stage))
            self.facts = json.loads((resume / "live.json").read_text())
        self.nets.to(device)
        self.tiny.to(device)
        self.log = Log(self.facts["log"])
        workers = workers_of_a_process()
        first = 100 * (1 + self.facts["calls"]) + 50 * STAGES.index(stage)
        speech = gather_speech(settings, first, ranks, workers, folder)
        names = Head("cpu").names
        self.factory = TakeFactory(folder, names, workers, live=True)
        elsewhere = settings.speech.held_out
        spoken = SpeechSet.load(Path(elsewhere)) if elsewhere else speech
        stage_settings = getattr(settings, stage)
        self.held_out: list[Take] = [
            make_take(spoken, names, stage_settings.frames, seed, speech_alone=True, live=True)
            for seed in range(HELD_OUT_CLIPS[device.type])
        ]
        self.long: list[Take] = []
        if stage == "student" and ranks.leads:
            self.long = long_takes(spoken, names, HELD_OUT_CLIPS[device.type])
        each = itertools.count(SEED_OF_LIVE + 20 * first * HELD_OUT_SEEDS // 100, HELD_OUT_SEEDS)
        self.seed = next(itertools.islice(each, ranks.index, None))

    @property
    def trained(self) -> nn.Module:
        """The network of the stage."""
        return self.nets.dit if self.stage == "student" else self.tiny

    def run(self, minutes: float) -> None:
        """Train for `minutes`. Raises ValueError if the learning rate would reach zero before its end."""
        stage = getattr(self.settings, self.stage)
        before = self.facts["minutes"][self.stage]
        if before + minutes > stage.planned_minutes + OVERSHOOT:
            raise ValueError(
                f"{self.stage}: planned_minutes is {stage.planned_minutes:g}, but earlier calls took "
                f"{before:.2f} and this one adds {minutes:g}; set it to {before + minutes:.2f} or more"
            )
        budget = Budget(minutes, stage.planned_minutes, before, self.ranks)
        torch.manual_seed(self.seed)
        studio = Studio(self.factory.stream(stage.frames, self.seed), self.seed, self.device)
        film = studio.film_takes(self.held_out, 0)
        keep = functools.partial(self.keep, budget)
        if self.stage == "student":
            train_student(
                self.nets, studio, film, self.held_out, stage, budget, self.log, self.seed, keep
            )  # fmt: skip
        else:
            train_tiny(self.tiny, self.nets, studio, film.frames, stage, budget, self.log, self.seed, keep)
        self.facts["minutes"][self.stage] += budget.spent
        self.facts["calls"] += 1
        if self.ranks.leads:
            self.write(self.facts)
            if self.stage == "student":
                long_roll_outs(self.nets, studio, self.long, stage, self.out)

    def keep(self, budget: Budget) -> None:
        """Write the state in the middle of a stage, so that an interrupted call loses only a minute."""
        if self.ranks.leads:
            spent = self.facts["minutes"] | {self.stage: self.facts["minutes"][self.stage] + budget.spent}
            self.write(self.facts | {"minutes": spent, "calls": self.facts["calls"] + 1})

    def write(self, facts: dict[str, Any]) -> None:
        """Write the trained network and `facts`."""
        weights = {name: value.contiguous() for name, value in self.trained.state_dict().items()}
        save_shards(weights, self.out, self.stage)
        (self.out / "live.json").write_text(json.dumps(facts, indent=1) + "\n")

    def close(self) -> None:
        """End the workers and disconnect from the other ranks."""
        self.factory.close()
        self.ranks.leave()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("stage", help="student=MINUTES or tiny=MINUTES")
    parser.add_argument("--config", type=Path, default=FOLDER / "configs" / "live.yaml")
    parser.add_argument("--weights", type=Path, default=POCKET_WEIGHTS, help="the model it belongs to")
    parser.add_argument("--resume", type=Path, help="folder written by an earlier call")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    stage, _, minutes = arguments.stage.partition("=")
    if stage not in STAGES or not minutes:
        parser.error(f"{arguments.stage!r} is neither student=MINUTES nor tiny=MINUTES")
    ranks, device = TrainingRanks.join()
    torch.backends.cudnn.benchmark = True
    settings = read_live_settings(arguments.config)
    with tempfile.TemporaryDirectory() as folder:
        training = LiveTraining(
            stage, settings, arguments.weights, arguments.resume, ranks, device, Path(folder), arguments.out
        )
        training.run(float(minutes))
        training.close()
    if ranks.leads:
        print(json.dumps({"minutes": training.facts["minutes"], "calls": training.facts["calls"]}))
