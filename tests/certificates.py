"""For the tests of provenance: an authority, a signer that it vouches for, and a video to sign."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from omniavatar.media.signing import SOURCE_TYPES
from omniavatar.media.video import GrowingVideo, encode_segment

MANIFEST: dict[str, Any] = {
    "claim_generator_info": [{"name": "omniavatar", "version": "1"}],
    "title": "v.mp4",
    "assertions": [
        {
            "label": "c2pa.actions.v2",
            "data": {
                "actions": [
                    {
                        "action": "c2pa.created",
                        "digitalSourceType": f"{SOURCE_TYPES}trainedAlgorithmicMedia",
                        "softwareAgent": {"name": "omniavatar", "version": "1"},
                    }
                ]
            },
        }
    ],
}
KEYS: dict[str, Any] = {
    "es256": lambda: ec.generate_private_key(ec.SECP256R1()),
    "es384": lambda: ec.generate_private_key(ec.SECP384R1()),
    "ps256": lambda: rsa.generate_private_key(65537, 2048),
    "ed25519": ed25519.Ed25519PrivateKey.generate,
}
ORGANISATION = "Test Studio"


@dataclass(frozen=True)
class Identity:
    """Files of a signer: its chain, its key, and the authority's certificate."""

    chain: Path
    key: Path
    root: Path

    @property
    def settings(self) -> dict[str, Any]:
        return {"provenance_certificate": str(self.chain), "provenance_key": str(self.key)}


def make_identity(
    folder: Path, kind: str = "es256", *, days: tuple[float, float] = (-1, 30), usage: bool = True
) -> Identity:
    """A new signer in `folder`. days: from when to when it is valid, from now. usage: for which C2PA asks."""
    folder.mkdir(exist_ok=True)
    root_key, key = KEYS[kind](), KEYS[kind]()
    root = _certificate("Test Root", "Test Root", root_key, root_key, authority=True)
    leaf = _certificate("Test Signer", "Test Root", key, root_key, days=days, usage=usage)
    made = Identity(folder / "chain.pem", folder / "key.pem", folder / "root.pem")
    made.chain.write_bytes(_pem(leaf) + _pem(root))
    made.root.write_bytes(_pem(root))
    made.key.write_bytes(key_pem(key))
    made.key.chmod(0o600)
    return made


def key_pem(key: Any, password: bytes | None = None) -> bytes:
    hidden: Any = serialization.NoEncryption()
    if password is not None:
        hidden = serialization.BestAvailableEncryption(password)
    return key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, hidden)


def _pem(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(serialization.Encoding.PEM)


def _name(common: str) -> x509.Name:
    values = ((NameOID.ORGANIZATION_NAME, ORGANISATION), (NameOID.COMMON_NAME, common))
    return x509.Name([x509.NameAttribute(kind, value) for kind, value in values])


def _certificate(
    subject: str,
    issuer: str,
    key: Any,
    signing: Any,
    *,
    authority: bool = False,
    days: tuple[float, float] = (-1, 30),
    usage: bool = True,
) -> x509.Certificate:
    now = datetime.now(UTC)
    builder = (
        x509.CertificateBuilder()
        .subject_name(_name(subject))
        .issuer_name(_name(issuer))
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now + timedelta(days=days[0]))
        .not_valid_after(now + timedelta(days=days[1]))
        .add_extension(x509.BasicConstraints(authority, None), True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(signing.public_key()), False)
        .add_extension(
            x509.KeyUsage(not authority, False, False, False, False, authority, authority, False, False), True
        )
    )
    if usage and not authority:
        builder = builder.add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.EMAIL_PROTECTION]), False)
    plain = isinstance(signing, ed25519.Ed25519PrivateKey)
    return builder.sign(signing, None if plain else hashes.SHA256())


def plain_video(folder: Path) -> Path:
    """A finished video of ten frames without a manifest."""
    frames = np.arange(10 * 64 * 64 * 3, dtype=np.uint32).astype(np.uint8).reshape(10, 64, 64, 3)
    encode_segment([frames], folder / "segment.mp4", Fraction(25), (64, 64), preset="ultrafast")
    with GrowingVideo(folder / "partial.mp4", folder / "plain.mp4", Fraction(25)) as growing:
        growing.append(folder / "segment.mp4")
        return growing.finish()
