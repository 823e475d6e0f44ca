"""What decides a video's frames, as printable values: a request's identity."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from omniavatar import __version__
from omniavatar.checkpoint.fingerprint import file_stamp
from omniavatar.config.identity import result_values
from omniavatar.engine.job import fingerprint
from omniavatar.errors import InputError
from omniavatar.plan.calibration import NAME as STEP_CACHE
from omniavatar.types import AudioInput, Waveform

if TYPE_CHECKING:
    from omniavatar.config.schema import ModelConfig, PipelineConfig
    from omniavatar.engine.prepare import Inputs
    from omniavatar.plan.placement import Placement

READ_BYTES = 2**20


def request_identity(
    config: PipelineConfig, inputs: Inputs, encoder: str, placement: Placement, attention: str
) -> dict[str, str]:
    """What decides the frames of a request: configuration, weight files, inputs, package version.

    - inputs: of the step cache's constants the numbers count, not the file they come from.
    - encoder, attention: what `output.encoder` and `runtime.attention` chose.
    - placement: what was chosen for the available memory.
    """
    values = result_values(config.model_copy(update={"sampling": inputs.sampling}))
    del values["sampling.step_cache_file"]
    values["step cache constants"] = "none" if inputs.constants is None else inputs.constants.digest
    values["output.encoder"] = encoder
    values["runtime.attention"] = attention
    values |= placement.identity()
    values["request.prompt"] = inputs.request.prompt
    values["request.image"] = hashlib.sha256(np.ascontiguousarray(inputs.image).tobytes()).hexdigest()
    values["request.audio"] = _audio_digest(inputs.request.audio)
    values["omniavatar"] = __version__
    return fingerprint({**values, **weight_identities(config.model)})


def weight_identities(model: ModelConfig) -> dict[str, str]:
    """Size and time of every weight file there is, as `file.<name>`."""
    named = (model.vae_path, model.decoder_path, model.text_encoder_path, model.wav2vec_path, model.exp_path)
    paths = (*model.dit_path, *named, *(lora.path for lora in model.loras))
    return {f"file.{path.name}": _file_identity(path) for path in paths if path is not None and path.exists()}


def _file_identity(path: Path) -> str:
    inside = (p for p in path.rglob("*") if p.is_file() and p.name != STEP_CACHE)
    files = sorted(inside) if path.is_dir() else [path]
    return "; ".join(file_stamp(file) for file in files)


def _audio_digest(audio: AudioInput | None) -> str:
    if audio is None:
        return "none"
    digest = hashlib.sha256()
    if isinstance(audio, Waveform):
        digest.update(str(audio.sample_rate).encode())
        digest.update(np.ascontiguousarray(audio.samples).tobytes())
        return digest.hexdigest()
    try:
        with Path(audio).open("rb") as file:
            while block := file.read(READ_BYTES):
                digest.update(block)
    except OSError as error:
        raise InputError(f"audio {audio}: cannot be read ({error.strerror}); check the path") from None
    return digest.hexdigest()
