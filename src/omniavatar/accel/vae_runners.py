"""How the video VAE runs (`vae`), by name.

`create` takes the loaded `WanVAE` and its device and returns a `VideoVAE`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from omniavatar.device import Backend, Registry, capability, device_name, installed
from omniavatar.errors import ResourceError

if TYPE_CHECKING:
    import torch

    from omniavatar.model.vae import VideoVAE, WanVAE


@dataclass(frozen=True, kw_only=True)
class VAERunner(Backend):
    """A way to run the VAE.

    - passes: latents that a decoding pass may have, the largest first.
    - shares_rows: the GPUs of one video can share its pictures' rows.
    - coded_bytes: bytes of one more number of each weight that it keeps.
    - decoders: the decoders that it can run, `model.decoder`; () for all.
    """

    passes: tuple[int, ...] = (1,)
    shares_rows: bool = False
    coded_bytes: int = 0
    decoders: tuple[str, ...] = ()


def _plain(vae: WanVAE, device: torch.device) -> VideoVAE:
    return vae


def _fast(vae: WanVAE, device: torch.device, float8: bool = False) -> VideoVAE:
    from omniavatar.accel.vae import FastVAEConfig, apply_fast_vae

    cuda = device.type == "cuda"
    kernels: Literal["eager", "triton"] = "triton" if cuda else "eager"
    return apply_fast_vae(vae, FastVAEConfig(kernels, paired_columns=cuda, float8=float8))


def _float8(vae: WanVAE, device: torch.device) -> VideoVAE:
    return _fast(vae, device, float8=True)


def _without_triton(device: torch.device) -> str | None:
    usable = device.type != "cuda" or installed("triton")
    return None if usable else "on a GPU it needs `pip install triton`"


def _on_gpu(device: torch.device) -> bool:
    return device.type == "cuda"


def _without_float8(device: torch.device) -> str | None:
    if device.type == "cuda" and capability(device)[0] != 9:
        return f"{device_name(device)} is no Hopper GPU, which its kernel is written for"
    return _without_triton(device)


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
        shares_rows=True,
    ),
    VAERunner(
        name="fp8",
        create=_float8,
        exact=False,
        doc="The fast VAE with float8 convolutions in its residual blocks, 4 % error each.",
        needs="any CPU, or a Hopper GPU with package triton",
        unavailable=_without_float8,
        suits=_on_gpu,
        passes=(2, 1),
        shares_rows=True,
        coded_bytes=1,
        decoders=("full",),
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
