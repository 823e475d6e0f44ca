import pytest
import torch
from compare import build_vae, relative_error, under


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
