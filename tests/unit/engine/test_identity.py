"""Identities of sounds and weights by content, which job folders on disk keep."""

from __future__ import annotations

import hashlib
import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from omniavatar.checkpoint.fingerprint import whole_digest
from omniavatar.config.schema import ModelConfig, PipelineConfig
from omniavatar.engine.identity import READ_BYTES, audio_digest, content_values, weight_identities
from omniavatar.errors import InputError
from omniavatar.plan.preview import missing_files
from omniavatar.types import Waveform


@pytest.mark.parametrize("size", [0, 1, READ_BYTES, 2 * READ_BYTES + 7])
def test_file_is_hashed_by_its_content(tmp_path: Path, size: int) -> None:
    content = np.random.default_rng(size).bytes(size)
    (tmp_path / "voice.wav").write_bytes(content)
    assert audio_digest(tmp_path / "voice.wav") == hashlib.sha256(content).hexdigest()


def test_waveform_is_hashed_by_its_rate_and_samples() -> None:
    samples = np.arange(12, dtype=np.float32).reshape(6, 2)
    expected = hashlib.sha256(b"16000" + samples[:, 0].tobytes()).hexdigest()
    assert audio_digest(Waveform(samples[:, 0], 16000)) == expected
    assert audio_digest(Waveform(samples[:, 0], 8000)) != expected
    assert audio_digest(Waveform(samples[:, 1], 16000)) != expected


def test_silence_and_unreadable_files(tmp_path: Path) -> None:
    assert audio_digest(None) == "none"
    with pytest.raises(InputError, match=r"none\.wav: cannot be read"):
        audio_digest(tmp_path / "none.wav")


def test_what_never_ends_is_refused_before_it_is_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "voice.wav")
    for path, kind in ((tmp_path / "voice.wav", "FIFO"), (Path("/dev/zero"), "device")):
        with pytest.raises(InputError, match=rf"{path.name}: cannot be read \(it is a {kind}\)"):
            audio_digest(path)
        with pytest.raises(OSError, match=f"it is a {kind}") as caught:
            whole_digest(path)
        assert caught.value.filename == str(path)


def model_in(root: Path) -> ModelConfig:
    loras = [{"path": str(root / name / "lora.safetensors")} for name in ("one", "two")]
    return ModelConfig(dit_path=[root / "dit.safetensors"], wav2vec_path=root / "wav2vec", loras=loras)


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    root = tmp_path / "weights"
    for name in (
        "dit.safetensors",
        "wav2vec/model.safetensors",
        "one/lora.safetensors",
        "two/lora.safetensors",
    ):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(name.encode())
    return root


def test_a_copy_has_the_same_identity(weights: Path, tmp_path: Path) -> None:
    identity = weight_identities(model_in(weights))
    assert set(identity) == {"file.dit.safetensors", "file.wav2vec", "file.lora.safetensors"}
    copy = Path(shutil.copytree(weights, tmp_path / "copy"))
    for file in copy.rglob("*"):
        os.utime(file, (1, 1))
    (copy / "wav2vec" / ".cache").mkdir()
    (copy / "wav2vec" / ".cache" / "model.metadata").write_text("downloaded today")
    assert weight_identities(model_in(copy)) == identity


@pytest.mark.parametrize("changed", ["dit.safetensors", "wav2vec/model.safetensors", "one/lora.safetensors"])
def test_one_changed_byte_is_another_identity(weights: Path, changed: str) -> None:
    """Also of the first of two LoRAs with one name; size and time stay."""
    before = weight_identities(model_in(weights))
    file = weights / changed
    stamp = file.stat().st_mtime_ns
    content = bytearray(file.read_bytes())
    content[3] ^= 1
    file.unlink()
    file.write_bytes(content)
    os.utime(file, ns=(stamp, stamp + 1))
    after = weight_identities(model_in(weights))
    name = "file.wav2vec" if "wav2vec" in changed else f"file.{file.name}"
    assert [key for key in before if before[key] != after[key]] == [name]


def test_a_renamed_file_of_a_folder_is_another_identity(weights: Path) -> None:
    before = weight_identities(model_in(weights))
    (weights / "wav2vec" / "model.safetensors").rename(weights / "wav2vec" / "other.safetensors")
    assert weight_identities(model_in(weights)) != before


def test_random_weights_have_no_files(weights: Path) -> None:
    model = model_in(weights).model_copy(update={"weights": "random", "scale": "nano"})
    assert weight_identities(model) == {} and missing_files(model) == []
    (weights / "dit.safetensors").unlink()
    assert missing_files(model_in(weights)) == [weights / "dit.safetensors"]


def test_a_file_is_read_once_while_it_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "voice.wav"
    path.write_bytes(b"one")
    first = whole_digest(path)
    assert first == hashlib.sha256(b"one").hexdigest()
    monkeypatch.setattr(os, "open", None)
    assert whole_digest(path) == first
    monkeypatch.undo()
    path.write_bytes(b"three")
    assert whole_digest(path) == hashlib.sha256(b"three").hexdigest()
    with pytest.raises(OSError, match="it is a folder"):
        whole_digest(tmp_path)


def test_settings_count_the_content_of_weights_not_their_folder(weights: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(weights, tmp_path / "copy"))
    values, same = (content_values(PipelineConfig(model=model_in(root))) for root in (weights, copy))
    assert values == same and str(weights) not in str(values)
    model = model_in(copy)
    swapped = model.model_copy(update={"loras": model.loras[::-1]})
    assert content_values(PipelineConfig(model=swapped)) != values
