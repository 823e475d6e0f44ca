"""The VAE on a separate device: what it returns is what the VAE returns."""

from __future__ import annotations

import pytest
import torch

from omniavatar.accel.vae_elsewhere import VAEElsewhere
from omniavatar.checkpoint.vae import random_vae
from omniavatar.config.load import load_config
from omniavatar.engine.block_session import arrival_of_all
from omniavatar.engine.numbers import WindowNumbers
from omniavatar.errors import ConfigError, NumbersError
from omniavatar.model.sizes import VAEConfig

CPU = torch.device("cpu")
META = torch.device("meta")


@torch.inference_mode()
def test_pixels_and_latents_are_those_of_the_vae() -> None:
    vae = random_vae(VAEConfig(dim=8), dtype=torch.float32, device=CPU, seed=0)
    elsewhere = VAEElsewhere(vae, CPU)
    generator = torch.Generator().manual_seed(0)
    video = torch.rand(1, 3, 5, 16, 16, generator=generator) * 2 - 1
    latent = vae.encode(video)
    assert torch.equal(elsewhere.encode(video), latent)
    wanted = torch.cat(list(vae.decode_stream(latent)), 2)
    assert torch.equal(torch.cat(list(elsewhere.decode_stream(latent)), 2), wanted)
    more = elsewhere.begin_clip()
    pieces = [piece for part in latent.split(1, dim=2) for piece in more(part)]
    assert torch.equal(torch.cat(pieces, 2), wanted)


class Devices:
    """A VAE that only says on which devices its inputs lie."""

    def encode(self, video: torch.Tensor) -> torch.Tensor:
        assert video.device == META
        return torch.zeros(1)

    def begin_clip(self):
        def decode(latent: torch.Tensor):
            assert latent.device == META
            yield latent

        return decode


def test_inputs_go_to_the_vae_and_latents_come_back() -> None:
    elsewhere = VAEElsewhere(Devices(), META)  # type: ignore[arg-type]
    assert elsewhere.encode(torch.zeros(1, 3, 1, 8, 8)).device == CPU
    (pixels,) = elsewhere.decode_stream(torch.zeros(1, 16, 1, 1, 1))
    assert pixels.device == META


def test_a_window_waits_for_both_devices() -> None:
    waited: list[torch.device] = []

    def arrival(device: torch.device):
        return lambda: waited.append(device)

    arrival_of_all(arrival, (CPU, META), CPU)()
    assert waited == [CPU, META]


def test_parts_of_two_devices_are_checked_in_their_order() -> None:
    numbers = WindowNumbers("block 3", "try dtype=bf16", META)  # read at the end, as on a GPU
    numbers.add("latents", torch.ones(2))
    numbers.add("pixels", torch.tensor([float("nan")]))
    numbers.send()
    with pytest.raises(NumbersError, match="block 3: the pixels hold"):
        numbers.check()


def test_windows_that_need_their_pixels_refuse_it() -> None:
    with pytest.raises(ConfigError, match=r"vae_device.*each window needs the pixels of the one before"):
        load_config(None, ["weights=random", "scale=nano", "vae_device=cuda:1"])
    with pytest.raises(ConfigError, match=r"vae_device.*must be auto, cpu, cuda or cuda:N"):
        load_config("configs/livetalk.yaml", ["weights=random", "scale=nano", "vae_device=gpu1"])
