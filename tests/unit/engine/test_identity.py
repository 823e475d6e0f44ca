"""Hashes of a request's sound, which job folders on disk keep."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest

from omniavatar.engine.identity import READ_BYTES, audio_digest
from omniavatar.errors import InputError
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
