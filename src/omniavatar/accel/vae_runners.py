"""How the video VAE runs (`vae`), by name.

`create` takes the loaded `WanVAE` and its device and returns a `VideoVAE`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from omniavatar.device import Backend, Registry, installed
from omniavatar.errors import ResourceError

if TYPE_CHECKING:
    import torch

    from omniavatar.model.vae import VideoVAE, WanVAE


@dataclass(frozen=True, kw_only=True)
class VAERunner(Backend):
    """A way to run the VAE. passes: latents that a decoding pass may have, the largest first."""

    passes: tuple[int, ...] = (1,)


def _plain(vae: WanVAE, device: torch.device) -> VideoVAE:
    return vae


def _fast(vae: WanVAE, device: torch.device) -> VideoVAE:
    from omniavatar.accel.vae import FastVAEConfig, apply_fast_vae

    cuda = device.type == "cuda"
    return apply_fast_vae(vae, FastVAEConfig("triton" if cuda else "eager", paired_columns=cuda))


def _without_triton(device: torch.device) -> str | None:
    usable = device.type != "cuda" or installed("triton")
    return None if usable else "on a GPU it needs `pip install triton`"


VAES: Registry[VAERunner] = Registry(
    "runtime.vae",
    VAERunner(
        name="plain", create=_plain, exact=True, doc="The published VAE's modules as they are.", rank=1
    ),
    VAERunner(
        name="fast",
        create=_fast,
        exact=True,
        doc="Channels-last frames and fused kernels: the same within rounding.",
        needs="any CPU, or a CUDA GPU with package triton",
        unavailable=_without_triton,
        rank=2,
        passes=(2, 1),
    ),
    words=("auto",),
    unknown=ResourceError,
)


def pass_sizes(chosen: str) -> tuple[int, ...]:
    """Latents that a decoding pass may have, the largest first; one entry if the size is fixed.

    Another size may round differently, since the convolution library chooses its kernels by shape.
    """
    return VAES.get(chosen).passes


def choose_vae(name: str, device: torch.device) -> str:
    """The name that `name` stands for on this device; `auto` is fast, but plain on a GPU without triton.

    Raises ResourceError if the name is unknown or the runner cannot be used on `device`.
    """
    return VAES.resolve(name, device).name


def create_vae(chosen: str, vae: WanVAE, device: torch.device) -> VideoVAE:
    """The VAE around loaded weights. chosen: a name from `choose_vae`."""
    runner: VideoVAE = VAES.get(chosen).create(vae, device)
    return runner


def frames_of_pass(latents: int) -> int:
    """Frames that are encoded at once if `latents` latents are decoded at once."""
    return 8 * latents - 4
