"""Loads the video VAE from `Wan2.1_VAE.pth` (or safetensors with the same names); sizes come from shapes."""

from __future__ import annotations

import re

import torch

from omniavatar.checkpoint.initial import fill_random
from omniavatar.checkpoint.outside import fitting
from omniavatar.checkpoint.reader import PathLike, TensorFiles
from omniavatar.checkpoint.strict import file_sources, load_strict
from omniavatar.errors import CheckpointError
from omniavatar.model.sizes import VAEConfig
from omniavatar.model.vae import WanVAE

REMEDY = "use Wan2.1_VAE.pth"


def inspect_vae(path: PathLike) -> VAEConfig:
    """Sizes of the VAE in a file. Raises CheckpointError if it is not a Wan VAE."""
    with TensorFiles(path) as files, fitting(files.origin, REMEDY):
        return _config(files)


def load_vae(path: PathLike, *, dtype: torch.dtype, device: torch.device | str) -> WanVAE:
    """The VAE on `device`, in evaluation mode and without gradients.

    Raises CheckpointError if the file is missing, damaged or does not fit.
    """
    with TensorFiles(path) as files:
        with fitting(files.origin, REMEDY), torch.device("meta"):
            model = WanVAE(_config(files))
        load_strict(model, file_sources(files), dtype=dtype, device=device, origin=files.origin)
    return model.eval()


def random_vae(config: VAEConfig, *, dtype: torch.dtype, device: torch.device | str, seed: int) -> WanVAE:
    """A VAE with random weights made on `device` (see `initial`)."""
    with torch.device("meta"):
        model = WanVAE(config)
    fill_random(model, dtype=dtype, device=device, seed=seed)
    return model.eval()


def _config(files: TensorFiles) -> VAEConfig:
    """Sizes from the encoder's stages: residual blocks, and a `resample` at the end of each level."""
    if "encoder.conv1.weight" not in files or "conv2.weight" not in files:
        raise CheckpointError(
            f"{files.origin}: has no encoder.conv1 and conv2 weights, so it is not a Wan video VAE; {REMEDY}"
        )
    dim = files.shape("encoder.conv1.weight")[0]
    stages: dict[int, set[str]] = {}
    for key in files.keys():  # noqa: SIM118  (not a dict)
        match = re.match(r"encoder\.downsamples\.(\d+)\.(.+)", key)
        if match:
            stages.setdefault(int(match[1]), set()).add(match[2])
    widths: list[int] = []
    temporal: list[bool] = []
    blocks_of_level = [0]
    width = dim
    for number in sorted(stages):
        names = stages[number]
        if "resample.1.weight" in names:
            widths.append(width)
            temporal.append("time_conv.weight" in names)
            blocks_of_level.append(0)
        elif "residual.2.weight" in names:
            width = files.shape(f"encoder.downsamples.{number}.residual.2.weight")[0]
            blocks_of_level[-1] += 1
    widths.append(width)
    return VAEConfig(
        dim=dim,
        z_dim=files.shape("conv2.weight")[0],
        dim_mult=tuple(w // dim for w in widths),
        num_res_blocks=blocks_of_level[0],
        temporal_downsample=tuple(temporal),
    )
