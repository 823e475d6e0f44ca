"""The fast VAE with float8 convolutions: the 3x3x3 ones of residual blocks, in both directions.

What changes:
- weights are e4m3 with a scale for each output channel, inputs e4m3 with one fixed power of two
  (`kernels.float8_conv`); sums are float32;
- bias and residual are added in the convolution's end, and norm and SiLU of the next one are taken there too
  where a program has all channels (96 and 192). So between two convolutions nothing but float8 is written.
What it loses: about 4 % of each convolution's result.
Limits: a CPU (slow equivalent), or a Hopper GPU with package triton. Stem, head, resampling and attention
keep their precision, and so do blocks whose channels are not multiples of 16.

Shapes: as in `vae_frames`.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from omniavatar.accel.kernels.channel_norm import AddNorm
from omniavatar.accel.kernels.float8_conv import (
    Convolve,
    Float8Conv,
    NormTo,
    input_gain,
    joins_norm,
    quantise_conv,
    takes_float8,
)
from omniavatar.accel.kernels.rows import FP8
from omniavatar.accel.vae_frames import Clip, FrameLayers, PendingSum, pointwise
from omniavatar.model.vae import WanVAE
from omniavatar.model.vae_layers import CausalConv3d, ChannelRMSNorm, ResidualBlock


@dataclass(frozen=True, eq=False)
class _Half:
    """Norm, SiLU and convolution: half of a residual block. module: the convolution, as a key."""

    module: CausalConv3d
    gamma: Tensor
    conv: Float8Conv


class Float8Layers(FrameLayers):
    """Runs the plain VAE's modules on frames, residual blocks in float8."""

    def __init__(
        self,
        add_norm: AddNorm,
        merged_upsample: bool,
        matmul_attention: bool,
        paired_columns: bool,
        convolve: Convolve,
        padded: bool,
    ) -> None:
        super().__init__(add_norm, merged_upsample, matmul_attention, paired_columns)
        self._convolve_float8, self._padded = convolve, padded
        self._halves: dict[nn.Module, tuple[_Half, _Half]] = {}
        self._following: dict[nn.Module, nn.Module] = {}

    def prepare(self, vae: WanVAE) -> None:
        """Also make the float8 weights; the plain VAE's own weights stay."""
        super().prepare(vae)
        for network in (
            (*vae.encoder.downsamples, *vae.encoder.middle),
            (*vae.decoder.middle, *vae.decoder.upsamples),
        ):
            for block in network:
                if isinstance(block, ResidualBlock):
                    self._add(block)
            for block, following in itertools.pairwise(network):
                if following in self._halves:
                    self._following[block] = following

    def _add(self, block: ResidualBlock) -> None:
        norm1, _, conv1, norm2, _, _, conv2 = block.residual
        pairs = [(norm, cast(CausalConv3d, conv)) for norm, conv in ((norm1, conv1), (norm2, conv2))]
        if all(takes_float8(conv.in_channels, conv.out_channels) for _, conv in pairs):
            first, second = (self._half(cast(ChannelRMSNorm, norm), conv) for norm, conv in pairs)
            self._halves[block] = first, second

    def _half(self, norm: ChannelRMSNorm, conv: CausalConv3d) -> _Half:
        gamma = norm.gamma.detach().flatten().float()
        padded = self._padded and conv.in_channels % 64 != 0
        assert conv.bias is not None
        return _Half(conv, gamma, quantise_conv(conv.weight, conv.bias, input_gain(gamma), padded))

    def _residual_block(self, block: ResidualBlock, x: PendingSum, clip: Clip) -> PendingSum:
        if block not in self._halves:
            return super()._residual_block(block, x, clip)
        first, second = self._halves[block]
        total = x.value if x.settled else x.place()
        window = clip.ready.pop(first.module, None)
        if window is None:
            window = self._float8_window(first, clip, x.shape)
            self._normed_into(first, window, x, None if x.settled else total, clip)
        between = self._float8_window(second, clip, (*x.shape[:3], first.conv.outputs))
        self._finish(first, window, None, None, second, between, clip)
        short = pointwise(block.shortcut, total) if isinstance(block.shortcut, CausalConv3d) else total
        after = ready = None
        if block in self._following:
            after = self._halves[self._following[block]][0]
            ready = clip.ready[after.module] = self._float8_window(after, clip, short.shape)
        self._finish(second, between, short, short, after, ready, clip)
        return PendingSum(short)

    def _finish(
        self,
        half: _Half,
        window: Tensor,
        residual: Tensor | None,
        total: Tensor | None,
        after: _Half | None,
        target: Tensor | None,
        clip: Clip,
    ) -> None:
        """The convolution of `half`; its sum goes to `total`, its norm to `target`, the window of `after`."""
        border = clip.rows is not None
        if clip.rows is not None:
            clip.rows.border(window[2:])
        clip.past[half.module] = window[-2:].clone()
        norm, pending = None, None
        if after is not None and target is not None:
            inside = self._new_frames(after, target, clip)
            if joins_norm(half.conv.outputs):
                norm = NormTo(after.gamma, inside, after.conv.gain)
            else:
                total = half.module.weight.new_empty(inside.shape) if total is None else total
                pending = PendingSum(total)
        self._convolve_float8(window.view(FP8), half.conv, residual, border=border, total=total, norm=norm)
        if pending is not None and after is not None and target is not None:
            self._normed_into(after, target, pending, None, clip)

    def _normed_into(
        self, half: _Half, window: Tensor, x: PendingSum, total: Tensor | None, clip: Clip
    ) -> None:
        """Norm and SiLU of `x` into the window of `half`; the sum is written to `total` if given."""
        self._add_norm(
            x.value,
            x.bias,
            x.residual,
            total=total,
            gamma=half.gamma,
            out=self._new_frames(half, window, clip),
            activate=True,
            phases=x.phases,
            gain=half.conv.gain,
        )

    def _float8_window(self, half: _Half, clip: Clip, shape: Iterable[int]) -> Tensor:
        """As `_window`, as bytes: few of PyTorch's operations take float8."""
        frames, height, width, channels = shape
        side, beyond = int(half.conv.padded), int(clip.rows is not None)
        size = (2 + frames, height + 2 * beyond, width + 2 * side, channels)
        window = half.module.weight.new_empty(size, dtype=torch.uint8)
        if side:
            window[:, :, :: width + 1].zero_()
        past = clip.past.get(half.module)
        if past is None:
            window[:2].zero_()
        else:
            window[:2] = past
        return window

    @staticmethod
    def _new_frames(half: _Half, window: Tensor, clip: Clip) -> Tensor:
        """The part of a window that holds the new frames."""
        new = window.view(FP8)[2:]
        if clip.rows is not None:
            new = new[:, 1:-1]
        return new[:, :, 1:-1] if half.conv.padded else new
