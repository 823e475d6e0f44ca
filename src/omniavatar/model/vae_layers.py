"""Parts of the causal video VAE: convolutions that see only the past, and keep the frames they need again.

A clip is processed in pieces. The earlier frames that a causal layer needs are in a `CausalState` that the
caller owns; an empty state is the start of a clip. Pieces may have any length that the layers' strides allow:
one pass over a whole clip and many short passes give the same numbers. The first frame of a clip is separate:
temporal up- and downsampling act on the frames after it.
Source: Wan 2.1 VAE (arXiv 2503.20314). Shapes: B batch, C channels, T frames, H W pixels of the stage.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from omniavatar.model.conv3d import conv3d

CausalState = dict[nn.Module, Tensor]


class CausalConv3d(nn.Conv3d):
    """3-D convolution that sees only the past: frames of the state, or zeros at the start of a clip."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel: tuple[int, int, int],
        stride: tuple[int, int, int] = (1, 1, 1),
    ) -> None:
        super().__init__(in_channels, out_channels, kernel, stride)
        self.stride: tuple[int, int, int] = stride
        self.padding: tuple[int, int, int] = (0, kernel[1] // 2, kernel[2] // 2)
        self.history = kernel[0] - 1

    def forward(self, x: Tensor, state: CausalState | None = None) -> Tensor:
        if self.history:
            past = None if state is None else state.get(self)
            if past is None:
                past = x.new_zeros(*x.shape[:2], self.history, *x.shape[3:])
            x = torch.cat([past, x], dim=2)
            if state is not None:
                state[self] = x[:, :, -self.history :].clone()
        return conv3d(x, self.weight, self.bias, self.stride, self.padding)


class ChannelRMSNorm(nn.Module):
    """Norm over the channel axis to unit root mean square, times a learned scale (C, 1, 1[, 1])."""

    def __init__(self, channels: int, spatial_axes: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(channels, *(1,) * spatial_axes))

    def forward(self, x: Tensor) -> Tensor:
        return F.normalize(x, dim=1) * (x.shape[1] ** 0.5) * self.gamma


class ResidualBlock(nn.Module):
    """Norm, SiLU, conv, norm, SiLU, conv, plus the input (by a 1x1x1 convolution if the width changes)."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.residual = nn.Sequential(
            ChannelRMSNorm(in_channels, 3),
            nn.SiLU(),
            CausalConv3d(in_channels, out_channels, (3, 3, 3)),
            ChannelRMSNorm(out_channels, 3),
            nn.SiLU(),
            nn.Dropout(0.0),
            CausalConv3d(out_channels, out_channels, (3, 3, 3)),
        )
        self.shortcut: nn.Module = (
            CausalConv3d(in_channels, out_channels, (1, 1, 1))
            if in_channels != out_channels
            else nn.Identity()
        )

    def forward(self, x: Tensor, state: CausalState) -> Tensor:
        short: Tensor = self.shortcut(x)
        for layer in self.residual:
            x = layer(x, state) if isinstance(layer, CausalConv3d) else layer(x)
        return x + short


class FrameAttention(nn.Module):
    """Single-head self-attention among the pixels of each frame."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = ChannelRMSNorm(channels, 2)
        self.to_qkv = nn.Conv2d(channels, channels * 3, 1)
        self.proj = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor, state: CausalState) -> Tensor:
        batch, channels, frames, height, width = x.shape
        images = x.transpose(1, 2).flatten(0, 1)
        qkv = self.to_qkv(self.norm(images)).flatten(2).transpose(1, 2).unsqueeze(1)
        q, k, v = (part.contiguous() for part in qkv.chunk(3, dim=-1))
        out = F.scaled_dot_product_attention(q, k, v)
        out = out.squeeze(1).transpose(1, 2).reshape(batch * frames, channels, height, width)
        return x + self.proj(out).unflatten(0, (batch, frames)).transpose(1, 2)


def _per_frame(layers: nn.Module, x: Tensor) -> Tensor:
    out: Tensor = layers(x.transpose(1, 2).flatten(0, 1))
    return out.unflatten(0, (x.shape[0], x.shape[2])).transpose(1, 2)


class Downsample(nn.Module):
    """Halves height and width; with `temporal` also the number of frames after the clip's first."""

    def __init__(self, channels: int, temporal: bool) -> None:
        super().__init__()
        self.resample = nn.Sequential(
            nn.ZeroPad2d((0, 1, 0, 1)), nn.Conv2d(channels, channels, 3, stride=(2, 2))
        )
        self.time_conv = nn.Conv3d(channels, channels, (3, 1, 1), stride=(2, 1, 1)) if temporal else None

    def forward(self, x: Tensor, state: CausalState) -> Tensor:
        x = _per_frame(self.resample, x)
        if self.time_conv is None:
            return x
        past = state.get(self)
        state[self] = x[:, :, -1:].clone()
        if past is not None:
            return self._halve(self.time_conv, torch.cat([past, x], dim=2))
        first = x[:, :, :1]
        return first if x.shape[2] == 1 else torch.cat([first, self._halve(self.time_conv, x)], dim=2)

    @staticmethod
    def _halve(time_conv: nn.Conv3d, x: Tensor) -> Tensor:
        return conv3d(x, time_conv.weight, time_conv.bias, (2, 1, 1), (0, 0, 0))


class Upsample(nn.Module):
    """Doubles height and width, halves the channels; with `temporal` doubles the frames after the first."""

    def __init__(self, channels: int, temporal: bool) -> None:
        super().__init__()
        self.resample = nn.Sequential(
            nn.Upsample(scale_factor=2.0, mode="nearest-exact"),
            nn.Conv2d(channels, channels // 2, 3, padding=1),
        )
        self.time_conv = CausalConv3d(channels, channels * 2, (3, 1, 1)) if temporal else None

    def forward(self, x: Tensor, state: CausalState) -> Tensor:
        if self.time_conv is not None:
            x = self._double_frames(self.time_conv, x, state)
        return _per_frame(self.resample, x)

    def _double_frames(self, time_conv: CausalConv3d, x: Tensor, state: CausalState) -> Tensor:
        first, rest = (None, x) if self in state else (x[:, :, :1], x[:, :, 1:])
        state[self] = x.new_empty(0)
        if rest.shape[2]:
            pairs = time_conv(rest, state).unflatten(1, (2, -1))
            rest = pairs.permute(0, 2, 3, 1, 4, 5).flatten(2, 3)
        return rest if first is None else torch.cat([first, rest], dim=2)
