"""The identity of a request: everything that decides a video's frames, as printable values."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from omniavatar import __version__
from omniavatar.checkpoint.fingerprint import content_identity
from omniavatar.config.identity import result_values
from omniavatar.config.sparsity import SPARSE_NAME
from omniavatar.engine.job import fingerprint
from omniavatar.errors import InputError
from omniavatar.plan.calibration import NAME as STEP_CACHE
from omniavatar.plan.preview import WEIGHT_FIELDS, weight_paths
from omniavatar.text import open_regular
from omniavatar.types import LocalAudio, Waveform

if TYPE_CHECKING:
    from omniavatar.config.schema import ModelConfig, PipelineConfig
    from omniavatar.engine.models import Models
    from omniavatar.engine.prepare import Inputs
    from omniavatar.plan.placement import Placement

CONTENT_LETTERS = 32
READ_BYTES = 2**20
"""A sound file is read in blocks of this size."""


def request_identity(
    config: PipelineConfig, inputs: Inputs, encoder: str, placement: Placement, models: Models
) -> dict[str, str]:
    """The identity of a request: configuration, weight files, inputs, placement, package version.

    The step cache's constants count by their numbers, not by their file.

    - encoder: the backend that `output.encoder` selected.
    """
    values = content_values(config.model_copy(update={"sampling": inputs.sampling}))
    del values["sampling.step_cache_file"]
    values["step cache constants"] = "none" if inputs.constants is None else inputs.constants.digest
    if inputs.shape.sparsity is not None and models.sparse is not None:
        del values["sparsity.sparse_file"]
        values["sparse attention plan"] = inputs.shape.sparsity.digest
        values["sparsity.sparse_backend"] = models.sparse.name
    values["output.encoder"] = encoder
    values["runtime.attention"] = models.attention_name
    values |= placement.identity() | models.numerics
    values["request.prompt"] = inputs.request.prompt if config.family.text else ""
    values["request.image"] = _sha256([_bytes(inputs.image)])
    values["request.audio"] = audio_digest(inputs.request.audio)
    if inputs.request.size is not None:
        values["request.size"] = inputs.request.size
    if inputs.begun is not None:
        values["request.continues"] = audio_digest(inputs.begun.path)
    values["omniavatar"] = __version__
    return fingerprint(values)


def content_values(config: PipelineConfig) -> dict[str, Any]:
    """What decides the frames of all requests of a configuration: settings, and weights by their content.

    The folder of a checkpoint does not count, so a copy elsewhere is the same.
    """
    model = config.model
    values = {**result_values(config), **weight_identities(model)}
    if all(path.exists() for path in weight_paths(model)):
        for name in WEIGHT_FIELDS:
            values.pop(f"model.{name}", None)
        values["model.loras"] = [
            {"file": lora.path.name, "content": _content(lora.path), "strength": lora.strength}
            for lora in (model.loras if model.weights == "files" else ())
        ]
    return values


def weight_identities(model: ModelConfig) -> dict[str, str]:
    """The content of every configured file and folder of weights that exists, as `file.<name>`.

    A copy of a checkpoint has the same identity; `checkpoint.fingerprint` says what sampling can miss.
    """
    found: dict[str, list[str]] = {}
    for path in weight_paths(model):
        if path.exists():
            found.setdefault(f"file.{path.name}", []).append(_content(path))
    return {name: "; ".join(contents) for name, contents in found.items()}


def _content(path: Path) -> str:
    if not path.is_dir():
        return content_identity(path)[:CONTENT_LETTERS]
    digest = hashlib.sha256()
    for file in sorted(path.rglob("*")):
        inside = file.relative_to(path)
        if (
            file.is_file()
            and file.name not in (STEP_CACHE, SPARSE_NAME)
            and not any(p.startswith(".") for p in inside.parts)
        ):
            digest.update(f"{inside.as_posix()}\n{content_identity(file)}\n".encode(errors="surrogateescape"))
    return digest.hexdigest()[:CONTENT_LETTERS]


def audio_digest(audio: LocalAudio | None) -> str:
    """SHA-256 of a sound file's content, or of a waveform's rate and samples. Raises InputError."""
    if audio is None:
        return "none"
    if isinstance(audio, Waveform):
        return _sha256([str(audio.sample_rate).encode(), _bytes(audio.samples)])
    try:
        with open_regular(audio) as file:
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
