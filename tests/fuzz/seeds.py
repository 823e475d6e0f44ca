"""Small good files of every kind, made by the libraries that users' programs use too."""

from __future__ import annotations

import io
import json
import wave
from pathlib import Path

import av
import numpy as np
import PIL.Image
import torch
from safetensors.torch import save

from media_files import tones, write_audio

PICTURES = (
    ("png", {}), ("jpeg", {}), ("webp", {}), ("bmp", {}), ("gif", {}), ("tiff", {}), ("avif", {}),
    ("heif", {}), ("jpeg2000", {}), ("tiff", {"compression": "tiff_lzw"}), ("jpeg", {"progressive": True}),
)  # fmt: skip
SOUNDS = (
    ("wav", "pcm_s16le"), ("wav", "pcm_f32le"), ("flac", "flac"), ("mp3", "libmp3lame"), ("ogg", "libopus"),
    ("ogg", "libvorbis"), ("m4a", "aac"), ("mka", "aac"), ("webm", "libopus"), ("aiff", "pcm_s16be"),
    ("caf", "pcm_s16le"), ("ts", "aac"), ("avi", "pcm_s16le"), ("w64", "pcm_s16le"), ("aac", "aac"),
)  # fmt: skip

MODEL_CONFIG = b'{"hidden_size": 24, "conv_dim": [8, 8], "num_hidden_layers": 2}'


def pictures() -> list[bytes]:
    """Pictures of 40x30 in several formats and modes."""
    import pillow_heif

    pillow_heif.register_heif_opener()
    pixels = np.random.default_rng(0).integers(0, 256, (30, 40, 4), np.uint8)
    images = [PIL.Image.fromarray(pixels[..., :3]), PIL.Image.fromarray(pixels).convert("LA")]
    images += [images[0].convert("P"), images[0].convert("L").convert("I;16"), images[0].convert("CMYK")]
    found = []
    for form, options in PICTURES:
        for image in images:
            file = io.BytesIO()
            try:
                image.save(file, form, **options)
            except (OSError, ValueError, KeyError):  # the format lacks this mode
                continue
            found.append(file.getvalue())
    return found


def sounds(folder: Path) -> list[bytes]:
    """0.3 s of two tones in every container above that this FFmpeg writes."""
    found = []
    for ending, codec in SOUNDS:
        path = folder / f"sound.{ending}"
        rate = 48000 if "opus" in codec else 16000
        try:
            write_audio(path, tones(0.3, rate, 2), rate, codec, "stereo")
        except (av.FFmpegError, ValueError):
            continue
        found.append(path.read_bytes())
    plain = io.BytesIO()
    with wave.open(plain, "wb") as file:
        file.setparams((1, 2, 16000, 0, "NONE", ""))
        file.writeframes((tones(0.2, 16000, 1)[0] * 32767).astype("<i2").tobytes())
    return [*found, plain.getvalue(), plain.getvalue() * 2]


def tensors() -> dict[str, torch.Tensor]:
    """A LoRA with its alphas, and a whole weight."""
    dice = torch.Generator().manual_seed(0)
    name = "diffusion_model.blocks.0.self_attn.q"
    return {
        f"{name}.lora_A.weight": torch.randn(2, 8, generator=dice),
        f"{name}.lora_B.weight": torch.randn(8, 2, generator=dice).bfloat16(),
        f"{name}.alpha": torch.tensor(2.0),
        "half": torch.randn(3, 4, generator=dice).half(),
    }


def safetensors_files() -> list[bytes]:
    made = tensors()
    return [save(made), save(made, {"omniavatar": "1", "alpha": "2"}), save({"x": torch.zeros(2, 0)})]


def torch_files() -> list[bytes]:
    """Zip and older files of `torch.save`, plain and wrapped."""
    made = tensors()
    shared = {"a": made["half"], "b": made["half"].T, "c": made["half"][1:]}
    found = []
    for value, zipped in ((made, True), ({"state_dict": made}, True), (shared, True), (made, False)):
        file = io.BytesIO()
        torch.save(value, file, _use_new_zipfile_serialization=zipped)
        found.append(file.getvalue())
    return found


def configs(repository: Path) -> list[bytes]:
    return [path.read_bytes() for path in sorted((repository / "configs").glob("*.yaml"))]


def request_files() -> dict[str, list[bytes]]:
    """Input files by ending, whose pictures and sounds exist beside them."""
    rows = [
        {"prompt": "a woman speaks", "image": "face.png", "audio": "voice.wav", "seed": 3},
        {
            "prompt": "a man, smiling",
            "image": "face.png",
            "steps": 4,
            "output": "b.mp4",
            "guidance_scale": 3.5,
        },
    ]
    lines = "\n".join(json.dumps(row) for row in rows)
    table = 'prompt,image,audio,seed,output\na woman,face.png,voice.wav,3,a.mp4\n"a, b",face.png,,,\n'
    text = "a woman speaks@@face.png@@voice.wav\na man@@face.png\n"
    return {".jsonl": [lines.encode()], ".csv": [table.encode()], ".txt": [text.encode()]}


def calibration() -> bytes:
    """A step cache's file as `omniavatar calibrate` writes it, with few steps."""
    shares, ratios = [0.0, 0.1, 0.2], [1.0, 1.1, 0.9]
    branch = {
        "magnitude_ratios": ratios, "ratio_spread": shares, "cosine_distances": shares, "changes": shares,
    }  # fmt: skip
    return json.dumps(
        {
            "format": 1,
            "model": {"sizes": {"dim": 64}, "weights": {"dit": "a" * 64}},
            "schedule": {"steps": 3, "shift": 5.0, "timesteps": [1000.0, 900.0, 700.0], "sampler": "euler"},
            "measured": {"time": "2026-11-28", "machine": "x"},
            "time_changes": shares,
            "branches": {"positive/speech": branch},
            "magnitude_ratios": ratios,
            "teacache": {"polynomial": [1.0, 2.0, 3.0], "fitted": [0.0, 1.0], "rms_error": 0.1},
        }
    ).encode()


def job_state() -> bytes:
    """`job.json` of a video with two of three windows done."""
    values = {"prompt": '"p"', "sampling.seed": "3", "quantize": '"none"'}
    sums = {"segment_00000.mp4": "0" * 16, "segment_00001.mp4": "1" * 16}
    return json.dumps({"format": 1, "done": 2, "fingerprint": values, "sums": sums}).encode()


def hand_over() -> bytes:
    return save({"given": torch.randn(1, 16, 2, 4, 6, generator=torch.Generator().manual_seed(0))})
