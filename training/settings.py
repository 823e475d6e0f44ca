"""Settings of a training run: YAML files below `configs/`, read strictly into frozen dataclasses."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import yaml


@dataclass(frozen=True)
class SpeechSettings:
    """What is synthesised before the stages begin."""

    utterances: int
    """Sentences, half by each synthesiser; a thousand are about 53 minutes. 0: only what is recorded."""
    recorded: str
    """A `SpeechSet` file to add, such as `record` makes, below the repository root; or empty."""
    copies: int
    """How often it is added, since it is small beside the synthesised speech."""
    held_out: str
    """A `SpeechSet` file of real speech that is only measured on, never trained on; or empty."""


@dataclass(frozen=True)
class StageSettings:
    """What every stage has."""

    planned_minutes: float
    """Over all sessions; the learning rate falls along a cosine to the end of this."""
    rate: float
    """Of AdamW at its highest."""
    muon_rate: float
    """Of Muon for the matrices of transformer blocks; 0: AdamW for all."""
    warmup: int
    batch: int
    decay: float
    """Of the weights' moving average, which is what is kept."""
    pool: int
    """Clips held on the device."""
    fill_share: float
    """Share of a session's minutes spent on filling the pool before the first step, at most."""
    fresh: int
    """Clips made anew after each `fresh_every` steps."""
    fresh_every: int
    measure_seconds: float
    """Seconds between two measurements on held-out clips."""


@dataclass(frozen=True)
class VaeSettings(StageSettings):
    frames: int
    """Video frames of a take."""
    clip: int
    """Frames of it that are kept, from anywhere."""
    still_share: float
    """Share of the planned minutes, at the start, that sees single frames: four times as many, far
    cheaper."""
    crop: int
    kl: float
    gradient: float
    mouth: float
    """Extra weight of the mouth's surroundings."""
    detail: float
    """Weight of the difference in local fine structure."""


@dataclass(frozen=True)
class DecoderSettings(VaeSettings):
    """The decoder alone: the latents stay what they are, so that what a DiT has learnt of them holds."""

    from_layer: int
    """Of the decoder's `upsamples`: what comes before it stays as it is, which makes steps cheap enough for
    a CPU; 0: all of the decoder learns."""
    cost: float
    """Decibels of PSNR on held-out clips that fine structure may cost."""


@dataclass(frozen=True)
class AudioSettings(StageSettings):
    frames: int
    shape: float
    """Weight of the articulators' squared error beside the phones' cross-entropy."""


@dataclass(frozen=True)
class DitSettings(StageSettings):
    frames: int
    """Video frames of a story; windows are cut from it."""
    windows: int
    """Windows a story, the first at its start."""
    drop_audio: float
    drop_text: float
    corrupt: float
    """Share of later windows whose given latents are disturbed."""
    doubles: float
    """Share of later windows that are handed frames of a double; 0: none are filmed."""
    mouth: float
    mirror: bool
    """Each clip a second time, mirrored and in other light."""
    compile: bool
    graph: bool
    """Replay each step as a CUDA graph; CUDA only."""


@dataclass(frozen=True)
class Settings:
    """One training run."""

    seed: int
    speech: SpeechSettings
    vae: VaeSettings
    decoder: DecoderSettings
    audio: AudioSettings
    dit: DitSettings


def read_settings(path: Path) -> Settings:
    """Raises ValueError for a key that is missing or unknown."""
    table = yaml.safe_load(path.read_text())
    kinds = {
        "speech": SpeechSettings,
        "vae": VaeSettings,
        "decoder": DecoderSettings,
        "audio": AudioSettings,
        "dit": DitSettings,
    }
    parts: dict[str, Any] = {
        name: _build(kind, table.get(name), f"{path}: {name}") for name, kind in kinds.items()
    }
    return _build(Settings, {**table, **parts}, str(path))


def _build(kind: Any, table: Any, where: str) -> Any:
    wanted = {field.name for field in fields(kind)}
    given = set(table) if isinstance(table, dict) else set()
    if given != wanted:
        raise ValueError(
            f"{where}: missing {sorted(wanted - given) or 'nothing'}, "
            f"unknown {sorted(given - wanted) or 'nothing'}"
        )
    return kind(**table)
