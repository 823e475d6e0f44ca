import pytest
import torch
from compare import build_vae, relative_error, under

from omniavatar.accel.vae import FastVAEConfig, apply_fast_vae


@pytest.fixture(scope="module")
def recording(golden):
    tensors, metadata = golden("vae.safetensors")
    return tensors, build_vae(metadata, under(tensors, "weights."))


@pytest.mark.parametrize("frames_at_once", [4, 8])
def test_encode(recording, frames_at_once):
    tensors, vae = recording
    with torch.inference_mode():
        latent = vae.encode(tensors["video"], frames_at_once)
        image = vae.encode(tensors["image"])
    assert relative_error(latent, tensors["latent_of_video"]) <= 1e-4
    assert relative_error(image, tensors["latent_of_image"]) <= 1e-4


@pytest.mark.parametrize("latents_at_once", [1, 2, 100])
def test_decode(recording, latents_at_once):
    tensors, vae = recording
    with torch.inference_mode():
        video = vae.decode(tensors["latent"], latents_at_once)
    assert relative_error(video, tensors["video_of_latent"]) <= 1e-4


def test_stream_yields_frames_as_they_come(recording):
    tensors, vae = recording
    with torch.inference_mode():
        counts = [piece.shape[2] for piece in vae.decode_stream(tensors["latent"])]
    assert counts == [1] + [4] * (tensors["latent"].shape[2] - 1)


@pytest.mark.parametrize("at_once", [1, 2, 3])
def test_fast_vae(recording, at_once):
    tensors, vae = recording
    config = FastVAEConfig("eager", latents_at_once=at_once, frames_at_once=4 * at_once)
    fast = apply_fast_vae(vae, config)
    with torch.inference_mode():
        pairs = (
            (fast.encode(tensors["video"]), tensors["latent_of_video"]),
            (fast.encode(tensors["image"]), tensors["latent_of_image"]),
            (fast.decode(tensors["latent"]), tensors["video_of_latent"]),
        )
    assert all(relative_error(value, recorded) <= 1e-4 for value, recorded in pairs)
