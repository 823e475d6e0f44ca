"""Features of speech that arrives in pieces, for a video that is made while someone speaks.

`encoders.audio` encodes a whole recording at once. Here the newest seconds are encoded again for every block
of video frames, so time and memory of a block are constant. Three things differ from the whole recording:
- the mean and variance of the first convolution (a group norm over all time) are those of the sound so far,
  digital silence left out;
- attention and positional convolution reach `past_seconds` back instead of to the start;
- they reach `ahead_frames` forward instead of to the end. This look-ahead delays the video.
Vector k belongs to the sound from k/fps to (k+1)/fps seconds. At rates other than 25 frames a second the
whole recording is stretched by up to one feature (20 ms) at its end, where its last feature is aligned.
Source: wav2vec 2.0 (arXiv 2006.11477); modules are those of transformers' `Wav2Vec2Model`.

Shapes: N video frames, D the width of a frame's vector.
"""

from __future__ import annotations

from fractions import Fraction
from math import ceil, floor
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch.nn.functional import max_pool1d, scaled_dot_product_attention

from omniavatar.encoders.audio import SAMPLE_RATE, AudioEncoder, exact_convolutions
from omniavatar.encoders.wav2vec_spans import NORMALISE_EPS, FrontEnd
from omniavatar.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

PAST_SECONDS = 8.0
AHEAD_FRAMES = 2


class LiveAudioEncoder:
    """Encodes one stream of sound. `width` is D.

    - past_seconds: sound before a block that is encoded with it.
    - ahead_frames: frames after a block whose sound must have arrived before the block is encoded.
    """

    def __init__(
        self,
        encoder: AudioEncoder,
        fps: float | Fraction,
        past_seconds: float = PAST_SECONDS,
        ahead_frames: int = AHEAD_FRAMES,
    ) -> None:
        if past_seconds < 0 or ahead_frames < 0 or fps <= 0:
            raise ValueError(f"past_seconds {past_seconds}, ahead_frames {ahead_frames}, fps {fps}")
        self._model, self.width = encoder.model, encoder.width
        parameter = next(self._model.parameters())
        self._device, self._dtype = parameter.device, parameter.dtype
        config = self._model.config
        self._front = FrontEnd.of(tuple(config.conv_kernel), tuple(config.conv_stride))
        self._per_frame = Fraction(SAMPLE_RATE) / Fraction(fps)
        self.ahead_frames = ahead_frames
        self._past_frames = ceil(past_seconds * Fraction(fps))
        self._statistics = _Statistics(self._model.feature_extractor.conv_layers[0].conv)
        self._kept = np.zeros(0, np.float32)
        self._dropped = 0
        self.frames = 0

    @property
    def samples(self) -> int:
        """Samples that were pushed so far."""
        return self._dropped + len(self._kept)

    def push(self, samples: np.ndarray) -> None:
        """Append sound, (n,) float32 at 16 kHz, n of any size.

        Raises InputError if it has another form or values that are not finite.
        """
        if samples.ndim != 1 or samples.dtype != np.float32:
            raise InputError(f"audio: pieces must be (n,) float32, not {samples.shape} {samples.dtype}")
        if not np.isfinite(samples).all():
            raise InputError("audio: the piece has values that are not finite; check the source")
        self._kept = np.concatenate([self._kept, samples])

    def ready(self, frames: int) -> bool:
        """Whether the sound of the next `frames` frames and of the look-ahead has arrived."""
        return self.samples >= self._last_sample(self.frames + frames + self.ahead_frames)

    def needed(self, frames: int) -> int:
        """Samples that are missing until `ready(frames)`."""
        return max(0, self._last_sample(self.frames + frames + self.ahead_frames) - self.samples)

    @torch.inference_mode()
    def encode(self, frames: int) -> Tensor:
        """Vectors (1, N, D) float32 of the next `frames` frames, on the encoder's device.

        Raises ValueError if they are not `ready`.
        """
        if not self.ready(frames):
            raise ValueError(f"{frames} frames need {self.needed(frames)} more samples")
        first = max(0, self.frames - self._past_frames)
        last = self.frames + frames + self.ahead_frames
        with exact_convolutions():
            states = self._states(self._projected(first, last))
        start = self.frames - first
        self.frames += frames
        self._forget()
        return torch.cat([state[:, start : start + frames] for state in states], dim=-1).float()

    def state(self) -> dict[str, Tensor]:
        """All that later blocks depend on, as tensors on the host."""
        numbers = torch.tensor([self._dropped, self.frames])
        return {"kept": torch.from_numpy(self._kept), "numbers": numbers, **self._statistics.state()}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Continue from a `state`."""
        self._kept = state["kept"].numpy()
        self._dropped, self.frames = (int(value) for value in state["numbers"])
        self._statistics.restore(state)

    def _position(self, frame: int) -> Fraction:
        """The place of a frame among the convolutions' features."""
        return frame * self._per_frame / self._front.stride

    def _last_sample(self, frames: int) -> int:
        """Samples that the features of frames before `frames` read, or their own length if that is more."""
        read = ceil(self._position(frames - 1)) * self._front.stride + self._front.field
        return max(read, ceil(frames * self._per_frame))

    def _forget(self) -> None:
        """Drop sound that no later block reads."""
        first = max(0, self.frames - self._past_frames)
        unread = floor(self._position(first)) * self._front.stride - self._dropped
        unread = min(unread, self._statistics.next_sample - self._dropped)
        if unread > 0:
            self._kept, self._dropped = self._kept[unread:].copy(), self._dropped + unread

    def _read(self, start: int, stop: int) -> Tensor:
        """Samples start..stop of the stream, (1, 1, n) on the device."""
        values = torch.from_numpy(self._kept[start - self._dropped : stop - self._dropped])
        return values[None, None].to(self._device, self._dtype)

    def _projected(self, first: int, last: int) -> Tensor:
        """The transformer's input (1, n, hidden) of frames first..last."""
        begin, end = floor(self._position(first)), ceil(self._position(last - 1)) + 1
        stride, field = self._front.stride, self._front.field
        self._statistics.update(self._read(self._statistics.next_sample, self._last_sample(last)))
        layer, *others = self._model.feature_extractor.conv_layers
        scale, shift = self._statistics.scale_and_shift(layer.layer_norm)
        samples = self._read(begin * stride, (end - 1) * stride + field)
        values = layer.activation(layer.conv(samples).mul(scale).add(shift))
        for each in others:
            values = each(values)
        rows = values[0].T
        positions = [self._position(frame) - begin for frame in range(first, last)]
        below = torch.tensor([floor(position) for position in positions], device=self._device)
        part = torch.tensor([float(position % 1) for position in positions], device=self._device)[:, None]
        above = (below + 1).clamp_max(len(rows) - 1)
        mixed = rows[below] * (1 - part) + rows[above] * part
        projected: Tensor = self._model.feature_projection(mixed[None].to(self._dtype))[0]
        return projected

    def _states(self, projected: Tensor) -> list[Tensor]:
        """The last hidden state, then every hidden state, each (1, n, hidden)."""
        encoder = self._model.encoder
        hidden = encoder.layer_norm(projected + encoder.pos_conv_embed(projected))
        states = [hidden]
        heads = (self._model.config.num_attention_heads, -1)
        for layer in encoder.layers:
            attention = layer.attention
            q, k, v = (
                projection(hidden).unflatten(-1, heads).transpose(1, 2)
                for projection in (attention.q_proj, attention.k_proj, attention.v_proj)
            )
            mixed = scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
            hidden = layer.layer_norm(hidden + attention.out_proj(mixed))
            hidden = layer.final_layer_norm(hidden + layer.feed_forward(hidden))
            states.append(hidden)
        return [states[-1], *states]


class _Statistics:
    """Sums of the first convolution's outputs and of the samples, over all sound so far.

    Digital silence does not count. Otherwise speech after a minute of it would look eight times as loud.
    """

    def __init__(self, conv: torch.nn.Conv1d) -> None:
        self._conv = conv
        self._kernel, self._stride = conv.kernel_size[0], conv.stride[0]
        device = conv.weight.device
        self._sums = torch.zeros(2, conv.out_channels, dtype=torch.float64, device=device)
        self._sample_sums = torch.zeros(3, dtype=torch.float64, device=device)
        self._outputs = 0

    @property
    def next_sample(self) -> int:
        """The first sample of the output that comes next."""
        return self._outputs * self._stride

    def state(self) -> dict[str, Tensor]:
        return {
            "sums": self._sums.cpu(),
            "sample_sums": self._sample_sums.cpu(),
            "outputs": torch.tensor(self._outputs),
        }

    def restore(self, state: Mapping[str, Tensor]) -> None:
        device = self._sums.device
        self._sums, self._sample_sums = state["sums"].to(device), state["sample_sums"].to(device)
        self._outputs = int(state["outputs"])

    def update(self, samples: Tensor) -> None:
        """Add the outputs of `samples` (1, 1, n), which begin at `next_sample`."""
        outputs = (samples.shape[-1] - self._kernel) // self._stride + 1
        if outputs < 1:
            return
        used = samples[..., : (outputs - 1) * self._stride + self._kernel]
        counts = (max_pool1d(used.abs(), self._kernel, self._stride)[0, 0] > 0).double()
        values = self._conv(used)[0].double()
        self._sums[0] += (values * counts).sum(1)
        self._sums[1] += (values.square() * counts).sum(1)
        new = samples[0, 0, : outputs * self._stride].double().view(outputs, self._stride)
        sums = torch.stack([new.sum(1), new.square().sum(1), torch.ones_like(counts)])
        self._sample_sums += (sums * counts).sum(1)
        self._outputs += outputs

    def scale_and_shift(self, norm: torch.nn.GroupNorm) -> tuple[Tensor, Tensor]:
        """The group norm of the normalised sound as a factor and a summand of the raw outputs, (1, C, 1)."""
        count = self._sample_sums[2].clamp_min(1)
        mean = self._sums[0] / count
        variance = (self._sums[1] / count - mean.square()).clamp_min(0)
        sample_mean, square = self._sample_sums[:2] / (count * self._stride)
        loudness = (square - sample_mean.square()).clamp_min(0) + NORMALISE_EPS
        scale = norm.weight.double() * (variance + norm.eps * loudness).rsqrt()
        shift = norm.bias.double() - mean * scale
        dtype = self._conv.weight.dtype
        return scale.to(dtype)[None, :, None], shift.to(dtype)[None, :, None]
