"""The identity of a request: everything that decides a video's frames, as printable values."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from omniavatar import __version__
from omniavatar.checkpoint.fingerprint import file_stamp
from omniavatar.config.identity import result_values
from omniavatar.engine.job import fingerprint
from omniavatar.errors import InputError
from omniavatar.plan.calibration import NAME as STEP_CACHE
from omniavatar.types import LocalAudio, Waveform

if TYPE_CHECKING:
    from omniavatar.config.schema import ModelConfig, PipelineConfig
    from omniavatar.engine.models import Models
    from omniavatar.engine.prepare import Inputs
    from omniavatar.plan.placement import Placement

READ_BYTES = 2**20
"""A sound file is read in blocks of this size."""


def request_identity(
    config: PipelineConfig, inputs: Inputs, encoder: str, placement: Placement, models: Models
) -> dict[str, str]:
    """The identity of a request: configuration, weight files, inputs, placement, package version.

    The step cache's constants count by their numbers, not by their file.

    - encoder: the backend that `output.encoder` selected.
    """
    values = result_values(config.model_copy(update={"sampling": inputs.sampling}))
    del values["sampling.step_cache_file"]
    values["step cache constants"] = "none" if inputs.constants is None else inputs.constants.digest
    values["output.encoder"] = encoder
    values["runtime.attention"] = models.attention_name
    values |= placement.identity() | models.numerics
    values["request.prompt"] = inputs.request.prompt
    values["request.image"] = _sha256([_bytes(inputs.image)])
    values["request.audio"] = audio_digest(inputs.request.audio)
    values["omniavatar"] = __version__
    return fingerprint({**values, **weight_identities(config.model)})


def weight_identities(model: ModelConfig) -> dict[str, str]:
    """Size and modification time of every weight file that exists, as `file.<name>`."""
    named = (model.vae_path, model.decoder_path, model.text_encoder_path, model.wav2vec_path, model.exp_path)
    paths = (*model.dit_path, *named, *(lora.path for lora in model.loras))
    return {f"file.{path.name}": _file_identity(path) for path in paths if path is not None and path.exists()}


def _file_identity(path: Path) -> str:
    inside = (p for p in path.rglob("*") if p.is_file() and p.name != STEP_CACHE)
    files = sorted(inside) if path.is_dir() else [path]
    return "; ".join(file_stamp(file) for file in files)


def audio_digest(audio: LocalAudio | None) -> str:
    """SHA-256 of a sound file's content, or of a waveform's rate and samples. Raises InputError."""
    if audio is None:
        return "none"
    if isinstance(audio, Waveform):
        return _sha256([str(audio.sample_rate).encode(), _bytes(audio.samples)])
    try:
        with Path(audio).open("rb") as file:
            return _sha256(iter(lambda: file.read(READ_BYTES), b""))
    except OSError as error:
        raise InputError(f"audio {audio}: cannot be read ({error.strerror}); check the path") from None


def _sha256(parts: Iterable[bytes]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()


def _bytes(array: np.ndarray) -> bytes:
    return np.ascontiguousarray(array).tobytes()
