"""What the DiT is given for a window beside the noisy sample: the picture, and the states of text and audio.

`PackedInputs` is OmniAvatar's: the portrait's latent on every frame with a mask, keys and values of a text,
and audio that is added before blocks. `TokenInputs` is FlashHead's: the portrait as a clip without a mask,
and audio tokens in the text's place. The DiT's sizes tell which one applies.

Shapes: T latent frames of a window, h w latent pixels, D audio width.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch
from torch import Tensor

from omniavatar.device import upload
from omniavatar.sampling.chunks import ChunkRule, chunk_windows

if TYPE_CHECKING:
    from omniavatar.model.dit import AudioState, TextState, WanDiT
    from omniavatar.parallel.team import Team
    from omniavatar.sampling.guidance import Branch
    from omniavatar.types import Conditioning, Window

States = Mapping[str, "tuple[TextState, AudioState]"]
"""What a forward takes for text and audio, by the name of the guidance branch."""


class WindowInputs(Protocol):
    """The inputs of one request's windows."""

    @property
    def first_given(self) -> Tensor:
        """Given latents (1, 16, 1, h, w) of the first window."""
        ...

    def picture(self, window: Window) -> Tensor:
        """y (1, C, T, h, w), which is concatenated to the sample."""
        ...

    def states(self, window: Window) -> States:
        """Text and audio of a window for each branch."""
        ...

    def start(self, window: Window, given: Tensor) -> Tensor:
        """(1, 16, T, h, w): the given latents, and the portrait's for the others."""
        ...


def window_inputs(
    dit: WanDiT,
    conditioning: Conditioning,
    branches: Collection[Branch],
    team: Team,
    chunk: ChunkRule | None = None,
) -> WindowInputs:
    """The inputs that `dit` takes. chunk: of a model that works in chunks."""
    if dit.config.audio_tokens:
        return TokenInputs(dit, conditioning, branches, chunk or ChunkRule())
    return PackedInputs(dit, conditioning, branches, team)


class PackedInputs:
    """Text, and audio that is added before blocks; only the leader has audio rows."""

    def __init__(
        self, dit: WanDiT, conditioning: Conditioning, branches: Collection[Branch], team: Team
    ) -> None:
        self._dit, self._team, self._branches = dit, team, tuple(branches)
        self.first_given = conditioning.reference_latent
        self._device = conditioning.reference_latent.device
        self._audio = conditioning.audio
        from omniavatar.accel.short_text import prepare_text

        with torch.inference_mode():
            embeddings = {"positive": conditioning.text_positive, "negative": conditioning.text_negative}
            needed = {branch.text for branch in branches}
            self._text = {name: prepare_text(dit, embeddings[name]) for name in sorted(needed)}

    def picture(self, window: Window) -> Tensor:
        """See `WindowInputs.picture`: 16 channels of the portrait and a mask."""
        return image_condition(self.first_given, window)

    def states(self, window: Window) -> States:
        """See `WindowInputs.states`."""
        audio = self._audio_states(window)
        return {each.name: (self._text[each.text], audio[each.audio]) for each in self._branches}

    def start(self, window: Window, given: Tensor) -> Tensor:
        """See `WindowInputs.start`: the portrait's latent stands for all other frames."""
        repeated = self.first_given.expand(-1, -1, window.latent_frames, -1, -1)
        return torch.cat([given, repeated[:, :, given.shape[2] :]], dim=2)

    def _audio_states(self, window: Window) -> dict[str, AudioState]:
        needed = {branch.audio for branch in self._branches}
        states: dict[str, AudioState] = {}
        width = self._dit.config.audio_dim
        if not width:
            return dict.fromkeys(sorted(needed), self._dit.prepare_audio(None))
        if "silence" in needed:
            silence = torch.zeros(1, window.length, width, device=self._device)
            states["silence"] = self._dit.prepare_audio(silence)
        if "speech" in needed:
            assert self._audio is not None
            rows = upload(audio_slice(self._audio, window), self._device) if self._team.leads else None
            speech = self._team.share(rows, (1, window.length, width), self._device)
            states["speech"] = self._dit.prepare_audio(speech)
        return states


class TokenInputs:
    """The portrait as a clip, and audio tokens in place of a text."""

    def __init__(
        self, dit: WanDiT, conditioning: Conditioning, branches: Collection[Branch], rule: ChunkRule
    ) -> None:
        self._dit, self._rule, self._branches = dit, rule, tuple(branches)
        self._clip = conditioning.reference_latent
        self._audio = conditioning.audio
        device = self._clip.device
        self._heard = upload(torch.tensor(chunk_windows(rule)), device)
        self._nothing_added = dit.prepare_audio(None)

    @property
    def first_given(self) -> Tensor:
        """See `WindowInputs.first_given`: the portrait's own latent."""
        return self._clip[:, :, :1]

    def picture(self, window: Window) -> Tensor:
        """See `WindowInputs.picture`: 16 channels, no mask."""
        return self._clip

    def states(self, window: Window) -> States:
        """See `WindowInputs.states`. The tokens are made once for all steps of the chunk."""
        spoken = {audio: self._tokens(window, audio) for audio in {each.audio for each in self._branches}}
        return {each.name: (spoken[each.audio], self._nothing_added) for each in self._branches}

    def start(self, window: Window, given: Tensor) -> Tensor:
        """See `WindowInputs.start`."""
        return torch.cat([given, self._clip[:, :, given.shape[2] :]], dim=2)

    def _tokens(self, window: Window, audio: str) -> TextState:
        shape = (1, *self._heard.shape, self._dit.config.audio_dim)
        if audio == "silence":
            return self._dit.prepare_audio_tokens(torch.zeros(shape, device=self._heard.device))
        assert self._audio is not None
        rows = upload(torch.from_numpy(self._rows(window, self._audio)), self._heard.device)
        return self._dit.prepare_audio_tokens(rows[self._heard.flatten()].view(shape))

    def _rows(self, window: Window, audio: np.ndarray) -> np.ndarray:
        """The rows (R, D) that the chunk's frames hear."""
        count = self._rule.rows
        first = (window.start + self._rule.given) // self._rule.new * count
        rows = np.array(audio[first : first + count], dtype=np.float32)
        if len(rows) != count:
            raise ValueError(f"chunk {window.index} needs audio rows up to {first + count}")
        return rows


def audio_slice(audio: np.ndarray, window: Window) -> Tensor:
    """Audio vectors (1, length, D) of a window: row f-1 for frame f, zeros for the portrait frame."""
    rows = torch.zeros(1, window.length, audio.shape[1])
    first = 1 if window.start == 0 else 0
    start = window.start + first - 1
    piece = np.array(audio[start : start + window.length - first], dtype=np.float32)
    if len(piece) != window.length - first:
        raise ValueError(f"window {window.index} needs audio rows up to {start + window.length - first}")
    rows[0, first:] = torch.from_numpy(piece)
    return rows


def image_condition(reference_latent: Tensor, window: Window) -> Tensor:
    """y (1, 17, T, h, w): the portrait latent on every frame, and a mask (0 given, 1 to generate)."""
    frames = window.latent_frames
    repeated = reference_latent.expand(-1, -1, frames, -1, -1)
    mask = torch.ones_like(repeated[:, :1])
    mask[:, :, : window.given_latents] = 0
    return torch.cat([repeated, mask], dim=1)
