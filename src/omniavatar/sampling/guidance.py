"""Guidance as a weighted sum of branches, with separate scales for text and audio.

`v = a*v(positive, speech) + (g-a)*v(positive, silence) + (1-g)*v(negative, silence)`, with the text scale g
and the audio scale a. This covers the reference's two- and three-pass formulas and all their special cases. A
branch of weight zero does not run; branches with equal conditioning are one branch.
Source: classifier-free guidance (arXiv 2207.12598), OmniAvatar's split of text and audio scales.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Text = Literal["positive", "negative"]
Audio = Literal["speech", "silence"]


@dataclass(frozen=True)
class Branch:
    """One forward pass of a step: what it is conditioned on and its weight in the sum."""

    text: Text
    audio: Audio
    weight: float

    @property
    def name(self) -> str:
        return f"{self.text}+{self.audio}"


def guidance_branches(text_scale: float, audio_scale: float | None, has_audio: bool) -> tuple[Branch, ...]:
    """The branches that must run. audio_scale: None uses the text scale; it is ignored without audio."""
    g = text_scale
    a = g if audio_scale is None or not has_audio else audio_scale
    weights: dict[tuple[Text, Audio], float] = {}
    speech: Audio = "speech" if has_audio else "silence"
    terms: tuple[tuple[Text, Audio, float], ...] = (
        ("positive", speech, a),
        ("positive", "silence", g - a),
        ("negative", "silence", 1.0 - g),
    )
    for text, audio, weight in terms:
        weights[text, audio] = weights.get((text, audio), 0.0) + weight
    return tuple(Branch(text, audio, w) for (text, audio), w in weights.items() if w != 0.0)
