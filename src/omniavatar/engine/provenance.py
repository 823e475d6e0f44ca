"""The C2PA manifest of a finished video: who made it, with what program, from which inputs.

It states that a model made the video (`trainedAlgorithmicMedia`). The portrait and the voice are ingredients,
known by a hash of their content; their content is in the manifest only if the configuration asks for it. A
video that goes on from a finished one names that one as its parent, and carries the parent's manifest.
"""

from __future__ import annotations

import base64
import hashlib
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from omniavatar import __version__
from omniavatar.engine.marks import sidecar_record
from omniavatar.errors import ConfigError, InputError
from omniavatar.media.signatures import HEAD_BYTES, content_of
from omniavatar.media.signing import SOURCE_TYPES, Credentials, Embedded, Signer
from omniavatar.text import open_regular
from omniavatar.types import Waveform, bytes_text

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from omniavatar.config.schema import OutputConfig
    from omniavatar.engine.job import Job
    from omniavatar.engine.prepare import Inputs
    from omniavatar.types import AvatarRequest

SOURCE_TYPE = f"{SOURCE_TYPES}trainedAlgorithmicMedia"
MOST_EMBEDDED_BYTES = 64 * 10**6
PORTRAIT, VOICE, PARENT = "portrait", "voice", "parent"
_MEDIA_TYPES = {
    "PNG": "image/png",
    "JPEG": "image/jpeg",
    "WebP": "image/webp",
    "HEIC": "image/heic",
    "AVIF": "image/avif",
    "TIFF": "image/tiff",
    "BMP": "image/bmp",
    "GIF": "image/gif",
    "JPEG 2000": "image/jp2",
    "MP3": "audio/mpeg",
    "MP3 or AAC": "audio/mpeg",
    "FLAC": "audio/flac",
    "Ogg": "audio/ogg",
    "WAV": "audio/wav",
    "AIFF": "audio/aiff",
    "M4A": "audio/mp4",
    "MP4": "video/mp4",
}
_OTHER = "application/octet-stream"


@dataclass(frozen=True)
class _Asset:
    """An input as an ingredient. path: of its file; None for one in memory."""

    name: str
    media_type: str
    identity: str
    description: str
    path: Path | None

    def ingredient(self, embed: bool) -> dict[str, Any]:
        values = {
            "title": self.name,
            "format": self.media_type,
            "relationship": "inputTo",
            "label": self.name,
            "instance_id": self.identity,
            "description": self.description,
        }
        return values | ({"data": {"format": self.media_type, "identifier": self.name}} if embed else {})


def is_wanted(output: OutputConfig, request: AvatarRequest) -> bool:
    """Whether the video of a request gets a manifest."""
    return output.provenance if request.provenance is None else request.provenance


def refuse_frames(output: OutputConfig, request: AvatarRequest) -> None:
    """Raise ConfigError if frames that are only streamed should have a manifest."""
    if is_wanted(output, request):
        raise ConfigError(
            "provenance: only a finished .mp4 file can be signed, not a stream of frames; write a file, or "
            "set provenance=false"
        )


def signer_of(output: OutputConfig) -> Signer:
    """The signer of a configuration. Raises ConfigError, ResourceError."""
    return Signer(
        Credentials(
            output.provenance_certificate,
            output.provenance_key,
            output.provenance_algorithm,
            output.provenance_timestamp,
        )
    )


class Signing:
    """Signs the video of one request.

    record: what the sidecar says; empty before the video is signed.
    """

    def __init__(self, output: OutputConfig, request: AvatarRequest) -> None:
        """Raises ConfigError, ResourceError, and InputError for inputs that cannot be embedded."""
        self._signer = signer_of(output)
        self._embeds = output.provenance_inputs == "contents"
        self._stamped = bool(output.provenance_timestamp)
        self.record: dict[str, Any] = {}
        if self._embeds:
            for name, value in ((PORTRAIT, request.image), (VOICE, request.audio)):
                if value is not None:
                    _check_embeddable(name, value)

    @property
    def warnings(self) -> tuple[str, ...]:
        return self._signer.warnings

    def of(self, inputs: Inputs, output: Path) -> Callable[[Path], None]:
        """What signs the complete file of `output`, which may lie at a temporary path."""
        return partial(self._sign, inputs, output)

    def has_signed(self, job: Job) -> bool:
        """Whether the finished video of a job has a manifest by this certificate, with such inputs."""
        record = (sidecar_record(job.sidecar) or {}).get("provenance")
        return isinstance(record, dict) and all(
            record.get(name) == value for name, value in self._kind.items()
        )

    def sign_finished(self, job: Job, inputs: Inputs) -> None:
        """Sign a finished video. Raises what `Signer.sign` raises.

        A crash between the video and its sidecar leaves a video of another size than the sidecar says, which
        is made again.
        """
        from omniavatar.media.atomic import atomic_write_json

        record = sidecar_record(job.sidecar)
        assert record is not None
        self._sign(inputs, job.output, job.output)
        values = {**record, "bytes": job.output.stat().st_size, "provenance": self.record}
        atomic_write_json(job.sidecar, values)

    @property
    def _kind(self) -> dict[str, Any]:
        return {
            "certificate_sha256": self._signer.digest,
            "algorithm": self._signer.algorithm,
            "inputs": "contents" if self._embeds else "hashes",
            "timestamp": self._stamped,
        }

    def _sign(self, inputs: Inputs, output: Path, path: Path) -> None:
        assets = [_portrait(inputs), *_voice(inputs)]
        begun = inputs.begun
        parent = None
        if begun is not None:
            ingredient = {"title": PARENT, "relationship": "parentOf", "label": PARENT}
            ingredient |= _file_identity(begun.path)
            parent = (ingredient, begun.path)
        embedded = tuple(
            Embedded(asset.name, asset.path) for asset in assets if self._embeds and asset.path is not None
        )
        manifest = _manifest(output.name, assets, self._embeds, parent is not None)
        label = self._signer.sign(path, manifest, embedded, parent, output)
        self.record = {"manifest": label, **self._kind}


def _manifest(title: str, assets: list[_Asset], embed: bool, goes_on: bool) -> dict[str, Any]:
    """The manifest of a video, without its parent, which is added with its file."""
    agent = {"name": "omniavatar", "version": __version__}
    made: dict[str, Any] = {
        "action": "c2pa.edited" if goes_on else "c2pa.created",
        "digitalSourceType": SOURCE_TYPE,
        "softwareAgent": agent,
        "when": datetime.now(UTC).isoformat(timespec="seconds"),
        "parameters": {"ingredientIds": [asset.name for asset in assets]},
    }
    opened = {"action": "c2pa.opened", "parameters": {"ingredientIds": [PARENT]}}
    actions = [opened, made] if goes_on else [made]
    return {
        "claim_generator_info": [agent],
        "title": title,
        "format": "video/mp4",
        "ingredients": [asset.ingredient(embed) for asset in assets],
        "assertions": [{"label": "c2pa.actions.v2", "data": {"actions": actions}}],
    }


def _portrait(inputs: Inputs) -> _Asset:
    image = inputs.request.image
    if isinstance(image, str | Path):
        return _file_asset(PORTRAIT, Path(image))
    pixels = np.ascontiguousarray(inputs.image).tobytes()
    return _Asset(
        PORTRAIT, _OTHER, _identity(hashlib.sha256(pixels).digest()), "SHA-256 of its 8-bit RGB pixels", None
    )


def _voice(inputs: Inputs) -> Iterator[_Asset]:
    audio = inputs.request.audio
    if isinstance(audio, Waveform):
        digest = hashlib.sha256(np.ascontiguousarray(audio.samples).tobytes()).digest()
        yield _Asset(
            VOICE, _OTHER, _identity(digest), f"SHA-256 of its samples at {audio.sample_rate} Hz", None
        )
    elif audio is not None:
        yield _file_asset(VOICE, Path(audio))


def _file_asset(name: str, path: Path) -> _Asset:
    with open_regular(path) as file:
        content = content_of(file.read(HEAD_BYTES) or b"")
    media_type = _MEDIA_TYPES.get(content.name, _OTHER) if content else _OTHER
    values = _file_identity(path)
    return _Asset(name, media_type, values["instance_id"], values["description"], path)


def _file_identity(path: Path) -> dict[str, str]:
    with open_regular(path) as file:
        digest = hashlib.file_digest(file, "sha256").digest()
    return {"instance_id": _identity(digest), "description": "SHA-256 of its file"}


def _identity(digest: bytes) -> str:
    """A digest as a name of RFC 6920."""
    return f"ni:///sha-256;{base64.urlsafe_b64encode(digest).rstrip(b'=').decode()}"


def _check_embeddable(name: str, value: Any) -> None:
    if not isinstance(value, str | Path):
        raise InputError(f"{name}: provenance_inputs=contents needs it as a file; give a path or bytes")
    path = Path(value)
    if path.is_file() and path.stat().st_size > MOST_EMBEDDED_BYTES:
        raise InputError(
            f"{path}: has {bytes_text(path.stat().st_size)}, too much to embed in a manifest (at most "
            f"{bytes_text(MOST_EMBEDDED_BYTES)}); set provenance_inputs=hashes"
        )


def identity_of(output: OutputConfig) -> Mapping[str, Any]:
    """What the configuration adds to the identity of a delivered video; nothing without provenance."""
    if not output.provenance:
        return {}
    certificate = output.provenance_certificate
    digest = None
    if certificate is not None and certificate.is_file():
        digest = _file_identity(certificate)["instance_id"]
    return {"provenance": [digest, output.provenance_inputs, bool(output.provenance_timestamp)]}
