"""Settings of a training run: YAML files below `configs/`, read strictly into frozen dataclasses."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import yaml


@dataclass(frozen=True)
class SpeechSettings:
    """Speech for the session."""

    utterances: int
    """Number of sentences, half by each synthesiser; a thousand last about 53 minutes. 0: only `recorded`."""
    foreign: float
    """Share of more sentences in French and German, relative to `utterances`."""
    recorded: str | list[str]
    """A `SpeechSet` file to add, such as one of `record`, or a list of them; or empty.

    Paths are relative to the repository root."""
    copies: int
    """How often `recorded` is added, since it is small beside the synthesised speech."""
    held_out: str
    """A `SpeechSet` file of real speech for measurements only, never for training; or empty."""

    def __post_init__(self) -> None:
        files = self.recorded_files
        if not all(isinstance(each, str) and each for each in files) or len(set(files)) < len(files):
            raise ValueError(f"recorded: {self.recorded!r} is neither a file nor a list of different files")

    @property
    def recorded_files(self) -> list[str]:
        """The files of `recorded`."""
        if isinstance(self.recorded, list):
            return self.recorded
        return [self.recorded] if self.recorded != "" else []


@dataclass(frozen=True)
class StageSettings:
    """Settings of every stage."""

    planned_minutes: float
    """Minutes of all sessions; the learning rate falls along a cosine until their end."""
    rate: float
    """Maximum learning rate of AdamW."""
    muon_rate: float
    """Learning rate of Muon for the matrices of transformer blocks; 0: AdamW for all weights."""
    warmup: int
    batch: int
    decay: float
    """Decay of the moving average of the weights; the average is the result."""
    pool: int
    """Clips held on the device."""
    fill_share: float
    """Maximum share of a session's minutes for filling the pool before the first step."""
    fresh: int
    """New clips after every `fresh_every` steps."""
    fresh_every: int
    measure_seconds: float
    """Seconds between two measurements on held-out clips."""


@dataclass(frozen=True)
class PictureSettings(StageSettings):
    """Settings of the stages that make pictures."""

    frames: int
    """Video frames of a take."""
    gradient: float
    mouth: float
    """Extra weight of the area around the mouth."""
    eyes: float
    """Extra weight of the areas of the irises."""
    detail: float
    """Weight of the difference in local fine structure."""
    steady: float
    """Weight of the change of the error from one frame to the next, against flicker."""


@dataclass(frozen=True)
class VaeSettings(PictureSettings):
    clip: int
    """Frames of a take that are kept, from a random position."""
    still_share: float
    """Share of the planned minutes, at the start, that trains on single frames: four times as many, and much
    cheaper."""
    crop: int
    kl: float


@dataclass(frozen=True)
class DecoderSettings(VaeSettings):
    """Settings of the decoder alone: the latents do not change, so a trained DiT stays valid."""

    from_layer: int
    """First layer of the decoder's `upsamples` that is trained; earlier layers stay fixed, which makes steps
    cheap enough for a CPU. 0: the whole decoder is trained."""
    cost: float
    """Maximum loss of PSNR on held-out clips for fine structure, in dB."""


@dataclass(frozen=True)
class AudioSettings(StageSettings):
    frames: int
    shape: float
    """Weight of the articulators' squared error relative to the phones' cross-entropy."""


@dataclass(frozen=True)
class DitSettings(StageSettings):
    frames: int
    """Video frames of a story; windows are cut from it."""
    windows: int
    """Windows per story; the first one is at its start."""
    drop_audio: float
    drop_text: float
    corrupt: float
    """Share of later windows whose given latents are disturbed."""
    doubles: bool
    """Whether the last window of each story begins with a double (`training.handover`)."""
    mouth: float
    """Extra weight of the area around the mouth."""
    eyes: float
    """Extra weight of the areas around the eyes."""
    steady: float
    """Weight of the change of the error from one latent frame to the next, against flicker."""
    at_steps: float
    """Share of examples at the noise levels of the packaged configuration; the others are at any level."""
    mirror: bool
    """Whether to use each clip a second time, mirrored and in other light."""
    compile: bool
    graph: bool
    """Whether to replay each step as a CUDA graph; CUDA only."""


@dataclass(frozen=True)
class StudentSettings(StageSettings):
    """Settings of the block-causal student (`training.stage_student`)."""

    frames: int
    """Video frames of a story, whose latents are a whole number of blocks."""
    run: int
    """Latents of a story that an example has."""
    begins: float
    """Share of examples that certainly begin with the portrait; the others begin anywhere."""
    block: int
    """This and the next two: see `omniavatar.sampling.causal.CausalWindow`."""
    window: int
    sink: int
    timesteps: list[float]
    """Of the denoising steps, 1000 first."""
    at_first: float
    """Share of examples at the first of them; the others are at the later ones."""
    from_own: float
    """Share of examples at the later ones that begin with the student's own blocks, not with the film."""
    mouth: float
    """Extra weight of the area around the mouth."""
    eyes: float
    """Extra weight of the areas around the eyes."""
    blinks: float
    """More of it in latents with a blink."""
    steady: float
    """Weight of the change of the error from one latent frame to the next, against flicker."""
    edges: float
    """Weight of the change of the error from one latent pixel to the next."""
    robust: float
    """Error of a latent pixel above which its size counts, not its square."""
    own_share: float
    """Share of examples that see the student's own blocks as the past."""
    mixed_share: float
    """Share of examples that see blocks of the film and of its own."""
    lost_share: float
    """Share of examples that see noise as the past."""
    corrupt: float
    """Share of examples whose finished blocks of the film are disturbed."""
    whole_sound: float
    """Share of stories whose sound is encoded as a whole; that of the others comes block by block."""
    own: int
    """Stories that are rolled out together, for the past of examples."""
    own_every: int
    """Steps between two roll-outs."""
    mirror: bool
    """Whether to use each clip a second time, mirrored and in other light."""
    compile: bool
    graph: bool
    """Whether to replay each step as a CUDA graph; CUDA only."""


@dataclass(frozen=True)
class TinySettings(PictureSettings):
    """Settings of the small decoder (`training.stage_tiny`)."""

    widths: list[int]
    """See `omniavatar.model.tiny_decoder.TinyDecoderConfig`."""
    clip: int
    """Latents of an example."""
    corrupt: float
    """Share of examples whose latents are disturbed."""


@dataclass(frozen=True)
class LiveSettings:
    """All settings of a training run for live use."""

    seed: int
    speech: SpeechSettings
    student: StudentSettings
    tiny: TinySettings


@dataclass(frozen=True)
class Settings:
    """All settings of a training run."""

    seed: int
    speech: SpeechSettings
    vae: VaeSettings
    decoder: DecoderSettings
    audio: AudioSettings
    dit: DitSettings


def read_settings(path: Path) -> Settings:
    """Raise ValueError if a key is missing or unknown."""
    kinds = {
        "speech": SpeechSettings,
        "vae": VaeSettings,
        "decoder": DecoderSettings,
        "audio": AudioSettings,
        "dit": DitSettings,
    }
    settings: Settings = _read(Settings, kinds, path)
    return settings


def read_live_settings(path: Path) -> LiveSettings:
    """Raise ValueError if a key is missing or unknown."""
    kinds = {"speech": SpeechSettings, "student": StudentSettings, "tiny": TinySettings}
    settings: LiveSettings = _read(LiveSettings, kinds, path)
    return settings


def _read(whole: Any, kinds: dict[str, Any], path: Path) -> Any:
    table = yaml.safe_load(path.read_text())
    parts = {name: _build(kind, table.get(name), f"{path}: {name}") for name, kind in kinds.items()}
    return _build(whole, {**table, **parts}, str(path))


def _build(kind: Any, table: Any, where: str) -> Any:
    known = {field.name for field in fields(kind)}
    given = set(table) if isinstance(table, dict) else set()
    if given != known:
        raise ValueError(
            f"{where}: missing {sorted(known - given) or 'nothing'}, "
            f"unknown {sorted(given - known) or 'nothing'}"
        )
    try:
        return kind(**table)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
