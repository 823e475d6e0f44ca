"""Credentials are checked before any work, and a signed file keeps its pictures and its sound."""

from __future__ import annotations

import hashlib
import resource
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cbor2
import numpy as np
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import dsa, ec
from cryptography.hazmat.primitives.asymmetric.utils import encode_dss_signature

from certificates import KEYS, MANIFEST, ORGANISATION, Identity, key_pem, make_identity, plain_video
from omniavatar.errors import ConfigError, InputError, OutputError, ResourceError
from omniavatar.media.inspect import read_frames
from omniavatar.media.provenance import read_provenance
from omniavatar.media.signing import Credentials, Signer
from omniavatar.media.video import mp4_boxes


@pytest.fixture(scope="module")
def identity(tmp_path_factory: pytest.TempPathFactory) -> Identity:
    return make_identity(tmp_path_factory.mktemp("identity"))


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return plain_video(tmp_path_factory.mktemp("plain"))


@pytest.fixture
def video(plain: Path, tmp_path: Path) -> Path:
    return Path(shutil.copy(plain, tmp_path / "video.mp4"))


def credentials(identity: Identity, **changes: Any) -> Credentials:
    return Credentials(**{"certificate": identity.chain, "key": identity.key, **changes})


@pytest.mark.parametrize("kind", KEYS)
def test_each_kind_of_key_signs_and_the_authority_is_trusted(kind: str, video: Path, tmp_path: Path) -> None:
    made = make_identity(tmp_path / kind, kind)
    signer = Signer(credentials(made))
    assert signer.algorithm == kind and signer.warnings == ()
    label = signer.sign(video, MANIFEST)
    found = read_provenance(video, anchors=made.root)
    assert found.holds and found.trusted and found.problems == ()
    assert found.label == label and found.generator == "omniavatar 1"
    assert found.signer == f"Test Signer, {ORGANISATION}" and found.algorithm.lower() == kind
    assert found.time is None
    assert read_provenance(video).trusted is None


def test_a_signed_file_shows_the_same_frames(plain: Path, video: Path, identity: Identity) -> None:
    Signer(credentials(identity)).sign(video, MANIFEST)
    assert video.read_bytes() != plain.read_bytes()
    assert (np.stack(list(read_frames(video))) == np.stack(list(read_frames(plain)))).all()
    assert list(video.parent.iterdir()) == [video]


def test_signing_again_replaces_the_manifest(video: Path, identity: Identity) -> None:
    signer = Signer(credentials(identity))
    first = signer.sign(video, MANIFEST)
    size = video.stat().st_size
    second = signer.sign(video, MANIFEST)
    assert first != second and video.stat().st_size == size
    assert read_provenance(video).label == second


def test_a_changed_byte_of_picture_or_index_is_seen(video: Path, identity: Identity, tmp_path: Path) -> None:
    Signer(credentials(identity)).sign(video, MANIFEST)
    data = video.read_bytes()
    position, seen = 0, set()
    for kind, box in mp4_boxes(data):
        if kind in ("moov", "mdat"):
            for place in (position + 9, position + len(box) // 2, position + len(box) - 1):
                changed = bytearray(data)
                changed[place] ^= 1
                (tmp_path / "changed.mp4").write_bytes(changed)
                try:
                    found = read_provenance(tmp_path / "changed.mp4", anchors=identity.root)
                except InputError:  # a length of a box
                    continue
                assert not found.holds and not found.trusted
                assert any("bmffHash.mismatch" in problem for problem in found.problems)
                seen.add(kind)
        position += len(box)
    assert seen == {"moov", "mdat"}


def test_a_changed_manifest_is_seen(video: Path, identity: Identity) -> None:
    Signer(credentials(identity)).sign(video, MANIFEST)
    data = video.read_bytes()
    assert data.count(b"trainedAlgorithmicMedia") == 1
    video.write_bytes(data.replace(b"trainedAlgorithmicMedia", b"digitalCapture/////////"))
    assert not read_provenance(video).holds


def test_a_signer_outside_the_list_is_not_trusted(video: Path, identity: Identity, tmp_path: Path) -> None:
    Signer(credentials(identity)).sign(video, MANIFEST)
    other = make_identity(tmp_path / "other")
    found = read_provenance(video, anchors=other.root)
    assert found.holds and found.trusted is False
    assert "its signer is not in the trust list" in found.problems


def _boxes(data: bytes) -> dict[str, bytes]:
    """The content boxes of a JUMBF superbox by their labels, nested ones flattened."""
    found: dict[str, bytes] = {}
    label = ""
    for kind, box in mp4_boxes(data):
        if kind == "jumd":
            label = box[25:].split(b"\0")[0].decode()
        elif kind == "jumb":
            inside = _boxes(box[8:])
            found |= inside
        elif kind == "cbor":
            found[label] = box[8:]
    return found


def test_another_reader_confirms_signature_and_claim(video: Path, identity: Identity) -> None:
    """COSE, CBOR and JUMBF read here; the signature checked by the package cryptography."""
    Signer(credentials(identity)).sign(video, MANIFEST)
    (uuid,) = (box for kind, box in mp4_boxes(video.read_bytes()) if kind == "uuid")
    jumbf = uuid[uuid.index(b"jumb") - 4 :]
    boxes = _boxes(jumbf)
    claim, signed = boxes["c2pa.claim.v2"], cbor2.loads(boxes["c2pa.signature"]).value
    protected, unprotected, _, signature = signed
    header = cbor2.loads(protected)
    certificates = header.get(33) or unprotected.get("x5chain")
    leaf = x509.load_der_x509_certificate(certificates[0])
    assert leaf == x509.load_pem_x509_certificates(identity.chain.read_bytes())[0]
    text = cbor2.dumps(["Signature1", protected, b"", claim])
    half = len(signature) // 2
    numbers = (int.from_bytes(signature[:half], "big"), int.from_bytes(signature[half:], "big"))
    key = leaf.public_key()
    assert isinstance(key, ec.EllipticCurvePublicKey)
    key.verify(encode_dss_signature(*numbers), text, ec.ECDSA(hashes.SHA256()))
    stated = cbor2.loads(claim)
    assert stated["claim_generator_info"]["name"] == "omniavatar"
    urls = [each["url"] for each in stated["created_assertions"]]
    assert any("c2pa.actions.v2" in url for url in urls) and any("c2pa.hash.bmff" in url for url in urls)
    (action,) = cbor2.loads(boxes["c2pa.actions.v2"])["actions"]
    assert action["digitalSourceType"].endswith("trainedAlgorithmicMedia")


def _expired(made: Identity, folder: Path) -> Credentials:
    return credentials(make_identity(folder / "old", days=(-9, -1)))


def _early(made: Identity, folder: Path) -> Credentials:
    return credentials(make_identity(folder / "early", days=(1, 9)))


def _useless(made: Identity, folder: Path) -> Credentials:
    return credentials(make_identity(folder / "useless", usage=False))


def _swapped(made: Identity, folder: Path) -> Credentials:
    return credentials(made, key=make_identity(folder / "other").key)


def _encrypted(made: Identity, folder: Path) -> Credentials:
    path = folder / "locked.pem"
    path.write_bytes(key_pem(KEYS["es256"](), b"secret"))
    return credentials(made, key=path)


def _unknown_kind(made: Identity, folder: Path) -> Credentials:
    """A key of a kind that C2PA does not use, with a certificate of it."""
    key = dsa.generate_private_key(1024)
    template = x509.load_pem_x509_certificates(made.chain.read_bytes())[0]
    builder = x509.CertificateBuilder(
        template.issuer,
        template.subject,
        key.public_key(),
        template.serial_number,
        template.not_valid_before_utc,
        template.not_valid_after_utc,
    )
    (folder / "dsa.pem").write_bytes(key_pem(key))
    from cryptography.hazmat.primitives.serialization import Encoding

    (folder / "dsa_chain.pem").write_bytes(
        builder.sign(KEYS["es256"](), hashes.SHA256()).public_bytes(Encoding.PEM)
    )
    return Credentials(folder / "dsa_chain.pem", folder / "dsa.pem")


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda made, folder: credentials(made, certificate=None), "provenance_certificate: is not set"),
        (lambda made, folder: credentials(made, key=None), "provenance_key: is not set"),
        (lambda made, folder: credentials(made, key=folder / "no.pem"), r"provenance_key .*no\.pem: no such"),
        (lambda made, folder: credentials(made, key=folder), "provenance_key .*folder"),
        (lambda made, folder: credentials(made, key=made.chain), "holds no private key in PEM"),
        (lambda made, folder: credentials(made, certificate=made.key), "holds no PEM certificates"),
        (lambda made, folder: credentials(made, certificate=made.root), "does not belong to the first"),
        (lambda made, folder: credentials(made, algorithm="ed25519"), "set it to es256, or auto"),
        (_expired, r"CN=Test Signer.* expired on \d{4}-\d\d-\d\d; renew it"),
        (_early, r"is valid from \d{4}-\d\d-\d\d only; renew it"),
        (_useless, "cannot sign .*end-entity certificate"),
        (_swapped, "does not belong to the first certificate"),
        (_encrypted, "is encrypted; decrypt it"),
        (_unknown_kind, "of a kind that C2PA does not use"),
    ],
)
def test_wrong_credentials_are_one_line_that_names_them(
    make: Callable[[Identity, Path], Credentials], message: str, identity: Identity, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=message) as error:
        Signer(make(identity, tmp_path))
    assert "provenance_" in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("mode, warned", [(0o644, True), (0o640, True), (0o600, False), (0o400, False)])
def test_a_key_that_others_can_read_is_a_warning(mode: int, warned: bool, tmp_path: Path) -> None:
    made = make_identity(tmp_path / "made")
    made.key.chmod(mode)
    warnings = Signer(credentials(made)).warnings
    assert bool(warnings) == warned
    assert not warned or "chmod 600" in warnings[0]


def test_a_missing_package_is_one_line(identity: Identity, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "c2pa", None)
    with pytest.raises(ResourceError, match=r"c2pa is missing; pip install 'omniavatar\[provenance\]'"):
        Signer(credentials(identity))


def test_an_authority_that_does_not_answer_changes_nothing(video: Path, identity: Identity) -> None:
    before = hashlib.sha256(video.read_bytes()).digest()
    signer = Signer(credentials(identity, timestamp="http://127.0.0.1:9/tsa"))
    with pytest.raises(ResourceError, match=r"provenance_timestamp http://127\.0\.0\.1:9/tsa: the authority"):
        signer.sign(video, MANIFEST)
    assert hashlib.sha256(video.read_bytes()).digest() == before and list(video.parent.iterdir()) == [video]


def test_a_full_disk_changes_nothing(video: Path, identity: Identity) -> None:
    signer, before = Signer(credentials(identity)), video.read_bytes()
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    old = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 100, limit[1]))
    try:
        with pytest.raises(OutputError, match=r"video\.mp4") as error:
            signer.sign(video, MANIFEST)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        signal.signal(signal.SIGXFSZ, old)
    assert "too large" in str(error.value).lower() or "grew beyond" in str(error.value)
    assert video.read_bytes() == before and list(video.parent.iterdir()) == [video]


def test_files_without_a_manifest_are_one_line(video: Path, tmp_path: Path, identity: Identity) -> None:
    with pytest.raises(InputError, match="has no C2PA manifest"):
        read_provenance(video)
    (tmp_path / "text.mp4").write_text("no video")
    with pytest.raises(InputError, match="its manifest cannot be read"):
        read_provenance(tmp_path / "text.mp4")
    with pytest.raises(InputError, match="cannot be read"):
        read_provenance(tmp_path)
    with pytest.raises(ConfigError, match="holds no PEM certificates"):
        read_provenance(video, anchors=identity.key)
