"""The VAE's layers on channels-last frames; sums and norms are delayed until the next convolution needs them.

Layers pass on a `PendingSum`: a convolution's bare result, its bias, and the residual still to be added.
`add_norm` adds all three and writes the result into the next convolution's input, whose first frames are past
frames. So nothing is concatenated, and bias, sum, norm and SiLU need no separate pass over memory. The
weights are those of the plain modules under the same keys; only their memory format changes.

Shapes: T frames of this pass, H W pixels of the stage, C channels; frames are (T, H, W, C), contiguous. A
clip's first pass holds its first frame alone, so temporal resampling never mixes it with others. If ranks
share a picture (`Clip.rows`), H counts this rank's rows. The input of a 3x3 or 3x3x3 convolution then has a
border row of the neighbour on either side instead of padding; past frames keep theirs.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from omniavatar.accel.kernels.channel_norm import AddNorm, pair_weight, phase_weight
from omniavatar.model.conv3d import Triple, conv3d
from omniavatar.model.vae import WanVAE
from omniavatar.model.vae_layers import (
    CausalConv3d,
    ChannelRMSNorm,
    Downsample,
    FrameAttention,
    ResidualBlock,
    Upsample,
)

CHANNEL_MULTIPLE = 8
PAIRED_CHANNELS = 96
"""Convolutions of at most this many channels run over pairs of columns (`pair_weight`)."""


@dataclass(frozen=True, eq=False)
class PendingSum:
    """Frames equal to `value + bias + residual`; `value` and `residual` have no other owner.

    phases: `value` is (T, H/2 + 1, W/2 + 1, 4C), see `channel_norm`.
    """

    value: Tensor
    bias: Tensor | None = None
    residual: Tensor | None = None
    phases: bool = False

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(T, H, W, C) of the frames."""
        frames, height, width, channels = self.value.shape
        if self.phases:
            return frames, 2 * (height - 1), 2 * (width - 1), channels // 4
        return frames, height, width, channels

    @property
    def settled(self) -> bool:
        return self.bias is None and self.residual is None and not self.phases

    def place(self) -> Tensor:
        """Memory for the sum: that of the residual, that of the value, or new memory."""
        if self.residual is not None:
            return self.residual
        return self.value.new_empty(self.shape) if self.phases else self.value


class SharedRows(Protocol):
    """One rank's rows of a picture that `ranks` ranks share; see `parallel.picture_rows`."""

    @property
    def ranks(self) -> int: ...

    def mine(self, frames: Tensor) -> Tensor: ...

    def border(self, window: Tensor, above: bool = True, below: bool = True) -> None: ...

    def gather(self, frames: Tensor) -> Tensor: ...


@dataclass(eq=False)
class Clip:
    """What a pass over a clip leaves for the next pass: the last input frames of every causal layer.

    rows: this rank's rows of the picture, None if it has all of them.
    ready: within a pass, inputs of layers that the layer before has made already.
    """

    rows: SharedRows | None = None
    past: dict[nn.Module, Tensor] = field(default_factory=dict)
    ready: dict[nn.Module, Tensor] = field(default_factory=dict)
    started: bool = False

    @property
    def ranks(self) -> int:
        """Ranks that share the picture."""
        return 1 if self.rows is None else self.rows.ranks

    def mine(self, frames: Tensor) -> Tensor:
        """This rank's rows of whole frames."""
        return frames if self.rows is None else self.rows.mine(frames)

    def whole(self, frames: Tensor) -> Tensor:
        """Whole frames from the rows of all ranks."""
        return frames if self.rows is None else self.rows.gather(frames)


class FrameLayers:
    """Runs the plain VAE's modules on frames."""

    def __init__(
        self, add_norm: AddNorm, merged_upsample: bool, matmul_attention: bool, paired_columns: bool
    ) -> None:
        self._add_norm = add_norm
        self._paired_columns = paired_columns
        self._merged_upsample = merged_upsample
        self._matmul_attention = matmul_attention
        self._derived: dict[nn.Module, Tensor] = {}
        self._paired: dict[nn.Module, Tensor] = {}

    def prepare(self, vae: WanVAE) -> None:
        """Make the convolution weights channels-last in place, and derive those of another shape."""
        for module in vae.modules():
            if isinstance(module, nn.Conv3d):
                weight = module.weight.data
                module.weight.data = weight.contiguous(memory_format=torch.channels_last_3d)
                rows, columns = (-size % CHANNEL_MULTIPLE for size in weight.shape[:2])
                if module.kernel_size == (3, 3, 3):
                    wider = F.pad(weight, (0, 0, 0, 0, 0, 0, 0, columns, 0, rows))
                    if rows or columns:
                        self._derived[module] = wider.contiguous(memory_format=torch.channels_last_3d)
                    if self._paired_columns and max(weight.shape[:2]) <= PAIRED_CHANNELS:
                        pairs = pair_weight(wider)
                        self._paired[module] = pairs.contiguous(memory_format=torch.channels_last_3d)
            elif isinstance(module, nn.Conv2d):
                weight = module.weight.data
                module.weight.data = weight.contiguous(memory_format=torch.channels_last)
            if isinstance(module, Upsample) and self._merged_upsample:
                merged = phase_weight(cast(nn.Conv2d, module.resample[1]).weight.data)
                self._derived[module] = merged.contiguous(memory_format=torch.channels_last)

    def stem(self, conv: CausalConv3d, x: Tensor, clip: Clip) -> PendingSum:
        """A network's first convolution; channels that `x` lacks (pixels have three) are zeros."""
        window = self._window(conv, clip, (*x.shape[:3], x.shape[3] + -x.shape[3] % CHANNEL_MULTIPLE))
        inside = self._inside(conv, window, clip)
        inside[..., : x.shape[3]] = x
        inside[..., x.shape[3] :] = 0
        return PendingSum(self._convolve(conv, window, clip), conv.bias)

    def head(self, layers: nn.Sequential, x: PendingSum, clip: Clip) -> Tensor:
        """Norm, SiLU and the last convolution, in float32."""
        norm, _, module = layers
        conv = cast(CausalConv3d, module)
        value = self._norm_and_convolve(cast(ChannelRMSNorm, norm), conv, x, clip, total=None)
        assert conv.bias is not None
        return value[..., : conv.out_channels].float() + conv.bias.float()

    def run(self, layer: nn.Module, x: PendingSum, clip: Clip) -> PendingSum:
        """Any layer between stem and head."""
        if isinstance(layer, ResidualBlock):
            return self._residual_block(layer, x, clip)
        if isinstance(layer, FrameAttention):
            return self._attention(layer, x, clip)
        if isinstance(layer, Downsample):
            return self._downsample(layer, x, clip)
        return self._upsample(cast(Upsample, layer), x, clip)

    def _residual_block(self, block: ResidualBlock, x: PendingSum, clip: Clip) -> PendingSum:
        norm1, _, conv1, norm2, _, _, conv2 = block.residual
        conv1, conv2 = cast(CausalConv3d, conv1), cast(CausalConv3d, conv2)
        total = x.place()
        hidden = self._norm_and_convolve(cast(ChannelRMSNorm, norm1), conv1, x, clip, total)
        out = self._norm_and_convolve(
            cast(ChannelRMSNorm, norm2), conv2, PendingSum(hidden, conv1.bias), clip, total=None
        )
        shortcut = block.shortcut
        short = pointwise(shortcut, total) if isinstance(shortcut, CausalConv3d) else total
        return PendingSum(out, conv2.bias, short)

    def _attention(self, layer: FrameAttention, x: PendingSum, clip: Clip) -> PendingSum:
        total = self._settle(x)
        normed = torch.empty_like(total)
        self._add_norm(
            total,
            None,
            None,
            total=None,
            gamma=layer.norm.gamma,
            out=normed,
            activate=False,
            phases=False,
        )
        qkv = pointwise(layer.to_qkv, normed.flatten(1, 2))
        q, k, v = qkv.chunk(3, dim=-1)
        if clip.rows is not None:
            keys_values = qkv[..., total.shape[3] :].unflatten(1, total.shape[1:3])
            k, v = clip.rows.gather(keys_values).flatten(1, 2).chunk(2, dim=-1)
        attend = matmul_attention if self._matmul_attention else fused_attention
        out = attend(q, k, v).view_as(total)
        return PendingSum(pointwise(layer.proj, out, with_bias=False), layer.proj.bias, total)

    def _downsample(self, layer: Downsample, x: PendingSum, clip: Clip) -> PendingSum:
        conv = cast(nn.Conv2d, layer.resample[1])
        padded = F.pad(self._settle(x), (0, 0, 0, 1, 0, 1))
        if clip.rows is not None:
            clip.rows.border(padded, above=False)
        small = F.conv2d(padded.permute(0, 3, 1, 2), conv.weight, conv.bias, (2, 2))
        small = small.permute(0, 2, 3, 1).contiguous()
        if layer.time_conv is None:
            return PendingSum(small)
        last = small[-1:].clone()
        if clip.started:
            frames = torch.cat([clip.past[layer], small])
            small = _convolve_frames(frames, layer.time_conv.weight, (2, 1, 1), (0, 0, 0))
        clip.past[layer] = last
        return PendingSum(small, layer.time_conv.bias if clip.started else None)

    def _upsample(self, layer: Upsample, x: PendingSum, clip: Clip) -> PendingSum:
        conv = cast(nn.Conv2d, layer.resample[1])
        double = layer.time_conv is not None and clip.started
        frames = (
            self._double_frames(cast(CausalConv3d, layer.time_conv), x, clip) if double else self._settle(x)
        )
        if clip.rows is not None:
            frames = F.pad(frames, (0, 0, 0, 0, 1, 1))
            clip.rows.border(frames)
        padding = int(clip.rows is None), 1
        images = frames.permute(0, 3, 1, 2)
        if self._merged_upsample:
            value = F.conv2d(images, self._derived[layer], None, padding=padding)
        else:
            doubled = F.interpolate(images, scale_factor=2.0, mode="nearest-exact")
            doubled = doubled if clip.rows is None else doubled[:, :, 1:-1]
            value = F.conv2d(doubled, conv.weight, None, padding=padding)
        return PendingSum(value.permute(0, 2, 3, 1).contiguous(), conv.bias, None, self._merged_upsample)

    def _double_frames(self, conv: CausalConv3d, x: PendingSum, clip: Clip) -> Tensor:
        frames, height, width, channels = x.shape
        window = self._window(conv, clip, x.shape)
        self._settle(x, self._inside(conv, window, clip))
        pairs = self._convolve(conv, window, clip).unflatten(3, (2, channels)).permute(0, 3, 1, 2, 4)
        assert conv.bias is not None
        out = window.new_empty(frames, 2, height, width, channels)
        torch.add(pairs, conv.bias.view(2, 1, 1, channels), out=out)
        return out.flatten(0, 1)

    def _norm_and_convolve(
        self, norm: ChannelRMSNorm, conv: CausalConv3d, x: PendingSum, clip: Clip, total: Tensor | None
    ) -> Tensor:
        """`conv`, without its bias, of the norm and SiLU of `x`; the sum is written to `total` if given."""
        window = self._window(conv, clip, x.shape)
        self._add_norm(
            x.value,
            x.bias,
            x.residual,
            total=None if x.settled else total,
            gamma=norm.gamma,
            out=self._inside(conv, window, clip),
            activate=True,
            phases=x.phases,
        )
        return self._convolve(conv, window, clip)

    def _settle(self, x: PendingSum, place: Tensor | None = None) -> Tensor:
        """The sum, written to `place` if given, else to `x.place()`."""
        if x.settled and place is None:
            return x.value
        target = x.place() if place is None else place
        self._add_norm(
            x.value,
            x.bias,
            x.residual,
            total=target,
            gamma=None,
            out=None,
            activate=False,
            phases=x.phases,
        )
        return target

    def _window(self, conv: CausalConv3d, clip: Clip, shape: tuple[int, int, int, int]) -> Tensor:
        """Input (history + T, H, W, C) of a causal convolution: past frames, and memory for T new ones.

        W is larger by 2 if columns are paired (zeros on either side), H by 2 if ranks share the picture.
        """
        frames, height, width, channels = shape
        border = 2 if self._pairs(conv, width) else 0
        rows = height if _neighbours(conv, clip) is None else height + 2
        window = conv.weight.new_empty(conv.history + frames, rows, width + border, channels)
        if border:
            window[:, :, :: width + 1].zero_()
        past = clip.past.get(conv)
        if past is None:
            window[: conv.history].zero_()
        else:
            window[: conv.history] = past
        return window

    def _pairs(self, conv: CausalConv3d, width: int) -> bool:
        return conv in self._paired and width % 2 == 0

    def _inside(self, conv: CausalConv3d, window: Tensor, clip: Clip) -> Tensor:
        """The part of the window that holds the new frames."""
        new = window[conv.history :]
        if _neighbours(conv, clip) is not None:
            new = new[:, 1:-1]
        return new[:, :, 1:-1] if self._pairs(conv, window.shape[2]) else new

    def _convolve(self, conv: CausalConv3d, window: Tensor, clip: Clip) -> Tensor:
        """The convolution without its bias (T, H, W, C'); the window's last frames become the past."""
        rows = _neighbours(conv, clip)
        if rows is not None:
            rows.border(window[conv.history :])
        height = conv.padding[1] if rows is None else 0
        clip.past[conv] = window[-conv.history :].clone()
        if self._pairs(conv, window.shape[2]):
            pairs = window.view(*window.shape[:2], -1, 2 * window.shape[3])
            out = _convolve_frames(pairs, self._paired[conv], (1, 1, 1), (0, height, 0))
            return out.unflatten(3, (2, -1)).flatten(2, 3)
        weight = self._derived.get(conv, conv.weight)
        return _convolve_frames(window, weight, conv.stride, (0, height, conv.padding[2]))


def _neighbours(conv: CausalConv3d, clip: Clip) -> SharedRows | None:
    """What fetches the rows beyond this rank's, None if `conv` needs none."""
    return clip.rows if conv.kernel_size[1] > 1 else None


def _convolve_frames(frames: Tensor, weight: Tensor, stride: Triple, padding: Triple) -> Tensor:
    """`conv3d` of one clip, (T, H, W, C) -> (T', H', W', C'); on CUDA no permutation moves memory."""
    out = conv3d(frames[None].permute(0, 4, 1, 2, 3), weight, None, stride, padding)
    return out.permute(0, 2, 3, 4, 1)[0].contiguous()


def pointwise(conv: nn.Conv2d | nn.Conv3d, x: Tensor, with_bias: bool = True) -> Tensor:
    """A 1x1 or 1x1x1 convolution as a matrix product over the last axis."""
    return F.linear(x, conv.weight.flatten(1), conv.bias if with_bias else None)


def fused_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """PyTorch's attention for one head, (B, L, D): the slow equivalent of `matmul_attention`."""
    return F.scaled_dot_product_attention(q.unsqueeze(1), k.unsqueeze(1), v.unsqueeze(1)).squeeze(1)


def matmul_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention for one head, (B, L, D), with the scores in memory in float32.

    Fast fused kernels take heads of up to 256 channels; the VAE's head has 384.
    """
    scaled = q * q.shape[-1] ** -0.5
    keys = k.transpose(1, 2)
    if q.device.type == "cuda" and q.dtype != torch.float32:
        scores = torch.bmm(scaled, keys, out_dtype=torch.float32)
    else:
        scores = torch.bmm(scaled, keys)
    return torch.bmm(scores.softmax(-1).to(v.dtype), v)
