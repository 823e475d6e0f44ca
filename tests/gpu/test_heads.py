"""FlashHead and LeapTalk on a GPU: parts against float32 or the CPU, and whole videos."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from engine import head_pipeline, make_pipeline, request
from omniavatar import AvatarPipeline
from omniavatar.accel.apply import AccelConfig, apply_accelerations, row_dtype
from omniavatar.accel.attention.registry import create_attention
from omniavatar.accel.decoder import tiny_vae
from omniavatar.accel.kernels.fused import create_fused
from omniavatar.checkpoint.dit import random_dit
from omniavatar.checkpoint.layout import scale_spec
from omniavatar.encoders.audio import AudioEncoder
from omniavatar.encoders.chunk_audio import ChunkEars
from omniavatar.engine.events import StepFinished
from omniavatar.engine.recorder import RunRecorder
from omniavatar.engine.window_loop import WindowResult
from omniavatar.model.colour import ColourMatch
from omniavatar.model.dit import WanDiT
from omniavatar.sampling.chunks import ChunkRule

pytestmark = pytest.mark.gpu
CUDA, CPU = torch.device("cuda"), torch.device("cpu")
SPEC = scale_spec("nano", "flashhead")


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def forward(dit: WanDiT, device: torch.device) -> torch.Tensor:
    values = [random(1, 16, 9, 8, 8), random(1, 16, 9, 8, 8, seed=1), torch.tensor([833.3])]
    sample, y, timestep = (each.to(device) for each in values)
    with torch.inference_mode():
        text = dit.prepare_audio_tokens(random(1, 33, 5, dit.config.audio_dim, seed=2).to(device))
        return dit(sample, y, timestep, text, dit.prepare_audio(None)).float().cpu()


def relative_l2(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize(("quantize", "most"), [("none", 0.02), ("fp8", 0.08)])
def test_fast_forwards(quantize: str, most: float) -> None:
    config = replace(SPEC.dit, dim=512, num_heads=4)
    dit = random_dit(
        config, attention=create_attention("sdpa", CPU, torch.float32)[1], dtype=torch.float32,
        device="cpu", seed=0,
    )  # fmt: skip
    expected = forward(dit, CPU)
    fast = WanDiT(config, create_attention("auto", CUDA, torch.bfloat16)[1])
    fast.load_state_dict(dit.state_dict())
    fast.to(CUDA, torch.bfloat16)
    apply_accelerations(fast, AccelConfig(quantize, True), create_fused(CUDA, row_dtype(quantize)))
    assert relative_l2(forward(fast, CUDA), expected) < most


def test_speech_and_colours_equal_the_cpu() -> None:
    rule, spec = ChunkRule(), SPEC.wav2vec
    sound = np.random.default_rng(0).standard_normal((2, rule.buffer_samples)).astype(np.float32) * 0.1
    heard = []
    for device in (CUDA, CPU):
        encoder = AudioEncoder.random(
            hidden=spec.hidden, layers=spec.num_layers, heads=spec.num_heads, intermediate=spec.ffn,
            conv_dim=spec.conv_dim, pos_kernel=spec.pos_kernel, pos_groups=spec.pos_groups, device=device,
            seed=0,
        )  # fmt: skip
        heard.append(ChunkEars(encoder.model, rule).encode_buffers(sound).cpu())
    assert (heard[0] - heard[1]).abs().max() < 1e-3
    frames, portrait = random(1, 3, 3, 32, 32).sigmoid(), random(1, 3, 1, 32, 32, seed=1).sigmoid()
    matched = [ColourMatch.to(portrait.to(each), 0.8)(frames.to(each)).cpu() for each in (CUDA, CPU)]
    assert (matched[0] - matched[1]).abs().max() < 1e-4


def test_taehv_in_both_directions() -> None:
    clip, latent = random(1, 3, 5, 64, 64).clamp_(-1, 1), random(1, 16, 3, 8, 8)
    wide, half = (
        tiny_vae(None, SPEC.vae, torch.float32, CPU),
        tiny_vae(None, SPEC.vae, torch.bfloat16, CUDA),
    )
    for name in ("encoder", "decoder"):
        getattr(half, name).load_state_dict(getattr(wide, name).state_dict())
    assert relative_l2(half.encode(clip.to(CUDA)).cpu(), wide.encode(clip)) < 0.03
    pixels = [torch.cat(list(each.decode_stream(latent.to(where))), 2).cpu() for each, where in
              ((half, CUDA), (wide, CPU))]  # fmt: skip
    assert relative_l2(pixels[0], pixels[1]) < 0.03


SECONDS = 28 / 25 * 9
"""Nine chunks: LeapTalk's forward is captured in the fifth."""
VARIANTS: list[dict[str, Any]] = [
    {"family": "flashhead"},
    {"family": "flashhead", "quantize": "fp8", "hand_over": "clean"},
    {"family": "leaptalk"},
    {"family": "leaptalk", "anchor_every": 3},
]


@pytest.fixture(scope="module", params=VARIANTS, ids=["flashhead", "fp8-clean", "leaptalk", "anchors"])
def heads(request, heads_checkpoint, tmp_path_factory) -> AvatarPipeline:
    cache = tmp_path_factory.mktemp("text-cache")
    changes = {"device": "cuda", "dtype": "bf16", "cuda_graphs": True, **request.param}
    return head_pipeline(heads_checkpoint, cache, **changes)


def film(pipeline: AvatarPipeline) -> np.ndarray:
    return np.concatenate([chunk.frames for chunk in pipeline.stream(request(SECONDS, prompt=""))])


def test_captured_forwards_make_the_same_video(heads):
    runtime = heads.config.runtime.model_copy(update={"cuda_graphs": False})
    plain = AvatarPipeline.from_config(heads.config.model_copy(update={"runtime": runtime}))
    assert np.array_equal(film(heads), film(plain))


class Watched(AvatarPipeline):
    """A pipeline whose windows must be queued without a synchronising call, after the first few."""

    def windows(self, *arguments: Any, **options: Any) -> Iterator[WindowResult]:
        made = super().windows(*arguments, **options)
        for number in range(1000):
            torch.cuda.set_sync_debug_mode("error" if number > 5 else "default")
            try:
                result = next(made, None)
            finally:
                torch.cuda.set_sync_debug_mode("default")
            if result is None:
                return
            yield result


def test_chunks_are_queued_without_a_synchronising_call(heads):
    assert len(film(Watched.from_config(heads.config))) == 9 * 28


def test_an_interrupted_video_is_resumed_byte_for_byte(heads, tmp_path: Path):
    def interrupt(event: object) -> None:
        if isinstance(event, StepFinished) and event.window == 6:
            raise KeyboardInterrupt

    asked = request(SECONDS, prompt="")
    heads.generate(asked, tmp_path / "whole.mp4")
    with pytest.raises(KeyboardInterrupt):
        AvatarPipeline(heads.config, RunRecorder([interrupt])).generate(asked, tmp_path / "out.mp4")
    assert heads.generate(asked, tmp_path / "out.mp4").resumed_windows >= 3
    assert (tmp_path / "out.mp4").read_bytes() == (tmp_path / "whole.mp4").read_bytes()


@pytest.mark.parametrize("changes", [{"hand_over": "clean"}, {"anchor_every": 2}, {"color_match": 1}])
def test_hand_overs_of_overlapping_windows(nano_checkpoint, tmp_path, changes):
    """Two runs are equal, and other hand-overs make another video."""
    values = {"device": "cuda", "dtype": "bf16", "guidance_scale": 1.0}
    made, plain = (make_pipeline(nano_checkpoint, tmp_path, **values, **each) for each in (changes, {}))
    films = [
        np.concatenate([chunk.frames for chunk in each.stream(request(1.5))]) for each in (made, made, plain)
    ]
    assert np.array_equal(films[0], films[1])
    assert films[0].shape == films[2].shape and not np.array_equal(films[0], films[2])
