"""Signs finished files with a C2PA manifest (package c2pa-python).

The certificate chain, the key and the algorithm are checked before any work, also by a trial signature. A
signed file keeps the pictures and the sound of the unsigned one, packet by packet.
"""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omniavatar.errors import ConfigError, OutputError, ResourceError
from omniavatar.media.atomic import atomic_path
from omniavatar.media.open_file import own_video
from omniavatar.media.provenance import load_package, read_provenance, reason, settings_of
from omniavatar.text import read_bytes

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.types import PrivateKeyTypes

MOST_PEM_BYTES = 2**20
ALGORITHMS = ("es256", "es384", "es512", "ps256", "ps384", "ps512", "ed25519")
_CURVES = {"secp256r1": "es256", "secp384r1": "es384", "secp521r1": "es512"}
SOURCE_TYPES = "http://cv.iptc.org/newscodes/digitalsourcetype/"
PAGE = "docs/provenance.md describes the certificate"


@dataclass(frozen=True)
class Credentials:
    """What signs. timestamp: URL of an RFC 3161 authority; empty for none. algorithm: or `auto`."""

    certificate: Path | None
    key: Path | None
    algorithm: str = "auto"
    timestamp: str = ""


@dataclass(frozen=True)
class Embedded:
    """A file that a manifest holds whole. name: by which the manifest names it."""

    name: str
    path: Path


class _Refused(Exception):
    """The package does not sign; its reason."""


class Signer:
    """Signs with checked credentials.

    digest: SHA-256 (hex) of the signing certificate.
    warnings: what the user should change.
    """

    def __init__(self, credentials: Credentials) -> None:
        """Raises ConfigError, and ResourceError without the packages."""
        self._c2pa = load_package()
        certificate = _named("provenance_certificate", credentials.certificate, "your certificate chain")
        key = _named("provenance_key", credentials.key, "its private key")
        self._certificate, self.warnings = certificate, tuple(_open_to_others(key))
        self._chain = _read("provenance_certificate", certificate)
        self._key = _read("provenance_key", key)
        self.digest, self.algorithm = _checked(credentials, certificate, self._chain, key, self._key)
        self._timestamp = credentials.timestamp
        self._try()

    def sign(
        self,
        path: Path,
        manifest: Mapping[str, Any],
        embedded: tuple[Embedded, ...] = (),
        parent: tuple[Mapping[str, Any], Path] | None = None,
        output: Path | None = None,
    ) -> str:
        """Replace the MP4 at `path` by the same with a manifest, whole or not at all; returns its label.

        parent: the ingredient, and the file, that the new one goes on from.
        output: the name in messages, if `path` is a temporary file.

        Raises OutputError, and ResourceError if the time stamp authority does not answer.
        """
        name = output or path
        with atomic_path(path) as signed:
            with path.open("rb") as source, signed.open("wb+") as target:
                try:
                    self._write("video/mp4", source, target, manifest, embedded, parent, self._timestamp)
                except _Refused as refused:
                    raise OutputError(f"{name}: cannot be signed ({refused}); {PAGE}") from None
            if _packets(signed) != _packets(path):
                raise OutputError(f"{name}: signing changed its pictures or its sound; report this as a bug")
            found = read_provenance(signed)
            if not found.holds:
                raise OutputError(
                    f"{name}: the new manifest does not hold ({'; '.join(found.problems)}); renew the "
                    "certificate if it has expired, then run the same command again"
                )
        return found.label

    def _write(
        self,
        kind: str,
        source: Any,
        target: Any,
        manifest: Mapping[str, Any],
        embedded: tuple[Embedded, ...] = (),
        parent: tuple[Mapping[str, Any], Path] | None = None,
        timestamp: str = "",
    ) -> None:
        c2pa = self._c2pa
        info = c2pa.C2paSignerInfo(
            self.algorithm.encode(), self._chain, self._key, timestamp.encode() if timestamp else None
        )
        try:
            with (
                c2pa.Context(settings_of(None)) as context,
                c2pa.Builder(dict(manifest), context=context) as builder,
                c2pa.Signer.from_info(info) as signer,
            ):
                for each in embedded:
                    with each.path.open("rb") as stream:
                        builder.add_resource(each.name, stream)
                if parent is not None:
                    with parent[1].open("rb") as stream:
                        builder.add_ingredient(dict(parent[0]), "video/mp4", stream)
                builder.sign(signer, kind, source, target)
        except c2pa.C2paError as error:
            if timestamp and "http resolver" in str(error):
                raise ResourceError(
                    f"provenance_timestamp {timestamp}: the authority does not answer ({reason(error)}); run "
                    "the same command again, or leave it out"
                ) from None
            raise _Refused(reason(error)) from None

    def _try(self) -> None:
        """Sign a picture of one pixel, and read the signature back. Raises ConfigError."""
        from PIL import Image

        picture, signed = io.BytesIO(), io.BytesIO()
        Image.new("RGB", (1, 1)).save(picture, "PNG")
        picture.seek(0)
        created = {"action": "c2pa.created", "digitalSourceType": f"{SOURCE_TYPES}digitalCreation"}
        actions = {"label": "c2pa.actions.v2", "data": {"actions": [created]}}
        manifest = {"claim_generator_info": [{"name": "omniavatar"}], "assertions": [actions]}
        try:
            self._write("image/png", picture, signed, manifest)
        except _Refused as refused:
            raise ConfigError(
                f"provenance_certificate {self._certificate}: cannot sign ({refused}); it must be an "
                f"end-entity certificate with the usages of C2PA; {PAGE}"
            ) from None
        signed.seek(0)
        found = read_provenance(signed, "image/png")
        if not found.holds:
            raise ConfigError(
                f"provenance_certificate {self._certificate}: its signatures do not hold "
                f"({'; '.join(found.problems)}); {PAGE}"
            )


def _named(name: str, path: Path | None, what: str) -> Path:
    if path is None:
        raise ConfigError(f"{name}: is not set; set it to the PEM file of {what}, or leave provenance out")
    return path


def _read(name: str, path: Path) -> bytes:
    try:
        return read_bytes(path, MOST_PEM_BYTES, ConfigError)
    except ConfigError as error:
        raise ConfigError(f"{name} {error}") from None


def _open_to_others(key: Path) -> Iterator[str]:
    if os.name != "posix" or not key.is_file():
        return
    found = key.stat()
    if found.st_mode & (0o077 if found.st_uid == os.geteuid() else 0o007):
        yield f"provenance_key {key}: other users can read or change it; run `chmod 600 {key}`"


def _checked(
    credentials: Credentials, certificate: Path, chain: bytes, key: Path, secret: bytes
) -> tuple[str, str]:
    """Digest of the signing certificate, and the algorithm. Raises ConfigError."""
    from cryptography import x509
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives import hashes, serialization

    try:
        certificates = x509.load_pem_x509_certificates(chain)
    except ValueError:
        raise ConfigError(
            f"provenance_certificate {certificate}: holds no PEM certificates; give the chain, the signing "
            "certificate first"
        ) from None
    now = datetime.now(UTC)
    for each in certificates:
        ends, begins = each.not_valid_after_utc, each.not_valid_before_utc
        if now > ends or now < begins:
            when = f"expired on {ends:%Y-%m-%d}" if now > ends else f"is valid from {begins:%Y-%m-%d} only"
            raise ConfigError(
                f"provenance_certificate {certificate}: {each.subject.rfc4514_string()} {when}; renew it"
            )
    try:
        private = serialization.load_pem_private_key(secret, None)
    except TypeError:
        raise ConfigError(
            f"provenance_key {key}: is encrypted; decrypt it (`openssl pkcs8`) and keep it readable for "
            "this user only"
        ) from None
    except (ValueError, UnsupportedAlgorithm):
        raise ConfigError(
            f"provenance_key {key}: holds no private key in PEM; give the key of the certificate"
        ) from None
    form = (serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
    if private.public_key().public_bytes(*form) != certificates[0].public_key().public_bytes(*form):
        raise ConfigError(
            f"provenance_key {key}: does not belong to the first certificate of {certificate}; give its key, "
            "and put the signing certificate first"
        )
    return certificates[0].fingerprint(hashes.SHA256()).hex(), _algorithm(credentials, key, private)


def _algorithm(credentials: Credentials, path: Path, key: PrivateKeyTypes) -> str:
    from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa

    if isinstance(key, ec.EllipticCurvePrivateKey) and key.curve.name in _CURVES:
        usable: tuple[str, ...] = (_CURVES[key.curve.name],)
    elif isinstance(key, rsa.RSAPrivateKey):
        usable = ("ps256", "ps384", "ps512")
    elif isinstance(key, ed25519.Ed25519PrivateKey):
        usable = ("ed25519",)
    else:
        raise ConfigError(
            f"provenance_key {path}: is of a kind that C2PA does not use; make an EC key (P-256, P-384, "
            "P-521), an RSA key or an Ed25519 key"
        )
    if credentials.algorithm not in ("auto", *usable):
        raise ConfigError(
            f"provenance_algorithm {credentials.algorithm}: does not fit the key {path}; set it to "
            f"{' or '.join(usable)}, or auto"
        )
    return usable[0] if credentials.algorithm == "auto" else credentials.algorithm


def _packets(path: Path) -> list[tuple[int, int | None, int | None, bytes]]:
    """Stream, times and digest of every packet of an MP4 of this package."""
    with own_video(path) as container:
        return [
            (packet.stream.index, packet.pts, packet.dts, hashlib.sha256(bytes(packet)).digest())
            for packet in container.demux()
            if packet.size
        ]
