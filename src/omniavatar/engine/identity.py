"""What decides a video's frames, as printable values: a request's identity."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from omniavatar import __version__
from omniavatar.config.identity import result_values
from omniavatar.engine.job import fingerprint
from omniavatar.engine.writer import _READ_BYTES
from omniavatar.errors import InputError
from omniavatar.media.encoders import Encoder
from omniavatar.plan.calibration import NAME as STEP_CACHE
from omniavatar.types import AudioInput, AvatarRequest, Waveform

if TYPE_CHECKING:
    from omniavatar.config.schema import ModelConfig, PipelineConfig, SamplingConfig
    from omniavatar.plan.placement import Placement
    from omniavatar.sampling.cache_constants import CacheConstants


def request_fingerprint(
    config: PipelineConfig,
    sampling: SamplingConfig,
    request: AvatarRequest,
    image: np.ndarray,
    constants: CacheConstants | None,
    encoder: Encoder,
    placement: Placement,
    attention: str,
) -> dict[str, str]:
    """What decides the frames of a request: configuration, weight files, inputs, package version.

    constants: those of the step cache; their numbers count, not the file they come from. encoder: what
    `output.encoder` came to; the segments of one video are all made by it. placement: what was chosen for
    the memory there is. attention: the backend that `runtime.attention` came to.
    """
    values = result_values(config.model_copy(update={"sampling": sampling}))
    del values["sampling.step_cache_file"]
    values["step cache constants"] = "none" if constants is None else constants.digest
    values["output.encoder"] = encoder
    values["runtime.attention"] = attention
    values |= placement.identity()
    values["request.prompt"] = request.prompt
    values["request.image"] = hashlib.sha256(np.ascontiguousarray(image).tobytes()).hexdigest()
    values["request.audio"] = _audio_digest(request.audio)
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
    return "; ".join(f"{p.stat().st_size} bytes, modified {p.stat().st_mtime_ns}" for p in files)


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
            while block := file.read(_READ_BYTES):
                digest.update(block)
    except OSError as error:
        raise InputError(f"audio {audio}: cannot be read ({error.strerror}); check the path") from None
    return digest.hexdigest()
