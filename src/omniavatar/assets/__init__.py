"""The portrait and the speech that `omniavatar demo` runs on: copies of those in examples/."""

from __future__ import annotations

from pathlib import Path

PORTRAIT = Path(__file__).with_name("portrait.png")
SPEECH = Path(__file__).with_name("speech.flac")
