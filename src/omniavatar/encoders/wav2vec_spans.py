"""Runs wav2vec 2.0 over audio of any length in constant memory, with the exact result of one call.

Modules and formulas are those of transformers' `Wav2Vec2Model` (Baevski et al. 2020, base architecture: group
norm in front, norms after each layer); this file adds only the loop over spans. These parts depend on the
whole waveform:
- its mean and variance, and those of the first convolution's output (a group norm over all time): summed in
  float64 in separate passes;
- the convolutions: they have no padding, so a span of features needs its samples and a halo;
- the interpolation to one vector per video frame (linear, both ends aligned): positions are computed in
  integers, since in float32 they drift by a few thousandths of a feature after ten minutes;
- the positional convolution: it needs a halo of half its kernel on both sides;
- attention, which needs all keys: each layer holds the keys of as many heads as fit into `kv_bytes` (at least
  one head), and processes the queries in spans.
Hidden states are kept in the result file, everything else in scratch files.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch.nn.functional import linear, pad, scaled_dot_product_attention

from omniavatar.encoders.row_files import ColumnWriter, RowFile, release_pages
from omniavatar.errors import InputError

if TYPE_CHECKING:
    from transformers import Wav2Vec2Model

NORMALISE_EPS = 1e-7


@dataclass(frozen=True)
class SpanPlan:
    """Sizes of the loop: `features` and `frames` per span, `kv_bytes` for keys and values in memory."""

    features: int
    frames: int
    kv_bytes: int


@dataclass(frozen=True)
class FrontEnd:
    """Geometry of the convolutions: a feature reads `field` samples; the next one starts `stride` later."""

    field: int
    stride: int

    @classmethod
    def of(cls, kernels: tuple[int, ...], strides: tuple[int, ...]) -> FrontEnd:
        reach = sum((kernel - 1) * prod(strides[:layer]) for layer, kernel in enumerate(kernels))
        return cls(field=1 + reach, stride=prod(strides))

    def features(self, samples: int) -> int:
        return max(0, (samples - self.field) // self.stride + 1)


class NormalisedWaveform:
    """A waveform scaled to zero mean and unit variance, with zeros appended up to `padded` samples."""

    def __init__(self, waveform: np.ndarray, padded: int, span: int) -> None:
        self.waveform, self.padded = waveform, padded
        samples = len(waveform)
        total = sum(float(part.sum(dtype=np.float64)) for part in self._parts(span))
        self.mean = total / samples
        squares = sum(
            float(np.square(part.astype(np.float64) - self.mean).sum()) for part in self._parts(span)
        )
        if not np.isfinite(squares):
            raise InputError("audio: the waveform has values that are not finite; convert the file again")
        self.scale = 1.0 / np.sqrt(squares / samples + NORMALISE_EPS)

    def _parts(self, span: int) -> Iterator[np.ndarray]:
        for start in range(0, len(self.waveform), span):
            yield np.asarray(self.waveform[start : start + span])
            release_pages(self.waveform)

    def read(self, start: int, stop: int) -> torch.Tensor:
        """Samples start..stop of the padded waveform: (1, 1, n) float32."""
        values = np.zeros(stop - start, np.float32)
        known = self.waveform[start : min(stop, len(self.waveform))]
        values[: len(known)] = (np.asarray(known, np.float64) - self.mean) * self.scale
        release_pages(self.waveform)
        return torch.from_numpy(values)[None, None]


class SpanEncoder:
    """Encodes one waveform. `model` is on its device, in evaluation mode."""

    def __init__(
        self, model: Wav2Vec2Model, waveform: NormalisedWaveform, frames: int, plan: SpanPlan
    ) -> None:
        parameter = next(model.parameters())
        self.device, self.dtype = parameter.device, parameter.dtype
        self.model, self.waveform, self.frames, self.plan = model, waveform, frames, plan
        config = model.config
        self.front = FrontEnd.of(tuple(config.conv_kernel), tuple(config.conv_stride))
        self.features = self.front.features(waveform.padded)
        self.layers = model.encoder.layers
        self.width = config.hidden_size
        self.head_dim = self.width // config.num_attention_heads
        head_bytes = 2 * frames * self.head_dim * parameter.element_size()
        self.group = max(1, min(config.num_attention_heads, plan.kv_bytes // head_bytes))
        self.groups = [
            (head, min(head + self.group, config.num_attention_heads))
            for head in range(0, config.num_attention_heads, self.group)
        ]

    def steps(self) -> int:
        """Number of calls of `on_step` in `run`."""
        feature_spans = -(-self.features // self.plan.features)
        frame_spans = -(-self.frames // self.plan.frames)
        return 2 * feature_spans + frame_spans * (2 + len(self.layers) * (2 * len(self.groups) + 1))

    def run(self, result: ColumnWriter, scratch: Path, on_step: Callable[[], None]) -> None:
        """Fill `result`, one row per frame: the last hidden state, then every hidden state.

        scratch: folder for temporary files.
        """
        with RowFile(scratch / "features", self.features, self.model.config.conv_dim[-1]) as features:
            mean, variance = self._first_layer_statistics(on_step)
            self._convolve(features, mean, variance, on_step)
            with RowFile(scratch / "projected", self.frames, self.width) as projected:
                self._project(features, projected, on_step)
                self._add_positions(projected, result, on_step)
        rows = self.frames * len(self.groups)
        with RowFile(scratch / "attended", rows, self.group * self.head_dim) as attended:
            for index in range(len(self.layers)):
                self._attend(index, result, attended, on_step)
                self._finish_layer(index, result, attended, on_step)

    def _spans(self, total: int, span: int, on_step: Callable[[], None]) -> Iterator[tuple[int, int]]:
        for start in range(0, total, span):
            yield start, min(start + span, total)
            on_step()

    def _frame_spans(self, on_step: Callable[[], None]) -> Iterator[tuple[int, int]]:
        return self._spans(self.frames, self.plan.frames, on_step)

    def _on_device(self, values: torch.Tensor) -> torch.Tensor:
        return values.to(self.device, self.dtype)

    def _first_layer_statistics(self, on_step: Callable[[], None]) -> tuple[torch.Tensor, torch.Tensor]:
        conv = self.model.feature_extractor.conv_layers[0].conv
        kernel, stride = conv.kernel_size[0], conv.stride[0]
        outputs = (self.waveform.padded - kernel) // stride + 1
        span = -(-outputs // -(-self.features // self.plan.features))
        total = torch.zeros(2, conv.out_channels, dtype=torch.float64, device=self.device)
        for start, stop in self._spans(outputs, span, on_step):
            samples = self.waveform.read(start * stride, (stop - 1) * stride + kernel)
            values = conv(self._on_device(samples))[0]
            for part in values.split(self.plan.features, dim=1):
                exact = part.double()
                total[0] += exact.sum(1)
                total[1] += exact.square().sum(1)
        mean = total[0] / outputs
        return mean, (total[1] / outputs - mean.square()).clamp_min(0)

    def _convolve(
        self, features: RowFile, mean: torch.Tensor, variance: torch.Tensor, on_step: Callable[[], None]
    ) -> None:
        first, *others = self.model.feature_extractor.conv_layers
        norm = first.layer_norm
        scale = norm.weight.double() * (variance + norm.eps).rsqrt()
        shift = norm.bias.double() - mean * scale
        scale, shift = (values.to(self.dtype)[None, :, None] for values in (scale, shift))
        for start, stop in self._spans(self.features, self.plan.features, on_step):
            begin = start * self.front.stride
            samples = self.waveform.read(begin, (stop - 1) * self.front.stride + self.front.field)
            values = first.activation(first.conv(self._on_device(samples)).mul_(scale).add_(shift))
            for layer in others:
                values = layer(values)
            features.write(start, values[0].T)

    def _project(self, features: RowFile, projected: RowFile, on_step: Callable[[], None]) -> None:
        steps = max(1, self.frames - 1)
        for start, stop in self._frame_spans(on_step):
            positions = [frame * (self.features - 1) for frame in range(start, stop)]
            below = torch.tensor([position // steps for position in positions])
            part = torch.tensor([position % steps / steps for position in positions])[:, None]
            first, last = int(below[0]), min(int(below[-1]) + 2, self.features)
            rows = features.read(first, last)
            above = (below + 1).clamp_max(self.features - 1)
            frames = rows[below - first] * (1 - part) + rows[above - first] * part
            projected.write(start, self.model.feature_projection(self._on_device(frames))[0])

    def _add_positions(self, projected: RowFile, result: ColumnWriter, on_step: Callable[[], None]) -> None:
        encoder = self.model.encoder
        halo = encoder.pos_conv_embed.conv.kernel_size[0] // 2
        for start, stop in self._frame_spans(on_step):
            first, last = max(0, start - halo), min(stop + halo, self.frames)
            rows = self._on_device(projected.read(first, last))
            positions = encoder.pos_conv_embed(rows[None])[0]
            inner = slice(start - first, stop - first)
            hidden = encoder.layer_norm(rows[inner] + positions[inner])
            self._store(0, start, hidden, result)

    def _attend(
        self, index: int, result: ColumnWriter, attended: RowFile, on_step: Callable[[], None]
    ) -> None:
        attention = self.layers[index].attention
        for number, (head, end) in enumerate(self.groups):
            columns = slice(head * self.head_dim, end * self.head_dim)
            shape = (1, end - head, self.frames, self.head_dim)
            keys = torch.empty(shape, device=self.device, dtype=self.dtype)
            values = torch.empty_like(keys)
            for start, stop in self._frame_spans(on_step):
                hidden = self._on_device(result.read(1 + index, start, stop))
                keys[:, :, start:stop] = self._heads(attention.k_proj, columns, hidden)
                values[:, :, start:stop] = self._heads(attention.v_proj, columns, hidden)
            for start, stop in self._frame_spans(on_step):
                hidden = self._on_device(result.read(1 + index, start, stop))
                queries = self._heads(attention.q_proj, columns, hidden)
                mixed = scaled_dot_product_attention(queries, keys, values)
                rows = mixed[0].transpose(0, 1).flatten(1)
                missing = attended.width - rows.shape[1]
                rows = pad(rows, (0, missing))
                attended.write(number * self.frames + start, rows)

    def _heads(self, projection: torch.nn.Linear, columns: slice, hidden: torch.Tensor) -> torch.Tensor:
        bias = None if projection.bias is None else projection.bias[columns]
        projected = linear(hidden, projection.weight[columns], bias)
        return projected.unflatten(1, (-1, self.head_dim)).transpose(0, 1)[None]

    def _finish_layer(
        self, index: int, result: ColumnWriter, attended: RowFile, on_step: Callable[[], None]
    ) -> None:
        layer = self.layers[index]
        for start, stop in self._frame_spans(on_step):
            groups = [
                attended.read(number * self.frames + start, number * self.frames + stop)
                for number in range(len(self.groups))
            ]
            mixed = self._on_device(torch.cat(groups, dim=1)[:, : self.width])
            hidden = self._on_device(result.read(1 + index, start, stop))
            hidden = layer.layer_norm(hidden + layer.attention.out_proj(mixed))
            hidden = layer.final_layer_norm(hidden + layer.feed_forward(hidden))
            self._store(1 + index, start, hidden, result)

    def _store(self, state: int, start: int, hidden: torch.Tensor, result: ColumnWriter) -> None:
        result.write(1 + state, start, hidden)
        if state == len(self.layers):
            result.write(0, start, hidden)
