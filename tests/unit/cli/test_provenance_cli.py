"""`generate --provenance` and `verify-provenance`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from certificates import MANIFEST, Identity, make_identity, plain_video
from command_line import NANO, PORTRAIT, error_lines, run
from omniavatar.media.signing import Credentials, Signer


@pytest.fixture(scope="module")
def identity(tmp_path_factory: pytest.TempPathFactory) -> Identity:
    return make_identity(tmp_path_factory.mktemp("identity"))


@pytest.fixture
def signed(identity: Identity, tmp_path: Path) -> Path:
    video = plain_video(tmp_path)
    Signer(Credentials(identity.chain, identity.key)).sign(video, MANIFEST)
    return video


def test_it_prints_what_the_manifest_says(signed: Path, identity: Identity) -> None:
    result = run("verify-provenance", str(signed), "--trust", str(identity.root))
    assert result.exit_code == 0, result.stderr
    lines = dict(line.split(maxsplit=1) for line in result.stdout.splitlines())
    assert lines["holds"] == "yes" and lines["signer"].startswith("Test Signer, Test Studio (trusted)")
    assert lines["program"] == "omniavatar 1"
    assert lines["action"] == "c2pa.created, trainedAlgorithmicMedia, by omniavatar 1"
    assert "not checked; add --trust" in run("verify-provenance", str(signed)).stdout


def test_a_changed_byte_fails_with_the_reason(signed: Path) -> None:
    data = bytearray(signed.read_bytes())
    data[-5] ^= 1
    signed.write_bytes(data)
    result = run("verify-provenance", str(signed), "--json")
    assert result.exit_code == 3
    shown = json.loads(result.stdout)
    assert shown["holds"] is False and "bmffHash.mismatch" in shown["problems"][0]
    (line,) = error_lines(result)
    assert "does not hold" in line and "bmffHash.mismatch" in line


def test_a_signer_outside_the_list_and_a_file_without_a_manifest_fail(signed: Path, tmp_path: Path) -> None:
    other = make_identity(tmp_path / "other")
    result = run("verify-provenance", str(signed), "--trust", str(other.root))
    assert result.exit_code == 3 and "does not name its signer, Test Signer" in error_lines(result)[0]
    (tmp_path / "again").mkdir()
    result = run("verify-provenance", str(plain_video(tmp_path / "again")))
    assert result.exit_code == 3 and "has no C2PA manifest" in error_lines(result)[0]
    assert run("verify-provenance", str(tmp_path / "none.mp4")).exit_code == 3


@pytest.mark.parametrize("option", ["--provenance", "--hp=provenance=true"])
def test_generate_without_a_certificate_is_one_line(option: str, tmp_path: Path) -> None:
    arguments = ("--prompt", "A man talks", "--image", PORTRAIT, "--output", str(tmp_path / "v.mp4"))
    random = "--hp=weights=random,scale=nano,device=cpu,exp_path=null"
    result = run("generate", "--config", NANO, *arguments, random, option)
    assert result.exit_code == 2, result.stderr
    (line,) = error_lines(result)
    assert "provenance_certificate: is not set" in line and list(tmp_path.iterdir()) == []
