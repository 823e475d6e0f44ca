"""Features of speech for a model that works in chunks, with wav2vec 2.0 as SoulX-FlashHead uses it.

For each chunk the last 8 s of sound are normalised, silence before the sound's start included, and encoded
for themselves. Convolutional features are resampled to one a video frame. A row has the outputs of all
transformer layers, the first hidden state left out (base model: 12 x 768 = 9216 numbers). Only the rows that
the chunk's frames hear are kept.

Seven eighths of the sound are encoded again for every chunk. Normalisation and attention span the 8 s, so
this is needed for the same result. It costs a few milliseconds on a GPU; several chunks run together there.
Source: SoulX-FlashHead (its inference code). The weights and modules are those of `encoders.audio`.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.nn.functional import interpolate, scaled_dot_product_attention

from omniavatar.encoders.audio import exact_convolutions, layers_width
from omniavatar.encoders.row_files import features_file, write_header

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import Wav2Vec2Model

    from omniavatar.sampling.chunks import ChunkRule

VARIANCE_FLOOR = 1e-7
CUDA_BATCH = 8
"""Chunks that run together on a GPU."""


class ChunkEars:
    """Encodes the sound of chunks."""

    def __init__(self, model: Wav2Vec2Model, rule: ChunkRule) -> None:
        self.model, self._rule = model, rule
        self._device = next(model.parameters()).device
        self._batch = CUDA_BATCH if self._device.type == "cuda" else 1

    @torch.inference_mode()
    def encode_buffers(self, buffers: np.ndarray) -> Tensor:
        """Rows (B, `rule.buffer_frames`, D) float32 on the device, of sound (B, `rule.buffer_samples`)."""
        return encode_sound(self.model, torch.from_numpy(buffers).to(self._device), self._rule.buffer_frames)

    def encode(self, waveform: np.ndarray, chunks: int) -> Iterator[np.ndarray]:
        """Yield the rows (`rule.rows`, D) float32 that each chunk hears.

        - waveform: (samples,) float32 at 16 kHz, an array or a memory map; silence follows its end.
        """
        for first in range(0, chunks, self._batch):
            numbers = range(first, min(first + self._batch, chunks))
            heard = np.stack([chunk_sound(waveform, number, self._rule) for number in numbers])
            yield from self.encode_buffers(heard)[:, -self._rule.rows :].cpu().numpy()

    def write(self, waveform: np.ndarray, chunks: int, out: Path) -> None:
        """Write the rows of all chunks to `out`, a `.npy` file (chunks * rows, D) that appears when complete.

        Raises OutputError if it cannot be written.
        """
        with features_file(out) as partial, partial.open("wb") as file:
            write_header(file, chunks * self._rule.rows, layers_width(self.model.config))
            for rows in self.encode(waveform, chunks):
                file.write(rows.astype("<f4", copy=False).tobytes())


def chunk_sound(waveform: np.ndarray, chunk: int, rule: ChunkRule) -> np.ndarray:
    """The sound (`rule.buffer_samples`,) that the encoder hears for chunk number `chunk`."""
    end = (chunk + 1) * rule.new * rule.frame_samples
    start = end - rule.buffer_samples
    heard = np.zeros(rule.buffer_samples, np.float32)
    low, high = max(start, 0), min(end, len(waveform))
    if low < high:
        heard[low - start : high - start] = waveform[low:high]
    return heard


def encode_sound(model: Wav2Vec2Model, sound: Tensor, frames: int) -> Tensor:
    """The outputs of all layers (B, frames, layers * width) float32 for sound (B, samples)."""
    dtype = next(model.parameters()).dtype
    variance, mean = torch.var_mean(sound.double(), dim=1, correction=0, keepdim=True)
    normalised = ((sound.double() - mean) / (variance + VARIANCE_FLOOR).sqrt()).to(dtype)
    with exact_convolutions():
        features = model.feature_extractor(normalised)
        resampled = interpolate(features.float(), size=frames, mode="linear", align_corners=True)
        hidden = model.feature_projection(resampled.transpose(1, 2).to(dtype))[0]
        encoder = model.encoder
        hidden = encoder.layer_norm(hidden + encoder.pos_conv_embed(hidden))
        states = []
        for layer in encoder.layers:
            hidden = _layer(layer, hidden, model.config.num_attention_heads)
            states.append(hidden)
    return torch.cat(states, dim=-1).float()


def _layer(layer: Any, hidden_BNC: Tensor, heads: int) -> Tensor:
    """A transformer layer whose norms follow the sums."""
    attention = layer.attention
    q, k, v = (
        projection(hidden_BNC).unflatten(-1, (heads, -1)).transpose(1, 2)
        for projection in (attention.q_proj, attention.k_proj, attention.v_proj)
    )
    mixed = scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
    hidden_BNC = layer.layer_norm(hidden_BNC + attention.out_proj(mixed))
    out: Tensor = layer.final_layer_norm(hidden_BNC + layer.feed_forward(hidden_BNC))
    return out
