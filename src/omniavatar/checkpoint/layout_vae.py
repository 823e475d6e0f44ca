"""Names and shapes of the tensors in `Wan2.1_VAE.pth`, from its sizes (see `layout`)."""

from __future__ import annotations

from collections.abc import Iterator

from omniavatar.checkpoint.layout import Shape
from omniavatar.model.sizes import VAEConfig


def vae_tensors(config: VAEConfig) -> Iterator[tuple[str, Shape]]:
    """Tensors of the encoder, the two 1x1x1 convolutions and the decoder, in this order."""
    widths = [config.dim * multiple for multiple in config.dim_mult]
    yield from _encoder(config, widths)
    yield from _conv("conv1", 2 * config.z_dim, 2 * config.z_dim, 1, 1, 1)
    yield from _conv("conv2", config.z_dim, config.z_dim, 1, 1, 1)
    yield from _decoder(config, widths[::-1])


def _encoder(config: VAEConfig, widths: list[int]) -> Iterator[tuple[str, Shape]]:
    yield from _conv("encoder.conv1", config.dim, 3, 3, 3, 3)
    stage, width = 0, config.dim
    for level, next_width in enumerate(widths):
        for _ in range(config.num_res_blocks):
            yield from _residual(f"encoder.downsamples.{stage}", width, next_width)
            stage, width = stage + 1, next_width
        if level < len(widths) - 1:
            name = f"encoder.downsamples.{stage}"
            yield from _conv(f"{name}.resample.1", width, width, 3, 3)
            if config.temporal_downsample[level]:
                yield from _conv(f"{name}.time_conv", width, width, 3, 1, 1)
            stage += 1
    yield from _middle("encoder.middle", width)
    yield from _head("encoder.head", 2 * config.z_dim, width)


def _decoder(config: VAEConfig, widths: list[int]) -> Iterator[tuple[str, Shape]]:
    yield from _conv("decoder.conv1", widths[0], config.z_dim, 3, 3, 3)
    yield from _middle("decoder.middle", widths[0])
    stage, width = 0, widths[0]
    for level, next_width in enumerate(widths):
        for _ in range(config.num_res_blocks + 1):
            yield from _residual(f"decoder.upsamples.{stage}", width, next_width)
            stage, width = stage + 1, next_width
        if level < len(widths) - 1:
            name = f"decoder.upsamples.{stage}"
            yield from _conv(f"{name}.resample.1", width // 2, width, 3, 3)
            if config.temporal_downsample[::-1][level]:
                yield from _conv(f"{name}.time_conv", 2 * width, width, 3, 1, 1)
            stage, width = stage + 1, width // 2
    yield from _head("decoder.head", 3, width)


def _residual(name: str, width: int, next_width: int) -> Iterator[tuple[str, Shape]]:
    yield f"{name}.residual.0.gamma", (width, 1, 1, 1)
    yield from _conv(f"{name}.residual.2", next_width, width, 3, 3, 3)
    yield f"{name}.residual.3.gamma", (next_width, 1, 1, 1)
    yield from _conv(f"{name}.residual.6", next_width, next_width, 3, 3, 3)
    if width != next_width:
        yield from _conv(f"{name}.shortcut", next_width, width, 1, 1, 1)


def _middle(name: str, width: int) -> Iterator[tuple[str, Shape]]:
    yield from _residual(f"{name}.0", width, width)
    yield f"{name}.1.norm.gamma", (width, 1, 1)
    yield from _conv(f"{name}.1.to_qkv", 3 * width, width, 1, 1)
    yield from _conv(f"{name}.1.proj", width, width, 1, 1)
    yield from _residual(f"{name}.2", width, width)


def _head(name: str, outputs: int, width: int) -> Iterator[tuple[str, Shape]]:
    yield f"{name}.0.gamma", (width, 1, 1, 1)
    yield from _conv(f"{name}.2", outputs, width, 3, 3, 3)


def _conv(name: str, outputs: int, inputs: int, *kernel: int) -> Iterator[tuple[str, Shape]]:
    yield f"{name}.weight", (outputs, inputs, *kernel)
    yield f"{name}.bias", (outputs,)
